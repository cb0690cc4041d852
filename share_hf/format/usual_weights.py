"""Recognize the weights files that most tasks of a tree have by their bytes.

Tasks that adapt the same modules and have no head have files that differ only in the numbers of the coefficients: the
header before them states names, types and shapes, and the fingerprints after them identify the bases. If both are as
expected, everything but the numbers has been checked, without looking at each tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np
import torch

from ..subspace import rank_in_layer
from .basis_file import StoredBasis
from .files import LENGTH_BYTES, tensor_bytes
from .index import TreeIndex


# Coefficients of a task in one layer, (k_out, p) and (k_in, p) float32, as arrays because many are stacked quickly.
Coefficients = tuple[np.ndarray, np.ndarray]


class UsualWeights:
    """File of a task that has these modules and nothing else.

    Args:
        names: Names of the coefficients, output and input side, and of the fingerprint, by module.
        index: Index of the tree, which gives the sizes.
        bases: Bases to which the fingerprints belong, by module.
    """

    def __init__(
        self, names: Mapping[str, tuple[str, str, str]], index: TreeIndex, bases: Mapping[str, StoredBasis]
    ) -> None:
        tensors, self._shapes = {}, {}
        for module, (out, in_, fingerprint) in names.items():
            k_out, k_in = index.modules[module].num_components
            p = rank_in_layer(index.settings.pseudo_rank, index.modules[module].shape)
            self._shapes[module] = (k_out, p), (k_in, p)
            tensors[out], tensors[in_] = torch.zeros(k_out, p), torch.zeros(k_in, p)
            tensors[fingerprint] = bases[module].fingerprint
        content = tensor_bytes(tensors)
        start = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
        header = json.loads(content[LENGTH_BYTES:start])
        # safetensors puts larger types first, so the float32 numbers are together and the bytes follow them.
        self._numbers = sum(k * p for sides in self._shapes.values() for k, p in sides)
        self._start = content[:start]
        self._end = content[start + 4 * self._numbers :]
        self._size = len(content)
        self._places = {
            module: tuple(slice(*(place // 4 for place in header[name]["data_offsets"])) for name in of_module[:2])
            for module, of_module in names.items()
        }

    @staticmethod
    def exist_in(index: TreeIndex) -> bool:
        """Return whether the tasks of a tree have such files: with float32 coefficients of p columns each."""
        return (
            index.has_fingerprints and index.settings.coefficient_dtype == "float32" and not index.settings.has_ranks
        )

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self._size

    def coefficients_in(self, content: bytes) -> dict[str, Coefficients] | None:
        """Return the coefficients by module; None if the file is a different one or a number is not finite."""
        if len(content) != self._size or not content.startswith(self._start) or not content.endswith(self._end):
            return None
        numbers = np.frombuffer(content, "<f4", self._numbers, len(self._start)).astype(np.float32)
        # One NaN or infinite number spoils the sum of all. In float64, a sum of float32 numbers does not overflow.
        if not math.isfinite(numbers.sum(dtype=np.float64)):
            return None
        return {
            module: (numbers[out].reshape(self._shapes[module][0]), numbers[in_].reshape(self._shapes[module][1]))
            for module, (out, in_) in self._places.items()
        }
