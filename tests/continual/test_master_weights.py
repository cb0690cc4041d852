"""What tasks keep whole is trained in float32, even on half-precision models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from share_hf import ShareCallback, ShareConfig, ShareTrainer, ShareTrainingArguments
from share_hf.tuner.master_weights import MasterWeights
from share_hf.tuner.mixed_heads import head_wrappers

from .cases import classification_tasks


SMALL_STEPS = 1e-4  # next to weights of 1, each of these is lost in bfloat16
OPTIONS: dict[str, Any] = {
    "learning_rate": SMALL_STEPS,
    "lr_scheduler_type": "constant",
    "num_train_epochs": 4,
    "per_device_train_batch_size": 8,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture
def half(tiny_model: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """A model in bfloat16 whose head has weights close to 1."""
    model = tiny_model("bert").bfloat16()
    nn.init.ones_(model.classifier.weight)
    return model


def config() -> ShareConfig:
    return ShareConfig(num_components=4, pseudo_rank=2, target_modules=["query"], task_type="SEQ_CLS")


def head_of(model: PeftModel, task: str) -> torch.Tensor:
    (wrapper,) = head_wrappers(model).values()
    return wrapper.modules_to_save[task].weight


def changed(weight: torch.Tensor) -> float:
    """Return the fraction of the weights of a head that training has changed."""
    return float((weight != 1).float().mean())


@pytest.mark.parametrize("bf16", [False, True], ids=["bfloat16", "autocast"])
def test_a_stream_trains_heads_of_half_precision_in_float32(half: PreTrainedModel, tmp_path: Path, bf16: bool) -> None:
    name, data = next(iter(classification_tasks().items()))
    args = ShareTrainingArguments(str(tmp_path), bf16=bf16, **{**OPTIONS, "learning_rate": 100 * SMALL_STEPS})
    trainer = ShareTrainer(half, args, config(), {name: data})
    seen: set[torch.dtype] = set()
    forward = trainer.compute_loss

    def compute_loss(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            seen.add(head_of(trainer.model, name).dtype)
        return forward(model, *args, **kwargs)

    trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    trainer.train()
    head = head_of(trainer.model, name)
    assert seen == {torch.float32}
    assert head.dtype == torch.bfloat16 and changed(head) > 0.5
    assert torch.equal(trainer.subspace.state.tasks[name].head["classifier.weight"], head.detach())
    assert not head_wrappers(trainer.model)["classifier"].modules_to_save[name]._forward_hooks


def test_steps_that_bfloat16_would_lose_add_up(half: PreTrainedModel) -> None:
    model = get_peft_model(half, config(), adapter_name="a")
    masters = MasterWeights(model, ["a"])
    head = head_of(model, "a")
    optimizer = torch.optim.SGD([head], lr=1.0)
    for _ in range(200):
        head.grad = torch.full_like(head, SMALL_STEPS)
        optimizer.step()
    masters.release()
    assert head.dtype == torch.bfloat16
    torch.testing.assert_close(head.float(), torch.full_like(head, 1 - 200 * SMALL_STEPS).float(), atol=4e-3, rtol=0)
    for _ in range(200):
        head.grad = torch.full_like(head, SMALL_STEPS)
        optimizer.step()
    torch.testing.assert_close(head.float(), torch.full_like(head, 1 - 200 * SMALL_STEPS).float(), atol=4e-3, rtol=0)


def test_the_model_around_a_head_stays_in_half_precision(half: PreTrainedModel) -> None:
    model = get_peft_model(half, config(), adapter_name="a").eval()
    inputs = torch.randint(5, 20, (3, 6))
    before = model(input_ids=inputs).logits
    masters = MasterWeights(model, ["a"])
    within = model(input_ids=inputs).logits
    masters.release()
    assert before.dtype == within.dtype == torch.bfloat16
    torch.testing.assert_close(within, before)
    assert torch.equal(model(input_ids=inputs).logits, before)


def test_a_model_in_float32_is_left_alone(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = get_peft_model(tiny_model("bert"), config(), adapter_name="a")
    masters = MasterWeights(model, ["a"])
    assert not head_wrappers(model)["classifier"].modules_to_save["a"]._forward_pre_hooks
    masters.release()


def test_a_trainer_that_is_not_ours_trains_them_in_float32_too(half: PreTrainedModel, tmp_path: Path) -> None:
    name, data = next(iter(classification_tasks().items()))
    model = get_peft_model(half, config())
    callback = ShareCallback(name)
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), **{**OPTIONS, "learning_rate": 100 * SMALL_STEPS}),
        train_dataset=data["train"],
        callbacks=[callback],
    )
    assert head_of(model, name).dtype == torch.float32
    trainer.train()
    assert head_of(model, name).dtype == torch.bfloat16 and changed(head_of(model, name)) > 0.5
    assert callback.subspace.state.tasks[name].head["classifier.weight"].dtype == torch.bfloat16
