"""Every way to load a task from a tree: plain PEFT without share_hf, PEFT with it, and SharedSubspace.apply."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from share_hf import SharedSubspace
from share_hf.tuner import share_layers
from share_hf.tuner.transfer import load_tasks
from tests.tree_fixtures import SaveLora
from tests.trees import (
    BERT_LORA,
    INPUT_IDS,
    assert_close,
    bert_with_labels,
    logits,
    lora_config,
    named,
    plain_logits,
    save_adapter,
    untouched,
)


# Loads each adapter with plain PEFT on the base model that the adapter names, and writes the logits.
PLAIN_PEFT = """
import json, sys
import peft, torch
from safetensors.torch import save_file

requests, ids = json.loads(sys.argv[1]), torch.tensor(json.loads(sys.argv[2]))
outputs = {}
for name, (auto_class, folder, kwargs) in requests.items():
    model = getattr(peft, auto_class).from_pretrained(folder, **kwargs).eval()
    with torch.no_grad():
        outputs[name] = model(input_ids=ids).logits
assert not [module for module in sys.modules if module.startswith("share_hf")]
save_file(outputs, sys.argv[3])
"""

PlainLogits = tuple[dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture(scope="module")
def plain_peft(
    pristine_models: dict[str, PreTrainedModel],
    tiny_model_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> PlainLogits:
    """Logits of a process that never imports share_hf, and those of SharedSubspace.apply, by what was loaded."""
    root = tmp_path_factory.mktemp("plain")
    llama, bert = tiny_model_folder("llama"), tiny_model_folder("bert")
    llama_loras = {
        f"t{i}": save_adapter(_loaded("llama", pristine_models, llama), root / f"llama-{i}", lora_config(r=2 + i), i)
        for i in range(2)
    }
    bert_loras = {
        f"t{i}": save_adapter(_loaded("bert", pristine_models, bert), root / f"bert-{i}", lora_config(**BERT_LORA), i)
        for i in range(2)
    }
    requests, expected = {}, {}
    for architecture, loras, auto_class in (
        ("llama", llama_loras, "AutoPeftModelForCausalLM"),
        ("bert", bert_loras, "AutoPeftModelForSequenceClassification"),
    ):
        kwargs = {"num_labels": 3} if architecture == "bert" else {}
        subspace = SharedSubspace.from_adapters(loras, num_components=5, pseudo_rank=4, progress=False)
        for default_task in (None, "t0"):
            name = f"{architecture}-root-of-{default_task or 'the-newest'}"
            SharedSubspace(replace(subspace.state, default_task=default_task)).save_pretrained(root / name)
            requests[name] = (auto_class, str(root / name), kwargs)
        subspace.export_lora("t1", root / f"{architecture}-export")
        requests[f"{architecture}-export"] = (auto_class, str(root / f"{architecture}-export"), kwargs)
        model = subspace.apply(_loaded(architecture, pristine_models, None))
        for name in [name for name in requests if name.startswith(architecture)]:
            model.set_adapter("t0" if name.endswith("t0") else "t1")
            expected[name] = logits(model)
    arguments = [json.dumps(requests), json.dumps(INPUT_IDS.tolist()), str(root / "outputs.safetensors")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PLAIN_PEFT, *arguments],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return load_file(root / "outputs.safetensors"), expected


def _loaded(name: str, pristine_models: dict[str, PreTrainedModel], folder: Path | None) -> PreTrainedModel:
    return named(copy.deepcopy(pristine_models[name]), str(folder or ""))


@pytest.mark.parametrize("what", ["root-of-the-newest", "root-of-t0", "export"])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_process_without_share_hf_computes_the_same(architecture: str, what: str, plain_peft: PlainLogits) -> None:
    found, expected = plain_peft
    name = f"{architecture}-{what}"
    assert_close(found[name], expected[name])
    others = [other for other in expected if other.startswith(architecture) and other.endswith("t0")]
    for other in others:
        if other != name:
            assert (found[name] - expected[other]).abs().max() > 0.01


# ---- PEFT, with share_hf imported -----------------------------------------------------------------------------------


def test_peft_loads_any_task_from_its_subfolder(
    subspace: SharedSubspace, tree: Path, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    applied = subspace.apply(tiny_model("llama"))
    for task in subspace.tasks:
        applied.set_adapter(task)
        model = PeftModel.from_pretrained(tiny_model("llama"), tree, subfolder=f"tasks/{task}")
        assert torch.equal(logits(model), logits(applied))


def test_peft_adds_further_tasks_of_the_tree_to_a_model(
    subspace: SharedSubspace, tree: Path, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    applied = subspace.apply(tiny_model("llama"))
    model = PeftModel.from_pretrained(tiny_model("llama"), tree, subfolder="tasks/mrpc", adapter_name="mrpc")
    model.load_adapter(tree, "sst2", subfolder="tasks/sst2")
    for task in subspace.tasks:
        for each in (applied, model):
            each.set_adapter(task)
        assert torch.equal(logits(model), logits(applied))


def test_peft_loads_a_task_with_its_head(
    save_classifier: SaveLora, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    folder = save_classifier("three", 3)
    subspace = SharedSubspace.from_adapters([folder], pseudo_rank=4, progress=False)
    subspace.save_pretrained(tmp_path / "tree")
    model = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "tree", subfolder="tasks/three")
    assert_close(logits(model), plain_logits(tiny_model("bert"), folder))


# ---- Applying -------------------------------------------------------------------------------------------------------


def test_each_layer_has_one_basis_for_all_tasks_and_the_first_task_is_active(
    subspace: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = subspace.apply(tiny_model("llama"))
    assert model.active_adapter == "mrpc"
    assert not model.training
    layers = share_layers(model)
    assert layers.keys() == subspace.state.layers.keys()
    for module, layer in layers.items():
        assert torch.equal(layer.share_basis_out, subspace.state.layers[module].basis_out)
        assert layer.tasks == ["mrpc", "sst2"]
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_only_the_tasks_asked_for_are_loaded_in_the_order_asked_for(
    subspace: SharedSubspace, loras: dict[str, Path], tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    subspace.add_adapters({"rte": loras["rte"]}, progress=False)
    model = subspace.apply(tiny_model("llama"), ["rte", "mrpc"])
    assert list(model.peft_config) == ["rte", "mrpc"]
    assert model.active_adapter == "rte"


def test_the_active_task_can_be_trained_on(
    subspace: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = subspace.apply(tiny_model("llama"), trainable=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(subspace.state.layers)
    assert all(".share_coefficients_" in name and name.endswith(".mrpc") for name in trained)


def test_applying_leaves_the_subspace_as_it_is(
    subspace: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    expected = {
        (task, module): layer.update_of(task).dense()
        for task in subspace.tasks
        for module, layer in subspace.state.layers.items()
    }
    model = subspace.apply(tiny_model("llama"), trainable=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for (task, module), update in expected.items():
        assert torch.equal(subspace.state.layers[module].update_of(task).dense(), update)


def test_heads_of_smaller_tasks_are_padded_with_labels_that_are_never_predicted(
    save_classifier: SaveLora, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    folders = {"two": save_classifier("two", 2, seed=1), "four": save_classifier("four", 4, seed=2)}
    subspace = SharedSubspace.from_adapters(folders, num_components=16, pseudo_rank=4, progress=False)
    model = subspace.apply(bert_with_labels(tiny_model("bert"), 4))
    for task, num_labels in (("two", 2), ("four", 4), ("two", 2)):
        model.set_adapter(task)
        found = logits(model)
        expected = plain_logits(bert_with_labels(tiny_model("bert"), num_labels), folders[task])
        assert_close(found[:, :num_labels], expected, tolerance=1e-4)
        assert (found[:, num_labels:] < expected.min() - 1000).all()
    assert subspace.state.tasks["two"].head["classifier.weight"].shape == (2, 64)


def test_a_model_with_too_few_labels_is_refused_and_left_as_it_was(
    save_classifier: SaveLora, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    subspace = SharedSubspace.from_adapters([save_classifier("four", 4)], pseudo_rank=4, progress=False)
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=r"task 'four': 'classifier.* shape \(4.*with num_labels=4"):
        subspace.apply(model)
    assert untouched(model, tiny_model("bert"))


def test_a_head_without_a_bias_never_predicts_the_labels_it_lacks(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    config = {**tiny_model("llama").config.to_dict(), "id2label": None, "label2id": None}
    small, large = (LlamaForSequenceClassification(LlamaConfig(**{**config, "num_labels": n})) for n in (2, 5))
    large.model.load_state_dict(small.model.state_dict())
    folder = save_adapter(copy.deepcopy(small), tmp_path / "two", lora_config(task_type="SEQ_CLS"), seed=0)
    ids = torch.randint(3, 64, (200, 6))
    with torch.no_grad():
        expected = PeftModel.from_pretrained(small, folder).eval()(input_ids=ids).logits
        subspace = SharedSubspace.from_adapters([folder], pseudo_rank=4, progress=False)
        found = subspace.apply(large)(input_ids=ids).logits
    torch.testing.assert_close(found[:, :2], expected, rtol=0, atol=1e-4)
    assert torch.equal(found.argmax(-1), found[:, :2].argmax(-1))


def test_a_model_without_the_head_is_refused_and_left_as_it_was(
    save_classifier: SaveLora, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    subspace = SharedSubspace.from_adapters([save_classifier("three", 3)], pseudo_rank=4, progress=False)
    model = tiny_model("bert").bert
    with pytest.raises(ValueError, match="which BertModel does not have"):
        subspace.apply(model)
    assert untouched(model, tiny_model("bert").bert)


def test_a_model_of_other_shapes_is_refused_and_left_as_it_was(
    subspace: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    def wide() -> PreTrainedModel:
        torch.manual_seed(0)
        config = LlamaConfig(**{**tiny_model("llama").config.to_dict(), "num_key_value_heads": 4})
        return type(tiny_model("llama"))(config)

    model = wide()
    with pytest.raises(ValueError, match=r"v_proj' has shape \(64, 64\), the subspace expects \(32, 64\)"):
        subspace.apply(model)
    assert untouched(model, wide())


def test_another_architecture_is_refused_and_left_as_it_was(
    subspace: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match=r"adapts 'model.layers.0.self_attn.q_proj', which GPT2LMHeadModel does not"):
        subspace.apply(model)
    assert untouched(model, tiny_model("gpt2"))


@pytest.mark.parametrize("tasks", [[], ["mrpc", "unknown"]])
def test_tasks_that_cannot_be_applied_leave_the_model_as_it_was(
    tasks: list[str], subspace: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="no task"):
        subspace.apply(model, tasks)
    assert untouched(model, tiny_model("llama"))


def test_a_model_that_has_adapters_is_refused_and_left_as_it_was(
    subspace: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    base = tiny_model("llama")
    applied = subspace.apply(base, ["mrpc"])
    expected = logits(applied)
    for model in (applied, base):
        with pytest.raises(ValueError, match="adapters already"):
            subspace.apply(model, ["sst2"])
    assert list(applied.peft_config) == ["mrpc"]
    assert torch.equal(logits(applied), expected)


def test_a_model_whose_adapters_were_taken_off_can_be_used_again(
    subspace: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    base = subspace.apply(tiny_model("llama"), ["mrpc"]).unload()
    assert torch.equal(logits(subspace.apply(base, ["sst2"])), logits(subspace.apply(tiny_model("llama"), ["sst2"])))


# ---- Exporting ------------------------------------------------------------------------------------------------------


def test_an_exported_task_is_a_lora_that_can_be_added_again(
    subspace: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    subspace.export_lora("mrpc", tmp_path / "exported")
    applied = subspace.apply(tiny_model("llama"), ["mrpc"])
    assert_close(plain_logits(tiny_model("llama"), tmp_path / "exported"), logits(applied))
    other = SharedSubspace.from_adapters([tmp_path / "exported"], pseudo_rank=4, progress=False)
    for module, layer in other.state.layers.items():
        assert_close(layer.update_of("exported").dense(), subspace.state.layers[module].update_of("mrpc").dense())


def test_an_export_replaces_an_older_one_and_nothing_else(subspace: SharedSubspace, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    subspace.export_lora("mrpc", folder)
    first = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "README.md").write_text("mine")
    subspace.export_lora("sst2", folder)
    assert (folder / "adapter_model.safetensors").read_bytes() != first
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_layers_that_store_their_weight_the_other_way_round_are_exported_likewise(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    config = lora_config(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    folder = save_adapter(named(tiny_model("gpt2")), tmp_path / "mrpc", config, seed=0)
    subspace = SharedSubspace.from_adapters([folder], pseudo_rank=4, progress=False)
    subspace.export_lora("mrpc", tmp_path / "exported")
    expected = plain_logits(tiny_model("gpt2"), folder)
    assert_close(logits(subspace.apply(tiny_model("gpt2"))), expected, tolerance=1e-4)
    assert_close(plain_logits(tiny_model("gpt2"), tmp_path / "exported"), expected, tolerance=1e-4)


def test_an_exported_classifier_keeps_its_own_labels(
    save_classifier: SaveLora, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    folders = {"two": save_classifier("two", 2, seed=1), "four": save_classifier("four", 4, seed=2)}
    subspace = SharedSubspace.from_adapters(folders, num_components=16, pseudo_rank=4, progress=False)
    subspace.export_lora("two", tmp_path / "exported")
    model = bert_with_labels(tiny_model("bert"), 2)
    assert isinstance(model, BertForSequenceClassification)
    found = plain_logits(model, tmp_path / "exported")
    assert_close(found, plain_logits(bert_with_labels(tiny_model("bert"), 2), folders["two"]), tolerance=1e-4)


def stacks(model: nn.Module) -> list[tuple[int, int]]:
    """Return which tensors hold the coefficients of a model's layers, and how often they were written to."""
    parameters = [
        side
        for layer in share_layers(model).values()
        for side in (layer.share_coefficients_out, layer.share_coefficients_in)
    ]
    return [(side.stack.data_ptr(), side.stack._version) for side in parameters]


@pytest.mark.parametrize("cast", [True, False])
def test_what_a_model_holds_is_not_loaded_again_unless_it_was_cast(
    cast: bool, subspace: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    """The Trainer casts it like this for an evaluation in bfloat16, and leaves it so."""
    model = subspace.apply(tiny_model("llama"))
    if cast:
        model.to(torch.bfloat16)
    before = stacks(model)
    load_tasks(model, subspace.state, held=subspace.state)
    for module, layer in share_layers(model).items():
        for task in subspace.tasks:
            expected = subspace.state.layers[module].coefficients_of(task)
            for found, stored in zip(
                (layer.share_coefficients_out[task], layer.share_coefficients_in[task]), expected, strict=True
            ):
                assert found.dtype == torch.float32 and torch.equal(found, stored)
    assert cast == (stacks(model) != before)
