"""The folder of one task in a tree: its coefficients and head as a SHARE adapter, and what is known of the task.

adapter_config.json         configuration with peft_type SHARE
adapter_model.safetensors   coefficients (k_out, min(p, n, d)) and (k_in, min(p, n, d)) of each layer, or with the
                            task's own rank there, stored as in `coefficients`; the fingerprints of the bases to which
                            they belong; and the head
metrics.json                scores, the norm and drift of each layer, which merges need, checksums of the other files
router.safetensors          the features by which inputs find the task, if it has a route (see `router_file`)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..state import SubspaceState
from .basis_file import SUBSPACE_FILE, StoredBasis
from .coefficients import coefficient_tensors
from .files import TensorFiles, check_tensors, json_bytes, read_json
from .index import TreeIndex, check_file
from .lora import PEFT_PREFIX, check_head_names, config_bytes, read_target
from .router_file import ROUTER_FILE, route_bytes
from .saved_modules import saved_names


METRICS_FILE = "metrics.json"
TASKS_FOLDER = "tasks"

# The name of a module followed by this names the tensor that tells to which basis the coefficients there belong.
FINGERPRINT = "share_fingerprint"

# Values that a task's metrics hold for each layer, in this order.
CERTIFICATE_COLUMNS = ("norm", "rank_error", "drift_bound", "drift_estimate")


def task_folder(task: str) -> str:
    return f"{TASKS_FOLDER}/{task}"


def share_adapter_tensors(state: SubspaceState, task: str, bases: Mapping[str, StoredBasis]) -> dict[str, Tensor]:
    """Return a task's coefficients, the fingerprints of their bases and its head, as PEFT saves and loads them."""
    tensors = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in state.tasks[task].head.items()}
    for module, layer in state.layers_of(task).items():
        tensors |= coefficient_tensors(f"{PEFT_PREFIX}{module}", layer, task, state.settings)
        tensors[f"{PEFT_PREFIX}{module}.{FINGERPRINT}"] = bases[module].fingerprint
    return tensors


def share_adapter_config(state: SubspaceState, task: str) -> dict[str, Any]:
    """Return the values of a task's `ShareConfig`."""
    settings = state.settings.to_dict()
    del settings["center"]  # a property of merges, on which a single task has no influence
    return {
        "peft_type": "SHARE",
        "base_model_name_or_path": state.base_model_name_or_path,
        "inference_mode": True,
        **settings,
        **{name: value for name, value in state.tasks[task].target.items() if value is not None},
    }


class TaskFiles:
    """Makes the files of a subspace's tasks, one task after another. What many tasks share is made once.

    Args:
        state: Subspace that has the tasks.
        bases: Bases of the subspace, by module.
    """

    def __init__(self, state: SubspaceState, bases: Mapping[str, StoredBasis]) -> None:
        self._state, self._bases = state, bases
        self._weights = TensorFiles()
        self._target: Mapping[str, Any] | None = None  # of the previous task
        self._read: Mapping[str, Any] = {}
        self._config = b""

    def of(self, task: str) -> dict[str, bytes]:
        """Return the files of a task by name.

        Raises:
            ValueError: If they could not be read back. The message names the file and the tensor.
        """
        info, place = self._state.tasks[task], Path(task_folder(task))
        if info.target != self._target:
            config = share_adapter_config(self._state, task)
            self._read, self._config = read_target(place / CONFIG_NAME, config), config_bytes(config)
            self._target = info.target
        # Check by the rules of the reader, so that what is written can be read back.
        check_kept(place / SAFETENSORS_WEIGHTS_NAME, info.head, self._read)
        check_tensors(place / SAFETENSORS_WEIGHTS_NAME, info.head)  # merges have checked the other tensors
        tensors = share_adapter_tensors(self._state, task, self._bases)
        files = {CONFIG_NAME: self._config, SAFETENSORS_WEIGHTS_NAME: self._weights.content(tensors)}
        if info.route is not None:
            files[ROUTER_FILE] = route_bytes(info.route, place / ROUTER_FILE)
        layers = self._state.layers_of(task)
        content = {
            "learned_by": info.learned_by,
            "scores": dict(info.scores),
            "labels": None if info.labels is None else list(info.labels),
            **({"problem_type": info.problem_type} if info.problem_type is not None else {}),
            **({"score": next(iter(info.scores))} if len(info.scores) > 1 else {}),
            "dataset": info.dataset,
            "initialization": info.initialization,
            "certificate": {module: layer.records.rows[layer.index(task)] for module, layer in layers.items()},
            "certificate_columns": list(CERTIFICATE_COLUMNS),
            "sha256": {name: hashlib.sha256(file).hexdigest() for name, file in files.items()},
        }
        return {**files, METRICS_FILE: json_bytes(content)}


def check_task_files(folder: Path, index: TreeIndex, task: str) -> None:
    """Compare the files of a task with the checksums recorded in the index and the task's metrics.

    Raises:
        ValueError: If a file is not the one that was saved. The message names the file.
    """
    place = task_folder(task)
    metrics_file = f"{place}/{METRICS_FILE}"
    check_file(folder, index.sha256, metrics_file)
    sha256 = noted_checksums(task, read_json(folder / metrics_file))
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        check_file(folder, sha256, f"{place}/{name}", listed_in=metrics_file)


def noted_checksums(task: str, metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the checksums of a task's other files that its metrics record, by path in the tree."""
    noted = metrics.get("sha256")
    place = task_folder(task)
    return {f"{place}/{name}": checksum for name, checksum in noted.items()} if isinstance(noted, dict) else {}


def check_fingerprint(path: Path | str, found: Tensor | None, name: str, basis: StoredBasis) -> None:
    """Compare the fingerprint of this name in a file of coefficients with the basis beside the file.

    Raises:
        ValueError: If the fingerprint is missing or belongs to another basis.
    """
    expected = basis.fingerprint
    if found is None or not torch.equal(found.float(), expected.float()):
        value = "missing" if found is None else found.tolist()
        raise ValueError(
            f"{path}: {name!r} is {value}, expected {expected.tolist()}: the coefficients do not belong to the basis "
            f"in {SUBSPACE_FILE}, for example because another model was saved there"
        )


def check_kept(path: Path | str, head: Iterable[str], target: Mapping[str, Any]) -> None:
    """Refuse a head that the configuration does not declare as kept: a loader would not find it.

    Raises:
        ValueError: If there is such a weight. The message names the first.
    """
    check_head_names(path, head, saved_names(target.get("modules_to_save"), target.get("task_type")))
