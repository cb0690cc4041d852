"""What an engine cannot train is refused, and what mixed precision wraps around a model is removed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from share_hf import ShareTrainer
from share_hf.engines.checks import check_deepspeed_config, check_quantized_weights
from share_hf.engines.fsdp import check_fsdp, layer_classes, modules_kept_whole
from tests.continual.cases import BERT_TARGETS, LLAMA_TARGETS, At, arguments, config, language_tasks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1}, "fsdp_version is 1, expected 2"),
        ({"activation_checkpointing": True}, "expected gradient_checkpointing=True in the training arguments"),
        ({"cpu_offload": True}, "fsdp_offload_params is True, expected False, or DeepSpeed"),
        ({"ignored_modules": "lm_head"}, "fsdp_ignored_modules is 'lm_head', expected none"),
    ],
)
def test_settings_of_fsdp_that_do_not_go_with_adapters_are_refused(settings: dict[str, Any], message: str) -> None:
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **settings})
    with pytest.raises(ValueError, match=message):
        check_fsdp(plugin)


def test_settings_of_fsdp_by_default_are_taken() -> None:
    check_fsdp(FullyShardedDataParallelPlugin(fsdp_version=2))


@pytest.mark.parametrize(("block", "argument"), [("optimizer", "optim"), ("scheduler", "lr_scheduler_type")])
def test_what_a_deepspeed_configuration_settles_for_all_phases_is_refused(block: str, argument: str) -> None:
    check_deepspeed_config({"zero_optimization": {"stage": 2}})
    with pytest.raises(ValueError, match=rf"has the {block} 'Adam', expected none there, and {argument} in"):
        check_deepspeed_config({"zero_optimization": {"stage": 2}, block: {"type": "Adam"}})


def test_adapters_and_heads_are_kept_whole_and_all_else_is_sharded(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    model = get_peft_model(tiny_model("bert"), config(BERT_TARGETS, task_type="SEQ_CLS"))
    kept = {id(parameter) for module in modules_kept_whole(model) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in kept) == ("share_" in name or "classifier" in name)


def test_layers_are_sharded_one_by_one_but_not_what_holds_the_embeddings(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    for kind, targets, expected in (
        ("llama", LLAMA_TARGETS, "LlamaDecoderLayer"),
        ("bert", BERT_TARGETS, "BertLayer"),
    ):
        classes = layer_classes(get_peft_model(tiny_model(kind), config(targets)))
        assert expected in classes
        assert "BertEmbeddings" not in classes


Load = Callable[..., nn.Module]


@pytest.fixture
def load(tiny_model_folder: Callable[[str], Path]) -> Load:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed", exc_type=ImportError)

    def load(**options: Any) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(
            tiny_model_folder("llama"), quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32
        )

    return load


def test_packed_weights_are_refused_where_their_bits_would_be_rounded(load: Load) -> None:
    model = load(load_in_4bit=True, bnb_4bit_quant_storage=torch.float32)
    for cast in (None, torch.float32):
        check_quantized_weights(model, cast, sharded=True)
    for sharded in (False, True):
        with pytest.raises(ValueError, match=r"q_proj.*torch.float32.*bnb_4bit_quant_storage=torch.bfloat16"):
            check_quantized_weights(model, torch.bfloat16, sharded=sharded)


def test_packed_weights_in_bytes_are_taken_by_every_engine(load: Load) -> None:
    check_quantized_weights(load(load_in_4bit=True), torch.bfloat16, sharded=True)


def test_weights_in_8_bits_are_refused_where_they_would_be_sharded(load: Load) -> None:
    model = load(load_in_8bit=True)
    check_quantized_weights(model, torch.bfloat16, sharded=False)
    with pytest.raises(ValueError, match=r"q_proj.* is in 8 bits, .*expected 4 bits, DDP or DeepSpeed"):
        check_quantized_weights(model, None, sharded=True)


def test_mixed_precision_is_the_same_in_all_phases_and_evaluations(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    depths: list[int] = []

    def note(args: Any, state: Any, model: nn.Module, **kwargs: Any) -> None:
        forward, depth = model.forward, 0
        while hasattr(forward, "__wrapped__"):
            forward, depth = forward.__wrapped__, depth + 1
        depths.append(depth)

    trainer = ShareTrainer(
        tiny_model("llama"),
        arguments(tmp_path, bf16=True, evaluate_before=True, finetune_num_train_epochs=1),
        config(LLAMA_TARGETS),
        language_tasks(*"abc"),
        callbacks=[At("on_train_begin", note), At("on_prediction_step", note)],
    )
    trainer.train()
    assert len(depths) > 12
    assert depths[0] > 0
    assert set(depths) == {depths[0]}
