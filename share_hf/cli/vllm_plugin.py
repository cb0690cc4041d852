"""The entry point that vLLM calls in each of its processes. This module needs only the standard library.

`import share_hf` takes about 3 s, mostly for PEFT, and servers without a subspace should not wait for it.
"""

from __future__ import annotations

import importlib
import os


def register_resolver() -> None:
    """Register the resolver of `share_hf.serving.vllm_resolver` with vLLM, if `SHARE_HF_SUBSPACE` is set."""
    if os.environ.get("SHARE_HF_SUBSPACE"):
        importlib.import_module("share_hf.serving.vllm_resolver").register_resolver()
