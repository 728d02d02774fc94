"""A sink that keeps the events as lines of JSON: for ``jq``, for pandas, for whatever reads the run later."""

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

# Lossless, because a gap would only be noticed when somebody reads the file. A full disk stays full for minutes: writes
# are repeated for about seven. Half a second makes thousands of events one write.
_DELIVERY = Delivery(overflow="catch_up", latency_s=0.5, batch=8_192, timeout_s=30.0, retries=20)


class JSONL(Strict, frozen=True):
    """Appends each event to a file, as one line of JSON in the form of `events.wire`::

        Trainer(module, arguments, sinks=[JSONL()]).train()
        $ jq 'select(.type == "ValEpochEnded") | [.global_step, .loss]' runs/RUN/events.jsonl

    An attempt that continues the run continues the file. No event is in it twice, and none in part: what a process that
    was killed has left of a line is cut away. Steps that a later attempt has done again are there once for each
    attempt: `RunResumed` tells where that one began. One run at a time writes to a file; several, one after the other,
    may. One that begins anew under the same name is added, with a warning.
    """

    path: str | None = None
    """The file; None: ``events.jsonl`` in the run's folder."""
    types: list[str] | None = None
    """Names of the events to keep, for example ``["TrainEpochEnded", "MetricsLogged"]``. None: all that the journal
    keeps."""

    def __post_init__(self) -> None:
        check_path(self.path, "JSONL(path")
        if self.types is None:
            return
        if not isinstance(self.types, list | tuple):
            raise ValueError(f"JSONL(types={self.types!r:.200}): give a list of names of events, or None for all")
        for name in self.types:
            if name not in _TYPES:
                near = difflib.get_close_matches(str(name), _TYPES, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else "see events/messages.py for those that there are"
                raise ValueError(f"JSONL(types=[{name!r:.80}]): there is no such event; {hint}")

    @property
    def delivery(self) -> Delivery:
        """Only the events that are kept."""
        if self.types is None:
            return _DELIVERY
        return msgspec.structs.replace(_DELIVERY, types=frozenset(_TYPES[name] for name in self.types))

    def open(self, run: RunInfo) -> JSONLWriter:
        """Open the file, and see where to go on in it.

        Raises:
            SinkMisconfigured: There is no path, and the run keeps no folder.
            OSError: The file cannot be opened, or another run has it open.
        """
        path = path_in(run, self.path, "events.jsonl", "JSONL")
        return JSONLWriter(AppendedFile(path, run.run_dir), run.run_id, self.delivery.types)


class JSONLWriter:
    """An open `JSONL`. Waits for the disk only."""

    def __init__(self, file: AppendedFile, run_id: str, types: frozenset[type[Event]] | None) -> None:
        self._file = file
        self._types = types
        try:
            end = find_end(file, lambda lines: _rows(lines, run_id))
            _check_rest(file, end.size)
            file.cut(end.size)
        except BaseException:  # goes on as itself, without the open file
            file.close()
            raise
        self._end: End | None = end  # until it is known whether the run goes on from there
        self._last = end.last

    def write(self, events: Sequence[Event]) -> None:
        """Append those that are not in the file yet. Raises `OSError` when the disk refuses; nothing is added then."""
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
        """Have everything on the disk, and let go of the file."""
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
            # Raising would have it delivered, and refused, until the sink is given up.
            logger.warning(f"JSONL leaves an event out: {error}")
    return b"".join(lines)


def _check_rest(file: AppendedFile, size: int) -> None:
    """See that what is to be cut away is the beginning of an event's line, and not somebody's last one."""
    with file.reader() as reader:
        reader.seek(size)
        found = reader.read(80)
    # A machine that went down may have left zeros.
    if found[: len(_BEGIN)].rstrip(b"\0") != _BEGIN[: len(found.rstrip(b"\0"))]:
        raise SinkMisconfigured(
            f"JSONL cannot continue {file.path}, whose last line is {found!r}: that is not an event, and has no end;"
            f" move the file away, or name another path"
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
            return  # cut off
        end += len(line)
        try:
            found = _identity.decode(line)
        except (ValueError, RecursionError):
            yield None, end  # somebody else's line
        else:
            yield (((found.attempt, found.seq), found.time) if found.run_id == run_id else None), end
