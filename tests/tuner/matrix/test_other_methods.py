"""PEFT's own methods with and without SHARE registered: the same tensors, files, errors and warnings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


pytestmark = pytest.mark.slow

# What is done with PEFT alone, in a separate process, which prints the results as JSON.
PROGRAM = """
import hashlib, json, os, sys, warnings
from pathlib import Path

if sys.argv[1] == "with":
    import share_hf
    share_hf.ShareConfig
import peft, torch
from peft import *
from peft.utils.hotswap import hotswap_adapter
from transformers import LlamaConfig, LlamaForCausalLM

assert ("SHARE" in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING) == (sys.argv[1] == "with")
os.chdir(sys.argv[2])
found = {}


def base():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = LlamaForCausalLM(config).eval()
    model.name_or_path = "a/base"
    return model


def digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().float().numpy().tobytes()).hexdigest()[:16]


def digests(tensors):
    return {name: digest(tensor) for name, tensor in tensors.items()}


def computed(model, **kwargs):
    with torch.no_grad():
        return digest(model(input_ids=torch.arange(3, 15).view(2, 6), **kwargs).logits)


def files(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def error(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as raised:
        return [type(raised).__name__, str(raised)]
    return "none"


def fill(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


CONFIGS = {
    "lora": lambda: LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "dora": lambda: LoraConfig(target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"]),
    "tokens": lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: LoHaConfig(target_modules=["q_proj"]),
    "oft": lambda: OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    "vera": lambda: VeraConfig(target_modules=["q_proj"], r=4),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
warned = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name, config in CONFIGS.items():
        torch.manual_seed(2)
        model = fill(get_peft_model(base(), config()))
        model.save_pretrained(name)
        loaded = PeftModel.from_pretrained(base(), name)
        found[name] = {
            "computed": computed(model), "loaded": computed(loaded), "files": files(name),
            "state": digests(get_peft_model_state_dict(model)), "config": sorted(vars(loaded.peft_config["default"])),
            "trained": [key for key, parameter in model.named_parameters() if parameter.requires_grad],
        }
        if not model.peft_config["default"].is_prompt_learning:
            model.merge_adapter()
            found[name]["merged"] = computed(model)
            model.unmerge_adapter()
            found[name]["unloaded"] = digests(model.merge_and_unload().state_dict())
    model = get_peft_model(base(), CONFIGS["lora"](), "one")
    model.add_adapter("two", CONFIGS["lora"]())
    fill(model)
    model.set_adapter("two")
    fill(model)
    found["adapters"] = [computed(model), computed(model, adapter_names=["one", "two"]), str(model.get_model_status())]
    model.add_weighted_adapter(["one", "two"], [0.3, 0.7], "sum", combination_type="linear")
    model.set_adapter("sum")
    found["adapters"].append(computed(model))
    model.save_pretrained("several", selected_adapters=["one", "sum"])
    found["several"] = files("several")
    model.load_adapter("several/one", "one")
    hotswap_adapter(model, "several/one", "one", torch_device="cpu")
    model.set_adapter("one")
    with peft.helpers.rescale_adapter_scale(model, 0.5):
        found["adapters"].append(computed(model))
    model.delete_adapter("two")
    found["adapters"].append(computed(model))
    native = base()
    native.add_adapter(CONFIGS["lora"](), "first")
    native.load_adapter("several/one", "second")
    native.set_adapter("second")
    native.eval()
    native.save_pretrained("native")
    found["native"] = [computed(native), files("native"), str(native.active_adapters())]
    mixed = get_peft_model(base(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    mixed.add_adapter("loha", CONFIGS["loha"]())
    found["mixed"] = computed(fill(mixed))
    found["errors"] = {
        "no folder": error(PeftModel.from_pretrained, base(), "nowhere-at-all"),
        "no target": error(get_peft_model, base(), LoraConfig(target_modules=["nowhere"])),
        "other method": error(model.add_adapter, "three", CONFIGS["ia3"]()),
        "name is there": error(model.add_adapter, "one", CONFIGS["lora"]()),
        "unknown adapter": error(model.set_adapter, "unknown"),
        "unknown in batch": error(computed, model, adapter_names=["one", "unknown"]),
        "other rank": error(get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"])).load_adapter,
                            "several/one", "default"),
        "unknown combination": error(model.add_weighted_adapter, ["one", "sum"], [1.0, 1.0], "x",
                                     combination_type="none"),
        "native name is there": error(native.load_adapter, "several/one", "second"),
        "option": error(LoraConfig, num_components=3),
        "mixed": error(get_peft_model, base(), CONFIGS["vera"](), mixed=True),
        "torch": error(peft.helpers.rescale_adapter_scale(torch.nn.Linear(2, 2), 0.5).__enter__),
    }
    warned = sorted({f"{warning.category.__name__}: {warning.message}" for warning in caught
                     if issubclass(warning.category, UserWarning)})
found["warnings"] = warned
print("FOUND" + json.dumps(found))
"""


def _run(registered: str, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    program = [sys.executable, "-c", PROGRAM, registered, str(folder)]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}  # PEFT writes sets in the order in which they are
    run = subprocess.run(program, capture_output=True, text=True, timeout=250, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.partition("FOUND")[2])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results with SHARE registered and without."""
    folder = tmp_path_factory.mktemp("other-methods")
    return _run("with", folder / "with"), _run("without", folder / "without")


PARTS = (
    *("lora", "dora", "tokens", "ia3", "loha", "oft", "vera", "prefix", "prompt"),
    *("adapters", "several", "native", "mixed", "errors", "warnings"),
)


@pytest.mark.parametrize("part", PARTS)
def test_pefts_own_methods_are_what_they_are_without_share(part: str, runs: tuple[Any, Any]) -> None:
    registered, alone = runs
    assert registered[part] == alone[part]


def test_what_is_compared_is_what_it_seems(runs: tuple[Any, Any]) -> None:
    _, alone = runs
    assert alone.keys() == set(PARTS)
    assert len({alone[method]["computed"] for method in PARTS[:9]}) == 9
    assert all(alone[method]["computed"] == alone[method]["loaded"] for method in PARTS[:9])
    assert [name for name, message in alone["errors"].items() if message == "none"] == []
    assert "adapter_model.safetensors" in alone["lora"]["files"]
