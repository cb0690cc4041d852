"""Configuration of the SHARE tuner."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from peft.config import PeftConfig

from ..format.basis_file import StoredBasis
from ..state import Phase
from ..subspace import BasisKind, CoefficientDtype, SubspaceSettings, check_dimensions
from .lora_only import without_options_of_lora


TemporaryInit = Literal["basis", "random"]

# What a configuration may have trained; tasks of the subspace that are trained further are in `coefficients`.
PHASES = (Phase.COEFFICIENTS, Phase.ADAPT, Phase.INIT)


class ShareType(str):
    """The PEFT type of this tuner: a plain string that also has what others read from a member of PEFT's own enum."""

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"  # of which PEFT's `get_model_status` tells what is after the dot

    def __format__(self, specification: str) -> str:
        return format(self.value, specification)


SHARE = ShareType("SHARE")


@dataclass(frozen=True)
class AdapterOrigin:
    """Where the configuration of an adapter was loaded from: its basis and its weights are there too.

    Args:
        location: Folder, or id of a repository.
        subfolder: Place of the adapter in it.
        download_options: Options of `hf_hub_download`.
    """

    location: str
    subfolder: str | None = None
    download_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The adapter's own folder, where the location is one."""
        return Path(self.location, self.subfolder or "")


@dataclass(frozen=True)
class GivenBases:
    """Bases by module that an adapter belongs to, of a subspace in memory.

    Args:
        bases: Bases of all modules of the subspace.
        adapted: The modules that the adapter has coefficients for; those that its configuration targets if None.
    """

    bases: Mapping[str, StoredBasis]
    adapted: Collection[str] | None = None


@without_options_of_lora
@dataclass
class ShareConfig(PeftConfig):
    """
    Configuration of a task in a shared subspace (Share, https://huggingface.co/papers/2602.06043).

    All tasks of a model share one basis a layer; a task is the coefficients of its update in it, two matrices of k x p
    numbers a layer. The adapter's name is the task's name.

    Args:
        num_components (`int`, *optional*, defaults to `32`):
            Cap k on the directions of a layer's basis, on the output and on the input side.
        pseudo_rank (`int`, *optional*, defaults to `8`):
            Cap p on the rank of a task's update in each layer (n, d), which has at most min(p, n, d). At most
            `num_components`.
        num_temporary (`int`, *optional*):
            Number φ of leading basis vectors that are trained as temporary factors while a new task is learned. Less
            than `num_components`; `num_components // 4` if not given.
        temporary_init (`Literal["basis", "random"]`, *optional*, defaults to `"basis"`):
            What temporary factors begin as: the leading basis vectors, as in the paper (Sec. 3.2.2), or those of a
            fresh LoRA of rank p, whose input side is random and most of it outside the span of earlier tasks. The
            latter has no coefficients, hence `num_temporary` and `init_std` do not matter.
        target_modules (`Union[list[str], str]`, *optional*):
            Names of the modules to adapt, a regex, or `"all-linear"`, as for LoRA.
        exclude_modules (`Union[list[str], str]`, *optional*):
            Names of modules not to adapt, or a regex.
        layers_to_transform (`Union[list[int], int]`, *optional*):
            Indices of the layers to adapt.
        layers_pattern (`Union[list[str], str]`, *optional*):
            Name of the `nn.ModuleList` that `layers_to_transform` counts in.
        target_parameters (`list[str]`, *optional*):
            Names of parameters to adapt, or ends of them, in which a model keeps the weights (experts, n, d) of
            experts; each expert is a layer. As for LoRA, `target_modules=[]` leaves everything else alone.
        modules_to_save (`list[str]`, *optional*):
            Modules, such as a classification head, that are trained as a whole and kept with their task; PEFT compares
            the ends of names. [`ShareTrainer`] and [`ShareCallback`] add those that the base model's checkpoint lacks.
        basis (`Literal["joint", "factor"]`, *optional*, defaults to `"joint"`):
            How a merge chooses the basis: weighing all tasks' updates equally, or from the stacked LoRA factors as in
            the paper.
        center (`bool`, *optional*, defaults to `False`):
            Whether merges subtract the mean column of the stacked factors, as the paper does; `basis="factor"` only.
        explained_variance (`float`, *optional*):
            Use the fewest directions that explain this fraction of the tasks' variance.
        drift_tolerance (`float`, *optional*):
            Largest relative drift of any task that merges may add up to; layers grow to meet it.
        max_components (`int`, *optional*):
            How far layers may grow for `drift_tolerance`.
        coefficient_dtype (`Literal["float32", "bfloat16", "4bit"]`, *optional*, defaults to `"float32"`):
            What a subspace stores coefficients in. In a model they are float32 in any case.
        tolerance (`float`, *optional*):
            Relative error up to which a task that is merged takes a smaller rank than `pseudo_rank` in a layer.
        dropout (`float`, *optional*, defaults to `0.0`):
            Probability with which inputs of a task's update are dropped in training, as LoRA's `lora_dropout`.
        init_std (`float`, *optional*, defaults to `0.05`):
            Standard deviation σ of a new task's coefficients.
        fan_in_fan_out (`bool`, *optional*, defaults to `False`):
            Whether the target layers store their weight as (in, out), as GPT-2's `Conv1D` does.
        phase (`Literal["coefficients", "adapt", "init"]`, *optional*, defaults to `"coefficients"`):
            What of the task is trained: its coefficients in the frozen basis; coefficients and temporary factors
            (Sec. 3.2.2); or, before there is a subspace, free factors of rank p, as in LoRA. Set by the trainer.

    Attributes:
        origin (`AdapterOrigin` or `GivenBases`, *optional*):
            Where the basis of the adapter comes from; None for a fresh configuration. No field, so it is never saved.
            The model that takes the adapter reads it, and lets go of bases that were given.
        fingerprints (`Mapping[str, torch.Tensor]`, *optional*):
            By module, the fingerprint of the basis that the coefficients to come belong to, if they are in memory. No
            field either; the model that takes the adapter compares them with its bases.
        ranks (`Mapping[str, int]`, *optional*): By module, the rank of these coefficients. No field either.

    Raises:
        ValueError: If a value is out of range, or two contradict each other.
    """

    num_components: int = field(default=32, metadata={"help": "Cap on the directions of a layer's basis (k)."})
    pseudo_rank: int = field(default=8, metadata={"help": "Rank of a task's update in each layer (p)."})
    num_temporary: int | None = field(
        default=None,
        metadata={"help": "Leading basis vectors trained as temporary factors (φ); num_components // 4 if not given."},
    )
    temporary_init: TemporaryInit = field(
        default="basis",
        metadata={"help": "What temporary factors begin as: 'basis', or 'random' as those of a LoRA."},
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
        default=None, metadata={"help": "How far layers may grow to meet drift_tolerance."}
    )
    coefficient_dtype: CoefficientDtype = field(
        default="float32",
        metadata={"help": "What a subspace stores coefficients in: 'float32', 'bfloat16' or '4bit'."},
    )
    tolerance: float | None = field(
        default=None, metadata={"help": "Relative error up to which a task takes a smaller rank in a layer."}
    )
    dropout: float = field(
        default=0.0, metadata={"help": "Probability with which inputs of a task's update are dropped in training."}
    )
    init_std: float = field(default=0.05, metadata={"help": "Standard deviation of a new task's coefficients (σ)."})
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Whether the target layers store their weight as (in, out), as Conv1D does."}
    )
    phase: Phase = field(
        default=Phase.COEFFICIENTS,
        metadata={"help": "What of the task is trained: 'coefficients', 'adapt' or 'init'. Set by the trainer."},
    )

    origin = None
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
            raise ValueError(f"temporary_init is {self.temporary_init!r}, expected 'basis' or 'random'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected a probability of at least 0 and under 1")
        if not self.init_std > 0:
            raise ValueError(f"init_std is {self.init_std}, expected a positive number: zero has no gradient")
        if self.phase not in PHASES:
            raise ValueError(f"phase is {self.phase!r}, expected 'coefficients', 'adapt' or 'init'")
        self.phase = Phase(self.phase)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"target_modules is {self.target_modules!r} and layers_to_transform {self.layers_to_transform!r}, "
                "expected a list of names with layers_to_transform: a string is matched with whole names of modules, "
                "and may name layers itself"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given without layers_to_transform, expected both")
        if isinstance(self.target_parameters, str):
            raise ValueError(f"target_parameters is {self.target_parameters!r}, expected a list of names")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        self.subspace_settings()

    def subspace_settings(self, **overrides: Any) -> SubspaceSettings:
        """The part of the configuration that merges need."""
        return SubspaceSettings.from_dict({**vars(self), **overrides})
