"""Tensors in, tensors out: the mathematics of a shared LoRA subspace. Depends on torch alone."""

from .factors import CompactUpdate, LowRankUpdate, thin_svd_of_update
from .layer import LayerSubspace, TaskRecords
from .merge import DriftToleranceError, LayerMergeReport, merge_into_layer, residual_outside
from .model import MergeReport, merge_into_layers
from .settings import BasisKind, SubspaceSettings, check_dimensions


__all__ = [
    "BasisKind",
    "CompactUpdate",
    "DriftToleranceError",
    "LayerMergeReport",
    "LayerSubspace",
    "LowRankUpdate",
    "MergeReport",
    "SubspaceSettings",
    "TaskRecords",
    "check_dimensions",
    "merge_into_layer",
    "merge_into_layers",
    "residual_outside",
    "thin_svd_of_update",
]
