"""Trees that were damaged, edited or written by somebody else are refused with what was found, and not changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from share_hf import SharedSubspace
from share_hf.format.files import MAX_JSON_BYTES
from tests.trees import assert_same_state, edit_index, edit_json, edit_tensors, files_of, sign_anew


BASIS = "subspace.safetensors"
TASK = "tasks/mrpc/adapter_model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj"
ALPHA, BETA = f"{Q_PROJ}.alpha", f"{Q_PROJ}.beta"
COEFFICIENTS = f"base_model.model.{Q_PROJ}.share_coefficients_out"

LOADED_FILES = [
    "share_config.json",
    BASIS,
    "metrics.json",
    *(f"tasks/{task}/{name}" for task in ("mrpc", "sst2") for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.json",
    )),
]  # fmt: skip

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def refused(tree: Path) -> Callable[[str], None]:
    """Assert that the tree is refused with a message, and stays unchanged."""

    def check(message: str) -> None:
        files = files_of(tree)
        siblings = sorted(path.name for path in tree.parent.iterdir())
        with pytest.raises(ValueError, match=message):
            SharedSubspace.from_pretrained(tree)
        assert files_of(tree) == files
        assert sorted(path.name for path in tree.parent.iterdir()) == siblings

    return check


def test_a_tree_without_damage_is_loaded(subspace: SharedSubspace, tree: Path) -> None:
    assert_same_state(SharedSubspace.from_pretrained(tree).state, subspace.state)


# ---- Any file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADED_FILES)
def test_a_missing_file_is_named(name: str, tree: Path, refused: Callable[[str], None]) -> None:
    (tree / name).unlink()
    refused(f"{name}: no such file")


@pytest.mark.parametrize("name", LOADED_FILES)
@pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_named(name: str, part: float, tree: Path, refused: Callable[[str], None]) -> None:
    content = (tree / name).read_bytes()
    (tree / name).write_bytes(content[: int(part * len(content))])
    refused(f"{name}: ")


@pytest.mark.parametrize("name", LOADED_FILES)
def test_a_flipped_bit_anywhere_is_noticed(name: str, tree: Path, refused: Callable[[str], None]) -> None:
    content = (tree / name).read_bytes()
    for position in (0, len(content) // 3, len(content) // 2, len(content) - 2):
        flipped = bytearray(content)
        flipped[position] ^= 0b00000100
        (tree / name).write_bytes(bytes(flipped))
        refused(str(tree))


@pytest.mark.parametrize("name", [name for name in LOADED_FILES if name.endswith(".json")])
@pytest.mark.parametrize("content", ["", "nonsense", "[]", "null", "3", "[" * 100_000], ids=lambda text: text[:4])
def test_a_file_that_is_not_a_json_object_is_refused(
    name: str, content: str, tree: Path, refused: Callable[[str], None]
) -> None:
    (tree / name).write_text(content)
    refused(f"{name}: (not valid JSON|holds a .*, expected a JSON object)")


class _Small:
    """A parser that fails on large texts."""

    def __init__(self, parse: Callable[..., Any]) -> None:
        self._parse = parse

    def __call__(self, text: str, **options: Any) -> Any:
        return self._parse(text, **options) if len(text) < 2**20 else pytest.fail("it was read")


@pytest.mark.parametrize("name", ["share_config.json", "metrics.json", "tasks/sst2/metrics.json"])
def test_a_huge_file_is_refused_unread(
    name: str, tree: Path, refused: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tree / name).open("r+b") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    parse = json.loads
    monkeypatch.setattr(json, "loads", _Small(parse))
    with pytest.raises(ValueError, match=f"{name}: 67108865 bytes, expected at most 67108864"):
        SharedSubspace.from_pretrained(tree)


@pytest.mark.parametrize("name", ["share_config.json", BASIS, TASK])
def test_a_folder_in_place_of_a_file_is_refused(name: str, tree: Path, refused: Callable[[str], None]) -> None:
    (tree / name).unlink()
    (tree / name).mkdir()
    refused(f"{name}: no such file")


def test_a_task_that_is_listed_but_absent_is_named(tree: Path, refused: Callable[[str], None]) -> None:
    for path in (tree / "tasks" / "mrpc").iterdir():
        path.unlink()
    (tree / "tasks" / "mrpc").rmdir()
    refused("tasks/mrpc/adapter_config.json: no such file")


def test_a_task_that_is_not_listed_is_not_loaded(subspace: SharedSubspace, tree: Path) -> None:
    (tree / "tasks" / "mrpc").rename(tree / "tasks" / "other")
    (tree / "tasks" / "other" / "adapter_model.safetensors").write_bytes(b"nonsense")
    subspace.save_pretrained(tree)
    (tree / "tasks" / "extra").mkdir()
    assert SharedSubspace.from_pretrained(tree).tasks == ("mrpc", "sst2")


def test_the_files_for_other_loaders_are_not_needed(subspace: SharedSubspace, tree: Path) -> None:
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        (tree / name).unlink()
    assert_same_state(SharedSubspace.from_pretrained(tree).state, subspace.state)


# ---- Edited JSON ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("share_config.json", lambda index: index["tasks"].reverse()),
        ("share_config.json", lambda index: index["settings"].update(num_components=8)),
        ("share_config.json", lambda index: index["lineage"].pop()),
        ("share_config.json", lambda index: index.update(default_task="mrpc")),
        ("share_config.json", lambda index: index.update(note="mine")),
        ("share_config.json", lambda index: index.pop("digest")),
        ("metrics.json", lambda metrics: metrics.update(average=1.0)),
        ("tasks/mrpc/metrics.json", lambda metrics: metrics["certificate"][Q_PROJ].__setitem__(2, 0.5)),
        ("tasks/mrpc/metrics.json", lambda metrics: metrics.update(learned_by="init")),
        ("tasks/mrpc/adapter_config.json", lambda config: config.update(target_modules=["k_proj"])),
    ],
)
def test_edited_json_is_refused(name: str, change: Edit, tree: Path, refused: Callable[[str], None]) -> None:
    edit_json(tree / name, change)
    refused(f"{name}: (digest|sha256) is .*, expected .*edited")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda index: index.update(format_version=4),
            "format_version is 4, expected at most 3: .*newer share_hf, upgrade with",
        ),
        (lambda index: index.update(format_version=0), "format_version is 0, expected 2"),
        (lambda index: index.update(format_version="1"), "format_version is '1', expected 2"),
        (lambda index: index.pop("format_version"), "format_version is None, expected 2"),
        (lambda index: index.pop("kind"), "a field is missing"),
        (lambda index: index.pop("tasks"), "a field is missing"),
        (lambda index: index.pop("settings"), "a field is missing"),
        (lambda index: index.update(modules=[]), "wrong type"),
        (lambda index: index.update(modules={"a": 3}), "wrong type"),
        (lambda index: index.update(sha256=None), "wrong type"),
        (lambda index: index["tasks"].append("mrpc"), "task 'mrpc' already exists"),
        (lambda index: index["tasks"].append("MRPC"), "'MRPC' differs from 'mrpc' only in case"),
        (lambda index: index["tasks"].append("../../etc"), "task name '../../etc' is not usable"),
        (lambda index: index["tasks"].append("train"), "'train' is an attribute"),
        (lambda index: index["tasks"].append(3), "task name 3 is not usable"),
        (lambda index: index.update(tasks="ab"), "tasks is 'ab', expected a list"),
        (lambda index: index.update(default_task="rte"), "default_task is 'rte', expected one of"),
        (lambda index: index["settings"].update(num_components=0), "num_components is 0, expected a positive integer"),
        (lambda index: index["settings"].update(pseudo_rank="4"), "pseudo_rank is '4', expected a positive integer"),
        (lambda index: index["settings"].update(basis="best"), "basis is 'best', expected 'joint' or 'factor'"),
        (lambda index: index["settings"].update(explained_variance="most"), "wrong type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_index_that_no_version_wrote_is_refused_whoever_signed_it(
    change: Edit, message: str, tree: Path, refused: Callable[[str], None]
) -> None:
    edit_index(tree, change)
    refused(f"share_config.json: .*{message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["sha256"].pop(BASIS), f"share_config.json: sha256 has no entry for '{BASIS}'"),
        (
            lambda index: index["sha256"].pop("tasks/mrpc/metrics.json"),
            "share_config.json: sha256 has no entry for 'tasks/mrpc/metrics.json'",
        ),
        (
            lambda index: index["sha256"].pop("metrics.json"),
            "share_config.json: sha256 has no entry for 'metrics.json'",
        ),
        (
            lambda index: index["modules"].pop(Q_PROJ),
            f"{BASIS}: modules .*{Q_PROJ}.* missing here or in share_config",
        ),
        (lambda index: index["modules"][Q_PROJ].update(shape=[64, 32]), f"{BASIS}: .*{Q_PROJ}.*, expected .*64, 32"),
        (
            lambda index: index["modules"][Q_PROJ].update(num_components=[6, 5]),
            f"{BASIS}: .*{Q_PROJ}.*6, 6.*, expected .*6, 5",
        ),
        (
            lambda index: index["settings"].update(pseudo_rank=3),
            rf"{TASK}: '.*' has shape \(6, 4\), expected \(6, 3\)",
        ),
        (lambda index: index["tasks"].append("rte"), "tasks/rte/adapter_config.json: no such file"),
    ],
)
def test_an_index_of_another_tree_is_refused(
    change: Edit, message: str, tree: Path, refused: Callable[[str], None]
) -> None:
    edit_index(tree, change)
    refused(message)


def test_two_trees_cannot_be_mixed(
    subspace: SharedSubspace, tree: Path, loras: dict[str, Path], tmp_path: Path, refused: Callable[[str], None]
) -> None:
    subspace.add_adapters({"rte": loras["rte"]}, progress=False)
    subspace.save_pretrained(tmp_path / "newer")
    (tmp_path / "newer" / BASIS).replace(tree / BASIS)
    refused(f"{BASIS}: sha256 is .*, expected .*: the file was truncated or edited")


# ---- Edited tensors -------------------------------------------------------------------------------------------------


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def _with(entry: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = entry
        return tensor

    return change


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (BASIS, _set(BETA, lambda t: t[:, :5]), r"beta.*\(64, 5\)|spectrum_out' has shape \(6,\), expected"),
        (BASIS, _set(BETA, lambda t: t[:5]), r"beta' has shape \(5, 6\), expected a matrix with no more col"),
        (BASIS, _set(ALPHA, lambda t: t[0]), r"alpha' has shape \(6,\), expected a matrix"),
        (BASIS, _set(ALPHA, lambda t: t.double()), "alpha' is torch.float64, expected torch.float32"),
        (BASIS, _set(ALPHA, lambda t: t.bfloat16()), "alpha' is torch.bfloat16, expected torch.float32"),
        (BASIS, _set(ALPHA, _with(float("nan"))), "alpha' has NaN or infinite entries"),
        (BASIS, _set(BETA, lambda t: t * 1.01), "columns of .*beta' are not orthonormal"),
        (BASIS, _set(BETA, torch.zeros_like), r"columns of .*beta' are not orthonormal \(off by 1\)"),
        (BASIS, _set(f"{Q_PROJ}.spectrum_in", lambda t: t[:2]), r"spectrum_in' has shape \(2,\), expected \(6,\)"),
        (BASIS, lambda tensors: tensors.pop(BETA), "19 tensors for 3 modules, expected 5 for each"),
        (BASIS, lambda tensors: tensors.pop(f"{Q_PROJ}.spectrum_out"), "19 tensors for 4 modules, expected 5 for "),
        (BASIS, lambda tensors: tensors.update(extra=torch.ones(1)), "unexpected tensor 'extra'"),
        (BASIS, lambda tensors: tensors.clear(), "modules .* are missing here or in share_config.json"),
        (TASK, _set(COEFFICIENTS, lambda t: t[:5]), rf"'{COEFFICIENTS}' has shape \(5, 4\), expected \(6, 4\)"),
        (TASK, _set(COEFFICIENTS, lambda t: t.T), rf"'{COEFFICIENTS}' has shape \(4, 6\), expected \(6, 4\)"),
        (TASK, _set(COEFFICIENTS, lambda t: t.half()), f"'{COEFFICIENTS}' is torch.float16, expected torch.float32"),
        (TASK, _set(COEFFICIENTS, _with(float("inf"))), f"'{COEFFICIENTS}' has NaN or infinite entries"),
        (TASK, lambda tensors: tensors.pop(COEFFICIENTS), rf"'{COEFFICIENTS}' is missing, expected a tensor of shape"),
        (
            TASK,
            lambda tensors: tensors.update({COEFFICIENTS.replace(".0.", ".7."): torch.ones(6, 4)}),
            "is unexpected",
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_belong_are_refused_by_name(
    name: str, change: Edit, message: str, signed: bool, tree: Path, refused: Callable[[str], None]
) -> None:
    edit_tensors(tree / name, change)
    if signed:
        sign_anew(tree, name)
    refused(f"{name}: .*({message})")


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda metrics: metrics["certificate"][Q_PROJ].pop(), "certificate of .*, expected"),
        (lambda metrics: metrics["certificate"][Q_PROJ].__setitem__(0, "large"), "norm.*'large'"),
        (lambda metrics: metrics["certificate"][Q_PROJ].__setitem__(0, -1.0), "norm.*-1.0"),
        (lambda metrics: metrics["certificate"][Q_PROJ].__setitem__(2, float("nan")), "NaN is not a JSON number"),
        (lambda metrics: metrics["certificate_columns"].reverse(), "certificate_columns is .*, expected"),
        (lambda metrics: metrics["certificate"].update(elsewhere={}), f"'elsewhere' is not in {BASIS}"),
        (lambda metrics: metrics.pop("certificate"), "a field is missing"),
        (lambda metrics: metrics.update(certificate=[]), "wrong type"),
        (lambda metrics: metrics.update(labels=5), "wrong type"),
        (lambda metrics: metrics.pop("learned_by"), "a field is missing"),
    ],
)
def test_a_certificate_that_no_version_wrote_is_refused(
    change: Edit, message: str, signed: bool, tree: Path, refused: Callable[[str], None]
) -> None:
    name = "tasks/mrpc/metrics.json"
    edit_json(tree / name, change)
    if signed:
        sign_anew(tree, name)
    refused(f"{name}: .*{message}")


def test_the_folder_of_a_peft_model_is_not_mistaken_for_a_tree(
    subspace: SharedSubspace, tiny_model: Callable[[str], Any], tmp_path: Path
) -> None:
    subspace.apply(tiny_model("llama")).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="checkpoint of a PeftModel, expected a tree"):
        SharedSubspace.from_pretrained(tmp_path / "checkpoint")
