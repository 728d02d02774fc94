"""What does not fit into memory waits in a temporary file, in order."""

from __future__ import annotations

import struct
import tempfile
from collections import deque
from collections.abc import Callable
from typing import IO

from events.backlog import Item, item_of
from events.messages import Event
from events.wire import decode_msgpack, encode_msgpack
from events.worker import Job, Worker

_LENGTH = struct.Struct("<I")


class Spill:
    """A first-in, first-out file of events, written and read on a worker's thread.

    The file has no name, so it is gone with the process; it is emptied whenever everything in it has been read. Used
    from the event loop's thread; only the private functions that do the I/O run on the worker's.
    """

    def __init__(self, worker: Worker, limit_bytes: int, memory_limit_bytes: int, directory: str | None) -> None:
        self._worker = worker
        self._limit_bytes = limit_bytes
        self._memory_limit_bytes = memory_limit_bytes
        self._directory = directory
        self.count = 0
        """Events in the file or on their way to it."""
        self.memory_bytes = 0
        """Bytes of the events on their way to the file."""
        self._closed = False
        self._reading: Job | None = None
        # The worker's own state:
        self._file: IO[bytes] | None = None
        self._lengths: deque[int] = deque()
        self._read_at = 0
        self._write_at = 0

    def write(self, items: list[Item], on_written: Callable[[int, int], None]) -> None:
        """Append events; ``on_written(written, lost)`` is called later, in the event loop. Never waits.

        Events are lost when the file has reached its limit, when the disk refuses them, or when it is so slow that the
        events on their way to it fill the memory limit.
        """
        nbytes = sum(item[2] for item in items)
        if self._closed or self.memory_bytes + nbytes > self._memory_limit_bytes:
            on_written(0, len(items))
            return
        self.count += len(items)
        self.memory_bytes += nbytes

        def report(written: int) -> None:
            self.memory_bytes -= nbytes
            self.count -= len(items) - written
            on_written(written, len(items) - written)

        self._worker.submit(self._append, [item[0] for item in items], report)

    async def read(self, limit: int) -> list[Item]:
        """Take the oldest events back, at most ``limit``; may return none if the disk had refused them."""
        if self._reading is None:
            self._reading = self._worker.submit(self._pop, limit)
        await self._reading.finished.wait()  # a cancelled read is taken up by the next one: its events are not lost
        job, self._reading = self._reading, None
        if job.error is not None:
            raise job.error
        events: list[Event] = job.value
        self.count -= len(events)
        return [item_of((event, None)) for event in events]

    def close(self) -> None:
        """Drop what is left and let the file go, after the I/O that is under way."""
        if not self._closed:
            self._closed = True
            self.count = 0
            self._worker.submit(self._close_file)
            self._worker.stop()

    # ---------------------------------------------------------------------------------- on the worker's thread

    def _append(self, events: list[Event], report: Callable[[int], None]) -> None:
        encoded = [encode_msgpack(event) for event in events]
        size = sum(len(data) + _LENGTH.size for data in encoded)
        written = 0
        if self._write_at - self._read_at + size <= self._limit_bytes:
            try:
                if self._file is None:
                    self._file = tempfile.TemporaryFile(  # noqa: SIM115 - it lives as long as the spill
                        prefix="stagecast-spill-", dir=self._directory
                    )
                self._file.seek(self._write_at)
                self._file.write(b"".join(_LENGTH.pack(len(data)) + data for data in encoded))
                self._file.flush()
            except OSError:
                pass  # the chunk is lost and counted; `_write_at` has not moved, so the next one overwrites its remains
            else:
                self._write_at += size
                self._lengths.extend(len(data) for data in encoded)
                written = len(events)
        self._worker.post(lambda: report(written))

    def _pop(self, limit: int) -> list[Event]:
        take = [self._lengths.popleft() for _ in range(min(limit, len(self._lengths)))]
        if self._file is None or not take:
            return []
        self._file.seek(self._read_at)
        data = self._file.read(sum(take) + len(take) * _LENGTH.size)
        self._read_at += len(data)
        events, at = [], 0
        for length in take:
            at += _LENGTH.size
            events.append(decode_msgpack(data[at : at + length]))
            at += length
        if not self._lengths:
            self._file.truncate(0)
            self._read_at = self._write_at = 0
        return events

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
