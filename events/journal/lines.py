"""The lines of a journal: events as JSON, each with a checksum. Pure functions.

A line is the JSON object of an event (`events.wire`) with one or two additional members at its end::

    {"type":"TrainStepEnded",...,"loss":0.5,"previous_seq":41,"crc32":"0badcafe"}

``crc32`` is the CRC-32 (zlib's) of the line without this member. ``previous_seq`` is the ``seq`` of the line before. A
line has it only if the two are not consecutive, because the journal does not keep every event. So a reader can tell a
lost line from an event that was never kept. Lines of versions without checksums have neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from events.errors import WireError
from events.messages import Event, JournalGap
from events.wire import decode_json, encode_json_lines

CHECKSUM = "crc32"
PREVIOUS_SEQ = "previous_seq"
"""Members that only lines of a journal have. No event may have a field of these names."""

MAX_ADDED_BYTES = 64
"""Maximum bytes per line that these members take."""

MAX_DECODED_BYTES = 32 * 2**20
"""Maximum bytes of memory that a decoded line may take, as `decoded_bytes` estimates it: some 200,000 metrics in one
event. The writer records a `JournalGap` in place of a larger event; readers skip and report such a line."""

MAX_GROWTH = 48
"""Maximum bytes of memory per byte of a line: what empty lists and maps in each other take."""

ALWAYS_FITS_BYTES = MAX_DECODED_BYTES // MAX_GROWTH
"""A line of this length takes at most `MAX_DECODED_BYTES`, whatever is in it."""

_SHORT_BYTES = 1_024
_SIZES = ((b",", 40), (b":", 40), (b'"', 32), (b"[", 96), (b"{", 200))
"""Bytes of memory per character of JSON: an entry, a key in a table, half of a text, a list, a map."""

_MARK = b',"crc32":"'
_PREVIOUS = b',"previous_seq":'
_LENGTH = len(_MARK) + 10


def encode_lines(events: Sequence[Event], previous_seq: int) -> bytes:
    """Encode events as lines, each ended by a newline. The journal's hot path: about 1.7 us an event.

    Args:
        previous_seq: ``seq`` of the line before the first of them.

    Raises:
        WireError: As `events.wire.encode_json_lines`.
    """
    block = encode_json_lines(events)
    lines = block.split(b"\n")
    lines.pop()
    if block.count(b"}\n") != len(lines):
        lines = [line.rstrip() for line in lines]  # of an unknown event, as its writer formed it
    if events[-1].seq != previous_seq + len(lines):
        for index, event in enumerate(events):
            if event.seq > previous_seq + 1:
                lines[index] = b"%b%b%d}" % (lines[index][:-1], _PREVIOUS, previous_seq)
            previous_seq = event.seq
    return b"".join([b'%b,"crc32":"%08x"}\n' % (line[:-1], crc32(line)) for line in lines])


def decode_line(line: bytes) -> tuple[Event, int | None]:
    """Decode a line: its event, and the ``seq`` of the line before, None for a line without a checksum.

    Raises:
        WireError: The line is not an event, or not the one that was written; or an event of its size could fill the
            memory, which is found before it is decoded.
    """
    body = _checked(line)
    if len(line) > ALWAYS_FITS_BYTES:
        check_size(line)
    if body is None:
        return decode_json(line), None
    at = body.rfind(_PREVIOUS, -MAX_ADDED_BYTES)
    if at >= 0 and (digits := body[at + len(_PREVIOUS) : -1]).isdigit():
        return decode_json(body[:at] + b"}"), int(digits)
    event = decode_json(body)
    return event, event.seq - 1


def decoded_bytes(line: bytes) -> int:
    """Estimate the bytes of memory that a line takes when it is decoded, from above, without decoding it.

    Characters within texts count as those between them. A short line counts as if it were the worst.
    """
    most = MAX_GROWTH * len(line)
    if len(line) <= _SHORT_BYTES:
        return most
    is_wide = not line.isascii() or b"\\u" in line  # then a text may take four bytes per character
    return min(most, (4 if is_wide else 1) * len(line) + sum(line.count(mark) * size for mark, size in _SIZES))


def check_size(line: bytes) -> None:
    """Refuse a line that takes more than `MAX_DECODED_BYTES` of memory when it is decoded. Raises `WireError`."""
    if (size := decoded_bytes(line)) > MAX_DECODED_BYTES:
        raise WireError(f"it may take {size:,} bytes of memory when decoded, more than {MAX_DECODED_BYTES:,}")


def events_in(line: bytes) -> int:
    """Count the events that a damaged line may have held: several if newlines between them were changed."""
    return max(1, line.count(_MARK))


def event_of(line: object, checked: bool = False) -> Event | None:
    """Decode a line; None if it is not an event of a run.

    Args:
        line: Bytes, or whatever a segment returns for a line that is too long.
        checked: Whether the lines of its segment have checksums.
    """
    try:
        event, previous = decode_line(line) if isinstance(line, bytes) else (None, None)
    except WireError:
        return None
    if event is None or not event.run_id or event.seq < 1 or (checked and previous is None):
        return None
    return event


def mended(rest: bytes) -> bytes:
    """Remove the last byte of an unfinished line if that was a damaged newline, which the checksum proves."""
    return rest[:-1] if is_checked(rest[:-1]) else rest


def is_checked(line: bytes) -> bool:
    """Whether a line has a checksum that matches."""
    try:
        return _checked(line) is not None
    except WireError:
        return False


def _checked(line: bytes) -> bytes | None:
    """Remove the checksum of a line; None if it has none. Raises `WireError` if it does not match."""
    if line[-_LENGTH:-10] != _MARK:
        return None
    body = line[:-_LENGTH] + b"}"
    if line[-10:] != b'%08x"}' % crc32(body):
        raise WireError("its checksum does not match, so the line was changed")
    return body


def gap_before(following: Event, own_seq: int, first: int, last: int, lost: int, reason: str) -> JournalGap:
    """Make a gap before, or in place of, an event whose header it takes."""
    return JournalGap(
        run_id=following.run_id,
        attempt=following.attempt,
        seq=own_seq,
        time=following.time,
        rank=following.rank,
        global_step=following.global_step,
        epoch=following.epoch,
        stage=following.stage,
        first_seq=first,
        last_seq=last,
        lost=lost,
        reason=reason,
    )
