"""The subspace as its users hold it: made from adapters, extended, applied to a model, exported, saved."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo
from peft.utils import CONFIG_NAME
from transformers.utils import logging

from .card import CardOptions, write_tree
from .facade import Applying, Editing, Exporting, Routing
from .facade.adding import with_collection
from .format.base_model import named_alike
from .format.collection import Collection as AdapterCollection
from .format.collection import read_collection
from .format.history import begin_history, keep_predecessor
from .format.index import INDEX_FILE
from .format.lock import holding
from .format.originals import originals_file, read_originals, write_originals
from .format.places import Adapters, NamedPlaces, named_places
from .format.replacing import holds
from .format.saved_since import with_saved
from .format.tree import read_tree
from .hub.fetch import RemoteTree, is_local
from .hub.push import MAX_ATTEMPTS, BranchChoice, PushOptions, push_state
from .state import SubspaceReport, SubspaceState, reconcile, report_of
from .subspace import BasisKind, CoefficientDtype, MergeReport, SubspaceSettings, smaller_layers
from .subspace.dimensions import Auto, WantedDimensions, settled
from .subspace.settings import check_tolerance


logger = logging.get_logger(__name__)


class SharedSubspace(Applying, Editing, Exporting, Routing):
    """
    One low-rank subspace a layer, and the coefficients of any number of tasks in it.

    Made by [`~SharedSubspace.from_adapters`], [`~SharedSubspace.from_pretrained`] or a
    [`ShareTrainer`]; extended by [`~SharedSubspace.add_adapters`]. Whatever fails leaves it as it was.

    Example:
        ```py
        >>> from share_hf import SharedSubspace

        >>> subspace = SharedSubspace.from_adapters({"mrpc": "adapters/mrpc", "sst2": "adapters/sst2"})
        >>> subspace.add_adapters({"rte": "adapters/rte"}).drift
        >>> model = subspace.apply(base_model)
        >>> subspace.save_pretrained("share-subspace")
        ```
    """

    @classmethod
    def from_adapters(
        cls,
        adapters: Adapters,
        *,
        num_components: int | Auto = 32,
        pseudo_rank: int | Auto = 8,
        target_error: float | None = None,
        target_bytes: int | None = None,
        basis: BasisKind = "joint",
        center: bool = False,
        explained_variance: float | None = None,
        drift_tolerance: float | None = None,
        max_components: int | None = None,
        coefficient_dtype: CoefficientDtype = "float32",
        tolerance: float | None = None,
        base_model: str | None = None,
        component: str | None = None,
        skip_bad: bool = False,
        token: str | bool | None = None,
        progress: bool = True,
    ) -> SharedSubspace:
        """
        Build a subspace from LoRA adapters of one base model (Sec. 3.2.1). Needs no data and no gradients.

        Args:
            adapters (`Mapping[str, str]` or `Sequence[str]`):
                Plain LoRAs, of any ranks and scales: folders, files of weights, or hub ids, which may name more
                (`org/repo@revision:subfolder`); by task name, or in a list, where the last part of each is its task's
                name, mended where no task can be called that.
            num_components (`int` or `"auto"`, *optional*, defaults to `32`):
                Cap k on the directions of a layer, on each side; a layer has no more than outputs, or inputs.
            pseudo_rank (`int` or `"auto"`, *optional*, defaults to `8`): Cap p on the rank of a task in a layer.
            target_error (`float`, *optional*):
                Mean relative error of ΔW that `"auto"` reaches with the fewest bytes.
            target_bytes (`int`, *optional*):
                Size of bases and coefficients under which `"auto"` reaches the smallest error.
            basis (`Literal["joint", "factor"]`, *optional*, defaults to `"joint"`):
                Basis that weighs all updates equally, or the paper's, of the stacked LoRA factors.
            center (`bool`, *optional*, defaults to `False`): Whether to subtract the mean column; `"factor"` only.
            explained_variance (`float`, *optional*): Fraction to explain, by the fewest directions that do.
            drift_tolerance (`float`, *optional*): Largest relative drift that merges may add up to.
            max_components (`int`, *optional*):
                Number of directions up to which layers may grow to meet `drift_tolerance`, and up to which `"auto"`
                looks (128 if not given).
            coefficient_dtype (`Literal["float32", "bfloat16", "4bit"]`, *optional*, defaults to `"float32"`):
                Type that coefficients are stored in; every merge rounds them, and certifies what that changes.
            tolerance (`float`, *optional*):
                Relative error up to which a task takes a smaller rank than p in a layer; files hold that rank alone.
                Not the `tolerance` of [`~SharedSubspace.add_adapters`], which is about whether bases change.
            base_model (`str`, *optional*):
                Name of the base model, where the adapters call one model by several names. Not checked.
            component (`str`, *optional*):
                The model of a pipeline that is meant, such as `"unet"`, where files have LoRAs of several.
            skip_bad (`bool`, *optional*, defaults to `False`):
                Whether adapters that cannot be used, and those that a merge refuses for their own numbers, are left
                out; [`~SharedSubspace.reading`] says which, and why.
            token (`str` or `bool`, *optional*): User access token of the hub.
            progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

        Raises:
            ValueError: If a name, an adapter or a setting is unusable; naming what was found and expected.
        """
        wanted = WantedDimensions(num_components, pseudo_rank, target_error, target_bytes, max_components)
        settings = SubspaceSettings(
            *wanted.limits,
            basis=basis,
            center=center,
            explained_variance=explained_variance,
            drift_tolerance=drift_tolerance,
            max_components=max_components,
            coefficient_dtype=coefficient_dtype,
            tolerance=tolerance,
        )
        wanted.check_beside(settings)
        named = named_places(adapters)
        collection = read_collection(
            named,
            base_model=base_model,
            component=component,
            basis=basis,
            skip_bad=skip_bad,
            token=token,
            progress=progress,
        )
        settings, chosen = settled(settings, wanted, collection.updates, progress=progress)
        if chosen is not None:
            logger.warning(chosen.sentence())
        subspace = cls(SubspaceState(settings=settings))
        subspace.chosen = chosen
        subspace._merge(collection, named, progress=progress)
        return subspace

    def add_adapters(
        self,
        adapters: Adapters,
        *,
        tolerance: float | None = None,
        base_model: str | None = None,
        component: str | None = None,
        skip_bad: bool = False,
        token: str | bool | None = None,
        progress: bool = True,
    ) -> MergeReport:
        """
        Add tasks that arrive as LoRA adapters (Sec. 3.2.3). The other tasks stay, within the drift that is reported.

        Args:
            adapters: As for [`~SharedSubspace.from_adapters`].
            tolerance (`float`, *optional*):
                Relative part ``‖ΔW - ββ^T ΔW αα^T‖ / ‖ΔW‖`` of the new tasks that a layer's basis may leave out. Where
                it leaves out no more, they are projected, and basis and old tasks stay as they are, to the bit; else
                they are merged, as all are if not given. That of [`~SharedSubspace.from_adapters`] sets ranks.
            base_model (`str`, *optional*):
                Name of the base model of these adapters and of the subspace, whatever they call it. Not checked.
            component (`str`, *optional*): As for [`~SharedSubspace.from_adapters`].
            skip_bad (`bool`, *optional*, defaults to `False`): As for [`~SharedSubspace.from_adapters`].
            token (`str` or `bool`, *optional*): User access token of the hub.
            progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

        Returns:
            [`~share_hf.subspace.MergeReport`]: The drift of every task, layer by layer, and in `projected_tasks` those
                that no basis changed for.

        Raises:
            ValueError: As for [`~SharedSubspace.from_adapters`]; also if an adapter belongs to another base model.
            DriftToleranceError: If the tolerated drift cannot be met; the subspace is as before.
        """
        check_tolerance(tolerance)
        named = named_places(adapters, self.tasks)
        collection = read_collection(
            named,
            into=self.state,
            base_model=base_model,
            component=component,
            skip_bad=skip_bad,
            token=token,
            progress=progress,
        )
        return self._merge(collection, named, tolerance=tolerance, progress=progress)

    def _merge(
        self,
        collection: AdapterCollection,
        named: NamedPlaces,
        *,
        tolerance: float | None = None,
        progress: bool,
    ) -> MergeReport:
        state = replace(self.state, base_model_name_or_path=collection.base)
        added = with_collection(state, collection, named, tolerance=tolerance, progress=progress)
        self._held, self._reading = added.state, added.reading
        self._originals |= added.folders
        shapes = {module: layer.shape for module, layer in self._held.layers.items() if module not in state.layers}
        if (line := smaller_layers(shapes, self.settings.num_components)) is not None:
            logger.warning_once(line)
        return added.report

    def update_from(self, other: SharedSubspace, *, base_model: str | None = None) -> None:
        """
        Take in what another writer of this subspace has done since the two were one: new tasks, and removed ones.

        Args:
            other ([`SharedSubspace`]): Stays as it is.
            base_model (`str`, *optional*): Name of the base model of both, whatever they call it. Not checked.

        Raises:
            ValueError: If it belongs to another base model, has other settings, or another task of a new task's name;
                the subspace is as before.
        """
        self._hold_merged(reconcile(*named_alike(self.state, other.state, base_model)), other._originals)

    def report(self) -> SubspaceReport:
        """Sizes, k, explained variance and drift."""
        return report_of(self.state)

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        card_template: str | os.PathLike | None = None,
        history: int | None = None,
        keep_originals: bool = False,
    ) -> None:
        """
        Write the subspace as a tree that loads on disk and on the hub. A crash leaves the old tree or the new one.

        If somebody else saved there since this subspace was loaded from the folder or saved to it, both sides' tasks
        are merged, here and there, as by [`~SharedSubspace.push_to_hub`]. Another subspace there is replaced.

        Args:
            folder (`str`): Where to write; files that are not of a subspace stay.
            card_template (`str`, *optional*): A Jinja template of your own for the model card.
            history (`int`, *optional*):
                How many predecessors of the tree to keep beside it from now on, for [`~SharedSubspace.undo`]; 0 for
                none. As before if not given.
            keep_originals (`bool`, *optional*, defaults to `False`):
                Whether to name the folders that tasks came from in a file beside the tree, for
                [`~SharedSubspace.refit`]. Neither is ever pushed.

        Raises:
            ValueError: If what the folder holds cannot be replaced or merged with; nothing has changed then.
        """
        place = Path(folder)
        with holding(place):
            if holds(place, CONFIG_NAME) and not holds(place, INDEX_FILE):
                raise ValueError(f"{folder}: holds an adapter that is no shared subspace, expected another folder")
            state = with_saved(self.state, place, self._seen.get(place.resolve()))
            template = None if card_template is None else Path(card_template)
            known = read_originals(place)
            if history is not None:
                begin_history(place, history)
            if self._seen.get(place.resolve()) != state.lineage:
                keep_predecessor(place)
            write_tree(state, place, card=replace(self._card, template=template))
            self._hold_merged(state, known)
            if keep_originals or originals_file(place).is_file():
                write_originals(place, self._originals)
            self._seen[place.resolve()] = state.lineage

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        default_task: str | None = None,
        branches: BranchChoice | None = None,
        branch_tolerance: float = 0.05,
        upcoming_tasks: Collection[str] = (),
        base_model: str | None = None,
        card_template: str | os.PathLike | None = None,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> CommitInfo:
        """
        Publish the subspace: one commit on `main`, a branch for each task, a tag for the newest step.

        Files that the repository has already are not uploaded again. If somebody else pushed tasks since this subspace
        was loaded, both sides' tasks are merged, here and there.

        Args:
            repo_id (`str`): The repository, created if need be.
            commit_message (`str`, *optional*): Message of the commit on `main`; tells the new tasks if not given.
            commit_description (`str`, *optional*): Description of that commit.
            private (`bool`, *optional*): Whether a repository that is created is private.
            token (`str` or `bool`, *optional*): User access token of the hub.
            create_pr (`bool`, *optional*, defaults to `False`):
                Whether to open a pull request instead. The next push after it is merged writes branches and tags.
            default_task (`str`, *optional*):
                The task whose LoRA is at the root of `main`; the newest, unless an earlier push chose one.
            branches (`Literal["all", "new", "none"]` or `Collection[str]`, *optional*):
                The tasks that get a branch: all, those that the repository does not have yet, none, or these. If not
                given, all of up to 100 tasks, and of more none. Each is a commit, of which the hub takes some hundred
                an hour. A branch that is there is kept up to date in any case, and a task without one is found on
                `main`: by `SharedSubspace.from_pretrained(revision=task)`, and by PEFT at `subfolder="tasks/<task>"`.
            branch_tolerance (`float`, *optional*, defaults to `0.05`):
                Relative drift since a task's branch was written from which it is written again.
            upcoming_tasks (`Collection[str]`, *optional*):
                Names of tasks that are still to be learned here: the push is refused where somebody else has pushed
                one of these names.
            base_model (`str`, *optional*):
                Name of the base model here and in the repository, whatever they call it. Not checked.
            card_template (`str`, *optional*): A Jinja template of your own for the model card.
            max_attempts (`int`, *optional*, defaults to `50`):
                How often to merge and push again while others push at the same time.

        Returns:
            [`~huggingface_hub.CommitInfo`]: The commit on `main`, or of the pull request.

        Raises:
            ValueError: If the repository holds something that this subspace cannot be merged with; nothing has
                changed then.
            PushConflictError: If the attempts ran out; nothing has changed then.
            HubAnswerError: If something else than the hub answers. As after any other trouble of the network, the next
                push completes this one.
        """
        options = PushOptions(
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            create_pr=create_pr,
            default_task=default_task,
            branches=branches,
            branch_tolerance=branch_tolerance,
            upcoming_tasks=upcoming_tasks,
            base_model=base_model,
            card_template=None if card_template is None else Path(card_template),
            max_attempts=max_attempts,
        )
        merged, commit = push_state(self.state, repo_id, token=token, options=options)
        self._hold_merged(merged)
        self._card = replace(self._card, repo_id=repo_id)
        return commit

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> SharedSubspace:
        """
        Load a subspace that [`~SharedSubspace.save_pretrained`] or [`~SharedSubspace.push_to_hub`] wrote.

        Of a repository at a task's revision, the bases and this task are downloaded; other tasks when they are asked
        for.

        Args:
            folder_or_repo (`str`): A folder, or the id of a hub repository.
            revision (`str`, *optional*):
                A task, a step (`step-0007-mrpc`), or another branch, tag or commit. A task without a branch of its own
                is that of `main`.
            token (`str` or `bool`, *optional*): For a private repository.
            cache_dir (`str`, *optional*): Where to keep downloads.
            local_files_only (`bool`, *optional*, defaults to `False`): Use the cache only.

        Raises:
            ValueError: If a file is missing, damaged, edited or of a newer format, if there is no such revision, or
                one is given for a folder; naming what was found and expected.
        """
        if is_local(folder_or_repo):
            folder = Path(folder_or_repo)
            if revision is not None:
                raise ValueError(
                    f"revision is {revision!r} but {folder} is a local folder, which has no revisions; its tasks are "
                    f"in {folder}/tasks"
                )
            subspace = cls(read_tree(folder))
            subspace._seen[folder.resolve()] = subspace.state.lineage
            subspace._originals = read_originals(folder)
            return subspace
        tree = RemoteTree.open(
            os.fspath(folder_or_repo), revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        tasks = [tree.task] if tree.task is not None else None
        tree.fetch(tasks)
        subspace = cls(tree.read(tasks), rest=None if tasks is None else tree)
        subspace._card = CardOptions(repo_id=tree.repo_id, existing=tree.card)
        return subspace

    def __repr__(self) -> str:
        k, p = self.settings.num_components, self.settings.pseudo_rank
        return f"SharedSubspace({len(self.tasks)} tasks, {len(self._held.layers)} modules, k={k}, p={p})"
