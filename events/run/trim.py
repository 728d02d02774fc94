"""Cuts events down to the sizes that a view of a run holds, because one line of a journal may be as large as memory."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import msgspec

from events.bounds import MAX_ENTRIES, MAX_NAME_CHARS, MAX_TEXT_CHARS
from events.journal.lines import decoded_bytes
from events.messages import Event, TrainStepEnded

_MAX_SETTINGS_BYTES = 256 * 1_024
"""Maximum bytes, as JSON, of the arguments, the configuration and the versions, each."""
_MAX_SETTINGS_MEMORY = 4 * 2**20
"""Maximum bytes of memory, estimated, of each of these."""
_SETTINGS = frozenset({"arguments", "config", "versions"})
_NAMES = frozenset({
    "run_id", "module", "device", "host", "git_commit", "checkpoint", "observer", "name", "key", "path", "best",
    "monitor", "command",
})  # fmt: skip


def trimmed(events: Sequence[Event]) -> Sequence[Event]:
    """Return the events without data that is larger than a view shows; nearly always the given ones.

    Call it before the lock of a view is taken: one line of a journal may hold a hundred thousand names.
    """
    if all(type(event) is TrainStepEnded or not _is_large(event) for event in events):
        return events
    return [_cut(event) if type(event) is not TrainStepEnded and _is_large(event) else event for event in events]


def _is_large(event: Event) -> bool:
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if isinstance(value, str):
            if len(value) > MAX_TEXT_CHARS or (len(value) > MAX_NAME_CHARS + 1 and name in _NAMES):
                return True
        elif isinstance(value, (list, dict)) and value:
            if len(value) > MAX_ENTRIES or name in _SETTINGS:
                return True
            if any(isinstance(part, str) and len(part) > MAX_NAME_CHARS for part in value):
                return True
    return False


def _cut(event: Event) -> Event:
    fields: dict[str, object] = {}
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if isinstance(value, str):
            # One character more, so that an identity that was cut is not taken for a whole one; paths are not cut.
            limit = MAX_NAME_CHARS + 1 if name in _NAMES else MAX_TEXT_CHARS
            fields[name] = value[:limit] if name != "path" or len(value) <= limit else ""
        elif name in _SETTINGS and isinstance(value, dict):
            fields[name] = shown_settings(value)
        elif isinstance(value, dict):
            few = list(itertools.islice(value.items(), MAX_ENTRIES))
            fields[name] = {key: part for key, part in few if not (isinstance(key, str) and len(key) > MAX_NAME_CHARS)}
        elif isinstance(value, list) and name == "counts" and len(value) > MAX_ENTRIES:
            fields[name] = []  # a part of a histogram is wrong
        elif isinstance(value, list):
            fields[name] = [part[:MAX_NAME_CHARS] if isinstance(part, str) else part for part in value[:MAX_ENTRIES]]
    return msgspec.structs.replace(event, **fields)


def shown_settings(value: Mapping[str, object]) -> Mapping[str, object]:
    """Return arguments, a configuration or versions; in place of those that are too large, the reason."""
    try:
        data = msgspec.json.encode(value, enc_hook=str)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return {"(not shown)": "it is nested too deep, or is not text"}
    if len(data) > _MAX_SETTINGS_BYTES:
        return {"(not shown)": f"it has {len(data):,} bytes"}
    if (size := decoded_bytes(data)) > _MAX_SETTINGS_MEMORY:
        return {"(not shown)": f"it may take {size:,} bytes of memory"}
    return value
