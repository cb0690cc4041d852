"""A linear layer whose update lies in a shared subspace."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, SequentialHook
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..format.basis_file import BasisFile, fingerprint_of
from ..state import Phase
from ..subspace import LowRankUpdate, rank_in_layer
from ..subspace.factors import without_autocast
from .config import ShareConfig
from .folding import FOLDED_TASKS, FoldedFactors, with_product
from .kinds import layout_of, matrix_shape
from .quantization import quantization_backend_of
from .ranks import make_room, stacked
from .together import dropped_inputs


class _Fingerprints(BufferDict):
    """By task, the fingerprint of the basis that its coefficients belong to, in state dicts beside them."""

    def __init__(self) -> None:
        super().__init__(persistent=True)

    def __setitem__(self, task: str, fingerprint: Tensor) -> None:
        self._buffers[task] = fingerprint  # `register_buffer` refuses names that a task may have


class ShareLayer(BaseTunerLayer):
    """
    The shared basis of a layer and, by task, what the task trains.

    The update of a task is ``(factor_out)(factor_in)^T`` with ``factor_out = β ε_out``, ``factor_in = α ε_in``. While
    a task is adapted, its temporary factors stand in for the basis; before there is a subspace, they are the factors.

    Attributes:
        share_basis_out: (n, k_out) buffer, float32, β. Once a layer, and saved once for all tasks, so not persistent.
        share_basis_in: (d, k_in) buffer, float32, α.
        share_coefficients_out: By task, (k_out, p_i), or (φ, p) while it is adapted. None in the init phase.
        share_coefficients_in: By task, (k_in, p_i) or (φ, p).
        share_temporary_out: By task in the adapt phase (n, φ), in the init phase (n, p).
        share_temporary_in: By task, (d, φ) or (d, p).
        share_fingerprint: By task with coefficients in the basis, (8,) uint8, that of the basis.
        share_dropout: By task, the probability with which inputs of its update are dropped in training.
        share_ranks: By task, the smallest and the largest rank that coefficients of a file may have.
        layout: How the update's matrix lies in the weight; None for a dense layer.
        basis_file: The `subspace.safetensors` that the basis was read from; None if it is from elsewhere.

    In eval mode, the factors that a forward folds are kept for the last `FOLDED_TASKS` tasks that were used.
    """

    adapter_layer_names = (
        "share_coefficients_out",
        "share_coefficients_in",
        "share_temporary_out",
        "share_temporary_in",
    )
    other_param_names = ("share_fingerprint", "share_dropout", "share_ranks")

    def __init__(self, base_layer: nn.Module, basis_out: Tensor, basis_in: Tensor, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend_of(
            self.get_base_layer(), kwargs.get("get_apply_tensor_subclass")
        )
        self.out_features, self.in_features = matrix_shape(self.get_base_layer())
        self.layout = layout_of(self.get_base_layer())
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.share_fingerprint = _Fingerprints()
        self.share_dropout: dict[str, float] = {}
        self.share_ranks: dict[str, tuple[int, int]] = {}
        self.register_buffer("share_basis_out", None, persistent=False)
        self.register_buffer("share_basis_in", None, persistent=False)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self.basis_file: BasisFile | None = None
        self._folded: dict[str, FoldedFactors] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self.set_basis(basis_out, basis_in)

    def set_basis(self, basis_out: Tensor, basis_in: Tensor) -> None:
        """Replace the basis, (n, k_out) and (d, k_in). The coefficients of the tasks are not touched: they are taken
        to be meant in this basis, or to be replaced next."""
        if self.merged:
            raise ValueError("the basis cannot change while adapters are merged, call unmerge_adapter() first")
        for name, basis, features in (
            ("basis_out", basis_out, self.out_features),
            ("basis_in", basis_in, self.in_features),
        ):
            if basis.ndim != 2 or basis.shape[0] != features:
                raise ValueError(
                    f"{name} is {tuple(basis.shape)}, expected ({features}, k) for {self.get_base_layer()}"
                )
        device = self._device()
        self.share_basis_out = basis_out.detach().to(device, torch.float32)
        self.share_basis_in = basis_in.detach().to(device, torch.float32)
        self.basis_file = None
        self._folded.clear()
        self._fingerprint = fingerprint_of(basis_out, basis_in)
        for task in self.share_fingerprint:
            self._mark(task)

    def _mark(self, task: str) -> None:
        # A tensor for each task: safetensors refuses what shares memory.
        self.share_fingerprint[task] = self._fingerprint.clone().to(self.share_basis_out.device)

    def check_fingerprints(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Refuse coefficients that belong to another basis than the one that the layer has.

        Args:
            state_dict: What is about to be loaded.
            prefix: What precedes the names of this layer's tensors there.

        Raises:
            ValueError: Naming the task, the fingerprint that was found and the one that was expected.
        """
        for task in self.share_fingerprint:
            sides = [f"{prefix}share_coefficients_{side}.{task}" for side in ("out", "in")]
            if any(side in state_dict for side in sides):
                found = state_dict.get(f"{prefix}share_fingerprint.{task}")
                self.check_fingerprint(found, f"{prefix}share_fingerprint.{task}")

    def check_fingerprint(self, found: Tensor | None, name: str) -> None:
        """Refuse coefficients whose fingerprint, of this name, is another than that of the layer's basis."""
        # Rounded: an average of equal ones, such as an EMA of all tensors, is the same but for rounding.
        if found is not None and torch.equal(found.cpu().float().round(), self._fingerprint.float()):
            return
        value = "missing" if found is None else found.tolist()
        raise ValueError(
            f"{name!r} is {value}, expected {self._fingerprint.tolist()}: the coefficients belong to another basis "
            "than the model has, or do not say to which. Load them with their basis, from their folder or repository, "
            "by PeftModel.from_pretrained, load_adapter or SharedSubspace.from_pretrained; bring a task of another "
            "subspace in as a LoRA, by SharedSubspace.export_lora there and add_adapters here"
        )

    @property
    def tasks(self) -> list[str]:
        """Tasks that adapt this layer."""
        return self._all_available_adapter_names()

    def has_task(self, task: str) -> bool:
        return task in self.share_coefficients_out or task in self.share_temporary_out

    def update_layer(self, adapter_name: str, config: ShareConfig, inference_mode: bool = False) -> None:
        """Add a task, untrained: its update is zero, or next to it in the adapt phase (Sec. 3.2.2)."""
        p, std = rank_in_layer(config.pseudo_rank, (self.out_features, self.in_features)), config.init_std
        k_out, k_in = self.share_basis_out.shape[1], self.share_basis_in.shape[1]
        if config.phase == Phase.INIT or (config.phase == Phase.ADAPT and not min(k_out, k_in)):
            self._set(adapter_name, "temporary", *self._initial_factors(p))
        elif config.phase == Phase.ADAPT:
            phi = min(config.num_temporary, k_out, k_in)
            self._set(
                adapter_name,
                "temporary",
                self.share_basis_out[:, :phi].clone(),
                self.share_basis_in[:, :phi].clone(),
            )
            # Both sides random: were both zero, the gradient of either would vanish.
            self._set(adapter_name, "coefficients", torch.randn(phi, p) * std, torch.randn(phi, p) * std)
        else:
            self._set(adapter_name, "coefficients", torch.zeros(k_out, p), torch.randn(k_in, p) * std)
            self._mark(adapter_name)
        self.share_dropout[adapter_name] = config.dropout
        self.share_ranks[adapter_name] = (p if config.tolerance is None else 1, p)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _initial_factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B (n, r) and A^T (d, r) of a LoRA that is not trained yet."""
        factor_in = torch.empty(self.in_features, rank)
        nn.init.kaiming_uniform_(factor_in.T, a=math.sqrt(5))
        return torch.zeros(self.out_features, rank), factor_in

    def set_coefficients(self, task: str, coefficients_out: Tensor, coefficients_in: Tensor) -> None:
        """Give a task its coefficients (k_out, p), (k_in, p) in the current basis; temporary factors are dropped."""
        if task in self.merged_adapters:
            raise ValueError(f"coefficients of {task!r} cannot change while merged, call unmerge_adapter() first")
        for name in ("share_temporary_out", "share_temporary_in"):
            if task in getattr(self, name):
                del getattr(self, name)[task]
        self._set(task, "coefficients", coefficients_out, coefficients_in)
        self._mark(task)

    def delete_adapter(self, adapter_name: str) -> None:
        self._folded.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _set(self, task: str, kind: str, out: Tensor, in_: Tensor) -> None:
        trained = task in self.active_adapters and not self.disable_adapters
        for side, value in (("out", out), ("in", in_)):
            parameters = getattr(self, f"share_{kind}_{side}")
            kept = parameters.get(task)
            if kept is not None and kept.shape == value.shape and kept.dtype == torch.float32:
                kept.data.copy_(value)
            else:
                # In one memory layout, so that a task computes the same to the bit whether merged or loaded.
                value = value.detach().to(
                    self._device(), torch.float32, copy=True, memory_format=torch.contiguous_format
                )
                parameters[task] = nn.Parameter(value, requires_grad=trained)
        self._folded.pop(task, None)

    def cast_to_base(self, task: str) -> None:
        """Give a task's parameters the type of the layer's weight, if that is a float16 or a bfloat16 one."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for name in self.adapter_layer_names:
            if task in getattr(self, name) and dtype in (torch.float16, torch.bfloat16):
                parameter = getattr(self, name)[task]
                parameter.data = parameter.data.to(dtype)

    def _device(self) -> torch.device | None:
        """Where the layer computes; None if that is not known."""
        if (hook := offload_hook_of(self.get_base_layer())) is not None:
            place = hook.execution_device
            return torch.device(place) if not isinstance(place, torch.device) else place
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return None if device == torch.device("meta") else device

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move a task's parameters and the basis; unlike other tuners', they stay float32 whatever the base is."""
        device = device or self._device()
        if device is None:
            return
        for name in self.adapter_layer_names:
            parameters = getattr(self, name)
            if adapter_name in parameters and parameters[adapter_name].device.type != "meta":
                parameters[adapter_name] = parameters[adapter_name].to(device)
        self.share_basis_out, self.share_basis_in = self.share_basis_out.to(device), self.share_basis_in.to(device)

    def factors(self, task: str) -> LowRankUpdate:
        """The task's update as factors (n, p), (d, p) in float32: what a LoRA calls B and A^T. Differentiable."""
        if not self.has_task(task):
            raise ValueError(f"task {task!r} does not adapt this layer, expected one of {self.tasks}")
        sides = []
        with without_autocast(self.share_basis_out.device):
            for side in ("out", "in"):
                coefficients = getattr(self, f"share_coefficients_{side}")
                # Some trainers cast what they train to bfloat16.
                basis = self._columns(task, side).float()
                sides.append(basis @ coefficients[task].float() if task in coefficients else basis)
        return LowRankUpdate(*sides)

    def _columns(self, task: str, side: str) -> Tensor:
        """What the coefficients of a task are of on a side, "out" or "in": its temporary factors, or the basis."""
        temporary = getattr(self, f"share_temporary_{side}")
        return temporary[task] if task in temporary else getattr(self, f"share_basis_{side}")

    def folded_factors(self, task: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The task's factors A (p, d) and B (n, p) in the forward's dtype; in eval, kept while nothing changes."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            update = self.factors(task)
            return update.in_factor.T.to(dtype), update.out_factor.to(dtype)
        parameters = [getattr(self, name)[task] for name in self.adapter_layer_names if task in getattr(self, name)]
        bases = [self.share_basis_out, self.share_basis_in]
        kept = self._folded.pop(task, None)
        if kept is not None and kept.is_of(parameters, bases, dtype):
            self._folded[task] = kept  # as the last that was used
            return kept.factors
        update = self.factors(task)
        factors = update.in_factor.T.to(dtype), update.out_factor.to(dtype)
        if FoldedFactors.may_keep(parameters, bases):
            self._folded[task] = FoldedFactors(factors, dtype, parameters, bases)
            if len(self._folded) > FOLDED_TASKS:
                del self._folded[next(iter(self._folded))]
        return factors

    def _check_forward_args(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            return
        if len(x) != len(adapter_names):
            raise ValueError(
                f"{len(adapter_names)} adapter_names for a batch of {len(x)}, expected one for each sample"
            )
        if self.merged:
            raise ValueError("adapter_names cannot be mixed while adapters are merged, call unmerge_adapter() first")

    def _coefficients_of_samples(self, adapter_names: list[str], like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Coefficients (samples, k_out, p), (samples, k_in, p) of the task of each, in the device and dtype of `like`.

        They are differentiable, for the tasks that are present; None if none of these adapts this layer.
        """
        present = [name for name in dict.fromkeys(adapter_names) if self.has_task(name)]
        for name in present:
            if name in self.share_temporary_out:
                raise ValueError(f"task {name!r} is still being adapted, merge it before using it in a mixed batch")
        if not present:
            return None
        row = {name: i for i, name in enumerate(present)}
        index = torch.tensor([row.get(name, len(present)) for name in adapter_names], device=like.device)
        stacked_out, stacked_in = (
            F.pad(stacked([coefficients[name] for name in present]), (0, 0, 0, 0, 0, 1)).to(like.dtype)[index]
            for coefficients in (self.share_coefficients_out, self.share_coefficients_in)
        )
        return stacked_out, stacked_in

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class Linear(nn.Module, ShareLayer):
    """Share on a dense layer: `nn.Linear`, `Conv1D`, or a quantized one that PEFT knows."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: ShareConfig,
        basis_out: Tensor,
        basis_in: Tensor,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        ShareLayer.__init__(self, base_layer, basis_out, basis_in, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, inference_mode=config.inference_mode)

    def train(self, mode: bool = True) -> Linear:
        # What is written behind autograd's back is not always noticed, so nothing folded outlives a change of mode.
        self._folded.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        """Move the layer; a cast of the model, as `model.bfloat16()` or a trainer's full-precision flag, does not
        round the basis."""
        self._folded.clear()
        basis = self.share_basis_out, self.share_basis_in
        super()._apply(fn, recurse)
        self.share_basis_out, self.share_basis_in = (
            moved if kept.is_meta else kept.to(moved.device)
            for kept, moved in zip(basis, (self.share_basis_out, self.share_basis_in), strict=True)
        )
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.check_fingerprints(state_dict, prefix)
        for name in ("share_coefficients_out", "share_coefficients_in"):
            make_room(getattr(self, name), self.share_ranks, state_dict, f"{prefix}{name}.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The task's update in the layout and device of the base weight, float32."""
        return transpose(self.factors(adapter).dense(), self.fan_in_fan_out)

    def set_base_weight(self, weight_data: Tensor) -> None:
        bias = getattr(self.get_base_layer(), "bias", None)
        super().set_base_weight(weight_data)
        if bias is not None and self.get_base_layer().bias is None:  # PEFT's layer of HQQ is a new one, without it
            self.get_base_layer().bias = bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge the active adapter weights into the base weights.

        Args:
            safe_merge (`bool`, *optional*):
                Whether to check the merged weights for NaN and infinity first, and leave the layer as it is if there
                are any.
            adapter_names (`list[str]`, *optional*):
                The adapters to merge; the active ones if not given.
        """
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_task(name)]
        if not adapters:
            return
        weight = self.get_base_weight()
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32))  # to be rounded once
        for adapter in adapters:
            merged = merged + self.get_delta_weight(adapter).to(merged)
            if safe_merge and not torch.isfinite(merged.to(weight.dtype)).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        self.set_base_weight(merged.to(weight.dtype))
        self.merged_adapters.extend(adapters)

    def unmerge(self) -> None:
        """Take all merged adapter weights out of the base weights again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_weight()
        unmerged = weight.to(torch.promote_types(weight.dtype, torch.float32))
        while self.merged_adapters:
            unmerged = unmerged - self.get_delta_weight(self.merged_adapters.pop()).to(unmerged)
        self.set_base_weight(unmerged.to(weight.dtype))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if self.quantization_backend is not None:
            if self.training and torch.is_grad_enabled() and x.requires_grad and not result.requires_grad:
                raise RuntimeError(
                    f"no gradient flows through {self.get_base_layer()}, so that what lies before it would not be "
                    "trained, or wrongly; expected a quantization that supports training"
                )
            result = self.quantization_backend.maybe_clone_base_result(result)
        if adapter_names is not None:
            update = self._mixed_batch_update(dropped_inputs(self, x, adapter_names), adapter_names)
            return result if update is None else result + update.to(result.dtype)
        for adapter in self.active_adapters:
            if self.has_task(adapter):
                result = self._with_update(result, x, adapter)
        return result

    def _with_update(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        """The output of the layer with that of the update of a task."""
        down, up = self.folded_factors(adapter, x.dtype)
        inputs = F.dropout(x, self.share_dropout[adapter], self.training)
        return with_product(result, F.linear(inputs, down), up)

    def _mixed_batch_update(self, x: Tensor, adapter_names: list[str]) -> Tensor | None:
        """The update's output for a batch of any tasks; the basis is applied once, whatever their number.

        Only the k x p coefficients differ between samples: ``z = x α``, ``y = (z ε_in) ε_out^T``, ``y β^T``.
        """
        stacked = self._coefficients_of_samples(adapter_names, x)
        if stacked is None:
            return None
        z = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
        y = (z @ self.share_basis_in.to(x.dtype)) @ stacked[1] @ stacked[0].mT
        return F.linear(y, self.share_basis_out.to(x.dtype)).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "share." + super().__repr__()


def offload_hook_of(layer: nn.Module) -> AlignDevicesHook | None:
    """What fetches the weights of a layer for each forward, if accelerate keeps them in memory or on disk."""
    hook = getattr(layer, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((each for each in hooks if isinstance(each, AlignDevicesHook) and each.offload), None)
