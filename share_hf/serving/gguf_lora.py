"""Export of tasks as LoRAs in GGUF, which llama.cpp and Ollama load.

A file has the content that llama.cpp's `convert_lora_to_gguf.py` produces from the same LoRA: `general.type` is
"adapter", `adapter.type` is "lora", `general.architecture` is that of the base model's file, `adapter.lora.alpha` is
the rank, so that the scale is 1, and each adapted weight has `<name>.lora_a` (r, d) and `<name>.lora_b` (n, r). The
names come from gguf's own map.

For some architectures, llama.cpp stores the rows of the query and key weights in another order than transformers: its
rotary embedding rotates neighbours (2i, 2i + 1), that of transformers rotates i and i + half. The rows of `lora_b` are
reordered accordingly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..format.base_model import published_name
from ..format.files import flush_folder, naming
from ..format.lora import LoraAdapter
from ..format.names import listing
from ..shared_subspace import SharedSubspace
from ..state import Layout


if TYPE_CHECKING:
    from gguf import GGUFWriter, TensorNameMap

GgufDtype = Literal["float32", "float16"]

# Architecture in llama.cpp by class of transformers, as llama.cpp's converters register them. Only classes whose
# weights they take unchanged are listed, except for the order of query and key rows; others split or mix weights.
_REORDERED = {
    "ArceeForCausalLM": "ARCEE",
    "GraniteForCausalLM": "GRANITE",
    "LlamaForCausalLM": "LLAMA",
    "MistralForCausalLM": "LLAMA",
    "MixtralForCausalLM": "LLAMA",
    "OlmoForCausalLM": "OLMO",
    "SmolLM3ForCausalLM": "SMOLLM3",
}
_AS_THEY_ARE = {
    "Cohere2ForCausalLM": "COHERE2",
    "CohereForCausalLM": "COMMAND_R",
    "GPT2LMHeadModel": "GPT2",
    "Gemma2ForCausalLM": "GEMMA2",
    "Gemma3ForCausalLM": "GEMMA3",
    "GemmaForCausalLM": "GEMMA",
    "Olmo2ForCausalLM": "OLMO2",
    "Olmo3ForCausalLM": "OLMO2",
    "Phi3ForCausalLM": "PHI3",
    "PhiForCausalLM": "PHI2",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen2MoeForCausalLM": "QWEN2MOE",
    "Qwen3ForCausalLM": "QWEN3",
    "Qwen3MoeForCausalLM": "QWEN3MOE",
    "Starcoder2ForCausalLM": "STARCODER2",
}
ARCHITECTURES = {**_REORDERED, **_AS_THEY_ARE}


def export_gguf(
    subspace: SharedSubspace,
    tasks: str | Mapping[str, float],
    file: str | os.PathLike,
    *,
    base_model: str | os.PathLike | GgufBase | None = None,
    rank: int | None = None,
    dtype: GgufDtype = "float32",
    token: str | bool | None = None,
) -> float:
    """
    Write a task, or the weighted sum of tasks, as a LoRA in GGUF for llama.cpp and Ollama. Needs the package `gguf`.

    Args:
        subspace ([`SharedSubspace`]): Subspace that holds the tasks.
        tasks (`str` or `Mapping[str, float]`): Name of a task, or weights by task. See
            [`~SharedSubspace.export_combined`].
        file (`str`): File to write, which must not exist yet. A crash leaves no partial file behind.
        base_model (`str` or [`GgufBase`], *optional*):
            Folder or Hub id of the base model, from which only `config.json` is read. Defaults to the subspace's base
            model. To write many files, read it once with [`GgufBase.of`].
        rank (`int`, *optional*): Largest rank of a sum in a layer. Defaults to the pseudo rank p of the subspace.
        dtype (`Literal["float32", "float16"]`, *optional*, defaults to `"float32"`): Type of the factors in the file.
        token (`str` or `bool`, *optional*): Token for a private base model.

    Returns:
        `float`: Relative error that the rank of a sum costs; 0 for a task.

    Raises:
        ValueError: If the file exists already, gguf is not installed, a task is unknown, or llama.cpp does not support
            the architecture of the base model, a head, a convolution, experts, or a module, which the message names.
            Nothing is written then.
    """
    if dtype not in get_args(GgufDtype):
        raise ValueError(f"dtype is {dtype!r}, expected one of {list(get_args(GgufDtype))}")
    path = Path(file)
    if path.exists():
        raise ValueError(f"{path}: already exists, expected the name of a new file")
    gguf = _gguf()
    known = isinstance(base_model, GgufBase)
    base = base_model if known else GgufBase.of(base_model or subspace.base_model_name_or_path, token=token)
    combined = subspace.as_lora(tasks, rank=rank)
    tensors = {name: _in_dtype(name, factor, dtype) for name, factor in _named_factors(combined.adapter, base)}
    label = tasks if isinstance(tasks, str) else " + ".join(f"{weight:g} {task}" for task, weight in tasks.items())
    with _new_file(path) as scratch:
        writer = gguf.GGUFWriter(scratch, base.architecture)
        _write_metadata(
            writer, gguf, label, _rank_of(combined.adapter), published_name(subspace.base_model_name_or_path), dtype
        )
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.numpy())
        with closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
    return combined.error


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"GGUF files need the package gguf ({error}): `pip install share-hf[gguf]`") from error
    return gguf


@dataclass(frozen=True)
class GgufBase:
    """Description of a base model for exports: its modules without their weights, and their names in llama.cpp.

    Args:
        place: Folder or Hub id of the base model.
        model: Model on the meta device.
        config: Configuration of the model.
        architecture: Name of the architecture in llama.cpp.
        names: Map from the names of modules to llama.cpp's names of their weights.
        heads: Number of heads of the modules whose rows llama.cpp orders differently, by the last part of their name.
    """

    place: str
    model: nn.Module
    config: PreTrainedConfig
    architecture: str
    names: TensorNameMap
    heads: Mapping[str, int]

    @classmethod
    def of(cls, place: str | os.PathLike | None, *, token: str | bool | None = None) -> GgufBase:
        """
        Read the `config.json` of a base model.

        Args:
            place (`str`): Folder or Hub id of the base model.
            token (`str` or `bool`, *optional*): Token for a private base model.

        Raises:
            ValueError: If there is none, its architecture is not among those in `ARCHITECTURES`, or gguf is not
                installed.
        """
        if place is None:
            raise ValueError("the subspace names no base model, expected base_model= (share-hf: --base-model)")
        gguf, place = _gguf(), os.fspath(place)
        try:
            config = AutoConfig.from_pretrained(place, token=token)
        except (OSError, ValueError) as error:
            raise ValueError(f"{place}: no base model with a config.json that transformers reads ({error})") from error
        found = config.architectures or []
        name = next((name for name in found if name in ARCHITECTURES), None)
        architecture = getattr(gguf.MODEL_ARCH, ARCHITECTURES[name], None) if name else None
        if architecture is None:
            raise ValueError(
                f"{place}: its architecture is {found}, expected one of those that can be written as GGUF: "
                f"{sorted(ARCHITECTURES)}"
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        heads = {}
        if name in _REORDERED:
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        return cls(place, model, config, gguf.MODEL_ARCH_NAMES[architecture], names, heads)

    def tensor_name(self, module: str, shape: tuple[int, int], layout: Layout | None) -> str:
        """Return the name of a module's weight in llama.cpp.

        Args:
            module: Name of the module in the model of transformers.
            shape: Shape (n, d) of the update.
            layout: Layout of the update's matrix in the weight.

        Raises:
            ValueError: If llama.cpp does not support an update of the module, or the module does not match the task.
        """
        if layout is not None and layout.kind != "embedding":
            raise ValueError(f"{module!r} is not a dense layer ({layout}), and GGUF has no place for it")
        try:
            found = self.model.get_submodule(module)
        except AttributeError as error:
            raise ValueError(f"{self.place}: has no module {module!r}, which the task adapts") from error
        turned = layout is not None or isinstance(found, Conv1D)
        weight = tuple(getattr(found, "weight", torch.empty(0)).shape)
        if weight != (shape[::-1] if turned else shape):
            raise ValueError(f"{self.place}: {module!r} has a weight {weight}, but the task's update of it is {shape}")
        both = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        if self.config.tie_word_embeddings and any(found is embedding for embedding in both):
            raise ValueError(
                f"{self.place}: {module!r} is tied to the other embedding, and llama.cpp has one weight for both, "
                "expected a task that adapts neither"
            )
        name = self.names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise ValueError(f"{module!r} has no name in llama.cpp's architecture {self.architecture!r}")
        return name

    def ordered(self, module: str, out_factor: Tensor) -> Tensor:
        """Return the rows (n, r) of a factor in the order in which llama.cpp stores the rows of the weight."""
        heads = self.heads.get(module.rpartition(".")[2])
        if heads is None:
            return out_factor
        n, r = out_factor.shape
        if n % (2 * heads):
            raise ValueError(f"{module!r} has {n} outputs, expected a multiple of twice its {heads} heads")
        return out_factor.reshape(heads, 2, n // (2 * heads), r).transpose(1, 2).reshape(n, r)


def _named_factors(adapter: LoraAdapter, base: GgufBase) -> Iterator[tuple[str, Tensor]]:
    """Yield a LoRA's tensors, zero-padded to one rank: llama.cpp scales each by alpha over the tensor's own rank."""
    if adapter.head:
        raise ValueError(
            f"the task has weights of its own for {listing(adapter.head)}, which GGUF has no place for, expected a "
            "task without modules_to_save"
        )
    rank = _rank_of(adapter)
    for module, update in adapter.updates.items():
        layout = adapter.layouts.get(module)
        name = base.tensor_name(module, (len(update.out_factor), len(update.in_factor)), layout)
        a, b = (_filled_up(factor, rank) for factor in (update.in_factor, base.ordered(module, update.out_factor)))
        # For an embedding, llama.cpp looks up rows of A.
        yield f"{name}.lora_a", a.contiguous() if layout is not None else a.T.contiguous()
        yield f"{name}.lora_b", b.contiguous()


def _rank_of(adapter: LoraAdapter) -> int:
    return max((update.out_factor.shape[1] for update in adapter.updates.values()), default=1)


def _filled_up(factor: Tensor, rank: int) -> Tensor:
    return nn.functional.pad(factor, (0, rank - factor.shape[1]))


def _in_dtype(name: str, tensor: Tensor, dtype: GgufDtype) -> Tensor:
    stored = tensor.to(getattr(torch, dtype))
    if not stored.isfinite().all():
        raise ValueError(f"{name!r} has entries up to {tensor.abs().max():.3g}, too large for {dtype}")
    return stored


def _write_metadata(
    writer: GGUFWriter, gguf: ModuleType, label: str, rank: int, base_model: str | None, dtype: GgufDtype
) -> None:
    keys = gguf.Keys.Adapter
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(keys.TYPE, "lora")
    writer.add_float32(keys.LORA_ALPHA, float(rank))
    writer.add_string(keys.LORA_TASK_NAME, label)
    writer.add_name(label)
    if base_model is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base_model.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base_model}")
    file_type = gguf.LlamaFileType.ALL_F32 if dtype == "float32" else gguf.LlamaFileType.MOSTLY_F16
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """Yield a scratch file that is renamed to `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with naming(path):
            yield scratch
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
            scratch.replace(path)
        flush_folder(path.parent)
    finally:
        scratch.unlink(missing_ok=True)
