"""TensorBoard's event files, encoded without protocol buffers: records, scalars, and marks.

A mark is the position in a run's history up to which a file has events, because these have times and steps, but no
positions. It follows each batch as a log message, which TensorBoard ignores. All marks have the same length, so the
last one is found from the end of a file, although records can only be read from its beginning.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
import struct
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

from events.messages import Event
from sinks.files.appended import AppendedFile, Position, open_file

EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d{1,12})\.", re.ASCII)
"""The start of an event file's name; its number is the time of its creation."""

_CHUNK = 2**20
_TEXT = re.compile(rb"stagecast [0-9a-f]{16} (\d{10}) (\d{20}) (\d{15})")


def event_records(records: Iterable[bytes]) -> bytes:
    """Frame records: each between its length and its checksum."""
    return b"".join([part for one in records for part in (_record_head(len(one)), one, _checksum(one))])


@functools.lru_cache(maxsize=8_192)
def _record_head(length: int) -> bytes:
    encoded = struct.pack("<Q", length)
    return encoded + _checksum(encoded)


def _checksum(data: bytes) -> bytes:
    """The masked CRC-32C."""
    from google_crc32c import value  # a client, imported when the sink is opened

    crc = value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


_pack_double = struct.Struct("<d").pack
_pack_float = struct.Struct("<f").pack


def encode_scalars(event: Event, metrics: list[tuple[str, float]]) -> bytes:
    """Encode one `Event` message with all metrics of an event, three times as fast as protocol buffers.

    Its fields are ``wall_time`` (1), ``step`` (2) and ``summary`` (5), which has one ``value`` (1) for each metric.
    """
    values = b"".join([_value_head(name) + _as_float(number) for name, number in metrics])
    time_and_step = b"\x09%b\x10%b" % (_pack_double(event.time), _varint(event.global_step))
    return b"%b\x2a%b%b" % (time_and_step, _varint(len(values)), values)


@functools.lru_cache(maxsize=8_192)
def _value_head(name: str) -> bytes:
    """Encode a ``value`` up to its number: its length, its ``tag`` (1), and the key of ``simple_value`` (2)."""
    tag = name.encode("utf-8", "backslashreplace")
    field = b"\x0a%b%b\x15" % (_varint(len(tag)), tag)
    return b"\x0a%b%b" % (_varint(len(field) + 4), field)


def _as_float(number: float) -> bytes:
    try:
        return _pack_float(number)
    except OverflowError:  # too large for single precision
        return _pack_float(math.copysign(math.inf, number))


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


class Mark(NamedTuple):
    """The position of a run's last event in a file."""

    position: Position = (0, 0)
    milliseconds: int = 0
    """Unix time of the latest event, rounded up: a later event whose position is not greater belongs to another run of
    the same name."""

    def reached(self, position: Position, time: float) -> Mark:
        """Advance to a position; ``time``: the Unix time of the latest event up to it."""
        return Mark(position, max(self.milliseconds, math.ceil(time * 1_000)))

    def is_before(self, time: float) -> bool:
        """Whether all events happened before a Unix time."""
        return self.milliseconds < time * 1_000


def mark_record(run_id: str, mark: Mark) -> bytes:
    """Encode a mark as a record."""
    text = b"stagecast %b %010d %020d %015d" % (_digest(run_id), *mark.position, mark.milliseconds)
    # An `Event` with a `log_message` (6), whose fields are `level` (1), 20 for INFO, and `message` (2).
    message = b"\x08\x14\x12%c%b" % (len(text), text)
    return event_records([b"\x32%c%b" % (len(message), message)])


def continue_in(folder: str, run_id: str, run_dir: str | None) -> Mark:
    """Find the last mark of a run in a folder, and prepare its file to be continued.

    A partial batch after the mark is cut away, because it is delivered again. Nearly always reads only the end of the
    newest file; files without a mark of the run are read completely.

    Args:
        run_dir: The run folder; no link below it is followed.

    Raises:
        OSError: A file cannot be read, or is still being written to.
    """
    names = [(int(found[1]), name) for name in os.listdir(folder) if (found := EVENT_FILE.match(name))]
    for _, name in sorted(names, reverse=True):
        path = os.path.join(folder, name)
        with open(open_file(path, run_dir), "rb") as reader:
            if _last_mark(reader, run_id) is None:
                continue
        file = AppendedFile(path, run_dir)
        try:
            with file.reader() as reader:  # again, because its writer may have closed it just before the lock
                mark, end = _last_mark(reader, run_id) or (Mark(), file.size)
            if file.size > end:
                file.cut(end)
        finally:
            file.close()
        return mark
    return Mark()


def _last_mark(file: BinaryIO, run_id: str) -> tuple[Mark, int] | None:
    """The last mark of a run in a file, and its end in bytes; None without a mark."""
    example = mark_record(run_id, Mark())
    begin = example[: example.index(_digest(run_id)) + 16]
    start = file.seek(0, os.SEEK_END)
    data = b""
    while start:
        length = min(start, _CHUNK)
        start -= length
        file.seek(start)
        data = file.read(length) + data[: len(example) - 1]  # a mark may cross chunks
        at = len(data)
        while (at := data.rfind(begin, 0, at)) >= 0:
            record = data[at : at + len(example)]
            if (found := _TEXT.search(record)) is not None:
                mark = Mark((int(found[1]), int(found[2])), int(found[3]))
                if record == mark_record(run_id, mark):  # including its checksum
                    return mark, start + at + len(record)
    return None


def _digest(run_id: str) -> bytes:
    return hashlib.sha256(run_id.encode("utf-8", "backslashreplace")).hexdigest()[:16].encode()
