"""Retention and ``resume="auto"`` under schedules of saves, crashes, uploads and resumes from older checkpoints."""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from faults import resume_store
from faults.injections import FULL, injected
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.checkpoints import make

from events.checkpoint import files
from events.checkpoint.files import verify
from events.checkpoint.lineage import AttemptNote, by_age, expendable, line_of
from events.checkpoint.manifest import CheckpointName
from events.checkpoint.settings import Checkpoints
from events.checkpoint.store import CheckpointStore, Upload
from events.errors import CheckpointDamaged

MEMORY = Path("/dev/shm")  # where an fsync takes no time


class Schedule(RuleBasedStateMachine):
    """Attempts at one run in a real store with the real writer, and a model of the checkpoints that must exist."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.store = CheckpointStore(self.folder / "checkpoints")
        self.process: resume_store.Process | None = None
        self.attempt = 0
        self.step = 0
        self.chain: list[CheckpointName] = []
        """The ancestry of the present attempt, the oldest first, deleted checkpoints included."""
        self.damaged: set[CheckpointName] = set()
        self.metrics: dict[CheckpointName, float] = {}
        """Of the checkpoints with a readable manifest."""
        self.lines: dict[CheckpointName, list[CheckpointName]] = {}
        """The ancestry of each checkpoint, itself included."""

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # ------------------------------------------------------------------------------------------------ the model

    @property
    def there(self) -> list[CheckpointName]:
        return self.store.names()

    @property
    def expected(self) -> CheckpointName | None:
        """The newest undamaged checkpoint of the ancestry."""
        whole = [name for name in self.chain if name in self.there and name not in self.damaged]
        return whole[-1] if whole else None

    def died(self, name: CheckpointName) -> None:
        """Note the death of the process, perhaps after the checkpoint got its name."""
        self.process = None
        if name in self.there:
            self.chain.append(name)

    # ------------------------------------------------------------------------------------------------- schedules

    @initialize(
        keep_last=st.one_of(st.none(), st.integers(1, 3)),
        keep_best=st.integers(0, 9),
        best_mode=st.sampled_from(["min", "max"]),
        uploads=st.booleans(),
    )
    def begin(self, keep_last: int | None, keep_best: int, best_mode: Any, uploads: bool) -> None:
        self.settings = Checkpoints(
            keep_last=keep_last,
            keep_best=keep_best,
            best=resume_store.METRIC,
            best_mode=best_mode,
            upload="file:///somewhere" if uploads else None,
        )
        self.start("auto", 0, None)

    @precondition(lambda self: self.process is None)
    @rule(
        how=st.sampled_from(["auto", "auto", "auto", "older", "anew"]),
        index=st.integers(0, 9),
        dies_at=st.one_of(st.none(), st.none(), st.integers(0, 12)),
    )
    def start(self, how: str, index: int, dies_at: int | None) -> None:
        """Start an attempt from the newest, any other or no checkpoint; it may die in its start."""
        usable = [name for name in self.there if name not in self.damaged]
        if how == "anew" or not usable:
            parent = None
        elif how == "older":
            parent = usable[index % len(usable)]
        else:
            parent = self.expected
            if parent is None:  # its line is damaged or empty: any other undamaged one
                parent = next((name for name in self.store.candidates() if name not in self.damaged), None)
        attempt = self.store.last_attempt + 1
        try:
            with resume_store.dying(dies_at):
                self.process = resume_store.Process(
                    self.store.folder, self.settings, attempt, str(parent) if parent is not None else None
                )
        except resume_store.Killed:
            if attempt not in self.store.attempts():
                return
        self.attempt = attempt
        self.step = parent.step if parent is not None else 0
        if parent is None:
            self.chain = []
        elif parent in self.chain:
            self.chain = self.chain[: self.chain.index(parent) + 1]
        else:  # on a superseded line
            self.chain = list(self.lines[parent])

    @precondition(lambda self: self.process is not None)
    @rule(
        steps=st.integers(0, 3),
        metric=st.one_of(st.none(), st.sampled_from([0.1, 0.2, 0.3, 0.4])),
        dies_at=st.one_of(st.none(), st.none(), st.integers(0, 40)),
    )
    def save(self, steps: int, metric: float | None, dies_at: int | None) -> None:
        """Save a checkpoint, and delete expendable ones; the process may die at any call."""
        self.step += steps
        own = [name for name in self.chain if name.attempt == self.attempt and name.step == self.step]
        name = CheckpointName(self.step, self.attempt, own[-1].revision + 1 if own else 1)
        before = [*self.there, name]
        if metric is not None:
            self.metrics[name] = metric
        try:
            with resume_store.dying(dies_at):
                self.process.save(name, metric)
        except resume_store.Killed:
            self.died(name)
        else:
            assert self.process.saved[-1] == str(name)
            self.chain.append(name)
            self.check_kept(before)

    @precondition(lambda self: self.process is not None)
    @rule(dies_at=st.one_of(st.none(), st.integers(0, 6)))
    def retain(self, dies_at: int | None) -> None:
        """Delete expendable checkpoints, as after an upload; the process may die at any call."""
        before = self.there
        try:
            with resume_store.dying(dies_at):
                self.process.writer.retain()
        except resume_store.Killed:
            self.process = None
        else:
            self.check_kept(before)

    @precondition(lambda self: self.process is not None)
    @rule()
    def crash(self) -> None:
        """Die between two saves."""
        self.process = None

    @precondition(lambda self: self.settings.upload is not None and self.there)
    @rule(index=st.integers(0, 9))
    def upload(self, index: int) -> None:
        """Mark any checkpoint as uploaded."""
        name = self.there[index % len(self.there)]
        self.store.mark_uploaded(name, Upload(f"{resume_store.URL}/{name}", 0.0))

    @precondition(lambda self: len(self.there) > 1)
    @rule(index=st.integers(0, 9), what=st.sampled_from(["state.msgpack", "tensors.safetensors", "manifest.json"]))
    def damage(self, index: int, what: str) -> None:
        """Change a byte of a file."""
        whole = [name for name in self.there if name not in self.damaged]
        if not whole:
            return
        name = whole[index % len(whole)]
        path = self.store.path(name) / what
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        self.damaged.add(name)
        if what == "manifest.json":
            self.metrics.pop(name, None)

    # ----------------------------------------------------------------------------------------------- what must hold

    def check_kept(self, before: list[CheckpointName]) -> None:
        """Check that retention deleted only checkpoints that it may delete."""
        there, settings = self.there, self.settings
        gone = [name for name in before if name not in there]
        line = [name for name in self.chain if name in before]
        if settings.keep_last is None:
            assert not gone
            return
        assert not set(line[-settings.keep_last :]) & set(gone)
        sign = -1 if settings.best_mode == "max" else 1
        scored = {name.step: name for name in line if name in self.metrics}  # the newest of each step
        best = sorted(scored.values(), key=lambda name: (sign * self.metrics[name], -line.index(name)))
        assert not set(best[: settings.keep_best]) & set(gone)
        if settings.upload is None:
            assert len(there) <= settings.keep_last + settings.keep_best
        for name in gone:  # a newer one exists, and is uploaded if uploads are on
            later = [one for one in there if (one in line, one) > (name in line, name)]
            assert any(settings.upload is None or self.store.upload_of(one) for one in later), name

    @invariant()
    def every_name_is_that_of_a_complete_checkpoint(self) -> None:
        for end, name in enumerate(self.chain, 1):
            self.lines[name] = self.chain[:end]
        for name in self.there:
            try:
                verify(self.store.path(name), self.store.manifest(name))
            except CheckpointDamaged:
                assert name in self.damaged
            else:
                assert name not in self.damaged

    @invariant()
    def auto_resumes_from_the_newest_of_the_line(self) -> None:
        if not hasattr(self, "settings"):
            return
        rejected: list[str] = []
        if self.chain:
            assert self.chain[-1] in self.there, "the newest was deleted"
        line = [name for name in self.chain if name in self.there]
        assert self.store.line() == line[::-1]
        try:
            found = resume_store.load(self.store, rejected)
        except CheckpointDamaged:
            assert line
            assert set(self.there) <= self.damaged
            return
        if self.expected is not None or not line:
            assert found == self.expected
        else:
            assert found not in line
        assert {CheckpointName.parse(name) for name in rejected} <= self.damaged


@pytest.mark.timeout(180)
@injected("injection", range(60), 1)
def test_no_schedule_loses_the_newest_checkpoint_or_its_line(injection: int) -> None:
    hypothesis.seed(injection)(Schedule)
    options: Any = {"deadline": None, "database": None, "derandomize": False, "print_blob": False}
    run_state_machine_as_test(Schedule, settings=settings(max_examples=10, stateful_step_count=20, **options))


# ------------------------------------------------------------------------------------------------- the pure decision

EXAMPLES = settings(max_examples=300 if FULL else 25, deadline=None)
NAMES = st.builds(CheckpointName, st.integers(0, 30), st.integers(1, 4), st.integers(1, 2))


@st.composite
def stores(draw: st.DrawFn) -> dict[str, Any]:
    """The arguments of `expendable`."""
    names = sorted(draw(st.sets(NAMES, max_size=10)))
    some = st.sampled_from(names) if names else st.nothing()
    numbers = st.sampled_from([0.0, 0.1, 0.2, 1e300, -1.0])  # many ties; NaN is never recorded
    return {
        "settings": Checkpoints(
            keep_last=draw(st.none() | st.integers(1, 4)),
            keep_best=draw(st.integers(0, 12)),
            best="m",
            best_mode=draw(st.sampled_from(["min", "max"])),
        ),
        "line": sorted(draw(st.sets(some)), reverse=True),
        "names": names,
        "metrics": draw(st.dictionaries(some, numbers)),
        "uploaded": draw(st.none() | st.sets(some)),
    }


@EXAMPLES
@given(stores())
def test_retention_keeps_the_newest_the_best_and_those_after_the_newest_upload(store: dict[str, Any]) -> None:
    """And deletes all others, superseded ones first, and then by age."""
    settings, line, names, metrics, uploaded = store.values()
    ordered = [*(name for name in names if name not in line), *line[::-1]]
    assert by_age(line, names) == ordered
    sign = -1 if settings.best_mode == "max" else 1
    scored = {name.step: name for name in reversed(line) if name in metrics}  # the newest of each step
    best = sorted(scored.values(), key=lambda name: (sign * metrics[name], line.index(name)))  # of equal ones the newer
    kept = {*ordered[-(settings.keep_last or len(names)) :], *best[: settings.keep_best]}
    if uploaded is not None:
        there = [index for index, name in enumerate(ordered) if name in uploaded]
        kept |= {*ordered[max(there, default=0) :]}
    assert expendable(**store) == [name for name in ordered if name not in kept]


def test_a_checkpoint_whose_manifest_the_disk_cannot_read_now_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metric may be the best."""
    store, read = CheckpointStore(tmp_path / "checkpoints"), files.read_below
    for step in (1, 2, 3):
        make(store.folder, step, state=9)

    def failing(root: Path, name: str, limit_bytes: int) -> bytes:
        if "step-1" in name:
            raise OSError(errno.EIO, "Input/output error")
        return read(root, name, limit_bytes)

    settings = Checkpoints(keep_last=1)
    assert list(map(str, store.expendable(settings, "run"))) == ["step-1.a1", "step-2.a1"]
    monkeypatch.setattr(files, "read_below", failing)
    assert list(map(str, store.expendable(settings, "run"))) == ["step-2.a1"]


@EXAMPLES
@given(stores(), st.data())
def test_the_line_of_any_parents_ends(store: dict[str, Any], data: st.DataObject) -> None:
    names = store["names"]
    parents = {n: data.draw(st.one_of(st.none(), NAMES.map(str), st.just("none"))) for n in range(1, 5)}
    line = line_of(names, {}, lambda name: parents[name.attempt])
    assert len(set(line)) == len(line)
    assert set(line) <= set(names)
    assert [name.attempt for name in line] == sorted((name.attempt for name in line), reverse=True)
    assert bool(line) == bool(names)


def test_the_line_of_many_attempts_takes_linear_time() -> None:
    """A stranger's folder may have thousands."""
    looks = 0

    class Counted:
        def __init__(self, number: int) -> None:
            self._age = (number, number, 1)

        @property
        def attempt(self) -> int:
            nonlocal looks
            looks += 1
            return self._age[0]

    names: Any = [Counted(number) for number in range(1, 501)]
    attempts = {number: AttemptNote(number, f"step-{number - 1}.a{number - 1}") for number in range(2, 501)}
    assert line_of(names, attempts, lambda name: None) == names[::-1]
    assert looks <= 2 * len(names)
