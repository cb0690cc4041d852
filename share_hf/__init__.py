"""Share: continual learning in one low-rank subspace, as a normal part of the Hugging Face stack."""

from .continual import ShareCallback, ShareTrainer, ShareTrainingArguments
from .shared_subspace import SharedSubspace
from .tuner import ShareConfig, register
from .version import __version__


register()

__all__ = [
    "ShareCallback",
    "ShareConfig",
    "ShareTrainer",
    "ShareTrainingArguments",
    "SharedSubspace",
    "__version__",
]
