"""Read files with any content safely, and write files atomically."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers.utils.import_utils import check_torch_load_is_safe


MAX_JSON_BYTES = 64 * 2**20

LENGTH_BYTES = 8  # a safetensors file begins with the length of its header

# Types in which coefficients, bases, LoRA factors and heads may be stored.
_DTYPES = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
}


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        ValueError: If the file is missing, too large, not JSON or not an object.
    """
    return json_in(path, json_bytes_of(path))


def json_bytes_of(path: Path | str) -> bytes:
    """Read a file that should be JSON, as bytes for callers that also need its checksum.

    Raises:
        ValueError: If the file is missing or too large.
    """
    size = size_of_file(path)
    if size is None:
        raise ValueError(f"{path}: no such file")
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {size} bytes, expected at most {MAX_JSON_BYTES}")
    return bytes_of(path)


def bytes_of(path: Path | str) -> bytes:
    """Read a whole file, unbuffered because a buffer would only add a copy."""
    with open(path, "rb", buffering=0) as file:
        return file.read()


def size_of_file(path: Path | str) -> int | None:
    """Return the size of a file in bytes, or None if there is no regular file of that name. Takes one disk access."""
    try:
        found = os.stat(path)
    except OSError:
        Path(path).is_file()  # raises if access is denied
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def json_in(path: Path | str, content: bytes) -> dict[str, Any]:
    """Return the JSON object in the bytes of a file.

    Raises:
        ValueError: Same as in `json_object`. The message names the file.
    """
    try:
        text = content.decode("utf-8")
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    return json_object(str(path), text)


def json_object(place: str, text: str) -> dict[str, Any]:
    """Return the JSON object in a text.

    Args:
        place: Origin of the text, for messages.
        text: Any text.

    Raises:
        ValueError: If the text is not JSON, or not an object.
    """
    try:
        content = _DECODER.decode(text)
        if "\\u" in text:  # half a surrogate pair cannot be written again, and only an escape can produce it
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{place}: holds a {type(content).__name__}, expected a JSON object")
    return content


def _refuse(literal: str) -> float:
    raise ValueError(f"{literal} is not a JSON number")


def _finite(literal: str) -> float:
    return number if math.isfinite(number := float(literal)) else _refuse(literal)


def _short(literal: str) -> int:
    return int(literal) if len(literal) < 20 else _refuse(f"{literal[:20]}…")


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite, parse_int=_short)


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Return JSON that is readable for people and diffs: a line for each field, and for each entry of a field."""
    return (_lines(content, depth=2) + "\n").encode()


def _lines(value: Any, depth: int, indent: str = "") -> str:
    if not depth or not value or not isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    inner = indent + " "
    if isinstance(value, Mapping):
        entries = [f"{json.dumps(name)}: {_lines(value[name], depth - 1, inner)}" for name in sorted(value)]
    elif isinstance(value[0], (Mapping, list, tuple)):
        entries = [_lines(entry, depth - 1, inner) for entry in value]
    else:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    opening, closing = "{}" if isinstance(value, Mapping) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(entries) + f"\n{indent}{closing}"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file and check that they are finite.

    Raises:
        ValueError: If the file is missing, is not a whole safetensors file, or a tensor has NaN or infinite entries.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}), expected a complete one") from error
    check_tensors(path, tensors)
    return tensors


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file saved by torch and check that they are finite. No code in the file is run.

    Raises:
        ValueError: Same as in `read_tensors`; also if the file holds anything but tensors by name, or torch is too old
            to read it safely.
    """
    check_torch_load_is_safe()
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not a file of tensors saved by torch ({reason})") from error
    named = isinstance(content, dict) and all(isinstance(key, str) for key in content)
    if not named or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected only tensors by name")
    tensors = {name: tensor.detach() for name, tensor in content.items()}
    check_tensors(path, tensors)
    return tensors


def check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that no file of this library holds.

    Raises:
        ValueError: If a tensor is of an uncommon type or not finite. The message names the file and the tensor.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{path}: {name!r} is {tensor.dtype}, expected torch.float32 or another common type")
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise ValueError(f"{path}: {name!r} has NaN or infinite entries, expected finite numbers")


def _is_finite(tensor: Tensor) -> bool:
    # One NaN or infinite entry spoils the sum, which is much faster than looking at each entry.
    return math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return a safetensors file whose bytes depend only on the tensors."""
    return save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}, {"format": "pt"})


class TensorFiles:
    """Makes the bytes of successive safetensors files, quickly if a file has the same tensors as the one before.

    The header states only names, types and shapes, so files that share these have the same header.
    """

    def __init__(self) -> None:
        self._layout: list[tuple[str, torch.dtype, torch.Size]] = []
        self._header, self._order = b"", [""]

    def content(self, tensors: Mapping[str, Tensor]) -> bytes:
        """Return the same bytes as `tensor_bytes`."""
        layout = [(name, tensors[name].dtype, tensors[name].shape) for name in sorted(tensors)]
        if layout == self._layout and sys.byteorder == "little":
            return b"".join([self._header, *(_raw(tensors[name]) for name in self._order)])
        content = tensor_bytes(tensors)
        start = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
        header = json.loads(content[LENGTH_BYTES:start])
        self._layout, self._header = layout, content[:start]
        self._order = sorted(tensors, key=lambda name: header[name]["data_offsets"])
        return content


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def expect_tensor(path: Path | str, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the float32 tensor of this name and shape.

    Raises:
        ValueError: If there is none. The message gives the file, the tensor, what was found and what was expected.
    """
    if name not in tensors:
        raise ValueError(f"{path}: {name!r} is missing, expected a tensor of shape {shape}")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{path}: {name!r} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype != torch.float32:
        raise ValueError(f"{path}: {name!r} is {tensor.dtype}, expected torch.float32")
    return tensor


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class FolderWriter:
    """Puts files into a scratch folder that will replace another folder.

    Args:
        scratch: Folder to write into.
        folder: Folder that will be replaced.
        known: Checksums, by path, of files that `folder` is known to hold. These files are not read for a comparison.
            A file with the same content is linked instead of written again.

    Attributes:
        sha256: Checksums of the written files, by path.
    """

    def __init__(self, scratch: Path, folder: Path | None = None, known: Mapping[str, str] | None = None) -> None:
        self.scratch = scratch
        self.sha256: dict[str, str] = {}
        self._folder, self._known = folder, known or {}
        self._made: set[str] = set()  # folders by path: a tree of a thousand tasks has as many

    def put(self, name: str, content: bytes) -> None:
        """Write a file, or link it if the replaced folder has the same one."""
        checksum = hashlib.sha256(content).hexdigest()
        path = os.path.join(self.scratch, name)
        self._make(os.path.dirname(path))
        if os.path.lexists(path):  # never write through a link into a file of the other folder
            os.unlink(path)
        there = self._known.get(name) == checksum or self._holds(name, content)
        if not there or not self._link(name, path):
            Path(path).write_bytes(content)
        self.sha256[name] = checksum

    def _make(self, folder: str) -> None:
        if folder not in self._made:
            os.makedirs(folder, exist_ok=True)
            self._made.add(folder)

    def _holds(self, name: str, content: bytes) -> bool:
        if self._folder is None:
            return False
        path = os.path.join(self._folder, name)
        try:
            found = os.lstat(path)
            if not stat.S_ISREG(found.st_mode) or found.st_size != len(content):
                return False
            return bytes_of(path) == content
        except OSError:  # the file is missing or unreadable
            return False

    def _link(self, name: str, path: str) -> bool:
        try:
            os.link(os.path.join(self._folder, name), path)
        except OSError:  # not every file system supports links
            return False
        return True


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    scratch = path.with_name(f".{path.name}.new")  # a fixed name, so that the next write reuses what a crash left
    try:
        with naming(path):
            scratch.write_text(text, encoding="utf-8")
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
            scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    flush_folder(path.parent)


@contextmanager
def naming(place: Path) -> Iterator[None]:
    """Add the path to errors in writing, because a full disk is reported without one."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{place}: could not be written ({error})") from error
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(place)) from error


def flush_folder(folder: Path) -> None:
    if sys.platform == "win32":  # which cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
