"""FSDP: the base model is sharded once, adapters stay whole on every process.

FSDP settles which parameters it manages when it shards a module, but every phase adds an adapter and every merge
replaces all of them. Adapters and heads are small, so they are left out: each process trains the whole of them, and
their gradients are averaged before a step, as in DDP.
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


if TYPE_CHECKING:  # datasets and pandas come along, which no command but `train` needs
    from transformers import Trainer


class FSDPEngine(Engine):
    """FSDP2 of the base model, beside adapters that every process has whole."""

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
        """Nothing to take off: adapters are whole, and the base model stays sharded."""

    def recover(self) -> None:
        """Nothing to take off."""

    def after_backward(self) -> None:
        average_gradients(self.trainer.model)

    def gather(self) -> None:
        """The adapters are whole, but reading them must not read weights that were left gathered."""
        reshard(self.trainer.model)


def check_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    """Refuse the settings of FSDP that adapters which come and go do not fit in.

    Raises:
        ValueError: Naming the setting, and what works instead.
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
    """Shard a trainer's model over the processes, all but its adapters and heads.

    From then on the trainer treats the model as one that needs no engine: its own way with FSDP would gather and
    scatter adapters that are whole.
    """
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor

    accelerator, model = trainer.accelerator, trainer.model
    plugin = accelerator.state.fsdp_plugin
    kept = modules_kept_whole(model)
    for module in kept:
        module.to(accelerator.device)
    # With efficient loading only the first process has read the weights; new heads may differ as well.
    broadcast([*model.parameters(), *model.buffers()], accelerator.device)
    plugin.cpu_ram_efficient_loading = False
    plugin.ignored_modules = kept
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layer_classes(model)
    if plugin.mixed_precision_policy is not None:
        # Outputs, the loss among them, stay as precise as they are computed.
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
    # For its mixed precision: that of FSDP casts what it shards, and no more.
    accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    fsdp2_prepare_model(accelerator, model)
    if any(isinstance(parameter, DTensor) for module in kept for parameter in module.parameters()):
        raise ValueError(
            f"accelerate {accelerate.__version__} and torch {torch.__version__} shard adapters too, expected newer "
            "ones with torch >= 2.7, or DDP or DeepSpeed"
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # What weights are gathered in is made once; in the inference mode of a scorer it would be untrainable.
            module.unshard()
            module.reshard()
    register_fsdp_forward_method(model, "generate")
    trainer.is_fsdp_enabled = False


def layer_classes(model: PeftModel) -> list[str]:
    """Names of the classes whose modules are sharded one by one; embeddings are already by themselves."""
    embeddings = model.get_input_embeddings()
    with_embeddings = {type(module).__name__ for module in model.modules() if embeddings in module.modules()}
    return sorted(set(model._no_split_modules or ()) - with_embeddings)


def modules_kept_whole(model: PeftModel) -> list[nn.Module]:
    """What holds the parameters of adapters, and heads with the originals that new tasks copy."""
    adapters = [getattr(layer, name) for layer in share_layers(model).values() for name in layer.adapter_layer_names]
    return adapters + [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]


@torch.no_grad()
def broadcast(tensors: list[Tensor], device: torch.device) -> None:
    """Give tensors on every process the values that they have on the first one."""
    for tensor in tensors:
        value = tensor.detach().to(device).contiguous()
        dist.broadcast(value, src=0)
        tensor.data.copy_(value)


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Replace the gradients of what is trained by their mean over the processes, in one exchange."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # What the batch of one process did not reach has no gradient there, but may have one elsewhere.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, mean in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        parameter.grad = mean.view_as(parameter).clone()


def reshard(model: nn.Module) -> None:
    """Give up weights that a forward has left gathered: reading a state dict would, and then on one process alone."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
