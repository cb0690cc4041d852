"""The adapters of each baseline: how they are created, trained, selected and stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from _baselines_heads import HeadedModel
from peft import LoraConfig, OSFConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import DataCollator, PreTrainedTokenizerBase, TrainingArguments


@dataclass(frozen=True)
class BaselineSettings:
    """Settings that all methods share.

    Args:
        args: Arguments of every training run. `seed` is the seed of the first task; it increases by 2 with each later
            task. No checkpoints are written.
        target_modules: Names of the layers to adapt.
        rank: Rank of each LoRA.
        alpha: Scale of each LoRA times its rank. None means the rank.
        orthogonality: Weight λ of O-LoRA's penalty.
        head_learning_rate: Learning rate of the heads. None means the learning rate of `args`.
        processing_class: Tokenizer that pads a batch. None if all examples have the same length.
        data_collator: Function that makes a batch of examples. None means the Trainer's default.
    """

    args: TrainingArguments
    target_modules: Sequence[str]
    rank: int = 8
    alpha: float | None = None
    orthogonality: float = 0.5
    head_learning_rate: float | None = None
    processing_class: PreTrainedTokenizerBase | None = None
    data_collator: DataCollator | None = None


class Adapters:
    """The adapters of a method within the backbone of a model.

    Args:
        model: Model whose backbone is wrapped. Methods do not handle the heads.
        settings: Settings that all methods share.
        num_tasks: Number of tasks in the stream.

    Attributes:
        keeps_tasks: Whether the answers to a task stay the same when later tasks are learned.
    """

    keeps_tasks = False

    def __init__(self, model: HeadedModel, settings: BaselineSettings, num_tasks: int) -> None:
        self.model = model
        self.settings = settings
        self.num_tasks = num_tasks
        self.loras: list[str] = []
        self._has_new_lora = False
        targets = tuple(f".{name}" for name in settings.target_modules)
        layers = (module for name, module in model.backbone.named_modules() if f".{name}".endswith(targets))
        self._in_features = [layer.in_features for layer in layers]

    def begin(self, position: int) -> None:
        """Make the parameters trainable that learn the task at this position, and nothing else in the backbone."""
        raise NotImplementedError

    def draw(self) -> None:
        """Draw what Share's init phase draws from the same random state, and start a new LoRA with it.

        Without a new LoRA, the draws are made all the same, because the order of examples is drawn next.
        """
        factors = [torch.empty(inputs, self.settings.rank) for inputs in self._in_features]
        for factor in factors:
            nn.init.kaiming_uniform_(factor.T, a=math.sqrt(5))
        if self._has_new_lora:
            layers = [module for module in self.model.backbone.modules() if isinstance(module, LoraLayer)]
            for layer, factor in zip(layers, factors, strict=True):
                layer.lora_A[self.loras[-1]].weight.data.copy_(factor.T)
        self._has_new_lora = False

    def penalty(self) -> Tensor | None:
        """Return the term to add to the loss of a training step, or None for no penalty."""
        return None

    def finish(self) -> None:
        """Move the trained parameters into the state that is stored."""

    def select(self, position: int) -> None:
        """Switch the backbone to the task at this position, before it is scored."""

    def shared_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that all tasks need."""
        return {}

    def tensors_of(self, position: int) -> dict[str, Tensor]:
        """Return the tensors that only the task at this position needs, without its head."""
        return {}

    def _add_lora(self) -> None:
        """Add a LoRA to `loras` and make it the active one."""
        # PEFT finds the tensors of an adapter by substrings of their names, so no name may be part of another.
        name = f"lora-{len(self.loras):05d}"
        alpha = self.settings.rank if self.settings.alpha is None else self.settings.alpha
        config = LoraConfig(r=self.settings.rank, lora_alpha=alpha, target_modules=list(self.settings.target_modules))
        if self.loras:
            self.model.backbone.add_adapter(name, config)
            self.model.backbone.set_adapter(name)
        else:
            self.model.backbone = get_peft_model(self.model.backbone, config, adapter_name=name)
        self.loras.append(name)
        self._has_new_lora = True

    def _lora_tensors(self, place: int) -> dict[str, Tensor]:
        return get_peft_model_state_dict(
            self.model.backbone, adapter_name=self.loras[place], save_embedding_layers=False
        )


class OneLora(Adapters):
    """One LoRA for all tasks: sequential training, replay, and training on all tasks at once."""

    def begin(self, position: int) -> None:
        if not self.loras:
            self._add_lora()

    def shared_tensors(self) -> dict[str, Tensor]:
        return self._lora_tensors(0)


class LoraPerTask(Adapters):
    """A separate LoRA for each task."""

    keeps_tasks = True

    def begin(self, position: int) -> None:
        self._add_lora()

    def select(self, position: int) -> None:
        self.model.backbone.set_adapter(self.loras[position])

    def tensors_of(self, position: int) -> dict[str, Tensor]:
        return self._lora_tensors(position)


class OLora(LoraPerTask):
    """O-LoRA (Wang et al. 2023, arXiv 2310.14152): adds a LoRA for each task, and every input goes through all LoRAs.

    The LoRAs of earlier tasks are frozen. The penalty is the paper's, ``λ Σ_{i<t} Σ_{j,k} (A_i A_tᵀ)[j,k]²`` summed
    over layers, with A (rank, in) as in PEFT. The code that comes with the paper sums absolute values instead. They
    push each product towards zero with the same force near zero as far from it, and depend more on rank and width, so
    its λ is not comparable with this one.
    """

    keeps_tasks = False
    _pairs: Sequence[tuple[nn.Parameter, Tensor]] = ()

    def begin(self, position: int) -> None:
        super().begin(position)
        *earlier, new = self.loras
        self.model.backbone.base_model.set_adapter(self.loras)
        layers = [module for module in self.model.backbone.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            for name in earlier:
                layer.lora_A[name].requires_grad_(False)
                layer.lora_B[name].requires_grad_(False)
        # For each layer, the new A (rank, in), and the A of all earlier tasks stacked (rank * earlier tasks, in).
        self._pairs = [
            (layer.lora_A[new].weight, torch.cat([layer.lora_A[name].weight for name in earlier]))
            for layer in layers
            if earlier
        ]

    def penalty(self) -> Tensor | None:
        if not self._pairs:
            return None
        return self.settings.orthogonality * sum((earlier @ new.T).square().sum() for new, earlier in self._pairs)

    def select(self, position: int) -> None:
        """Do nothing: all tasks are scored with all LoRAs."""


class Osf(Adapters):
    """Orthogonal subspace fine-tuning (arXiv 2504.07097) with PEFT's OSF: the weights themselves are trained.

    OSF keeps the largest singular directions of each weight and projects gradients off them. As PEFT's guide advises
    for n tasks known in advance, task t keeps a fraction (t - 1) / n of the directions of the weights that earlier
    tasks left behind; PEFT keeps at least one direction. OSF trains many times as many parameters as a LoRA, and rank
    and alpha have no meaning here. The guide unwraps the model with `unload`. Now that OSF adds the trained part to
    the weights, `unload` would discard that part, so it is merged instead. PEFT projects gradients, not steps:
    only plain gradient descent leaves the kept directions unchanged, and Adam does so in part.
    """

    _names: Sequence[str] = ()

    def begin(self, position: int) -> None:
        kept = position / self.num_tasks if position else 1
        config = OSFConfig(effective_rank=kept, target_modules=list(self.settings.target_modules))
        self.model.backbone = get_peft_model(self.model.backbone, config)
        self._names = self.model.backbone.base_model.targeted_module_names

    def finish(self) -> None:
        self.model.backbone = self.model.backbone.merge_and_unload()

    def shared_tensors(self) -> dict[str, Tensor]:
        return {f"{name}.weight": self.model.backbone.get_submodule(name).weight for name in self._names}
