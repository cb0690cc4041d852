"""Fingerprints that identify data and base models when a stream resumes.

They are digests of bounded samples, and the same in every process.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Iterable, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor, nn

from ..format.saved_modules import saved_module_of
from .data import Data, is_streamed


# Number of rows of a data set, and of values of a parameter, in a sample.
_ROWS = 64
_VALUES = 64

# Types that `repr` writes the same way in every process, and that `struct` does not support.
_PLAIN = (date, time, timedelta, Decimal, Enum, int, complex)


class WeightsFingerprint(NamedTuple):
    """Fingerprint of the parameters of a base model.

    Args:
        layout: Digest of their names, shapes and dtypes, and of which of them have values here.
        values: Digest of a sample of these values, None if no parameter has any. Comparable only if the layouts are
            the same.
    """

    layout: str
    values: str | None


def weights_fingerprint(model: nn.Module, kept: Iterable[str] = ()) -> WeightsFingerprint:
    """Return a fingerprint of the layout of a base model's parameters and of some values of each.

    Parameters that are on the meta device or partitioned by ZeRO-3 have no values here.

    Args:
        model: Base model without adapters.
        kept: Modules that each task keeps for itself, and that may begin at random, as `saved_names` returns them.
    """
    layout, values = hashlib.sha256(), hashlib.sha256()
    kept, samples = list(kept), []
    for name, parameter in model.named_parameters():
        if saved_module_of(name, kept) is not None:
            continue
        sample = _sampled_values(parameter)
        if sample is not None:
            samples.append(sample)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        # Quantized weights depend on the kind of device that quantizes them.
        place = None if parameter.dtype.is_floating_point else parameter.device.type
        layout.update(repr((name, shape, str(parameter.dtype), place, sample is not None)).encode())
    for sample in samples:
        values.update(sample.cpu().view(torch.uint8).numpy().tobytes())
    return WeightsFingerprint(_short(layout), _short(values) if samples else None)


def _sampled_values(parameter: nn.Parameter) -> Tensor | None:
    """Return evenly spaced values (at most `_VALUES`,), or None if there are none, or not those that were loaded."""
    data = parameter.data
    repacked = getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False)
    if type(data) is not Tensor or data.is_meta or not data.numel() or hasattr(parameter, "ds_shape") or repacked:
        return None
    # The sample does not reach the last 64th: rows that were added to embeddings for new tokens begin at random.
    return data.reshape(-1)[:: max(1, data.numel() // _VALUES)][:_VALUES].contiguous()


def data_fingerprint(data: Data | None) -> str | None:
    """Return a fingerprint of the length of data, its columns and some of its rows.

    Args:
        data: Data of a task. For data of `datasets`, the stored rows count, before any format or transform.

    Returns:
        Human-readable text, or None for streamed data. If rows differ each time they are read, or hold arbitrary
        objects, the text has only their number.
    """
    if data is None or is_streamed(data):
        return None
    length = len(data)
    numbers = sorted({i * (length - 1) // (_ROWS - 1) for i in range(_ROWS)}) if length else []
    if isinstance(data, datasets.Dataset):
        stored = data.with_format("arrow")[numbers].to_pylist() if numbers else []
        return f"{length} rows of {', '.join(sorted(data.column_names))} ({_digest_of(stored)})"
    try:
        first, second = (_digest_of(data[number] for number in numbers) for _ in range(2))
    except _UnknownValueError:
        return f"{length} rows"
    return f"{length} rows ({first})" if first == second else f"{length} rows"


class _UnknownValueError(TypeError):
    """A value may not have the same bytes in every process."""


def _digest_of(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        _feed(digest, row)
    return _short(digest)


def _feed(digest: Any, value: Any) -> None:
    """Add a value to a digest, with its type and its length.

    Raises:
        _UnknownValueError: If it holds anything other than numbers, dates, text, tensors and collections of these.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, float):
        digest.update(b"f" + struct.pack("<d", value))
    elif isinstance(value, (str, bytes)):
        content = value.encode(errors="surrogatepass") if isinstance(value, str) else value
        digest.update(f"{type(value).__name__}{len(content)}:".encode() + content)
    elif isinstance(value, Mapping):
        digest.update(f"m{len(value)}:".encode())
        for key in sorted(value, key=str):
            _feed(digest, str(key))
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"l{len(value)}:".encode())
        for entry in value:
            _feed(digest, entry)
    elif value is None or isinstance(value, _PLAIN):
        digest.update(f"{value!r};".encode())
    else:
        raise _UnknownValueError(type(value).__name__)


def _short(digest: Any) -> str:
    return digest.hexdigest()[:16]


def as_json(value: Any) -> Any:
    """Return a setting as JSON that is the same in every process, and when it is read back."""
    if value is None or (isinstance(value, (bool, int, str)) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)
    if isinstance(value, Enum):
        return as_json(value.value)
    if isinstance(value, Mapping):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((as_json(entry) for entry in value), key=str)
    if isinstance(value, Collection):
        return [as_json(entry) for entry in value]
    return getattr(value, "__name__", type(value).__name__)
