"""`adapter_names=[...]`: every sample of a batch has its own task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from share_hf import ShareConfig
from share_hf.tuner import ShareLayer, share_layers
from share_hf.tuner.rows import BatchCoefficients

from .cases import (
    BERT,
    LLAMA,
    Case,
    K,
    P,
    assert_close,
    assert_differ,
    each_architecture,
    logits,
    randomize,
    with_tasks,
)


NAMES = ["one", "two", "__base__", "one", "three", "two"]


def one_by_one(model: PeftModel, names: Sequence[str], compute: Callable[[PeftModel, int], Tensor]) -> list[Tensor]:
    """Return the result for each sample alone, with its task as the active one."""
    active, results = model.active_adapter, []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                results.append(compute(model, i))
        else:
            model.set_adapter(name)
            results.append(compute(model, i))
    model.set_adapter(active)
    return results


@each_architecture
@pytest.mark.parametrize("names", [NAMES, ["two"] * 6, ["__base__"] * 6], ids=["mixed", "one-task", "base-only"])
def test_each_sample_gets_what_its_task_computes_alone(
    case: Case, names: list[str], tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = with_tasks(tiny_model(case.architecture), case, "one", "two", "three")
    ids = case.batch(size=6)["input_ids"]
    expected = torch.cat(one_by_one(model, names, lambda model, i: logits(model, {"input_ids": ids[i : i + 1]})))
    found = logits(model, {"input_ids": ids}, adapter_names=names)
    assert_close(found, expected)
    assert model.active_adapter == "one"
    assert len({tuple(row.flatten().tolist()) for row in found}) == 6


def test_gradients_flow_through_a_mixed_batch_in_eval_mode(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
    model.set_requires_grad(["one", "two"])
    ids = LLAMA.batch(size=2)["input_ids"]
    model(input_ids=ids, adapter_names=["one", "two"]).logits.square().sum().backward()
    mixed = {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    model.zero_grad()
    for i, task in enumerate(["one", "two"]):
        model.set_adapter(task)
        model(input_ids=ids[i : i + 1]).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in mixed:
            assert_close(mixed[name], parameter.grad)


def test_tasks_may_adapt_different_modules(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = get_peft_model(tiny_model("llama"), LLAMA.config(target_modules=["q_proj"]), adapter_name="one")
    model.add_adapter("two", LLAMA.config(target_modules=["q_proj", "k_proj"]))
    model.add_adapter("three", LLAMA.config(target_modules=["down_proj"]))
    for i, task in enumerate(["one", "two", "three"]):
        randomize(model, task, seed=i)
    model.eval()
    ids = LLAMA.batch(size=6)["input_ids"]
    expected = one_by_one(model, NAMES, lambda model, i: logits(model, {"input_ids": ids[i : i + 1]}))
    assert_close(logits(model, {"input_ids": ids}, adapter_names=NAMES), torch.cat(expected))


def test_a_batch_of_vectors_will_do() -> None:
    base = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    config = ShareConfig(num_components=6, pseudo_rank=2, target_modules=["0", "2"])
    model = get_peft_model(base, config, adapter_name="one")
    for i, task in enumerate(["two", "three"]):
        model.add_adapter(task, config)
        randomize(model, task, seed=i)
    model.eval()
    x = torch.randn(6, 12)
    with torch.no_grad():
        expected = torch.cat(one_by_one(model, NAMES, lambda model, i: model(x[i : i + 1])))
        found = model(x, adapter_names=NAMES)
    assert_close(found, expected)
    assert_differ(found[1], model(x)[1].detach())


def test_images_of_more_dimensions_will_do() -> None:
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(12, 16)),
        ShareConfig(num_components=6, pseudo_rank=2, target_modules=["0"]),
        adapter_name="one",
    )
    model.add_adapter("two", ShareConfig(num_components=6, pseudo_rank=2, target_modules=["0"]))
    randomize(model, "one", seed=0)
    randomize(model, "two", seed=1)
    model.eval()
    x, names = torch.randn(3, 5, 4, 12), ["two", "__base__", "one"]
    with torch.no_grad():
        expected = torch.cat(one_by_one(model, names, lambda model, i: model(x[i : i + 1])))
        assert_close(model(x, adapter_names=names), expected)


@pytest.mark.parametrize(
    "generation",
    [{}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False}, {"num_beams": 4, "num_return_sequences": 2}],
    ids=["greedy", "beams", "uncached", "several"],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_generated_text_is_that_of_each_task_alone(
    architecture: str, generation: dict[str, Any], tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "t5": ["q", "v", "wo"]}[architecture]
    case = Case(architecture, tuple(targets), "SEQ_2_SEQ_LM" if architecture == "t5" else "CAUSAL_LM")
    model = with_tasks(tiny_model(architecture), case, "one", "two", "three")
    ids = case.batch(size=6)["input_ids"]
    options: dict[str, Any] = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, **generation)

    def generate(model: PeftModel, i: int) -> Tensor:
        alone = ids[i : i + 1]
        return model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **options)

    expected = torch.cat(one_by_one(model, NAMES, generate))
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=NAMES, **options)
    assert torch.equal(found, expected)
    base = [generate(model, i) for i in range(6)]
    assert not torch.equal(torch.cat(base), expected), "the tasks make no difference, so nothing was tested"


class TestRefusals:
    def test_unknown_names(self, tiny_model: Callable[[str], PreTrainedModel]) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
        with pytest.raises(ValueError, match=r"adapter_names has \['typo'\], expected names among \['one', 'two'\]"):
            logits(model, LLAMA.batch(), adapter_names=["one", "two", "typo", "__base__"])

    def test_unknown_names_with_those_that_may_be_meant(self, tiny_model: Callable[[str], PreTrainedModel]) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one", "two", "something_else")
        with pytest.raises(ValueError, match=r"has \['on', 'too'\], expected names among \['one', 'two'\]"):
            logits(model, LLAMA.batch(), adapter_names=["on", "two", "too", "on"])
        with pytest.raises(ValueError, match="adapter_names is 'one', expected a list"):
            logits(model, LLAMA.batch(), adapter_names="one")

    @pytest.mark.parametrize("number", [3, 5])
    def test_more_or_fewer_names_than_samples(self, number: int, tiny_model: Callable[[str], PreTrainedModel]) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
        with pytest.raises(
            ValueError, match=rf"{number} adapter_names for a batch of 4, expected one for each sample"
        ):
            logits(model, LLAMA.batch(size=4), adapter_names=["one"] * number)

    def test_training_mode(self, tiny_model: Callable[[str], PreTrainedModel]) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one", "two").train()
        with pytest.raises(ValueError, match=r"\['__base__', 'two'\] in training mode.*\['one'\].*together="):
            logits(model, LLAMA.batch(), adapter_names=["one", "two", "one", "__base__"])

    def test_merged_tasks(self, tiny_model: Callable[[str], PreTrainedModel]) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"cannot be mixed while adapters are merged, call unmerge_adapter"):
            logits(model, LLAMA.batch(), adapter_names=["one"] * 4)

    @pytest.mark.parametrize("phase", ["adapt", "init"])
    def test_a_task_that_is_not_in_the_subspace_yet(
        self, phase: str, tiny_model: Callable[[str], PreTrainedModel]
    ) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one")
        model.add_adapter("new", LLAMA.config(phase=phase))
        with pytest.raises(ValueError, match="task 'new' is still being adapted, merge it before using it"):
            logits(model, LLAMA.batch(), adapter_names=["one", "new", "one", "one"])

    def test_leave_no_hook_behind(self, tiny_model: Callable[[str], PreTrainedModel]) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
        expected = logits(model, LLAMA.batch())
        with pytest.raises(ValueError, match="expected one for each sample"):
            logits(model, LLAMA.batch(), adapter_names=["two"])
        assert torch.equal(logits(model, LLAMA.batch()), expected)
        assert not [layer for layer in share_layers(model).values() if layer._forward_pre_hooks]


def test_disabled_tasks_stay_disabled(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
    with model.disable_adapter():
        found = logits(model, LLAMA.batch(), adapter_names=["one", "two", "one", "two"])
    assert torch.equal(found, logits(model.unload(), LLAMA.batch()))


def test_heads_are_mixed_with_the_tasks_they_belong_to(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("bert"), BERT, "one", "two", "three", task_type="SEQ_CLS")
    with torch.no_grad():
        for i, head in enumerate(model.base_model.model.classifier.modules_to_save.values()):
            head.weight.mul_(i + 2)
    ids = BERT.batch(size=6)["input_ids"]
    expected = torch.cat(one_by_one(model, NAMES, lambda model, i: logits(model, {"input_ids": ids[i : i + 1]})))
    assert_close(logits(model, {"input_ids": ids}, adapter_names=NAMES), expected)


def test_the_basis_is_applied_once_whatever_the_number_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [f"task_{i}" for i in range(5)]
    config = ShareConfig(num_components=K, pseudo_rank=P, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), config, adapter_name=tasks[0])
    for i, task in enumerate(tasks[1:]):
        model.add_adapter(task, config)
        randomize(model, task, seed=i)
    model.eval()

    def refuse(*_: Any) -> None:
        raise AssertionError("factors were formed for a task")

    monkeypatch.setattr(ShareLayer, "factors", refuse)
    with torch.no_grad():
        assert model(torch.randn(5, 3, 64), adapter_names=tasks).shape == (5, 3, 32)


@pytest.mark.parametrize("tokens", [1, 3, 64], ids=["step", "few", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bases_or_folded_factors_compute_the_same(
    tokens: int, dtype: torch.dtype, tiny_model: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_tasks(tiny_model("llama").to(dtype), LLAMA, "one", "two", "three")
    ids = LLAMA.batch(size=6, length=tokens)["input_ids"]
    chosen, found = [], []
    original = BatchCoefficients.fold_pays

    def fold_pays(coefficients: BatchCoefficients, count: int) -> bool:
        chosen.append(original(coefficients, count))
        return chosen[-1]

    for choice in (fold_pays, lambda *_: True, lambda *_: False):
        monkeypatch.setattr(BatchCoefficients, "fold_pays", choice)
        found.append(logits(model, {"input_ids": ids}, adapter_names=NAMES))
    assert set(chosen) == {tokens == 64}
    for other in found[1:]:
        assert_close(found[0], other, tolerance=1e-5 if dtype == torch.float32 else 0.05)


class TestHeads:
    """PEFT's own mixed batches do not support these."""

    def model(self, tiny_model: Callable[[str], PreTrainedModel]) -> PeftModel:
        model = with_tasks(tiny_model("bert"), BERT, "one", "two", task_type="SEQ_CLS", modules_to_save=["pooler"])
        model.add_adapter("plain", BERT.config())
        randomize(model, "plain", seed=5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter))
        return model.eval()

    @pytest.mark.parametrize("active", ["one", "plain"])
    def test_tasks_with_a_head_and_without_one(
        self, active: str, tiny_model: Callable[[str], PreTrainedModel]
    ) -> None:
        model = self.model(tiny_model)
        model.set_adapter(active)
        names = ["one", "plain", "__base__", "two"]
        ids = BERT.batch(size=4)["input_ids"]
        expected = torch.cat(one_by_one(model, names, lambda model, i: logits(model, {"input_ids": ids[i : i + 1]})))
        assert_close(logits(model, {"input_ids": ids}, adapter_names=names), expected)

    def test_modules_of_more_than_one_layer(self, tiny_model: Callable[[str], PreTrainedModel]) -> None:
        assert type(self.model(tiny_model).base_model.model.bert.pooler.original_module).__name__ == "BertPooler"
