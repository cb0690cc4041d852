"""Read the tasks of a tree: each file once, and with checks that most tasks share done once for all of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..state import Phase, TaskInfo, sketch_of
from ..subspace import LARGEST_NORM, rank_in_layer
from .basis_file import SUBSPACE_FILE, StoredBasis
from .coefficients import rank_of_coefficients, with_plain_coefficients
from .files import bytes_of, expect_tensor, json_bytes_of, json_in, read_tensors, size_of_file
from .index import INDEX_FILE, TreeIndex, check_file
from .lora import PEFT_PREFIX, read_target
from .patterns import without_slow_patterns
from .router_file import ROUTER_FILE, read_route
from .task_files import (
    CERTIFICATE_COLUMNS,
    FINGERPRINT,
    METRICS_FILE,
    check_fingerprint,
    check_kept,
    noted_checksums,
    task_folder,
)
from .usual_weights import Coefficients, UsualWeights


# Coefficients and certificate of a task in one layer.
StoredTask = tuple[Coefficients, list[float]]


class _Names(NamedTuple):
    """Names of a layer's tensors in the file of a task."""

    out: str
    in_: str
    fingerprint: str

    @classmethod
    def of(cls, module: str) -> _Names:
        coefficients = f"{PEFT_PREFIX}{module}.share_coefficients"
        return cls(f"{coefficients}_out", f"{coefficients}_in", f"{PEFT_PREFIX}{module}.{FINGERPRINT}")


class _Weights(NamedTuple):
    """Bytes of a weights file, and the coefficients in them by module."""

    content: bytes
    of: Mapping[str, Coefficients]


class TaskReader:
    """Reads and checks the tasks of one tree.

    Args:
        folder: Folder of the tree.
        index: Index of the tree.
        bases: Bases by module.
    """

    def __init__(self, folder: Path, index: TreeIndex, bases: Mapping[str, StoredBasis]) -> None:
        self._folder, self._index, self._bases = folder, index, bases
        # Most tasks have the same configuration and modules, so these have few entries.
        self._configs: dict[bytes, dict[str, Any]] = {}
        self._targets: dict[tuple[bytes, tuple[str, ...]], dict[str, Any]] = {}
        self._usual: dict[tuple[str, ...], UsualWeights] = {}

    def read(self, task: str) -> tuple[TaskInfo, dict[str, StoredTask]]:
        """Read what is known of a task, and its coefficients and certificate by module.

        Raises:
            ValueError: If a file is missing, damaged or edited. The message gives the file, the tensor, what was found
                and what was expected.
        """
        place = os.path.join(self._folder, task_folder(task))
        # Plain text: creating a `Path` for each file of many tasks would take a good part of the reading time.
        config_path, weights_path, metrics_path = (
            os.path.join(place, name) for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, METRICS_FILE)
        )
        config_bytes, metrics_bytes = json_bytes_of(config_path), json_bytes_of(metrics_path)
        config, metrics = self._config(config_path, config_bytes), json_in(metrics_path, metrics_bytes)
        weights = self._usual_weights(weights_path, metrics)
        tensors = {} if weights is not None else self._tensors(weights_path)
        stored: dict[str, StoredTask] = {}
        try:
            if metrics["certificate_columns"] != list(CERTIFICATE_COLUMNS):
                raise ValueError(
                    f"{metrics_path}: certificate_columns is {metrics['certificate_columns']!r}, expected "
                    f"{list(CERTIFICATE_COLUMNS)}"
                )
            for module, values in metrics["certificate"].items():
                if module not in self._bases:
                    raise ValueError(
                        f"{metrics_path}: {module!r} is not in {SUBSPACE_FILE}, expected one of its modules"
                    )
                sides = self._coefficients(weights_path, tensors, module) if weights is None else weights.of[module]
                stored[module] = sides, _certificate(metrics_path, module, values)
            head = {} if weights is not None else self._head(tensors, stored)
            try:
                target = self._target(config_path, config_bytes, config, tuple(stored))
                check_kept(weights_path, head, target)
                info = _task_info(metrics_path, metrics, head, target)
            except ValueError as error:
                raise ValueError(str(error) if place in str(error) else f"{metrics_path}: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{metrics_path}: a field is missing or of the wrong type ({error!r})") from error
        if odd := [name for name in info.head if ".share_coefficients_" in name]:
            raise ValueError(
                f"{weights_path}: {odd[0]!r} is unexpected, {metrics_path} has no certificate of its module"
            )
        if (base := config.get("base_model_name_or_path")) != self._index.base_model_name_or_path:
            raise ValueError(
                f"{config_path}: base_model_name_or_path is {base!r}, expected "
                f"{self._index.base_model_name_or_path!r} as in {INDEX_FILE}"
            )
        metrics_file = f"{task_folder(task)}/{METRICS_FILE}"
        check_file(self._folder, self._index.sha256, metrics_file, content=metrics_bytes)
        sha256 = noted_checksums(task, metrics)
        of_others = {CONFIG_NAME: config_bytes, SAFETENSORS_WEIGHTS_NAME: None if weights is None else weights.content}
        for name, content in of_others.items():
            relative = f"{task_folder(task)}/{name}"
            check_file(self._folder, sha256, relative, listed_in=metrics_file, content=content)
        if task in self._index.routed_tasks:
            info = replace(info, route=read_route(os.path.join(place, ROUTER_FILE), self._index.router.width))
            check_file(self._folder, sha256, f"{task_folder(task)}/{ROUTER_FILE}", listed_in=metrics_file)
        return info, stored

    def _config(self, path: str, content: bytes) -> dict[str, Any]:
        if content not in self._configs:
            self._configs[content] = json_in(path, content)
        return self._configs[content]

    def _target(
        self, path: str, content: bytes, config: Mapping[str, Any], modules: tuple[str, ...]
    ) -> dict[str, Any]:
        """Return a configuration's own target fields, or these modules if the patterns match too slowly."""
        if (content, modules) not in self._targets:
            self._targets[content, modules] = without_slow_patterns(read_target(path, config), modules)
        return dict(self._targets[content, modules])

    def _usual_weights(self, path: str, metrics: Mapping[str, Any]) -> _Weights | None:
        """Read a file that has only the coefficients of the modules in these metrics; None if it has anything else."""
        certificate = metrics.get("certificate")
        if not UsualWeights.exist_in(self._index) or not isinstance(certificate, dict):
            return None
        if not certificate.keys() <= self._bases.keys():
            return None
        modules = tuple(certificate)
        if modules not in self._usual:
            self._usual[modules] = UsualWeights({name: _Names.of(name) for name in modules}, self._index, self._bases)
        usual = self._usual[modules]
        if size_of_file(path) != usual.size:
            return None
        content = bytes_of(path)
        coefficients = usual.coefficients_in(content)
        return None if coefficients is None else _Weights(content, coefficients)

    def _tensors(self, path: str) -> dict[str, Tensor]:
        return with_plain_coefficients(Path(path), read_tensors(Path(path)), self._index.settings.coefficient_dtype)

    def _coefficients(self, path: str, tensors: Mapping[str, Tensor], module: str) -> Coefficients:
        """Return the coefficients of one layer from the tensors of any file."""
        names, entry, settings = _Names.of(module), self._index.modules[module], self._index.settings
        if self._index.has_fingerprints:
            check_fingerprint(path, tensors.get(names.fingerprint), names.fingerprint, self._bases[module])
        k_out, k_in = entry.num_components
        rank = p = rank_in_layer(settings.pseudo_rank, entry.shape)
        if settings.has_ranks:
            rank = rank_of_coefficients(path, tensors, names.out.removesuffix("_out"), p)
        out = expect_tensor(path, tensors, names.out, (k_out, rank))
        in_ = expect_tensor(path, tensors, names.in_, (k_in, rank))
        return tuple(torch.nn.functional.pad(side, (0, p - rank)).numpy() for side in (out, in_))

    def _head(self, tensors: Mapping[str, Tensor], modules: Iterable[str]) -> dict[str, Tensor]:
        """Return what a file has besides the coefficients of these modules, by name in the base model."""
        of_modules = {
            name for module in modules for name in _Names.of(module)[: 3 if self._index.has_fingerprints else 2]
        }
        return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items() if name not in of_modules}


def _task_info(
    path: str, metrics: Mapping[str, Any], head: Mapping[str, Tensor], target: Mapping[str, Any]
) -> TaskInfo:
    labels, dataset, initialization = metrics["labels"], metrics["dataset"], metrics["initialization"]
    problem_type, score = metrics.get("problem_type"), metrics.get("score")
    texts = {"dataset": dataset, "initialization": initialization, "problem_type": problem_type, "score": score}
    for name, value in texts.items():
        if not isinstance(value, (str, NoneType)):
            raise ValueError(f"{path}: {name} is {value!r}, expected text or null")
    info = TaskInfo(
        learned_by=Phase(metrics["learned_by"]),
        target=target,
        head=head,
        # The score comes first, followed by other measurements.
        scores={
            name: _finite_score(path, name, metrics["scores"][name])
            for name in sorted(metrics["scores"], key=lambda name: name != score)
        },
        labels=None if labels is None else tuple(str(label) for label in labels),
        problem_type=problem_type,
        dataset=dataset,
        initialization=initialization,
    )
    sketch_of(info)
    return info


def _finite_score(path: str, name: str, score: Any) -> float:
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise ValueError(f"{path}: score {name!r} is {score!r}, expected a finite number")
    return float(score)


def _certificate(path: str, module: str, values: Sequence[Any]) -> list[float]:
    if len(values) != len(CERTIFICATE_COLUMNS):
        raise ValueError(f"{path}: certificate of {module!r} is {values!r}, expected {list(CERTIFICATE_COLUMNS)}")
    for name, value in zip(CERTIFICATE_COLUMNS, values, strict=True):
        if type(value) not in (int, float) or not 0 <= value < LARGEST_NORM:
            raise ValueError(f"{path}: {name} of {module!r} is {value!r}, expected a number of 0 or more")
    return [float(value) for value in values]
