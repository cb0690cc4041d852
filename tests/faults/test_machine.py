"""Two people, two folders and a repository, whatever they do and whenever they are killed: nothing is lost.

A state machine of hypothesis chooses what to do. Sets of names say what must be there: tasks that were added, and
tasks that were removed, in each place.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor

from share_hf import SharedSubspace
from tests.hub_server import Run
from tests.hub_server.fixtures import Hub
from tests.trees import small_lora

from .sessions import Forks, Session, do, forks


WRITERS = ("ann", "ben")
INDEX_FILE = "share_config.json"
FIRST = "first"
SCALES = (1.0, 1e-3, 30.0, 1e4, 1.0, 1e-8)
MOST_TASKS = 10


@dataclass(frozen=True)
class World:
    """What somebody knows: the tasks that have ever existed, and those of them that were removed."""

    added: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()

    @property
    def alive(self) -> set[str]:
        """The tasks that exist."""
        return set(self.added - self.removed)

    def joined(self, other: World) -> World:
        """What both know."""
        return World(self.added | other.added, self.removed | other.removed)


@dataclass
class Place:
    """Where the machine runs, and how far it got over all examples."""

    hub: Hub
    forks: Forks
    root: Path
    adapters: list[tuple[Path, dict[str, Tensor]]]
    examples: int = 0
    steps: int = 0
    kills: int = 0


class TwoWriters(RuleBasedStateMachine):
    """Two people who add, remove, rename, save, push and pull, some of the time until they are killed."""

    place: Place  # set by the test

    @initialize()
    def begin(self) -> None:
        """Both have the same subspace; there is no repository."""
        self.place.examples += 1
        self.root = self.place.root / str(self.place.examples)
        self.repo_id = f"org/subspace-{self.place.examples}"
        self.adapter_of: dict[str, int] = {FIRST: 0}
        self.worlds = dict.fromkeys(WRITERS, World(frozenset({FIRST})))
        self.published: World | None = None
        made = SharedSubspace.from_adapters(
            {FIRST: self.place.adapters[0][0]}, num_components=8, pseudo_rank=4, progress=False
        )
        for writer in WRITERS:
            made.save_pretrained(self.root / writer)

    # ---- What they do -----------------------------------------------------------------------------------------------

    @rule(writer=st.sampled_from(WRITERS), fate=st.integers(0, 7), data=st.data())
    def somebody_works(self, writer: str, fate: int, data: st.DataObject) -> None:
        """Run a session to its end. One of eight runs in a process that is killed."""
        session, after = self.session(writer, data)
        if not fate:
            self.try_to_do(session, after, writer, data)
            return
        do(session)
        self.worlds[writer] = after
        assert self.tasks_of(self.root / writer) == after.alive
        if session["name"] == "push":
            self.published = after
            self.check_branches([data.draw(st.sampled_from(sorted(after.alive)))])

    def try_to_do(self, session: Session, after: World, writer: str, data: st.DataObject) -> None:
        """Run a session in a separate process, which dies before a change of files or the answer to a request."""
        moment = data.draw(st.integers(0, 60))
        if session["name"] in ("push", "pull") and data.draw(st.booleans()):
            done = self.killed_at_request(session, moment)
        else:
            done = self.place.forks.do(session, change=moment)
        self.place.kills += not done
        before = (self.worlds[writer], self.published)
        self.worlds[writer] = after
        found = self.tasks_of(self.root / writer)
        if not done and found != after.alive:
            self.worlds[writer] = before[0]
        assert found == self.worlds[writer].alive
        if session["name"] == "push":
            self.published = after
            if not done and not self.is_published(after):
                self.published = before[1]
                assert before[1] is None or self.is_published(before[1])

    def killed_at_request(self, session: Session, moment: int) -> bool:
        """Kill the process before its request with this number is answered, if it makes as many."""
        faults, left, pids = self.place.hub.server.faults, moment, []

        def is_the_one(_: object) -> bool:
            nonlocal left
            left -= 1
            return left < 0

        faults.add(is_the_one, Run(lambda: os.kill(pids[0], signal.SIGKILL)))
        try:
            return self.place.forks.do(session, begun=pids.append)
        finally:
            faults.clear()

    def session(self, writer: str, data: st.DataObject) -> tuple[Session, World]:
        """Something to do, and what the writer knows when it is done."""
        self.place.steps += 1
        world = self.worlds[writer]
        names = ["save", "push", "rename"]
        if self.published is not None:
            names.append("pull")
        if len(world.alive) < MOST_TASKS:
            names += ["add", "add"]
        if len(world.alive) > 1:
            names.append("remove")
        name = data.draw(st.sampled_from(names))
        session = {"name": name, "folder": str(self.root / writer)}
        if name == "add":
            adapter = data.draw(st.integers(0, len(self.place.adapters) - 1))
            task = f"task{len(self.adapter_of)}"
            self.adapter_of[task] = adapter
            session |= {"task": task, "adapter": str(self.place.adapters[adapter][0])}
            return session, replace(world, added=world.added | {task})
        if name == "remove":
            task = data.draw(st.sampled_from(sorted(world.alive)))
            return {**session, "task": task}, replace(world, removed=world.removed | {task})
        if name == "rename":
            task = data.draw(st.sampled_from(sorted(world.alive)))
            new_name = f"task{len(self.adapter_of)}"
            self.adapter_of[new_name] = self.adapter_of[task]
            after = World(world.added | {new_name}, world.removed | {task})
            return {**session, "task": task, "new_name": new_name}, after
        if name == "save":
            return session, world
        return {**session, "repo_id": self.repo_id}, world.joined(self.published or World())

    # ---- What must hold ---------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """In the end, both know the same, and every task can be found by its branch."""
        if not hasattr(self, "worlds"):
            return
        for writer in (*WRITERS, WRITERS[0]):
            do({"name": "push", "folder": str(self.root / writer), "repo_id": self.repo_id})
        everything = self.worlds[WRITERS[0]].joined(self.worlds[WRITERS[1]]).joined(self.published or World())
        assert self.tasks_of(self.root / WRITERS[0]) == everything.alive
        assert self.is_published(everything)
        self.check_branches(sorted(everything.alive))
        branches = set(self.place.hub.repository(self.repo_id).branches)
        assert branches <= {"main", *everything.added}
        for writer in WRITERS:  # nothing of an interrupted session stays
            assert not [path.name for path in (self.root / writer).iterdir() if path.name.startswith(".")]
        assert {path.name for path in self.root.iterdir()} == set(WRITERS)
        shutil.rmtree(self.root)

    def tasks_of(self, place: Path | str, revision: str | None = None) -> set[str]:
        """Return the tasks in a place, and check that each is as close to its LoRA as its certificate says."""
        subspace = SharedSubspace.from_pretrained(place, revision=revision)
        for task in subspace.tasks:
            updates, layers = self.place.adapters[self.adapter_of[task]][1], subspace.state.layers_of(task)
            assert layers.keys() == updates.keys()
            for module, layer in layers.items():
                stored = layer.update_of(task, torch.float64).dense()
                error = float((stored - updates[module]).norm() / updates[module].norm())
                assert error <= float(layer.records.drift_bounds[layer.index(task)]) + 1e-12, (task, module)
        return set(subspace.tasks)

    def is_published(self, world: World) -> bool:
        """Return whether the repository holds these tasks."""
        there = self.place.hub.server.repositories.get(self.repo_id)
        if there is None or not self.place.hub.api.file_exists(self.repo_id, INDEX_FILE):
            return False
        return self.tasks_of(self.repo_id) == world.alive

    def check_branches(self, tasks: Iterable[str]) -> None:
        """Assert that the branch of each task loads, and has the task."""
        for task in tasks:
            assert task in self.tasks_of(self.repo_id, revision=task)


def run_machine(place: Place, examples: int, part: int = 0) -> None:
    """Run some examples of 50 steps, the same ones in each run, and different ones for each part."""
    machine = seed(part)(type(f"TwoWriters{part}", (TwoWriters,), {"place": place}))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            phases=[Phase.generate],  # shrinking a failure of fifty steps would take hours
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )


@pytest.fixture
def place(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    adapters = [small_lora(tmp_path / f"lora{i}", i, scale) for i, scale in enumerate(SCALES)]
    with forks(tmp_path / "forks.log") as forking:
        yield Place(hub, forking, tmp_path, adapters)


def test_whatever_two_writers_do_nothing_is_lost(place: Place) -> None:
    run_machine(place, examples=2)
    assert place.steps >= 20


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(4))
def test_in_two_thousand_steps_with_a_hundred_kills_nothing_is_lost(part: int, place: Place) -> None:
    run_machine(place, examples=14, part=part)
    print(f"\n{place.examples} examples, {place.steps} steps, {place.kills} processes killed")
    assert place.steps >= 2000 / 4
    assert place.kills >= 100 / 4
