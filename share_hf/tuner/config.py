"""Configuration of the SHARE tuner."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from peft.config import PeftConfig

from ..format.basis_file import StoredBasis
from ..state import Phase
from ..subspace import BasisKind, CoefficientDtype, SubspaceSettings, check_dimensions
from .lora_only import without_options_of_lora


TemporaryInit = Literal["basis", "span", "random"]

_DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "repo_type")

# Phases that a configuration may have. A task of the subspace that is trained further is in `coefficients`.
PHASES = (Phase.COEFFICIENTS, Phase.ADAPT, Phase.INIT)


class ShareType(str):
    """The PEFT type of this tuner: a plain string that also has the attributes of a member of PEFT's own enum."""

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"  # PEFT's `get_model_status` reports the part after the dot

    def __format__(self, specification: str) -> str:
        return format(self.value, specification)


SHARE = ShareType("SHARE")


@dataclass(frozen=True)
class AdapterOrigin:
    """The place that an adapter's configuration was loaded from, which also holds its basis and its weights.

    Args:
        location: Folder, or id of a repository.
        subfolder: Folder of the adapter within the location.
        download_options: Options of `hf_hub_download`.
    """

    location: str
    subfolder: str | None = None
    download_options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, location: str | os.PathLike[str], options: Mapping[str, Any]) -> AdapterOrigin:
        """Return the place from which a loader called with these keyword arguments reads an adapter."""
        download_options = {name: options[name] for name in _DOWNLOAD_OPTIONS if options.get(name) is not None}
        return cls(str(location), options.get("subfolder"), download_options)

    @property
    def folder(self) -> Path:
        """The adapter's own folder, if the location is a folder."""
        return Path(self.location, self.subfolder or "")


@dataclass(frozen=True)
class GivenBases:
    """The bases that an adapter belongs to, by module, from a subspace in memory.

    Args:
        bases: Bases of all modules of the subspace.
        adapted: Modules that the adapter has coefficients for. None means the modules that its configuration targets.
    """

    bases: Mapping[str, StoredBasis]
    adapted: Collection[str] | None = None


@without_options_of_lora
@dataclass
class ShareConfig(PeftConfig):
    """
    Configuration of a task in a shared subspace (Share, https://huggingface.co/papers/2602.06043).

    All tasks of a model share one basis per layer. A task consists of the coefficients of its update in that basis:
    two matrices of k x p numbers per layer. The adapter's name is the task's name.

    Args:
        num_components (`int`, *optional*, defaults to `32`):
            Upper limit k on the number of directions in a layer's basis, on the output side and on the input side.
        pseudo_rank (`int`, *optional*, defaults to `8`):
            Upper limit p on the rank of a task's update. In a layer (n, d) the rank is at most min(p, n, d). Must not
            exceed `num_components`.
        num_temporary (`int`, *optional*):
            Number φ of leading basis vectors that are trained as temporary factors while a new task is learned. Must
            be less than `num_components`. None means `num_components // 4`.
        temporary_init (`Literal["basis", "span", "random"]`, *optional*, defaults to `"basis"`):
            Initial values of the temporary factors. `"basis"`: the φ leading basis vectors, which coefficients
            combine, as in the paper (Sec. 3.2.2). `"span"`: a LoRA of rank p whose input side holds the p leading
            basis vectors, scaled like the rows of a fresh A, and whose output side is zero (Hu et al. 2021, Sec. 4.1);
            in an embedding, the sides change places, as in PEFT. `"random"`: a fresh LoRA of rank p, whose input side
            lies mostly outside the span of earlier tasks. The last two train as fast and as stably as a LoRA at the
            same learning rate. They have no coefficients, so `num_temporary` and `init_std` have no effect.
        target_modules (`Union[list[str], str]`, *optional*):
            Names of the modules to adapt, a regex, or `"all-linear"`, as for LoRA.
        exclude_modules (`Union[list[str], str]`, *optional*):
            Names of modules not to adapt, or a regex.
        layers_to_transform (`Union[list[int], int]`, *optional*):
            Indices of the layers to adapt.
        layers_pattern (`Union[list[str], str]`, *optional*):
            Name of the `nn.ModuleList` that `layers_to_transform` indexes.
        target_parameters (`list[str]`, *optional*):
            Names, or ends of names, of parameters to adapt, each holding the weights (experts, n, d) of all experts
            of a module. Each expert is a layer. As with LoRA, `target_modules=[]` leaves everything else alone.
        modules_to_save (`list[str]`, *optional*):
            Modules, such as a classification head, that are trained as a whole and kept with their task. PEFT compares
            the ends of names. [`ShareTrainer`] and [`ShareCallback`] add the modules that the base model's checkpoint
            lacks.
        basis (`Literal["joint", "factor"]`, *optional*, defaults to `"joint"`):
            Method by which a merge chooses the basis: `"joint"` weighs the updates of all tasks equally, `"factor"`
            starts from the stacked LoRA factors as in the paper.
        center (`bool`, *optional*, defaults to `False`):
            Whether merges subtract the mean column of the stacked factors, as the paper does. Only for
            `basis="factor"`.
        explained_variance (`float`, *optional*):
            Fraction of the tasks' variance that merges explain with as few directions as possible.
        drift_tolerance (`float`, *optional*):
            Largest relative drift that merges may accumulate for any task. Layers grow to meet it.
        max_components (`int`, *optional*):
            Number of components up to which layers may grow to meet `drift_tolerance`.
        coefficient_dtype (`Literal["float32", "bfloat16", "4bit"]`, *optional*, defaults to `"float32"`):
            Data type in which a subspace stores coefficients. In a model they are always float32.
        tolerance (`float`, *optional*):
            Relative error up to which a merged task takes a rank smaller than `pseudo_rank` in a layer.
        dropout (`float`, *optional*, defaults to `0.0`):
            Dropout probability of the inputs of a task's update in training, like LoRA's `lora_dropout`.
        init_std (`float`, *optional*, defaults to `0.05`):
            Standard deviation σ of a new task's coefficients.
        fan_in_fan_out (`bool`, *optional*, defaults to `False`):
            Whether the target layers store their weight as (in, out), like GPT-2's `Conv1D`.
        phase (`Literal["coefficients", "adapt", "init"]`, *optional*, defaults to `"coefficients"`):
            Part of the task that is trained: its coefficients in the frozen basis; its coefficients and temporary
            factors (Sec. 3.2.2); or, before there is a subspace, free factors of rank p, as in LoRA. Set by the
            trainer.

    Attributes:
        origin (`AdapterOrigin` or `GivenBases`, *optional*):
            Source of the adapter's basis. None for a fresh configuration. Not a field, so it is never saved. The model
            that takes the adapter reads it, and then drops bases that were given.
        fingerprints (`Mapping[str, torch.Tensor]`, *optional*):
            Fingerprints, by module, of the basis that the coefficients to be loaded belong to, if these are in memory.
            Not a field either. The model that takes the adapter compares them with its bases.
        ranks (`Mapping[str, int]`, *optional*): Ranks of these coefficients, by module. Not a field either.

    Raises:
        ValueError: If a value is out of range, or two values contradict each other.
    """

    num_components: int = field(default=32, metadata={"help": "Cap on the number of directions per layer (k)."})
    pseudo_rank: int = field(default=8, metadata={"help": "Rank of a task's update in each layer (p)."})
    num_temporary: int | None = field(
        default=None,
        metadata={
            "help": "Number of leading basis vectors trained as temporary factors (φ); num_components // 4 by default."
        },
    )
    temporary_init: TemporaryInit = field(
        default="basis",
        metadata={"help": "How temporary factors start: 'basis', or as a LoRA, with the basis' 'span' or 'random' A."},
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the modules to adapt, a regex, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules not to adapt, or a regex."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts in."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of parameters that hold the weights of experts to adapt."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained as a whole and kept with their task, such as a head."}
    )
    basis: BasisKind = field(
        default="joint", metadata={"help": "How a merge chooses the basis: 'joint', or 'factor' as in the paper."}
    )
    center: bool = field(
        default=False, metadata={"help": "Subtract the mean column in merges, as the paper does ('factor' only)."}
    )
    explained_variance: float | None = field(
        default=None, metadata={"help": "Use the fewest directions that explain this fraction of the variance."}
    )
    drift_tolerance: float | None = field(
        default=None, metadata={"help": "Largest relative drift of any task that merges may add up to."}
    )
    max_components: int | None = field(
        default=None, metadata={"help": "Number of directions up to which layers may grow to meet drift_tolerance."}
    )
    coefficient_dtype: CoefficientDtype = field(
        default="float32",
        metadata={"help": "Type in which a subspace stores coefficients: 'float32', 'bfloat16' or '4bit'."},
    )
    tolerance: float | None = field(
        default=None, metadata={"help": "Relative error up to which a task takes a smaller rank in a layer."}
    )
    dropout: float = field(
        default=0.0, metadata={"help": "Probability of dropping inputs of a task's update during training."}
    )
    init_std: float = field(default=0.05, metadata={"help": "Standard deviation of a new task's coefficients (σ)."})
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Whether the target layers store their weight as (in, out), like Conv1D."}
    )
    phase: Phase = field(
        default=Phase.COEFFICIENTS,
        metadata={"help": "What of the task is trained: 'coefficients', 'adapt' or 'init'. Set by the trainer."},
    )

    origin = cast("AdapterOrigin | GivenBases | None", None)
    fingerprints = None
    ranks = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SHARE
        check_dimensions(self.num_components, self.pseudo_rank)
        if self.num_temporary is None:
            self.num_temporary = max(1, self.num_components // 4)
        if not 1 <= self.num_temporary < max(2, self.num_components):
            raise ValueError(
                f"num_temporary is {self.num_temporary}, expected at least 1 and less than num_components = "
                f"{self.num_components}"
            )
        if self.temporary_init not in get_args(TemporaryInit):
            raise ValueError(f"temporary_init is {self.temporary_init!r}, expected 'basis', 'span' or 'random'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected a probability of at least 0 and below 1")
        if not self.init_std > 0:
            raise ValueError(f"init_std is {self.init_std}, expected a positive number: zero has no gradient")
        if self.phase not in PHASES:
            raise ValueError(f"phase is {self.phase!r}, expected 'coefficients', 'adapt' or 'init'")
        self.phase = Phase(self.phase)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"target_modules is {self.target_modules!r} and layers_to_transform {self.layers_to_transform!r}, "
                "expected a list of names with layers_to_transform: a string is matched against whole names of "
                "modules, and may name layers itself"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given without layers_to_transform, expected both")
        if isinstance(self.target_parameters, str):
            raise ValueError(f"target_parameters is {self.target_parameters!r}, expected a list of names")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        self.subspace_settings()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Load a configuration that remembers its place, next to which a model finds the basis of the adapter."""
        config = super().from_pretrained(os.fspath(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
        return with_origin(config, pretrained_model_name_or_path, {**kwargs, "subfolder": subfolder})

    def subspace_settings(self, **overrides: Any) -> SubspaceSettings:
        """The part of the configuration that merges need."""
        return SubspaceSettings.from_dict({**vars(self), **overrides})


def with_origin(config: PeftConfig, location: str | os.PathLike[str], options: Mapping[str, Any]) -> PeftConfig:
    """Record in a configuration of SHARE where a loader called with these keyword arguments read it."""
    if isinstance(config, ShareConfig):
        config.origin = AdapterOrigin.of(location, options)
    return config
