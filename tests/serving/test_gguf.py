"""LoRAs in GGUF: what is in the file, what llama.cpp would compute with it, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.llama.modeling_llama import rotate_half

from share_hf import SharedSubspace
from share_hf.cli import main
from share_hf.serving import export_gguf
from share_hf.serving.gguf_lora import ARCHITECTURES
from share_hf.state import Layout
from tests.tree_fixtures import SaveLora
from tests.trees import assert_close, lora_config, save_adapter


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FOLDED = dict(num_components=16, pseudo_rank=4, progress=False)


@pytest.fixture(scope="session")
def gguf() -> ModuleType:
    """The package, which only these exports need."""
    return pytest.importorskip("gguf", reason="the package gguf is not installed (pip install share-hf[gguf])")


@pytest.fixture
def llama(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> Path:
    """The folder of the tiny Llama."""
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def adapted(llama: Path, tmp_path: Path, gguf: ModuleType) -> SharedSubspace:
    """Two tasks that adapt every linear layer of the tiny Llama."""
    return _adapted(llama, tmp_path, target_modules=LINEAR)


def _adapted(base: Path, tmp_path: Path, tasks: tuple[str, ...] = ("mrpc", "sst2"), **config: Any) -> SharedSubspace:
    folders = {
        task: save_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / task, lora_config(**config), seed)
        for seed, task in enumerate(tasks)
    }
    return SharedSubspace.from_adapters(folders, **FOLDED)


class _File:
    """A file as gguf's own reader has it: fields by name, and A and B by weight, as tensors of float64."""

    def __init__(self, gguf: ModuleType, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items() if "." in name}
        self.dtypes = {str(tensor.data.dtype) for tensor in reader.tensors}
        self.factors: dict[str, dict[str, Tensor]] = {}
        for tensor in reader.tensors:
            weight, _, side = tensor.name.rpartition(".")
            self.factors.setdefault(weight, {})[side] = torch.from_numpy(np.array(tensor.data)).double()

    def update(self, weight: str) -> Tensor:
        """Return what llama.cpp adds to a weight (n, d): the scale is `alpha` over the rank, which it takes from B."""
        a, b = self.factors[weight]["lora_a"], self.factors[weight]["lora_b"]
        return self.fields["adapter.lora.alpha"] / b.shape[1] * b @ a


def _in_neighbours(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a head for a rotary embedding of neighbours: row 2i is row i, row 2i + 1 is row i + half."""
    size = len(rows) // heads
    order = [
        head * size + i + half * (size // 2) for head in range(heads) for i in range(size // 2) for half in (0, 1)
    ]
    return rows[order]


class TestTheFile:
    def test_has_what_llama_cpp_asks_for(
        self, gguf: ModuleType, adapted: SharedSubspace, llama: Path, tmp_path: Path
    ) -> None:
        assert export_gguf(adapted, "mrpc", tmp_path / "mrpc.gguf", base_model=llama) == 0
        file = _File(gguf, tmp_path / "mrpc.gguf")
        expected = {
            "general.architecture": "llama",
            "general.type": "adapter",
            "adapter.type": "lora",
            "adapter.lora.alpha": 4.0,
            "adapter.lora.task_name": "mrpc",
            "general.name": "mrpc",
            "general.file_type": 0,
        }
        assert expected.items() <= file.fields.items()
        assert str(tmp_path) not in str(file.fields)  # no path of the writer's machine
        assert file.factors.keys() == {f"blk.{i}.{name}.weight" for i in (0, 1) for name in NAMES.values()}
        assert all(set(factors) == {"lora_a", "lora_b"} for factors in file.factors.values())
        assert file.dtypes == {"float32"}

    def test_names_a_base_model_that_is_on_the_hub(
        self, gguf: ModuleType, save_lora: SaveLora, llama: Path, tmp_path: Path
    ) -> None:
        subspace = SharedSubspace.from_adapters({"mrpc": save_lora("mrpc", base="org/tiny")}, **FOLDED)
        export_gguf(subspace, "mrpc", tmp_path / "mrpc.gguf", base_model=llama)
        fields = _File(gguf, tmp_path / "mrpc.gguf").fields
        assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/org/tiny"
        assert fields["general.base_model.0.name"] == "tiny"

    @pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 2e-3)])
    def test_has_the_updates_of_the_task(
        self,
        gguf: ModuleType,
        adapted: SharedSubspace,
        llama: Path,
        tmp_path: Path,
        dtype: str,
        tolerance: float,
    ) -> None:
        export_gguf(adapted, "sst2", tmp_path / "sst2.gguf", base_model=llama, dtype=dtype)
        file = _File(gguf, tmp_path / "sst2.gguf")
        assert file.dtypes == {dtype}
        for module, update in adapted.state.updates_of("sst2").items():
            expected = (update.out_factor @ update.in_factor.T).double()
            layer, name = module.split(".")[2], module.split(".", 3)[3]
            for part, heads in (("q_proj", 4), ("k_proj", 2)):
                if module.endswith(part):
                    expected = _in_neighbours(expected, heads)
            assert_close(file.update(f"blk.{layer}.{NAMES[name]}.weight"), expected, tolerance)

    def test_of_a_sum_has_the_sum(
        self, gguf: ModuleType, adapted: SharedSubspace, llama: Path, tmp_path: Path
    ) -> None:
        error = export_gguf(adapted, {"mrpc": 0.5, "sst2": -2}, tmp_path / "a.gguf", base_model=llama, rank=8)
        assert error < 1e-5
        module = "model.layers.1.mlp.up_proj"
        parts = [adapted.state.updates_of(task)[module] for task in ("mrpc", "sst2")]
        expected = sum(w * part.out_factor @ part.in_factor.T for w, part in zip((0.5, -2), parts, strict=True))
        file = _File(gguf, tmp_path / "a.gguf")
        assert_close(file.update("blk.1.ffn_up.weight"), expected.double())
        assert file.fields["adapter.lora.task_name"] == "0.5 mrpc + -2 sst2"

    def test_is_filled_up_where_a_layer_has_a_smaller_rank(
        self, gguf: ModuleType, llama: Path, tmp_path: Path
    ) -> None:
        folder = save_adapter(
            AutoModelForCausalLM.from_pretrained(llama),
            tmp_path / "mixed",
            lora_config(r=2, lora_alpha=2, rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 4}),
            0,
        )
        subspace = SharedSubspace.from_adapters({"mixed": folder}, tolerance=1e-4, **FOLDED)
        ranks = {update.out_factor.shape[1] for update in subspace.state.updates_of("mixed").values()}
        assert ranks == {2, 4}
        export_gguf(subspace, "mixed", tmp_path / "mixed.gguf", base_model=llama)
        file = _File(gguf, tmp_path / "mixed.gguf")
        for name in ("q_proj", "v_proj"):
            update = subspace.state.updates_of("mixed")[f"model.layers.0.self_attn.{name}"]
            expected = (update.out_factor @ update.in_factor.T).double()
            expected = _in_neighbours(expected, 4) if name == "q_proj" else expected
            assert_close(file.update(f"blk.0.{NAMES[f'self_attn.{name}']}.weight"), expected)

    def test_of_an_embedding_has_rows_to_look_up(self, gguf: ModuleType, llama: Path, tmp_path: Path) -> None:
        subspace = _adapted(llama, tmp_path, ("mrpc",), target_modules=["embed_tokens", "lm_head"])
        export_gguf(subspace, "mrpc", tmp_path / "mrpc.gguf", base_model=llama)
        file = _File(gguf, tmp_path / "mrpc.gguf")
        updates = subspace.state.updates_of("mrpc")
        head = updates["lm_head"]
        assert_close(file.update("output.weight"), (head.out_factor @ head.in_factor.T).double())
        # The vector that is added to the embedding of token 7: a row of A, times B.
        a, b = (file.factors["token_embd.weight"][side] for side in ("lora_a", "lora_b"))
        embedding = updates["model.embed_tokens"]
        expected = (embedding.out_factor @ embedding.in_factor.T)[:, 7]
        assert a.shape[0] == 64 and b.shape[0] == 64
        assert_close(b @ a[7], expected.double())


class TestRows:
    def test_queries_and_keys_meet_as_in_transformers(self) -> None:
        """Attention scores are the same: transformers rotates i with i + half, and llama.cpp rotates neighbours."""
        heads, size, hidden, places = 2, 8, 16, 5
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(heads * size, hidden, generator=generator, dtype=torch.float64) for _ in range(2))
        x = torch.randn(places, hidden, generator=generator, dtype=torch.float64)
        angles = torch.arange(places)[:, None] / 10.0 ** (torch.arange(size // 2) / 4)

        def turned_in_halves(rows: Tensor) -> Tensor:
            vectors = (x @ rows.T).unflatten(1, (heads, size))
            full = torch.cat([angles, angles], dim=1)[:, None]
            return vectors * full.cos() + rotate_half(vectors) * full.sin()

        def turned_as_neighbours(rows: Tensor) -> Tensor:
            even, odd = (x @ rows.T).unflatten(1, (heads, size // 2, 2)).unbind(3)
            cos, sin = angles[:, None].cos(), angles[:, None].sin()
            return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=3).flatten(2)

        expected = torch.einsum("ihd,jhd->hij", turned_in_halves(q), turned_in_halves(k))
        q, k = (_in_neighbours(rows, heads) for rows in (q, k))
        assert_close(torch.einsum("ihd,jhd->hij", turned_as_neighbours(q), turned_as_neighbours(k)), expected, 1e-12)

    @pytest.mark.parametrize(
        ("config", "architecture", "reordered"),
        [
            (LlamaConfig(**SMALL), "llama", True),
            (MistralConfig(**SMALL), "llama", True),
            (Qwen2Config(**SMALL), "qwen2", False),
            (Qwen3Config(**SMALL, head_dim=16), "qwen3", False),
        ],
        ids=lambda value: getattr(value, "model_type", None),
    )
    def test_are_reordered_where_llama_cpp_does(
        self, gguf: ModuleType, tmp_path: Path, config: Any, architecture: str, reordered: bool
    ) -> None:
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
        subspace = _adapted(tmp_path / "base", tmp_path, ("mrpc",), target_modules=["q_proj", "k_proj", "v_proj"])
        export_gguf(subspace, "mrpc", tmp_path / "mrpc.gguf")  # the base model that the adapter names
        file = _File(gguf, tmp_path / "mrpc.gguf")
        assert file.fields["general.architecture"] == architecture
        for name, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", None)):
            update = subspace.state.updates_of("mrpc")[f"model.layers.1.self_attn.{name}"]
            rows = (update.out_factor @ update.in_factor.T).double()
            expected = _in_neighbours(rows, heads) if reordered and heads else rows
            assert_close(file.update(f"blk.1.attn_{name[0]}.weight"), expected)

    @pytest.mark.parametrize(
        ("config", "targets", "names"),
        [
            (Phi3Config(**SMALL), ["qkv_proj", "gate_up_proj"], {"attn_qkv": 64, "ffn_up": 96}),
            (
                GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
                ["c_attn", "c_fc"],
                {"attn_qkv": 96, "ffn_up": 128},
            ),
        ],
        ids=["phi3", "gpt2"],
    )
    def test_of_joined_weights_stay_joined(
        self, gguf: ModuleType, tmp_path: Path, config: Any, targets: list[str], names: dict[str, int]
    ) -> None:
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
        subspace = _adapted(tmp_path / "base", tmp_path, ("mrpc",), target_modules=targets)
        export_gguf(subspace, "mrpc", tmp_path / "mrpc.gguf")
        file = _File(gguf, tmp_path / "mrpc.gguf")
        shapes = {name: tuple(file.update(name).shape) for name in file.factors}
        assert shapes == {f"blk.{i}.{name}.weight": (n, 32) for i in (0, 1) for name, n in names.items()}

    def test_every_architecture_is_one_of_gguf(self, gguf: ModuleType) -> None:
        for name in ARCHITECTURES.values():
            names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name], 1)
            assert names.get_name("model.layers.0.self_attn.o_proj") or names.get_name("transformer.h.0.attn.c_proj")


class TestWhatIsRefused:
    """Each time, nothing is written."""

    @pytest.fixture(autouse=True)
    def _nothing_is_written(self, gguf: ModuleType, tmp_path: Path) -> Any:
        yield
        assert not list(tmp_path.rglob("*.gguf*"))

    def test_a_head(self, save_classifier: SaveLora, llama: Path, tmp_path: Path) -> None:
        subspace = SharedSubspace.from_adapters({"cb": save_classifier("cb", 3)}, **FOLDED)
        with pytest.raises(ValueError, match=r"weights of its own for \['classifier.bias', 'classifier.weight'\]"):
            export_gguf(subspace, "cb", tmp_path / "cb.gguf", base_model=llama)

    def test_an_unknown_architecture(self, subspace: SharedSubspace, tmp_path: Path) -> None:
        OPTConfig(architectures=["OPTForCausalLM"]).save_pretrained(tmp_path / "opt")
        with pytest.raises(ValueError, match=r"its architecture is \['OPTForCausalLM'\], expected .*LlamaForCausalLM"):
            export_gguf(subspace, "mrpc", tmp_path / "mrpc.gguf", base_model=tmp_path / "opt")

    def test_a_base_model_that_is_not_there(self, subspace: SharedSubspace, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"nowhere: no base model with a config.json"):
            export_gguf(subspace, "mrpc", tmp_path / "mrpc.gguf", base_model=tmp_path / "nowhere")

    def test_another_base_model(self, subspace: SharedSubspace, tmp_path: Path) -> None:
        LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' has a weight \(32, 32\), but .*64"):
            export_gguf(subspace, "mrpc", tmp_path / "mrpc.gguf", base_model=tmp_path / "other")

    def test_a_layer_that_is_not_there(self, tiny_model: Callable[..., Any], llama: Path, tmp_path: Path) -> None:
        subspace = _adapted(llama, tmp_path, ("mrpc",), target_modules=["v_proj"])
        config = tiny_model("llama").config
        config.num_hidden_layers, config.architectures = 1, ["LlamaForCausalLM"]
        config.save_pretrained(tmp_path / "short")
        with pytest.raises(
            ValueError, match=r"has no module 'model.layers.1.self_attn.v_proj', which the task adapts"
        ):
            export_gguf(subspace, "mrpc", tmp_path / "mrpc.gguf", base_model=tmp_path / "short")

    def test_tied_embeddings(self, tiny_model: Callable[..., Any], llama: Path, tmp_path: Path) -> None:
        subspace = _adapted(llama, tmp_path, ("mrpc",), target_modules=["q_proj", "lm_head"])
        config = tiny_model("llama").config
        config.tie_word_embeddings, config.architectures = True, ["LlamaForCausalLM"]
        config.save_pretrained(tmp_path / "tied")
        with pytest.raises(ValueError, match=r"'lm_head' is tied to the other embedding"):
            export_gguf(subspace, "mrpc", tmp_path / "mrpc.gguf", base_model=tmp_path / "tied")

    def test_experts(self, tmp_path: Path) -> None:
        config = Qwen3MoeConfig(
            **SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        subspace = _adapted(
            tmp_path / "base", tmp_path, ("mrpc",), target_modules=["q_proj"], target_parameters=parameters
        )
        with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts.\w+.0' is not a dense layer \(expert\)"):
            export_gguf(subspace, "mrpc", tmp_path / "mrpc.gguf")

    def test_a_convolution(self, subspace: SharedSubspace, llama: Path, tmp_path: Path) -> None:
        layouts = dict.fromkeys(subspace.state.layers, Layout("convolution", (2,)))
        with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' is not a dense layer \(convolution"):
            export_gguf(
                SharedSubspace(replace(subspace.state, layouts=layouts)),
                "mrpc",
                tmp_path / "mrpc.gguf",
                base_model=llama,
            )

    def test_entries_that_float16_cannot_hold(self, llama: Path, tmp_path: Path) -> None:
        subspace = _adapted(llama, tmp_path, ("mrpc",), lora_alpha=1e13)
        with pytest.raises(
            ValueError, match=r"'blk.0.attn_q.weight.lora_.' has entries up to .*, too large for float"
        ):
            export_gguf(subspace, "mrpc", tmp_path / "mrpc.gguf", base_model=llama, dtype="float16")

    def test_a_wrong_dtype_an_unknown_task_and_no_base_model(
        self, subspace: SharedSubspace, llama: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match="dtype is 'int8', expected one of"):
            export_gguf(subspace, "mrpc", tmp_path / "a.gguf", base_model=llama, dtype="int8")
        unnamed = SharedSubspace(replace(subspace.state, base_model_name_or_path=None))
        with pytest.raises(ValueError, match=r"the subspace names no base model, expected base_model="):
            export_gguf(unnamed, "mrpc", tmp_path / "a.gguf")
        with pytest.raises(ValueError, match=r"no task 'mprc' in the subspace.*did you mean 'mrpc'"):
            export_gguf(subspace, "mprc", tmp_path / "a.gguf", base_model=llama)


def test_a_file_that_is_there_stays(gguf: ModuleType, adapted: SharedSubspace, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mrpc.gguf").write_text("precious")
    with pytest.raises(ValueError, match=r"mrpc.gguf: already exists, expected the name of a new file"):
        export_gguf(adapted, "mrpc", tmp_path / "mrpc.gguf", base_model=llama)
    assert (tmp_path / "mrpc.gguf").read_text() == "precious"


def test_a_crash_leaves_no_half_of_a_file(
    gguf: ModuleType, adapted: SharedSubspace, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match=r"mrpc\.gguf"):
        export_gguf(adapted, "mrpc", tmp_path / "out" / "mrpc.gguf", base_model=llama)
    assert list((tmp_path / "out").iterdir()) == []


def test_without_gguf_the_error_says_how_to_get_it(
    subspace: SharedSubspace, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"GGUF files need the package gguf .*`pip install share-hf\[gguf\]`"):
        export_gguf(subspace, "mrpc", tmp_path / "mrpc.gguf", base_model=llama)


class TestTheCommand:
    def test_writes_one_task_all_and_a_sum(
        self,
        gguf: ModuleType,
        adapted: SharedSubspace,
        llama: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        adapted.save_pretrained(tmp_path / "sub")
        sub, base = str(tmp_path / "sub"), ["--base-model", str(llama)]
        assert main(["export", sub, "mrpc", str(tmp_path / "one.gguf"), "--gguf", *base]) == 0
        assert main(["export", sub, "--all", str(tmp_path / "all"), "--gguf", *base, "--dtype", "float16"]) == 0
        assert main(["export", sub, "--weights", "mrpc=1,sst2=1", str(tmp_path / "sum.gguf"), "--gguf", *base]) == 0
        assert "limiting its rank costs" in capsys.readouterr().out
        files = [tmp_path / "one.gguf", tmp_path / "all" / "sst2.gguf", tmp_path / "sum.gguf"]
        assert [_File(gguf, file).fields["general.name"] for file in files] == ["mrpc", "sst2", "1 mrpc + 1 sst2"]
        assert sorted(file.name for file in (tmp_path / "all").iterdir()) == ["mrpc.gguf", "sst2.gguf"]
        assert main(["export", sub, "--all", str(tmp_path / "all"), "--gguf", *base]) == 1
        assert "mrpc.gguf: already exists" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "argv",
        [
            ["sub", "mrpc", "out", "--base-model", "base"],
            ["sub", "mrpc", "out", "--dtype", "float16"],
            ["sub", "mrpc", "out", "--gguf", "--style", "diffusers"],
            ["sub", "mrpc", "out", "--gguf", "--merge-into", "base"],
        ],
    )
    def test_options_that_contradict_each_other_exit_with_2(self, argv: list[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["export", *argv])
        assert caught.value.code == 2
