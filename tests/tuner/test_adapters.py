"""Several tasks on one model: adding, choosing, disabling and deleting them; names and targets."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BertModel, PreTrainedModel

from share_hf import ShareConfig
from share_hf.tuner import share_layers

from .cases import (
    BERT,
    LLAMA,
    Case,
    K,
    P,
    an_adapted_layer,
    assert_close,
    assert_differ,
    each_architecture,
    gradients,
    learn,
    logits,
    randomize,
    snapshot,
    task_parameters,
    trainable,
    with_tasks,
)


@each_architecture
def test_a_task_computes_the_same_alone_and_among_others(
    case: Case, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    alone = with_tasks(tiny_model(case.architecture), case, "one")
    among = with_tasks(tiny_model(case.architecture), case, "one", "two", "three")
    assert torch.equal(logits(among, case.batch()), logits(alone, case.batch()))
    among.set_adapter("two")
    assert_differ(logits(among, case.batch()), logits(alone, case.batch()))
    among.set_adapter("one")
    assert torch.equal(logits(among, case.batch()), logits(alone, case.batch()))


def test_only_the_active_task_is_trained(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
    for task, other in (("two", "one"), ("one", "two")):
        model.set_adapter(task)
        assert set(trainable(model)) == set(task_parameters(model, task))
        before = {name: parameter.clone() for name, parameter in task_parameters(model, other).items()}
        learn(model, LLAMA.batch(), steps=2)
        assert all(torch.equal(parameter, before[name]) for name, parameter in task_parameters(model, other).items())


def test_adding_a_task_does_not_activate_it(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one")
    expected = logits(model, LLAMA.batch())
    model.add_adapter("two", LLAMA.config())
    assert model.active_adapters == ["one"]
    assert set(trainable(model)) == set(task_parameters(model, "one"))
    assert torch.equal(logits(model, LLAMA.batch()), expected)


@each_architecture
def test_disabled_tasks_leave_the_base_model(case: Case, tiny_model: Callable[[str], PreTrainedModel]) -> None:
    base = tiny_model(case.architecture)
    expected = logits(base, case.batch())
    model = with_tasks(base, case, "one")
    adapted = logits(model, case.batch())
    with model.disable_adapter():
        assert torch.equal(logits(model, case.batch()), expected)
        assert not trainable(model)
    assert torch.equal(logits(model, case.batch()), adapted)
    assert_differ(adapted, expected)
    assert set(trainable(model)) == set(task_parameters(model, "one"))


def test_peft_reports_the_status_of_the_layers(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
    status = model.get_model_status()
    assert status.adapter_model_type == "ShareModel"
    assert status.num_adapter_layers == len(share_layers(model)) == 6
    assert (status.active_adapters, status.available_adapters) == (["one"], ["one", "two"])
    assert status.requires_grad == {"one": True, "two": False}
    assert status.devices == {"one": ["cpu"], "two": ["cpu"]}


@pytest.mark.parametrize("deleted", ["one", "two"])
def test_a_deleted_task_leaves_the_others_as_they_are(
    deleted: str, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
    (kept,) = {"one", "two"} - {deleted}
    model.set_adapter(kept)
    expected = logits(model, LLAMA.batch())
    model.delete_adapter(deleted)
    assert list(model.peft_config) == [kept]
    assert not task_parameters(model, deleted)
    assert torch.equal(logits(model, LLAMA.batch()), expected)


def test_deleting_the_active_task_activates_another(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
    model.set_adapter("two")
    expected = logits(model, LLAMA.batch())
    model.set_adapter("one")
    with pytest.warns(UserWarning, match="one was active which is now deleted. Setting active adapter to two"):
        model.delete_adapter("one")
    assert model.active_adapter == "two"
    assert torch.equal(logits(model, LLAMA.batch()), expected)


def test_deleting_the_last_task_leaves_the_base_model(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    base = tiny_model("llama")
    expected = logits(base, LLAMA.batch())
    model = with_tasks(base, LLAMA, "one")
    model.delete_adapter("one")
    assert model.active_adapters == []
    assert torch.equal(logits(model.base_model, LLAMA.batch()), expected)


def test_a_name_can_be_used_again_after_its_task_was_deleted(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
    base_logits = logits(model.unload(), LLAMA.batch())
    model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
    logits(model, LLAMA.batch())
    model.delete_adapter("one")
    model.add_adapter("one", LLAMA.config())
    model.set_adapter("one")
    assert torch.equal(logits(model, LLAMA.batch()), base_logits)


@pytest.mark.parametrize("name", ["a.b", "keys", "update", "type", "training", "_parameters", ""])
@pytest.mark.parametrize("shares_its_config", [False, True])
def test_a_name_that_no_parameter_dict_can_hold_is_refused_and_the_model_left_as_it_was(
    name: str, shares_its_config: bool, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    config = LLAMA.config()
    model = get_peft_model(tiny_model("llama"), config, adapter_name="one")
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"adapter name '{name}' cannot be a key of torch.nn.ParameterDict"):
        model.add_adapter(name, config if shares_its_config else LLAMA.config())
    assert snapshot(model) == before
    model.train()


def test_the_first_task_may_not_have_such_a_name_either(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    base = tiny_model("llama")
    before = snapshot(base)
    with pytest.raises(ValueError, match="adapter name 'keys' cannot be a key"):
        get_peft_model(base, LLAMA.config(), adapter_name="keys")
    assert snapshot(base) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_components": 16}, "num_components of adapter 'two' is 16, expected 8 as adapter 'one' has"),
        ({"pseudo_rank": 2}, "pseudo_rank of adapter 'two' is 2, expected 4 as adapter 'one' has"),
    ],
)
def test_tasks_of_one_model_have_the_same_dimensions(
    values: dict[str, int], message: str, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("two", LLAMA.config(**values))
    assert snapshot(model) == before


@pytest.mark.parametrize("first", [True, False], ids=["first-task", "second-task"])
@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            {"target_modules": ["q_proj", "rotary_emb"]},
            TypeError,
            "'model.rotary_emb' is a LlamaRotaryEmbedding, expected torch.nn.Linear",
        ),
        (
            {"target_modules": ["q_proj", "input_layernorm"]},
            TypeError,
            "'model.layers.0.input_layernorm' is a LlamaRMSNorm, expected torch.nn.Linear",
        ),
        ({"target_modules": ["nowhere"]}, ValueError, r"Target modules \{'nowhere'\} not found in the base model"),
    ],
    ids=["positions", "norm", "no-match"],
)
def test_a_task_that_does_not_fit_is_refused_and_the_model_left_as_it_was(
    first: bool,
    values: dict[str, Any],
    error: type[Exception],
    message: str,
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    model: Any = tiny_model("llama")
    if not first:
        components = {"num_components": values.get("num_components", K)}
        model = with_tasks(model, LLAMA, "one", target_modules=["q_proj"], **components)
    before, expected = snapshot(model), logits(model, LLAMA.batch())
    with pytest.raises(error, match=message):
        if first:
            get_peft_model(model, LLAMA.config(**values))
        else:
            model.add_adapter("two", LLAMA.config(**values, inference_mode=True))
    assert snapshot(model) == before
    assert torch.equal(logits(model, LLAMA.batch()), expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"target_modules": None}, ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]),
        ({"target_modules": r".*\.1\.self_attn\.(k|v)_proj"}, ["1.k_proj", "1.v_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, ["1.q_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, ["0.q_proj"]),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}, ["0.q_proj", "1.q_proj"]),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"}, ["1.q_proj"]),
    ],
    ids=["defaults", "regex", "layers_to_transform", "layers_pattern", "exclude_modules", "exclude-regex"],
)
def test_targets_are_chosen_as_for_lora(
    values: dict[str, Any], expected: list[str], tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = get_peft_model(tiny_model("llama"), LLAMA.config(**values))
    assert sorted(share_layers(model)) == [f"model.layers.{name.replace('.', '.self_attn.')}" for name in expected]


@pytest.mark.parametrize(
    ("architecture", "a_layer", "untouched"),
    [("llama", 7, "lm_head"), ("gpt2", 4, "lm_head"), ("bert", 6, "classifier")],
)
def test_all_linear_leaves_out_the_head(
    architecture: str, a_layer: int, untouched: str, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    task_type = "SEQ_CLS" if architecture == "bert" else "CAUSAL_LM"
    config = ShareConfig(num_components=K, pseudo_rank=P, target_modules="all-linear", task_type=task_type)
    names = list(share_layers(get_peft_model(tiny_model(architecture), config)))
    in_layers = [name for name in names if any(f".{i}." in name for i in (0, 1))]
    assert len(in_layers) == 2 * a_layer
    assert not [name for name in names if untouched in name]


def test_a_task_may_adapt_other_modules_than_the_first(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    base = tiny_model("llama")
    model = get_peft_model(copy.deepcopy(base), LLAMA.config(target_modules=["q_proj"]), adapter_name="one")
    model.add_adapter("two", LLAMA.config(target_modules=["k_proj"]))
    model.set_adapter("two")
    randomize(model, "two")
    assert {name.rsplit(".", 3)[-3] for name in trainable(model)} == {"k_proj"}
    with_two = logits(model, LLAMA.batch())
    assert_differ(with_two, logits(base, LLAMA.batch()))
    model.set_adapter("one")
    assert torch.equal(logits(model, LLAMA.batch()), logits(base, LLAMA.batch()))
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(logits(model, LLAMA.batch()), with_two)


@each_architecture
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_copied_model_computes_the_same_and_is_independent(
    case: Case,
    duplicate: Callable[[PeftModel], PeftModel],
    mode: Callable[[], Any],
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    model = with_tasks(tiny_model(case.architecture), case, "one", "two")
    with mode():
        expected = model(input_ids=case.batch()["input_ids"]).logits.clone()
    copied = duplicate(model)
    assert torch.equal(logits(copied, case.batch()), expected)
    assert gradients(copied, case.batch()).keys() == trainable(copied).keys()
    learn(copied, case.batch(), steps=2)
    assert_differ(logits(copied, case.batch()), expected)
    assert torch.equal(logits(model, case.batch()), expected)


def test_state_dict_keys_name_module_side_and_task(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", phase="adapt")
    prefix = "base_model.model.model.layers.1.self_attn.v_proj"
    assert sorted(name for name in model.state_dict() if name.startswith(f"{prefix}.share_")) == [
        f"{prefix}.share_coefficients_in.one",
        f"{prefix}.share_coefficients_out.one",
        f"{prefix}.share_temporary_in.one",
        f"{prefix}.share_temporary_out.one",
    ]


def test_a_model_that_is_not_of_transformers_can_be_adapted() -> None:
    base = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)).eval()
    config = ShareConfig(num_components=6, pseudo_rank=2, target_modules=["0", "2"])
    model = get_peft_model(base, config)
    x = torch.randn(5, 12)
    before = model(x).detach()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert model(x).square().sum() < before.square().sum()
    assert torch.equal(model.unload()(x), before)


def test_an_encoder_without_a_head_can_be_adapted(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    encoder = tiny_model("bert").bert
    assert isinstance(encoder, BertModel)
    config = ShareConfig(num_components=K, pseudo_rank=P, task_type="FEATURE_EXTRACTION")
    expected = encoder(BERT.batch()["input_ids"]).last_hidden_state
    model = get_peft_model(encoder, config)
    assert torch.equal(model(BERT.batch()["input_ids"]).last_hidden_state, expected)


def test_loading_and_using_a_task_warns_of_nothing(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*Could not find a config file")  # the base model has no folder
        with_tasks(tiny_model("llama"), LLAMA, "two").save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "two", adapter_name="two")
        model.load_adapter(tmp_path / "two", "three")
        assert_close(logits(model, LLAMA.batch(), adapter_names=["three"] * 4), logits(model, LLAMA.batch()))
        layer = an_adapted_layer(model)
        assert layer.tasks == ["three", "two"]
