"""The basis of a layer before a merge has learned one."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def placeholder_basis(module_name: str, features: int, num_components: int, side: str) -> Tensor:
    """Return a random orthonormal basis (features, k) for a layer that has not seen a task.

    Every feature belongs to one direction, with a random sign. Unlike an orthogonalized random matrix, the basis
    depends only on the module's name and is bit-identical on every machine, so a task that was saved with it fits a
    model that is made elsewhere.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{module_name}.{side}".encode()))
    direction = torch.randperm(features, generator=generator, device="cpu") % num_components
    signs = 2.0 * torch.randint(2, (features,), generator=generator, device="cpu") - 1
    basis = torch.zeros(features, num_components, dtype=torch.float64, device="cpu")
    sizes = direction.bincount()[direction]  # of the direction that each feature belongs to
    basis[torch.arange(features, device="cpu"), direction] = signs.double() / sizes.double().sqrt()
    return basis.float()
