from __future__ import annotations

import copy
import itertools
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.lives import RAGGED, distances, gradient
from treelora_ray.cluster import guide_server
from treelora_ray.cluster.errors import GuideLostError
from treelora_ray.cluster.guide_server import (
    UNANSWERED,
    CallMissingError,
    GuideServer,
    Journal,
    Values,
    choice_from_values,
    pack,
    unpack,
)
from treelora_ray.core import Guide, GuideConfig, GuideError, Inserted, LayoutError, Snapshot, SnapshotError

TASKS, STEPS = 6, 4
CASES = [
    GuideConfig.of("treelora"),
    GuideConfig.of("treelora", pulls_per_round=2, sketch_dim=16, budget=3, tree_update="insert"),
    GuideConfig.of("treelora", observe="query"),
    GuideConfig.of("paper", budget=3),
    GuideConfig.of("released", steps_per_epoch=3),
]
each_case = pytest.mark.parametrize("config", CASES, ids=["probe", "sketch", "query", "paper", "released"])

Do = Callable[..., Values]
Call = tuple[str, dict[str, Any]]
Life = Generator[Call, Values, None]


def life(config: GuideConfig) -> Life:
    """Calls one after the other; what it is sent are their answers."""
    for task in range(TASKS):
        yield "begin_task", {"name": f"task{task}"}
        if config.observe == "probe":
            for step in range(STEPS):
                yield "probe", {"step": step, "gradient": gradient(task, step)}
            yield "commit", {}
            yield "insert", {"signature": None}
            continue
        arms = (yield "select", {"step": 0})["arms"]
        for step in range(STEPS):
            call = "exchange" if step % 3 else "observe"
            answer = yield call, {"step": step, "distances": distances(task, step, arms)}
            arms = answer["arms"] if call == "exchange" else (yield "select", {"step": step + 1})["arms"]
        yield "insert", {"signature": gradient(task, 99)}


def run(do: Do, config: GuideConfig, known: Sequence[Values] = (), stop: int | None = None) -> list[Values]:
    """The answers of a life, which goes on after the known ones, up to so many."""
    calls, answers = life(config), list(known)
    name, arguments = next_call(calls, known)
    while len(answers) != stop:
        answers.append(do(name, **arguments))
        try:
            name, arguments = calls.send(answers[-1])
        except StopIteration:
            break
    return answers


def next_call(calls: Life, known: Sequence[Values]) -> Call:
    call = next(calls)
    for answer in known:
        call = calls.send(answer)
    return call


def plain(answers: Sequence[Values]) -> list[Values]:
    return [
        {name: value.tolist() if isinstance(value, Tensor) else value for name, value in answer.items()}
        for answer in answers
    ]


def directly(guide: Guide) -> Do:
    """The calls as methods of a guide in this process."""

    def do(name: str, /, **arguments: Any) -> Values:
        if name == "exchange":
            new = guide.observe(**arguments)
            return {"new": new, "arms": torch.from_numpy(guide.select(arguments["step"] + 1))}
        answer = getattr(guide, name)(**arguments)
        if name == "commit":
            return {part: torch.from_numpy(getattr(answer, part)) for part in ("task", "distance", "related")}
        if name == "insert":
            return answer.to_json()
        if name == "begin_task":
            return {}
        if name == "observe":
            return {"new": answer}
        return {"compared" if name == "probe" else "arms": torch.from_numpy(answer)}

    return do


class Caller:
    """Numbers its calls; with `again`, the server is made anew before each of them."""

    def __init__(
        self, folder: Path, config: GuideConfig, snapshot: Snapshot | None = None, again: bool = False
    ) -> None:
        self.folder, self.again, self.number = folder, again, 0
        self.server = GuideServer(folder)
        self.generation = self.server.open(RAGGED.to_json(), config.to_json(), snapshot)

    def __call__(self, name: str, /, **arguments: Any) -> Values:
        if self.again:
            self.server = GuideServer(self.folder)
        answer = self.server.call(self.generation, self.number + 1, name, arguments)
        self.number += 1
        return answer

    def at(self, folder: Path) -> Caller:
        """The same caller, of a server on another folder."""
        other = copy.copy(self)
        other.folder, other.server = folder, GuideServer(folder)
        return other

    def read(self, name: str, /, **arguments: Any) -> Values:
        return self.server.call(self.generation, self.number, name, arguments)

    def snapshot(self) -> Snapshot:
        return Snapshot(**self.read("snapshot"))


def same(one: Snapshot, other: Snapshot) -> bool:
    if one.meta != other.meta or one.tensors.keys() != other.tensors.keys():
        return False
    return all(torch.equal(value, other.tensors[key]) for key, value in one.tensors.items())


def restart_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide_server, "LIMIT", 0)
    monkeypatch.setattr(Guide, "nbytes", lambda _: 0)


# -- a server is a guide


@each_case
def test_a_server_answers_as_a_guide_in_this_process_does(tmp_path: Path, config: GuideConfig) -> None:
    guide, caller = Guide(RAGGED, config), Caller(tmp_path, config)
    expected = run(directly(guide), config)
    assert plain(run(caller, config)) == plain(expected)
    assert same(caller.snapshot(), guide.snapshot())
    assert caller.read("draw")["text"] == guide.draw()
    assert caller.read("to_data")["nodes"] == guide.to_data()
    assert caller.read("nbytes")["nbytes"] == guide.nbytes()
    arms = torch.tensor([3, -1, 0, 5])
    assert torch.equal(caller.read("directions", tasks=arms)["directions"], guide.directions(arms.numpy()))


@pytest.mark.parametrize("often", [False, True], ids=["journal", "snapshots"])
@each_case
def test_a_server_made_anew_before_every_call_is_as_one_that_never_stopped(
    tmp_path: Path, config: GuideConfig, often: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = Guide(RAGGED, config)
    expected = run(directly(guide), config)
    if often:
        restart_often(monkeypatch)
    caller = Caller(tmp_path, config, again=True)
    assert plain(run(caller, config)) == plain(expected)
    assert same(caller.snapshot(), guide.snapshot())
    assert len(list(tmp_path.iterdir())) == 2
    snapshots = int(next(tmp_path.glob("journal-*")).name.removeprefix("journal-"))
    assert snapshots == (caller.number + 1 if often else 1)


def test_a_long_journal_gives_way_to_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide_server, "LIMIT", 3000)
    caller = Caller(tmp_path, CASES[0])
    sizes = []
    for step in range(12):
        if step == 0:
            caller("begin_task", name="task")
        caller("probe", step=step, gradient=gradient(0, step))
        sizes.append(caller.server.journal.size)
    assert 0 in sizes
    assert max(sizes) <= 3000
    assert min(sizes[1:], default=1) == 0 < sizes[0]
    assert same(Caller(tmp_path / "other", CASES[0], caller.snapshot()).snapshot(), caller.snapshot())


def test_choices_and_insertions_survive_as_plain_data(tmp_path: Path) -> None:
    config = GuideConfig.of("treelora", budget=3)
    guide, caller = Guide(RAGGED, config), Caller(tmp_path, config)
    answers = run(caller, config)
    run(directly(guide), config)
    caller("begin_task", name="new")
    guide.begin_task("new")
    caller("probe", step=0, gradient=gradient(7, 0))
    guide.probe(0, gradient(7, 0))
    choice, expected = choice_from_values(unpack(pack(caller("commit")))), guide.commit()
    for part in ("task", "distance", "related", "warm"):
        assert np.array_equal(getattr(choice, part), getattr(expected, part))
    assert guide.last is not None
    assert Inserted.from_json(unpack(pack(answers[-1]))) == guide.last[2]


# -- generations and numbers


@pytest.mark.parametrize("kept", ["memory", "journal", "snapshot"])
def test_a_repeated_call_has_the_same_answer_and_changes_nothing(
    tmp_path: Path, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kept == "snapshot":
        restart_often(monkeypatch)
    caller = Caller(tmp_path, CASES[3])
    sent: list[tuple[int, str, dict[str, Any], Values]] = []

    def do(name: str, /, **arguments: Any) -> Values:
        answer = caller(name, **arguments)
        sent.append((caller.number, name, arguments, answer))
        if kept != "memory":
            caller.server = GuideServer(tmp_path)
        before = caller.snapshot()
        for number, name, arguments, expected in sent[-UNANSWERED - 1 :]:
            again = caller.server.call(caller.generation, number, name, arguments)
            assert plain([again]) == plain([expected])
        assert same(caller.snapshot(), before)
        return answer

    run(do, CASES[3])
    number, name, arguments, _ = sent[-UNANSWERED - 2]
    with pytest.raises(GuideLostError, match=rf"call {number} \({name}\) came after call {caller.number}"):
        caller.server.call(caller.generation, number, name, arguments)


def test_another_call_under_a_number_that_was_used_is_refused(tmp_path: Path) -> None:
    caller = Caller(tmp_path, CASES[0])
    caller("begin_task", name="task")
    caller("probe", step=0, gradient=gradient(0, 0))
    with pytest.raises(GuideLostError, match=r"call 2 \(probe\) came after call 2: another caller"):
        caller.server.call(caller.generation, 2, "probe", {"step": 0, "gradient": gradient(0, 1)})


def test_gaps_are_refused_and_change_nothing(tmp_path: Path) -> None:
    caller = Caller(tmp_path, CASES[0])
    caller("begin_task", name="task")
    before = caller.snapshot()
    with pytest.raises(CallMissingError, match=r"call 3 \(probe\) came, but 2 is next: .* last checkpoint"):
        caller.server.call(caller.generation, 3, "probe", {"step": 0, "gradient": gradient(0, 0)})
    with pytest.raises(CallMissingError, match=r"call 2 \(nbytes\)"):
        caller.server.call(caller.generation, 2, "nbytes", {})
    with pytest.raises(GuideLostError, match=r"call 0 \(nbytes\) came after call 1"):
        caller.server.call(caller.generation, 0, "nbytes", {})
    assert same(caller.snapshot(), before)


def test_a_new_generation_ends_the_one_before_it_also_after_a_restart(tmp_path: Path) -> None:
    old = Caller(tmp_path, CASES[0])
    old("begin_task", name="old")
    new = Caller(tmp_path, CASES[3])
    assert new.generation == old.generation + 1
    assert new.snapshot().meta["current"] is None
    for again in (False, True):
        old.server = GuideServer(tmp_path) if again else new.server
        with pytest.raises(GuideLostError, match="a newer run of the workers has taken over the guide"):
            old("probe", step=0, gradient=gradient(0, 0))
        with pytest.raises(GuideLostError, match="a newer run"):
            old.read("nbytes")
    with pytest.raises(GuideLostError, match="has fallen behind its caller"):
        new.server.call(new.generation + 1, 1, "begin_task", {"name": "later"})
    new("begin_task", name="new")


def test_a_server_without_state_says_so_until_a_generation_is_opened(tmp_path: Path) -> None:
    caller = Caller(tmp_path / "one", CASES[0])
    caller("begin_task", name="task")
    snapshot = caller.snapshot()
    caller.server = GuideServer(tmp_path / "two")
    with pytest.raises(GuideLostError, match=r"has no state: .*two\); go back to the last checkpoint"):
        caller("probe", step=0, gradient=gradient(0, 0))
    other = Caller(tmp_path / "two", CASES[0], snapshot)
    assert other.generation > caller.generation
    assert same(other.snapshot(), snapshot)


def test_state_that_cannot_be_read_is_no_state_but_its_generation_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = Caller(tmp_path, CASES[0])
    monkeypatch.setattr("treelora_ray.core.guide.SNAPSHOT_VERSION", 99)
    caller.server = GuideServer(tmp_path)
    with pytest.raises(GuideLostError, match="has no state"):
        caller("begin_task", name="task")
    assert Caller(tmp_path, CASES[0]).generation == caller.generation + 1


def test_an_open_that_is_refused_leaves_the_generation_before_it(tmp_path: Path) -> None:
    caller = Caller(tmp_path, CASES[0])
    caller("begin_task", name="task")
    with pytest.raises(SnapshotError, match="other settings"):
        Caller(tmp_path, CASES[1], caller.snapshot())
    caller("probe", step=0, gradient=gradient(0, 0))
    caller.server = GuideServer(tmp_path)
    caller("probe", step=1, gradient=gradient(0, 1))


# -- errors


WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("begin_task", {"name": "other"}, GuideError, "insert it before"),
    ("probe", {"step": 0, "gradient": torch.ones(3)}, LayoutError, r"shape \[3\]"),
    ("select", {"step": 1}, GuideError, "call `probe`"),
    ("observe", {"step": 0, "distances": torch.ones(4)}, GuideError, "never selected"),
    ("undo", {}, GuideError, "no call 'undo'; it has: begin_task, probe"),
    ("probe", {"gradients": 1}, TypeError, "gradients"),
    ("insert", {"signature": 1}, AttributeError, "ndim"),
]


@pytest.mark.parametrize(("name", "arguments", "error", "message"), WRONG, ids=[f"{w[0]}-{w[3][:7]}" for w in WRONG])
def test_errors_are_raised_and_leave_no_trace(
    tmp_path: Path, name: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    caller = Caller(tmp_path, CASES[0])
    caller("begin_task", name="task")
    before, size = caller.snapshot(), caller.server.journal.size
    if name == "undo":
        with pytest.raises(error, match=message):
            caller.read(name, **arguments)
    else:
        with pytest.raises(error, match=message):
            caller(name, **arguments)
    assert same(caller.snapshot(), before)
    assert caller.server.journal.size == size
    caller("probe", step=0, gradient=gradient(0, 0))
    assert GuideServer(tmp_path).number == caller.number == 2


def test_an_observation_known_before_brings_no_arms(tmp_path: Path) -> None:
    caller = Caller(tmp_path, CASES[3])
    for task in range(2):
        caller("begin_task", name=f"task{task}")
        if task == 0:
            caller("insert", signature=gradient(0, 0))
    caller("select", step=0)
    x = torch.full((4,), 0.5)
    first = caller("exchange", step=0, distances=x)
    assert first["new"]
    assert caller("exchange", step=0, distances=x) == {"new": False, "arms": None}
    assert torch.equal(caller("select", step=1)["arms"], first["arms"])


def test_a_full_disk_is_an_error_and_the_call_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = Caller(tmp_path, CASES[0])
    caller("begin_task", name="task")
    before = caller.snapshot()
    write = os.write

    def half(file: int, data: Any) -> int:
        if len(data) < 300:
            raise OSError("disk full")
        return write(file, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(OSError, match="disk full"):
            caller("probe", step=0, gradient=gradient(0, 0))
    assert same(caller.snapshot(), before)
    caller("probe", step=0, gradient=gradient(0, 0))
    assert same(Snapshot(**GuideServer(tmp_path).call(caller.generation, 2, "snapshot", {})), caller.snapshot())


def test_a_journal_takes_no_record_after_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.append(b"one")
    write = os.write

    def torn(file: int, data: Any) -> int:
        write(file, data[:9])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", torn)
        with pytest.raises(OSError, match="disk full"):
            journal.append(b"two")
    with pytest.raises(ValueError, match="closed file"):
        journal.append(b"three")
    assert Journal(tmp_path).records == [b"one"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    journal.append(b"a record of some length")
    assert Journal(tmp_path).records == [b"a record of some length"]


# -- the journal


def test_a_record_cut_or_changed_at_any_byte_is_lost_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "whole")
    journal.restart({"x": torch.ones(2)}, {"at": 1})
    payloads = [pack({"step": step, "x": torch.full((2,), float(step))}) for step in range(3)]
    for payload in payloads[:-1]:
        journal.append(payload)
    kept = journal.size
    journal.append(payloads[-1])
    whole = (tmp_path / "whole" / "journal-1").read_bytes()
    for cut, damaged in itertools.product(range(kept, len(whole)), (False, True)):
        shutil.copytree(tmp_path / "whole", tmp_path / "copy", dirs_exist_ok=True)
        changed = whole[:cut] + bytes([whole[cut] ^ 0x10]) + whole[cut + 1 :] if damaged else whole[:cut]
        (tmp_path / "copy" / "journal-1").write_bytes(changed)
        found = Journal(tmp_path / "copy")
        assert found.records == payloads[:-1]
        assert found.snapshot is not None
        assert found.snapshot[1] == {"at": 1}
        found.append(b"after")
        assert Journal(tmp_path / "copy").records == [*payloads[:-1], b"after"]


def test_zeros_after_the_last_record_are_no_record(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(b"one")
    with (tmp_path / "journal-0").open("ab") as file:
        file.write(bytes(4096))
    assert Journal(tmp_path).records == [b"one"]
    assert (tmp_path / "journal-0").stat().st_size == journal.size


def test_a_damaged_snapshot_gives_way_to_the_one_before_and_its_journal_is_not_taken_for_ours(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.restart({}, {"at": 1})
    first = [(path, path.read_bytes()) for path in tmp_path.iterdir()]
    journal.restart({}, {"at": 2})
    journal.append(b"of the second")
    for path, data in first:
        path.write_bytes(data)
    (tmp_path / "snapshot-2.safetensors").write_bytes(b"damaged")
    (tmp_path / "notes.txt").write_bytes(b"not ours")
    again = Journal(tmp_path)
    assert again.snapshot is not None
    assert again.snapshot[1] == {"at": 1}
    assert again.records == []
    again.restart({}, {"at": 3})
    assert Journal(tmp_path).records == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal-3", "notes.txt", "snapshot-3.safetensors"]


def test_a_record_is_on_the_disk_before_its_call_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Caller(tmp_path, CASES[0])
    done: list[str] = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*given: Any) -> Any:
            done.append(name)
            return real(*given)

        return operation

    for name in ("write", "fsync"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    caller("begin_task", name="task")
    assert done == ["write", "fsync"]
    caller.read("nbytes")
    assert done == ["write", "fsync"]


# -- crashes


class Crash(BaseException):
    """The process is gone: nothing that it would do afterwards happens."""


def crash_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """From the `moment`th operation on the disk on none is done."""
    operations = itertools.count()

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*given: Any, **named: Any) -> Any:
            if next(operations) >= moment:
                raise Crash
            return real(*given, **named)

        return operation

    for name in ("write", "fsync", "replace"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    for name in ("unlink", "open", "mkdir"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))


def crashes(monkeypatch: pytest.MonkeyPatch, prepare: Callable[[int], Callable[[], object]]) -> Iterator[int]:
    """Prepares and does something until it comes to its end without a crash; stops after each crash."""
    for moment in itertools.count():
        act = prepare(moment)
        with monkeypatch.context() as patch:
            crash_at(patch, moment)
            try:
                act()
            except Crash:
                pass
            else:
                return
        yield moment


@pytest.mark.parametrize("config", [CASES[0], CASES[3]], ids=["probe", "paper"])
def test_a_crash_at_any_moment_of_a_call_that_ends_in_a_snapshot_loses_nothing(
    tmp_path: Path, config: GuideConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = Guide(RAGGED, config)
    expected = run(directly(guide), config)
    restart_often(monkeypatch)
    begun, folder, moments = len(expected) - 9, tmp_path / "now", []
    first = Caller(tmp_path / "first", config)
    answers = run(first, config, stop=begun)
    name, arguments = next_call(life(config), answers)

    def prepare(_: int) -> Callable[[], object]:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(first.folder, folder)
        caller = first.at(folder)
        return lambda: caller(name, **arguments)

    for moment in crashes(monkeypatch, prepare):
        moments.append(moment)
        caller = first.at(folder)
        assert caller.server.number in ({begun} if moment == 0 else {begun, begun + 1} if moment == 1 else {begun + 1})
        assert plain(run(caller, config, answers)) == plain(expected)
        assert same(caller.snapshot(), guide.snapshot())
        assert len(list(folder.iterdir())) == 2
    assert (
        len(moments) >= 13
    )  # write, sync; snapshot: open, sync, rename, unlink, sync folder; the same for the journal


@pytest.mark.parametrize("restored", [False, True], ids=["new", "restored"])
def test_a_crash_at_any_moment_of_an_open_leaves_the_old_generation_or_the_new(
    tmp_path: Path, restored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CASES[0]
    old = Caller(tmp_path / "first", config)
    run(old, config)
    before = old.snapshot()
    other = Caller(tmp_path / "other", config)
    other("begin_task", name="other")
    wanted = other.snapshot() if restored else None
    expected = wanted or Guide(RAGGED, config).snapshot()
    folder, seen = tmp_path / "now", []

    def prepare(_: int) -> Callable[[], object]:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "first", folder)
        server = GuideServer(folder)
        return lambda: server.open(RAGGED.to_json(), config.to_json(), wanted)

    for _ in crashes(monkeypatch, prepare):
        server = GuideServer(folder)
        assert server.guide is not None
        new = server.generation == old.generation + 1
        seen.append(new)
        assert new or (server.generation, server.number) == (old.generation, old.number)
        assert same(server.guide.snapshot(), expected if new else before)
        caller = Caller(folder, config, wanted)
        assert caller.generation == server.generation + 1
        assert same(caller.snapshot(), expected)
        assert len(list(folder.iterdir())) == 2
    assert seen == sorted(seen)
    assert len(set(seen)) == 2
