"""Damage that comes later, a flipped bit, a cut or a lost file: it is found and reported, and an older one is used.

Most of it without a run; and a few cases in a run, whose weights at the end show which checkpoint it started from.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.disk_kit import Arrivals, Counting, Tally, look, make_trainer, reference
from faults.injections import injected

from events.checkpoint.lineage import AttemptNote
from events.checkpoint.manifest import CheckpointName
from events.checkpoint.store import CheckpointStore
from events.errors import CheckpointDamaged
from events.messages import CheckpointRejected, CheckpointSaved, RunResumed

DAMAGES = {"flip": 50, "cut": 20, "lose": 10}
"""The number of each in one injection."""
NEWEST, BEFORE = CheckpointName(12, 2), CheckpointName(10, 2)
NOTES = ["attempt-1.json", "attempt-2.json"]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two attempts with three checkpoints each."""
    run_dir = tmp_path_factory.mktemp("intact") / "run"
    for epochs in (1, 2):
        make_trainer(run_dir, keep_last=9, callbacks=[Tally()], resume="auto", epochs=epochs).train()
    return run_dir


@pytest.fixture
def run_dir(intact: Path, tmp_path: Path) -> Iterator[Path]:
    return Path(shutil.copytree(intact, tmp_path / "run"))


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damaged(how: str, data: bytes, chance: random.Random) -> list[bytes | None]:
    """Other contents of a file; None: it is missing."""
    if how == "flip":
        return [flipped(data, chance.randrange(8 * len(data)))]
    if how == "cut":
        length = chance.choice([0, len(data) - 1, *(chance.randrange(len(data)) for _ in range(4))])
        return [data[:length], data + chance.randbytes(chance.choice([1, 4096]))]
    return [None]


@injected("injection", range(20), 1)
@pytest.mark.parametrize("how", DAMAGES)
def test_damage_to_any_file_is_reported_and_the_checkpoint_before_is_used(
    how: str, injection: int, run_dir: Path
) -> None:
    """Any file of a checkpoint, and any note of an attempt, whose content the manifests repeat."""
    chance, folder = random.Random(injection), run_dir / "checkpoints"
    files = [*sorted((folder / str(NEWEST)).iterdir()), *(folder / name for name in NOTES)]
    assert len(files) == 7
    for number in range(injection * DAMAGES[how], (injection + 1) * DAMAGES[how]):
        path = files[number % len(files)]
        before = path.read_bytes()
        for data in damaged(how, before, chance):
            if data is None:
                path.unlink()
            else:
                path.write_bytes(data)
            assert look(run_dir) == ((NEWEST, [path.name]) if path.name in NOTES else (BEFORE, [str(NEWEST)])), path
        path.write_bytes(before)
    assert look(run_dir) == (NEWEST, [])


def flip(path: Path, at: int = -20) -> None:
    data = path.read_bytes()
    path.write_bytes(flipped(data, 8 * (at % len(data))))


FILES = ["tensors.safetensors", "state.msgpack", "callback-0.msgpack", "manifest.json"]


@pytest.mark.parametrize("file", [*(f"{NEWEST}/{file}" for file in FILES), "attempt-2.json"])
def test_a_run_reports_the_damage_and_then_resumes_exactly(file: str, run_dir: Path) -> None:
    flip(run_dir / "checkpoints" / file, 12 if file == "attempt-2.json" else -20)
    arrivals, module = Arrivals(), Counting()
    options = {"callbacks": [Tally()], "resume": "auto", "epochs": 3, "keep_last": 9}
    assert make_trainer(run_dir, module=module, sinks=[arrivals], **options).train().status == "finished"
    [rejected] = arrivals.of(CheckpointRejected)
    [resumed] = arrivals.of(RunResumed)
    source = NEWEST if file == "attempt-2.json" else BEFORE
    assert (rejected.checkpoint, resumed.checkpoint) == (file.partition("/")[0], str(source))
    assert file.rpartition("/")[2] in rejected.error
    assert arrivals.events.index(rejected) < arrivals.events.index(resumed)
    assert module.digest() == reference[18]
    saved = [event.checkpoint for event in arrivals.of(CheckpointSaved)]
    assert saved == [f"step-{step}.a3" for step in range(source.step + 2, 19, 2)]
    assert look(run_dir).name == CheckpointName(18, 3)


def test_a_damaged_note_of_a_detour_leads_to_no_other_checkpoint(run_dir: Path) -> None:
    """The third attempt resumed from an early checkpoint: no flipped bit of its note names another one."""
    CheckpointStore(run_dir / "checkpoints").prepare(AttemptNote(3, "step-4.a1"))
    assert look(run_dir) == (CheckpointName(4, 1), [])
    path = run_dir / "checkpoints" / "attempt-3.json"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 7):
        path.write_bytes(flipped(whole, bit))
        assert look(run_dir) == (NEWEST, ["attempt-3.json"])


def test_damaged_checkpoints_are_rejected_one_by_one_down_to_the_oldest(run_dir: Path) -> None:
    names = CheckpointStore(run_dir / "checkpoints").line()
    assert len(names) == 6
    for count, (name, file) in enumerate(zip(names, [*FILES, "readings.msgpack"], strict=False), 1):
        flip(run_dir / "checkpoints" / str(name) / file)
        assert look(run_dir) == (names[count], [str(name) for name in names[:count]])


def test_a_run_without_an_undamaged_checkpoint_is_refused_and_not_changed(run_dir: Path) -> None:
    for path in (run_dir / "checkpoints").glob("*/state.msgpack"):
        flip(path)

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*.*") if path.is_file()}

    before = contents()
    with pytest.raises(CheckpointDamaged, match=r"none of the 6 checkpoints in .* is whole; nothing was changed"):
        make_trainer(run_dir, callbacks=[Tally()], resume="auto", epochs=3).train()
    assert before == contents()
