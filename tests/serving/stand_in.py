"""What `share_hf.serving.vllm_resolver` uses of vLLM, with the signatures of vLLM 0.33.0, for machines without vLLM.

`test_vllm.py` compares them with those of the real one where that is installed.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Set
from dataclasses import dataclass, field
from types import ModuleType

import pytest


@dataclass
class LoRARequest:
    """Stands for `vllm.lora.request.LoRARequest`; vLLM writes another `lora_int_id` into it."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        assert self.lora_path, "lora_path cannot be empty"


class LoRAResolver(ABC):
    """Stands for `vllm.lora.resolver.LoRAResolver`."""

    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Find a LoRA by its name."""


@dataclass
class Registry:
    """Stands for the class of `vllm.lora.resolver.LoRAResolverRegistry`."""

    resolvers: dict[str, LoRAResolver] = field(default_factory=dict)

    def get_supported_resolvers(self) -> Set[str]:
        """Return the names of the registered resolvers."""
        return self.resolvers.keys()

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        """Register a resolver."""
        self.resolvers[resolver_name] = resolver

    def get_resolver(self, resolver_name: str) -> LoRAResolver:
        """Return one of the resolvers."""
        return self.resolvers[resolver_name]


def install(patch: pytest.MonkeyPatch) -> None:
    """Put the stand-in where vLLM's modules are imported from."""
    request, resolver = ModuleType("vllm.lora.request"), ModuleType("vllm.lora.resolver")
    request.LoRARequest = LoRARequest
    resolver.LoRAResolver, resolver.LoRAResolverRegistry = LoRAResolver, Registry()
    for module in (ModuleType("vllm"), ModuleType("vllm.lora"), request, resolver):
        patch.setitem(sys.modules, module.__name__, module)
