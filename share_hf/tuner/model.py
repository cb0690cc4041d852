"""The tuner, which injects Share into a model and connects it to PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from torch import Tensor, nn
from transformers.utils import logging

from ..format.basis_file import BasisFile
from ..format.coefficients import with_unpacked
from ..format.module_names import without_wrappers
from ..format.patterns import without_slow_patterns
from ..format.saved_modules import saved_module_of
from ..format.task_files import FINGERPRINT
from ..state.layout import Layout, named
from ..subspace import smaller_layers
from .checks import TaskConfigs, check_has_basis, check_modules, check_same_dimensions
from .combining import combined_coefficients, combined_config
from .config import AdapterOrigin, ShareConfig
from .convolution import Convolution
from .embedding import Embedding
from .experts import Expert, adapt_experts, parameters_adapted, remove_new_layers
from .head import check_apart, check_head
from .kinds import ExpertWeight, check_experts, layout_of, matrix_shape
from .layer import ShareLayer
from .linear import Linear
from .loading import StoredAdapter, keep_weights, stored_adapter
from .lora_only import check_options
from .merging import MergingTuner, offload_hook_of
from .mixed_heads import mix_heads
from .mixing import mixed_batch
from .placeholder import placeholder_basis
from .placement import call_layers_of, check_reached
from .quantization import check_supported, keep_4bit_weights_differentiable
from .ranks import make_room_in
from .renaming import adapter_named_as_in
from .routing import RoutingModel, routed_if_auto
from .rows import Rows
from .stacked import StackedParameters
from .together import activate_together, train_heads


logger = logging.get_logger(__name__)

# Classes by the kind of a layer's layout; None for dense layers.
_CLASSES = {None: Linear, "convolution": Convolution, "embedding": Embedding}

_OTHER_BASIS = (
    "the stored basis of {!r} is not the one the model has, expected tasks of one subspace; merge the two "
    "subspaces, or export the task as a LoRA and add it"
)


class ShareModel(RoutingModel, MergingTuner):
    """
    Tuner of a shared subspace.

    Every adapted layer holds one basis for all tasks; an adapter consists of the coefficients of one task. An adapter
    that is loaded from a folder or repository brings the basis it was saved with, which is found next to it. The first
    one sets the basis, and others must come with the same. A model that starts from a fresh [`ShareConfig`] has a
    random orthonormal basis until a merge learns one.

    Args:
        model (`torch.nn.Module`): The model to adapt.
        config ([`ShareConfig`]): Configuration of the first task.
        adapter_name (`str`): Name of the first task.

    Example:
        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from share_hf import ShareConfig

        >>> model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
        >>> model = get_peft_model(model, ShareConfig(num_components=32, pseudo_rank=8), adapter_name="mrpc")
        ```
    """

    prefix: str = "share_"
    tuner_layer_cls = ShareLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    _stored = StoredAdapter()  # data of the adapter being injected
    _share_layers: Sequence[ShareLayer] | None = None

    @property
    def rows(self) -> Rows:
        """The rows of all tasks in the stacks of the layers."""
        if "_rows" not in vars(self):
            layers = share_layers(self.model).values()  # not empty if transformers added adapters to the model
            self._rows = next((layer.rows for layer in layers), None) or Rows()
        return self._rows

    def _check_new_adapter_config(self, config: ShareConfig) -> None:
        super()._check_new_adapter_config(config)
        check_options(ShareConfig, vars(config))
        # Take the newest, because one object may configure several adapters.
        name = next(name for name in reversed(self.peft_config) if self.peft_config[name] is config)
        ours = name.startswith("_") and hasattr(StackedParameters(Rows(), 0), name)
        if not name or "." in name or ours or hasattr(nn.ParameterDict(), name):
            raise ValueError(f"adapter name {name!r} cannot be a key of torch.nn.ParameterDict, expected another name")
        for other_name, other in self.peft_config.items():
            if not isinstance(other, ShareConfig):
                raise ValueError(
                    f"adapter {other_name!r} of the model is {other.peft_type.value}, expected only SHARE adapters "
                    f"beside {name!r}: unload it first, or make it a task with SharedSubspace.from_adapters"
                )
            check_same_dimensions(config, f"adapter {name!r}", other, f"adapter {other_name!r}")

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the model. If it does not fit, raise and leave the model as it was."""
        layers_before = set(share_layers(model).values())
        requires_grad_before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._set_fan_in_fan_out(self.peft_config[adapter_name], adapter_name)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            remove_new_layers(model, adapter_name, layers_before)
            self.rows.give_back(adapter_name)
            for parameter, requires_grad in requires_grad_before:
                parameter.requires_grad = requires_grad
            raise
        else:
            self._share_layers = None
            if not isinstance(self.peft_config, TaskConfigs):
                self.peft_config = TaskConfigs(self.peft_config)
            mix_heads(model, self.rows)
            self._tell_smaller_layers(model, self.peft_config[adapter_name], layers_before)
        finally:
            self._stored = StoredAdapter()

    def _tell_smaller_layers(self, model: nn.Module, config: ShareConfig, before: set[ShareLayer]) -> None:
        """Log one line about new layers that have no room for k directions, unless their basis was stored."""
        layers = {} if self._stored.bases else share_layers(model)
        fresh = {name: layer for name, layer in layers.items() if layer not in before}
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in fresh.items()}
        if (line := smaller_layers(shapes, config.num_components)) is not None:
            logger.warning_once(line)

    def _set_fan_in_fan_out(self, config: ShareConfig, adapter_name: str) -> None:
        """Make the configuration state what the layers found out by themselves; some models have both kinds."""
        layers = [layer for layer in share_layers(self.model).values() if layer.has_task(adapter_name)]
        found = any(layer.fan_in_fan_out for layer in layers)
        if config.fan_in_fan_out and not found:
            warnings.warn("fan_in_fan_out is True but no target is a Conv1D. Setting it to False.", stacklevel=2)
        config.fan_in_fan_out = found

    def _check_target_module_compatiblity(self, peft_config: ShareConfig, model: nn.Module, target_name: str) -> None:
        """Refuse what PEFT refuses for LoRA: layers whose weight the model reads itself, as Mamba does."""
        super()._check_target_module_compatiblity(LoraConfig(), model, target_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in share_layers(self.model).values():
                layer.cast_to_base(adapter_name)

    def _prepare_model(self, peft_config: ShareConfig, model: nn.Module) -> None:
        """Read the basis that an adapter was saved with. Runs for every adapter, before the model is changed."""
        if hasattr(model, "get_base_model"):
            raise ValueError(
                f"model is a {type(model).__name__}, expected the base model: add a task to it with add_adapter, or "
                "remove its adapters first with unload or merge_and_unload"
            )
        keep_4bit_weights_differentiable(model)
        layers = share_layers(model)
        self._stored = adapter_named_as_in(model, stored_adapter(peft_config, basis_files(model)))
        check_modules(model, self._stored, from_file=bool(self._stored.weights))
        if isinstance(peft_config.origin, AdapterOrigin):
            keep_weights(peft_config.origin, self._stored.weights)
        else:
            peft_config.origin = None  # The layers hold the bases now; the configuration would keep them past a merge.
        if (adapted := self._stored.adapted) is not None:
            # Names that match nothing now may match something later.
            vars(peft_config).update(without_slow_patterns(vars(peft_config), adapted))
            peft_config.target_parameters = parameters_adapted(peft_config.target_parameters, adapted)
        if (head := self._stored.head) is not None:
            check_head(model, peft_config.modules_to_save or [], head)
            saved = {name for config in self.peft_config.values() for name in config.modules_to_save or []}
            check_apart({*(self._stored.adapted or ()), *layers}, saved)
        embeddings = self._stored.embeddings
        check_head(model, {name.rpartition(".")[0] for name in embeddings}, embeddings)
        for module_name, layer in layers.items():
            stored = self._stored.bases.get(module_name)
            if stored is not None and not stored.equals(layer.share_basis_out, layer.share_basis_in):
                raise ValueError(_OTHER_BASIS.format(module_name))

    def _check_target_module_exists(self, config: ShareConfig, key: str) -> object:
        """Return whether an adapter adapts a module. A stored one adapts exactly the modules it has coefficients for.

        A module that is kept whole is not adapted. PEFT itself keeps modules by the ends of their names, for example
        `pre_classifier` for `classifier`, but exempts modules from adaptation by whole parts of their names.
        """
        if saved_module_of(f"{without_wrappers(key)}.", config.modules_to_save or []) is not None:
            return False
        if self._stored.adapted is None:
            return super()._check_target_module_exists(config, key)
        return without_wrappers(key) in self._stored.adapted

    def _create_and_replace(
        self,
        peft_config: ShareConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        module_name = without_wrappers(current_key)
        if (parameter := optional_kwargs.get("parameter_name")) is not None:
            self._adapt_experts(peft_config, adapter_name, parent, target_name, module_name, parameter)
            return
        check_has_basis(self._stored, module_name)
        fingerprint = self._stored.fingerprints.get(module_name)
        if isinstance(target, ShareLayer):
            if fingerprint is not None:
                target.share_fingerprint.check(fingerprint, f"{module_name}.{FINGERPRINT}")
            target.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode)
            make_room_in(target, adapter_name, self._stored.ranks.get(module_name))
            return
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        check_supported(base_layer, module_name, self.model)
        check_reached(parent, target_name, module_name)
        basis_out, basis_in = self._basis_for(peft_config, base_layer, module_name)
        new_module = _CLASSES[None if (layout := layout_of(base_layer)) is None else layout.kind](
            target,
            adapter_name,
            peft_config,
            basis_out,
            basis_in,
            rows=self.rows,
            **get_quantization_kwargs(self.model),
        )
        if fingerprint is not None:
            new_module.share_fingerprint.check(fingerprint, f"{module_name}.{FINGERPRINT}")
        make_room_in(new_module, adapter_name, self._stored.ranks.get(module_name))
        new_module.basis_file = self._stored.basis_file
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)
        call_layers_of(parent, new_module)

    def _adapt_experts(
        self, config: ShareConfig, adapter_name: str, parent: nn.Module, target_name: str, name: str, parameter: str
    ) -> None:
        """Adapt all experts in a parameter of this name in the model, or those that a stored adapter has."""
        if self._stored.adapted is not None and f"{name}.0" not in self._stored.adapted:
            return
        holder = getattr(parent, target_name)
        check_experts(getattr(holder, "base_layer", holder), parameter, name)

        def adapt(number: int, expert: Expert | ExpertWeight) -> Expert:
            check_has_basis(self._stored, module_name := f"{name}.{number}")
            if isinstance(expert, ExpertWeight):
                bases = self._basis_for(config, expert, module_name)
                expert = Expert(expert, adapter_name, config, *bases, rows=self.rows)
                expert.basis_file = self._stored.basis_file
                if adapter_name not in self.active_adapters:
                    expert.requires_grad_(False)
            else:
                expert.update_layer(adapter_name, config, inference_mode=config.inference_mode)
            if (fingerprint := self._stored.fingerprints.get(module_name)) is not None:
                expert.share_fingerprint.check(fingerprint, f"{module_name}.{FINGERPRINT}")
            make_room_in(expert, adapter_name, self._stored.ranks.get(module_name))
            return expert

        adapt_experts(parent, target_name, adapter_name, config, parameter, adapt)

    def _basis_for(
        self, config: ShareConfig, base_layer: nn.Module | ExpertWeight, module_name: str
    ) -> tuple[Tensor, Tensor]:
        out_features, in_features = matrix_shape(base_layer)
        if self._stored.bases:
            stored = self._stored.bases[module_name]
            if stored.shape != (out_features, in_features):
                raise ValueError(
                    f"the stored basis of {module_name!r} is for a layer of shape {stored.shape}, the model's is "
                    f"{(out_features, in_features)}"
                )
            layout = self._stored.modules[module_name].layout
            if isinstance(config.origin, AdapterOrigin) and layout != layout_of(base_layer):
                raise ValueError(
                    f"the stored basis of {module_name!r} is for a layer of kind {named(layout)}, the model's is of "
                    f"kind {named(layout_of(base_layer))}"
                )
            return stored.beta, stored.alpha
        return (
            placeholder_basis(module_name, out_features, min(config.num_components, out_features), "out"),
            placeholder_basis(module_name, in_features, min(config.num_components, in_features), "in"),
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, ShareLayer) and offload_hook_of(new_module.get_base_layer()) is None:
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # An offloaded layer: PEFT would move the adapter to the meta device, where its values are lost. An
            # unloaded layer: it is complete, and PEFT would look for a `weight`, which HQQ's and GPTQ's layers lack.
            setattr(parent, child_name, new_module)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Refuse coefficients that belong to another basis in any layer before any layer is loaded."""
        for name, layer in share_layers(self.model).items():
            layer.check_fingerprints(state_dict, f"{prefix}model.{name}.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, adapter_name: str, **kwargs: Any) -> dict[str, Tensor]:
        """Return an adapter's weights, with the fingerprints even if an engine gathered only the parameters."""
        selected = super()._get_adapter_state_dict(model=model, adapter_name=adapter_name, **kwargs)
        for name, module in model.named_modules():
            if isinstance(module, ShareLayer) and adapter_name in module.share_fingerprint:
                name = name.replace("_fsdp_wrapped_module.", "")
                if f"{name}.share_coefficients_out.{adapter_name}" in selected:
                    fingerprint = module.share_fingerprint[adapter_name]
                    selected.setdefault(f"{name}.{FINGERPRINT}.{adapter_name}", fingerprint)
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Give PEFT numbers for coefficients that a file has in 4 bits."""
        plain = with_unpacked(f"adapter {adapter_name!r}", state_dict)
        return super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=plain
        )

    def take_basis(self, adapter_name: str, origin: AdapterOrigin) -> None:
        """Replace the model's bases by those of an adapter that is about to be loaded in place of an existing one.

        Raises:
            ValueError: If the adapter there is not one of SHARE, the bases differ from the model's and other adapters
                need these, or the sizes differ.
        """
        config = PeftConfig.from_pretrained(origin.location, subfolder=origin.subfolder, **origin.download_options)
        if not isinstance(config, ShareConfig):
            raise ValueError(f"{origin.folder}: is {config.peft_type}, expected SHARE as adapter {adapter_name!r} is")
        layers = share_layers(self.model)
        stored = adapter_named_as_in(self.model, stored_adapter(config, basis_files(self.model)))
        if stored.head is not None:
            check_head(self.model, self.peft_config[adapter_name].modules_to_save or [], stored.head)
        check_same_dimensions(config, f"{origin.folder}", self.peft_config[adapter_name], f"adapter {adapter_name!r}")
        keep_weights(origin, stored.weights)
        others = [layer for layer in layers.values() if set(layer.tasks) - {adapter_name}]
        changed = {
            name: basis
            for name, basis in stored.bases.items()
            if name in layers and not basis.equals(layers[name].share_basis_out, layers[name].share_basis_in)
        }
        for name, basis in changed.items():
            sizes = layers[name].share_basis_out.shape[1], layers[name].share_basis_in.shape[1]
            if others or basis.num_components != sizes:
                raise ValueError(_OTHER_BASIS.format(name))
        for name, basis in changed.items():
            layers[name].set_basis(basis.beta, basis.alpha)
            layers[name].basis_file = stored.basis_file

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "svd"
    ) -> None:
        """
        Add an adapter whose update is the weighted sum of others' updates, cut to the best approximation of rank p.

        Args:
            adapters (`Sequence[str]`): Names of the tasks to sum.
            weights (`Sequence[float]`): Weights, one for each task, of any sign.
            adapter_name (`str`): Name of the new adapter. An existing adapter of this name stays as it is, as in LoRA.
            combination_type (`Literal["svd", "linear", "cat"]`, *optional*, defaults to `"svd"`):
                How LoRA would combine its factors. All mean the same here, because the tasks share their bases.

        Raises:
            ValueError: If the tasks cannot be summed. Nothing is added then.
        """
        if adapter_name in self.peft_config:
            return
        layers = share_layers(self.model)
        config = combined_config(self.peft_config, layers, adapters, weights, combination_type)
        of_tasks: dict[str, float] = {}
        for task, weight in zip(adapters, weights, strict=True):
            of_tasks[task] = of_tasks.get(task, 0.0) + weight
        config.inference_mode = True
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for layer in layers.values():
            if layer.has_task(adapter_name):
                layer.set_coefficients(adapter_name, *combined_coefficients(layer, of_tasks))

    @routed_if_auto
    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names`, one for each sample, to all layers for the duration of a forward or generate call."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        with self.rows.mixing(mixed_batch(self, adapter_names, kwargs), training=self.training):
            yield

    def layers(self) -> Sequence[ShareLayer]:
        """The layers, searched for only once: a model with a head for each of many tasks has many modules."""
        if self._share_layers is None:
            self._share_layers = tuple(share_layers(self.model).values())
        return self._share_layers

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one task active, or several that are trained together, each with its own head."""
        if len(self.active_adapters) > 1:
            train_heads(self.model, self.active_adapters, trained=False)
        several = not isinstance(adapter_name, str) and len(adapter_name) > 1
        super().set_adapter(adapter_name[:1] if several else adapter_name, inference_mode)
        if several:
            activate_together(self, list(adapter_name), inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.rows.give_back(adapter_name)


def share_layers(model: nn.Module) -> dict[str, ShareLayer]:
    """Return all Share layers of a model, by the name of their module in the base model, whatever wraps it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {without_wrappers(name): module for name, module in base.named_modules() if isinstance(module, ShareLayer)}


def basis_files(model: nn.Module) -> dict[str, BasisFile | None]:
    """Return the file that each layer's basis was read from, by layer."""
    return {name: layer.basis_file for name, layer in share_layers(model).items()}


def layouts_of(model: nn.Module) -> dict[str, Layout]:
    """Return how the matrix of an update lies in the weight, by layer, for all layers that are not dense."""
    return {name: layer.layout for name, layer in share_layers(model).items() if layer.layout is not None}
