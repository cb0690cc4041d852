"""FSDP: the base model is sharded once, and adapters stay whole on every process.

FSDP fixes the set of parameters that it manages when it shards a module, but every phase adds an adapter and every
merge replaces all of them. Adapters and heads are small, so they are left out: each process trains all of their
parameters, and their gradients are averaged before a step, as in DDP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import accelerate
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..tuner.model import share_layers
from .engine import Engine


if TYPE_CHECKING:  # the import also loads datasets and pandas, which only the `train` command needs
    from transformers import Trainer


class FSDPEngine(Engine):
    """FSDP2 for the base model, with whole adapters on every process."""

    def prepare(self) -> None:
        shard_base_model(self.trainer)

    @contextmanager
    def train_ready(self) -> Iterator[None]:
        trained = [parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad]
        broadcast(trained, self.trainer.accelerator.device)
        with super().train_ready():
            yield

    @contextmanager
    def inference_ready(self) -> Iterator[None]:
        yield

    def release(self) -> None:
        """Do nothing: adapters are whole, and the base model stays sharded."""

    def recover(self) -> None:
        """Do nothing, for the same reason."""

    def after_backward(self) -> None:
        average_gradients(self.trainer.model)

    def gather(self) -> None:
        """Reshard the base model: adapters are whole, but reading them must not read weights left gathered."""
        reshard(self.trainer.model)


def check_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    """Refuse FSDP settings that do not work with adapters that are added and removed.

    Raises:
        ValueError: If there is such a setting. The message names it and what works instead.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version is {plugin.fsdp_version}, expected 2: FSDP1 flattens adapters into the base model"
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing is True, expected gradient_checkpointing=True in the training arguments: "
            "FSDP's own renames the modules that a subspace belongs to"
        )
    from torch.distributed.fsdp import CPUOffloadPolicy

    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("fsdp_offload_params is True, expected False, or DeepSpeed with offload_param")
    if plugin.ignored_modules:
        raise ValueError(f"fsdp_ignored_modules is {plugin.ignored_modules!r}, expected none: adapters are ignored")


def shard_base_model(trainer: Trainer) -> None:
    """Shard a trainer's model over the processes, except for its adapters and heads.

    From then on, the trainer treats the model as one that needs no engine: the Trainer's own handling of FSDP would
    gather and scatter adapters that are whole.
    """
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor

    accelerator, model = trainer.accelerator, trainer.model
    plugin = accelerator.state.fsdp_plugin
    kept = modules_kept_whole(model)
    for module in kept:
        module.to(accelerator.device)
    # With efficient loading, only the first process has read the weights. New heads may differ as well.
    broadcast([*model.parameters(), *model.buffers()], accelerator.device)
    plugin.cpu_ram_efficient_loading = False
    plugin.ignored_modules = kept
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layer_classes(model)
    if plugin.mixed_precision_policy is not None:
        # Outputs, including the loss, keep the precision in which they are computed.
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
    # This call is for accelerate's mixed precision: that of FSDP casts only what it shards.
    accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    fsdp2_prepare_model(accelerator, model)
    if any(isinstance(parameter, DTensor) for module in kept for parameter in module.parameters()):
        raise ValueError(
            f"accelerate {accelerate.__version__} and torch {torch.__version__} shard adapters too, expected newer "
            "ones with torch >= 2.7, or DDP or DeepSpeed"
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The buffers that weights are gathered in are allocated once. In the inference mode of a scorer, they
            # would be untrainable.
            module.unshard()
            module.reshard()
    register_fsdp_forward_method(model, "generate")
    trainer.is_fsdp_enabled = False


def layer_classes(model: PeftModel) -> list[str]:
    """Return the names of the classes whose modules are sharded one by one. Embeddings are separate already."""
    embeddings = model.get_input_embeddings()
    with_embeddings = {type(module).__name__ for module in model.modules() if embeddings in module.modules()}
    return sorted(set(model._no_split_modules or ()) - with_embeddings)


def modules_kept_whole(model: PeftModel) -> list[nn.Module]:
    """Return the containers of adapter parameters, and heads with the originals that new tasks copy."""
    adapters = [getattr(layer, name) for layer in share_layers(model).values() for name in layer.adapter_layer_names]
    return adapters + [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]


@torch.no_grad()
def broadcast(tensors: list[Tensor], device: torch.device) -> None:
    """Copy the values of tensors on the first process to every other process."""
    for tensor in tensors:
        value = tensor.detach().to(device).contiguous()
        dist.broadcast(value, src=0)
        tensor.data.copy_(value)


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Replace the gradients of trained parameters by their mean over the processes, in one exchange."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A parameter that the batch of one process did not reach has no gradient there, but may have one elsewhere.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, mean in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        parameter.grad = mean.view_as(parameter).clone()


def reshard(model: nn.Module) -> None:
    """Reshard weights that a forward pass left gathered: reading a state dict would do so on one process alone."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
