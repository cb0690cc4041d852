"""Read many adapters at once: look at all of them before any is used, and report what is wrong with which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ..state import Layout, SubspaceState, TaskInfo, initializations_of
from ..state.belonging import check_one_model, prefixes
from ..state.layout import named as named_layout
from ..subspace import BasisKind, LayerSubspace, LowRankUpdate
from ..subspace.refused import refused_updates
from .base_model import base_name, check_base_name, common_base, of_another_base
from .lora import LoraAdapter, StoredUpdates, read_lora
from .pipelines import of_other_components
from .places import NamedPlaces
from .whole_trees import expect_no_tree


logger = logging.get_logger(__name__)

_SHOWN = 20  # broken adapters listed in a message
_ROWS_OF_FINGERPRINT = 16  # rows of a factor, roughly

# Errors that concern one adapter alone.
_BROKEN = (ValueError, FileNotFoundError, PermissionError, RepositoryNotFoundError, LocalEntryNotFoundError)


@dataclass(frozen=True)
class Reading:
    """Result of reading adapters, apart from the adapters themselves.

    Args:
        skipped: Reason why an adapter was left out, by its name.
        duplicates: Groups of names of identical adapters.
        mended: Original name of a place by task name, where the original cannot be the name of a task.
        known: Existing task with the same updates and the same head, by task name.
    """

    skipped: dict[str, str] = field(default_factory=dict)
    duplicates: list[list[str]] = field(default_factory=list)
    mended: dict[str, str] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return what a person should know: which adapters were left out and why, and what is unusual in others."""
        lines = [f"{text!r} is called {name}" for name, text in _some(self.mended.items())]
        lines += _more(len(self.mended))
        for names in self.duplicates:
            lines.append(f"{', '.join(_some(names))} are the same adapter" + "".join(_more(len(names), ", ")))
        lines += [
            f"{name} is the same adapter as {other}, which is already in the subspace"
            for name, other in _some(self.known.items())
        ]
        lines += _more(len(self.known))
        if self.skipped:
            were = "adapter was" if len(self.skipped) == 1 else "adapters were"
            lines.append(f"{len(self.skipped)} {were} left out:")
            lines += [f"  {name}: {reason}" for name, reason in _some(self.skipped.items())]
            lines += [f"  {line}" for line in _more(len(self.skipped))]
        return lines


@dataclass(frozen=True)
class Collection:
    """Adapters that can be used together.

    Args:
        loras: Adapters by task name, at least one.
        base: Name of the base model that they share.
        reading: Other results of reading them.
    """

    loras: dict[str, LoraAdapter]
    base: str | None
    reading: Reading

    @property
    def updates(self) -> dict[str, Mapping[str, LowRankUpdate]]:
        """Updates by task name and module."""
        return {name: lora.updates for name, lora in self.loras.items()}

    @property
    def layouts(self) -> dict[str, Mapping[str, Layout]]:
        """Layout of a module, that is, how the matrix of its update lies in its weight, by task name and module."""
        return {name: lora.layouts for name, lora in self.loras.items()}

    def expect_unchanged(self) -> None:
        """Refuse files that were written to since they were opened. Call this before using what was made of them.

        Raises:
            ValueError: If a file has changed. The message names the first such file.
        """
        for updates in self.updates.values():
            if isinstance(updates, StoredUpdates):
                updates.expect_unchanged()

    def infos(self) -> dict[str, TaskInfo]:
        """Return what a subspace knows of each task apart from its coefficients, by task name."""
        initializations = initializations_of(self.updates)
        return {
            name: TaskInfo(target=lora.target, head=lora.head, initialization=initializations[name])
            for name, lora in self.loras.items()
        }


def read_collection(
    named: NamedPlaces,
    *,
    into: SubspaceState | None = None,
    base_model: str | None = None,
    component: str | None = None,
    basis: BasisKind = "joint",
    skip_bad: bool = False,
    token: str | bool | None = None,
    progress: bool = True,
) -> Collection:
    """Read plain LoRAs that fit together, looking at all of them before any is used.

    Args:
        named: Folders, files or Hub ids by task name.
        into: Subspace to which they are to be added. They must have its base model, modules and kinds of layers, or
            those of the first adapter if None.
        base_model: Name of their base model, whatever they call it. It is not checked.
        component: Model of a pipeline to read. Same as in `read_lora`.
        basis: Kind of basis for which the adapters are read, unless `into` has one.
        skip_bad: Whether to leave out adapters that cannot be used or that a merge would refuse. Otherwise one such
            adapter is an error.
        token: Token for the Hub.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If `read_lora` refuses an adapter, if a place is a whole subspace, or if an adapter has another
            base model, another component, other shapes or other kinds of layers. If several adapters cannot be used,
            the message names each of them with its reason. Also raised if no adapter can be used.
    """
    check_base_name(base_model)
    places = named.places
    layers, layouts, base = (
        ({}, {}, None) if into is None else (into.layers, into.layouts, into.base_model_name_or_path)
    )
    loras: dict[str, LoraAdapter] = {}
    broken: dict[str, Exception] = {}
    for name, place in tqdm(
        places.items(), desc="Reading adapters", unit="adapter", leave=False, disable=not progress
    ):
        try:
            lora = read_lora(place, component=component, token=token)
            expect_no_tree(place, token=token)
            loras[name] = lora
        except _BROKEN as error:
            if isinstance(error, LocalEntryNotFoundError) and not is_offline_mode():
                raise  # the network failed: every other adapter would fail too, each after a while
            broken[name] = error
    broken |= _of_other_components(loras, layers)
    broken |= _of_other_layers(_without(loras, broken), layers, layouts)
    if base_model is None:
        broken |= _of_other_bases(_without(loras, broken), base)
    if skip_bad:  # otherwise the merge reports it, without a second look at all adapters
        broken |= _under_other_names(_without(loras, broken), layers)
        kind = basis if into is None else into.settings.basis
        fitting = {name: lora.updates for name, lora in _without(loras, broken).items()}
        broken |= refused_updates(fitting, kind, progress=progress)
    if broken and (not skip_bad or len(broken) == len(places)):
        raise _cannot_be_used([name for name in places if name in broken], broken, len(places))
    loras = _without(loras, broken)
    bases = {name: lora.base_model_name_or_path for name, lora in loras.items()}
    base = base_name(base_model) or common_base(bases, base)
    skipped = {name: _told(broken[name]) for name in places if name in broken}
    reading = Reading(skipped, _duplicates(loras), named.mended)
    for line in reading.lines():
        logger.warning(line)
    return Collection(loras, base, reading)


def read_loras(
    places: Mapping[str, str | Path],
    *,
    components: Mapping[str, str | None] | None = None,
    base_model: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> dict[str, LoraAdapter]:
    """Read LoRAs like `read_collection`, by task name.

    Args:
        places: Places by task name, as in `NamedPlaces`.
        components: Model of a pipeline to read, by task name, where a place has several.
        base_model: Same as in `read_collection`, like `token` and `progress`.

    Raises:
        ValueError: Same as in `read_collection`.
    """
    loras: dict[str, LoraAdapter] = {}
    of_components = {name: (components or {}).get(name) for name in places}
    for component in dict.fromkeys(of_components.values()):
        named = NamedPlaces({name: place for name, place in places.items() if of_components[name] == component})
        loras |= read_collection(
            named, base_model=base_model, component=component, token=token, progress=progress
        ).loras
    return loras


def _cannot_be_used(names: Sequence[str], broken: Mapping[str, Exception], count: int) -> Exception:
    if len(names) == 1:
        return broken[names[0]]
    title = f"{len(names)} of {count} adapters cannot be used"
    title += ", skip_bad=True (share-hf: --skip-bad) leaves them out:" if len(names) < count else ":"
    lines = [f"{name}: {_told(broken[name])}" for name in _some(names)]
    return ValueError("\n  ".join([title, *lines, *_more(len(names))]))


def _told(error: Exception) -> str:
    if isinstance(error, RepositoryNotFoundError):
        return "no such folder, and no repository that could be read; a private one needs a token"
    return str(error).partition("\n")[0]


def _without(loras: Mapping[str, LoraAdapter], names: Mapping[str, Exception]) -> dict[str, LoraAdapter]:
    return {name: lora for name, lora in loras.items() if name not in names}


def _of_other_components(loras: Mapping[str, LoraAdapter], modules: Iterable[str]) -> dict[str, Exception]:
    wrong = of_other_components({name: lora.component for name, lora in loras.items()}, modules)
    return {name: ValueError(f"adapter {name!r} {found}") for name, found in wrong.items()}


def _of_other_bases(loras: Mapping[str, LoraAdapter], base: str | None) -> dict[str, Exception]:
    """Return adapters whose base model is not the given one, or not that of the first adapter, with their errors."""
    wrong: dict[str, Exception] = {}
    fits: dict[str | None, bool] = {}  # by name, because comparing two models may take as long as reading them
    for name, lora in loras.items():
        found = base_name(lora.base_model_name_or_path)
        if found not in fits:
            try:
                base, fits[found] = common_base({name: found}, base), True
            except ValueError:
                fits[found] = False
        if not fits[found]:
            wrong[name] = of_another_base(name, found, base)
    return wrong


def _of_other_layers(
    loras: Mapping[str, LoraAdapter], layers: Mapping[str, LayerSubspace], layouts: Mapping[str, Layout]
) -> dict[str, Exception]:
    """Return adapters whose update has another shape or kind than the layer, or than in an earlier adapter."""
    known = {module: (layer.shape, layouts.get(module)) for module, layer in layers.items()}
    wrong: dict[str, Exception] = {}
    for name, lora in loras.items():
        own = {module: (shape, lora.layouts.get(module)) for module, shape in lora.shapes.items()}
        other = next((module for module, layer in own.items() if known.get(module, layer) != layer), None)
        if other is None:
            known |= own
            continue
        (found, kind), (expected, expected_kind) = own[other], known[other]
        if found != expected:
            message = f"{other!r}: the update of task {name!r} is {found}, the layer is {expected}"
        else:
            kinds = named_layout(kind), named_layout(expected_kind)
            message = f"{other!r} is of kind {kinds[0]} for task {name!r}, expected {kinds[1]} as for the others"
        wrong[name] = ValueError(message)
    return wrong


def _under_other_names(loras: Mapping[str, LoraAdapter], layers: Mapping[str, LayerSubspace]) -> dict[str, Exception]:
    """Return adapters that name the layers otherwise than the subspace does, or than earlier adapters do."""
    alike: dict[frozenset[str], list[str]] = {}
    for name, lora in loras.items():
        alike.setdefault(prefixes(lora.updates), []).append(name)
    wrong: dict[str, Exception] = {}
    fits: dict[str, Mapping[str, LowRankUpdate]] = {}
    for names in alike.values():
        updates = {**fits, **{name: loras[name].updates for name in names}}
        try:
            check_one_model(layers, updates)
        except ValueError as error:
            wrong |= dict.fromkeys(names, error)
        else:
            fits = updates
    return wrong


def _duplicates(loras: Mapping[str, LoraAdapter]) -> list[list[str]]:
    """Return groups of names of adapters with the same updates and the same head."""
    alike: dict[bytes, list[str]] = {}
    for name, lora in loras.items():
        alike.setdefault(_fingerprint(lora), []).append(name)
    groups: list[list[str]] = []
    for names in alike.values():
        # Equal fingerprints are only a hint: compare all updates.
        while len(names) > 1:
            first, *others = names
            same = [other for other in others if _same(loras[first], loras[other])]
            groups += [[first, *same]] if same else []
            names = [other for other in others if other not in same]
    return groups


def _fingerprint(lora: LoraAdapter) -> bytes:
    """Return a digest of the names of the modules and of some numbers of one module's update."""
    modules = sorted(lora.updates)
    digest = sha256(repr([modules, sorted(lora.head)]).encode())
    update = lora.updates[modules[0]]
    for factor in (update.out_factor, update.in_factor):
        some = factor[:: -(-len(factor) // _ROWS_OF_FINGERPRINT)]
        digest.update(some.contiguous().numpy().tobytes())
    return digest.digest()


def _same(first: LoraAdapter, second: LoraAdapter) -> bool:
    if first.updates.keys() != second.updates.keys() or first.head.keys() != second.head.keys():
        return False
    heads = (_equal(tensor, second.head[name]) for name, tensor in first.head.items())
    return all(heads) and all(_same_update(first.updates[module], second.updates[module]) for module in first.updates)


def _same_update(first: LowRankUpdate, second: LowRankUpdate) -> bool:
    return _equal(first.out_factor, second.out_factor) and _equal(first.in_factor, second.in_factor)


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def _some(items: Iterable) -> list:
    return list(items)[:_SHOWN]


def _more(count: int, before: str = "") -> list[str]:
    return [f"{before}and {count - _SHOWN} more"] if count > _SHOWN else []
