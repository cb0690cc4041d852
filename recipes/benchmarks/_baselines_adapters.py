"""What each baseline holds beside its heads, and how that is begun, trained, used and stored."""

from __future__ import annotations

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
    """What all methods have in common.

    Args:
        args: Arguments of every training; `seed` is that of the first task, and each later task's is higher by 2. No
            checkpoints are written.
        target_modules: Names of the layers to adapt.
        rank: Rank of each LoRA.
        alpha: Scale of each LoRA times its rank; the rank if None.
        orthogonality: Weight λ of O-LoRA's penalty.
        head_learning_rate: Learning rate of the heads; that of `args` if None.
        processing_class: Tokenizer that pads a batch; None where examples are of one length.
        data_collator: What makes a batch of examples; the Trainer's choice if None.
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
        model: The model, whose backbone is wrapped. Heads are none of a method's business.
        settings: What all methods have in common.
        num_tasks: Number of tasks of the stream.

    Attributes:
        keeps_tasks: Whether what is learned later leaves what a task answers as it is.
    """

    keeps_tasks = False

    def __init__(self, model: HeadedModel, settings: BaselineSettings, num_tasks: int) -> None:
        self.model = model
        self.settings = settings
        self.num_tasks = num_tasks
        self.loras: list[str] = []

    def begin(self, position: int) -> None:
        """Make trainable what is trained on the task at this position, and nothing else of the backbone."""
        raise NotImplementedError

    def penalty(self) -> Tensor | None:
        """What is added to the loss of a training step; None for nothing."""
        return None

    def finish(self) -> None:
        """Take what was trained into the state that is stored."""

    def select(self, position: int) -> None:
        """Make the backbone that of this task, for it to be scored."""

    def shared_tensors(self) -> dict[str, Tensor]:
        """What must be kept for all tasks alike."""
        return {}

    def tensors_of(self, position: int) -> dict[str, Tensor]:
        """What must be kept for the task at this position, its head aside."""
        return {}

    def _add_lora(self) -> None:
        """Add a LoRA to `loras` and make it the active one."""
        # PEFT finds the tensors of an adapter by parts of their names: no name may be within another.
        name = f"lora-{len(self.loras):05d}"
        alpha = self.settings.rank if self.settings.alpha is None else self.settings.alpha
        config = LoraConfig(r=self.settings.rank, lora_alpha=alpha, target_modules=list(self.settings.target_modules))
        if self.loras:
            self.model.backbone.add_adapter(name, config)
            self.model.backbone.set_adapter(name)
        else:
            self.model.backbone = get_peft_model(self.model.backbone, config, adapter_name=name)
        self.loras.append(name)

    def _lora_tensors(self, place: int) -> dict[str, Tensor]:
        return get_peft_model_state_dict(
            self.model.backbone, adapter_name=self.loras[place], save_embedding_layers=False
        )


class OneLora(Adapters):
    """One LoRA that is trained again and again: sequential training, replay, and all tasks at once."""

    def begin(self, position: int) -> None:
        if not self.loras:
            self._add_lora()

    def shared_tensors(self) -> dict[str, Tensor]:
        return self._lora_tensors(0)


class LoraPerTask(Adapters):
    """A LoRA of its own for each task."""

    keeps_tasks = True

    def begin(self, position: int) -> None:
        self._add_lora()

    def select(self, position: int) -> None:
        self.model.backbone.set_adapter(self.loras[position])

    def tensors_of(self, position: int) -> dict[str, Tensor]:
        return self._lora_tensors(position)


class OLora(LoraPerTask):
    """O-LoRA (Wang et al. 2023, arXiv 2310.14152): a LoRA more for each task, and every input goes through all.

    Those of earlier tasks are frozen. The penalty is that of the paper, ``λ Σ_{i<t} Σ_{j,k} (A_i A_tᵀ)[j,k]²`` summed
    over layers, with A (rank, in) as PEFT has it. The code that comes with the paper sums absolute values instead,
    which push each product to zero as hard near zero as far from it and depend more on rank and width; its λ is not
    this one's.
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
        # New A (rank, in) of each layer, and those of all earlier tasks in one (rank * earlier tasks, in).
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
        """Nothing: all tasks are scored with all LoRAs."""


class Osf(Adapters):
    """Orthogonal subspace fine-tuning (arXiv 2504.07097) with PEFT's OSF: the weights themselves are trained.

    The largest singular directions of each weight are kept, and gradients are projected off them. As PEFT's guide
    advises for n tasks known in advance, task t keeps a share (t - 1) / n of the directions of the weights as earlier
    tasks left them; PEFT keeps no fewer than one. That is many times what a LoRA trains, and rank and alpha mean
    nothing here. The guide unwraps the model with `unload`, which since the weights became a sum with what was
    trained would drop that: it is merged instead. PEFT projects gradients and not steps, so that only plain gradient
    descent leaves the kept directions alone; Adam does so in part.
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
