"""Share: continual learning in one low-rank subspace, as a normal part of the Hugging Face stack.

Importing the package registers the tuner with PEFT. Everything else, such as the Trainer, is imported on first access.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .tuner import ShareConfig, register
from .version import __version__


if TYPE_CHECKING:
    from .continual import ShareCallback, ShareTrainer, ShareTrainingArguments
    from .shared_subspace import SharedSubspace

_MODULES = {
    "ShareCallback": ".continual",
    "ShareTrainer": ".continual",
    "ShareTrainingArguments": ".continual",
    "SharedSubspace": ".shared_subspace",
}

__all__ = [
    "ShareCallback",
    "ShareConfig",
    "ShareTrainer",
    "ShareTrainingArguments",
    "SharedSubspace",
    "__version__",
]

register()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_MODULES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
