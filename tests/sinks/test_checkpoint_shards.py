"""Rank 0 brings the parts of all ranks together, or names the rank without which there is no checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from events.checkpoint import disk
from events.checkpoint.manifest import FileEntry
from events.checkpoint.shards import (
    SHARDS_NAME,
    Begun,
    Chunk,
    Left,
    RankNote,
    RankPart,
    Written,
    encode_note,
    note_name,
    state_name,
    tensors_name,
)
from events.errors import CheckpointDamaged, CheckpointError
from sinks.checkpoints.shards import RankBusy, gather

Message = Begun | Written | Left


class Box:
    """The messages of all ranks, in this process."""

    def __init__(self) -> None:
        self.messages: dict[int, Message] = {}

    def send(self, message: Message) -> None:
        self.messages[0] = message

    def look(self, rank: int) -> Message | None:
        return self.messages.get(rank)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[disk.Folder]:
    with disk.Folder.open(tmp_path) as opened:
        yield opened


def chunk(rank: int, begin: int) -> Chunk:
    return Chunk(rank, "w", (4,), (begin,), (2,), "F32")


def written(folder: disk.Folder, change: Callable[[RankNote], RankNote] = lambda note: note) -> Written:
    """Write the part of rank 1 as it does."""
    files = {name: disk.write_parts(folder, name, [b"content"]) for name in (tensors_name(1), state_name(1))}
    note = encode_note(change(RankNote(1, files, [chunk(1, 2)], {"v": "w"})))
    return Written(disk.write_parts(folder, note_name(1), [note]))


def gathered(folder: disk.Folder, *answers: Message | None, timeout_s: float = 0.0) -> dict[str, FileEntry]:
    box = Box()
    box.messages |= {rank: one for rank, one in enumerate(answers, 1) if one is not None}
    return gather(folder, RankPart(0, len(answers) + 1, [chunk(0, 0)], {"v": "w"}, box), timeout_s, lambda: False)


def test_the_files_of_all_ranks_are_listed_and_their_notes_are_gone(folder: disk.Folder, tmp_path: Path) -> None:
    files = gathered(folder, written(folder))
    assert files.keys() == {tensors_name(1), state_name(1), SHARDS_NAME}
    assert {path.name for path in tmp_path.iterdir()} == files.keys()


def test_a_rank_without_an_answer_is_named(folder: disk.Folder) -> None:
    with pytest.raises(CheckpointError, match=r"rank 2 has not written its part within 0 s \(end_timeout_s\)"):
        gathered(folder, written(folder), None)


def test_a_failure_counts_more_than_a_busy_rank(folder: disk.Folder) -> None:
    with pytest.raises(CheckpointError, match="rank 2 could not write its part: OSError: full"):
        gathered(folder, Left(), Left("OSError: full"))
    with pytest.raises(RankBusy) as busy:
        gathered(folder, Left())
    assert busy.value.rank == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda note: msgspec.structs.replace(note, rank=2), "is not the note of rank 1"),
        (lambda note: msgspec.structs.replace(note, files={}), "is not the note of rank 1"),
        (
            lambda note: msgspec.structs.replace(note, files=note.files | {"state.msgpack": disk.entry_of(b"")}),
            "is not the note of rank 1",
        ),
        (
            lambda note: msgspec.structs.replace(note, files=note.files | {state_name(1): disk.entry_of(b"longer...")}),
            "has written 9 bytes of rank-1.msgpack, of which 7 are here",
        ),
    ],
)
def test_a_note_that_does_not_fit_its_files_is_refused(
    folder: disk.Folder, change: Callable[[RankNote], RankNote], why: str
) -> None:
    with pytest.raises(CheckpointError, match=why):
        gathered(folder, written(folder, change))


def test_a_note_of_another_checkpoint_is_refused(folder: disk.Folder, tmp_path: Path) -> None:
    answer = written(folder)
    (tmp_path / note_name(1)).write_bytes(b"of the checkpoint before")
    with pytest.raises(CheckpointError, match=r"rank 1 has written another note than note-1\.json"):
        gathered(folder, answer)


def test_parts_that_do_not_cover_a_tensor_become_no_checkpoint(folder: disk.Folder) -> None:
    def twice(note: RankNote) -> RankNote:
        return msgspec.structs.replace(note, chunks=[chunk(1, 0)])

    with pytest.raises(CheckpointDamaged, match="overlap, or some are missing"):
        gathered(folder, written(folder, twice))
