"""Damage that comes later: a bit that flips, a file that is cut or lost. It is found, told, and an older one is used.

Function level for the mass of it; and a few in a real run, whose weights at the end show what it went on from.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from events.checkpoint.lineage import AttemptNote
from events.checkpoint.manifest import CheckpointName
from events.checkpoint.store import CheckpointStore
from events.errors import CheckpointDamaged
from events.messages import CheckpointRejected, CheckpointSaved, RunResumed

INJECTIONS = {
    "test_one_bit_that_is_another_is_found_and_told": (1, 20),
    "test_a_file_that_was_cut_or_has_grown_is_found_and_told": (1, 10),
    "test_a_file_that_is_missing_is_found_and_told": (1, 5),
}
FLIPS, CUTS, LOSSES = 50, 20, 10
"""Of each in one injection."""
NEWEST, BEFORE = CheckpointName(12, 2), CheckpointName(10, 2)
NOTES = ["attempt-1.json", "attempt-2.json"]


@pytest.fixture(scope="module")
def reference(disk: Any) -> Any:
    return disk.Reference()


@pytest.fixture(scope="module")
def intact(disk: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two attempts with three checkpoints each."""
    run_dir = tmp_path_factory.mktemp("intact") / "run"
    disk.make_trainer(run_dir, keep_last=9, callbacks=[disk.Tally()]).train()
    disk.make_trainer(run_dir, keep_last=9, callbacks=[disk.Tally()], resume="auto", epochs=2).train()
    assert disk.look(run_dir, disk.Reference()) == (NEWEST, [])
    return run_dir


class Victim:
    """A run of which one file after the other is damaged and mended again."""

    def __init__(self, run_dir: Path, disk: Any, reference: Any) -> None:
        self.run_dir = run_dir
        folder = run_dir / "checkpoints"
        self.files = [*sorted((folder / str(NEWEST)).iterdir()), *(folder / name for name in NOTES)]
        assert len(self.files) == 7
        self._disk = disk
        self._reference = reference

    def check(self, path: Path, data: bytes | None) -> None:
        """Exchange or remove a file: what is resumed from then is the best that is left, and the rest was told."""
        before = path.read_bytes()
        assert data != before
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)
        sight = self._disk.look(self.run_dir, self._reference)
        # The manifests say what a note of an attempt does.
        right = (NEWEST, [path.name]) if path.name in NOTES else (BEFORE, [str(NEWEST)])
        assert sight == right, f"{path.name} was damaged, and {sight} found"
        path.write_bytes(before)


@pytest.fixture
def run_dir(intact: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(intact, tmp_path / "run"))


@pytest.fixture
def victim(run_dir: Path, disk: Any, reference: Any) -> Iterator[Victim]:
    yield Victim(run_dir, disk, reference)
    assert disk.look(run_dir, reference) == (NEWEST, [])


def test_one_bit_that_is_another_is_found_and_told(injection: int, victim: Victim) -> None:
    """Whichever file of a checkpoint, or note of an attempt, and whichever bit of it."""
    chance = random.Random(injection)
    for number in range(FLIPS):
        path = victim.files[number % len(victim.files)]
        data = bytearray(path.read_bytes())
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        victim.check(path, bytes(data))


def test_a_file_that_was_cut_or_has_grown_is_found_and_told(injection: int, victim: Victim) -> None:
    """At any length, from none at all to a byte too few; or with something behind its end."""
    chance = random.Random(injection)
    for number in range(CUTS):
        path = victim.files[number % len(victim.files)]
        data = path.read_bytes()
        length = chance.choice([0, len(data) - 1, *(chance.randrange(len(data)) for _ in range(4))])
        victim.check(path, data[:length])
        victim.check(path, data + chance.randbytes(chance.choice([1, 4096])))


def test_a_file_that_is_missing_is_found_and_told(injection: int, victim: Victim) -> None:
    """Whichever it is."""
    for number in range(injection * LOSSES, (injection + 1) * LOSSES):
        victim.check(victim.files[number % len(victim.files)], None)


def flip(path: Path, at: int = -20) -> None:
    """Damage a byte of a file, for good."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.msgpack", "callback-0.msgpack", "manifest.json"])
def test_a_run_that_resumes_tells_what_it_rejects_and_goes_on_from_the_one_before(
    file: str, run_dir: Path, disk: Any, reference: Any
) -> None:
    """The events say which one and why, before they say from which one it goes on; its weights are right in the end."""
    flip(run_dir / "checkpoints" / str(NEWEST) / file)
    arrivals, module = disk.Arrivals(), disk.Counting()
    ready = disk.make_trainer(
        run_dir, module=module, sinks=[arrivals], callbacks=[disk.Tally()], resume="auto", epochs=3, keep_last=9
    )
    assert ready.train().status == "finished"
    (rejected,) = arrivals.of(CheckpointRejected)
    (resumed,) = arrivals.of(RunResumed)
    assert (rejected.checkpoint, resumed.checkpoint) == (str(NEWEST), str(BEFORE))
    assert file in rejected.error
    assert arrivals.events.index(rejected) < arrivals.events.index(resumed)
    assert disk.digest_of(module) == reference[18]
    saved = [event.checkpoint for event in arrivals.of(CheckpointSaved)]
    assert saved == ["step-12.a3", "step-14.a3", "step-16.a3", "step-18.a3"]
    assert disk.look(run_dir, reference) == (CheckpointName(18, 3), [])


def test_a_damaged_note_of_an_attempt_is_told_and_the_run_goes_on_all_the_same(
    run_dir: Path, disk: Any, reference: Any
) -> None:
    """The checkpoints themselves say what their attempt started from."""
    flip(run_dir / "checkpoints" / "attempt-2.json", 12)
    arrivals, module = disk.Arrivals(), disk.Counting()
    disk.make_trainer(run_dir, module=module, sinks=[arrivals], resume="auto", epochs=3).train()
    (rejected,) = arrivals.of(CheckpointRejected)
    (resumed,) = arrivals.of(RunResumed)
    assert (rejected.checkpoint, resumed.checkpoint) == ("attempt-2.json", str(NEWEST))
    assert disk.digest_of(module) == reference[18]


def test_a_damaged_note_of_where_somebody_went_back_to_leads_nowhere_else(
    run_dir: Path, disk: Any, reference: Any
) -> None:
    """The third attempt went back to an early checkpoint: no bit of its note can flip and make it another one."""
    store = CheckpointStore(run_dir / "checkpoints")
    store.prepare(AttemptNote(3, "step-4.a1"))
    assert disk.look(run_dir, reference) == (CheckpointName(4, 1), [])
    path = run_dir / "checkpoints" / "attempt-3.json"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 7):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert disk.look(run_dir, reference) == (NEWEST, ["attempt-3.json"])


def test_of_several_damaged_ones_each_is_told_and_the_first_whole_one_is_used(
    run_dir: Path, disk: Any, reference: Any
) -> None:
    """Back over the attempts, one by one, to the oldest."""
    names = CheckpointStore(run_dir / "checkpoints").line()
    assert len(names) == 6
    files = ("tensors.safetensors", "manifest.json", "state.msgpack", "readings.msgpack", "callback-0.msgpack")
    for count, (name, file) in enumerate(zip(names, files, strict=False), 1):
        flip(run_dir / "checkpoints" / str(name) / file)
        assert disk.look(run_dir, reference) == (names[count], [str(name) for name in names[:count]])


def test_where_nothing_is_whole_that_is_said_and_nothing_is_changed(run_dir: Path, disk: Any) -> None:
    """A run is not begun anew over what somebody may still save."""
    for path in (run_dir / "checkpoints").glob("*/state.msgpack"):
        flip(path)
    before = {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*.*") if path.is_file()}
    with pytest.raises(CheckpointDamaged, match=r"none of the 6 checkpoints in .* is whole; nothing was changed"):
        disk.make_trainer(run_dir, callbacks=[disk.Tally()], resume="auto", epochs=3).train()
    assert before == {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*.*") if path.is_file()}
