"""A repository on the Hub is hostile until it is validated: what is refused, and what it could not do until then."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from share_hf import SharedSubspace
from share_hf.format.files import MAX_JSON_BYTES
from share_hf.state import SubspaceState
from tests.hub_server import DropDownload, is_download_of
from tests.hub_server.fixtures import Hub
from tests.trees import (
    assert_same_state,
    edit_index,
    edit_json,
    edit_tensors,
    files_of,
    logits,
    lora_config,
    save_adapter,
    untouched,
)


REPO = "org/share-subspace"
INDEX, BASIS, METRICS = "share_config.json", "subspace.safetensors", "metrics.json"
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
OF_TASK = "tasks/mrpc"
Q_PROJ = "model.layers.0.self_attn.q_proj"
COEFFICIENTS = f"base_model.model.{Q_PROJ}.share_coefficients_out"

Loader = Literal["subspace", "task", "peft"]
Edit = Callable[[Path], object]

every_loader = pytest.mark.parametrize("loader", ["subspace", "task", "peft"])
# PEFT warns about base models that it cannot look up, and the client about downloads that it resumes.
pytestmark = pytest.mark.filterwarnings("ignore")


class Victim:
    """Somebody who loads from the repository, with a folder, a cache and a base model."""

    def __init__(self, hub: Hub, good: Path, pristine: PreTrainedModel, model: PreTrainedModel, folder: Path) -> None:
        self.hub = hub
        self.folder = folder
        self.pristine = pristine
        self.model = model
        self.repository = hub.server.create_repo(REPO)
        self.good = self.repository.write(files_of(good), title="Good").oid
        self.expected = logits(PeftModel.from_pretrained(copy.deepcopy(pristine), good, subfolder=OF_TASK))

    def finds(self, tree: Path) -> None:
        """Publish a tree, on main and on the branch of a task."""
        there, new = self.repository.commit_at("main").files, files_of(tree)
        gone = {name: None for name in there if name != ".gitattributes" and name not in new}
        self.repository.write({**new, **gone}, title="Hostile")
        self.repository.create_branch("mrpc", "main")
        self.hub.server.forget_requests()

    def loads(self, loader: Loader, revision: str | None = None) -> Any:
        """Load what is there, in one of three ways."""
        match loader:
            case "subspace":
                return SharedSubspace.from_pretrained(REPO, revision=revision)
            case "task":
                return SharedSubspace.from_pretrained(REPO, revision=revision or "mrpc")
            case "peft":
                return PeftModel.from_pretrained(self.model, REPO, subfolder=OF_TASK, revision=revision)

    def is_refused(
        self,
        loader: Loader,
        message: str,
        *,
        errors: type[Exception] | tuple[type[Exception], ...] = ValueError,
        load: Callable[[Loader], object] | None = None,
    ) -> str:
        """Assert that a load fails with a message and without a trace, and that a good revision loads afterwards."""
        before = self.own_files()
        with pytest.raises(errors, match=message) as caught:
            (load or self.loads)(loader)
        assert self.own_files() == before
        assert untouched(self.model, self.pristine)
        self.loads_what_is_good(loader)
        return str(caught.value)

    def loads_what_is_good(self, loader: Loader) -> None:
        """Assert that a good revision loads, which adds it to the model."""
        loaded = self.loads(loader, self.good)
        if loader != "peft":
            assert loaded.tasks == ("mrpc", "sst2")
            loaded = loaded.apply(self.model, ["mrpc"])
        assert torch.equal(logits(loaded), self.expected)

    def own_files(self) -> dict[str, bytes | None]:
        """Return everything around the cache, but not in it, and whether it has been written to in the meantime."""
        return {
            str(path): path.read_bytes() if path.is_file() else None
            for path in self.folder.rglob("*")
            if not path.is_relative_to(self.hub.home)
        }

    def downloaded(self, path: str) -> int:
        return self.hub.server.downloaded(REPO, path)


@pytest.fixture
def victim(
    hub: Hub,
    saved: tuple[SubspaceState, Path],
    pristine_models: dict[str, PreTrainedModel],
    tiny_model: Callable[[str], PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Victim:
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    return Victim(hub, saved[1], pristine_models["llama"], tiny_model("llama"), tmp_path)


def signed(name: str, change: Edit) -> Edit:
    """A change of a file that gives it, and all files that refer to it, their new checksums."""

    def change_and_sign(tree: Path) -> None:
        change(tree / name)
        _sign(tree, name)

    return change_and_sign


def _sign(tree: Path, name: str) -> None:
    path = tree / name
    if name == INDEX or not path.is_file():
        return
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if path.parent.parent.name == "tasks" and path.name != METRICS:
        edit_json(path.with_name(METRICS), lambda metrics: metrics["sha256"].update({path.name: digest}))
        _sign(tree, f"tasks/{path.parent.name}/{METRICS}")
    else:
        edit_index(tree, lambda index: index["sha256"].update({name: digest}))


def in_index(change: Callable[[dict[str, Any]], object]) -> Edit:
    return lambda tree: edit_index(tree, change)


def in_tensors(name: str, change: Callable[[dict[str, Tensor]], object]) -> Edit:
    return signed(name, lambda path: edit_tensors(path, change))


def test_what_is_good_is_loaded(victim: Victim, tree: Path, saved: tuple[SubspaceState, Path]) -> None:
    victim.finds(tree)
    assert_same_state(victim.loads("subspace").state, saved[0])
    assert_same_state(victim.loads("task").state, replace(saved[0], default_task="mrpc"))
    assert torch.equal(logits(victim.loads("peft")), victim.expected)


# ---- Names ----------------------------------------------------------------------------------------------------------


@every_loader
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../../escaped", "is not usable"),
        ("/tmp/share-hf-escaped", "is not usable"),
        ("..", "is not usable"),
        ("a/b", "is not usable"),
        ("a\\b", "is not usable"),
        ("mrpc\x00", "is not usable"),
        ("ｍrpc", "is not usable"),
        ("", "is not usable"),
        (7, "is not usable"),
        (["mrpc"], "is not usable"),
        ("main", "is reserved"),
        ("step-0001-x", "is reserved"),
        ("keys", "is an attribute of"),
        ("MRPC", "differs from 'mrpc' only in case"),
        ("mrpc", "already exists"),
    ],
)
def test_names_of_tasks_are_checked_before_they_become_paths(
    name: Any, message: str, loader: Loader, victim: Victim, tree: Path
) -> None:
    edit_index(tree, lambda index: index["tasks"].append(name))
    if name == "MRPC":
        shutil.copytree(tree / "tasks" / "mrpc", tree / "tasks" / "MRPC")
    victim.finds(tree)
    told = victim.is_refused(loader, message)
    assert INDEX in told
    assert repr(name) in told
    assert not any(str(name) in request.path for request in victim.hub.server.requests if len(str(name)) > 5)


@every_loader
def test_paths_in_the_checksums_are_not_followed(loader: Loader, victim: Victim, tree: Path) -> None:
    outside = ["../../../escaped", "/etc/hostname", "tasks/../../escaped"]
    edit_index(tree, lambda index: index["sha256"].update(dict.fromkeys(outside, "0" * 64)))
    victim.finds(tree)
    before = victim.own_files()
    victim.loads(loader)
    assert victim.own_files() == before
    assert not [name for name in outside for request in victim.hub.server.requests if name in request.path]


@every_loader
@pytest.mark.parametrize(
    "entry",
    [
        {"shape": ["a", 3], "num_components": [6, 6]},
        {"shape": [64, 64, 64], "num_components": [6, 6]},
        {"shape": [64, 64], "num_components": [6]},
        {"shape": [-64, 64], "num_components": [6, 6]},
        {"shape": [None, 64], "num_components": [6, 6]},
        {"shape": [1e308, 64], "num_components": [1e308, 6]},
        {"shape": "ab", "num_components": "cd"},
    ],
    ids=json.dumps,
)
def test_sizes_in_the_index_are_checked_before_they_are_computed_with(
    entry: dict[str, Any], loader: Loader, victim: Victim, tree: Path
) -> None:
    edit_index(tree, lambda index: index["modules"].update({Q_PROJ: entry}))
    victim.finds(tree)
    assert Q_PROJ in victim.is_refused(loader, INDEX)


def with_rank(rank: int) -> Edit:
    """A tree whose settings and tasks have this pseudo-rank, and as many components."""
    sizes = {"num_components": rank, "pseudo_rank": rank}

    def change(tree: Path) -> None:
        for task in ("mrpc", "sst2"):
            signed(f"tasks/{task}/{CONFIG}", lambda path: edit_json(path, lambda config: config.update(sizes)))(tree)
        edit_index(tree, lambda index: index["settings"].update(sizes))

    return change


@every_loader
@pytest.mark.parametrize("rank", [2**24, 2**40])
def test_sizes_in_the_settings_are_compared_with_the_tensors_before_any_is_made(
    rank: int, loader: Loader, victim: Victim, tree: Path
) -> None:
    with_rank(rank)(tree)
    victim.finds(tree)
    victim.is_refused(loader, r"share_coefficients_(in|out)' has shape \(.*\), expected")


def test_a_rank_beyond_that_of_every_layer_takes_no_memory(victim: Victim, tree: Path, tmp_path: Path) -> None:
    def fill(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "share_coefficients" in name]:
            largest = 32 if "v_proj" in name else 64  # the rank that the weight can have
            tensors[name] = torch.nn.functional.pad(tensors[name], (0, largest - tensors[name].shape[1]))

    with_rank(2**40)(tree)
    for task in ("mrpc", "sst2"):
        in_tensors(f"tasks/{task}/{WEIGHTS}", fill)(tree)
    victim.finds(tree)
    loaded = victim.loads("subspace")
    exported = tmp_path / "exported"
    loaded.export_lora("mrpc", exported)
    assert json.loads((exported / CONFIG).read_text())["r"] == 64
    loaded.save_pretrained(tmp_path / "saved")
    found = logits(PeftModel.from_pretrained(victim.model, exported))
    assert torch.allclose(found, victim.expected, atol=1e-5)


# ---- Pickles --------------------------------------------------------------------------------------------------------


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(params=["pickle", "torch"])
def pickled(request: pytest.FixtureRequest, tmp_path: Path) -> bytes:
    """Bytes that create `tmp_path / "exploded"` when they are unpickled."""
    bomb, path = Bomb(tmp_path / "exploded"), tmp_path / "bomb.bin"
    if request.param == "torch":
        torch.save({"weight": bomb}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": bomb}))
    pickle.loads(pickle.dumps(Bomb(tmp_path / "works")))
    assert (tmp_path / "works").is_dir()
    return path.read_bytes()


@every_loader
def test_pickled_weights_are_not_even_downloaded(loader: Loader, pickled: bytes, victim: Victim, tree: Path) -> None:
    for folder in (tree, tree / OF_TASK):
        (folder / WEIGHTS).unlink()
        (folder / PICKLED).write_bytes(pickled)
    edit_json(
        tree / OF_TASK / METRICS,
        lambda metrics: metrics["sha256"].update({PICKLED: hashlib.sha256(pickled).hexdigest()}),
    )
    _sign(tree, f"{OF_TASK}/{METRICS}")
    victim.finds(tree)
    victim.is_refused(loader, f"{OF_TASK}/{WEIGHTS}")
    assert victim.downloaded(f"{OF_TASK}/{PICKLED}") == 0
    assert not (victim.folder / "exploded").exists()


@every_loader
def test_pickled_weights_beside_good_ones_are_left_alone(
    loader: Loader, pickled: bytes, victim: Victim, tree: Path
) -> None:
    for folder in (tree, tree / OF_TASK):
        (folder / PICKLED).write_bytes(pickled)
    victim.finds(tree)
    victim.loads(loader)
    assert victim.downloaded(PICKLED) == victim.downloaded(f"{OF_TASK}/{PICKLED}") == 0
    assert not (victim.folder / "exploded").exists()


@every_loader
@pytest.mark.parametrize("name", [BASIS, f"{OF_TASK}/{WEIGHTS}"])
def test_pickles_in_place_of_safetensors_are_refused(
    name: str, loader: Loader, pickled: bytes, victim: Victim, tree: Path
) -> None:
    signed(name, lambda path: path.write_bytes(pickled))(tree)
    victim.finds(tree)
    victim.is_refused(loader, f"{name}: not a readable safetensors file")
    assert not (victim.folder / "exploded").exists()


@pytest.mark.parametrize("subfolder", [None, OF_TASK])
def test_an_adapter_that_claims_to_be_another_method_is_not_unpickled_by_peft_either(
    subfolder: str | None, pickled: bytes, victim: Victim, tree: Path
) -> None:
    for folder in (tree, tree / OF_TASK):
        (folder / WEIGHTS).unlink()
        (folder / PICKLED).write_bytes(pickled)
    edit_json(tree / OF_TASK / CONFIG, lambda config: config.update(peft_type="LORA", r=4))
    victim.finds(tree)
    with pytest.raises(Exception, match=r"[Ww]eights.only|safetensors"):
        PeftModel.from_pretrained(victim.model, REPO, subfolder=subfolder)
    assert not (victim.folder / "exploded").exists()


# ---- Tensors --------------------------------------------------------------------------------------------------------


def _with_header(length: int | None, text: str | None = None) -> Edit:
    """A safetensors file whose header has another length, or says so."""

    def change(path: Path) -> None:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + size] if text is None else text.encode()
        said = len(header) if length is None else length
        path.write_bytes(struct.pack("<Q", said) + header + content[8 + size :])

    return change


@every_loader
@pytest.mark.parametrize("name", [BASIS, f"{OF_TASK}/{WEIGHTS}"])
@pytest.mark.parametrize(
    "change",
    [
        _with_header(2**64 - 1),
        _with_header(2**63),
        _with_header(10**8),
        _with_header(0),
        _with_header(None, "{" * 10**5),
        _with_header(None, "[]"),
        _with_header(None, '{"a.beta":{"dtype":"F32","shape":[99999999999,99999999999],"data_offsets":[0,4]}}'),
        _with_header(None, '{"a.beta":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}'),
        _with_header(None, '{"a.beta":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}}'),
    ],
    ids=["2^64-1", "2^63", "10^8", "0", "braces", "list", "shape", "backwards", "beyond"],
)
def test_headers_that_do_not_fit_their_file_are_refused(
    change: Edit, name: str, loader: Loader, victim: Victim, tree: Path
) -> None:
    signed(name, change)(tree)
    victim.finds(tree)
    victim.is_refused(loader, f"{name}: not a readable safetensors file")


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: change(tensors[name].clone())})


def _with(entry: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[-1, -1] = entry
        return tensor

    return change


@every_loader
@pytest.mark.parametrize(
    ("file", "tensor", "change", "message"),
    [
        (BASIS, f"{Q_PROJ}.beta", torch.Tensor.double, "is torch.float64, expected torch.float32"),
        (BASIS, f"{Q_PROJ}.beta", torch.Tensor.half, "is torch.float16, expected torch.float32"),
        (BASIS, f"{Q_PROJ}.alpha", torch.Tensor.cfloat, "is torch.complex64, expected torch.float32"),
        (BASIS, f"{Q_PROJ}.alpha", lambda t: t.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, expected torch.fl"),
        (BASIS, f"{Q_PROJ}.alpha", _with(math.nan), "has NaN or infinite entries"),
        (BASIS, f"{Q_PROJ}.alpha", _with(-math.inf), "has NaN or infinite entries"),
        (BASIS, f"{Q_PROJ}.beta", lambda t: 2 * t, "not orthonormal"),
        (BASIS, f"{Q_PROJ}.beta", lambda t: t[None], r"has shape \(1, 64, 6\), expected a matrix"),
        (f"{OF_TASK}/{WEIGHTS}", COEFFICIENTS, torch.Tensor.long, "is torch.int64, expected torch.float32"),
        (f"{OF_TASK}/{WEIGHTS}", COEFFICIENTS, torch.Tensor.bfloat16, "is torch.bfloat16, expected torch.float32"),
        (f"{OF_TASK}/{WEIGHTS}", COEFFICIENTS, _with(math.nan), "has NaN or infinite entries"),
        (f"{OF_TASK}/{WEIGHTS}", COEFFICIENTS, lambda t: t.T, r"has shape \(4, 6\), expected \(6, 4\)"),
        (
            f"{OF_TASK}/{WEIGHTS}",
            COEFFICIENTS,
            lambda t: t.to(torch.float8_e5m2),
            "is torch.float8_e5m2, expected torch.fl",
        ),
    ],
)  # fmt: skip
def test_tensors_that_cannot_be_are_refused_whoever_signed_them(
    file: str,
    tensor: str,
    change: Callable[[Tensor], Tensor],
    message: str,
    loader: Loader,
    victim: Victim,
    tree: Path,
) -> None:
    in_tensors(file, _set(tensor, change))(tree)
    victim.finds(tree)
    assert tensor in victim.is_refused(loader, f"{file}: .*{message}")


@every_loader
@pytest.mark.parametrize("name", [BASIS, f"{OF_TASK}/{WEIGHTS}", f"{OF_TASK}/{CONFIG}"])
def test_files_of_another_tree_are_refused(
    name: str, loader: Loader, victim: Victim, tree: Path, subspace: SharedSubspace, loras: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    subspace.add_adapters({"rte": loras["rte"]}, progress=False)
    subspace.save_pretrained(tmp_path / "newer")
    if name.endswith(CONFIG):
        edit_json(tree / name, lambda config: config.update(target_modules=["q_proj"]))
    else:
        (tmp_path / "newer" / name).replace(tree / name)
    victim.finds(tree)
    # Of coefficients, the fingerprint of their basis may be read first.
    damaged = "sha256 is .*, expected .*: the file was truncated or edited"
    victim.is_refused(loader, rf"{name}: ({damaged}|.*share_fingerprint' is \[)")


# ---- Sizes ----------------------------------------------------------------------------------------------------------


@every_loader
@pytest.mark.parametrize("name", [INDEX, f"{OF_TASK}/{METRICS}", f"{OF_TASK}/{CONFIG}"])
def test_huge_json_is_refused_before_it_is_downloaded(name: str, loader: Loader, victim: Victim, tree: Path) -> None:
    if loader == "peft" and name.endswith(CONFIG):
        pytest.skip("PEFT itself downloads the configuration, to find out that it is one of share_hf")
    with (tree / name).open("ab") as file:
        file.write(b" " * MAX_JSON_BYTES)
    _sign(tree, name)
    victim.finds(tree)
    size = (tree / name).stat().st_size
    victim.is_refused(loader, f"{name}.* {size} bytes, expected at most {MAX_JSON_BYTES}")
    # The good revision, which was loaded last, has a small file with this name.
    assert victim.downloaded(name) < MAX_JSON_BYTES // 64


@every_loader
def test_a_basis_larger_than_the_index_says_is_refused_before_it_is_downloaded(
    loader: Loader, victim: Victim, tree: Path
) -> None:
    in_tensors(BASIS, lambda tensors: tensors.update({"more.beta": torch.eye(1024)}))(tree)
    victim.finds(tree)
    size = (tree / BASIS).stat().st_size
    victim.is_refused(loader, f"{BASIS} has {size} bytes, expected at most")
    assert victim.downloaded(BASIS) < 100_000


@every_loader
def test_a_server_that_sends_more_than_it_said_is_not_believed(loader: Loader, victim: Victim, tree: Path) -> None:
    in_tensors(BASIS, lambda tensors: tensors.update({f"{Q_PROJ}.beta": -tensors[f"{Q_PROJ}.beta"]}))(tree)
    victim.finds(tree)
    content = (tree / BASIS).read_bytes()
    victim.repository.lfs[hashlib.sha256(content).hexdigest()] = content + bytes(2**20)
    victim.is_refused(loader, "", errors=(ValueError, OSError))
    assert not [path for path in victim.hub.cache.rglob(BASIS) if path.stat().st_size > len(content)]


@every_loader
@pytest.mark.parametrize("name", [INDEX, BASIS, f"{OF_TASK}/{WEIGHTS}", f"{OF_TASK}/{METRICS}"])
def test_a_truncated_download_is_nothing_in_the_cache_and_can_be_tried_again(
    name: str, loader: Loader, victim: Victim, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts of the client
    edit_index(tree, lambda index: index["branches"].update(mrpc=0.0))
    (tree / OF_TASK / METRICS).write_text((tree / OF_TASK / METRICS).read_text() + "\n")
    _sign(tree, f"{OF_TASK}/{METRICS}")
    in_tensors(BASIS, lambda tensors: None)(tree)
    victim.finds(tree)
    hostile = victim.repository.commit_at("main").oid
    victim.hub.server.faults.add(is_download_of(name), DropDownload(50), times=math.inf)
    with pytest.raises(Exception, match=r"closed connection|not in the cache|Consistency check"):
        victim.loads(loader)
    assert untouched(victim.model, victim.pristine)
    assert not [path for path in victim.hub.cache.rglob(f"snapshots/{hostile}/{name}") if path.exists()]
    victim.hub.server.faults.clear()
    loaded = victim.loads(loader)
    assert torch.equal(logits(loaded if loader == "peft" else loaded.apply(victim.model, ["mrpc"])), victim.expected)
    loaded = victim.repository.commit_at("main").files[name].content
    assert [path.read_bytes() for path in victim.hub.cache.rglob(f"snapshots/{hostile}/{name}")] == [loaded]


# ---- Trees that do not fit ------------------------------------------------------------------------------------------


@every_loader
@pytest.mark.parametrize("missing", [(WEIGHTS,), (CONFIG,), (METRICS,), (WEIGHTS, CONFIG, METRICS)])
def test_a_task_that_is_listed_but_absent_is_refused(
    missing: tuple[str, ...], loader: Loader, victim: Victim, tree: Path
) -> None:
    for name in missing:
        (tree / OF_TASK / name).unlink()
    victim.finds(tree)
    told = victim.is_refused(loader, "|".join(missing), errors=(ValueError, EntryNotFoundError))
    assert REPO in told


@every_loader
def test_another_task_that_is_absent_is_reported_when_it_is_needed(loader: Loader, victim: Victim, tree: Path) -> None:
    edit_index(tree, lambda index: index["tasks"].append("rte"))
    victim.finds(tree)
    if loader == "subspace":
        victim.is_refused(loader, f"{REPO}: tasks/rte/{CONFIG} is missing, but {INDEX} lists it")
        return
    loaded = victim.loads(loader)
    if loader == "peft":
        assert torch.equal(logits(loaded), victim.expected)
        return
    with pytest.raises(ValueError, match=f"{REPO}: tasks/rte/{CONFIG} is missing, but {INDEX} lists it"):
        loaded.apply(victim.model, ["mrpc", "rte"])
    assert untouched(victim.model, victim.pristine)
    assert torch.equal(logits(loaded.apply(victim.model, ["mrpc"])), victim.expected)


@every_loader
def test_a_subspace_of_another_base_model_is_not_loaded_into_this_one(
    loader: Loader, victim: Victim, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**{**victim.pristine.config.to_dict(), "num_key_value_heads": 4})
    lora = save_adapter(type(victim.pristine)(config), tmp_path / "wide", lora_config(), seed=0)
    other = SharedSubspace.from_adapters({"mrpc": lora}, num_components=6, pseudo_rank=4, progress=False)
    other.save_pretrained(tmp_path / "other")
    victim.finds(tmp_path / "other")

    def load(loader: Loader) -> None:
        loaded = victim.loads(loader)
        loaded.apply(victim.model, ["mrpc"])

    victim.is_refused(loader, r"v_proj'.*\((64|32), 64\)", load=load)


@every_loader
def test_a_task_of_another_base_model_than_the_index_says_is_refused(
    loader: Loader, victim: Victim, tree: Path
) -> None:
    name = f"{OF_TASK}/{CONFIG}"
    signed(name, lambda path: edit_json(path, lambda config: config.update(base_model_name_or_path="org/other")))(tree)
    victim.finds(tree)
    victim.is_refused(
        loader, f"{OF_TASK}.*: base_model_name_or_path is 'org/other', expected 'org/tiny' as in {INDEX}"
    )


@every_loader
@pytest.mark.parametrize("other_tensors", [False, True])
def test_a_tree_of_a_newer_format_is_refused_with_what_to_do(
    other_tensors: bool, loader: Loader, victim: Victim, tree: Path
) -> None:
    if other_tensors:
        in_tensors(BASIS, lambda tensors: tensors.update({f"{Q_PROJ}.gamma": torch.ones(1)}))(tree)
    edit_index(tree, lambda index: index.update(format_version=4))
    victim.finds(tree)
    victim.is_refused(loader, f"{INDEX}: format_version is 4, expected at most 3: .*newer share_hf, upgrade with")


@every_loader
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            in_index(lambda index: index.update(kind="checkpoint")),
            "the checkpoint of a PeftModel, expected a tree",
            id="checkpoint",
        ),
        (in_index(lambda index: index["sha256"].pop(BASIS)), f"{INDEX}: sha256 has no entry for '{BASIS}'"),
        (in_index(lambda index: index["sha256"].clear()), f"{INDEX}: sha256 has no entry for"),
        (lambda tree: (tree / BASIS).unlink(), BASIS),
        (lambda tree: (tree / INDEX).write_text("[" * 10**5), f"{INDEX}: not valid JSON"),
        (lambda tree: (tree / INDEX).write_text("{}"), f"{INDEX}: format_version is None"),
    ],
)
def test_a_tree_without_what_its_checks_rest_on_is_refused(
    change: Edit, message: str, loader: Loader, victim: Victim, tree: Path
) -> None:
    change(tree)
    if loader == "peft" and "checkpoint" in message:
        pytest.skip("a checkpoint on the Hub is something that PEFT loads")
    victim.finds(tree)
    victim.is_refused(loader, message)
