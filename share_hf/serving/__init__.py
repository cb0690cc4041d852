"""Tasks of a subspace in the hands of other servers: a LoRA by name for vLLM, a file for llama.cpp and Ollama.

`vllm_resolver` is loaded by vLLM alone, and needs it; it is not imported here.
"""

from .gguf_lora import GgufBase, GgufDtype, export_gguf
from .lora_cache import LoraCache


__all__ = ["GgufBase", "GgufDtype", "LoraCache", "export_gguf"]
