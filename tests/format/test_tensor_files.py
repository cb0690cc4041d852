"""Files of tensors made one after another: the bytes that safetensors writes, with or without a known layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from share_hf import SharedSubspace
from share_hf.format.basis_file import bases_of
from share_hf.format.files import TensorFiles, tensor_bytes
from share_hf.format.task_files import TaskFiles
from share_hf.state import SubspaceState
from tests.tree_fixtures import SaveLora


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def tensors(seed: int, rows: int = 3) -> dict[str, Tensor]:
    """Tensors of each type, not in the order of the file, some without dimensions or entries, and slices."""
    generator = torch.Generator().manual_seed(seed)
    numbers = {f"n{i}": torch.randn(rows, 5, generator=generator).mul(9).to(of) for i, of in enumerate(DTYPES[::-1])}
    wide = torch.randn(4, rows, 6, generator=generator)
    scalar = torch.randn((), generator=generator)
    return {**numbers, "b": scalar, "none": torch.zeros(0, rows), "slice": wide[1], "columns": wide[2, :, 1:3]}


def test_files_of_any_layouts_in_any_order_are_those_of_safetensors() -> None:
    files = TensorFiles()
    for seed, rows in enumerate((3, 3, 4, 3, 3, 3)):
        content = tensors(seed, rows)
        assert files.content(content) == tensor_bytes(content)
    renamed = {f"x{name}": tensor for name, tensor in tensors(9).items()}
    assert files.content(renamed) == tensor_bytes(renamed)
    other_types = {name: tensor.to(torch.float16) for name, tensor in renamed.items()}
    assert files.content(other_types) == tensor_bytes(other_types)
    assert files.content({}) == tensor_bytes({})
    assert files.content({"gradient": torch.ones(2, requires_grad=True)}) == tensor_bytes({"gradient": torch.ones(2)})


@pytest.mark.parametrize(
    "settings", [{}, {"coefficient_dtype": "bfloat16"}, {"coefficient_dtype": "4bit", "tolerance": 0.5}]
)
def test_tasks_of_a_tree_have_the_files_that_each_has_alone(
    settings: dict[str, object], loras: dict[str, Path], tmp_path: Path
) -> None:
    subspace = SharedSubspace.from_adapters(loras, num_components=8, pseudo_rank=4, progress=False, **settings)  # type: ignore[arg-type]
    state: SubspaceState = subspace.state
    bases = bases_of(state.layers)
    together, alone = TaskFiles(state, bases), [TaskFiles(state, bases).of(task) for task in state.tasks]
    assert [together.of(task) for task in state.tasks] == alone
    subspace.save_pretrained(tmp_path / "tree")
    for task, files in zip(state.tasks, alone, strict=True):
        for name, content in files.items():
            assert (tmp_path / "tree" / "tasks" / task / name).read_bytes() == content
        assert load_file(tmp_path / "tree" / "tasks" / task / "adapter_model.safetensors")


def test_tasks_of_other_targets_have_configurations_of_their_own(save_lora: SaveLora) -> None:
    places = [
        save_lora("attention", target_modules=["q_proj"]),
        save_lora("both", target_modules=["q_proj", "v_proj"]),
        save_lora("again", target_modules=["q_proj"], seed=3),
    ]
    state = SharedSubspace.from_adapters(places, num_components=8, pseudo_rank=4, progress=False).state
    files = TaskFiles(state, bases_of(state.layers))
    configs = {task: files.of(task)["adapter_config.json"] for task in state.tasks}
    assert configs["attention"] == configs["again"] != configs["both"]
    assert b"v_proj" in configs["both"] and b"v_proj" not in configs["again"]
