"""Loading from a repository: every loader, online and from the cache, and no more than was asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from share_hf import SharedSubspace
from share_hf.state import SubspaceState, TaskInfo
from share_hf.subspace import LayerSubspace, SubspaceSettings
from tests.hub_server import DropDownload, is_download_of
from tests.hub_server.fixtures import Hub
from tests.trees import INPUT_IDS, assert_close, assert_same_state, logits, lora_config, named, save_adapter, untouched


REPO = "org/share-subspace"
BASE = "org/tiny-base"


@pytest.fixture
def base(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> Path:
    """The base model in a folder, as users have it."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def published(hub: Hub, base: Path, tmp_path: Path) -> SharedSubspace:
    """A subspace of three tasks in a repository, and its base model in another. The user has downloaded neither."""
    hub.api.create_repo(BASE)
    hub.api.upload_folder(repo_id=BASE, folder_path=base)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapters = {
        name: save_adapter(named(AutoModelForCausalLM.from_pretrained(base), BASE), tmp_path / name, lora_config(), i)
        for i, name in enumerate(("mrpc", "sst2"))
    }
    subspace = SharedSubspace.from_adapters(adapters, num_components=12, pseudo_rank=4, progress=False)
    subspace.push_to_hub(REPO)
    rte = save_adapter(named(model, BASE), tmp_path / "rte", lora_config(), 2)
    subspace.add_adapters({"rte": rte}, progress=False)
    subspace.push_to_hub(REPO)
    hub.move_to_another_machine()
    hub.server.forget_requests()
    return subspace


def expected_logits(subspace: SharedSubspace, base: Path, task: str) -> Tensor:
    return logits(subspace.apply(AutoModelForCausalLM.from_pretrained(base), [task]))


def downloaded(hub: Hub) -> set[str]:
    """Return the files whose content was downloaded."""
    files = hub.repository(REPO).commit_at("main").files
    return {path for path in files if hub.server.downloaded(REPO, path)}


# ---- SharedSubspace -------------------------------------------------------------------------------------------------


def test_a_subspace_loads_at_every_revision_and_then_from_the_cache(hub: Hub, published: SharedSubspace) -> None:
    main = hub.api.repo_info(REPO).sha
    expected = {None: 3, "main": 3, "sst2": 2, "rte": 3, "step-0002-sst2": 2, "step-0003-rte": 3, main: 3}
    for revision, count in expected.items():
        assert len(SharedSubspace.from_pretrained(REPO, revision=revision).state.tasks) == count
    hub.server.forget_requests()
    with hub.offline():
        for revision, count in expected.items():
            assert len(SharedSubspace.from_pretrained(REPO, revision=revision).state.tasks) == count
    for revision, count in expected.items():
        loaded = SharedSubspace.from_pretrained(REPO, revision=revision, local_files_only=True)
        assert len(loaded.state.tasks) == count
    assert not hub.server.requests
    assert_same_state(SharedSubspace.from_pretrained(REPO).state, published.state)


def test_a_task_is_loaded_with_the_basis_and_without_the_other_tasks(
    hub: Hub, published: SharedSubspace, base: Path, tmp_path: Path
) -> None:
    subspace = SharedSubspace.from_pretrained(REPO, revision="rte")
    assert subspace.tasks == ("mrpc", "sst2", "rte")
    of_task = {f"tasks/rte/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "metrics.json")}
    assert downloaded(hub) == {"share_config.json", "subspace.safetensors", *of_task}
    assert_close(expected_logits(subspace, base, "rte"), expected_logits(published, base, "rte"))
    subspace.export_lora("rte", tmp_path / "rte-lora")
    assert not any("mrpc" in path or "sst2" in path for path in downloaded(hub))

    assert_close(expected_logits(subspace, base, "mrpc"), expected_logits(published, base, "mrpc"))
    assert not any("sst2" in path for path in downloaded(hub))
    subspace.add_adapters({"again": tmp_path / "rte-lora"}, progress=False)
    assert subspace.tasks == ("mrpc", "sst2", "rte", "again")


def test_a_task_that_was_not_downloaded_is_reported_offline(hub: Hub, published: SharedSubspace, base: Path) -> None:
    SharedSubspace.from_pretrained(REPO, revision="rte")
    with hub.offline():
        subspace = SharedSubspace.from_pretrained(REPO, revision="rte")
        expected_logits(subspace, base, "rte")
        with pytest.raises(FileNotFoundError, match=r"tasks/mrpc/adapter_config.json is not in the cache"):
            subspace.apply(AutoModelForCausalLM.from_pretrained(base))
        with pytest.raises(ValueError, match=r"no task 'cola' in the subspace, it has \['mrpc', 'sst2', 'rte'\]"):
            subspace.apply(AutoModelForCausalLM.from_pretrained(base), ["cola"])


def test_an_unknown_revision_is_reported_with_what_there_is(hub: Hub, published: SharedSubspace) -> None:
    for revision, near in (("mrcp", "'mrpc'"), ("step-0003-ret", "'step-0003-rte'"), ("MRPC", "'mrpc'")):
        with pytest.raises(ValueError) as caught:
            SharedSubspace.from_pretrained(REPO, revision=revision)
        assert f"{REPO}: no revision {revision!r}, did you mean {near}" in str(caught.value)
        assert "It has the tasks ['mrpc', 'sst2', 'rte']" in str(caught.value)
    with pytest.raises(ValueError, match=r"no revision 'zzz', expected .*\['mrpc', 'sst2', 'rte'\].*step-0003-rte"):
        SharedSubspace.from_pretrained(REPO, revision="zzz")


def test_an_unknown_revision_is_reported_offline_with_what_the_cache_has(hub: Hub, published: SharedSubspace) -> None:
    SharedSubspace.from_pretrained(REPO)
    SharedSubspace.from_pretrained(REPO, revision="mrpc")
    with hub.offline(), pytest.raises(ValueError) as caught:
        SharedSubspace.from_pretrained(REPO, revision="mrcp")
    assert "no revision 'mrcp', did you mean 'mrpc'" in str(caught.value)
    assert "It has the tasks ['mrpc', 'sst2', 'rte']" in str(caught.value)


def test_a_repository_without_a_subspace_is_reported(hub: Hub) -> None:
    hub.api.create_repo(REPO)
    with pytest.raises(ValueError, match=f"{REPO}: no share_config.json at revision 'main', expected a shared subs"):
        SharedSubspace.from_pretrained(REPO)


def test_a_download_that_breaks_off_is_resumed(hub: Hub, published: SharedSubspace) -> None:
    hub.server.faults.add(is_download_of("subspace.safetensors"), DropDownload(5000), times=2)
    assert_same_state(SharedSubspace.from_pretrained(REPO).state, published.state)


# ---- PEFT and transformers ------------------------------------------------------------------------------------------


PLAIN = """
import sys
from peft import AutoPeftModelForCausalLM
import torch

for revision in (None, "mrpc"):
    at = {{}} if revision is None else {{"revision": revision}}
    model = AutoPeftModelForCausalLM.from_pretrained({repo!r}, **at).eval()
    assert "share_hf" not in sys.modules
    torch.save(model(input_ids=torch.tensor({ids})).logits.detach(), f"{{revision}}.pt")
"""


@pytest.mark.slow
def test_a_process_without_share_hf_loads_any_task_online_and_from_the_cache(
    hub: Hub, published: SharedSubspace, base: Path, tmp_path: Path
) -> None:
    code = PLAIN.format(repo=REPO, ids=INPUT_IDS.tolist())

    def check() -> None:
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=hub.subprocess_env(), cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        for revision, task in ((None, "rte"), ("mrpc", "mrpc")):
            expected = expected_logits(SharedSubspace.from_pretrained(REPO, revision=revision), base, task)
            assert_close(torch.load(tmp_path / f"{revision}.pt"), expected)

    check()
    with hub.offline():
        check()


@pytest.mark.parametrize("revision", [None, "mrpc", "step-0002-sst2"])
def test_peft_loads_the_root_at_every_revision(
    revision: str | None, hub: Hub, published: SharedSubspace, base: Path
) -> None:
    task = {None: "rte", "mrpc": "mrpc", "step-0002-sst2": "sst2"}[revision]
    expected = expected_logits(SharedSubspace.from_pretrained(REPO, revision=revision), base, task)
    assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(REPO, revision=revision).eval()), expected)
    with hub.offline():
        assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(REPO, revision=revision).eval()), expected)


def test_peft_loads_tasks_from_their_subfolders_online_and_from_the_cache(
    hub: Hub, published: SharedSubspace, base: Path
) -> None:
    def check() -> None:
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), REPO, subfolder="tasks/rte", adapter_name="rte"
        )
        assert_close(logits(model), expected_logits(published, base, "rte"))
        model.load_adapter(REPO, "sst2", subfolder="tasks/sst2")
        model.set_adapter("sst2")
        assert_close(logits(model), expected_logits(published, base, "sst2"))

    check()
    assert not any("mrpc" in path for path in downloaded(hub))
    with hub.offline():
        check()


def test_transformers_loads_the_root_and_tasks_online_and_from_the_cache(
    hub: Hub, published: SharedSubspace, base: Path
) -> None:
    def check() -> None:
        model = AutoModelForCausalLM.from_pretrained(base)
        model.load_adapter(REPO)
        assert_close(logits(model.eval()), expected_logits(published, base, "rte"))
        model = AutoModelForCausalLM.from_pretrained(base)
        model.load_adapter(REPO, adapter_name="sst2", adapter_kwargs={"subfolder": "tasks/sst2"})
        assert_close(logits(model.eval()), expected_logits(published, base, "sst2"))

    check()
    with hub.offline():
        check()


def test_the_root_on_a_model_of_tasks_is_refused_with_advice(hub: Hub, published: SharedSubspace, base: Path) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), REPO, subfolder="tasks/rte")
    before = logits(model)
    with pytest.raises(ValueError, match="the root of a subspace is a plain LoRA, its tasks are at subfolder='tasks/"):
        model.load_adapter(REPO, "main")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)


def test_a_task_that_is_not_there_leaves_the_model_alone(hub: Hub, published: SharedSubspace, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(model, REPO, subfolder="tasks/cola")
    assert untouched(model, AutoModelForCausalLM.from_pretrained(base))


# ---- Bytes ----------------------------------------------------------------------------------------------------------


K, P, HIDDEN, TASKS = 32, 8, 1024, 100


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q


@pytest.fixture
def hundred(tmp_path: Path) -> tuple[SharedSubspace, Path]:
    """A subspace of a hundred tasks in a layer of hidden size 1024, and its base model."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8,
        max_position_embeddings=64,
    )  # fmt: skip
    base = tmp_path / "base-1024"
    LlamaForCausalLM(config).save_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    settings = SubspaceSettings(num_components=K, pseudo_rank=P)
    layers = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        layer = LayerSubspace.from_basis(orthonormal(HIDDEN, K, generator), orthonormal(HIDDEN, K, generator), P)
        for i in range(TASKS):
            sides = (torch.randn(K, P, generator=generator) / K for _ in range(2))
            layer = layer.with_task(f"task{i:03d}", *sides)
        layers[f"model.layers.0.self_attn.{name}"] = layer
    target = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "task_type": "CAUSAL_LM"}
    state = SubspaceState(settings=settings, layers=dict(sorted(layers.items())), base_model_name_or_path=str(base))
    for i in range(TASKS):
        task = f"task{i:03d}"
        state = SubspaceState(
            settings=settings, layers=state.layers, base_model_name_or_path=str(base),
            tasks={**state.tasks, task: TaskInfo(target=target)}, lineage=state.lineage,
        ).with_step(changed=[task], merged=[task], max_drift=0.0)  # fmt: skip
    return SharedSubspace(state), base


def test_one_task_out_of_a_hundred_costs_little_more_than_itself(
    hub: Hub, hundred: tuple[SharedSubspace, Path], tmp_path: Path
) -> None:
    subspace, base = hundred
    subspace.push_to_hub(REPO)
    basis = len(hub.repository(REPO).commit_at("main").files["subspace.safetensors"].content)
    for load in (
        lambda: SharedSubspace.from_pretrained(REPO, revision="task042"),
        lambda: PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), REPO, subfolder="tasks/task042", adapter_name="task042"
        ),
    ):
        hub.move_to_another_machine()
        hub.server.forget_requests()
        load()
        more = hub.server.bytes_sent() / basis - 1
        print(f"{hub.server.bytes_sent()} bytes downloaded, {100 * more:.2f} % more than the subspace of {basis}")
        assert more < 0.03

    repository = hub.repository(REPO)
    assert len(repository.branches) == TASKS + 1
    subspace.export_lora("task007", tmp_path / "lora")
    assert subspace.add_adapters({"new": tmp_path / "lora"}, progress=False).changed_layers == 0
    hub.server.forget_requests()
    subspace.push_to_hub(REPO)
    files = repository.commit_at("main").files
    assert hub.server.uploaded(REPO, "subspace.safetensors") == 0
    assert not any(hub.server.uploaded(REPO, path) for path in files if path.startswith("tasks/task"))
    owed = sum(
        len(files[path].content) for path in ("tasks/new/adapter_model.safetensors", "adapter_model.safetensors")
    )
    aside = sum(
        hub.server.uploaded(REPO, path) for path in files if path == "README.md" or path.startswith("figures/")
    )
    more = hub.server.bytes_received() - owed - aside
    print(f"{hub.server.bytes_received()} bytes uploaded, {more} beside coefficients, root adapter, card and figures")
    assert more <= 64 * 1024


def test_a_subspace_saved_from_a_repository_keeps_its_card(
    hub: Hub, published: SharedSubspace, tmp_path: Path
) -> None:
    card = hub.repository(REPO).commit_at("main").files["README.md"].content.decode()
    hub.repository(REPO).write({"README.md": f"{card}\n\nMine.\n".encode()})
    subspace = SharedSubspace.from_pretrained(REPO)
    subspace.save_pretrained(tmp_path / "tree")
    subspace.save_pretrained(tmp_path / "tree")
    text = (tmp_path / "tree" / "README.md").read_text()
    assert text.count("Mine.") == 1 and text.count("## Tasks") == 1


def test_nothing_is_written_over_the_folder_of_something_else(
    published: SharedSubspace, base: Path, tmp_path: Path
) -> None:
    published.save_pretrained(tmp_path / "tree")
    published.export_lora("mrpc", tmp_path / "lora")
    with pytest.raises(ValueError, match="tree: holds a subspace or a model's checkpoint, expected another folder"):
        published.export_lora("mrpc", tmp_path / "tree")
    with pytest.raises(
        ValueError, match="lora: holds an adapter that is not a shared subspace, expected another folder"
    ):
        published.save_pretrained(tmp_path / "lora")
    assert SharedSubspace.from_pretrained(tmp_path / "tree").tasks == published.tasks
