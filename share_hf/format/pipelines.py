"""LoRAs of diffusion pipelines: weights files without a PEFT configuration, as diffusers and kohya write them.

A pipeline has several models, its components, and one file may hold LoRAs of several. Here, each component is a model
of its own: only the requested component is read, under the names that its modules have in diffusers or transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import json_object
from .kohya import dotted_names, is_of_flux
from .module_names import PEFT_PREFIX, without_wrappers


# Key in the header of a file under which diffusers writes each component's configuration, by dotted names.
_METADATA = "lora_adapter_metadata"

_COMPONENT = re.compile(
    r"(?P<component>(?:unet|transformer|text_encoder|image_encoder|prior|text_conditioner|connectors)(?:_\d|_ref)?)"
    r"\.(?P<name>.+)"
)

# Components by the prefix of a flattened name, for kohya's trainer and for OneTrainer, which keeps kohya's style.
_FLAT_PREFIXES = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
_FLAT = re.compile(r"(?P<prefix>lora_(?:unet|transformer|te[123]?)_)(?P<flat>[^.]+)\.(?P<leaf>.+)")

# kohya trains Flux's transformer under the name of a U-Net, and T5, its second text encoder, as the third one.
_OF_FLUX = {"unet": "transformer", "text_encoder_3": "text_encoder_2"}

# Prefixes in files for programs other than diffusers, which keep the names of the models' authors.
_OF_AUTHORS = ("diffusion_model.", "model.diffusion_model.", "cond_stage_model.", "conditioner.")

# The component of a file that names none, by the first part of its modules' names.
_BY_FIRST_PART = {
    "down_blocks": "unet",
    "mid_block": "unet",
    "up_blocks": "unet",
    "transformer_blocks": "transformer",
    "single_transformer_blocks": "transformer",
    "text_model": "text_encoder",
}

# Last parts of the names of the factors and of their scale, newest first.
_SIDES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "lora.down.weight": "A",
    "lora.up.weight": "B",
    "lora_linear_layer.down.weight": "A",
    "lora_linear_layer.up.weight": "B",
    "alpha": "alpha",
}
_NOT_OF_PEFT = tuple(f"{kind}.{side}.weight" for kind in ("lora", "lora_linear_layer") for side in ("down", "up"))
_LEAF = re.compile(r"(?P<module>.+)\.(?P<leaf>" + "|".join(map(re.escape, _SIDES)) + ")")

# Names in the attention of early versions of diffusers.
_OLD_ATTENTION = re.compile(r"(?P<module>.+)\.to_(?P<which>q|k|v|out)_lora\.(?P<side>down|up)\.weight")
_OF_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_OF_TEXT_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}

_CLIP_LAYER = re.compile(r"encoder\.layers\.\d+\..+")

# Parts of names in the files of other methods.
_OTHER_METHODS = {
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "a Tucker decomposition",
    "oft_": "OFT",
    "bundle_emb": "a textual inversion",
    "diff": "whole differences of weights",
    "lora_A.bias": "a trained bias",
    "lora_B.bias": "a trained bias",
}


@dataclass(frozen=True)
class ComponentLora:
    """LoRA of one component of a pipeline.

    Args:
        component: Name of the component. None if the file names none.
        config: Configuration with the fields of a PEFT configuration.
        tensors: Factors by the names that PEFT gives them.
        alphas: Numbers by module that give the scale when divided by the rank. None if the configuration has them.
    """

    component: str | None
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    alphas: dict[str, float] | None


def is_never_of_peft(names: Iterable[str]) -> bool:
    """Return whether the tensors of a file have names that trainers of pipelines use and PEFT never does."""
    return any(_FLAT.fullmatch(name) or name.endswith(_NOT_OF_PEFT) for name in names)


def read_component(path: Path, tensors: Mapping[str, Tensor], component: str | None = None) -> ComponentLora:
    """Return the LoRA of one component from the tensors of a file.

    Args:
        path: Path of the file.
        tensors: Tensors by their names in the file.
        component: Component to read, such as `unet`. None means the only one in the file.

    Raises:
        ValueError: If there are several components and none is named, the named one is missing, a name cannot be read,
            the scale is not given, or the weights belong to another method. The message says what was found.
    """
    if any(name.startswith(PEFT_PREFIX) for name in tensors):
        raise ValueError(f"{path}: has no configuration with the scale, expected PEFT's adapter_config.json beside it")
    by_component = _by_component(path, tensors)
    found = _choose(path, by_component, component)
    modules = _by_module(path, found, by_component[found])
    metadata = _metadata(path, found)
    alphas = {module: _number(path, module, part["alpha"]) for module, part in modules.items() if "alpha" in part}
    if metadata is not None and alphas:
        raise ValueError(f"{path}: has alphas and {_METADATA}, expected only one of the two to give the scales")
    if metadata is None and not alphas and found is None:
        raise ValueError(
            f"{path}: neither names a component of a pipeline nor gives its scale, expected PEFT's "
            "adapter_config.json beside it"
        )
    config = metadata or {"lora_alpha": 1, "target_modules": sorted(modules)}
    named = {
        f"{module}.lora_{side}.weight": tensor
        for module, part in modules.items()
        for side, tensor in part.items()
        if side != "alpha"
    }
    scales = None if metadata is not None else _alphas(path, modules, alphas)
    return ComponentLora(found, {"peft_type": "LORA", **config}, named, scales)


def _by_component(path: Path, tensors: Mapping[str, Tensor]) -> dict[str | None, dict[str, Tensor]]:
    """Return the tensors of each component by their names in the file."""
    of_flux = any((match := _FLAT.fullmatch(name)) and is_of_flux(match["flat"]) for name in tensors)
    components: dict[str | None, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(_OF_AUTHORS):
            raise ValueError(
                f"{path}: {name!r} is named as the model's authors name it, expected the names of diffusers: load the "
                "file with a pipeline's load_lora_weights and save it with its save_lora_weights"
            )
        components.setdefault(_component_of(name, of_flux=of_flux), {})[name] = tensor
    return components


def _component_of(name: str, *, of_flux: bool) -> str | None:
    if (match := _FLAT.fullmatch(name)) is not None:
        component = _FLAT_PREFIXES[match["prefix"]]
        return _OF_FLUX.get(component, component) if of_flux else component
    if (match := _COMPONENT.fullmatch(name)) is not None:
        return match["component"]
    return _BY_FIRST_PART.get(name.split(".")[0])


def _by_module(path: Path, component: str | None, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return A, B and alpha of each module of a component."""
    flat: dict[str, dict[str, Tensor]] = {}
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (match := _FLAT.fullmatch(name)) is not None:
            module, leaf = match["flat"], match["leaf"]
            known = flat.setdefault(module, {})
        else:
            module, leaf = _read_name(path, name, component)
            known = modules.setdefault(module, {})
        side = _side(path, name, leaf, tensor)
        if side in known:
            raise ValueError(f"{path}: {name!r} is a second tensor for {module!r}, expected one")
        known[side] = tensor
    for name, part in flat.items():
        for module, own in _unflattened(path, component, name, part).items():
            if module in modules:
                raise ValueError(f"{path}: {name!r} is a second tensor for {module!r}, expected one")
            modules[module] = own
    return modules


def _read_name(path: Path, name: str, component: str | None) -> tuple[str, str]:
    """Return the module and the last part of a dotted tensor name."""
    rest = without_wrappers(name.removeprefix(f"{component}.")).replace(".processor.", ".")
    in_text = component is not None and component.startswith("text_encoder")
    if (old := _OLD_ATTENTION.fullmatch(rest)) is not None:
        attention = (_OF_TEXT_ATTENTION if in_text else _OF_ATTENTION)[old["which"]]
        module, leaf = f"{old['module']}.{attention}", f"lora.{old['side']}.weight"
    elif (match := _LEAF.fullmatch(rest)) is not None:
        module, leaf = match["module"], match["leaf"]
    else:
        raise _unexpected(path, name)
    if in_text and _CLIP_LAYER.fullmatch(module):
        module = f"text_model.{module}"  # the name before transformers 5, and in most files
    return module, leaf


def _side(path: Path, name: str, leaf: str, tensor: Tensor) -> str:
    """Return the part of a LoRA that a tensor is: A, B or alpha."""
    side = _SIDES.get(leaf)
    if side is None:
        raise _unexpected(path, name)
    if side != "alpha" and tensor.ndim < 2:
        raise ValueError(f"{path}: {name!r} is {tuple(tensor.shape)}, expected a matrix")
    return side


def _unexpected(path: Path, name: str) -> ValueError:
    method = next((method for part, method in _OTHER_METHODS.items() if part in name), None)
    found = f"which is of {method}" if method else "which is unexpected"
    return ValueError(f"{path}: has {name!r}, {found}, expected only the factors of a plain LoRA and their alphas")


def _unflattened(path: Path, component: str, flat: str, part: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the modules that a flattened name stands for.

    Layers that one file joins and another keeps apart share A. B is divided by rows, which does not change any update.
    """
    modules = dotted_names(flat, component)
    if not modules:
        raise ValueError(
            f"{path}: {flat!r} of {component} is ambiguous, because underscores stand for the dots of the name, "
            "expected a module of Stable Diffusion, Flux, CLIP or T5: for another model, load the file with its "
            "pipeline's load_lora_weights and save it with save_lora_weights"
        )
    if len(modules) == 1 or not {"A", "B"} <= part.keys():
        return {module: dict(part) for module in modules}
    rows, width = part["B"].shape[0], part["A"].shape[1]
    rest = rows - width * (len(modules) - 1)
    # Query, key and value are as wide as the block; a feed-forward layer that follows them is wider.
    if rest < width or (rest != width and not modules[-1].endswith("proj_mlp")):
        raise ValueError(f"{path}: {flat!r} has {rows} rows, expected {len(modules)} layers of {width} inputs in it")
    blocks = part["B"].split([*[width] * (len(modules) - 1), rest])
    return {module: {**part, "B": block} for module, block in zip(modules, blocks, strict=True)}


def _choose(path: Path, found: Mapping[str | None, Mapping[str, Any]], component: str | None) -> str | None:
    """Return the component to read."""
    counts = ", ".join(sorted(f"{name or 'unnamed'} ({len(tensors)} tensors)" for name, tensors in found.items()))
    if not found:
        raise ValueError(f"{path}: no lora_A and lora_B in it, expected a LoRA")
    if len(found) > 1 and None in found:
        raise _unexpected(path, next(iter(found[None])))
    if component is not None:
        if component not in found:
            raise ValueError(f"{path}: has no weights of component {component!r}, it has {counts}")
        return component
    if len(found) > 1:
        raise ValueError(
            f"{path}: has weights of several components, {counts}: each is a model of its own, expected component= "
            "(share-hf: --component) to name one"
        )
    return next(iter(found))


def _alphas(path: Path, modules: Mapping[str, Mapping[str, Tensor]], alphas: Mapping[str, float]) -> dict[str, float]:
    """Return alpha by module. Without one, the scale of a pipeline's LoRA is 1, as in diffusers and kohya."""
    found = {}
    for module, part in modules.items():
        if module in alphas and not part.keys() & {"A", "B"}:
            raise ValueError(f"{path}: {module!r} has only an alpha, expected the factors of a LoRA with it")
        found[module] = alphas.get(module, float(part["A"].shape[0]) if "A" in part else 1.0)
    return found


def _number(path: Path, module: str, alpha: Tensor) -> float:
    if alpha.numel() != 1:
        raise ValueError(f"{path}: alpha of {module!r} is {tuple(alpha.shape)}, expected one number")
    return float(alpha.item())


def _metadata(path: Path, component: str | None) -> dict[str, Any] | None:
    """Return a component's configuration from the header of a file that diffusers wrote; None if there is none."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    content = json_object(f"{path}: {_METADATA} in its header", text) if text else {}
    prefix = f"{component}."
    of_component = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
    # A model that saved its own LoRA does not prefix the fields.
    return of_component or (content if "lora_alpha" in content else None)


def of_other_components(components: Mapping[str, str | None], modules: Iterable[str] = ()) -> dict[str, str]:
    """Return what is wrong with each adapter that belongs to another component of a pipeline than the others.

    Args:
        components: Component by adapter. None stands for an adapter that names none and may belong to any.
        modules: Names of modules of the subspace to which the adapters are to be added.
    """
    named = {adapter: component for adapter, component in components.items() if component is not None}
    known = {_BY_FIRST_PART.get(module.split(".")[0]) for module in modules} - {None}
    of_subspace = known.pop() if len(known) == 1 else None
    expected = next((component for component in named.values() if _is_kind(component, of_subspace)), of_subspace)
    advice = "each is a model of its own; name the one you mean with component= (share-hf: --component)"
    return {
        adapter: f"is of component {component!r}, the others are of {expected!r}: {advice}"
        for adapter, component in named.items()
        if component != expected
    }


def _is_kind(component: str, kind: str | None) -> bool:
    return kind is None or re.sub(r"_\d$", "", component) == kind
