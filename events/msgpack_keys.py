"""Looks through msgpack of a stranger for maps whose keys are arrays.

`msgspec` makes tuples of them, and tuples of one hash are easily made: a map of a hundred thousand takes minutes.
stagecast never writes such a map.
"""

from __future__ import annotations

import re

_MAX_DEPTH = 10_000
_CONTAINERS = 1_000_000
"""Maximum arrays and maps in a document, or one for 8 bytes: an empty one has one byte, and some 60 when decoded."""
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


def check_keys(data: bytes | memoryview) -> None:
    """See that no key of a map is an array, before the data is decoded. Takes linear time and little memory.

    Data that is cut or malformed passes: decoding it fails.

    Raises:
        ValueError: A key is an array, arrays and maps are more than 10,000 levels deep, or there are too many for
            the size of the data.
    """
    at, size, containers = 0, len(data), 0
    most = max(_CONTAINERS, size // 8)
    left, in_map = 1, False  # what the container at hand still holds: twice the entries of a map
    outer: list[tuple[int, bool]] = []
    while at < size:
        if not left:
            if not outer:
                return
            left, in_map = outer.pop()
            continue
        first = data[at]
        if not in_map and left > 1 and first in _RUNS:
            run, width = _RUNS[first]
            found = run.match(data, at, min(size, at + width * left))
            if found is None:
                return
            at, left = found.end(), left - (found.end() - at) // width
            continue
        left -= 1
        at += 1
        if first in _FIXED:
            at += _FIXED[first]
        elif first in _SIZED:
            width, more = _SIZED[first]
            at += width + more + int.from_bytes(data[at : at + width], "big")
        else:
            is_map = first in _MAPS or 0x80 <= first < 0x90
            if not is_map and in_map and left % 2:
                raise ValueError(f"a map has an array as a key (byte {at - 1:,})")
            containers += 1
            if containers > most:
                raise ValueError(f"more than {most:,} arrays and maps in {size:,} bytes")
            if len(outer) >= _MAX_DEPTH:
                raise ValueError(f"arrays and maps are more than {_MAX_DEPTH:,} levels deep")
            outer.append((left, in_map))
            width = (_MAPS if is_map else _ARRAYS).get(first, 0)
            count = int.from_bytes(data[at : at + width], "big") if width else first & 0x0F
            at += width
            left, in_map = count * (1 + is_map), is_map
