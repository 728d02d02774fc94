"""Checks untrusted msgpack before it is decoded: for maps that take long to build, and for its size in memory.

`msgspec` decodes array keys to tuples, and tuples of one hash are easily constructed: a map of a hundred thousand takes
minutes. stagecast never writes such a map. An empty list has one byte, and about 60 once decoded.
"""

from __future__ import annotations

import re
import struct
from array import array

from events.hash_tables import FEW_KEYS, check_hashes

_MAX_DEPTH = 10_000
ROOM_BYTES = 512 * 2**20
"""Maximum bytes of memory per decoded data beyond `GROWTH` times its length: some three million small tuples, or
twenty million integers."""
GROWTH = 4
"""Bytes of memory per byte of texts and of 64-bit numbers."""
ALWAYS_FITS_BYTES = ROOM_BYTES // 160
"""Maximum bytes of data that fit `ROOM_BYTES` with any content."""
_SLOT, _NUMBER, _TEXT, _EXTENSION, _ARRAY, _MAP, _TABLE, _ENTRY = 8, 32, 72, 96, 96, 64, 160, 96
"""Bytes of memory per list item, number outside of Python's cache, text, and so on."""
_KEPT = bytes([*range(128), 0xC0, 0xC2, 0xC3])
"""First bytes of values that take no memory of their own."""
_MOST_RUN = 2**20
# Bytes after the first one, by the first one; of these, texts and extensions have a length that is read.
_FIXED = {
    0xC0: 0,
    0xC2: 0,
    0xC3: 0,
    0xCA: 4,
    0xCB: 8,
    0xCC: 1,
    0xCD: 2,
    0xCE: 4,
    0xCF: 8,
    0xD0: 1,
    0xD1: 2,
    0xD2: 4,
    0xD3: 8,
}
_FIXED |= dict.fromkeys([*range(128), *range(224, 256)], 0)
_FIXED |= {0xA0 + length: length for length in range(32)}
_FIXED |= {0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}
_SIZED = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0)}
_SIZED |= {0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1)}
_ARRAYS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}
# Numbers of one width side by side, which make up most of a long array.
_RUNS: dict[int, tuple[re.Pattern[bytes], int]] = {}
for _bytes, _width in ((b"\xcb\xcf\xd3", 9), (b"\xca\xce\xd2", 5), (b"\xcd\xd1", 3), (b"\xcc\xd0", 2)):
    _run = re.compile(rb"(?:[%b].{%d})+" % (re.escape(_bytes), _width - 1), re.DOTALL)
    _RUNS |= dict.fromkeys(_bytes, (_run, _width))
_small = re.compile(rb"[\x00-\x7f\xc0\xc2\xc3\xe0-\xff]+")
_RUNS |= dict.fromkeys([*range(128), 192, 194, 195, *range(224, 256)], (_small, 1))
_NUMBERS = dict.fromkeys([*range(128), *range(224, 256)], ">b")
"""The forms of numbers, by their first byte; those of one byte are that byte."""
_NUMBERS |= {0xCA + index: f">{form}" for index, form in enumerate("fdBHIQbhiq")}


def check_keys(data: bytes | memoryview, room_bytes: int = ROOM_BYTES) -> None:
    """Check that no map takes long to build, and that the data fits the memory; in linear time and little memory.

    Truncated or malformed data may pass: decoding it fails within the same memory.

    Args:
        room_bytes: Maximum bytes of memory that the decoded data may take beyond `GROWTH` times its length.

    Raises:
        ValueError: A key is an array, the hashes of many keys were chosen to collide, arrays and maps are more than
            10,000 levels deep, one of them is longer than the data, or the decoded data may take more memory.
    """
    tables: list[array[int] | None] = [None]  # hashes of the numbers that are keys, of each map that is open
    _check(data, room_bytes, tables)
    for table in tables:  # of truncated data: the decoder builds the partial maps
        _check_table(table)


def _check_table(table: array[int] | None) -> None:
    if table is not None:
        check_hashes(table)


def _hash_of(first: int, data: bytes | memoryview, at: int) -> int | None:
    """Return the hash of a number, by its first byte; None if it is truncated, or NaN, which has no fixed hash."""
    try:
        number = struct.unpack_from(_NUMBERS[first], data, at if 0xCA <= first < 0xE0 else at - 1)[0]
    except struct.error:
        return None
    return hash(number) if number == number else None


def _check(data: bytes | memoryview, room_bytes: int, tables: list[array[int] | None]) -> None:
    at, size = 0, len(data)
    room = room_bytes + GROWTH * size
    left, in_map = 1, False  # remaining items of the current container: twice the entries of a map
    outer: list[tuple[int, bool]] = []
    while at < size:
        if not left:
            if not outer:
                return
            left, in_map = outer.pop()
            _check_table(tables.pop())
            continue
        _check_room(room, room_bytes, size)
        first = data[at]
        if not in_map and left > 1 and first in _RUNS:
            run, width = _RUNS[first]
            found = run.match(data, at, min(size, at + width * min(left, _MOST_RUN)))
            if found is None:
                return
            count = (found.end() - at) // width
            own = count if width > 1 else len(found[0].translate(None, _KEPT))
            room -= own * _NUMBER
            at, left = found.end(), left - count
            continue
        left -= 1
        at += 1
        if in_map and left % 2 and (table := tables[-1]) is not None and first in _NUMBERS:
            hashed = _hash_of(first, data, at)
            if hashed is not None:
                table.append(hashed)
        if first in _FIXED:
            length = _FIXED[first]
            at += length
            if 0xA0 <= first < 0xC0:
                room -= _TEXT + GROWTH * length
            else:
                room -= _EXTENSION if 0xD4 <= first < 0xD9 else _NUMBER
        elif first in _SIZED:
            width, more = _SIZED[first]
            length = int.from_bytes(data[at : at + width], "big")
            at += width + more + length
            room -= (_EXTENSION if more else _TEXT) + GROWTH * length
        else:
            is_map = first in _MAPS or 0x80 <= first < 0x90
            if not is_map and in_map and left % 2:
                raise ValueError(f"a map has an array as a key (byte {at - 1:,})")
            if len(outer) >= _MAX_DEPTH:
                raise ValueError(f"arrays and maps are more than {_MAX_DEPTH:,} levels deep")
            outer.append((left, in_map))
            width = (_MAPS if is_map else _ARRAYS).get(first, 0)
            count = int.from_bytes(data[at : at + width], "big") if width else first & 0x0F
            at += width
            left, in_map = count * (1 + is_map), is_map
            tables.append(array("q") if is_map and count > FEW_KEYS else None)
            if left > size - at:  # the decoder would only fail at the end of the data
                raise ValueError(f"it was cut: a list or map has {left:,} values, and {size - at:,} bytes follow")
            # The decoder allocates a list of this length before it reads the items.
            room -= _MAP + (_TABLE if count else 0) + _ENTRY * max(0, count - 5) if is_map else _ARRAY + _SLOT * count
    _check_room(room, room_bytes, size)


def _check_room(room: int, room_bytes: int, size: int) -> None:
    if room < 0:
        raise ValueError(f"its {size:,} bytes may take more than {room_bytes + GROWTH * size:,} bytes of memory")
