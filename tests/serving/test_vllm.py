"""Tasks of a subspace for vLLM: each by its name, from a folder or a repository, and what is refused."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from share_hf.format.files import FolderWriter
from share_hf.serving import LoraCache, lora_cache
from share_hf.serving.lora_cache import (
    BASE_MODEL_VARIABLE,
    CACHE_VARIABLE,
    DTYPE_VARIABLE,
    MOST_VARIABLE,
    SUBSPACE_VARIABLE,
)
from share_hf.state import Layout
from tests.hub_server.fixtures import Hub
from tests.serving import stand_in
from tests.tree_fixtures import SaveLora
from tests.trees import BASE_NAME, assert_close, assert_same_tensor, files_of, logits, plain_logits


MODULE = "share_hf.serving.vllm_resolver"
REPO = "org/share-subspace"
ALLOWED = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module that vLLM loads, beside a stand-in for vLLM."""
    stand_in.install(monkeypatch)
    sys.modules.pop(MODULE, None)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


@pytest.fixture
def serve(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Start a server of a subspace, and return a function that answers names."""

    def serve(subspace: Path | str, base_model: str = BASE_NAME, **environment: str) -> Callable[[str], Any]:
        for name, value in {
            SUBSPACE_VARIABLE: str(subspace), CACHE_VARIABLE: str(tmp_path / "cache"), ALLOWED: "1", **environment
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        plugin.LoRAResolverRegistry.resolvers.clear()
        plugin.register_resolver()
        resolver = plugin.LoRAResolverRegistry.get_resolver("share_hf")
        return lambda name: asyncio.run(resolver.resolve_lora(base_model, name))

    return serve


class TestAFolder:
    def test_every_task_is_answered_by_its_name(
        self,
        serve: Callable[..., Any],
        subspace: SharedSubspace,
        tree: Path,
        tiny_model: Callable[[str], PreTrainedModel],
        tmp_path: Path,
    ) -> None:
        ask = serve(tree)
        answers = {task: ask(task) for task in subspace.tasks}
        assert [answer.lora_name for answer in answers.values()] == ["mrpc", "sst2"]
        assert len({answer.lora_int_id for answer in answers.values()}) == 2
        for task, answer in answers.items():
            assert Path(answer.lora_path).parent == tmp_path / "cache"
            expected = logits(subspace.apply(tiny_model("llama"), [task]))
            assert_close(plain_logits(tiny_model("llama"), Path(answer.lora_path)), expected)
            config = json.loads((Path(answer.lora_path) / "adapter_config.json").read_text())
            assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
            assert (config["rank_pattern"], config["modules_to_save"]) == ({}, None)  # all that vLLM accepts

    def test_a_task_that_was_asked_for_before_is_not_written_again(
        self, serve: Callable[..., Any], tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = serve(tree)("mrpc")
        before = files_of(tmp_path / "cache")
        monkeypatch.setattr("share_hf.serving.lora_cache._read", None)
        assert serve(tree)("mrpc") == first  # in another process, the same place and the same number
        assert files_of(tmp_path / "cache") == before

    def test_a_smaller_type_is_that_of_the_factors(
        self, serve: Callable[..., Any], subspace: SharedSubspace, tree: Path
    ) -> None:
        whole, half = (
            load_file(Path(serve(tree, **{DTYPE_VARIABLE: dtype})("mrpc").lora_path) / "adapter_model.safetensors")
            for dtype in ("float32", "bfloat16")
        )
        assert whole.keys() == half.keys()
        for name, factor in whole.items():
            assert_same_tensor(half[name], factor.to(torch.bfloat16))

    def test_entries_that_a_type_cannot_hold_are_refused(
        self, serve: Callable[..., Any], save_lora: SaveLora, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        loud = {"loud": save_lora("loud", lora_alpha=1e13)}
        SharedSubspace.from_adapters(loud, num_components=8, pseudo_rank=4, progress=False).save_pretrained(
            tmp_path / "loud"
        )
        assert serve(tmp_path / "loud", **{DTYPE_VARIABLE: "float16"})("loud") is None
        assert "has factors with entries too large for float16" in caplog.text
        with pytest.raises(ValueError, match=r"dtype is 'int8', expected one of \['float32', 'bfloat16', 'float16'\]"):
            serve(tmp_path / "loud", **{DTYPE_VARIABLE: "int8"})

    def test_reads_nothing_of_other_tasks(self, serve: Callable[..., Any], tree: Path) -> None:
        for file in (tree / "tasks" / "sst2").iterdir():
            file.unlink()
        assert serve(tree)("mrpc") is not None
        assert serve(tree)("sst2") is None

    @pytest.mark.parametrize(
        "name",
        ["cola", "mprc", "", ".", "..", "mrpc/", "../tree/tasks/mrpc", "mrpc/../../x", "/etc", "mrpc\n", "mrpc@",
         "mrpc@../x", "mrpc@a/b", "mrpc@a..b", "x" * 10_000, "mrpc\x00"],
    )  # fmt: skip
    def test_what_is_not_a_task_is_left_to_others(
        self, name: str, serve: Callable[..., Any], tree: Path, tmp_path: Path
    ) -> None:
        before = files_of(tmp_path)
        assert serve(tree)(name) is None
        assert files_of(tmp_path) == before

    def test_a_changed_subspace_gives_new_places(
        self, serve: Callable[..., Any], tree: Path, loras: dict[str, Path], tiny_model: Callable[..., Any]
    ) -> None:
        ask = serve(tree)
        before = {task: ask(task).lora_path for task in ("mrpc", "sst2")}
        contents = {task: files_of(Path(place)) for task, place in before.items()}
        subspace = SharedSubspace.from_pretrained(tree)
        subspace.add_adapters({"again": loras["mrpc"]}, tolerance=0.99, progress=False)  # projected: all others stay
        subspace.save_pretrained(tree)
        assert {task: ask(task).lora_path for task in before} == before
        subspace.add_adapters({"rte": loras["rte"]}, progress=False)
        subspace.save_pretrained(tree)
        after = {task: ask(task).lora_path for task in before}
        assert not set(after.values()) & set(before.values())
        assert {task: files_of(Path(place)) for task, place in before.items()} == contents  # a server may have it open
        expected = logits(subspace.apply(tiny_model("llama"), ["sst2"]))
        assert_close(plain_logits(tiny_model("llama"), Path(after["sst2"])), expected)

    def test_a_revision_of_a_folder_is_refused(
        self, serve: Callable[..., Any], tree: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert serve(tree)("mrpc@step-0001-mrpc") is None
        assert "is a local folder, which has no revisions" in caplog.text

    def test_a_damaged_file_is_reported(
        self, serve: Callable[..., Any], tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tree / "tasks" / "mrpc" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert serve(tree)("mrpc") is None
        assert "LoRA 'mrpc' cannot be served" in caplog.text and str(path) in caplog.text
        assert not (tmp_path / "cache").exists()

    def test_a_convolution_is_refused(
        self, serve: Callable[..., Any], subspace: SharedSubspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        layouts = dict.fromkeys(subspace.state.layers, Layout("convolution", (2,)))
        SharedSubspace(replace(subspace.state, layouts=layouts)).save_pretrained(tmp_path / "convolutions")
        assert serve(tmp_path / "convolutions")("mrpc") is None
        assert (
            "'model.layers.0.self_attn.q_proj' of kind convolution with kernel (2,), which no LoRA server"
            in caplog.text
        )


class TestTheBaseModel:
    def test_another_one_is_refused(
        self, serve: Callable[..., Any], tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert serve(tree, "org/tiny-FP8")("mrpc") is None
        assert "belongs to base model 'org/tiny', but 'org/tiny-FP8' is served" in caplog.text
        assert f"{BASE_MODEL_VARIABLE}=org/tiny-FP8" in caplog.text
        assert not (tmp_path / "cache").exists()

    def test_may_have_another_name_that_is_given(self, serve: Callable[..., Any], tree: Path) -> None:
        assert serve(tree, "org/tiny-FP8", **{BASE_MODEL_VARIABLE: "org/tiny-FP8"})("mrpc") is not None
        assert serve(tree, "org/other", **{BASE_MODEL_VARIABLE: "org/tiny-FP8"})("mrpc") is None

    def test_of_a_subspace_that_names_none_is_any(
        self, serve: Callable[..., Any], subspace: SharedSubspace, tmp_path: Path
    ) -> None:
        SharedSubspace(replace(subspace.state, base_model_name_or_path=None)).save_pretrained(tmp_path / "unnamed")
        assert serve(tmp_path / "unnamed", "org/any")("mrpc") is not None


def test_heads_are_left_out_with_a_warning(
    serve: Callable[..., Any], save_classifier: SaveLora, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = {"cb": save_classifier("cb", 3)}
    SharedSubspace.from_adapters(adapters, num_components=8, pseudo_rank=4, progress=False).save_pretrained(
        tmp_path / "tree"
    )
    for _ in range(2):  # even if the LoRA is there already
        caplog.clear()
        answer = serve(tmp_path / "tree")("cb")
        assert "weights of its own for ['classifier.bias', 'classifier.weight'], which are left out" in caplog.text
    folder = Path(answer.lora_path)
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] is None
    assert b"classifier" not in (folder / "adapter_model.safetensors").read_bytes()


class TestSeveralWorkers:
    def test_agree_on_one_place(self, tree: Path, tmp_path: Path) -> None:
        barrier = Barrier(8)

        def work(_: int) -> Path | None:
            cache = LoraCache(str(tree), tmp_path / "cache")
            barrier.wait()
            return cache.folder_of("mrpc", BASE_NAME)

        with ThreadPoolExecutor(8) as pool:
            places = set(pool.map(work, range(8)))
        assert len(places) == 1
        assert os.listdir(tmp_path / "cache") == [places.pop().name]  # and no locks or scratch folders

    def test_find_a_whole_lora_or_none(
        self, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Any]
    ) -> None:
        cache = LoraCache(str(tree), tmp_path / "cache")
        with monkeypatch.context() as patch:
            put = FolderWriter.put

            def full_after_one(writer: FolderWriter, name: str, content: bytes) -> None:
                if writer.sha256:
                    raise OSError(28, "No space left on device")
                put(writer, name, content)

            patch.setattr(FolderWriter, "put", full_after_one)
            with pytest.raises(OSError, match="No space left"):
                cache.folder_of("mrpc", BASE_NAME)
        assert os.listdir(tmp_path / "cache") == []
        PeftModel.from_pretrained(tiny_model("llama"), cache.folder_of("mrpc", BASE_NAME))


class TestABoundedCache:
    """A cache with room for two LoRAs, of a subspace that changes."""

    @pytest.fixture
    def ask(self, tree: Path, tmp_path: Path) -> Callable[[str], Path]:
        return lambda name: LoraCache(str(tree), tmp_path / "cache", most=2).folder_of(name, BASE_NAME)

    @pytest.fixture
    def change(self, tree: Path, loras: dict[str, Path]) -> Callable[[], None]:
        """Merge a task, so that all others have new places."""

        def change() -> None:
            subspace = SharedSubspace.from_pretrained(tree)
            subspace.add_adapters({f"rte{len(subspace.tasks)}": loras["rte"]}, progress=False)
            subspace.save_pretrained(tree)

        return change

    def test_drops_the_one_used_longest_ago(
        self, ask: Callable[[str], Path], change: Callable[[], None], tmp_path: Path
    ) -> None:
        first, second = ask("mrpc"), ask("sst2")
        used_before(first, 3600)
        used_before(second, 1800)
        assert ask("mrpc") == first  # used now
        change()
        third = ask("mrpc")
        assert there(tmp_path / "cache") == {first.name, third.name}
        for place in (first, third):
            used_before(place, 3600)
        os.utime(first / "adapter_model.safetensors")  # like a server that reads it again
        fourth = ask("sst2")
        assert there(tmp_path / "cache") == {first.name, fourth.name}
        assert set(os.listdir(tmp_path / "cache")) == {first.name, fourth.name}  # nor any lock

    def test_never_drops_what_was_handed_out_just_now(
        self, ask: Callable[[str], Path], change: Callable[[], None], tmp_path: Path
    ) -> None:
        places = {ask("mrpc"), ask("sst2")}
        change()
        places |= {ask("mrpc"), ask("sst2")}
        assert there(tmp_path / "cache") == {place.name for place in places} and len(places) == 4
        for place in places:
            used_before(place, 601)
        newest = ask("rte2")
        assert newest.name in there(tmp_path / "cache") and len(there(tmp_path / "cache")) == 2

    def test_leaves_what_is_not_its_own(
        self, ask: Callable[[str], Path], change: Callable[[], None], tmp_path: Path
    ) -> None:
        first = ask("mrpc")
        (first / "notes.txt").write_text("mine")
        (other := tmp_path / "cache" / f"data-{'0' * 32}").mkdir()
        (other / "data.txt").write_text("mine")
        used_before(first, 3600)
        ask("sst2")
        change()
        ask("mrpc")
        assert os.listdir(first) == ["notes.txt"] and os.listdir(other) == ["data.txt"]

    def test_rewrites_what_is_half_removed(self, ask: Callable[[str], Path]) -> None:
        whole = files_of(place := ask("mrpc"))
        (place / "share_hf.json").unlink()
        (place / "adapter_config.json").unlink()
        assert ask("mrpc") == place and files_of(place) == whole

    def test_hands_out_whole_loras_while_others_remove_them(
        self, tree: Path, change: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        change()
        removed: list[Path] = []
        remove = lora_cache._remove
        monkeypatch.setattr(lora_cache, "_KEPT_SECONDS", 0.2)
        monkeypatch.setattr(lora_cache, "_remove", lambda place: (removed.append(place), remove(place)))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda first: use(tree, tmp_path / "cache", first, rounds=16, pause=0.1), range(3)))
        assert removed
        assert set(os.listdir(tmp_path / "cache")) == there(tmp_path / "cache")

    @pytest.mark.slow
    def test_is_safe_with_several_processes(self, tree: Path, change: Callable[[], None], tmp_path: Path) -> None:
        change()
        program = (
            "import sys; from pathlib import Path; from share_hf.serving import lora_cache\n"
            "from tests.serving.test_vllm import use\n"
            "lora_cache._KEPT_SECONDS = 0.5\n"
            "use(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), rounds=16, pause=0.3)"
        )
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(tree), str(tmp_path / "cache"), str(first)],
                cwd=Path(__file__).parents[2],
                stderr=subprocess.PIPE,
                text=True,
            )
            for first in range(2)
        ]
        errors = [run.communicate(timeout=240)[1] for run in runs]
        assert [run.returncode for run in runs] == [0, 0], errors
        assert set(os.listdir(tmp_path / "cache")) == there(tmp_path / "cache")

    def test_is_asked_for_by_a_variable(
        self, plugin: ModuleType, serve: Callable[..., Any], tree: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        serve(tree)
        assert LoraCache.from_environment().most is None
        serve(tree, **{MOST_VARIABLE: "2"})
        assert LoraCache.from_environment().most == 2
        for wrong in ("0", "-1", "two", "1.5"):
            with pytest.raises(
                ValueError, match=f"{MOST_VARIABLE} is '{wrong}', expected a number of LoRAs, at least 1"
            ):
                serve(tree, **{MOST_VARIABLE: wrong})


def use(tree: Path, cache: Path, first: int, *, rounds: int, pause: float) -> None:
    """Ask for three tasks in turn, with room for one, and find a whole LoRA wherever one is announced."""
    loras = LoraCache(str(tree), cache, most=1)
    for number in range(first, first + rounds):
        place = loras.folder_of(("mrpc", "sst2", "rte2")[number // 4 % 3], BASE_NAME)
        json.loads((place / "adapter_config.json").read_text())
        assert load_file(place / "adapter_model.safetensors")
        time.sleep(pause)


def used_before(place: Path, seconds: float) -> None:
    """Make it look as if a LoRA was last used this long ago."""
    for file in place.iterdir():
        os.utime(file, (time.time() - seconds,) * 2)


def there(cache: Path) -> set[str]:
    return {place.name for place in cache.iterdir() if (place / "share_hf.json").is_file()}


class TestARepository:
    def test_answers_tasks_now_and_at_a_step(
        self,
        hub: Hub,
        serve: Callable[..., Any],
        subspace: SharedSubspace,
        loras: dict[str, Path],
        tiny_model: Callable[..., Any],
    ) -> None:
        subspace.push_to_hub(REPO)
        at_step = logits(subspace.apply(tiny_model("llama"), ["sst2"]))
        subspace.add_adapters({"rte": loras["rte"]}, progress=False)
        subspace.push_to_hub(REPO)
        hub.move_to_another_machine()
        hub.server.forget_requests()
        ask = serve(REPO)
        answers = {name: ask(name) for name in ("sst2", "sst2@step-0002-sst2", "sst2@main")}
        found = {name: plain_logits(tiny_model("llama"), Path(answer.lora_path)) for name, answer in answers.items()}
        assert_close(found["sst2"], logits(subspace.apply(tiny_model("llama"), ["sst2"])))
        assert_close(found["sst2@step-0002-sst2"], at_step)
        assert not torch.equal(found["sst2"], at_step)
        assert answers["sst2@main"].lora_path == answers["sst2"].lora_path
        assert len({answer.lora_int_id for answer in answers.values()}) == 3
        assert not any(
            hub.server.downloaded(REPO, f"tasks/{task}/adapter_model.safetensors") for task in ("mrpc", "rte")
        )
        with hub.offline():
            assert ask("sst2") == answers["sst2"]

    def test_says_what_it_does_not_have(
        self,
        hub: Hub,
        serve: Callable[..., Any],
        subspace: SharedSubspace,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        subspace.push_to_hub(REPO)
        assert serve(REPO)("mrpc@step-0009-mrpc") is None
        assert "no revision 'step-0009-mrpc'" in caplog.text
        assert serve(REPO)("sst2@step-0001-mrpc") is None  # there was no such task yet
        assert serve("org/nowhere")("mrpc") is None
        assert "LoRA 'mrpc' cannot be served" in caplog.text


class TestTheEntryPoint:
    def test_of_the_package_registers_it(
        self, plugin: ModuleType, monkeypatch: pytest.MonkeyPatch, tree: Path
    ) -> None:
        monkeypatch.setenv(SUBSPACE_VARIABLE, str(tree))
        text = (Path(__file__).parents[2] / "setup.py").read_text()
        found = re.search(r'"vllm\.general_plugins": \["share_hf_resolver = ([\w.]+):(\w+)"\]', text)
        getattr(importlib.import_module(found[1]), found[2])()
        assert set(plugin.LoRAResolverRegistry.get_supported_resolvers()) == {"share_hf"}

    def test_costs_a_server_without_a_subspace_nothing(self) -> None:
        program = (
            "import sys; from share_hf_cli.vllm_plugin import register_resolver; register_resolver(); "
            "print({'torch', 'peft', 'share_hf'} & set(sys.modules))"
        )
        environment = {name: value for name, value in os.environ.items() if name != SUBSPACE_VARIABLE}
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert run.stdout.strip() == "set()", run.stderr

    def test_does_nothing_unless_asked_to(self, plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(SUBSPACE_VARIABLE, raising=False)
        plugin.register_resolver()
        assert not plugin.LoRAResolverRegistry.get_supported_resolvers()

    def test_may_be_called_again(self, plugin: ModuleType, serve: Callable[..., Any], tree: Path) -> None:
        serve(tree)
        resolver = plugin.LoRAResolverRegistry.get_resolver("share_hf")
        plugin.register_resolver()
        assert plugin.LoRAResolverRegistry.get_resolver("share_hf") is resolver

    def test_stops_a_server_of_a_folder_without_a_subspace(
        self, plugin: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv(SUBSPACE_VARIABLE, str(tmp_path))
        with pytest.raises(ValueError, match=rf"{SUBSPACE_VARIABLE} is '{tmp_path}', which has no share_config.json"):
            plugin.register_resolver()

    def test_warns_where_vllm_will_not_ask(
        self, serve: Callable[..., Any], tree: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        serve(tree)
        assert not caplog.text
        serve(tree, **{ALLOWED: "0"})
        assert f"vLLM asks for tasks only if {ALLOWED}=1" in caplog.text

    def test_has_a_cache_of_its_own_by_default(
        self, tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv(SUBSPACE_VARIABLE, str(tree))
        monkeypatch.delenv(CACHE_VARIABLE, raising=False)
        monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
        cache = LoraCache.from_environment()
        assert cache.folder.relative_to(tmp_path / "assets").parts[:2] == ("share_hf", "loras")

    def test_numbers_are_the_same_in_every_process(self, plugin: ModuleType) -> None:
        assert plugin.stable_id("mrpc", "mrpc-0") == 6543962001684544141
        assert all(0 < plugin.stable_id(f"task{i}", "x") < 2**63 for i in range(1000))
        assert len({plugin.stable_id(f"task{i}", "x") for i in range(1000)}) == 1000


class TestTheRealOne:
    """What vLLM itself makes of the answers. Its wheel is enough: no GPU is used, nor any of its kernels."""

    @pytest.fixture
    def real(self) -> Iterator[ModuleType]:
        pytest.importorskip("vllm", reason="vLLM is not installed, which needs CUDA and its own version of torch")
        sys.modules.pop(MODULE, None)
        yield importlib.import_module(MODULE)
        sys.modules.pop(MODULE, None)

    def test_has_the_signatures_of_the_stand_in(self, real: ModuleType) -> None:
        for theirs, ours in (
            (real.LoRARequest, stand_in.LoRARequest),
            (real.LoRAResolver.resolve_lora, stand_in.LoRAResolver.resolve_lora),
            (real.LoRAResolverRegistry.register_resolver, stand_in.Registry().register_resolver),
            (real.LoRAResolverRegistry.get_supported_resolvers, stand_in.Registry().get_supported_resolvers),
            (real.LoRAResolverRegistry.get_resolver, stand_in.Registry().get_resolver),
        ):
            parameters = [
                {name: parameter.default for name, parameter in inspect.signature(of).parameters.items()}
                for of in (theirs, ours)
            ]
            assert parameters[0] == parameters[1]
        assert inspect.iscoroutinefunction(real.LoRAResolver.resolve_lora)

    @pytest.mark.slow
    def test_answers_and_loads_every_task(
        self,
        real: ModuleType,
        subspace: SharedSubspace,
        tree: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from vllm.config.lora import LoRAConfig
        from vllm.entrypoints.openai.models.protocol import BaseModelPath
        from vllm.entrypoints.openai.models.serving import OpenAIServingModels
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        loaded = {}

        async def add_lora(request: Any) -> None:
            """Add a LoRA as a worker of vLLM does before it moves the weights to a GPU."""
            helper = PEFTHelper.from_local_dir(request.lora_path, 64)
            helper.validate_legal(LoRAConfig(max_lora_rank=8))
            loaded[request.lora_name] = LoRAModel.from_local_checkpoint(
                request.lora_path,
                {"q_proj", "v_proj"},
                peft_helper=helper,
                lora_model_id=request.lora_int_id,
                device="cpu",
                dtype=torch.float32,
            )

        monkeypatch.setattr("vllm.lora.lora_model.PIN_MEMORY", torch.cuda.is_available())
        monkeypatch.setenv(SUBSPACE_VARIABLE, str(tree))
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
        monkeypatch.setenv(ALLOWED, "1")
        real.LoRAResolverRegistry.resolvers.clear()
        real.register_resolver()
        config = SimpleNamespace(model=BASE_NAME, max_model_len=64)
        engine = SimpleNamespace(model_config=config, renderer=None, input_processor=None, add_lora=add_lora)
        server = OpenAIServingModels(engine, [BaseModelPath(name="base", model_path=BASE_NAME)])
        for task in subspace.tasks:
            answer = asyncio.run(server.resolve_lora(task))
            assert answer.lora_name == task and server.lora_requests[task] is answer
            for module, update in subspace.state.updates_of(task).items():
                found = loaded[task].loras[module]
                assert_close(found.scaling * found.lora_b @ found.lora_a, update.out_factor @ update.in_factor.T)
        assert asyncio.run(server.resolve_lora("cola")).error.code == 404
        config.model = "org/other"
        assert asyncio.run(server.resolve_lora("mrpc")).lora_name == "mrpc"  # is already there
        del server.lora_requests["mrpc"]
        assert asyncio.run(server.resolve_lora("mrpc")).error.code == 404
