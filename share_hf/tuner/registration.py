"""What PEFT needs to be told: that there is a tuner called SHARE, and that its basis is saved with a model."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from transformers import PreTrainedModel

from ..hub.basis_file import SUBSPACE_FILE, StoredBasis, basis_tensors
from ..hub.files import sha256_of, write_tensors
from ..hub.index import ModuleEntry, TreeIndex, write_index
from .config import SHARE, ShareConfig
from .model import ShareModel, stored_bases
from .origin import remember_origins


def register() -> None:
    """Register SHARE with PEFT. Doing it twice changes nothing."""
    if SHARE in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    PEFT_TYPE_TO_CONFIG_MAPPING[SHARE] = ShareConfig
    PEFT_TYPE_TO_TUNER_MAPPING[SHARE] = ShareModel
    PEFT_TYPE_TO_PREFIX_MAPPING[SHARE] = ShareModel.prefix
    remember_origins()
    _save_basis_with(PeftModel)
    _save_basis_with(PreTrainedModel)


def _save_basis_with(model_class: type[PeftModel] | type[PreTrainedModel]) -> None:
    """Let `save_pretrained` write the basis once, at the top of the folder, whatever adapters it saves there."""
    original = model_class.save_pretrained

    @functools.wraps(original)
    def save_pretrained(
        self: PeftModel | PreTrainedModel, save_directory: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> Any:
        result = original(self, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True) and (bases := stored_bases(self)):
            _write_bases(Path(save_directory), bases, next(iter(self.peft_config.values())))
        return result

    model_class.save_pretrained = save_pretrained


def _write_bases(folder: Path, bases: Mapping[str, StoredBasis], config: ShareConfig) -> None:
    write_tensors(folder / SUBSPACE_FILE, basis_tensors(bases))
    index = TreeIndex(
        kind="checkpoint",
        base_model_name_or_path=config.base_model_name_or_path,
        settings=config.subspace_settings(),
        modules={name: ModuleEntry(basis.shape, basis.num_components) for name, basis in bases.items()},
        tasks=(),
        sha256={SUBSPACE_FILE: sha256_of(folder / SUBSPACE_FILE)},
    )
    write_index(folder, index)
