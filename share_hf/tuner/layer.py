"""A layer whose update lies in a shared subspace: its basis and its tasks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..format.basis_file import BasisFile, fingerprint_of
from ..state import Phase
from ..subspace import LowRankUpdate, rank_in_layer
from ..subspace.factors import without_autocast
from .config import ShareConfig
from .fingerprints import Fingerprints
from .folding import FOLDED_TASKS, FoldedFactors
from .kinds import layout_of, matrix_shape
from .merging import offload_hook_of
from .quantization import quantization_backend_of
from .ranks import stacked
from .rows import BatchCoefficients, MixedBatch, Rows
from .stacked import StackedParameters


NORM_OF_FRESH_ROWS = 3**-0.5  # of a LoRA's A (r, d), whose entries are uniform within ±1/√d


class ShareLayer(BaseTunerLayer):
    """
    The shared basis of a layer and the trained parameters of each task.

    The update of a task is ``(factor_out)(factor_in)^T`` with ``factor_out = β ε_out`` and ``factor_in = α ε_in``.
    While a task is adapted, its temporary factors replace the basis. Before there is a subspace, they are the factors
    themselves.

    Attributes:
        share_basis_out: Buffer β (n, k_out), float32. One per layer, saved once for all tasks and so not persistent.
        share_basis_in: Buffer α (d, k_in), float32.
        share_coefficients_out: Coefficients by task, (k_out, p_i), or (φ, p) while the task is adapted. A task with
            free factors (in the init phase, or unless `temporary_init="basis"`) has none. Frozen tasks share a tensor.
        share_coefficients_in: Coefficients by task, (k_in, p_i) or (φ, p).
        share_temporary_out: Temporary factors by task, (n, φ), or (n, p) if they are free.
        share_temporary_in: Temporary factors by task, (d, φ) or (d, p).
        share_fingerprint: Fingerprint (8,) uint8 of the basis, by task with coefficients in the basis.
        share_dropout: Dropout probability of the inputs of a task's update in training, by task.
        share_ranks: Smallest and largest rank that coefficients loaded from a file may have, by task.
        layout: Layout of the update's matrix in the weight; None for a dense layer.
        basis_file: The `subspace.safetensors` that the basis was read from; None if it came from elsewhere.

    In eval mode, the layer keeps the folded factors of the `FOLDED_TASKS` tasks used last.
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
        self.rows: Rows = kwargs.get("rows") or Rows()
        self.share_coefficients_out = StackedParameters(self.rows, basis_out.shape[-1])
        self.share_coefficients_in = StackedParameters(self.rows, basis_in.shape[-1])
        self.share_temporary_out, self.share_temporary_in = nn.ParameterDict(), nn.ParameterDict()
        self.share_fingerprint = Fingerprints()
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
        """Replace the basis, (n, k_out) and (d, k_in). The tasks' coefficients stay as they are: they are assumed to
        refer to this basis already, or to be replaced next."""
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
        self.share_coefficients_out.set_components(basis_out.shape[1])
        self.share_coefficients_in.set_components(basis_in.shape[1])
        self.basis_file = None
        self._folded.clear()
        self.share_fingerprint.of_basis = fingerprint_of(basis_out, basis_in)

    def check_fingerprints(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Refuse coefficients that belong to a basis other than the layer's.

        Args:
            state_dict: State dict that is about to be loaded.
            prefix: Prefix of the names of this layer's tensors in it.

        Raises:
            ValueError: If a fingerprint differs. Names the task, the fingerprint found and the one expected.
        """
        for task in self.share_fingerprint:
            sides = [f"{prefix}share_coefficients_{side}.{task}" for side in ("out", "in")]
            if any(side in state_dict for side in sides):
                found = state_dict.get(f"{prefix}share_fingerprint.{task}")
                self.share_fingerprint.check(found, f"{prefix}share_fingerprint.{task}")

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that adapt this layer."""
        return sorted({*self.share_coefficients_out.keys(), *self.share_temporary_out.keys()})

    def has_task(self, task: str) -> bool:
        return task in self.share_coefficients_out or task in self.share_temporary_out

    def update_layer(self, adapter_name: str, config: ShareConfig, inference_mode: bool = False) -> None:
        """Add an untrained task. Its update is zero, or nearly so if it adapts leading basis vectors (Sec. 3.2.2)."""
        p, std = rank_in_layer(config.pseudo_rank, (self.out_features, self.in_features)), config.init_std
        k_out, k_in = self.share_basis_out.shape[1], self.share_basis_in.shape[1]
        is_free = config.temporary_init != "basis" or not min(k_out, k_in)
        if config.phase == Phase.INIT or (config.phase == Phase.ADAPT and is_free):
            is_in_span = config.phase == Phase.ADAPT and config.temporary_init == "span"
            self._set(adapter_name, "temporary", *self._initial_factors(p, is_in_span))
        elif config.phase == Phase.ADAPT:
            phi = min(config.num_temporary, k_out, k_in)
            self._set(
                adapter_name,
                "temporary",
                self.share_basis_out[:, :phi].clone(),
                self.share_basis_in[:, :phi].clone(),
            )
            # Both sides are random: if both were zero, both gradients would vanish.
            self._set(adapter_name, "coefficients", torch.randn(phi, p) * std, torch.randn(phi, p) * std)
        else:
            self._set(adapter_name, "coefficients", torch.zeros(k_out, p), torch.randn(k_in, p) * std)
            self.share_fingerprint.mark([adapter_name])
        self.share_dropout[adapter_name] = config.dropout
        self.share_ranks[adapter_name] = (p if config.tolerance is None else 1, p)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _initial_factors(self, rank: int, in_span: bool) -> tuple[Tensor, Tensor]:
        """Return B (n, r) and A^T (d, r) of an untrained LoRA; if `in_span`, the random one holds basis vectors."""
        factor_in = torch.empty(self.in_features, rank)
        nn.init.kaiming_uniform_(factor_in.T, a=math.sqrt(5))
        if in_span:
            leading = self.share_basis_in[:, :rank]
            factor_in[:, : leading.shape[1]] = NORM_OF_FRESH_ROWS * leading
        return torch.zeros(self.out_features, rank), factor_in

    def set_coefficients(self, task: str, coefficients_out: Tensor, coefficients_in: Tensor) -> None:
        """Give a task coefficients (k_out, p), (k_in, p) in the current basis and drop its temporary factors."""
        self._end_adaptation([task])
        self._set(task, "coefficients", coefficients_out, coefficients_in)
        self.share_fingerprint.mark([task])

    def set_all_coefficients(
        self, coefficients_out: Tensor, coefficients_in: Tensor, ranks: Mapping[str, int]
    ) -> None:
        """Give many tasks their coefficients in the current basis, as `set_coefficients` does for one.

        Args:
            coefficients_out: Coefficients (tasks, k_out, p), float32, with smaller ranks padded with zeros.
            coefficients_in: Coefficients (tasks, k_in, p), float32, padded in the same way.
            ranks: Ranks by task, in the order of the coefficients.

        Raises:
            ValueError: If one of the tasks is merged into the weight.
        """
        self._end_adaptation(ranks)
        trained = () if self.disable_adapters else self.active_adapters
        self.share_coefficients_out.set_all(coefficients_out, ranks, trained, self._device())
        self.share_coefficients_in.set_all(coefficients_in, ranks, trained, self._device())
        self.share_fingerprint.mark(ranks)
        self._folded.clear()

    def _end_adaptation(self, tasks: Collection[str]) -> None:
        """Drop the temporary factors of tasks that are about to get coefficients in the basis.

        Raises:
            ValueError: If one of the tasks is merged into the weight.
        """
        for task in self.merged_adapters:
            if task in tasks:
                raise ValueError(f"coefficients of {task!r} cannot change while merged, call unmerge_adapter() first")
        for parameters in (self.share_temporary_out, self.share_temporary_in):
            for task in [task for task in parameters if task in tasks]:
                del parameters[task]

    def add_alike(self, tasks: Iterable[str], like: str) -> None:
        """Add tasks that are set up like an existing one; their coefficients follow later."""
        tasks = list(tasks)
        self.share_dropout.update(dict.fromkeys(tasks, self.share_dropout[like]))
        self.share_ranks.update(dict.fromkeys(tasks, self.share_ranks[like]))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter(s). The cost does not depend on the number of tasks in the layer."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._train_only(() if inference_mode else names)
        self._active_adapter = names

    def enable_adapters(self, enabled: bool) -> None:
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            self._train_only(())
        self._disable_adapters = not enabled

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for task in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.share_coefficients_out.train_also(task, requires_grad)
            self.share_coefficients_in.train_also(task, requires_grad)
            for parameters in (self.share_temporary_out, self.share_temporary_in):
                if task in parameters:
                    parameters[task].requires_grad_(requires_grad)

    def _train_only(self, tasks: Collection[str]) -> None:
        self.share_coefficients_out.train_only(tasks)
        self.share_coefficients_in.train_only(tasks)
        for parameters in (self.share_temporary_out, self.share_temporary_in):
            for task, parameter in parameters.items():  # only the few tasks that are still being adapted
                parameter.requires_grad_(task in tasks)

    def delete_adapter(self, adapter_name: str) -> None:
        self._folded.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _set(self, task: str, kind: str, out: Tensor, in_: Tensor) -> None:
        trained = task in self.active_adapters and not self.disable_adapters
        for side, value in (("out", out), ("in", in_)):
            # One memory layout, so that a task computes bit-identical results whether merged or loaded.
            value = value.detach().to(self._device(), torch.float32, copy=True, memory_format=torch.contiguous_format)
            parameters = getattr(self, f"share_{kind}_{side}")
            if kind == "coefficients":
                parameters.set(task, value, trained=trained)
            else:
                parameters[task] = nn.Parameter(value, requires_grad=trained)
        self._folded.pop(task, None)

    def cast_to_base(self, task: str) -> None:
        """Cast a task's parameters to the dtype of the layer's weight if that is float16 or bfloat16."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for name in self.adapter_layer_names:
            if task in (parameters := getattr(self, name)) and dtype in (torch.float16, torch.bfloat16):
                parameter = parameters[task]
                parameter.data = parameter.data.to(dtype)
                parameters[task] = parameter

    def _device(self) -> torch.device | None:
        """The device that the layer computes on; None if it is unknown."""
        if (hook := offload_hook_of(self.get_base_layer())) is not None:
            place = hook.execution_device
            return torch.device(place) if not isinstance(place, torch.device) else place
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return None if device == torch.device("meta") else device

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move a task's parameters and the basis. Unlike in other tuners, they stay float32 whatever the base is."""
        device = device or self._device()
        if device is None:
            return
        self.share_coefficients_out.move(adapter_name, device)
        self.share_coefficients_in.move(adapter_name, device)
        for parameters in (self.share_temporary_out, self.share_temporary_in):
            if adapter_name in parameters and not parameters[adapter_name].is_meta:
                parameters[adapter_name] = parameters[adapter_name].to(device)
        self.share_basis_out, self.share_basis_in = self.share_basis_out.to(device), self.share_basis_in.to(device)

    def factors(self, task: str) -> LowRankUpdate:
        """The task's update as factors (n, p), (d, p) in float32: B and A^T in the terms of LoRA. Differentiable."""
        if not self.has_task(task):
            raise ValueError(f"task {task!r} does not adapt this layer, expected one of {self.tasks}")
        sides = []
        with without_autocast(self.share_basis_out.device):
            for side in ("out", "in"):
                # Some trainers cast trained parameters to bfloat16.
                basis, coefficients = self._columns(task, side).float(), self._coefficients(task, side)
                sides.append(basis if coefficients is None else basis @ coefficients.float())
        return LowRankUpdate(*sides)

    def _coefficients(self, task: str, side: str) -> Tensor | None:
        """The coefficients of a task on a side; None if its factors are free."""
        parameters: StackedParameters = getattr(self, f"share_coefficients_{side}")
        return parameters.of_task(task)

    def _columns(self, task: str, side: str) -> Tensor:
        """The columns that a task's coefficients combine on a side, "out" or "in": temporary factors or the basis."""
        temporary = getattr(self, f"share_temporary_{side}")
        return temporary[task] if task in temporary else getattr(self, f"share_basis_{side}")

    def folded_factors(self, task: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The task's factors A (p, d) and B (n, p) in the forward's dtype; in eval mode kept while nothing changes."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            update = self.factors(task)
            return update.in_factor.T.to(dtype), update.out_factor.to(dtype)
        parameters = self._sources(task)
        bases = [self.share_basis_out, self.share_basis_in]
        kept = self._folded.pop(task, None)
        if kept is not None and kept.is_of(parameters, bases, dtype):
            self._folded[task] = kept  # as the most recently used
            return kept.factors
        update = self.factors(task)
        # B is stored in memory as B^T, which is the operand of the product.
        factors = update.in_factor.T.to(dtype).contiguous(), update.out_factor.T.to(dtype).contiguous().T
        if FoldedFactors.may_keep(parameters, bases):
            self._folded[task] = FoldedFactors(factors, dtype, parameters, bases, self._rows_among_sources(task))
            if len(self._folded) > FOLDED_TASKS:
                del self._folded[next(iter(self._folded))]
        return factors

    def _sources(self, task: str) -> list[Tensor]:
        """The tensors other than the basis that form a task's factors; for stacked coefficients, the whole stack."""
        sources = []
        for parameters in (self.share_coefficients_out, self.share_coefficients_in):
            own = parameters.own(task)
            sources.append(parameters.stack if own is None else own)
        for parameters in (self.share_temporary_out, self.share_temporary_in):
            if task in parameters:
                sources.append(parameters[task])
        return sources

    def _rows_among_sources(self, task: str) -> dict[int, Tensor]:
        rows = (side.row_of(task) for side in (self.share_coefficients_out, self.share_coefficients_in))
        return {place: row for place, row in enumerate(rows) if row is not None}

    def _mixed_batch(self, adapter_names: Sequence[str] | None) -> MixedBatch | None:
        """The mixed batch that a forward computes: the one of the call, or the one that the model was given."""
        if adapter_names is None:
            batch = self.rows.current()
        else:
            self.write_own()  # first, because it assigns rows to the tasks
            batch = MixedBatch(adapter_names, self.rows)
        if batch is not None and self.merged:
            raise ValueError("adapter_names cannot be mixed while adapters are merged, call unmerge_adapter() first")
        return batch

    def write_own(self) -> None:
        """Write trained coefficients to the stacks too, where mixed batches read them."""
        self.share_coefficients_out.write_own()
        self.share_coefficients_in.write_own()

    def check_mixed(self, batch: MixedBatch) -> bool:
        """Return whether a task of a mixed batch adapts this layer.

        Raises:
            ValueError: If one of the tasks is still being adapted.
        """
        for name in batch.tasks:
            if name in self.share_temporary_out:
                raise ValueError(f"task {name!r} is still being adapted, merge it before using it in a mixed batch")
        return any(map(self.share_coefficients_out.__contains__, batch.tasks))

    def coefficients_of_batch(self, batch: MixedBatch, samples: int, like: Tensor) -> BatchCoefficients:
        """The coefficients of a mixed batch's tasks, on the device and in the dtype of a tensor.

        If one of the tasks is trained, they are its parameters, so that a task learns from its own samples alone.
        """
        indices = batch.indices(samples, like.device)
        sides = self.share_coefficients_out, self.share_coefficients_in
        if torch.compiler.is_compiling():  # one graph, whatever the number of different tasks
            every = torch.arange(samples, device=like.device)
            return BatchCoefficients(*(side.stack[indices.rows].to(like.dtype) for side in sides), every)
        if torch.is_grad_enabled() and any(side.is_trained(task) for side in sides for task in batch.tasks):
            of_tasks = (stacked([*map(side.of_task_or_zeros, batch.tasks), side.zeros]) for side in sides)
        else:
            of_tasks = (side.stack[indices.task_rows] for side in sides)
        return BatchCoefficients(*(each.to(like.dtype) for each in of_tasks), indices.places)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True
