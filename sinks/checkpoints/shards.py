"""The writers of all ranks write one checkpoint together, each on its own thread: no loop waits, nor a collective."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from events.checkpoint import disk, packing
from events.checkpoint.manifest import FileEntry
from events.checkpoint.shards import (
    SHARDS_NAME,
    Begun,
    Left,
    RankNote,
    RankPart,
    Shards,
    Written,
    decode_note,
    decode_shards,
    encode_note,
    encode_shards,
    note_name,
    outputs_name,
    state_name,
    tensors_name,
)
from events.checkpoint.snapshot import Snapshot
from events.checkpoint.store import CheckpointStore
from events.errors import CheckpointError
from events.messages import CheckpointStaged
from events.tracebacks import describe
from sinks.checkpoints.snapshots import SnapshotTarget, write_part

_POLL_S = 0.02
"""Seconds between two looks at the messages of the other ranks."""


class RankBusy(Exception):  # not an error: the checkpoint is skipped
    """A rank takes no part in a checkpoint, because its copies in memory are still being written."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} is busy")
        self.rank = rank


def gather(folder: disk.Folder, part: RankPart, timeout_s: float, is_over: Callable[[], bool]) -> dict[str, FileEntry]:
    """Wait until all other ranks have written their files to a folder, and write the table of all parts.

    Args:
        part: Of rank 0.
        timeout_s: Maximum seconds to wait.
        is_over: Whether the writer is abandoned.

    Returns:
        The files of the other ranks, and the table.

    Raises:
        RankBusy: A rank has skipped the checkpoint.
        CheckpointError: A rank has failed, or not answered in time; names it.
        OSError: The disk failed.
    """
    answers = _answers(part, timeout_s, is_over)
    for rank, answer in answers.items():
        if isinstance(answer, Left) and answer.error:
            raise CheckpointError(f"rank {rank} could not write its part: {answer.error}")
    for rank, answer in answers.items():
        if isinstance(answer, Left):
            raise RankBusy(rank)
    files: dict[str, FileEntry] = {}
    chunks, aliases = list(part.chunks), dict(part.aliases)
    for rank, answer in answers.items():
        assert isinstance(answer, Written)
        note = _read_note(folder, rank, answer.note)
        files |= note.files
        chunks += note.chunks
        aliases |= note.aliases
    stored = {one.name for one in chunks}
    aliases = {alias: name for alias, name in aliases.items() if alias not in stored}
    table = encode_shards(Shards(part.world_size, chunks, aliases))
    decode_shards(table, SHARDS_NAME)  # parts that do not belong together must not become a checkpoint
    files[SHARDS_NAME] = disk.write_parts(folder, SHARDS_NAME, [table])
    return files


def _answers(part: RankPart, timeout_s: float, is_over: Callable[[], bool]) -> dict[int, Written | Left]:
    """Return the answers of all other ranks: one that still writes would write to an abandoned folder."""
    answers: dict[int, Written | Left] = {}
    deadline_s = time.monotonic() + timeout_s
    while missing := [rank for rank in range(1, part.world_size) if rank not in answers]:
        for rank in missing:
            if isinstance(answer := part.mailbox.look(rank), Written | Left):
                answers[rank] = answer
        if len(answers) == part.world_size - 1:
            break
        if is_over() or time.monotonic() > deadline_s:
            late = [rank for rank in missing if rank not in answers]
            raise CheckpointError(
                f"rank {', '.join(map(str, late[:8]))} has not written its part within {timeout_s:g} s (end_timeout_s)"
            )
        time.sleep(_POLL_S)
    return answers


def _read_note(folder: disk.Folder, rank: int, entry: FileEntry) -> RankNote:
    """Read the note of a rank, compare it with the files, and remove it."""
    name = note_name(rank)
    data = folder.read(name, entry.nbytes + 1)
    if disk.entry_of(data) != entry:
        raise CheckpointError(f"rank {rank} has written another note than {name}; do all ranks share one file system?")
    note = decode_note(data, str(folder.path / name))
    required = {tensors_name(rank), state_name(rank)}
    allowed = required | {f"{outputs_name(rank)}{suffix}" for suffix in (".msgpack", ".safetensors")}
    if note.rank != rank or not required <= note.files.keys() <= allowed:
        raise CheckpointError(f"{folder.path / name} is not the note of rank {rank}")
    for file, listed in note.files.items():
        if (nbytes := folder.stat(file).st_size) != listed.nbytes:
            raise CheckpointError(
                f"rank {rank} has written {listed.nbytes:,} bytes of {file}, of which {nbytes:,} are here"
            )
    folder.remove(name)
    return note


class RankWriter(SnapshotTarget):
    """Writes the parts of a rank other than 0. Rank 0 reports its failures, which end no run by themselves.

    Args:
        folder: Of rank 0's checkpoints, on a file system that both see.
        timeout_s: Maximum seconds to wait for rank 0.
    """

    def __init__(self, folder: Path, timeout_s: float) -> None:
        super().__init__()
        self._store = CheckpointStore(folder)
        self._timeout_s = timeout_s

    def _save(self, event: CheckpointStaged, snapshot: Snapshot) -> None:
        part = snapshot.rank
        assert part is not None
        try:
            try:
                if (folder := self._folder(part)) is None:
                    return
                with self._store.join(folder) as opened:
                    answer: Written | Left = Written(_write(opened, snapshot, part))
                snapshot.durable = True
            finally:
                snapshot.release()
        except Exception as error:  # a border: rank 0 reports it, and the run continues
            snapshot.failed = True
            answer = Left(describe(error))
        with contextlib.suppress(RuntimeError):  # the ranks cannot reach each other: the run ends
            part.mailbox.send(answer)

    def _folder(self, part: RankPart) -> str | None:
        """Wait for rank 0 to name its folder; None if it takes no checkpoint there."""
        deadline_s = time.monotonic() + self._timeout_s
        while not self._abandoned and time.monotonic() < deadline_s:
            message = part.mailbox.look(0)
            if isinstance(message, Begun):
                return message.folder
            if message is not None:
                return None
            time.sleep(_POLL_S)
        return None


def _write(folder: disk.Folder, snapshot: Snapshot, part: RankPart) -> FileEntry:
    """Write the files of a rank, and its note; returns the note's entry."""
    tensors, state = tensors_name(part.rank), state_name(part.rank)
    snapshot.wait()
    files = {tensors: disk.write_image(folder, tensors, snapshot.image, snapshot.nbytes)}
    snapshot.release()
    packing.check_readable(snapshot.state, state)
    files[state] = disk.write_parts(folder, state, [snapshot.state])
    for name, late in snapshot.parts.items():
        if (own := late.get(0.0)) is not None:
            write_part(folder, name, own, files)
    note = encode_note(RankNote(part.rank, files, part.chunks, part.aliases))
    written = disk.write_parts(folder, note_name(part.rank), [note])
    folder.sync()
    return written
