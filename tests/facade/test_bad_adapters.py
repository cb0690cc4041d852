"""Many adapters, some broken, identical, badly named or changing: each is reported by name, and no work is lost."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from share_hf import SharedSubspace
from share_hf.format.collection import read_collection, read_loras
from share_hf.format.places import named_places
from share_hf.format.unchanged import Stamp
from tests.tree_fixtures import SaveLora
from tests.trees import assert_same_state, edit_json, edit_tensors


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FEATURES, RANK = 16, 2
MODULE = "model.layers.0.self_attn.q_proj"


def write_adapter(folder: Path, seed: int, features: int = FEATURES, base: str | None = "org/base") -> Path:
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors = {
        f"base_model.model.{MODULE}.lora_A.weight": torch.randn(RANK, features, generator=generator),
        f"base_model.model.{MODULE}.lora_B.weight": torch.randn(FEATURES, RANK, generator=generator),
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return folder


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


@pytest.fixture
def build() -> Callable[..., SharedSubspace]:
    def made(adapters: object, **options: object) -> SharedSubspace:
        return SharedSubspace.from_adapters(
            adapters,  # type: ignore[arg-type]
            num_components=8,
            pseudo_rank=RANK,
            progress=False,
            **options,  # type: ignore[arg-type]
        )

    return made


@pytest.fixture
def told() -> Iterator[list[str]]:
    """Warnings of the library."""
    lines: list[str] = []
    with calling_at_warnings(lines.append):
        yield lines


@contextmanager
def calling_at_warnings(call: Callable[[str], object]) -> Iterator[None]:
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: call(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("share_hf")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


# ---- Broken ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def thousand(tmp_path: Path) -> dict[str, Path]:
    """A thousand adapters, three of which are broken."""
    adapters = {f"task{i}": write_adapter(tmp_path / str(i), i) for i in range(1000)}
    truncate(adapters["task17"])
    (adapters["task400"] / CONFIG).write_text("{")
    shutil.rmtree(adapters["task999"])
    return adapters


def test_all_of_a_thousand_that_are_broken_are_named_at_once(
    thousand: dict[str, Path], build: Callable[..., SharedSubspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("share_hf.shared_subspace.with_collection", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match="3 of 1000 adapters cannot be used, skip_bad=True") as caught:
        build(thousand)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert [line.partition(":")[0] for line in lines] == ["task17", "task400", "task999"]
    assert "not a readable safetensors file" in lines[0]
    assert "not valid JSON" in lines[1]
    assert f"{thousand['task999']}: no such folder or file" in lines[2]


def test_those_that_are_broken_are_left_out_and_reported(
    tmp_path: Path, build: Callable[..., SharedSubspace], told: list[str]
) -> None:
    adapters = {name: write_adapter(tmp_path / name, seed) for seed, name in enumerate("abcdef")}
    truncate(adapters["b"])
    edit_json(adapters["d"] / CONFIG, lambda config: config.update(use_dora=True))
    subspace = build(adapters, skip_bad=True)
    assert subspace.tasks == ("a", "c", "e", "f")
    assert subspace.reading.skipped.keys() == {"b", "d"}
    assert "not a readable safetensors file" in subspace.reading.skipped["b"]
    assert "use_dora is True" in subspace.reading.skipped["d"]
    assert told[0] == "2 adapters were left out:"
    assert told[1].startswith("  b: ")
    assert_same_state(subspace.state, build({name: adapters[name] for name in "acef"}).state)
    subspace.add_adapters({"g": write_adapter(tmp_path / "g", 7)}, progress=False)
    assert subspace.reading.skipped == {}


def test_where_none_can_be_used_nothing_is_made(tmp_path: Path, build: Callable[..., SharedSubspace]) -> None:
    adapters = {name: write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")}
    for folder in adapters.values():
        truncate(folder)
    with pytest.raises(ValueError, match="2 of 2 adapters cannot be used:\n"):
        build(adapters, skip_bad=True)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        build({"a": adapters["a"]}, skip_bad=True)


def test_adapters_of_other_shapes_and_models_are_named_at_once_and_can_be_left_out(
    tmp_path: Path, build: Callable[..., SharedSubspace]
) -> None:
    subspace = build({"first": write_adapter(tmp_path / "first", 0)})
    adapters = {
        "good": write_adapter(tmp_path / "good", 1),
        "wide": write_adapter(tmp_path / "wide", 2, features=2 * FEATURES),
        "foreign": write_adapter(tmp_path / "foreign", 3, base="org/other"),
        "alien": write_adapter(tmp_path / "alien", 4, base="org/other"),
    }
    before = subspace.state
    with pytest.raises(ValueError, match="3 of 4 adapters cannot be used") as caught:
        subspace.add_adapters(adapters, progress=False)
    for line in (
        f"wide: '{MODULE}': the update of task 'wide' is (16, 32), the layer is (16, 16)",
        "foreign: adapter 'foreign' belongs to base model 'org/other', expected 'org/base'",
        "alien: adapter 'alien' belongs to base model 'org/other', expected 'org/base'",
    ):
        assert line in str(caught.value)
    assert subspace.state is before
    subspace.add_adapters(adapters, skip_bad=True, progress=False)
    assert subspace.tasks == ("first", "good")
    assert list(subspace.reading.skipped) == ["wide", "foreign", "alien"]


def test_the_first_adapter_of_a_collection_says_what_fits(
    tmp_path: Path, build: Callable[..., SharedSubspace]
) -> None:
    adapters = {
        "unnamed": write_adapter(tmp_path / "unnamed", 0, base=None),
        "named": write_adapter(tmp_path / "named", 1, base="org/base"),
        "other": write_adapter(tmp_path / "other", 2, base="org/other"),
    }
    subspace = build(adapters, skip_bad=True)
    assert subspace.tasks == ("unnamed", "named")
    assert subspace.base_model_name_or_path == "org/base"
    assert build(adapters, base_model="org/mine").tasks == tuple(adapters)


def test_skipping_reads_what_it_keeps_as_without(
    loras: dict[str, Path], save_lora: SaveLora, build: Callable[..., SharedSubspace]
) -> None:
    pissa = save_lora("pissa", init_lora_weights="pissa")
    assert build({**loras, "pissa": pissa}, skip_bad=True).tasks == tuple(loras)


def overflowing(config: dict[str, object]) -> None:
    config.update(lora_alpha=1e308)


def loud(config: dict[str, object]) -> None:
    config.update(lora_alpha=1e60)


def under_another_name(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("base_model.model.", "base_model.model.language_model.")] = tensors.pop(name)


@pytest.fixture
def refused_by_merges(tmp_path: Path) -> dict[str, Path]:
    """Adapters that are read without an error, but cannot be merged with any other."""
    adapters = {name: write_adapter(tmp_path / name, 10 + i) for i, name in enumerate(("infinite", "loud", "other"))}
    edit_json(adapters["infinite"] / CONFIG, overflowing)
    edit_tensors(adapters["infinite"] / WEIGHTS, lambda tensors: tensors[max(tensors)].mul_(1000))
    edit_json(adapters["loud"] / CONFIG, loud)
    edit_tensors(adapters["other"] / WEIGHTS, under_another_name)
    return adapters


@pytest.mark.parametrize("basis", ["joint", "factor"])
def test_adapters_that_only_a_merge_refuses_are_left_out_too(
    basis: str,
    tmp_path: Path,
    refused_by_merges: dict[str, Path],
    build: Callable[..., SharedSubspace],
    told: list[str],
) -> None:
    good = {name: write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")}
    adapters = {"a": good["a"], **refused_by_merges, "b": good["b"]}
    for name in refused_by_merges:
        with pytest.raises(ValueError, match=f"task '{name}'"):
            build({"a": good["a"], name: refused_by_merges[name]}, basis=basis)
    subspace = build(adapters, skip_bad=True, basis=basis)
    assert_same_state(subspace.state, build(good, basis=basis).state)
    skipped = subspace.reading.skipped
    assert list(skipped) == list(refused_by_merges)
    assert skipped["infinite"].startswith(f"'{MODULE}': task 'infinite': out_factor has NaN or infinite entries")
    assert f"'{MODULE}': task 'loud': its update has norm" in skipped["loud"]
    assert "the same layer in two classes or versions of transformers" in skipped["other"]
    assert told[0] == "3 adapters were left out:"


def test_adding_leaves_them_out_and_changes_nothing_where_all_are_refused(
    tmp_path: Path, refused_by_merges: dict[str, Path], build: Callable[..., SharedSubspace]
) -> None:
    subspace = build({"a": write_adapter(tmp_path / "a", 0)})
    before = subspace.state
    with pytest.raises(ValueError, match="3 of 3 adapters cannot be used:\n") as caught:
        subspace.add_adapters(refused_by_merges, skip_bad=True, progress=False)
    assert all(f"\n  {name}: " in str(caught.value) for name in refused_by_merges)
    assert subspace.state is before
    good = write_adapter(tmp_path / "b", 1)
    subspace.add_adapters({**refused_by_merges, "b": good}, skip_bad=True, progress=False)
    assert subspace.tasks == ("a", "b")
    assert list(subspace.reading.skipped) == list(refused_by_merges)


# ---- The same -------------------------------------------------------------------------------------------------------


def test_adapters_that_are_the_same_are_reported_and_kept(
    tmp_path: Path, build: Callable[..., SharedSubspace], told: list[str]
) -> None:
    adapters = {name: write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")}
    for name in ("c", "d"):
        adapters[name] = Path(shutil.copytree(adapters["a"], tmp_path / name))
    adapters["scaled"] = Path(shutil.copytree(adapters["b"], tmp_path / "scaled"))
    edit_json(adapters["scaled"] / CONFIG, lambda config: config.update(lora_alpha=4))
    subspace = build(adapters)
    assert subspace.tasks == tuple(adapters)
    assert subspace.reading.duplicates == [["a", "c", "d"]]
    assert told == ["a, c, d are the same adapter"]


def test_only_adapters_that_are_the_same_in_all_modules_are_the_same(
    save_lora: SaveLora, build: Callable[..., SharedSubspace]
) -> None:
    first, second = save_lora("first"), save_lora("second")
    assert build([first, second]).reading.duplicates == [["first", "second"]]

    def change_the_last(tensors: dict[str, torch.Tensor]) -> None:
        tensors[max(tensors)][0, 0] += 1

    edit_tensors(second / WEIGHTS, change_the_last)
    assert build([first, second]).reading.duplicates == []


def test_classifiers_with_other_heads_are_not_the_same(
    save_classifier: SaveLora, build: Callable[..., SharedSubspace]
) -> None:
    first, second = save_classifier("first", 2), save_classifier("second", 2)
    assert build([first, second]).reading.duplicates == [["first", "second"]]
    edit_tensors(second / WEIGHTS, lambda tensors: tensors["base_model.model.classifier.bias"].add_(1))
    assert build([first, second]).reading.duplicates == []


def refactored(tensors: dict[str, torch.Tensor]) -> None:
    """The same update from other factors, up to float32's rounding."""
    mixing = torch.tensor([[2.0, 0.3], [-0.7, 1.1]])
    for name in [name for name in tensors if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        tensors[name] = torch.linalg.solve(mixing, tensors[name])
        tensors[other] = (tensors[other] @ mixing).contiguous()


@pytest.mark.parametrize("num_components", [4, 12])
@pytest.mark.parametrize("dtype", ["float32", "4bit"])
def test_a_task_that_is_there_already_is_reported_whatever_a_merge_cut_of_it(
    dtype: str, num_components: int, tmp_path: Path, told: list[str]
) -> None:
    adapters = {name: write_adapter(tmp_path / name, seed) for seed, name in enumerate("abcde")}
    options = {"num_components": num_components, "coefficient_dtype": dtype}
    subspace = SharedSubspace.from_adapters(adapters, pseudo_rank=RANK, progress=False, **options)
    again = Path(shutil.copytree(adapters["b"], tmp_path / "again"))
    edit_tensors(again / WEIGHTS, refactored)
    assert told == []
    subspace.add_adapters({"new": write_adapter(tmp_path / "new", 9), "again": again}, progress=False)
    assert subspace.tasks == (*adapters, "new", "again")
    assert subspace.reading.known == {"again": "b"}
    assert told == ["again is the same adapter as b, which is already in the subspace"]
    subspace.add_adapters([write_adapter(tmp_path / "other", 10)], progress=False)
    assert subspace.reading.known == {}


@pytest.mark.parametrize("num_components", [4, 12])
@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors[max(tensors)].mul_(-1),
        lambda tensors: tensors[max(tensors)].mul_(1.001),
        lambda tensors: tensors[max(tensors)].copy_(tensors[max(tensors)].flip(0)),
    ],
    ids=["negated", "scaled", "permuted"],
)
def test_similar_adapters_are_not_reported_as_the_same(
    change: Callable[[dict[str, torch.Tensor]], object], num_components: int, tmp_path: Path, told: list[str]
) -> None:
    adapters = {name: write_adapter(tmp_path / name, seed) for seed, name in enumerate("abcde")}
    options = {"num_components": num_components, "pseudo_rank": RANK, "progress": False}
    subspace = SharedSubspace.from_adapters(adapters, **options)
    other = Path(shutil.copytree(adapters["b"], tmp_path / "other"))
    edit_tensors(other / WEIGHTS, change)
    subspace.add_adapters([other], progress=False)
    assert (subspace.reading.known, told) == ({}, [])


def test_a_task_with_another_head_is_another_one(
    save_classifier: SaveLora, build: Callable[..., SharedSubspace]
) -> None:
    first, second = save_classifier("first", 2), save_classifier("second", 2)
    subspace = build([first])
    subspace.add_adapters({"same": second}, progress=False)
    assert subspace.reading.known == {"same": "first"}
    edit_tensors(second / WEIGHTS, lambda tensors: tensors["base_model.model.classifier.bias"].add_(1))
    subspace.add_adapters({"other": second}, progress=False)
    assert subspace.reading.known == {}


def test_the_one_of_many_tasks_that_is_the_same_is_found_after_a_removal_and_a_rename(
    tmp_path: Path, build: Callable[..., SharedSubspace]
) -> None:
    adapters = {f"t{i}": write_adapter(tmp_path / f"t{i}", i) for i in range(60)}
    subspace = build(adapters)
    subspace.remove_task("t3")
    subspace.rename_task("t41", "other")
    subspace.save_pretrained(tmp_path / "tree")
    subspace = SharedSubspace.from_pretrained(tmp_path / "tree")
    again = {"x": adapters["t3"], "y": adapters["t41"], "z": adapters["t59"]}
    subspace.add_adapters(again, progress=False)
    assert subspace.reading.known == {"y": "other", "z": "t59"}
    subspace.replace_task("z", adapters["t17"], progress=False)
    assert subspace.reading.known == {"z": "t17"}


# ---- Names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("v1.0", "v1-0"),
        ("my adapter (2)", "my-adapter-2"),
        ("größe é", "gro-e-e"),
        ("main", "task-main"),
        ("weight", "task-weight"),
        ("step-0001-x", "task-step-0001-x"),
        ("con", "task-con"),
        ("_hidden", "hidden"),
        ("x" * 70, "x" * 64),
        ("a" * 40, f"task-{'a' * 40}"),
    ],
)
def test_names_of_folders_are_mended_and_reported(
    folder: str, name: str, tmp_path: Path, build: Callable[..., SharedSubspace], told: list[str]
) -> None:
    subspace = build([write_adapter(tmp_path / folder, 0)])
    assert subspace.tasks == (name,)
    assert subspace.reading.mended == {name: folder}
    assert told == [f"{folder!r} is called {name}"]


def test_names_that_collide_when_they_are_mended_are_reported(
    tmp_path: Path, build: Callable[..., SharedSubspace]
) -> None:
    places = [write_adapter(tmp_path / folder, seed) for seed, folder in enumerate(("a.b", "a b"))]
    with pytest.raises(ValueError, match=f"two adapters are called 'a-b', .*: {places[0]} and {places[1]}"):
        build(places)
    upper = write_adapter(tmp_path / "A-B", 3)
    with pytest.raises(ValueError, match="'A-B' differs from 'a-b' only in case"):
        build([places[0], upper])


def test_names_of_which_nothing_can_stay_and_names_that_are_given_are_not_mended(
    tmp_path: Path, build: Callable[..., SharedSubspace]
) -> None:
    folder = write_adapter(tmp_path / "日本", 0)
    with pytest.raises(ValueError, match="no task can be called '日本', expected another name"):
        build([folder])
    with pytest.raises(ValueError, match=r"task name 'a\.b' is not usable"):
        build({"a.b": folder})


# ---- Changing -------------------------------------------------------------------------------------------------------


def rewrite_in_place(folder: Path, *, keep: float = 1.0) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        content = file.read()
        file.seek(0)
        file.write(content)
        file.truncate(int(keep * len(content)))


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.0])
def test_an_adapter_that_is_written_to_while_it_is_read_is_refused_by_name(
    keep: float, tmp_path: Path, build: Callable[..., SharedSubspace]
) -> None:
    subspace = build({"first": write_adapter(tmp_path / "first", 0)})
    adapters = {name: write_adapter(tmp_path / name, 1) for name in ("new", "same")}
    before = subspace.state
    # The warning about the two identical ones comes when all have been read, before any merge.
    with (
        calling_at_warnings(lambda _: rewrite_in_place(adapters["same"], keep=keep)),
        pytest.raises(ValueError, match=f"{adapters['same'] / WEIGHTS}: changed while it was read.*try again"),
    ):
        subspace.add_adapters(adapters, progress=False)
    assert subspace.state is before


def test_an_adapter_that_is_written_to_during_the_work_is_refused_at_its_end(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "new", 1)
    collection = read_collection(named_places([folder]), progress=False)
    assert collection.updates["new"].keys() == {MODULE}
    collection.expect_unchanged()
    rewrite_in_place(folder)
    with pytest.raises(ValueError, match="changed while it was read"):
        collection.expect_unchanged()


def test_an_adapter_that_another_takes_the_place_of_is_the_one_that_was_read(
    tmp_path: Path, build: Callable[..., SharedSubspace]
) -> None:
    adapters = {name: write_adapter(tmp_path / name, 1) for name in ("new", "same")}
    other = write_adapter(tmp_path / "other", 2)
    expected = build(adapters)
    with calling_at_warnings(lambda _: (other / WEIGHTS).replace(adapters["same"] / WEIGHTS)):
        assert_same_state(build(adapters).state, expected.state)


def test_an_adapter_that_is_removed_is_the_one_that_was_read(
    tmp_path: Path, build: Callable[..., SharedSubspace]
) -> None:
    folder = write_adapter(tmp_path / "new", 1)
    expected = load_file(folder / WEIGHTS)
    updates = read_loras({"new": folder}, progress=False)["new"].updates
    shutil.rmtree(folder)
    a = expected[f"base_model.model.{MODULE}.lora_A.weight"]
    assert torch.equal(updates[MODULE].in_factor, a.T.double())


def test_a_file_is_the_same_until_it_is_written_replaced_or_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for change in (lambda: path.write_bytes(b"other"), lambda: path.unlink()):
        path.write_bytes(b"content")
        stamp = Stamp.of(path)
        stamp.expect_same_file()
        stamp.expect_same_content()
        change()
        with pytest.raises(ValueError, match="changed while it was read"):
            stamp.expect_same_file()
