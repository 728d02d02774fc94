"""A sink that writes events as lines of JSON, for ``jq``, pandas and other readers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import msgspec

from events.errors import SinkMisconfigured, WireError
from events.log import logger
from events.messages import EVENT_TYPES, Event
from events.sink import Delivery, RunInfo
from events.strict import Strict
from events.wire import encode_json, encode_json_lines
from sinks.files.appended import (
    AppendedFile,
    End,
    Rows,
    check_path,
    find_end,
    newer,
    path_in,
    position_of,
    warn_of_another,
)

_BEGIN = b'{"type":"'
_TYPES = {event_type.__name__: event_type for event_type in EVENT_TYPES}

# Lossless, because a gap would only be noticed much later. Writes are retried for about seven minutes, because a full
# disk stays full for minutes. A latency of half a second makes thousands of events one write.
_DELIVERY = Delivery(overflow="catch_up", latency_s=0.5, batch=8_192, timeout_s=30.0, retries=20)


class JSONL(Strict, frozen=True):
    """Appends each event to a file, as one line of JSON in the format of `events.wire`::

        Trainer(module, arguments, sinks=[JSONL()]).train()
        $ jq 'select(.type == "ValEpochEnded") | [.global_step, .loss]' runs/RUN/events.jsonl

    A resumed run continues the file. Each event is written once and completely: a line that a killed process has torn
    is removed. Superseded steps stay in the file; `RunResumed` marks the start of the later attempt. Several runs may
    write to one file, one after the other; a second run of the same name is appended with a warning.
    """

    path: str | None = None
    """The file; None: ``events.jsonl`` in the run folder."""
    types: list[str] | None = None
    """Names of the events to write, for example ``["TrainEpochEnded", "MetricsLogged"]``. None: all types in the
    journal."""

    def __post_init__(self) -> None:
        check_path(self.path, "JSONL(path")
        if self.types is None:
            return
        if not isinstance(self.types, list | tuple):
            raise ValueError(f"JSONL(types={self.types!r:.200}): give a list of names of events, or None for all")
        for name in self.types:
            if name not in _TYPES:
                near = difflib.get_close_matches(str(name), _TYPES, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else "events/messages.py lists them"
                raise ValueError(f"JSONL(types=[{name!r:.80}]): there is no such event; {hint}")

    @property
    def delivery(self) -> Delivery:
        """The delivery of the selected types."""
        if self.types is None:
            return _DELIVERY
        return msgspec.structs.replace(_DELIVERY, types=frozenset(_TYPES[name] for name in self.types))

    def open(self, run: RunInfo) -> JSONLWriter:
        """Open the file, and find the position to continue from.

        Raises:
            SinkMisconfigured: There is no path, and the run has no folder.
            OSError: The file cannot be opened, or another run has it open.
        """
        path = path_in(run, self.path, "events.jsonl", "JSONL")
        return JSONLWriter(AppendedFile(path, run.run_dir), run.run_id, self.delivery.types)


class JSONLWriter:
    """An open `JSONL`. Only waits for the disk."""

    def __init__(self, file: AppendedFile, run_id: str, types: frozenset[type[Event]] | None) -> None:
        self._file = file
        self._types = types
        try:
            end = find_end(file, lambda lines: _rows(lines, run_id))
            _check_rest(file, end.size)
            file.cut(end.size)
        except BaseException:  # close the file first
            file.close()
            raise
        self._end: End | None = end  # until the first event shows whether the run continues the file
        self._last = end.last

    def write(self, events: Sequence[Event]) -> None:
        """Append the events that are not in the file yet. Raises `OSError` if the disk fails; nothing is added then."""
        if self._end is not None and events:
            if self._end.is_of_another(events[0]):
                warn_of_another("JSONL", self._file.path, events[0].run_id)
                self._last = (0, 0)
            self._end = None
        events = newer(events, self._last)
        if not events:
            return
        kept = events if self._types is None else [event for event in events if type(event) in self._types]
        if kept:
            self._file.append(_encode(kept))
        self._last = position_of(events[-1])

    def close(self) -> None:
        """Flush to the disk and close the file."""
        self._file.close()


def _encode(events: Sequence[Event]) -> bytes:
    try:
        return encode_json_lines(events)
    except WireError:
        pass
    lines = []
    for event in events:
        try:
            lines.append(encode_json(event) + b"\n")
        except WireError as error:
            # An exception would make the supervisor retry the batch until the sink is disabled.
            logger.warning(f"JSONL skips an event: {error}")
    return b"".join(lines)


def _check_rest(file: AppendedFile, size: int) -> None:
    """Check that the torn rest of the file is the start of an event, not a line of another program."""
    with file.reader() as reader:
        reader.seek(size)
        found = reader.read(80)
    # A crash of the machine may have left zeros.
    if found[: len(_BEGIN)].rstrip(b"\0") != _BEGIN[: len(found.rstrip(b"\0"))]:
        raise SinkMisconfigured(
            f"JSONL cannot continue {file.path}, whose last line, {found!r}, is incomplete and not an event; move the"
            f" file away, or name another path"
        )


class _Identity(msgspec.Struct):
    run_id: str
    attempt: int
    seq: int
    time: float


_identity = msgspec.json.Decoder(_Identity)


def _rows(lines: Iterable[bytes], run_id: str) -> Rows:
    end = 0
    for line in lines:
        if not line.endswith(b"\n"):
            return  # torn
        end += len(line)
        try:
            found = _identity.decode(line)
        except (ValueError, RecursionError):
            yield None, end  # a line of another program
        else:
            yield (((found.attempt, found.seq), found.time) if found.run_id == run_id else None), end
