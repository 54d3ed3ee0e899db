"""The guide in an actor of a real Ray. Processes are stopped and killed as nothing else would."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from tests.lives import RAGGED, distances, gradient
from treelora_ray.cluster.errors import ClusterError, GuideLostError, GuideTimeoutError
from treelora_ray.cluster.guide_actor import GuideActor, RemoteGuide, start_guide_actor
from treelora_ray.cluster.guide_server import UNANSWERED, CallMissingError, Values
from treelora_ray.core import Guide, GuideConfig, GuideError, LayoutError, Snapshot

TASKS, STEPS = 5, 6
PROBING = GuideConfig.of("treelora", sketch_dim=16, pulls_per_round=2)
PAPER = GuideConfig.of("paper", budget=3)
both_modes = pytest.mark.parametrize("config", [PROBING, PAPER], ids=["probe", "paper"])


pytestmark = pytest.mark.usefixtures("cluster")


class Actor:
    """The guide's actor, and its process."""

    def __init__(self, handle: Any, folder: Path) -> None:
        self.handle, self.folder = handle, folder
        self.pid: int = ray.get(handle.pid.remote(), timeout=60)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def guide(self, config: GuideConfig, timeout: float = 60.0) -> RemoteGuide:
        return RemoteGuide(RAGGED, config, self.handle, timeout, "the guide")

    def assert_restarted(self) -> None:
        before, self.pid = self.pid, ray.get(self.handle.pid.remote(), timeout=60)
        assert self.pid != before


@contextmanager
def started(name: str, folder: Path) -> Iterator[Actor]:
    actor = Actor(start_guide_actor(name, "tests", folder), folder)
    try:
        yield actor
    finally:
        with suppress(ProcessLookupError):
            actor.signal(signal.SIGCONT)
        ray.kill(actor.handle)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Actor]:
    with started("guide", tmp_path_factory.mktemp("guide")) as actor:
        yield actor


@pytest.fixture
def actor(shared: Actor) -> Iterator[Actor]:
    """One actor for all tests that leave it alive: whoever opens a generation does not see what was there before."""
    shared.pid = ray.get(shared.handle.pid.remote(), timeout=60)
    yield shared
    with suppress(ProcessLookupError):
        shared.signal(signal.SIGCONT)


Hook = Callable[[str, int, int], None]  # "before" or "after", task, step


def nothing(*_: Any) -> None: ...


def live(guide: Guide | RemoteGuide, hook: Hook = nothing, tasks: range = range(TASKS)) -> list[Any]:
    """What is chosen for each task; the hook is called around the call that a step is told by."""
    seen: list[Any] = []
    for task in tasks:
        guide.begin_task(f"task{task}")
        for step in range(STEPS):
            if guide.config.observe == "probe":
                hook("before", task, step)
                guide.probe(step, gradient(task, step))
            else:
                arms = guide.select(step)
                seen.append((arms.tolist(), guide.directions(arms).tolist()))
                hook("before", task, step)
                seen.append(guide.observe(step, distances(task, step, arms)))
            hook("after", task, step)
        if guide.config.observe == "probe":
            choice = guide.commit()
            seen.append([part.tolist() for part in (choice.task, choice.distance, choice.related)])
        compared = guide.measured()
        seen.append(guide.insert(None if guide.config.observe == "probe" else gradient(task, 99)))
        seen.append((guide.draw(), guide.to_data(), compared, guide.measured(), guide.nbytes(), list(guide.names)))
    return seen


def same(one: Snapshot, other: Snapshot) -> bool:
    if one.meta != other.meta or one.tensors.keys() != other.tensors.keys():
        return False
    return all(torch.equal(value, other.tensors[key]) for key, value in one.tensors.items())


def assert_same_life(guide: RemoteGuide, hook: Hook = nothing) -> None:
    local = Guide(RAGGED, guide.config)
    assert live(guide, hook) == live(local)
    assert same(guide.snapshot(), local.snapshot())


@both_modes
def test_a_remote_guide_chooses_as_a_local_one(actor: Actor, config: GuideConfig) -> None:
    guide = actor.guide(config)
    assert guide.layout == Guide(RAGGED, config).layout
    assert guide.full_layout is RAGGED
    assert guide.waited == 0
    assert_same_life(guide)
    assert guide.waited > 0


@both_modes
def test_kills_between_calls_and_while_calls_are_in_flight_change_nothing(actor: Actor, config: GuideConfig) -> None:
    guide = actor.guide(config)

    last = 4 if config.observe == "probe" else 1  # as many as may be unanswered

    def hook(moment: str, task: int, step: int) -> None:
        if (moment, task, step) == ("before", 1, 3):
            guide.nbytes()  # nothing is in flight now
            actor.signal(signal.SIGKILL)
            actor.assert_restarted()
        if (moment, task, step) == ("before", 3, 1):
            guide.nbytes()
            actor.signal(signal.SIGSTOP)  # what is sent from now on does not arrive
        if (moment, task, step) == ("after", 3, last):
            actor.signal(signal.SIGKILL)
        if (moment, task, step) == ("after", 3, STEPS - 1):
            actor.assert_restarted()

    assert_same_life(guide, hook)


def test_a_newer_generation_ends_the_older_one(actor: Actor) -> None:
    old, new = actor.guide(PROBING), actor.guide(PROBING)
    live(old, tasks=range(2))
    old.begin_task("task2")
    old.probe(0, gradient(2, 0))
    new.begin_task("task0")
    old.probe(1, gradient(2, 1))
    for _ in range(2):
        with pytest.raises(GuideLostError, match="a newer run of the workers has taken over"):
            old.commit()
    new.probe(0, gradient(0, 0))
    assert new.commit().task.tolist() == [-1] * 4
    assert new.names == []


@both_modes
def test_a_restored_snapshot_wins_over_what_the_actor_has_seen(actor: Actor, config: GuideConfig) -> None:
    local = Guide(RAGGED, config)
    live(local, tasks=range(3))
    guide = actor.guide(config)
    begun = live(guide, tasks=range(3))
    guide.begin_task("task3")
    snapshot = guide.snapshot()
    live(guide, tasks=range(3, TASKS))
    again = actor.guide(config)
    again.restore(snapshot)
    assert again.names == ["task0", "task1", "task2"]
    assert live(again, tasks=range(3, TASKS)) == live(local, tasks=range(3, TASKS))
    assert begun
    with pytest.raises(GuideLostError, match="a newer run"):
        guide.nbytes()
    guide.restore(snapshot)
    assert same(guide.snapshot(), snapshot)


def test_a_snapshot_amid_the_steps_of_a_task_continues(actor: Actor) -> None:
    guide, local = actor.guide(PAPER), Guide(RAGGED, PAPER)
    taken: list[Snapshot] = []

    def hook(moment: str, task: int, step: int) -> None:
        if (moment, task, step) == ("after", 3, 3):
            taken.append(guide.snapshot())

    whole = live(guide, hook)
    guide.restore(taken[0])
    local.restore(taken[0])
    for step in range(4, STEPS):
        arms = guide.select(step)
        assert arms.tolist() == local.select(step).tolist() == guide.select(step).tolist()
        x = distances(3, step, arms)
        assert guide.observe(step, x)
        assert local.observe(step, x)
    assert not guide.observe(STEPS - 1, x)
    assert guide.insert(gradient(3, 99)) == local.insert(gradient(3, 99))
    assert same(guide.snapshot(), local.snapshot())
    assert live(guide, tasks=range(4, 5)) == whole[-2 * STEPS - 2 :]


def test_a_hanging_actor_is_named_and_goes_on_when_it_wakes(actor: Actor) -> None:
    guide, local = actor.guide(PROBING, timeout=0.5), Guide(RAGGED, PROBING)
    for each in (guide, local):
        each.begin_task("task0")
    actor.signal(signal.SIGSTOP)
    before = guide.waited
    for step in range(UNANSWERED):
        guide.probe(step, gradient(0, step))
    assert guide.waited == before
    message = r"the guide did not answer probe \(task 'task0', step 0\) within 0\.[5-9] s"
    for call in (partial(guide.probe, UNANSWERED, gradient(0, UNANSWERED)), guide.commit):
        with pytest.raises(GuideTimeoutError, match=message):
            call()
    assert guide.waited > before + 1
    actor.signal(signal.SIGCONT)
    guide.timeout = 60
    guide.commit()
    for step in range(UNANSWERED):
        local.probe(step, gradient(0, step))
    local.commit()
    assert same(guide.snapshot(), local.snapshot())


def test_actors_of_other_names_are_not_seen_and_one_without_its_folder_says_so(actor: Actor, tmp_path: Path) -> None:
    guide, local = actor.guide(PROBING), Guide(RAGGED, PROBING)
    live(guide, tasks=range(2))
    live(local, tasks=range(2))
    snapshot = guide.snapshot()
    with pytest.raises(ClusterError, match="the actor 'guide' runs already in namespace 'tests'"):
        start_guide_actor("guide", "tests", tmp_path)
    with started("other", tmp_path / "other") as other:
        second = other.guide(PROBING)
        second.begin_task("task7")
        assert second.snapshot().meta["names"] == []
        assert same(guide.snapshot(), snapshot)
        second.restore(snapshot)
        other.signal(signal.SIGSTOP)
        shutil.rmtree(other.folder)
        other.signal(signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(GuideLostError, match=r"the guide has no state: .*last checkpoint"):
                second.begin_task("task2")
        other.assert_restarted()
        second.restore(snapshot)
        assert live(second, tasks=range(2, 4)) == live(local, tasks=range(2, 4))
    with pytest.raises(GuideLostError, match=r"the guide is gone at begin_task .*last checkpoint"):
        second.begin_task("task4")


def test_errors_of_calls_that_were_not_waited_for_come_with_a_later_call(actor: Actor) -> None:
    guide, local = actor.guide(PROBING), Guide(RAGGED, PROBING)
    with pytest.raises(GuideError, match="commit without a task in progress") as caught:
        guide.commit()
    assert caught.type is GuideError  # not Ray's, which carries the actor's traceback
    with pytest.raises(LayoutError, match=r"probe gradient at step 0 has shape \[3\]"):
        guide.probe(0, torch.ones(3))
    for each in (guide, local):
        live(each, tasks=range(2))
        with pytest.raises(GuideError, match="'task0' is already stored"):
            each.begin_task("task0")
        each.begin_task("task2")
        each.probe(0, gradient(2, 0))

    def wrongly() -> None:
        for step in (0, 1, 2):
            guide.probe(step, gradient(2, step + 1))
        guide.commit()

    with pytest.raises(GuideError, match="step 0 of task 'task2' came twice with different values"):
        wrongly()
    assert same(guide.snapshot(), local.snapshot())
    for each in (guide, local):
        each.probe(1, gradient(2, 1))
        each.commit()
        each.insert()
    assert same(guide.snapshot(), local.snapshot())


def test_the_arms_of_the_next_step_come_with_the_answer_to_an_observation(actor: Actor) -> None:
    guide, local = actor.guide(PAPER, timeout=5), Guide(RAGGED, PAPER)
    for each in (guide, local):
        live(each, tasks=range(2))
        each.begin_task("task2")
        each.observe(0, distances(2, 0, each.select(0)))
    guide.nbytes()
    actor.signal(signal.SIGSTOP)  # it cannot be asked now
    assert guide.select(1).tolist() == local.select(1).tolist()


def test_a_refused_observation_can_be_made_again(actor: Actor) -> None:
    guide, local = actor.guide(PAPER), Guide(RAGGED, PAPER)
    for each in (guide, local):
        live(each, tasks=range(2))
        each.begin_task("task2")
    arms = guide.select(0)
    assert guide.observe(0, torch.full((4,), torch.nan))
    with pytest.raises(LayoutError, match="distance of layer 'q0' at step 0 is nan"):
        guide.select(1)
    local.select(0)
    for each in (guide, local):
        assert each.observe(0, distances(2, 0, arms))
    assert guide.select(1).tolist() == local.select(1).tolist()
    assert same(guide.snapshot(), local.snapshot())


def test_calls_that_ray_repeats_in_another_order_are_sent_again(tmp_path: Path) -> None:
    class Disordered(GuideActor):
        """Refuses calls as it would if they came before the call ahead of them."""

        refused: tuple[int, ...] = ()

        def call(self, generation: int, number: int, name: str, arguments: Mapping[str, Any]) -> Values:
            if number in (3, 4, 9, 20) and number not in self.refused:
                self.refused += (number,)
                raise CallMissingError("too early")
            return super().call(generation, number, name, arguments)

    handle: Any = ray.remote(Disordered).options(num_cpus=0).remote("run", str(tmp_path))
    assert_same_life(RemoteGuide(RAGGED, PROBING, handle))
    ray.kill(handle)


def test_a_call_that_stays_missing_is_lost(actor: Actor) -> None:
    guide = actor.guide(PROBING)
    guide.begin_task("task0")
    guide._number += 1
    guide.probe(0, gradient(0, 0))
    with pytest.raises(GuideLostError, match=r"call 3 \(probe\) came, but 2 is next"):
        guide.commit()
