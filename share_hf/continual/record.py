"""The record of what a stream is learned with, and how it is compared when the stream resumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..engines import on_first_process
from ..format.base_model import base_name, is_same_model
from ..format.saved_modules import saved_names
from ..state import SubspaceState
from ..tuner import ShareConfig
from .arguments import ShareTrainingArguments
from .data import TaskSplits
from .fingerprints import WeightsFingerprint, as_json, data_fingerprint, weights_fingerprint


# Arguments that decide what a phase learns. Not every version of transformers has all of them.
_ARGUMENTS = (
    *("method", "num_init_tasks", "score_metric", "max_steps", "seed", "data_seed", "full_determinism"),
    "samples_per_task",
    *("learning_rate", "init_learning_rate", "finetune_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("num_train_epochs", "init_num_train_epochs", "finetune_num_train_epochs", "warmup_steps", "warmup_ratio"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices"),
    *("train_sampling_strategy", "group_by_length", "length_column_name", "dataloader_drop_last"),
    *("remove_unused_columns", "label_names", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)

# Fields of the configuration of new tasks that decide what a phase learns. The subspace's settings are not among them:
# a stream resumes only if they are the same.
_CONFIGURATION = (
    *("num_temporary", "temporary_init", "init_std", "dropout", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters"),
)


@dataclass(frozen=True)
class StreamRecord:
    """Record of what a stream is learned with, as far as it can be written down.

    Args:
        base_model: Name or folder of the base model.
        weights: Fingerprint of its weights.
        arguments: Arguments of the trainer and fields of the configuration that decide what a phase learns.
        data: Fingerprints of the data of each task that has begun, by `TaskSplits` field; None for streamed data.
    """

    base_model: str | None = None
    weights: WeightsFingerprint | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StreamRecord:
        """Create a record from JSON values.

        Raises:
            ValueError, TypeError, AttributeError: If the values are not those of a record.
        """
        record = cls(**values)
        weights = WeightsFingerprint(*record.weights) if record.weights is not None else None
        texts = [record.base_model, *(weights or ())]
        for splits in record.data.values():
            texts += splits.values()
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{text!r} is a {type(text).__name__}, expected text")
        return replace(record, weights=weights, arguments=dict(record.arguments.items()))


def record_of(model: nn.Module, config: ShareConfig) -> StreamRecord:
    """Return a record of the base model alone, before it has adapters, as the first process sees the model."""
    kept = saved_names(config.modules_to_save, config.task_type)
    weights = on_first_process(lambda: weights_fingerprint(model, kept))
    return StreamRecord(base_name(getattr(model, "name_or_path", None)), weights)


def arguments_record(
    args: ShareTrainingArguments, config: ShareConfig, optimizer: tuple[type, Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Return what decides what a phase learns, as JSON. `optimizer` is its class and keyword arguments, if given."""
    record = {name: getattr(args, name) for name in _ARGUMENTS if hasattr(args, name)}
    # The total counts, however the batch is divided among processes and accumulated.
    record["train_batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    record |= {name: getattr(config, name) for name in _CONFIGURATION}
    record["optimizer_cls_and_kwargs"] = optimizer
    return as_json(record)


def data_record(splits: TaskSplits) -> dict[str, str | None]:
    """Return the fingerprints of the data of a task, by split."""
    return {split: data_fingerprint(data) for split, data in splits._asdict().items()}


def doubt_of_base_model(state: SubspaceState, record: StreamRecord) -> str | None:
    """Return a warning if a subspace may belong to another base model: only its name is known, not its weights."""
    found, now = state.base_model_name_or_path, record.base_model
    if found is None or now is None or is_same_model(found, now):
        return None
    return (
        f"the subspace belongs to base model {found!r}, and the model is {now!r}: unless both are the same model, its "
        "tasks are useless here"
    )


def check_base_model(found: StreamRecord, now: StreamRecord) -> str | None:
    """Compare the base model of a stream with the model that is to resume it.

    Args:
        found: Record of what the stream was learned with.
        now: Record of what it is to be learned with.

    Returns:
        A warning if it is uncertain whether the two are the same, else None.

    Raises:
        ValueError: If they are not the same. The message names both.
    """
    pair = f"base model {found.base_model!r}, and this is {now.base_model!r}"
    if found.weights is not None and now.weights is not None and found.weights.layout == now.weights.layout:
        if found.weights == now.weights:
            return None
        raise ValueError(
            f"the stream is one of {pair} with other weights (sample {now.weights.values}, expected "
            f"{found.weights.values}), expected the same model, or another output_dir"
        )
    named = found.base_model is not None and now.base_model is not None
    if named and not is_same_model(found.base_model, now.base_model):
        raise ValueError(f"the stream is one of {pair}, expected the same model, or another output_dir")
    if found.weights is None:
        return None  # an earlier version did not record them
    return (
        f"the stream is one of {pair} with parameters of other shapes, dtypes or places (layout {now.weights.layout}, "
        f"before {found.weights.layout}), so it is unknown whether they are the same"
    )


def changed_arguments(found: StreamRecord, now: StreamRecord) -> list[str]:
    """Return the arguments that have changed, each with its old value, as far as both records have them."""
    return [
        f"{name}={now.arguments[name]!r} (was {value!r})"
        for name, value in found.arguments.items()
        if name in now.arguments and now.arguments[name] != value
    ]


def changed_data(found: Mapping[str, str | None], splits: TaskSplits) -> Iterator[tuple[str, str]]:
    """Yield the splits of a task whose data has changed: the name of the split, and both fingerprints as text."""
    for split, data in splits._asdict().items():
        before, now = found.get(split), data_fingerprint(data)
        if before is not None and now is not None and before != now:
            yield split, f"{now}, was {before}"
