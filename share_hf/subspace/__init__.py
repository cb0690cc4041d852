"""The mathematics of a shared LoRA subspace, from tensors to tensors. It depends on torch alone."""

from .audit import AuditReport, audit_layers, audit_updates
from .dimensions import Auto, ChosenDimensions, WantedDimensions, choose_dimensions
from .factors import LARGEST_NORM, CompactUpdate, LowRankUpdate, thin_svd_of_update
from .layer import LayerSubspace, TaskRecords
from .merge import DriftToleranceError, LayerMergeReport, merge_into_layer, residual_outside
from .model import MergeReport, merge_into_layers
from .rounding import CoefficientDtype, packed, stored_bytes, unpacked
from .settings import BasisKind, SubspaceSettings, check_dimensions, rank_in_layer, smaller_layers
from .sketch import SKETCH_BUCKETS, initialization_sketch, initialization_sketches
from .threads import Purpose, RunHere, Way, working_by


__all__ = [
    "LARGEST_NORM",
    "SKETCH_BUCKETS",
    "AuditReport",
    "Auto",
    "BasisKind",
    "ChosenDimensions",
    "CoefficientDtype",
    "CompactUpdate",
    "DriftToleranceError",
    "LayerMergeReport",
    "LayerSubspace",
    "LowRankUpdate",
    "MergeReport",
    "Purpose",
    "RunHere",
    "SubspaceSettings",
    "TaskRecords",
    "WantedDimensions",
    "Way",
    "audit_layers",
    "audit_updates",
    "check_dimensions",
    "choose_dimensions",
    "initialization_sketch",
    "initialization_sketches",
    "merge_into_layer",
    "merge_into_layers",
    "packed",
    "rank_in_layer",
    "residual_outside",
    "smaller_layers",
    "stored_bytes",
    "thin_svd_of_update",
    "unpacked",
    "working_by",
]
