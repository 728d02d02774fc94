"""The observer's target that the writers of checkpoints on all ranks have in common."""

from __future__ import annotations

from collections.abc import Sequence

from events.bus.backlog import Published
from events.checkpoint import disk, packing
from events.checkpoint.manifest import FileEntry
from events.checkpoint.snapshot import Part, Snapshot
from events.checkpoint.tensor_file import lay_out
from events.messages import CheckpointStaged, RunEnded


class SnapshotTarget:
    """Receives the staged snapshots of a run: a supervised observer (`events.bus.target.Target`).

    All but the constructor and `abandon` runs on its own thread.
    """

    payloads = True
    blocking = True

    def __init__(self) -> None:
        self._done = 0
        self._abandoned = False

    @property
    def progress(self) -> tuple[str, int | None]:
        return "write", self._done

    def open(self) -> None:
        """Do nothing: the folder was prepared before the run started."""

    def deliver(self, batch: Sequence[Published], /) -> None:
        """Write each checkpoint of a batch. Waits for the disk.

        Raises:
            CheckpointsFailing: Too many in a row could not be made durable.
        """
        self._done = 0
        for event, payload in batch:
            if self._abandoned:
                return
            if isinstance(event, CheckpointStaged) and payload is not None:
                self._save(event, payload.outputs)
            elif isinstance(event, RunEnded):
                self._end(event)
            self._done += 1

    def abandon(self) -> None:
        """Start no further checkpoint."""
        self._abandoned = True

    def close(self) -> None:
        """Do nothing."""

    def _save(self, event: CheckpointStaged, snapshot: Snapshot) -> None:
        """Write a snapshot, and release it."""
        raise NotImplementedError

    def _end(self, event: RunEnded) -> None:
        """Do nothing more at the end of the run."""


def write_part(folder: disk.Folder, name: str, part: Part, files: dict[str, FileEntry]) -> None:
    """Write the files of a part, and add them to ``files``. Raises `OSError`."""
    packing.check_readable(part.state, f"{name}.msgpack")
    files[f"{name}.msgpack"] = disk.write_parts(folder, f"{name}.msgpack", [part.state])
    if part.tensors:
        layout = lay_out([info for info, _ in part.tensors], part.aliases)
        in_order = sorted(zip(layout.offsets, (data for _, data in part.tensors), strict=True), key=lambda one: one[0])
        parts: list[bytes | memoryview] = [layout.header, *(data for _, data in in_order)]
        files[f"{name}.safetensors"] = disk.write_parts(folder, f"{name}.safetensors", parts)
