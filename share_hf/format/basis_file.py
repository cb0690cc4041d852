"""`subspace.safetensors`: the bases of all layers, stored once for all tasks.

For each target module, the file holds `<module>.beta` (n, k_out) and `<module>.alpha` (d, k_in), float32 with
orthonormal columns; `<module>.spectrum_out` (k_out,) and `<module>.spectrum_in` (k_in,), the singular values of the
stacked updates along these columns when the basis last changed; and `<module>.explained_variance` (1,) at that time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..subspace import LayerSubspace
from ..subspace.factors import without_autocast
from .files import expect_tensor, read_tensors


SUBSPACE_FILE = "subspace.safetensors"
ORTHONORMALITY_TOLERANCE = 1e-3

_PARTS = ("beta", "alpha", "spectrum_out", "spectrum_in", "explained_variance")


@dataclass(frozen=True)
class StoredBasis:
    """One layer's entry in `subspace.safetensors`. All tensors are float32.

    Args:
        beta: Output basis, (n, k_out).
        alpha: Input basis, (d, k_in).
        spectrum_out: Singular values along `beta`, (k_out,).
        spectrum_in: Singular values along `alpha`, (k_in,).
        explained_variance: Explained variance when the basis last changed, in [0, 1].
    """

    beta: Tensor
    alpha: Tensor
    spectrum_out: Tensor
    spectrum_in: Tensor
    explained_variance: float

    @classmethod
    def of_layer(cls, layer: LayerSubspace) -> StoredBasis:
        """Return what is stored of a layer, apart from the coefficients of its tasks."""
        return cls(
            beta=layer.basis_out,
            alpha=layer.basis_in,
            spectrum_out=layer.spectrum_out.float(),
            spectrum_in=layer.spectrum_in.float(),
            explained_variance=layer.explained_by_basis,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (n, d) of the layer."""
        return self.beta.shape[0], self.alpha.shape[0]

    @property
    def num_components(self) -> tuple[int, int]:
        """Numbers of components (k_out, k_in)."""
        return self.beta.shape[1], self.alpha.shape[1]

    @cached_property
    def fingerprint(self) -> Tensor:
        """Fingerprint by which the coefficients of the layer's tasks recognize this basis. See `fingerprint_of`."""
        return fingerprint_of(self.beta, self.alpha)

    def equals(self, beta: Tensor, alpha: Tensor) -> bool:
        """Return whether another basis is bitwise the same."""
        return torch.equal(self.beta, beta.cpu()) and torch.equal(self.alpha, alpha.cpu())


@dataclass(frozen=True)
class BasisFile:
    """A `subspace.safetensors` that was read, to be recognized later without reading it again.

    Args:
        checksum: SHA-256 of the file.
        inode: Inode number of the file.
        size: Size in bytes.
        modified: Time of the last modification, in nanoseconds.
    """

    checksum: str
    inode: int
    size: int
    modified: int

    @classmethod
    def at(cls, path: Path, checksum: str) -> BasisFile:
        """Return the record of the file as it is now."""
        found = path.stat()
        return cls(checksum, found.st_ino, found.st_size, found.st_mtime_ns)


def fingerprint_of(beta: Tensor, alpha: Tensor) -> Tensor:
    """Return eight bytes (8,), uint8, that distinguish a layer's basis from any other.

    They accompany the coefficients of a task everywhere, because coefficients mean nothing in another basis. Bytes
    survive what is done to state dicts: moves, casts to a 16-bit float, averages of equal values.
    """
    digest = hashlib.sha256()
    for columns in (beta, alpha):
        digest.update(repr(tuple(columns.shape)).encode())
        digest.update(columns.detach().cpu().float().contiguous().numpy())
    return torch.tensor(list(digest.digest()[:8]), dtype=torch.uint8)


def fingerprint_of_all(bases: Mapping[str, StoredBasis]) -> str:
    """Return the fingerprint of the bases of all layers, as text."""
    digest = hashlib.sha256()
    for module in sorted(bases):
        digest.update(f"{module}\n".encode())
        digest.update(bases[module].fingerprint.numpy())
    return digest.hexdigest()


def basis_tensors(bases: Mapping[str, StoredBasis]) -> dict[str, Tensor]:
    """Return the tensors of `subspace.safetensors` for these modules."""
    tensors: dict[str, Tensor] = {}
    for module, basis in bases.items():
        tensors[f"{module}.beta"] = basis.beta.float()
        tensors[f"{module}.alpha"] = basis.alpha.float()
        tensors[f"{module}.spectrum_out"] = basis.spectrum_out.float()
        tensors[f"{module}.spectrum_in"] = basis.spectrum_in.float()
        tensors[f"{module}.explained_variance"] = torch.tensor([basis.explained_variance], dtype=torch.float32)
    return tensors


def bases_of(layers: Mapping[str, LayerSubspace]) -> dict[str, StoredBasis]:
    """Return the bases of a subspace, by module."""
    return {module: StoredBasis.of_layer(layer) for module, layer in layers.items()}


def read_bases(path: Path) -> dict[str, StoredBasis]:
    """Read the bases in a `subspace.safetensors`, by module.

    Raises:
        ValueError: If the file is damaged, a module is incomplete, shapes do not fit together, or columns are not
            orthonormal.
    """
    tensors = read_tensors(path)
    modules = []
    for name in tensors:
        module, _, part = name.rpartition(".")
        if not module or part not in _PARTS:
            raise ValueError(f"{path}: unexpected tensor {name!r}, expected <module>.<{'|'.join(_PARTS)}>")
        if part == "beta":
            modules.append(module)
    if len(tensors) != len(_PARTS) * len(modules):
        raise ValueError(f"{path}: {len(tensors)} tensors for {len(modules)} modules, expected {len(_PARTS)} for each")
    return {module: _read_basis(path, tensors, module) for module in modules}


def _read_basis(path: Path, tensors: Mapping[str, Tensor], module: str) -> StoredBasis:
    beta = _read_columns(path, tensors, f"{module}.beta")
    alpha = _read_columns(path, tensors, f"{module}.alpha")
    return StoredBasis(
        beta=beta,
        alpha=alpha,
        spectrum_out=expect_tensor(path, tensors, f"{module}.spectrum_out", (beta.shape[1],)),
        spectrum_in=expect_tensor(path, tensors, f"{module}.spectrum_in", (alpha.shape[1],)),
        explained_variance=float(expect_tensor(path, tensors, f"{module}.explained_variance", (1,))),
    )


def _read_columns(path: Path, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    found = tensors.get(name)
    if found is None or found.ndim != 2 or found.shape[1] > found.shape[0]:
        shape = None if found is None else tuple(found.shape)
        raise ValueError(f"{path}: {name!r} has shape {shape}, expected a matrix with no more columns than rows")
    columns = expect_tensor(path, tensors, name, tuple(found.shape))
    with without_autocast(columns.device):
        gram = columns.T @ columns
    error = (gram - torch.eye(len(gram))).abs().max() if columns.numel() else torch.zeros(())
    if error > ORTHONORMALITY_TOLERANCE:
        raise ValueError(f"{path}: the columns of {name!r} are not orthonormal (off by {error:.2g})")
    # Copy it out of the mapped file, to an address as aligned as any other tensor's: BLAS may round by that too.
    return columns.clone()
