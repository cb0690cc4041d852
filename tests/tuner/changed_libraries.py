"""What `import share_hf` does to other libraries, and what it does where they have changed.

Each case is a fork of one process that has imported the other libraries and not share_hf. Run as a program, this
prints what came out as JSON.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import logging
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import torch
import transformers


ROOT = Path(__file__).parents[2]
LIBRARIES = ("peft", "transformers", "accelerate")


def table() -> ModuleType:
    """The module with the table, without the package that it is in."""
    spec = importlib.util.spec_from_file_location("upstream", ROOT / "share_hf" / "tuner" / "upstream.py")
    module = sys.modules["upstream"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_fork(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a fork of this process; a text with the traceback if it raises."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        try:
            answer = function(*args)
        except BaseException:
            answer = traceback.format_exc()
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = json.load(pipe)
    os.waitpid(pid, 0)
    return answer


# ---- Cases ----------------------------------------------------------------------------------------------------------


def remove(entry: Any) -> None:
    holder = pkgutil.resolve_name(entry.owner)
    for each in inspect.getmro(holder) if inspect.isclass(holder) else (holder,):
        if entry.name in vars(each):
            delattr(each, entry.name)


def change_signature(entry: Any) -> None:
    """Make the function one that does the same and names its arguments differently."""
    holder = pkgutil.resolve_name(entry.owner)
    found = inspect.getattr_static(holder, entry.name)
    original = found.__func__ if isinstance(found, classmethod) else found

    def changed(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **options)

    setattr(holder, entry.name, classmethod(changed) if isinstance(found, classmethod) else changed)


def warned_on_import(*modules: str) -> list[str]:
    """What share_hf warns of when it is imported; once, although it registers twice."""
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("share_hf").addHandler(handler)
    for module in modules:
        importlib.import_module(module)
    sys.modules["share_hf"].tuner.register()
    logging.getLogger("share_hf").removeHandler(handler)
    return warned


def base() -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, pad_token_id=0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(8)[None]).logits


def trained(config: Any) -> Any:
    """A model after a step of training, which has changed what it computes."""
    model = peft.get_peft_model(base(), config, "one")
    before, ids = logits(model), torch.arange(8)[None]
    for _ in range(2):  # the coefficients of one side begin at zero
        model.train()(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= parameter.grad.sign() * 0.5
                    parameter.grad = None
    assert not torch.equal(logits(model), before)
    return model


def train_and_load(folder: Path | None, *, saves_bases: bool = False) -> str:
    """Train a task and a LoRA, and load them again if there is a folder to save them in."""
    share_hf = sys.modules["share_hf"]
    of_task = share_hf.ShareConfig(num_components=4, pseudo_rank=2, target_modules=["q_proj"])
    for config in (of_task, peft.LoraConfig()):
        model = trained(config)
        if folder is not None:
            place = folder / str(config.peft_type.value)
            model.save_pretrained(place)
            if saves_bases and config is of_task:
                share_hf.tuner.save_bases(model, place)
            loaded = peft.PeftModel.from_pretrained(base(), place / "one")
            assert torch.equal(logits(loaded), logits(model))
    return "works"


def where_it_is_missing(entry: Any, lora: Path) -> dict[str, Any]:
    remove(entry)
    warned = warned_on_import("share_hf")
    if entry.owner == "peft.mapping":  # without it, PEFT makes no models
        build = sys.modules["share_hf"].SharedSubspace.from_adapters
        tasks = build([lora], num_components=4, pseudo_rank=4, progress=False).tasks
        return {"warned": warned, "came_out": "works" if len(tasks) == 1 else tasks}
    return {"warned": warned, "came_out": train_and_load(None)}


def where_it_differs(entry: Any, folder: Path) -> dict[str, Any]:
    change_signature(entry)
    warned = warned_on_import("share_hf")
    return {"warned": warned, "came_out": train_and_load(folder, saves_bases=entry.name == "save_pretrained")}


def where_the_trainer_lacks(names: list[str]) -> list[str]:
    for name in names:
        delattr(transformers.Trainer, name)
    return warned_on_import("share_hf", "share_hf.continual")


# ---- All that is changed --------------------------------------------------------------------------------------------


def everything() -> dict[str, Any]:
    """All attributes of modules and classes of the libraries, and the entries of dictionaries among them."""
    found: dict[str, Any] = {}

    def add(name: str, holder: Any) -> None:
        for key, value in list(vars(holder).items()):
            found[f"{name}.{key}"] = value
            if type(value) is dict and not key.startswith("__"):
                found.update({f"{name}.{key}[{str(each)!r}]": content for each, content in list(value.items())})
            elif inspect.isclass(value) and value.__module__ == name and inspect.ismodule(holder):
                add(f"{name}.{key}", value)

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in LIBRARIES and isinstance(module, ModuleType):
            add(name, module)
    return found


def is_lazily_loaded(name: str, value: Any) -> bool:
    """Whether this is what a module of transformers sets the first time that it is asked for it."""
    module = sys.modules.get(name.rpartition(".")[0])
    return type(module).__name__ == "_LazyModule" and value.__module__.partition(".")[0] in LIBRARIES


def import_all() -> list[str]:
    """Import every module of share_hf. Returns the modules of the other libraries that it loads."""
    package = importlib.import_module("share_hf")
    for module in pkgutil.walk_packages(package.__path__, "share_hf."):
        if module.name not in ("share_hf.cli.__main__", "share_hf.serving.vllm_resolver"):
            importlib.import_module(module.name)
    return [name for name in sys.modules if name.partition(".")[0] in LIBRARIES]


def changes() -> list[str]:
    """The names of all that importing share_hf changes in the libraries, other than what these load lazily."""
    before = everything()
    import_all()
    after = everything()
    gone = before.keys() - after.keys()
    replaced = {name for name in before.keys() & after.keys() if before[name] is not after[name]}
    added = {name for name in after.keys() - before.keys() if not is_lazily_loaded(name, after[name])}
    return sorted(gone | replaced | added)


def reimported() -> dict[str, Any]:
    """Import share_hf, reload it, and import it anew: the functions that it replaces are replaced once."""
    upstream = importlib.import_module("share_hf.tuner.upstream")

    def depths() -> list[int]:
        found = []
        for entry in upstream.REPLACED:
            function, depth = getattr(pkgutil.resolve_name(entry.owner), entry.name), 0
            while (function := getattr(function, "__wrapped__", None)) is not None:
                depth += 1
            found.append(depth)
        return found

    first = depths()
    importlib.reload(sys.modules["share_hf.tuner.registration"]).register()
    importlib.reload(sys.modules["share_hf"])
    reloaded = depths()
    for name in [name for name in sys.modules if name.partition(".")[0] == "share_hf"]:
        del sys.modules[name]
    share_hf = importlib.import_module("share_hf")
    known = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["SHARE"] is share_hf.ShareConfig
    return {"depths": [first, reloaded, depths()], "known": known}


def save_lora(folder: Path) -> None:
    trained(peft.LoraConfig()).save_pretrained(folder)


def imports() -> dict[str, Any]:
    return {"reimported": in_fork(reimported), "changes": in_fork(changes)}


def cases(folder: Path) -> dict[str, Any]:
    entries = table()
    in_fork(save_lora, folder / "lora")
    lora, signed = folder / "lora" / "one", [entry for entry in entries.REPLACED if entry.parameters]
    return {
        "missing": {entry.label: in_fork(where_it_is_missing, entry, lora) for entry in entries.REPLACED},
        "differs": {entry.label: in_fork(where_it_differs, entry, folder / entry.label) for entry in signed},
        "trainer": in_fork(where_the_trainer_lacks, [entry.name for entry in entries.OF_TRAINER]),
    }


def main(part: str, folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    for name in in_fork(import_all):
        importlib.import_module(name)
    return imports() if part == "imports" else cases(Path(folder))


if __name__ == "__main__":
    print("FOUND" + json.dumps(main(*sys.argv[1:])))
