"""Whole streams in two real processes under each engine, compared with one process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from share_hf import SharedSubspace
from tests.continual.cases import P
from tests.trees import distance

from .forked import running
from .launching import ROOT, options_of_script, run


pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]

Launch = Callable[..., SharedSubspace]
RunScript = Callable[..., tuple[list[int], str]]


@pytest.fixture(scope="module")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunScript]:
    """Run a script of this folder in two processes of an engine, or in one process without an engine."""
    with running(tmp_path_factory.mktemp("forks") / "log.txt") as run_in_forks:

        def start(engine: str, script: str, folder: Path, **options: Any) -> tuple[list[int], str]:
            processes = None if engine == "one" else 2
            return run_in_forks(script, options_of_script(engine, folder, **options), processes)

        yield start


@pytest.fixture(scope="module")
def launch(run_script: RunScript, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Run a stream under an engine, each one once, and return the subspace that it leaves."""
    known: dict[str, SharedSubspace] = {}

    def start(engine: str, model: str = "bert", **options: Any) -> SharedSubspace:
        key = json.dumps([engine, model, options])
        if key not in known:
            folder = tmp_path_factory.mktemp(engine) / "out"
            codes, output = run_script(engine, "stream", folder, model=model, **options)
            assert not any(codes), output[-6000:]
            assert_whole_checkpoints(folder)
            known[key] = SharedSubspace.from_pretrained(folder / "subspace")
        return known[key]

    return start


def assert_whole_checkpoints(folder: Path) -> None:
    """Assert that no checkpoint of a phase holds parts of a tensor, or anything that is not trained."""
    files = list(folder.glob("phases/*/checkpoint-*/*/adapter_model.safetensors"))
    assert files
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                shape = tensors.get_slice(name).get_shape()
                assert "share_" in name or "classifier" in name
                assert 0 not in shape
                if "share_temporary" in name:
                    assert shape[0] in (32, 64)  # outputs or inputs of a layer
                if "share_coefficients" in name:
                    assert shape[1] == P


def assert_close(found: SharedSubspace, expected: SharedSubspace, tolerance: float) -> None:
    assert found.tasks == expected.tasks
    for task in expected.tasks:
        assert distance(found, expected, task) < tolerance, task
        for name, tensor in expected.state.tasks[task].head.items():
            error = (found.state.tasks[task].head[name] - tensor).norm() / tensor.norm()
            assert error < tolerance, (task, name)


ENGINES = ["ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp"]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_learn_what_one_does(engine: str, launch: Launch) -> None:
    assert_close(launch(engine), launch("one"), 1e-4)


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp"])
def test_every_phase_runs_in_two_processes(engine: str, launch: Launch) -> None:
    options = {
        "finetune_num_train_epochs": 1,
        "evaluate_before": True,
        "tasks": 2,
        "optim": "sgd",
        "learning_rate": 0.05,
    }
    assert_close(launch(engine, **options), launch("one", **options), 2e-3)


def test_coefficients_alone_are_learned_in_two_processes(launch: Launch) -> None:
    options = {"method": "coefficients", "tasks": 2}
    assert_close(launch("zero2", **options), launch("one", **options), 1e-3)


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_tasks_are_learned_together_in_two_processes(model: str, launch: Launch) -> None:
    """Each process may have samples of one task only, and a step may have samples of one task in both processes."""
    names = ["shapes", "sizes"] if model == "bert" else ["b", "c"]
    options = {
        "method": "coefficients",
        "together": names,
        "max_steps": 6,
        "gradient_accumulation_steps": 1,
        "samples_per_task": 4,
        "warmup_steps": 0.3,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.1,
    }
    assert_close(launch("ddp", model, **options), launch("one", model, **options), 1e-3)


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp"])
def test_engines_that_divide_gradients_learn_no_tasks_together(
    engine: str, run_script: RunScript, tmp_path: Path
) -> None:
    options = {"method": "coefficients", "together": ["shapes", "sizes"]}
    codes, output = run_script(engine, "stream", tmp_path / "out", model="bert", **options)
    assert any(codes)
    assert "divides gradients among processes, expected one process or DDP" in output


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp"])
def test_the_best_checkpoint_of_evaluations_while_a_phase_trains_is_what_is_merged(
    engine: str, launch: Launch
) -> None:
    """The score falls, so the best checkpoint is not the end of the phase."""
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "tasks": 2,
        "evaluate_before": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    expected = launch("one", **options)
    assert distance(expected, launch("one", tasks=2), "colors") > 0.1
    assert_close(launch(engine, **options), expected, 1e-4)


@pytest.mark.parametrize(("engine", "broken_off"), [("ddp", True), ("zero2", True), ("zero3", False), ("fsdp", True)])
def test_a_task_is_learned_by_itself_after_a_save_and_after_an_interrupted_try(
    engine: str, broken_off: bool, launch: Launch
) -> None:
    assert_close(launch(engine, broken_off=broken_off, tasks=2), launch("one", tasks=2), 1e-4)


def test_tasks_without_an_update_have_nothing_to_partition(launch: Launch) -> None:
    subspace = launch("zero3", learning_rate=0.0, init_learning_rate=0.0, tasks=2, finetune_num_train_epochs=1)
    assert subspace.tasks == ("colors", "shapes")
    (first, *_) = subspace.state.layers_of("colors").values()
    assert not first.update_of("colors").dense().any()


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp"])
def test_accumulated_gradients_in_bfloat16_keep_float32_coefficients(engine: str, launch: Launch) -> None:
    subspace = launch(
        engine, "llama", bf16=True, gradient_accumulation_steps=2, per_device_train_batch_size=2, tasks=2
    )
    for layer in subspace.state.layers.values():
        assert layer.basis_out.dtype == layer.coefficients_out.dtype == torch.float32
        identity = torch.eye(layer.basis_out.shape[1])
        torch.testing.assert_close(layer.basis_out.T @ layer.basis_out, identity, rtol=0, atol=1e-5)
        rounded = layer.coefficients_out.bfloat16().float()
        assert not torch.equal(rounded, layer.coefficients_out)


@pytest.mark.parametrize(
    ("engine", "quantized"),
    [
        ("ddp", "nf4"),
        ("zero2", "int8"),
        ("zero3", "nf4"),
        ("zero3", "nf4-uint8"),
        ("zero3", "int8"),
        ("fsdp", "nf4"),
        ("fsdp", "nf4-uint8"),
    ],
)
def test_two_processes_learn_on_a_quantized_backbone_what_one_does(
    engine: str, quantized: str, launch: Launch
) -> None:
    options = {"quantized": quantized, "tasks": 2}
    assert_close(launch(engine, "llama", **options), launch("one", "llama", **options), 1e-4)


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_a_quantized_and_partitioned_backbone_learns_in_bfloat16_with_accumulated_gradients(
    engine: str, launch: Launch
) -> None:
    options = {"quantized": "fp4-nested-bfloat16", "bf16": True, "gradient_accumulation_steps": 2, "tasks": 2}
    found = launch(engine, "llama", per_device_train_batch_size=2, **options)
    expected = launch("one", "llama", per_device_train_batch_size=4, **options)
    assert_close(found, expected, 0.1)


def test_packed_weights_that_an_engine_would_cast_are_refused_before_training(
    run_script: RunScript, tmp_path: Path
) -> None:
    codes, output = run_script("zero3", "stream", tmp_path / "out", model="llama", quantized="nf4", bf16=True)
    assert codes == [1, 1]
    assert "bnb_4bit_quant_storage=torch.bfloat16" in output
    assert not (tmp_path / "out" / "subspace").exists()


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_plain_trainer_in_two_processes_merges_what_one_does(
    engine: str, run_script: RunScript, tmp_path: Path
) -> None:
    for each in ("one", engine):
        for _ in range(2):  # DeepSpeed allows one Trainer per process
            codes, output = run_script(each, "foreign", tmp_path / each)
            assert not any(codes), output[-6000:]
    found, expected = (SharedSubspace.from_pretrained(tmp_path / each) for each in (engine, "one"))
    assert expected.tasks == ("a", "b")
    assert_close(found, expected, 1e-4)


def test_a_plain_trainer_trains_float32_values_that_its_engine_keeps(run_script: RunScript, tmp_path: Path) -> None:
    codes, output = run_script("zero2", "foreign", tmp_path / "out", bf16=True)
    assert not any(codes), output[-6000:]
    for layer in SharedSubspace.from_pretrained(tmp_path / "out").state.layers.values():
        update = layer.update_of("a").dense()
        assert (update - update.bfloat16().float()).abs().max() > 0


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_engines_that_keep_adapters_in_parts_are_refused_in_a_plain_trainer(
    engine: str, run_script: RunScript, tmp_path: Path
) -> None:
    codes, output = run_script(engine, "foreign", tmp_path / "out")
    assert codes == [1, 1]
    assert "or ShareTrainer, which takes any of them" in output


RECIPES = ROOT / "recipes"
TINY = (
    *(
        "--use_cpu",
        "--ddp_backend",
        "gloo",
        "--train_examples",
        "32",
        "--max_steps",
        "2",
        "--num_init_tasks",
        "1",
        "--bf16",
        "--output_dir",
        "out",
    ),
    *("--tasks", *(f"{name}={RECIPES / 'assets' / 'tasks' / name}" for name in ("count", "giver"))),
)


CONFIGURATIONS = sorted((RECIPES / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", [path.stem for path in CONFIGURATIONS if "distributed_type:" in path.read_text()])
def test_the_recipe_runs_with_every_launch_configuration(config: str, tmp_path: Path) -> None:
    """The first process prints one table. The CPU stands in for the GPUs that the files are for."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    recipe = ["-m", "tests.distributed.fsdp_on_cpu", str(RECIPES / "llama_stream.py"), *TINY]
    done = run([*accelerate, str(RECIPES / "configs" / f"{config}.yaml"), *recipe], cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.count("accuracy: average") == 1
    assert SharedSubspace.from_pretrained(tmp_path / "out" / "subspace").tasks == ("count", "giver")


def test_two_processes_learn_the_routes_that_one_does(launch: Launch) -> None:
    alone, together = launch("one", routing=True).state, launch("ddp", routing=True).state
    assert list(together.tasks) == list(alone.tasks)
    for task, info in together.tasks.items():
        expected = alone.tasks[task].route
        assert info.route.measured == expected.measured
        torch.testing.assert_close(info.route.mean, expected.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(info.route.distances, expected.distances, rtol=1e-3, atol=1e-4)
    assert together.router.scatter.degrees == alone.router.scatter.degrees
    torch.testing.assert_close(together.router.scatter.products, alone.router.scatter.products, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("engine", "name"), [("zero3", "ZeRO-3"), ("fsdp", "FSDP")])
def test_engines_that_part_a_model_refuse_routing_by_name(
    run_script: RunScript, tmp_path: Path, engine: str, name: str
) -> None:
    codes, output = run_script(engine, "stream", tmp_path / "out", model="bert", routing=True)
    assert all(codes) and f"routing is True under {name}, expected one process, DDP or ZeRO-1/2" in output
