"""The user-facing subspace: built from adapters, extended, applied to a model, exported and saved."""

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
    One low-rank subspace per layer, and the coefficients of any number of tasks in it.

    [`~SharedSubspace.from_adapters`], [`~SharedSubspace.from_pretrained`] or a [`ShareTrainer`] creates a subspace,
    and [`~SharedSubspace.add_adapters`] extends it. An operation that fails leaves the subspace unchanged.

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
        Build a subspace from LoRA adapters of one base model (Sec. 3.2.1). This needs no data and no gradients.

        Args:
            adapters (`Mapping[str, str]` or `Sequence[str]`):
                Plain LoRAs of any rank and scale, given as folders, weight files or Hub ids, which may include a
                revision and a subfolder (`org/repo@revision:subfolder`). A mapping is keyed by task name. In a list,
                the last part of each entry becomes its task's name, repaired where it is not a valid task name.
            num_components (`int` or `"auto"`, *optional*, defaults to `32`):
                Maximum number k of directions of a layer on each side. A layer never has more directions than
                outputs, or inputs.
            pseudo_rank (`int` or `"auto"`, *optional*, defaults to `8`): Maximum rank p of a task in a layer.
            target_error (`float`, *optional*):
                Mean relative error of ΔW that `"auto"` reaches with the fewest bytes.
            target_bytes (`int`, *optional*):
                Size limit of bases and coefficients within which `"auto"` reaches the smallest error.
            basis (`Literal["joint", "factor"]`, *optional*, defaults to `"joint"`):
                Kind of basis: `"joint"` weighs all updates equally, `"factor"` is the paper's basis of the stacked
                LoRA factors.
            center (`bool`, *optional*, defaults to `False`):
                Whether to subtract the mean column. Requires `basis="factor"`.
            explained_variance (`float`, *optional*):
                Fraction of the variance that each layer explains with as few directions as possible.
            drift_tolerance (`float`, *optional*): Largest relative drift that may accumulate over merges.
            max_components (`int`, *optional*):
                Number of directions up to which layers may grow to meet `drift_tolerance`, and up to which `"auto"`
                searches. For `"auto"`, None means 128.
            coefficient_dtype (`Literal["float32", "bfloat16", "4bit"]`, *optional*, defaults to `"float32"`):
                Type in which coefficients are stored. Every merge rounds them and certifies the resulting change.
            tolerance (`float`, *optional*):
                Relative error up to which a task takes a rank smaller than p in a layer. Files hold only that rank.
                Unlike this argument, the `tolerance` of [`~SharedSubspace.add_adapters`] decides whether bases change.
            base_model (`str`, *optional*):
                Name of the base model, for adapters that refer to one model by several names. It is not checked.
            component (`str`, *optional*):
                Component of a pipeline to read, such as `"unet"`, from files that hold LoRAs of several components.
            skip_bad (`bool`, *optional*, defaults to `False`):
                Whether to leave out adapters that cannot be used and adapters whose own values make a merge refuse
                them. [`~SharedSubspace.reading`] lists them with the reasons.
            token (`str` or `bool`, *optional*): User access token of the Hub.
            progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

        Raises:
            ValueError: If a name, an adapter or a setting is unusable. The message says what was found and expected.
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
        Add tasks that arrive as LoRA adapters (Sec. 3.2.3). The existing tasks change only by the reported drift.

        Args:
            adapters: Same as in [`~SharedSubspace.from_adapters`].
            tolerance (`float`, *optional*):
                Relative part ``‖ΔW - ββ^T ΔW αα^T‖ / ‖ΔW‖`` of a new task that a layer's basis may leave out. The new
                tasks of one call are judged together, layer by layer: where the basis leaves out no more than that of
                any of them, all are projected, and the basis and the old tasks stay bit-identical; where one of them
                needs a merge, all are merged. Add tasks in separate calls to have each judged alone. None merges all
                of them. Unlike this argument, the `tolerance` of [`~SharedSubspace.from_adapters`] decides ranks.
            base_model (`str`, *optional*):
                Name of the base model of both the adapters and the subspace, whatever name each of them records. It
                is not checked.
            component (`str`, *optional*): Same as in [`~SharedSubspace.from_adapters`].
            skip_bad (`bool`, *optional*, defaults to `False`): Same as in [`~SharedSubspace.from_adapters`].
            token (`str` or `bool`, *optional*): User access token of the Hub.
            progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

        Returns:
            [`~share_hf.subspace.MergeReport`]: The drift of every task, layer by layer. Its `projected_tasks` are the
                tasks for which no basis changed.

        Raises:
            ValueError: As in [`~SharedSubspace.from_adapters`], and if an adapter belongs to another base model.
            DriftToleranceError: If the drift tolerance cannot be met. The subspace stays unchanged.
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
        Merge in the tasks that another writer of this subspace has added, and removed, since the two diverged.

        Args:
            other ([`SharedSubspace`]): Subspace of the other writer. It is not changed.
            base_model (`str`, *optional*):
                Name of the base model of both subspaces, whatever name each of them records. It is not checked.

        Raises:
            ValueError: If `other` belongs to another base model, has other settings, or has a different task under
                the name of a new task. The subspace stays unchanged.
        """
        self._hold_merged(reconcile(*named_alike(self.state, other.state, base_model)), other._originals)

    def report(self) -> SubspaceReport:
        """Return sizes, k, explained variance and drift."""
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
        Write the subspace as a tree that loads from disk and from the Hub. A crash leaves the old tree or the new one.

        If somebody else has saved to the folder since this subspace was loaded from it or saved to it, the tasks of
        both are merged, in memory and in the folder, as in [`~SharedSubspace.push_to_hub`]. An unrelated subspace in
        the folder is replaced.

        Args:
            folder (`str`): Folder to write to. Files that do not belong to a subspace stay there.
            card_template (`str`, *optional*): Custom Jinja template for the model card.
            history (`int`, *optional*):
                Number of predecessors of the tree to keep beside it from now on, for [`~SharedSubspace.undo`]; 0 keeps
                none. None leaves the current setting unchanged.
            keep_originals (`bool`, *optional*, defaults to `False`):
                Whether to record the folders that tasks came from in a file beside the tree, for
                [`~SharedSubspace.refit`]. Neither this file nor the history is ever pushed.

        Raises:
            ValueError: If the contents of the folder can be neither replaced nor merged with. Nothing has changed
                then.
        """
        place = Path(folder)
        with holding(place):
            if holds(place, CONFIG_NAME) and not holds(place, INDEX_FILE):
                raise ValueError(f"{folder}: holds an adapter that is not a shared subspace, expected another folder")
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
        Publish the subspace as one commit on `main`, a branch for each task, and a tag for the newest step.

        Files that the repository already has are not uploaded again. If somebody else has pushed tasks since this
        subspace was loaded, the tasks of both are merged, in memory and in the repository.

        Args:
            repo_id (`str`): Id of the repository, which is created if it does not exist.
            commit_message (`str`, *optional*): Message of the commit on `main`. The default names the new tasks.
            commit_description (`str`, *optional*): Description of the commit on `main`.
            private (`bool`, *optional*): Whether to make a newly created repository private.
            token (`str` or `bool`, *optional*): User access token of the Hub.
            create_pr (`bool`, *optional*, defaults to `False`):
                Whether to open a pull request instead. The next push after it is merged writes branches and tags.
            default_task (`str`, *optional*):
                Task whose LoRA is at the root of `main`. None means the newest task, unless an earlier push chose one.
            branches (`Literal["all", "new", "none"]` or `Collection[str]`, *optional*):
                Tasks that get a branch: all, those that the repository does not have yet, none, or the named ones.
                None means all tasks if there are at most 100, and none otherwise. Each branch is a commit, and the Hub
                accepts some hundred commits an hour. An existing branch is kept up to date in any case. A task without
                a branch is found on `main`: by `SharedSubspace.from_pretrained(revision=task)`, and by PEFT at
                `subfolder="tasks/<task>"`.
            branch_tolerance (`float`, *optional*, defaults to `0.05`):
                Relative drift of a task since its branch was written, from which on the branch is written again.
            upcoming_tasks (`Collection[str]`, *optional*):
                Names of tasks that this process has yet to learn. The push is refused if somebody else has pushed a
                task under one of these names.
            base_model (`str`, *optional*):
                Name of the base model of this subspace and of the repository, whatever name each of them records. It
                is not checked.
            card_template (`str`, *optional*): Custom Jinja template for the model card.
            max_attempts (`int`, *optional*, defaults to `50`):
                Number of times to merge and push again while others push at the same time.

        Returns:
            [`~huggingface_hub.CommitInfo`]: The commit on `main`, or of the pull request.

        Raises:
            ValueError: If the repository holds something that this subspace cannot be merged with. Nothing has
                changed then.
            PushConflictError: If all attempts were used up. Nothing has changed then.
            HubAnswerError: If something other than the Hub answers. As after any other network problem, the next push
                completes this one.
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

        At a task's revision of a repository, only the bases and this task are downloaded. Other tasks follow when they
        are first needed.

        Args:
            folder_or_repo (`str`): Folder, or id of a Hub repository.
            revision (`str`, *optional*):
                Name of a task, a step (`step-0007-mrpc`), or any other branch, tag or commit. A task without a branch
                of its own is read from `main`.
            token (`str` or `bool`, *optional*): User access token for a private repository.
            cache_dir (`str`, *optional*): Folder in which downloads are cached.
            local_files_only (`bool`, *optional*, defaults to `False`): Whether to use only cached files.

        Raises:
            ValueError: If a file is missing, damaged, edited or of a newer format, if the revision does not exist, or
                if a revision is given for a folder. The message says what was found and expected.
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
