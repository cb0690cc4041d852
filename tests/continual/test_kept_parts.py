"""What the trainer has is also in the file: parts that start from random values, and labels of a task's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from share_hf import ShareCallback, ShareConfig, SharedSubspace, ShareTrainer, ShareTrainingArguments
from share_hf.tuner.head import parts_to_keep

from .conftest import classification_data


EOS = 2
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=32,
)
DISTILBERT = dict(vocab_size=64, dim=32, hidden_dim=48, n_layers=1, n_heads=2, max_position_embeddings=32)
T5 = dict(
    eos_token_id=EOS,
    pad_token_id=0,
    decoder_start_token_id=0,
    vocab_size=64,
    d_model=32,
    d_kv=16,
    d_ff=48,
    num_layers=1,
    num_heads=2,
)
BART = dict(
    eos_token_id=EOS,
    vocab_size=64,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=32,
)
DEBERTA = {**SIZES, "type_vocab_size": 0, "pooler_hidden_size": 32}
LLAMA = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.1}
WHISPER = {
    **BART,
    "num_mel_bins": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

# Body, class of the task, configuration, and what a checkpoint of the body lacks.
CASES = [
    ("BertModel", "BertForSequenceClassification", SIZES, ["classifier"]),
    ("RobertaModel", "RobertaForSequenceClassification", SIZES, ["classifier"]),
    ("DistilBertModel", "DistilBertForSequenceClassification", DISTILBERT, ["pre_classifier", "classifier"]),
    ("DebertaV2Model", "DebertaV2ForSequenceClassification", DEBERTA, ["pooler", "classifier"]),
    ("BartModel", "BartForSequenceClassification", BART, ["classification_head"]),
    ("T5Model", "T5ForSequenceClassification", T5, ["classification_head"]),
    ("LlamaModel", "LlamaForSequenceClassification", LLAMA, ["score"]),
    ("BertModel", "BertForQuestionAnswering", SIZES, ["qa_outputs"]),
    ("BertForMaskedLM", "BertForSequenceClassification", SIZES, ["bert.pooler", "classifier"]),
    ("WhisperModel", "WhisperForAudioClassification", WHISPER, ["projector", "classifier"]),
    ("LlamaForCausalLM", "LlamaForCausalLM", LLAMA, []),
    ("T5ForConditionalGeneration", "T5ForConditionalGeneration", T5, []),
]
by_class = {name: (body, name, sizes) for body, name, sizes, _ in CASES if body != "BertForMaskedLM"}

Load = Callable[..., PreTrainedModel]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a class of transformers from the checkpoint of its body, which is written once."""

    def load_model(body: str, name: str, sizes: dict[str, Any], *, seed: int = 0, **changes: Any) -> PreTrainedModel:
        folder = tmp_path / f"base-{body}"
        model_class = getattr(transformers, name)
        if not folder.exists():
            torch.manual_seed(0)
            body_class = getattr(transformers, body)
            body_class(body_class.config_class(**sizes)).save_pretrained(folder)
        torch.manual_seed(seed)
        return model_class.from_pretrained(folder, **changes)

    return load_model


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., ShareTrainer]:
    def run(model: PreTrainedModel, labels: dict[str, int], targets: Any = "all-linear") -> ShareTrainer:
        arguments = ShareTrainingArguments(
            str(tmp_path / "out"),
            per_device_train_batch_size=8,
            num_train_epochs=2,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        config = ShareConfig(num_components=2, pseudo_rank=2, num_temporary=1, target_modules=targets)
        tasks = {
            name: {"train": sentences(n, i, 16), "test": sentences(n, 10 + i, 60)}
            for i, (name, n) in enumerate(labels.items())
        }
        trainer = ShareTrainer(model, arguments, config, tasks)
        trainer.train()
        return trainer

    return run


def sentences(num_labels: int, seed: int, examples: int) -> Dataset:
    """Sequences that end as BART and T5 expect."""
    data = classification_data(num_labels, seed, examples)
    return data.map(lambda row: {"input_ids": [*row["input_ids"][:-1], EOS]})


@torch.no_grad()
def logits(model: torch.nn.Module, data: Dataset) -> Tensor:
    return model.eval()(input_ids=torch.tensor(data["input_ids"][:])).logits


@pytest.mark.parametrize(
    ("body", "name", "sizes", "lacking"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_a_checkpoint_lacks_is_to_be_kept(
    body: str, name: str, sizes: dict[str, Any], lacking: list[str], load: Load
) -> None:
    task_type = "SEQ_CLS" if "SequenceClassification" in name else None
    assert parts_to_keep(load(body, name, sizes), task_type) == lacking


def test_of_a_model_without_marks_what_is_outside_its_body_is_kept(load: Load) -> None:
    for name, kept in (("DebertaV2ForSequenceClassification", ["pooler", "classifier"]), ("LlamaForCausalLM", [])):
        model = copy.deepcopy(load(*by_class[name]))
        assert not any(hasattr(parameter, "_is_hf_initialized") for parameter in model.parameters())
        assert parts_to_keep(model, None) == kept


def test_a_head_that_the_checkpoint_has_is_kept_for_new_labels_only(load: Load, tmp_path: Path) -> None:
    load(*by_class["BertForQuestionAnswering"]).save_pretrained(tmp_path / "whole")
    whole = transformers.BertForQuestionAnswering.from_pretrained(tmp_path / "whole")
    assert parts_to_keep(whole, None) == []
    load(*by_class["BartForSequenceClassification"]).save_pretrained(tmp_path / "mnli")
    mnli = transformers.BartForSequenceClassification.from_pretrained(tmp_path / "mnli")
    assert parts_to_keep(mnli, "SEQ_CLS") == ["classification_head"]


def test_parts_are_the_same_with_adapters_on_the_model(load: Load) -> None:
    model = load(*by_class["RobertaForSequenceClassification"])
    config = ShareConfig(num_components=2, pseudo_rank=2, target_modules=["query", "dense"], task_type="SEQ_CLS")
    assert parts_to_keep(get_peft_model(model, config), "SEQ_CLS") == ["classifier"]


@pytest.mark.parametrize(
    "name",
    [
        "RobertaForSequenceClassification",
        "DistilBertForSequenceClassification",
        "DebertaV2ForSequenceClassification",
        "BartForSequenceClassification",
        "T5ForSequenceClassification",
        "LlamaForSequenceClassification",
    ],
)
def test_a_task_predicts_the_same_wherever_its_model_is_loaded(
    name: str, load: Load, train: Callable[..., ShareTrainer], tmp_path: Path
) -> None:
    trainer = train(load(*by_class[name], seed=1, num_labels=4), {"four": 4, "two": 2})
    trainer.subspace.save_pretrained(tmp_path / "tree")
    trainer.subspace.export_lora("two", tmp_path / "lora")
    data = trainer.tasks["two"].evaluation
    labels = torch.tensor(data["label"][:])

    def fresh() -> PreTrainedModel:
        return load(*by_class[name], seed=2, num_labels=4)

    loaded = [
        SharedSubspace.from_pretrained(tmp_path / "tree").apply(fresh(), ["two"]),
        PeftModel.from_pretrained(fresh(), tmp_path / "tree" / "tasks" / "two"),
        PeftModel.from_pretrained(fresh(), tmp_path / "tree"),
        PeftModel.from_pretrained(fresh(), tmp_path / "lora"),
    ]
    trainer.model.set_adapter("two")
    expected = logits(trainer.model, data)
    for model in loaded:
        found = logits(model, data)
        torch.testing.assert_close(found[:, :2], expected[:, :2], rtol=0, atol=1e-4)
        assert set(found.argmax(-1).tolist()) <= {0, 1}
        score = (found.argmax(-1) == labels).double().mean().item()
        assert score == pytest.approx(trainer.metrics["matrix"][-1][1], abs=1e-6)


def test_as_many_labels_as_hidden_units_are_those_of_the_last_layer(
    load: Load, train: Callable[..., ShareTrainer]
) -> None:
    trainer = train(load(*by_class["RobertaForSequenceClassification"], num_labels=32), {"three": 3})
    head = trainer.subspace.state.tasks["three"].head
    assert head["classifier.dense.bias"].abs().max() < 100
    assert head["classifier.out_proj.bias"][3:].max() < -100
    assert head["classifier.out_proj.bias"][:3].abs().max() < 100


def test_a_callback_keeps_what_the_checkpoint_lacks(load: Load, tmp_path: Path) -> None:
    config = ShareConfig(num_components=2, pseudo_rank=2, target_modules=["q_proj"])
    case = by_class["BartForSequenceClassification"]
    model = get_peft_model(load(*case, seed=1, num_labels=3), config)
    callback, data = ShareCallback("one"), sentences(3, 0, 16)
    arguments = TrainingArguments(str(tmp_path / "out"), report_to="none", disable_tqdm=True, use_cpu=True)
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback]).train()
    callback.subspace.save_pretrained(tmp_path / "tree")
    loaded = SharedSubspace.from_pretrained(tmp_path / "tree").apply(load(*case, seed=2, num_labels=3))
    torch.testing.assert_close(logits(loaded, data), logits(model, data), rtol=0, atol=1e-4)


def test_labels_are_ruled_out_where_earlier_tasks_have_no_head(load: Load, tmp_path: Path) -> None:
    case = by_class["LlamaForSequenceClassification"]
    lora = get_peft_model(load(*case), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "body")
    subspace = SharedSubspace.from_adapters([tmp_path / "body"], num_components=4, pseudo_rank=4, progress=False)
    tasks = {"two": {"train": sentences(2, 0, 16), "test": sentences(2, 1, 60)}}
    arguments = ShareTrainingArguments(
        str(tmp_path / "out"), save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True
    )
    trainer = ShareTrainer(load(*case, num_labels=5), arguments, tasks=tasks, subspace=subspace)
    trainer.train()
    trainer.model.set_adapter("body")
    assert logits(trainer.model, tasks["two"]["test"]).shape == (60, 5)
    trainer.model.set_adapter("two")
    assert logits(trainer.model, tasks["two"]["test"])[:, 2:].max() < -1e30
    applied = trainer.subspace.apply(load(*case, seed=3, num_labels=5), ["two"])
    assert set(logits(applied, tasks["two"]["test"]).argmax(-1).tolist()) <= {0, 1}
