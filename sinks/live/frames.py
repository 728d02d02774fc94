"""Messages to those who watch, each encoded once for everybody."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import msgspec

_encoder = msgspec.json.Encoder(enc_hook=str)


class Message(msgspec.Struct, frozen=True, dict=True):
    """A snapshot, or a frame: what happened between two places of a run's history. As it travels to everybody."""

    kind: str
    number: int
    """Of a frame, counted within a hub; of a snapshot: that of the newest frame in it."""
    generation: int
    attempt: int
    after: int
    """``seq`` behind which it begins..."""
    cursor: int
    """...and up to which it goes."""
    data: bytes

    @cached_property
    def text(self) -> str:
        """For WebSocket."""
        return self.data.decode()

    @cached_property
    def event(self) -> bytes:
        """For Server-Sent Events."""
        return b"id: %d-%d\nevent: %s\ndata: %s\n\n" % (self.attempt, self.cursor, self.kind.encode(), self.data)


def encode(message: dict[str, Any]) -> bytes:
    """As JSON, whatever is in it."""
    try:
        return _encoder.encode(message)
    except (
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
    ):  # strangers' text: half a character, say
        return _encoder.encode(_careful(message, 0))


def _careful(value: Any, depth: int) -> Any:
    """Plain values, whatever was there."""
    if depth > 50:
        return "..."
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, dict):
        return {_careful(str(key), depth): _careful(part, depth + 1) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_careful(part, depth + 1) for part in value]
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    if isinstance(value, int):
        return math.inf if value > 0 else -math.inf  # written as null: no chart shows it
    return str(value).encode("utf-8", "replace").decode()
