"""The command that lists what a bug report needs to know about the environment.

It imports neither share_hf nor PEFT, so that it also runs where one of them cannot be imported.
"""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from .outcome import Outcome


PACKAGES = (
    "share-hf",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "huggingface_hub",
    "datasets",
    "safetensors",
    "bitsandbytes",
    "deepspeed",
    "trl",
)


def env() -> Outcome:
    """Run `share-hf env`: versions of Python, libraries and CUDA, and the devices, but neither paths nor users."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        **_torch_facts(),
    }
    lines = [
        *(f"{name}: {version or 'not installed'}" for name, version in facts["packages"].items()),
        f"Python: {facts['python']}",
        f"platform: {facts['platform']}",
    ]
    if "torch_error" in facts:
        lines.append(f"torch cannot be imported: {facts['torch_error']}")
    else:
        lines += [f"torch built for: {facts['built_for']}", f"devices: {', '.join(facts['devices']) or 'CPU only'}"]
    return Outcome("\n".join(f"- {line}" for line in lines), facts)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch_facts() -> dict[str, Any]:
    """Return what torch was built for and the devices that it finds, or why it cannot be imported."""
    try:
        import torch
    except Exception as error:  # a broken installation raises anything: ImportError, OSError, AttributeError …
        return {"built_for": None, "devices": [], "torch_error": type(error).__name__}
    platforms = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": torch.version.xpu}
    built_for = next((f"{name} {version}" for name, version in platforms.items() if version), "CPU")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        devices = []
    elif accelerator.type == "cuda":
        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    else:
        devices = [accelerator.type] * torch.accelerator.device_count()
    return {"built_for": built_for, "devices": devices}
