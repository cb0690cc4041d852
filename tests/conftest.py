"""Fixtures for all tests: tiny real models, and a folder with more real data if there is one."""

from __future__ import annotations

import os


# The libraries read these variables when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.hub_server.fixtures import hub, hub_server  # noqa: F401
from tests.tree_fixtures import (  # noqa: F401
    copy_of,
    loras,
    save_classifier,
    save_lora,
    saved,
    subspace,
    tree,
    with_figures,
)


VOCABULARY = 64
HIDDEN = 64
LAYERS = 2

# bitsandbytes says this in every process if the package `kernels` is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# The models are so small that a second thread costs more than it gains, especially when processes share the cores.
torch.set_num_threads(1)


def _tiny_llama() -> LlamaForCausalLM:
    """Tiny Llama with grouped-query attention: `q_proj` is 64 x 64, and `v_proj` 32 x 64."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def _tiny_bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def _tiny_gpt2() -> GPT2LMHeadModel:
    """Tiny GPT-2 with `Conv1D` layers, whose weight is (in, out)."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        initializer_range=0.1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _tiny_t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=16,
        d_ff=96,
        num_layers=LAYERS,
        num_heads=4,
        dropout_rate=0.0,
        initializer_factor=3.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    return T5ForConditionalGeneration(config)


_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _tiny_llama,
    "bert": _tiny_bert,
    "gpt2": _tiny_gpt2,
    "t5": _tiny_t5,
}


@pytest.fixture(scope="session")
def pristine_models() -> dict[str, PreTrainedModel]:
    """Two-layer models with random weights by name: llama, bert, gpt2, t5. Do not change them; copy one instead."""
    models = {}
    for name, build in _BUILDERS.items():
        torch.manual_seed(0)
        models[name] = build().eval()
    return models


@pytest.fixture
def tiny_model(pristine_models: dict[str, PreTrainedModel]) -> Callable[[str], PreTrainedModel]:
    """Make a separate copy of a tiny model in eval mode. All copies of the same name have the same weights."""
    return lambda name: copy.deepcopy(pristine_models[name])


@pytest.fixture(scope="session")
def tiny_model_folder(
    pristine_models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder in which a tiny model is saved, for `from_pretrained`."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(f"tiny-{name}")
            pristine_models[name].save_pretrained(folders[name])
        return folders[name]

    return folder_of


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with more real data and adapters: SHARE_HF_TEST_DATA, or `shared` beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("SHARE_HF_TEST_DATA") or default)
    if not (folder / "data" / "cl_bench").is_dir():
        pytest.skip(f"no test data in {folder}; SHARE_HF_TEST_DATA names the folder")
    return folder


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
