"""Experts that a model keeps in one parameter: LoRAs of them can be read, applied, trained, and exported again."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from share_hf import ShareConfig, SharedSubspace, ShareTrainer
from share_hf.engines.checks import check_no_experts
from share_hf.format.experts import ORDERS, expert_matrices, expert_tensors, parameter_names, targets_of
from share_hf.subspace import LowRankUpdate
from share_hf.tuner import share_layers
from share_hf.tuner.experts import Experts

from ..continual.cases import arguments, language_task
from ..continual.cases import config as stream_config
from ..trees import edit_json, edit_tensors, files_of
from .cases import assert_close, gradients, learn, snapshot, trainable
from .matrix.models import fill


IDS = torch.arange(3, 15).reshape(3, 4)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module")
def pristine() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    experts = dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    config = MixtralConfig(vocab_size=64, **sizes, **experts, initializer_range=0.3, pad_token_id=0)
    return MixtralForCausalLM(config).eval()


@pytest.fixture
def base(pristine: MixtralForCausalLM) -> Callable[[], MixtralForCausalLM]:
    return lambda: copy.deepcopy(pristine)


class Bank(nn.Module):
    """Experts whose parameter is (experts, d, n), one of which the input chooses."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 6, 10))
        self.down_proj = nn.Parameter(torch.randn(3, 10, 5))

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.up_proj).tanh() @ self.down_proj)[x.sum().long() % 3]


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Bank()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x)


def lora_of(base: nn.Module, folder: Path, seed: int, **config: Any) -> Path:
    torch.manual_seed(seed)
    values = dict(r=2, lora_alpha=5, target_modules=["q_proj"], target_parameters=BOTH, init_lora_weights=False)
    get_peft_model(base, LoraConfig(**{**values, **config})).save_pretrained(folder)
    return folder


@pytest.fixture
def folders(base: Callable[[], nn.Module], tmp_path: Path) -> dict[str, Path]:
    options: dict[str, dict[str, Any]] = {
        "first": {},
        "other": {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {r".*gate_up_proj": 7}, "use_rslora": True},
        "experts-only": {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]},
        "one-parameter": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    }
    return {
        task: lora_of(base(), tmp_path / f"lora-{task}", seed, **config)
        for seed, (task, config) in enumerate(options.items())
    }


@pytest.fixture
def subspace(folders: dict[str, Path]) -> SharedSubspace:
    return SharedSubspace.from_adapters(folders, num_components=32, pseudo_rank=4, progress=False)


@torch.no_grad()
def logits(model: nn.Module, **kwargs: Any) -> Tensor:
    return model.eval()(input_ids=IDS, **kwargs).logits


def of_lora(base: nn.Module, folder: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(base, folder))


# ---- Adapters in and out --------------------------------------------------------------------------------------------


def test_adapters_compute_what_peft_computes_with_them(
    base: Callable[[], nn.Module], folders: dict[str, Path], subspace: SharedSubspace
) -> None:
    model = subspace.apply(base())
    for task, folder in folders.items():
        model.set_adapter(task)
        assert_close(logits(model), of_lora(base(), folder))
        assert (logits(model) - logits(base())).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))


def test_each_expert_is_a_module(base: Callable[[], nn.Module], folders: dict[str, Path]) -> None:
    subspace = SharedSubspace.from_adapters([folders["first"]], progress=False)
    names = {
        f"model.layers.{i}.mlp.experts.{p}.{e}"
        for i in (0, 1)
        for p in ("gate_up_proj", "down_proj")
        for e in range(4)
    }
    assert subspace.state.layouts.keys() == names
    assert subspace.state.layers.keys() - names == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    merged = PeftModel.from_pretrained(base(), folders["first"]).merge_and_unload()
    change = (merged.model.layers[1].mlp.experts.down_proj - base().model.layers[1].mlp.experts.down_proj).detach()
    for number in range(4):
        found = subspace.state.updates_of(subspace.tasks[0])[f"model.layers.1.mlp.experts.down_proj.{number}"]
        assert_close(found.dense(), change[number])


def test_an_export_is_what_came_in_and_comes_in_again(
    base: Callable[[], nn.Module], folders: dict[str, Path], subspace: SharedSubspace, tmp_path: Path
) -> None:
    again = {task: tmp_path / f"exported-{task}" for task in folders}
    for task, folder in folders.items():
        subspace.export_lora(task, again[task])
        assert_close(of_lora(base(), again[task]), of_lora(base(), folder))
        assert set(load_file(again[task] / "adapter_model.safetensors")) == set(
            load_file(folder / "adapter_model.safetensors")
        )
    second = SharedSubspace.from_adapters(again, num_components=32, pseudo_rank=4, progress=False)
    assert second.state.layouts == subspace.state.layouts
    for task in folders:
        for module, update in subspace.state.updates_of(task).items():
            assert_close(second.state.updates_of(task)[module].dense(), update.dense())


def test_a_tree_comes_back_whole_by_every_loader(
    base: Callable[[], nn.Module], subspace: SharedSubspace, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    subspace.save_pretrained(tree)
    expected = {task: logits(subspace.apply(base(), [task])) for task in subspace.tasks}
    loaded = SharedSubspace.from_pretrained(tree)
    assert torch.equal(logits(loaded.apply(base(), ["other"])), expected["other"])
    model = PeftModel.from_pretrained(base(), tree, "other", subfolder="tasks/other")
    for task in ("first", "one-parameter"):
        model.load_adapter(tree, task, subfolder=f"tasks/{task}")
    for task in model.peft_config:
        model.set_adapter(task)
        assert torch.equal(logits(model), expected[task])
    model.save_pretrained(tmp_path / "checkpoint")
    again = PeftModel.from_pretrained(base(), tmp_path / "checkpoint" / "first")
    assert torch.equal(logits(again), expected["first"])
    loaded.save_pretrained(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tree)


@pytest.mark.parametrize("safe_merge", [True, False])
def test_a_merge_is_taken_back(safe_merge: bool, base: Callable[[], nn.Module], subspace: SharedSubspace) -> None:
    model = subspace.apply(base(), ["first", "other"])
    expected = logits(model)
    model.merge_adapter(safe_merge=safe_merge)
    assert_close(logits(model), expected)
    with model.disable_adapter():
        assert_close(logits(model), logits(base()))
    model.merge_adapter(safe_merge=safe_merge)
    model.unmerge_adapter()
    assert_close(logits(model), expected)
    plain = model.merge_and_unload()
    assert_close(logits(plain), expected)
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in base().named_parameters()}
    assert torch.equal(logits(subspace.apply(base()).unload()), logits(base()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_restores_the_weights_to_the_bit(
    dtype: torch.dtype, base: Callable[[], nn.Module], subspace: SharedSubspace
) -> None:
    model = subspace.apply(base().to(dtype), ["first", "other", "one-parameter"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter(["other"], keep_base=True)
    model.merge_adapter(["first", "one-parameter"], keep_base=True)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.rpartition(".")[2] for name in changed} >= {"gate_up_proj", "down_proj"}
    copied = copy.deepcopy(model)
    for each in (model, copied):
        each.unmerge_adapter()
        assert all(torch.equal(tensor, before[name]) for name, tensor in each.state_dict().items())


def test_tasks_come_and_go(base: Callable[[], nn.Module], subspace: SharedSubspace) -> None:
    model = subspace.apply(base())
    expected = logits(subspace.apply(base(), ["other"]))
    for task in ("first", "experts-only", "one-parameter"):
        model.delete_adapter(task)
    model.set_adapter("other")
    assert torch.equal(logits(model), expected)
    model.add_weighted_adapter(["other"], [1.0], "sum")
    model.set_adapter("sum")
    assert_close(logits(model), expected)


@pytest.mark.parametrize("dtype", ["float32", "4bit"])
def test_each_expert_has_a_rank_of_its_own(
    dtype: str, base: Callable[[], nn.Module], folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = dict(num_components=8, pseudo_rank=3, coefficient_dtype=dtype, tolerance=0.5)
    made = SharedSubspace.from_adapters(folders, **settings, progress=False)
    made.rename_task("other", "another")
    made.save_pretrained(tmp_path / "tree")
    loaded = SharedSubspace.from_pretrained(tmp_path / "tree")
    assert loaded.state.layouts == made.state.layouts
    model = loaded.apply(base())
    ranks = {
        layer.share_coefficients_in[task].shape[1] for layer in share_layers(model).values() for task in layer.tasks
    }
    assert len(ranks) > 1
    by_peft = PeftModel.from_pretrained(base(), tmp_path / "tree", subfolder="tasks/another", adapter_name="another")
    for task in loaded.tasks:
        loaded.export_lora(task, tmp_path / task)
        model.set_adapter(task)
        assert_close(logits(model), of_lora(base(), tmp_path / task))
    model.set_adapter("another")
    assert_close(logits(by_peft), logits(model))
    before = made.report()
    made.refit(progress=False)
    assert max(task.drift for task in made.report().tasks) <= max(task.drift for task in before.tasks) + 1e-6


def test_sums_of_experts_are_one_lora_and_one_adapter(
    base: Callable[[], nn.Module], subspace: SharedSubspace, tmp_path: Path
) -> None:
    weights = {"first": 0.5, "one-parameter": -1.0, "experts-only": 2.0}
    assert subspace.export_combined(weights, tmp_path / "sum", rank=16) < 1e-5
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert not any("experts" in name for name in config["target_modules"])
    model = subspace.apply(base())
    expected = base()
    for task, weight in weights.items():
        for module, update in subspace.state.updates_of(task).items():
            name, _, number = module.rpartition(".")
            of_expert = number.isdecimal()
            weights_of = expected.get_parameter(name if of_expert else f"{module}.weight").data
            (weights_of[int(number)] if of_expert else weights_of).add_(weight * update.dense())
    assert_close(of_lora(base(), tmp_path / "sum"), logits(expected), 1e-4)
    model.base_model.add_weighted_adapter(["first", "one-parameter"], [1.0, -1.0], "difference")
    model.set_adapter("difference")
    for layer in share_layers(model).values():
        found = layer.get_delta_weight("difference") if layer.has_task("difference") else torch.zeros(())
        given = {"first": 1.0, "one-parameter": -1.0}
        parts = [weight * layer.get_delta_weight(task) for task, weight in given.items() if layer.has_task(task)]
        if parts:
            values = torch.linalg.svdvals(sum(parts))
            assert (found - sum(parts)).norm() <= values[4:].norm() + 1e-4 * values.norm()
    assert_close(logits(model), logits(copy.deepcopy(model).merge_and_unload()), 1e-4)


@pytest.mark.parametrize("targets", [["up_proj", "down_proj"], ["experts.up_proj"]])
def test_transposed_parameters_compute_as_pefts(targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Transposed(), torch.randn(4, 6)
    folder = lora_of(copy.deepcopy(base), tmp_path / "lora", 1, target_modules=[], target_parameters=targets)
    subspace = SharedSubspace.from_adapters([folder], progress=False)
    model = subspace.apply(copy.deepcopy(base))
    expected = PeftModel.from_pretrained(copy.deepcopy(base), folder)(x)
    assert_close(model(x), expected)
    assert (expected - base(x)).abs().max() > 0.1
    assert_close(model.merge_and_unload()(x), expected)
    subspace.export_lora("lora", tmp_path / "exported")
    assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "exported")(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_smaller_type_rounds_and_no_more(
    dtype: torch.dtype, base: Callable[[], nn.Module], subspace: SharedSubspace
) -> None:
    model = subspace.apply(base().to(dtype))
    assert logits(model).dtype == dtype
    merged = subspace.apply(base()).merge_and_unload().to(dtype)
    assert_close(logits(model), logits(merged), tolerance=0.1)


# ---- Training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["coefficients", "adapt", "init"])
def test_it_is_trained(phase: str, base: Callable[[], nn.Module]) -> None:
    config = ShareConfig(
        num_components=6, pseudo_rank=2, target_modules=[], target_parameters=BOTH, phase=phase, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base(), config, "one")
    batch = {"input_ids": IDS, "labels": IDS}
    assert len(trainable(model)) == 16 * {"coefficients": 2, "adapt": 4, "init": 2}[phase]
    assert all("share_" in name for name in trainable(model))
    assert all(gradient.isfinite().all() for gradient in gradients(model, batch).values())
    losses = learn(model, batch, steps=8)
    assert losses[-1] < losses[0] - 0.01
    layers = share_layers(model)
    changed = base()
    with torch.no_grad():
        for name, layer in layers.items():
            parameter, _, number = name.rpartition(".")
            changed.get_parameter(parameter)[int(number)] += layer.factors("one").dense()
    assert_close(logits(model), logits(changed))


def test_gradients_are_those_of_the_update_in_the_weights() -> None:
    torch.manual_seed(0)
    base, x = Transposed(), torch.randn(4, 6)
    config = ShareConfig(num_components=4, pseudo_rank=2, target_modules=[], target_parameters=["up_proj"])
    model = get_peft_model(copy.deepcopy(base), config, "one")
    fill(model, "one")
    model.train()(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in trainable(model).items()}
    model.zero_grad()
    layers = [share_layers(model)[f"experts.up_proj.{number}"] for number in range(3)]
    weight = base.experts.up_proj.detach() + torch.stack([layer.factors("one").dense().T for layer in layers])
    torch.func.functional_call(base, {"experts.up_proj": weight}, x).square().sum().backward()
    for name, parameter in trainable(model).items():
        assert_close(found[name], parameter.grad)


def test_checkpointed_it_has_the_same_gradients(base: Callable[[], nn.Module]) -> None:
    config = ShareConfig(num_components=6, pseudo_rank=2, target_modules=[], target_parameters=BOTH)
    model = get_peft_model(base(), config, "one")
    fill(model, "one")
    batch = {"input_ids": IDS, "labels": IDS}
    expected = gradients(model, batch)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    for name, gradient in gradients(model, batch).items():
        assert_close(gradient, expected[name])


def test_compiled_it_computes_the_same(base: Callable[[], nn.Module], subspace: SharedSubspace) -> None:
    model = subspace.apply(base(), ["first"])
    expected = logits(model)
    assert_close(logits(torch.compile(model, backend="eager")), expected)


def test_a_stream_is_learned_in_experts(base: Callable[[], nn.Module], tmp_path: Path) -> None:
    tasks = {name: language_task(seed) for seed, name in enumerate(("first", "other"))}
    config = stream_config(["q_proj"], target_parameters=["gate_up_proj"], task_type="CAUSAL_LM")
    trainer = ShareTrainer(base(), arguments(tmp_path / "out"), config, tasks)
    trainer.train()
    trainer.args.method = "coefficients"
    trainer.learn_task("last", language_task(2)["train"])
    assert len(trainer.subspace.state.layouts) == 8
    loaded = SharedSubspace.from_pretrained(tmp_path / "out" / "subspace")
    trainer.model.set_adapter("last")
    assert_close(logits(loaded.apply(base(), ["last"])), logits(trainer.model))


# ---- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "error", "found"),
    [
        ({"dropout": 0.1}, ValueError, "dropout is 0.1 for 'gate_up_proj', expected 0"),
        (
            {"target_parameters": ["experts.down_proj", "mlp.gate.weight"]},
            TypeError,
            r"'model.layers.0.mlp.gate.weight' is a torch.float32 parameter \(4, 16\) on cpu, expected the weights",
        ),
    ],
)
@pytest.mark.parametrize("second", [False, True], ids=["first-task", "second-task"])
def test_what_cannot_be_adapted_is_refused_and_the_model_left_as_it_was(
    second: bool, config: dict[str, Any], error: type[Exception], found: str, base: Callable[[], nn.Module]
) -> None:
    model = base()
    targets = dict(target_modules=["q_proj"], target_parameters=BOTH)
    if second:
        model = get_peft_model(model, ShareConfig(target_modules=[], target_parameters=["down_proj"]), "one")
    before = snapshot(model)
    with pytest.raises(error, match=found):
        if second:
            model.add_adapter("two", ShareConfig(**{**targets, **config}))
        else:
            get_peft_model(model, ShareConfig(**{**targets, **config}))
    assert snapshot(model) == before


def test_one_name_for_a_list_is_refused() -> None:
    with pytest.raises(ValueError, match="target_parameters is 'down_proj', expected a list of names"):
        ShareConfig(target_parameters="down_proj")


def test_quantized_experts_are_refused(base: Callable[[], nn.Module]) -> None:
    model = base()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match=r"'model.layers.1.mlp.experts.down_proj' is a torch.float8_e4m3fn parameter"):
        get_peft_model(model, ShareConfig(target_modules=[], target_parameters=["down_proj"]))
    assert not any(isinstance(module, Experts) for module in model.modules())


def test_a_mixed_batch_is_refused(base: Callable[[], nn.Module], subspace: SharedSubspace) -> None:
    model = subspace.apply(base())
    with pytest.raises(ValueError, match="adapter_names cannot mix tasks of experts in one parameter"):
        logits(model, adapter_names=["first", "other", "__base__"])


def test_engines_that_divide_parameters_are_refused(base: Callable[[], nn.Module], subspace: SharedSubspace) -> None:
    check_no_experts(base(), "ZeRO-3")
    with pytest.raises(ValueError, match=r"ZeRO-3 divides the parameters of '.*layers.0.mlp.experts', .*ZeRO-2"):
        check_no_experts(subspace.apply(base()), "ZeRO-3")


def test_pefts_conversion_says_that_it_makes_no_such_lora(
    base: Callable[[], nn.Module], subspace: SharedSubspace
) -> None:
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(subspace.apply(base()), rank=2)


def test_a_model_with_other_experts_is_refused(
    base: Callable[[], nn.Module], subspace: SharedSubspace, tmp_path: Path
) -> None:
    subspace.save_pretrained(tmp_path / "tree")
    fewer = MixtralForCausalLM(MixtralConfig(**{**base().config.to_dict(), "num_local_experts": 2}))
    missing = r"'model.layers.0.mlp.experts.(gate_up|down)_proj.[23]', which MixtralForCausalLM does not have"
    before = snapshot(fewer)
    with pytest.raises(ValueError, match=missing):
        subspace.apply(fewer)
    with pytest.raises(ValueError, match=missing):
        PeftModel.from_pretrained(fewer, tmp_path / "tree", subfolder="tasks/first")
    assert snapshot(fewer) == before
    more = MixtralForCausalLM(MixtralConfig(**{**base().config.to_dict(), "num_local_experts": 6}))
    before = snapshot(more)
    with pytest.raises(ValueError, match=r"no basis for 'model.layers.0.mlp.experts.gate_up_proj.4'"):
        subspace.apply(more, ["first"])
    assert snapshot(more) == before


LAYER = "base_model.model.model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda t: t.pop(f"{LAYER}.lora_B.weight"), r"'model.layers.0.mlp.experts.down_proj' has no lora_B"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(7, 24)}), r"\(7, 24\) and \(16, 8\), expected"),
        (
            lambda t: t.update(
                {f"{LAYER}.lora_A.weight": torch.ones(2, 24), f"{LAYER}.lora_B.weight": torch.ones(16, 2)}
            ),
            "of more than one expert",
        ),
        (
            lambda t: [t.pop(f"{LAYER}.base_layer.lora_{side}.weight") for side in "AB"],
            r"'model.layers.0.mlp.experts' has LoRAs of 1 parameters, .* names \['down_proj', 'gate_up_proj'\]",
        ),
    ],
)
def test_half_a_lora_is_refused_by_name(change: Any, found: str, folders: dict[str, Path]) -> None:
    edit_tensors(folders["first"] / "adapter_model.safetensors", change)
    with pytest.raises(ValueError, match=found):
        SharedSubspace.from_adapters([folders["first"]], progress=False)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"target_parameters": ["experts.w1", "experts.w2"]}, r"names \['w1', 'w2'\], expected one, or a pair among"),
        (
            {"target_parameters": "experts"},
            "target_parameters is 'experts', which is not valid there in a PEFT configuration",
        ),
        (
            {"target_parameters": [".*"]},
            r"target_parameters is \['\.\*'\], which is not valid there in a PEFT configuration",
        ),
        ({"r": None}, "r of 'model.layers.0.mlp.experts.down_proj' is None, expected a positive integer"),
        ({"rank_pattern": [2]}, r"rank_pattern is \[2\], expected an object"),
        ({"rank_pattern": {"down_proj": 0}}, "r of 'model.layers.0.mlp.experts.down_proj' is 0, expected a positive"),
    ],
)
def test_a_configuration_that_does_not_say_is_refused(
    values: dict[str, Any], found: str, folders: dict[str, Path]
) -> None:
    edit_json(folders["first"] / "adapter_config.json", lambda config: config.update(values))
    with pytest.raises(ValueError, match=found):
        SharedSubspace.from_adapters([folders["first"]], progress=False)


def test_an_export_without_an_expert_is_refused() -> None:
    update = LowRankUpdate(torch.ones(3, 1), torch.ones(2, 1))
    with pytest.raises(
        ValueError, match=r"'experts.down_proj.1' is missing, expected all experts before the last one"
    ):
        expert_tensors({"experts.down_proj.0": update, "experts.down_proj.2": update}, 1)


# ---- Mathematics and names ------------------------------------------------------------------------------------------


@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_tensors_of_a_lora_and_matrices_are_the_same_updates(count: int, n: int, d: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    updates = {
        f"m.experts.{leaf}.{number}": LowRankUpdate(
            *(torch.randn(rows, rank, generator=generator, dtype=torch.float64) for rows in (n, d))
        )
        for leaf in ORDERS[0]
        for number in range(count)
    }
    tensors = expert_tensors(updates, rank + 1)
    assert targets_of(updates, ["experts.gate_up_proj", "down_proj"]) == ["experts.gate_up_proj", "down_proj"]
    assert targets_of(updates, ["down_proj"]) == ["m.experts.down_proj", "m.experts.gate_up_proj"]
    modules = {name.rpartition(".lora_")[0] for name in tensors}
    names = parameter_names(Path("file"), modules, ["gate_up_proj", "down_proj"])
    assert names == {"m.experts": "m.experts.down_proj", "m.experts.base_layer": "m.experts.gate_up_proj"}
    for module, parameter in names.items():
        pair = {side: tensors[f"{module}.lora_{side}.weight"] for side in "AB"}
        for number, (a, b) in enumerate(expert_matrices(Path("file"), parameter, pair, rank + 1)):
            assert_close(b @ a, updates[f"{parameter}.{number}"].dense(), tolerance=1e-12)
        # By PEFT's own formula.
        a, b = pair["A"].reshape(count, rank + 1, d), pair["B"].reshape(n, rank + 1, count)
        expected = torch.stack([updates[f"{parameter}.{number}"].dense() for number in range(count)])
        assert_close(torch.einsum("o r e, e r i -> e o i", b, a), expected, tolerance=1e-12)


def test_modules_of_transformers_define_their_parameters_in_the_known_orders() -> None:
    folder = Path(transformers.__file__).parent / "models"
    found = set()
    for path in folder.glob("*/modeling_*.py"):
        for module in re.split(r"^class ", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            names = re.findall(r"self\.(\w+_proj) = nn\.Parameter\(", module)
            if names:
                found.add(tuple(dict.fromkeys(names)))
    assert ("gate_up_proj", "down_proj") in found
    assert {order for order in found if len(order) == 2} <= set(ORDERS)
