"""What share_hf exports, as a type checker sees it: mypy reads this file together with the package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitInfo
from peft import PeftModel
from transformers import PreTrainedModel
from typing_extensions import assert_type

import share_hf
from share_hf import ShareCallback, ShareConfig, SharedSubspace, ShareTrainer, ShareTrainingArguments
from share_hf.state import SubspaceReport
from share_hf.subspace import MergeReport


def use_adapters(base: PreTrainedModel, folder: Path) -> None:
    """Not run: the calls of a person who has adapters."""
    subspace = SharedSubspace.from_adapters(
        ["adapters/mrpc", "adapters/sst2"], num_components="auto", target_error=0.2
    )
    assert_type(subspace, SharedSubspace)
    assert_type(subspace.add_adapters({"rte": "adapters/rte"}), MergeReport)
    assert_type(subspace.tasks, tuple[str, ...])
    assert_type(subspace.report(), SubspaceReport)
    assert_type(subspace.apply(base), PeftModel)
    subspace.export_lora("rte", folder / "rte")
    subspace.rename_task("rte", "entailment")
    subspace.save_pretrained(folder, history=5)
    assert_type(subspace.push_to_hub("org/share-subspace"), CommitInfo)
    assert_type(SharedSubspace.from_pretrained(folder), SharedSubspace)
    assert_type(SharedSubspace.undo(folder), SharedSubspace)


def use_trainer(base: PreTrainedModel, data: Any) -> None:
    """Not run: the calls of a person who gets tasks one by one."""
    arguments = ShareTrainingArguments("out", learning_rate=5e-3, method="share")
    trainer = ShareTrainer(base, arguments, ShareConfig(num_components=32), tasks={"mrpc": data})
    trainer.train()
    trainer.learn_task("cola", data, data)
    assert_type(trainer.subspace, SharedSubspace)
    callback = ShareCallback("sst2", trainer.subspace, routing=True)
    assert_type(callback.report, MergeReport | None)


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield functions of the exported classes that share_hf itself defines."""
    for name in share_hf.__all__:
        exported = getattr(share_hf, name)
        if not inspect.isclass(exported):
            continue
        for attribute in dir(exported):
            member = inspect.getattr_static(exported, attribute)
            function = member.fget if isinstance(member, property) else inspect.unwrap(getattr(exported, attribute))
            function = getattr(function, "__func__", function)
            is_public = not attribute.startswith("_") or attribute == "__init__"
            if is_public and inspect.isfunction(function) and function.__module__.startswith("share_hf."):
                yield f"{name}.{attribute}", function


@pytest.mark.parametrize("function", [pytest.param(function, id=name) for name, function in public_functions()])
def test_has_a_type_for_every_argument_and_result(function: Callable[..., Any]) -> None:
    signature = inspect.signature(function)
    missing = [
        name
        for position, (name, parameter) in enumerate(signature.parameters.items())
        if parameter.annotation is inspect.Parameter.empty and not (position == 0 and name in ("self", "cls"))
    ]
    assert missing == []
    # A dataclass returns None, which its generated __init__ states by a value.
    assert signature.return_annotation is not inspect.Signature.empty


def test_the_package_says_that_it_is_typed() -> None:
    assert Path(share_hf.__file__).with_name("py.typed").is_file()
