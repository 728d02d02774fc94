"""The wire form of events and commands: JSON for people and journals, msgpack for processes.

JSON has no NaN and no infinities, yet a diverged loss is what people most need to see. Such a number is
written as null and named beside the others, by its JSON pointer (RFC 6901)::

    {"type":"MetricsLogged",...,"metrics":{"a/b":null},"nonfinite":{"/metrics/a~1b":"nan"}}

so any JSON reader still reads the line, and ours restores the number. A null that ``nonfinite`` does not name
is a None.

Consumers meet newer producers: unknown fields are ignored, and an event of an unknown type decodes to an
`UnknownEvent` that keeps its bytes and encodes to them again.

Text may hold lone surrogates (a file name that is not UTF-8 ends in an error message); neither encoding can.
They are written as their escapes, ``\\udc80``, and stay that on the other side: the event matters more than
that character.

Decoded data may be hostile. Integers beyond 64 bits, a time that is not finite and values that are nested too deeply
are refused (`events.bounds`), so that whatever was decoded can be encoded again.

All functions are pure, may be called from any thread and raise nothing but `WireError`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import msgspec

from events.bounds import INT_MAX, LAST_ATTEMPT, MAX_DEPTH, check_plain
from events.errors import WireError
from events.messages import EVENT_TYPES, Event, RunStarted, StageName, UnknownEvent
from events.protocol import AnyCommand

Encoding = Literal["json", "msgpack"]

NONFINITE = "nonfinite"
"""The member that names the numbers which JSON cannot hold. No event may have a field of this name."""

_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_NONFINITE_KEY = f'"{NONFINITE}"'.encode()
_KNOWN = frozenset(event_type.__name__ for event_type in EVENT_TYPES)
_AnyEvent: type[Event] = functools.reduce(operator.or_, EVENT_TYPES)  # their union, for `msgspec`

# What msgspec raises for content that it refuses. Its own errors and UnicodeError are ValueErrors.
_REFUSED = (ValueError, TypeError, OverflowError, RecursionError)

_json = msgspec.json.Encoder()
_msgpack = msgspec.msgpack.Encoder()
_from_json: msgspec.json.Decoder[Event] = msgspec.json.Decoder(_AnyEvent)
_from_msgpack: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(_AnyEvent)
_command_from_json: msgspec.json.Decoder[AnyCommand] = msgspec.json.Decoder(AnyCommand)


# ------------------------------------------------------------------------------------------------- events


def encode_json(event: Event) -> bytes:
    """Encode an event as one JSON object on one line; an `UnknownEvent` as the bytes it came as.

    Raises:
        WireError: The event holds what JSON cannot: an object that is no plain value, endless nesting.
    """
    if type(event) is UnknownEvent:
        return _raw_as(event, "json")
    try:
        data = _json.encode(event)
    except UnicodeEncodeError:
        return _encode_json_carefully(event)  # a lone surrogate
    except _REFUSED as error:
        raise _unencodable(event, error) from error
    # Only None, NaN and infinities give a null. The header's stage is nearly always the one that is there.
    if b"null" not in data or data.count(b"null") == (1 if event.stage is None else 0):
        return data
    return _encode_json_carefully(event)


def encode_json_lines(events: Sequence[Event]) -> bytes:
    """Encode events as JSON lines, each ended by a newline. The journal's hot path: about 0.6 us an event.

    Raises:
        WireError: As `encode_json`; nothing says how many of the others could have been encoded.
    """
    try:
        block = _json.encode_lines(events)
    except _REFUSED:
        pass  # one of them: the loop below names it
    else:
        if b"null" not in block and b'"UnknownEvent"' not in block:
            return block
    return b"".join([_one_line(encode_json(event)) for event in events])


def decode_json(data: bytes) -> Event:
    """Decode one event.

    Raises:
        WireError: The bytes are no event of any version; the message says what and where.
    """
    if _NONFINITE_KEY not in data:
        try:
            return _checked(_from_json.decode(data))
        except _REFUSED:
            pass  # an unknown type, or an error that deserves a better message
    return _decode_carefully(data, "json")


def encode_msgpack(event: Event) -> bytes:
    """Encode an event as one msgpack map; an `UnknownEvent` as the bytes it came as.

    Raises:
        WireError: As `encode_json`, and for integers beyond 64 bits.
    """
    if type(event) is UnknownEvent:
        return _raw_as(event, "msgpack")
    try:
        return encode_escaped(event, _msgpack.encode)
    except _REFUSED as error:
        raise _unencodable(event, error) from error


def decode_msgpack(data: bytes) -> Event:
    """Decode one event.

    Raises:
        WireError: The bytes are no event of any version; the message says what and where.
    """
    try:
        return _checked(_from_msgpack.decode(data))
    except _REFUSED:
        return _decode_carefully(data, "msgpack")


# ----------------------------------------------------------------------------------------------- commands


def encode_command(command: AnyCommand) -> bytes:
    """Encode a command as one JSON object on one line. Raises `WireError` for a field that is not of its type."""
    try:
        return encode_escaped(command, _json.encode)
    except _REFUSED as error:
        raise WireError(
            f"the command {type(command).__name__} cannot be encoded: {error}; give it plain text"
        ) from error


def decode_command(data: bytes) -> AnyCommand:
    """Decode a command. Unknown fields are ignored; an unknown command raises `WireError`."""
    try:
        return _command_from_json.decode(data)
    except _REFUSED as error:
        raise WireError(
            f"not a command: {error}, in {_excerpt(data)}; send an object whose member 'command' is "
            "'stop', 'pause', 'resume' or 'checkpoint' and whose 'id' is a string"
        ) from error


# ------------------------------------------------------------------------------------- the careful way out


def _encode_json_carefully(event: Event) -> bytes:
    """Encode by way of plain values, to find non-finite numbers and lone surrogates. Ten times slower."""
    try:
        return _encode_tree(event)
    except _REFUSED as error:
        raise _unencodable(event, error) from error


def _encode_tree(value: object) -> bytes:
    tree = msgspec.to_builtins(value, str_keys=True)
    found: dict[str, str] = {}
    _find_nonfinite(tree, "", found)
    return encode_escaped(tree | {NONFINITE: found} if found else tree, _json.encode)


def _find_nonfinite(value: object, pointer: str, found: dict[str, str]) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            found[pointer] = "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    elif isinstance(value, dict):
        for key, item in value.items():
            escaped = key.replace("~", "~0").replace("/", "~1")
            _find_nonfinite(item, f"{pointer}/{escaped}", found)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _find_nonfinite(item, f"{pointer}/{index}", found)


def encode_escaped(value: object, encode: Callable[[object], bytes]) -> bytes:
    """Encode a Struct or plain values, lone surrogates as their escapes. Raises what ``encode`` raises otherwise."""
    try:
        return encode(value)
    except UnicodeEncodeError:
        return encode(without_surrogates(msgspec.to_builtins(value, builtin_types=(bytes,), str_keys=True)))


def without_surrogates(value: object) -> object:
    """Copy plain values with lone surrogates as their escapes, which every encoding can hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_surrogates(item) for item in value]
    return value


def _one_line(data: bytes) -> bytes:
    """End it with a newline. The bytes of an unknown event may hold one inside: they are then reflowed."""
    if b"\n" in data:
        try:
            data = msgspec.json.format(data, indent=-1)
        except _REFUSED as error:
            raise WireError(f"an UnknownEvent holds no JSON: {error}, in {_excerpt(data)}; drop it") from error
    return data + b"\n"


def _raw_as(event: UnknownEvent, encoding: Encoding) -> bytes:
    if event.encoding == encoding:
        return event.raw
    try:
        tree = _read_tree(event.raw, event.encoding)
        return _msgpack.encode(tree) if encoding == "msgpack" else _encode_tree(tree)
    except _REFUSED as error:
        raise WireError(
            f"{event.unknown_type} event: its {event.encoding} cannot be written as {encoding}: {error}; "
            f"keep it as {event.encoding}"
        ) from error


def _unencodable(event: Event, error: Exception) -> WireError:
    return WireError(
        f"{type(event).__name__} event (run {event.run_id!r}, seq {event.seq}) cannot be encoded: {error}; "
        "events hold plain host values only: str, int, float, bool, None, and lists and dicts of them"
    )


# -------------------------------------------------------------------------------------- the careful way in


def _decode_carefully(data: bytes, encoding: Encoding) -> Event:
    """Decode by way of plain values: restores numbers, keeps unknown types, explains what is wrong."""
    try:
        tree = _read_tree(data, encoding)
    except _REFUSED as error:
        raise WireError(f"not an event: {error}, in {_excerpt(data)}; it was cut, damaged, or never was one") from error
    name = tree.get("type")
    if not isinstance(name, str):
        found = "missing" if name is None else repr(name)[:60]
        raise WireError(
            f"not an event: the member 'type' at `$.type` is {found}, in {_excerpt(data)}; "
            "every event names its type there"
        )
    if name not in _KNOWN:
        return _unknown(name, tree, data, encoding)
    try:
        return _checked(msgspec.convert(tree, _AnyEvent))
    except _REFUSED as error:
        raise WireError(
            f"{name} event: {error}, in {_excerpt(data)}; compare what wrote it with events/schema.json"
        ) from error


def _checked(event: Event) -> Event:
    """Bound the values of no given type; all others have bounds in their types. Raises ValueError."""
    if type(event) is RunStarted:
        check_plain(event.arguments, "$.arguments")
        check_plain(event.config, "$.config")
    return event


def _read_tree(data: bytes, encoding: Encoding) -> dict[str, object]:
    """The plain values of an encoded object, non-finite numbers restored. Raises one of ``_REFUSED``."""
    tree = msgspec.json.decode(data) if encoding == "json" else msgspec.msgpack.decode(data)
    if not isinstance(tree, dict):
        raise ValueError(f"expected an object, got {type(tree).__name__}")
    if encoding == "json" and NONFINITE in tree:
        _restore_nonfinite(tree)
    return tree


def _restore_nonfinite(tree: dict[str, object]) -> None:
    found = tree.pop(NONFINITE)
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, got {type(found).__name__} - at `$.{NONFINITE}`")
    for pointer, word in found.items():
        if not isinstance(word, str) or word not in _NUMBERS:
            where = f"`$.{NONFINITE}[{pointer!r}]`"
            raise ValueError(f"expected 'nan', 'inf' or '-inf', got {repr(word)[:60]} - at {where}")
        _set_if_null(tree, pointer, _NUMBERS[word])


def _set_if_null(tree: object, pointer: str, number: float) -> None:
    """Put a number where the pointer leads, if a null is there; elsewhere there is nothing to restore."""
    if pointer.count("/") > MAX_DEPTH + 2:  # deeper than any event
        return
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]] or [""]
    for part in parents:
        tree = _member(tree, part)
    if _member(tree, last, missing=number) is None:
        if isinstance(tree, list):
            tree[int(last)] = number
        elif isinstance(tree, dict):
            tree[last] = number


def _member(tree: object, part: str, missing: object = None) -> object:
    if isinstance(tree, list):
        # Bounded before it is read: Python refuses to convert thousands of digits.
        is_index = part.isascii() and part.isdecimal() and len(part) < 19 and int(part) < len(tree)
        return tree[int(part)] if is_index else missing
    return tree.get(part, missing) if isinstance(tree, dict) else missing


def _unknown(name: str, tree: dict[str, object], data: bytes, encoding: Encoding) -> UnknownEvent:
    def whole(key: str, most: int = INT_MAX) -> int:
        value = tree.get(key)
        return value if isinstance(value, int) and type(value) is not bool and 0 <= value <= most else 0

    run_id, time = tree.get("run_id"), tree.get("time")
    stages: tuple[StageName, ...] = get_args(StageName)
    if not isinstance(time, int | float) or not 0 <= time <= 2**33:
        time = 0.0
    return UnknownEvent(
        run_id=run_id if isinstance(run_id, str) else "",
        attempt=whole("attempt", LAST_ATTEMPT),
        seq=whole("seq"),
        time=float(time),
        rank=whole("rank"),
        global_step=whole("global_step"),
        epoch=whole("epoch"),
        stage=next((stage for stage in stages if stage == tree.get("stage")), None),
        unknown_type=name,
        raw=bytes(data),
        encoding=encoding,
    )


def _excerpt(data: bytes) -> str:
    return f"{bytes(data[:80])!r}{f' ... ({len(data)} bytes)' if len(data) > 80 else ''}"
