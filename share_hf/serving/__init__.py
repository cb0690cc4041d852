"""Tasks of a subspace for other servers: a LoRA by name for vLLM, a file for llama.cpp and Ollama.

Only vLLM loads `vllm_resolver`, which needs vLLM; it is not imported here.
"""

from .gguf_lora import GgufBase, GgufDtype, export_gguf
from .lora_cache import LoraCache


__all__ = ["GgufBase", "GgufDtype", "LoraCache", "export_gguf"]
