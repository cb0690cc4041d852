"""Exports of tasks: weighted sums, diffusers' keys, merged models, and what comes back when they are read again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from share_hf import SharedSubspace
from share_hf.cli import main, parse
from share_hf.subspace import LayerSubspace, LowRankUpdate, SubspaceSettings, merge_into_layer
from share_hf.subspace.combining import weighted_sum
from tests.tree_fixtures import SaveLora
from tests.trees import assert_close, delta_weights, files_of, logits, lora_config, named, plain_logits


RANK_4 = dict(num_components=16, pseudo_rank=4, progress=False)


@pytest.fixture
def three(loras: dict[str, Path]) -> SharedSubspace:
    """All three LoRAs without any loss: three of rank 4 fit into 16 directions."""
    return SharedSubspace.from_adapters(loras, **RANK_4)


class TestSums:
    @settings(max_examples=25, deadline=None)
    @given(
        seed=st.integers(0, 2**31),
        weights=st.lists(st.floats(-3, 3).filter(lambda weight: abs(weight) > 1e-3), min_size=1, max_size=4),
        rank=st.integers(1, 12) | st.none(),
    )
    def test_the_sum_is_the_best_of_its_rank(self, seed: int, weights: list[float], rank: int | None) -> None:
        generator = torch.Generator().manual_seed(seed)
        updates = {
            f"task{i}": LowRankUpdate(*(torch.randn(side, 3, generator=generator) for side in (20, 17)))
            for i in range(len(weights))
        }
        layer, _ = merge_into_layer(
            LayerSubspace.empty(20, 17, 3, dtype=torch.float64),
            updates,
            SubspaceSettings(num_components=12, pseudo_rank=3),
        )
        by_task = dict(zip(updates, weights, strict=True))
        found, norm, lost = weighted_sum(layer, by_task, rank)
        exact = sum(weight * layer.update_of(task).dense() for task, weight in by_task.items())
        left, values, right = torch.linalg.svd(exact.double())
        kept = values.clone()
        kept[rank if rank is not None else len(values) :] = 0
        expected = left[:, : len(kept)] @ torch.diag(kept) @ right[: len(kept)]
        scale = float(values[0])
        torch.testing.assert_close(found.dense(), expected, rtol=0, atol=1e-9 * scale)
        assert norm == pytest.approx(float(exact.norm()), rel=1e-9)
        assert lost == pytest.approx(float(values[rank:].norm()) if rank is not None else 0, abs=1e-9 * scale)

    def test_a_sum_is_one_plain_lora(
        self,
        three: SharedSubspace,
        tiny_model: Callable[[str], PreTrainedModel],
        loras: dict[str, Path],
        tmp_path: Path,
    ) -> None:
        weights = {"mrpc": 0.5, "sst2": -0.25}
        error = three.export_combined(weights, tmp_path / "sum", rank=8)
        assert error < 1e-6
        parts = {task: delta_weights(tiny_model("llama"), loras[task]) for task in weights}
        found = delta_weights(tiny_model("llama"), tmp_path / "sum")
        assert found.keys() == parts["mrpc"].keys()
        for module, update in found.items():
            assert_close(update, sum(weight * parts[task][module] for task, weight in weights.items()))

    def test_a_rank_is_paid_for_in_an_error_that_is_reported(
        self, three: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
    ) -> None:
        error = three.export_combined({"mrpc": 1, "sst2": 1}, tmp_path / "p")
        assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["r"] == 4
        cut = delta_weights(tiny_model("llama"), tmp_path / "p")
        three.export_combined({"mrpc": 1, "sst2": 1}, tmp_path / "all", rank=16)
        exact = delta_weights(tiny_model("llama"), tmp_path / "all")
        lost = sum(float((exact[module] - cut[module]).square().sum()) for module in exact) ** 0.5
        assert error == pytest.approx(lost / sum(float(of.square().sum()) for of in exact.values()) ** 0.5, rel=1e-4)

    @pytest.mark.parametrize(
        ("weights", "rank", "told"),
        [
            ({}, None, "weights is empty"),
            ({"mprc": 1.0}, None, "no task 'mprc'"),
            ({"mrpc": float("nan")}, None, "weight of task 'mrpc' is nan"),
            ({"mrpc": True}, None, "weight of task 'mrpc' is True"),
            ({"mrpc": 0.0}, None, "are 0"),
            ({"mrpc": 1.0}, 0, "rank is 0"),
        ],
    )
    def test_what_makes_no_sum_is_refused(
        self, three: SharedSubspace, tmp_path: Path, weights: dict[str, float], rank: int | None, told: str
    ) -> None:
        with pytest.raises(ValueError, match=told):
            three.export_combined(weights, tmp_path / "out", rank=rank)
        assert not (tmp_path / "out").exists()

    def test_heads_have_no_sum(self, save_classifier: SaveLora, tmp_path: Path) -> None:
        heads = SharedSubspace.from_adapters([save_classifier("two", 2), save_classifier("three", 3)], progress=False)
        with pytest.raises(ValueError, match="task 'two' has weights of its own"):
            heads.export_combined({"two": 1, "three": 1}, tmp_path / "out")


class TestReadAgain:
    @pytest.mark.parametrize(
        "config",
        [{}, {"r": 2, "lora_alpha": 16, "use_rslora": True}, {"alpha_pattern": {"v_proj": 3}, "r": 3}],
        ids=["plain", "rslora", "patterns"],
    )
    def test_import_export_and_import_again_changes_nothing(
        self, save_lora: SaveLora, tmp_path: Path, config: dict[str, object]
    ) -> None:
        first = SharedSubspace.from_adapters([save_lora("task", **config)], **RANK_4)
        first.export_lora("task", tmp_path / "once" / "task")
        second = SharedSubspace.from_adapters([tmp_path / "once" / "task"], **RANK_4)
        second.export_lora("task", tmp_path / "twice" / "task")
        third = SharedSubspace.from_adapters([tmp_path / "twice" / "task"], **RANK_4)
        configs = [tmp_path / times / "task" / "adapter_config.json" for times in ("once", "twice")]
        assert configs[0].read_bytes() == configs[1].read_bytes()
        for later in (second, third):
            assert later.state.tasks["task"].target == second.state.tasks["task"].target
            assert later.base_model_name_or_path == first.base_model_name_or_path
            for module, layer in first.state.layers.items():
                assert_close(
                    later.state.layers[module].update_of("task").dense(), layer.update_of("task").dense(), 1e-6
                )

    def test_a_head_comes_back_to_the_bit(self, save_classifier: SaveLora, tmp_path: Path) -> None:
        first = SharedSubspace.from_adapters([save_classifier("two", 2)], progress=False)
        first.export_lora("two", tmp_path / "two")
        second = SharedSubspace.from_adapters([tmp_path / "two"], progress=False)
        assert second.state.tasks["two"].head.keys() == first.state.tasks["two"].head.keys()
        for name, tensor in first.state.tasks["two"].head.items():
            assert torch.equal(second.state.tasks["two"].head[name], tensor)


class TestDiffusers:
    def test_keys_have_the_component_before_them(self, three: SharedSubspace, tmp_path: Path) -> None:
        three.export_lora("mrpc", tmp_path / "out", style="diffusers", component="unet")
        assert [*files_of(tmp_path / "out")] == ["pytorch_lora_weights.safetensors"]
        tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
        for module, update in three.state.updates_of("mrpc").items():
            pair = (tensors.pop(f"unet.{module}.lora_{side}.weight") for side in ("B", "A"))
            out, in_ = pair
            assert_close(out @ in_, update.dense(), 1e-6)
        assert not tensors

    def test_the_model_of_a_pipeline_must_be_known(self, three: SharedSubspace, tmp_path: Path) -> None:
        for component, told in ((None, "any model of a pipeline"), ("vae", "component is 'vae'")):
            with pytest.raises(ValueError, match=told):
                three.export_lora("mrpc", tmp_path / "out", style="diffusers", component=component)
        with pytest.raises(ValueError, match="only style='diffusers'"):
            three.export_lora("mrpc", tmp_path / "out", component="unet")
        with pytest.raises(ValueError, match="style is 'kohya'"):
            three.export_lora("mrpc", tmp_path / "out", style="kohya")
        assert not (tmp_path / "out").exists()

    def test_diffusers_computes_with_it(self, tmp_path: Path) -> None:
        diffusers = pytest.importorskip("diffusers")
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=4,
        ).eval()

        targets, ranks = ["to_q", "to_v", "conv_in", "conv1", "conv_shortcut"], {"to_v": 2, "conv1": 3}
        config = LoraConfig(r=4, lora_alpha=3, rank_pattern=ranks, target_modules=targets, init_lora_weights=False)
        trained = get_peft_model(copy.deepcopy(unet), config)
        trained.save_pretrained(tmp_path / "lora")
        inputs = (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 12))
        with torch.no_grad():
            expected = trained(*inputs).sample
            made = SharedSubspace.from_adapters([tmp_path / "lora"], **RANK_4)
            made.export_lora("lora", tmp_path / "out", style="diffusers", component="unet")
            tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
            unet.load_lora_adapter(tensors, prefix="unet")
            assert_close(unet(*inputs).sample, expected)


class TestMergedModels:
    @pytest.fixture
    def base(self, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> Path:
        tiny_model("llama").save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    def test_a_task_is_in_the_weights(
        self, three: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel], base: Path, tmp_path: Path
    ) -> None:
        three.export_merged("mrpc", base, tmp_path / "merged")
        three.export_lora("mrpc", tmp_path / "lora")
        model = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert_close(logits(model), plain_logits(tiny_model("llama"), tmp_path / "lora"))
        assert not (tmp_path / "merged" / "adapter_config.json").exists()

    def test_a_sum_is_in_the_weights_at_its_full_rank(
        self, three: SharedSubspace, base: Path, tmp_path: Path, loras: dict[str, Path], tiny_model: Callable
    ) -> None:
        three.export_merged({"mrpc": 0.5, "rte": 2.0}, base, tmp_path / "merged")
        merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
        parts = {task: delta_weights(tiny_model("llama"), loras[task]) for task in ("mrpc", "rte")}
        for name, before in tiny_model("llama").state_dict().items():
            module = name.removesuffix(".weight")
            if module in parts["mrpc"]:
                assert_close(merged[name] - before, 0.5 * parts["mrpc"][module] + 2 * parts["rte"][module])
            else:
                assert torch.equal(merged[name], before)

    def test_weights_stored_the_other_way_round(
        self, tiny_model: Callable[[str], PreTrainedModel], save_lora: SaveLora, tmp_path: Path
    ) -> None:
        base = named(tiny_model("gpt2"))
        base.save_pretrained(tmp_path / "base")
        trained = get_peft_model(
            copy.deepcopy(base), lora_config(target_modules=["c_attn"], fan_in_fan_out=True)
        ).eval()
        trained.save_pretrained(tmp_path / "task")
        SharedSubspace.from_adapters([tmp_path / "task"], **RANK_4).export_merged(
            "task", tmp_path / "base", tmp_path / "merged"
        )
        found = type(base).from_pretrained(tmp_path / "merged").eval()
        assert_close(logits(found), logits(trained), 1e-4)

    def test_a_classifier_brings_its_head_and_bfloat16_stays(
        self, save_classifier: SaveLora, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
    ) -> None:
        tiny_model("bert").to(torch.bfloat16).save_pretrained(tmp_path / "base")
        heads = SharedSubspace.from_adapters([save_classifier("two", 2)], progress=False)
        heads.export_merged("two", tmp_path / "base", tmp_path / "merged")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype="auto")
        assert model.num_labels == 2
        assert model.dtype == torch.bfloat16
        head = heads.state.tasks["two"].head["classifier.weight"]
        assert torch.equal(model.classifier.weight.float(), head.bfloat16().float())
        assert not [*(tmp_path / "merged").glob("*token*")]  # there was none to bring

    def test_the_tokenizer_of_the_base_model_comes_along(
        self, three: SharedSubspace, base: Path, tmp_path: Path
    ) -> None:
        words = Tokenizer(WordLevel({"<unk>": 0, "good": 1, "film": 2}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(base)
        three.export_merged("mrpc", base, tmp_path / "merged")
        assert AutoTokenizer.from_pretrained(tmp_path / "merged")("film")["input_ids"] == [2]

    def test_what_is_in_the_way_is_refused_before_anything_is_read(
        self, three: SharedSubspace, tmp_path: Path
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        with pytest.raises(ValueError, match="is not empty"):
            three.export_merged("mrpc", tmp_path / "no-such-base", tmp_path / "out")
        assert [*files_of(tmp_path / "out")] == ["mine.txt"]

    def test_a_model_without_the_modules_is_refused(
        self, three: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
    ) -> None:
        tiny_model("gpt2").save_pretrained(tmp_path / "base")
        with pytest.raises(ValueError, match="does not have"):
            three.export_merged("mrpc", tmp_path / "base", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


class TestCommand:
    @pytest.mark.parametrize(
        "argv",
        [
            ["mrpc", "out", "--all"],
            ["mrpc", "out", "--weights", "mrpc=1"],
            ["out"],
            ["out", "--all", "--merge-into", "base"],
            ["mrpc", "out", "--merge-into", "base", "--style", "diffusers"],
            ["mrpc", "out", "--rank", "3"],
            ["out", "--weights", "mrpc=much"],
            ["out", "--weights", "mrpc=1,mrpc=2"],
        ],
    )
    def test_options_that_contradict_each_other_exit_with_2(self, argv: list[str]) -> None:
        with pytest.raises(SystemExit) as exit_code:
            parse(["export", "sub", *argv])
        assert exit_code.value.code == 2

    def test_sums_and_models(
        self,
        three: SharedSubspace,
        tiny_model: Callable[[str], PreTrainedModel],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        three.save_pretrained(tmp_path / "sub")
        tiny_model("llama").save_pretrained(tmp_path / "base")
        tree, out, merged = (str(tmp_path / name) for name in ("sub", "out", "merged"))
        assert main(["export", tree, "--weights", "mrpc=0.5,sst2=0.5", out, "--rank", "8", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["combined"] == {"mrpc": 0.5, "sst2": 0.5} and facts["error"] < 1e-6
        argv = ["export", tree, "--weights", "mrpc=0.5,sst2=0.5", "--merge-into", str(tmp_path / "base"), merged]
        assert main(argv) == 0
        model = LlamaForCausalLM.from_pretrained(merged).eval()
        plain = PeftModel.from_pretrained(tiny_model("llama"), out).eval()
        assert_close(logits(model), logits(plain))
