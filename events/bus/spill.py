"""What does not fit into memory waits in a temporary file, in order."""

from __future__ import annotations

import contextlib
import errno
import struct
import tempfile
from collections.abc import Callable
from typing import IO

from events.bus.backlog import Item, item_of
from events.bus.worker import Job, Worker
from events.errors import WireError
from events.messages import Event
from events.wire import decode_msgpack, encode_msgpack

_LENGTH = struct.Struct("<I")
_READ_BYTES = 2**18


class Spill:
    """A first-in, first-out file of events, written and read on a worker's thread.

    The file has no name, so it is gone with the process. It is a ring of ``limit_bytes``, and emptied whenever
    everything in it has been read. It holds events only: payloads are let go, but for those with a fence, which stay in
    memory (the loop waits for each, so they are few).

    Used from the event loop's thread; only the private functions that do the I/O run on the worker's.
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
        self._fenced: dict[int, Item] = {}  # by `seq`
        self._used = False
        self._closed = False
        self._reading: Job | None = None
        # The worker's own state:
        self._file: IO[bytes] | None = None
        self._stored = 0  # events in the file
        self._read_at = 0  # both rise for ever; their place in the file is the remainder by its limit
        self._write_at = 0

    def write(self, items: list[Item], on_done: Callable[[int, list[Item]], None]) -> None:
        """Append events; ``on_done(written, lost)`` is called in the event loop, at once or later. Never waits.

        Events are lost when the file has reached its limit, when the disk refuses them, or when it is so slow that the
        events on their way to it fill the memory limit (twice that for those that are not droppable).
        """
        taken: list[Item] = []
        lost: list[Item] = []
        nbytes = 0
        for item in map(_without_tensors, items):
            limit = self._memory_limit_bytes * (1 if item[0].droppable else 2)
            if self._closed or self.memory_bytes + nbytes + item[2] > limit:
                lost.append(item)
                continue
            taken.append(item)
            nbytes += item[2]
            if item[1] is not None:
                self._fenced[item[0].seq] = item
        if lost:
            on_done(0, lost)
        if not taken:
            return
        self._used = True
        self.count += len(taken)
        self.memory_bytes += nbytes

        def report(refused: list[int]) -> None:
            self.memory_bytes -= nbytes
            if not self._closed:  # whoever closed it has counted them all
                self.count -= len(refused)
                gone = [taken[index] for index in refused]
                for event, _, _ in gone:
                    self._fenced.pop(event.seq, None)
                on_done(len(taken) - len(gone), gone)

        self._worker.submit(self._append, [item[0] for item in taken], report)

    async def read(self, limit: int, limit_bytes: int) -> tuple[list[Item], int]:
        """Take the oldest events back, up to a number and about as many bytes of memory. Not after `close`.

        Returns:
            The events (none, if the disk has refused them in the meantime), and how many others were lost because it
            does not give them back.
        """
        if self._reading is None:
            self._reading = self._worker.submit(self._pop, limit, limit_bytes)
        await self._reading.finished.wait()  # a cancelled read is taken up by the next one: its events are not lost
        job, self._reading = self._reading, None
        if self._closed:
            return [], 0  # whoever closed it has counted them as dropped
        if job.error is not None:
            raise job.error
        items: list[Item]
        items, lost = job.value
        self.count -= len(items) + lost
        return [self._fenced.pop(item[0].seq, item) for item in items], lost

    def fenced(self) -> list[Item]:
        """The events here that the loop may be waiting for."""
        return list(self._fenced.values())

    def close(self) -> list[Item]:
        """Drop what is left and let the file go, after the I/O that is under way; returns what `fenced` did."""
        fenced = self.fenced()
        if not self._closed:
            self._closed = True
            self.count = 0
            self._fenced = {}
            if self._used:
                self._worker.submit(self._close_file)
                self._worker.stop()
        return fenced

    # ---------------------------------------------------------------------------------- on the worker's thread

    def _append(self, events: list[Event], report: Callable[[list[int]], None]) -> None:
        refused = list(range(len(events)))
        try:
            records: list[bytes] = []
            too_many: list[int] = []
            room = self._limit_bytes - (self._write_at - self._read_at)
            for index, event in enumerate(events):
                record = _record(event)
                if record is None or len(record) > room:
                    too_many.append(index)
                else:
                    records.append(record)
                    room -= len(record)
            self._write(b"".join(records))
            self._stored += len(records)
            refused = too_many
        except OSError:
            pass  # the chunk is lost and counted; `_write_at` has not moved, so the next one overwrites its remains
        finally:
            self._worker.post(lambda: report(refused))

    def _write(self, block: bytes) -> None:
        if self._file is None:
            # Unbuffered: a buffer would keep what the disk has refused, and write it later in the wrong place.
            self._file = tempfile.TemporaryFile(  # noqa: SIM115 - closed by `_close_file`
                buffering=0, prefix="stagecast-spill-", dir=self._directory
            )
        view = memoryview(block)
        at = self._write_at
        while view:
            place = at % self._limit_bytes
            self._file.seek(place)
            written = self._file.write(view[: self._limit_bytes - place])
            if not written:
                raise OSError(errno.EIO, "the file takes no bytes")
            view = view[written:]
            at += written
        self._write_at = at

    def _pop(self, limit: int, limit_bytes: int) -> tuple[list[Item], int]:
        items: list[Item] = []
        nbytes = 0
        lost = 0
        try:
            data = self._read(min(_READ_BYTES, 512 * limit))
            at = 0
            while self._stored and len(items) < limit and nbytes < limit_bytes:
                body = at + _LENGTH.size
                end = body + int.from_bytes(data[at:body], "little")
                if len(data) < max(body, end):
                    if items:
                        break  # the next call begins with this one
                    data = self._read(max(end, _READ_BYTES))  # one event that is larger than what was read
                    if len(data) < end:
                        raise OSError(errno.EIO, "the file is shorter than what was written to it")
                    continue
                items.append(item_of((decode_msgpack(data[body:end]), None)))
                nbytes += items[-1][2]
                self._stored -= 1
                self._read_at += end - at
                at = end
        except (OSError, WireError):
            # Where the next event begins is not known any more: the file is given up.
            lost, self._stored = self._stored, 0
        if not self._stored:
            self._read_at = self._write_at = 0
            if self._file is not None:
                with contextlib.suppress(OSError):  # then it keeps its size, which is within the limit
                    self._file.truncate(0)
        return items, lost

    def _read(self, size: int) -> bytes:
        """At most ``size`` bytes from `_read_at` on."""
        blocks: list[bytes] = []
        at, end = self._read_at, min(self._read_at + size, self._write_at)
        while at < end:
            assert self._file is not None
            place = at % self._limit_bytes
            self._file.seek(place)
            block = self._file.read(min(end - at, self._limit_bytes - place))
            if not block:
                raise OSError(errno.EIO, "the file is shorter than what was written to it")
            blocks.append(block)
            at += len(block)
        return b"".join(blocks)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()


def _without_tensors(item: Item) -> Item:
    event, payload, nbytes = item
    if payload is None or payload.fence is not None:
        return item
    return event, None, nbytes - payload.nbytes


def _record(event: Event) -> bytes | None:
    """An event as it stands in the file; None for one that cannot be encoded."""
    try:
        data = encode_msgpack(event)
    except WireError:
        return None
    return _LENGTH.pack(len(data)) + data
