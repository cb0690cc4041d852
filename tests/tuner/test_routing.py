"""Inputs that find their task: features of the base model alone, `route`, and `adapter_names="auto"`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from share_hf.state import Router
from share_hf.subspace.discriminants import FeatureSums
from share_hf.tuner.learned_routes import sums_over, tuner_of
from share_hf.tuner.routing import TaskRouter, default_layers, features_of, probe_of

from .cases import BERT, LLAMA, Case, assert_close, assert_differ, each_architecture, logits, with_tasks


T5 = Case("t5", ("q", "v"), "SEQ_2_SEQ_LM")
RANGES = {"one": (3, 20), "two": (24, 42), "three": (46, 64)}  # of the token ids of each task
OTHERS = (21, 24)

TinyModel = Callable[[str], PreTrainedModel]


def inputs_of(task: str, seed: int = 0, size: int = 8, length: int = 7) -> Tensor:
    low, high = RANGES[task]
    return torch.randint(low, high, (size, length), generator=torch.Generator().manual_seed(seed))


def batches_of(task: str, count: int = 15) -> Iterator[dict[str, Tensor]]:
    return ({"input_ids": inputs_of(task, seed=seed)} for seed in range(count))


def routing(base: PreTrainedModel, case: Case, *tasks: str) -> PeftModel:
    """A model with these tasks, and routes to them."""
    model = with_tasks(base, case, *tasks)
    layers, router, routes = default_layers(base), None, {}
    for task in tasks:
        routes[task], part = sums_over(tuner_of(model), batches_of(task), layers).learned()
        with torch.no_grad(), model.disable_adapter():
            router = (router or Router(layers, probe_of(base, layers))).with_part(part)
    model.base_model.router = TaskRouter(router, routes)
    return model


@each_architecture
def test_inputs_find_their_task_whatever_is_active(case: Case, tiny_model: TinyModel) -> None:
    model = routing(tiny_model(case.architecture), case, "one", "two", "three")
    ids = torch.cat([inputs_of(task, seed=99) for task in RANGES])
    found = model.route(ids, false_rejects=None)
    expected = [task for task in RANGES for _ in range(8)]
    assert sum(name == task for name, task in zip(found.names, expected, strict=True)) >= 21
    assert found.tasks == ("one", "two", "three")
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(24))
    assert found.scores == tuple(found.probabilities.max(1).values.tolist())
    model.set_adapter("three")
    assert torch.equal(model.route(input_ids=ids).probabilities, found.probabilities)
    assert model.active_adapter == "three"


@pytest.mark.parametrize("case", [LLAMA, BERT, T5], ids=lambda case: case.architecture)
@pytest.mark.parametrize("side", ["left", "right"])
def test_features_do_not_depend_on_padding(case: Case, side: str, tiny_model: TinyModel) -> None:
    model = tiny_model(case.architecture)
    layers, rows = default_layers(model), [inputs_of("one", seed, size=1, length=3 + seed) for seed in range(4)]
    alone = torch.cat([features_of(model, {"input_ids": row}, layers) for row in rows])
    ids, mask = torch.zeros(4, 9, dtype=torch.long), torch.zeros(4, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(9 - row.shape[1], None) if side == "left" else slice(row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    assert_close(features_of(model, {"input_ids": ids, "attention_mask": mask}, layers), alone)
    # Without a mask, the padding token determines it, as in `generate`.
    assert_close(features_of(model, {"input_ids": ids}, layers), alone)
    assert alone.shape == (4, 64 * len(layers)) and alone.dtype == torch.float32


def test_features_are_means_of_what_the_base_model_computes(tiny_model: TinyModel) -> None:
    base, ids = tiny_model("llama"), inputs_of("one")
    with torch.no_grad():
        states = base(input_ids=ids, output_hidden_states=True).hidden_states
    expected = torch.cat(
        [states[i].mean(1) / states[i].mean(1).square().mean(1, keepdim=True).sqrt() for i in (0, 2)], 1
    )
    assert_close(features_of(base, {"input_ids": ids, "labels": ids}, (0, 2)), expected)
    model = with_tasks(tiny_model("llama"), LLAMA, "one")
    sums = sums_over(tuner_of(model), [{"input_ids": ids}], (0, 2))
    assert_close(torch.cat(sums.kept), expected)


def test_learning_leaves_the_model_as_it_was(tiny_model: TinyModel) -> None:
    model = with_tasks(tiny_model("bert"), BERT, "one", "two").train()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.get_base_model().bert.encoder.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    sums_over(tuner_of(model), batches_of("one", 2), (1,))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    with pytest.raises(ValueError, match="expected a batch of one of"):
        sums_over(tuner_of(model), [{"labels": torch.ones(2)}], (1,))
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("case", [LLAMA, BERT], ids=lambda case: case.architecture)
def test_auto_is_the_names_that_route_gives(case: Case, tiny_model: TinyModel) -> None:
    model = routing(tiny_model(case.architecture), case, "one", "two", "three")
    model.base_model.router.false_rejects = 0.2
    ids = torch.cat([inputs_of("two", 50, 3), torch.randint(*OTHERS, (3, 7)), inputs_of("one", 51, 3)])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = [name or "__base__" for name in model.route(batch).names]
    assert len(set(names)) > 1 and "__base__" in names
    found = logits(model, batch, adapter_names="auto")
    assert_close(found, logits(model, batch, adapter_names=names))
    assert_differ(found, logits(model, batch))
    assert not model.get_base_model()._forward_pre_hooks


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("case", [LLAMA, T5], ids=lambda case: case.architecture)
def test_auto_generates_with_the_task_of_each_input(
    case: Case, options: dict[str, Any], tiny_model: TinyModel
) -> None:
    model = routing(tiny_model(case.architecture), case, "one", "two")
    ids = torch.cat([inputs_of("two", 50, 2), inputs_of("one", 51, 2)])
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    names = [name or "__base__" for name in model.route(input_ids=ids, attention_mask=mask).names]
    assert len(set(names)) > 1
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, **options}
    found = model.generate(input_ids=ids, adapter_names="auto", **options)
    assert torch.equal(found, model.generate(input_ids=ids, adapter_names=names, **options))


def test_a_task_that_was_deleted_is_no_longer_chosen(tiny_model: TinyModel) -> None:
    model = routing(tiny_model("llama"), LLAMA, "one", "two")
    model.delete_adapter("two")
    assert set(model.route(inputs_of("two"), false_rejects=None).names) == {"one"}
    with pytest.raises(ValueError, match=r"tasks has 'two', expected some that the model has .* a route: \['one'\]"):
        model.route(inputs_of("two"), tasks=["two"])


def test_two_threads_get_their_own_routes(tiny_model: TinyModel) -> None:
    model = routing(tiny_model("bert"), BERT, "one", "two")
    ids = {task: inputs_of(task, 70, size=4) for task in ("one", "two")}
    expected = {task: model.route(of).probabilities for task, of in ids.items()}
    failed = []

    def ask(task: str) -> None:
        for _ in range(20):
            if not torch.equal(model.route(ids[task]).probabilities, expected[task]):
                failed.append(task)

    threads = [Thread(target=ask, args=(task,)) for task in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_router_of_another_base_model_is_refused(tiny_model: TinyModel) -> None:
    model = routing(tiny_model("llama"), LLAMA, "one")
    router = model.base_model.router
    with torch.no_grad():
        other = tiny_model("llama")
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    changed = with_tasks(other, LLAMA, "one")
    changed.base_model.router = TaskRouter(router.router, router.routes)
    with pytest.raises(ValueError, match="the router was learned with another base model"):
        changed.route(inputs_of("one"))
    deeper = TaskRouter(Router((1, 9), router.router.probe, router.router.parts), router.routes)
    model.base_model.router = deeper
    with pytest.raises(ValueError, match="LlamaForCausalLM has 2 layers, expected at least 9"):
        model.route(inputs_of("one"))


def test_bad_requests_are_told_apart(tiny_model: TinyModel) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one")
    ids = inputs_of("one")
    for ask in (lambda: model.route(ids), lambda: logits(model, {"input_ids": ids}, adapter_names="auto")):
        with pytest.raises(ValueError, match="the model has no router, expected one of SharedSubspace"):
            ask()
    model = routing(tiny_model("llama"), LLAMA, "one")
    for rate in (0, 1.5, -1):
        with pytest.raises(ValueError, match=f"false_rejects is {rate}, expected None or a number above 0"):
            model.route(ids, false_rejects=rate)
    with pytest.raises(ValueError, match=r"inputs has \['labels'\] of shape None, expected a batch of one of"):
        model.route({"labels": ids})
    with pytest.raises(ValueError, match="adapter_names='auto' routes only during inference"):
        model.train()(input_ids=ids, adapter_names="auto")


def test_other_models_are_refused_by_name(tiny_model: TinyModel) -> None:
    with pytest.raises(ValueError, match="model is a Linear, expected a model of transformers"):
        features_of(torch.nn.Linear(2, 2), {"input_ids": inputs_of("one")}, (1,))
    lora = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="model has adapters of LoraModel, expected the base model"):
        tuner_of(lora)
    with pytest.raises(ValueError, match="expected those of 9 layers"):
        features_of(tiny_model("llama"), {"input_ids": inputs_of("one")}, (9,))


def test_sums_of_one_process_are_those_of_two(tiny_model: TinyModel) -> None:
    base = tiny_model("bert")
    parts = [sums_over(base, list(batches_of("one", 6))[rank::2], (1, 2)) for rank in range(2)]
    together, alone = FeatureSums.together(parts), sums_over(base, batches_of("one", 6), (1, 2))
    torch.testing.assert_close(together.products, alone.products)
    assert together.count == alone.count == 48
