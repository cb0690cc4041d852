"""Exporting a subspace: plain LoRAs, weighted sums of tasks, files for diffusers, and merged models."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal, get_args

from peft.utils import CONFIG_NAME

from ..format.exports import DIFFUSERS_WEIGHTS, CombinedLora, check_weights, combined_lora, diffusers_files
from ..format.files import FolderWriter
from ..format.index import INDEX_FILE
from ..format.lora import LoraAdapter, lora_files
from ..format.replacing import holds, replacing_folder
from ..format.tree import ADAPTER_FILES, lora_of
from ..tuner.merged_model import base_model_for, merge_tasks_into, save_tokenizer_of
from .held import HeldSubspace


ExportStyle = Literal["peft", "diffusers"]


class Exporting(HeldSubspace):
    """Export of tasks in forms that other tools read."""

    def as_lora(self, tasks: str | Mapping[str, float], *, rank: int | None = None) -> CombinedLora:
        """
        Return a task, or a weighted sum of tasks, as one plain LoRA in memory, for writers of other formats.

        Args:
            tasks (`str` or `Mapping[str, float]`):
                Name of a task, or weights as in [`~SharedSubspace.export_combined`].
            rank (`int`, *optional*):
                Largest rank of a layer of a sum. None means the pseudo rank p of the subspace.

        Returns:
            [`~share_hf.format.exports.CombinedLora`]: The LoRA, and the relative error that its rank causes.

        Raises:
            ValueError: If a task is unknown, or the tasks have no sum.
        """
        if isinstance(tasks, str):
            self._check_known(tasks)
            return CombinedLora(lora_of(self._holding([tasks]), tasks), 0.0)
        check_weights(tasks, self.tasks)
        rank = self.settings.pseudo_rank if rank is None else rank
        return combined_lora(self._holding(list(tasks)), tasks, rank)

    def export_lora(
        self,
        task: str,
        folder: str | os.PathLike,
        *,
        style: ExportStyle = "peft",
        component: str | None = None,
    ) -> None:
        """
        Write a task as a plain LoRA of rank p, for use without share_hf.

        Args:
            task (`str`): Task of the subspace.
            folder (`str`): Folder to write to.
            style (`Literal["peft", "diffusers"]`, *optional*, defaults to `"peft"`):
                Files to write: `adapter_config.json` and `adapter_model.safetensors` for PEFT, or
                `pytorch_lora_weights.safetensors` for the pipelines of diffusers.
            component (`str`, *optional*):
                Component of a pipeline that the modules belong to, such as `"unet"`. Only for diffusers, where the
                names of the modules do not tell the component.

        Raises:
            ValueError: If the task is unknown, the folder holds something else, or the style cannot express the
                adapter.
        """
        self._write(self.as_lora(task).adapter, Path(folder), style, component)

    def export_combined(
        self,
        weights: Mapping[str, float],
        folder: str | os.PathLike,
        *,
        rank: int | None = None,
        style: ExportStyle = "peft",
        component: str | None = None,
    ) -> float:
        """
        Write the weighted sum of tasks, ``Σ w_i ΔW_i``, as the best plain LoRA of the given rank.

        Args:
            weights (`Mapping[str, float]`):
                Weight of each task. A task with a head of its own cannot be summed with others.
            folder (`str`): Same as in [`~SharedSubspace.export_lora`], as are `style` and `component`.
            rank (`int`, *optional*): Largest rank of a layer. None means the pseudo rank p of the subspace.

        Returns:
            `float`: Relative error ``‖sum - LoRA‖ / ‖sum‖`` over all layers that the rank causes.

        Raises:
            ValueError: If the tasks have no sum. The message says why.
        """
        combined = self.as_lora(weights, rank=rank)
        self._write(combined.adapter, Path(folder), style, component)
        return combined.error

    def export_merged(
        self,
        tasks: str | Mapping[str, float],
        base_model: str | os.PathLike,
        folder: str | os.PathLike,
        *,
        token: str | bool | None = None,
    ) -> None:
        """
        Write the base model with a task, or a weighted sum of tasks, added to its weights: a full model for any use.

        A sum is added at its full rank, without truncation. The weights keep the dtype in which the base model is
        stored. The export includes the task's head and labels, and the base model's tokenizer.

        Args:
            tasks (`str` or `Mapping[str, float]`): Name of a task, or weight of each task.
            base_model (`str`): Folder or Hub id of the base model.
            folder (`str`): Folder to write to, which must be empty or not exist.
            token (`str` or `bool`, *optional*): User access token for a private base model.

        Raises:
            ValueError: If a task is unknown or does not fit the model, or the folder holds something.
        """
        weights = {tasks: 1.0} if isinstance(tasks, str) else dict(tasks)
        check_weights(weights, self.tasks)
        place = Path(folder)
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise ValueError(f"{folder}: is not empty, expected an empty or new folder")
        state = self._holding(list(weights))
        model = base_model_for(base_model, state.tasks[next(iter(weights))], token=token)
        merged = merge_tasks_into(model, state, weights)
        with replacing_folder(place, _nothing) as scratch:
            merged.save_pretrained(scratch)
            save_tokenizer_of(base_model, scratch, token=token)

    def _write(self, adapter: LoraAdapter, folder: Path, style: ExportStyle, component: str | None) -> None:
        if style not in get_args(ExportStyle):
            raise ValueError(f"style is {style!r}, expected one of {list(get_args(ExportStyle))}")
        if holds(folder, INDEX_FILE):
            raise ValueError(f"{folder}: holds a subspace or a model's checkpoint, expected another folder")
        written: tuple[str, ...]
        if style == "peft":
            if component is not None:
                raise ValueError(f"component is {component!r}, expected None: only style='diffusers' uses it")
            files, written = lora_files(adapter), ADAPTER_FILES
        else:
            if holds(folder, CONFIG_NAME):
                raise ValueError(f"{folder}: holds a PEFT adapter, expected another folder")
            files, written = diffusers_files(adapter, component), (DIFFUSERS_WEIGHTS,)
        with replacing_folder(folder, lambda _: written) as scratch:
            writer = FolderWriter(scratch)
            for name, content in files.items():
                writer.put(name, content)


def _nothing(_: Path) -> Collection[str]:
    return ()
