"""Patterns in hostile configurations, which would take forever to match, on every route into a model and to disk."""

from __future__ import annotations

import hashlib
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

from share_hf import ShareConfig, SharedSubspace
from share_hf.format.lora import read_lora
from share_hf.format.patterns import values_by_module, without_slow_patterns
from tests.trees import assert_close, delta_weights, edit_index, edit_json, logits, lora_config


SLOW = [
    r"(\w+\.?)+\$",
    r"(a|\w\w?|[a-z.])*\$",
    r"(?:.*.*)*\$",
    r"(x?){0,40}\w*\w*\w*\w*\w*\w*\w*\w*\$",
    r".*.*.*.*.*.*.*.*.*.*\$",
    r"(?=(\w+\.?)+\$)",
    "".join(r"(\w|\w\w|\w\w\w)" for _ in range(40)) + r"\$",
]
MODULES = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1, 11) for name in "qkv"]
slow = pytest.mark.parametrize("pattern", SLOW)


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """Fail a test that takes longer than a minute, even in the middle of a match."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("no timers of the system")

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def edit_config(tree: Path, **values: Any) -> None:
    """Change the configuration of a task, with all checksums that the owner of a repository can make."""
    folder = tree / "tasks" / "mrpc"
    edit_json(folder / "adapter_config.json", lambda config: config.update(values))
    checksums = {"adapter_config.json": _checksum(folder / "adapter_config.json")}
    edit_json(folder / "metrics.json", lambda metrics: metrics["sha256"].update(checksums))
    metrics = {"tasks/mrpc/metrics.json": _checksum(folder / "metrics.json")}
    edit_index(tree, lambda index: index["sha256"].update(metrics))


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- Which patterns are kept ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "all-linear",
        r".*\.(q|v)_proj",
        r"model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)",
        r".*\.layers\.(1[0-9]|[0-9])\.(self_attn|mlp)\.\w+",
        r"^(?!.*vision).*_proj$",
    ],
)
def test_patterns_as_people_write_them_are_kept(pattern: str) -> None:
    target = {"target_modules": pattern, "task_type": "CAUSAL_LM"}
    assert without_slow_patterns(target, MODULES) == target


@slow
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
def test_a_slow_pattern_gives_way_to_the_names_of_the_modules(field: str, pattern: str) -> None:
    target = {"target_modules": ["q_proj"], "layers_to_transform": [0], "task_type": "CAUSAL_LM", field: pattern}
    changed = without_slow_patterns(target, MODULES)
    assert changed["task_type"] == "CAUSAL_LM"
    config = lora_config(**changed)
    assert [name for name in [*MODULES, "model.norm"] if check_target_module_exists(config, name)] == MODULES


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 1, "model.layers.0.self_attn.q_proj": 2},
        {"model.layers.0.self_attn.q_proj": 2, "q_proj": 1, "proj": 5},
        {r".*\.v_proj": 3, "v_proj": 4, r"layers\.1\..*": 5},
        {"self_attn": 1, r"layers\.\d+\.self_attn\.(k|v)_proj": 2, r"\w+": 3},
        {},
    ],
)
def test_patterns_choose_the_values_that_peft_chooses(patterns: dict[str, int]) -> None:
    expected = {}
    for module in MODULES:
        if (key := get_pattern_key(patterns, module)) in patterns:
            expected[module] = patterns[key]
    assert values_by_module(Path("config"), "alpha_pattern", patterns, MODULES) == expected


def test_a_value_for_each_of_many_modules_takes_no_time() -> None:
    modules = [f"model.layers.{layer}.mlp.experts.proj_{i}" for layer in range(100) for i in range(100)]
    patterns = {module: i for i, module in enumerate(modules)}
    assert values_by_module(Path("config"), "alpha_pattern", patterns, modules) == patterns


# ---- Routes ---------------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_tree_is_loaded_applied_and_saved_without_its_slow_patterns(
    field: str, pattern: str, tree: Path, tmp_path: Path, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    expected = logits(SharedSubspace.from_pretrained(tree).apply(tiny_model("llama"), ["mrpc"]))
    edit_config(tree, **{field: pattern})
    loaded = SharedSubspace.from_pretrained(tree)
    assert_close(logits(loaded.apply(tiny_model("llama"), ["mrpc"])), expected)
    by_peft = PeftModel.from_pretrained(tiny_model("llama"), tree, subfolder="tasks/mrpc", adapter_name="mrpc")
    assert_close(logits(by_peft), expected)
    by_peft.add_weighted_adapter(["mrpc"], [1.0], "sum")
    by_transformers = tiny_model("llama")
    by_transformers.load_adapter(str(tree), "mrpc", adapter_kwargs={"subfolder": "tasks/mrpc"})
    assert_close(logits(by_transformers), expected)
    loaded.export_lora("mrpc", tmp_path / "lora")
    loaded.save_pretrained(tmp_path / "again")
    assert pattern not in json.loads((tmp_path / "lora" / "adapter_config.json").read_text()).values()
    assert_close(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "lora")), expected, 1e-4)


@slow
def test_a_checkpoint_of_another_phase_is_loaded_by_its_weights(
    pattern: str, tmp_path: Path, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    config = ShareConfig(num_components=4, pseudo_rank=2, target_modules=["q_proj"], phase="init")
    PeftModel(tiny_model("llama"), config).save_pretrained(tmp_path)
    edit_json(tmp_path / "adapter_config.json", lambda config: config.update(target_modules=pattern))
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert not isinstance(model.peft_config["default"].target_modules, str)


@slow
def test_the_targets_of_a_lora_are_those_it_has_weights_for(
    pattern: str, save_lora: Callable[..., Path], tmp_path: Path, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    folder = save_lora()
    expected = delta_weights(tiny_model("llama"), folder)
    edit_json(folder / "adapter_config.json", lambda config: config.update(target_modules=pattern))
    assert read_lora(folder).target["target_modules"] == sorted(expected)
    made = SharedSubspace.from_adapters({"slow": folder}, num_components=8, pseudo_rank=4, progress=False)
    made.save_pretrained(tmp_path / "tree")
    assert SharedSubspace.from_pretrained(tmp_path / "tree").tasks == ("slow",)


@slow
def test_a_slow_alpha_pattern_is_refused_by_name(pattern: str, save_lora: Callable[..., Path]) -> None:
    folder = save_lora()
    edit_json(folder / "adapter_config.json", lambda config: config.update(alpha_pattern={pattern: 1.0}))
    with pytest.raises(ValueError, match=f"alpha_pattern.*{re.escape(repr(pattern[:20])[1:-1])}"):
        read_lora(folder)


@pytest.mark.parametrize("entry", [r"(\w+\.?)+\$", "", "a|b", "score\n"])
def test_what_is_saved_whole_is_named_not_matched(entry: str, save_lora: Callable[..., Path]) -> None:
    folder = save_lora()
    edit_json(folder / "adapter_config.json", lambda config: config.update(modules_to_save=[entry]))
    with pytest.raises(ValueError, match="modules_to_save is"):
        read_lora(folder)
