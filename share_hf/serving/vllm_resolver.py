"""A LoRA resolver for vLLM: `vllm serve BASE --enable-lora` serves every task of a subspace by its name.

vLLM loads this module in each of its processes through the entry point `share_hf_resolver` of the group
`vllm.general_plugins`, if `SHARE_HF_SUBSPACE` is set. It asks resolvers only if `VLLM_ALLOW_RUNTIME_LORA_UPDATING` is
set too. The signatures of `LoRAResolver`, `LoRARequest` and `LoRAResolverRegistry` are those of vLLM 0.33.0, read in
its wheel.

vLLM 0.33 treats an answer as follows: it gives the LoRA a number of its own, and keeps name and place until
`/v1/unload_lora_adapter` is called. A task that has changed in the subspace is served anew after that. If a resolver
answers None, vLLM asks the next one, and if there is none, it tells the client "does not exist". An error in a
resolver would keep vLLM from asking the others, so any error is logged here and answered with None.
"""

from __future__ import annotations

import asyncio
import hashlib
import os

from transformers.utils import logging
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from .lora_cache import SUBSPACE_VARIABLE, LoraCache


logger = logging.get_logger(__name__)

RESOLVER_NAME = "share_hf"
_ALLOWED = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


class ShareResolver(LoRAResolver):
    """
    Resolver that finds tasks of a subspace for vLLM.

    Args:
        cache ([`LoraCache`]): Cache that provides the LoRAs.
    """

    def __init__(self, cache: LoraCache) -> None:
        self._cache = cache

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """
        Find a task's LoRA.

        Args:
            base_model_name (`str`): Name or folder of the model that is served.
            lora_name (`str`): Name of the LoRA. See [`LoraCache.folder_of`].

        Returns:
            `LoRARequest`: Request with the place of the LoRA; None if there is no such task, or it cannot be served,
                which is logged.
        """
        try:
            folder = await asyncio.to_thread(self._cache.folder_of, lora_name, base_model_name)
        except Exception as error:  # of any kind, because vLLM must still ask the other resolvers
            logger.error("LoRA %r cannot be served: %s", lora_name, error)
            return None
        if folder is None:
            logger.info("LoRA %r is not a task of %s.", lora_name, self._cache.subspace)
            return None
        return LoRARequest(lora_name=lora_name, lora_int_id=stable_id(lora_name, folder.name), lora_path=str(folder))


def register_resolver() -> None:
    """
    Register the resolver with vLLM, if `SHARE_HF_SUBSPACE` names a subspace.

    vLLM may call this several times in a process.

    Raises:
        ValueError: If it names a folder without a subspace. The server does not start then.
    """
    if RESOLVER_NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    cache = LoraCache.from_environment()
    if cache is None:
        return
    if os.environ.get(_ALLOWED, "0").strip().lower() not in ("1", "true"):
        logger.warning("%s is set, but vLLM asks for tasks only if %s=1 is set too.", SUBSPACE_VARIABLE, _ALLOWED)
    LoRAResolverRegistry.register_resolver(RESOLVER_NAME, ShareResolver(cache))


def stable_id(name: str, place: str) -> int:
    """Return a positive 63-bit number that is the same in every process for one LoRA in one state of its subspace."""
    digest = hashlib.sha256(f"{name}\n{place}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 1) or 1
