"""Bounds of numbers and texts that a stranger may have written: in a journal, a manifest, a command, a stored view.

JSON has integers of any length, which neither msgpack nor a browser takes, and whose text Python refuses to write. The
types here have `msgspec` refuse them while it decodes; `check_plain` does so in values of no given type.
"""

from __future__ import annotations

import sys
from typing import Annotated, Literal, TypeVar

from msgspec import Meta

INT_MIN, INT_MAX = -(2**63), 2**63 - 1
MAX_DEPTH = 100
"""Maximum levels of lists and objects in each other, in values of no given type."""

Int64 = Annotated[int, Meta(ge=INT_MIN, le=INT_MAX)]
"""An integer within 64 bits."""
Count = Annotated[int, Meta(ge=0, le=INT_MAX)]
"""Such an integer that is not negative."""
LAST_ATTEMPT = 10**9 - 1
"""Attempts are numbered up to here: a greater number stands in a file that was damaged, or made up."""
AttemptNumber = Annotated[int, Meta(ge=0, le=LAST_ATTEMPT)]
"""The number of an attempt; 0 where none is known."""
Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""A number that is neither NaN nor infinite."""
NonFinite = Literal["nan", "inf", "-inf"]
"""A number that is not, for JSON."""
UnixTime = Annotated[float, Meta(ge=0, le=2**33)]
"""Unix seconds, up to the year 2242: in nanoseconds they are within 64 bits."""

MAX_NAME_CHARS = 300
"""Maximum characters per name that a view of a run keeps; a longer one is not shown."""
MAX_LINE_CHARS = 4_000
"""Maximum characters per line, error or path that it keeps."""
MAX_TEXT_CHARS = 64 * 1_024
"""Maximum characters per text that it keeps; the rest is cut."""
MAX_ENTRIES = 2_000
"""Maximum entries per list or mapping that it keeps."""
_Value = TypeVar("_Value")
BoundName = Annotated[str, Meta(max_length=3 * MAX_NAME_CHARS)]
"""The name of a metric and that of its dataloader."""
BoundText = Annotated[str, Meta(max_length=MAX_TEXT_CHARS)]
BoundList = Annotated[list[_Value], Meta(max_length=MAX_ENTRIES)]
BoundDict = Annotated[dict[str, _Value], Meta(max_length=MAX_ENTRIES)]


def check_plain(value: object, where: str = "$") -> None:
    """Check that values of JSON can be encoded again, in any form.

    Args:
        value: Lists and dicts of plain values.
        where: What the value is, for the message.

    Raises:
        ValueError: An integer has more than 64 bits, or lists and objects are more than `MAX_DEPTH` levels deep.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, int) and not INT_MIN <= one <= 2 * INT_MAX + 1:
                raise ValueError(f"an integer has {one.bit_length()} bits, more than 64 - at `{where}`")
        if not inner:
            return
        level = inner
    raise ValueError(f"lists and objects are more than {MAX_DEPTH} levels deep - at `{where}`")
