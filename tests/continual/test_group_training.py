"""Tasks that are trained together learn what each would learn alone on the same samples."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler

from share_hf import ShareConfig, ShareTrainingArguments
from share_hf.continual.group_data import GroupData, GroupSampler
from share_hf.continual.group_trainer import GroupTrainer
from share_hf.continual.labels import LabelMask, LabelSmootherOfTask
from share_hf.state import Phase
from share_hf.tuner.together import trained_by_task

from .cases import arguments


# Rows and labels by task. Some tasks are in every step, others in a few.
ROWS = {"many": 45, "few": 9, "some": 22, "query": 5}
LABELS = {"many": 3, "few": 2, "some": 3, "query": 2}


def classification(task: str) -> Dataset:
    rows, labels = ROWS[task], LABELS[task]
    generator = torch.Generator().manual_seed(len(task))
    ids = torch.randint(3, 64, (rows, 6), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (torch.arange(rows) % labels).tolist()})


def language(task: str) -> Dataset:
    """Texts whose first tokens are not learned; their number differs between texts."""
    ids = torch.randint(3, 64, (ROWS[task], 7), generator=torch.Generator().manual_seed(len(task)))
    labels = [[-100] * (1 + i % 4) + row[1 + i % 4 :] for i, row in enumerate(ids.tolist())]
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels})


def with_new_tasks(base: PreTrainedModel, **config: Any) -> PeftModel:
    """The model with tasks that are about to be trained together."""
    is_classifier = hasattr(base, "classifier")
    settings = ShareConfig(
        num_components=8,
        pseudo_rank=2,
        target_modules=["query", "value"] if is_classifier else ["q_proj", "down_proj"],
        task_type="SEQ_CLS" if is_classifier else "CAUSAL_LM",
        **config,
    )
    settings.phase = Phase.COEFFICIENTS
    torch.manual_seed(1)
    model = get_peft_model(base, copy.deepcopy(settings), adapter_name=next(iter(ROWS)))
    for task in list(ROWS)[1:]:
        model.add_adapter(task, copy.deepcopy(settings))
    for i, task in enumerate(ROWS):
        model.set_adapter(task)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in trained_by_task(model, [task])[task]:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.base_model.set_adapter(list(ROWS))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class Recorder(GroupTrainer):
    """Records the samples of each step by task."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[dict[str, list[dict[str, Tensor]]]] = []

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self.state.global_step == len(self.steps):
            self.steps.append({})
        seen = dict(inputs)
        numbers = seen.pop("share_task_numbers").tolist()
        for row, number in enumerate(numbers):
            sample = {name: tensor[row] for name, tensor in seen.items()}
            self.steps[-1].setdefault(self._group.tasks[number], []).append(sample)
        return super().training_step(model, inputs, num_items_in_batch)


def trained_together(model: PeftModel, args: ShareTrainingArguments, **kwargs: Any) -> Recorder:
    trainer = Recorder(model, args, **kwargs)
    is_classifier = hasattr(model.get_base_model(), "classifier")
    if is_classifier:
        trainer.model_accepts_loss_kwargs = False
    mask = LabelMask(model, LABELS.get if is_classifier else lambda task: None)
    if trainer.label_smoother is not None:
        trainer.label_smoother = LabelSmootherOfTask(
            trainer.label_smoother, lambda: [mask.num_labels_of(name) for name in trainer._group.names]
        )
    data = {task: (classification if is_classifier else language)(task) for task in ROWS}
    trainer.run_group(args, data, None)
    return trainer


def alone(
    model: PeftModel,
    task: str,
    steps: list[Mapping[str, list[dict[str, Tensor]]]],
    args: ShareTrainingArguments,
    make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    loss_of: Callable[[Any, Tensor], Tensor],
) -> None:
    """Train one task, as the active one, on the samples that it had in each step, in a plain loop."""
    model.set_adapter(task)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
    )
    own = [step[task] for step in steps if task in step]
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(len(own)),
        num_training_steps=len(own),
    )
    model.train()
    for samples in own:
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        optimizer.zero_grad()
        loss_of(model(**batch), batch["labels"]).backward()
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        schedule.step()


def parameters_of(model: PeftModel, task: str) -> dict[str, Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.endswith(f".{task}") or f".modules_to_save.{task}." in name
    }


ADAM = {"optim": "adamw_torch", "learning_rate": 2e-2, "weight_decay": 0.1}
SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.2, "weight_decay": 0.1}
PLAIN = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
HARD = {"max_grad_norm": 0.5, "warmup_steps": 0.3, "lr_scheduler_type": "cosine"}
ACCUMULATED = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 3}


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize(
    "options",
    [
        {**ADAM, **PLAIN},
        {**ADAM, **HARD},
        {**ADAM, **HARD, **ACCUMULATED},
        {**SGD, **HARD},
        {**ADAM, **HARD, "gradient_checkpointing": True},
        {**ADAM, **HARD, "samples_per_task": 1, "max_steps": 7},
        {**ADAM, **HARD, "label_smoothing_factor": 0.2},
    ],
    ids=["plain", "scheduled", "accumulated", "sgd", "checkpointed", "single-samples", "smoothed"],
)
def test_each_task_is_trained_as_it_is_alone_on_its_samples(
    architecture: str, options: dict[str, Any], tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    values = {"max_steps": -1, "num_train_epochs": 2, "samples_per_task": 3, **options}
    args = arguments(tmp_path, **values)
    model = with_new_tasks(tiny_model(architecture))
    initial = {task: parameters_of(model, task) for task in ROWS}
    expected = with_new_tasks(tiny_model(architecture))
    trainer = trained_together(model, args)
    absences = {task: sum(task not in step for step in trainer.steps) for task in ROWS}
    assert max(absences.values()) > len(trainer.steps) // 3, absences

    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if args.optim == "sgd":
            return torch.optim.SGD(groups, lr=args.learning_rate, momentum=0.9)
        return torch.optim.AdamW(groups, lr=args.learning_rate)

    mask = LabelMask(expected, LABELS.get if architecture == "bert" else lambda task: None)
    for task in ROWS:
        limit = mask.num_labels_of(task)

        def loss(outputs: Any, labels: Tensor, limit: int | None = limit) -> Tensor:
            if not args.label_smoothing_factor:
                return outputs.loss
            logits = outputs.logits[..., :limit]
            if limit is None:
                logits, labels = logits[:, :-1], labels[:, 1:]
            return smoothed_cross_entropy(logits.flatten(0, -2), labels.flatten(), args.label_smoothing_factor)

        alone(expected, task, trainer.steps, args, optimizer, loss)
        found, wanted = parameters_of(model, task), parameters_of(expected, task)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            moved = (tensor - initial[task][name]).abs().max()
            assert moved > 1e-4, name
            assert torch.allclose(found[name], tensor, atol=1e-5 + 1e-3 * float(moved), rtol=0), (
                name,
                (found[name] - tensor).abs().max(),
                moved,
            )


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, ignore_index=-100, label_smoothing=smoothing)


def test_an_epoch_has_each_example_once_and_runs_of_a_task_in_a_batch() -> None:
    data = GroupData({task: classification(task) for task in ROWS})
    sampler = GroupSampler(data, samples_per_task=3, seed=5, epoch=lambda: 1)
    order = list(sampler)
    assert sorted(order) == list(range(sum(ROWS.values())))
    assert order == list(sampler)
    numbers = data.numbers_of(np.array(order)).tolist()
    whole = sum(rows // 3 for rows in ROWS.values())
    assert all(len(set(numbers[3 * i : 3 * i + 3])) == 1 for i in range(whole))
    assert len(set(itertools.chain(numbers[:12]))) > 1
    number, row = data[order[0]]
    assert row in list(classification(data.tasks[number]))


@pytest.mark.parametrize("processes", [1, 2])
def test_steps_of_tasks_are_counted_ahead(processes: int) -> None:
    data = GroupData({task: classification(task) for task in ROWS})
    epochs: Iterator[int] = iter(range(3))
    sampler = GroupSampler(data, samples_per_task=2, seed=5, epoch=lambda: next(epochs))
    step, process, seen = 4 * processes, 2, np.zeros(len(ROWS), dtype=int)
    for _ in range(3):
        order = list(sampler)
        if processes > 1:
            order += order[: -len(order) % (process * processes)]
        for i in range(math.ceil(len(order) / step)):
            for number in set(data.numbers_of(np.array(order[i * step : (i + 1) * step])).tolist()):
                seen[number] += 1
    total = 3 * math.ceil(len(order) / step)
    counted = sampler.steps_of_tasks(total, step=step, process=process, processes=processes)
    assert counted.tolist() == seen.tolist()
