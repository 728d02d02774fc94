"""Bounds the time in which a dict or a set of a stranger's keys is built.

Python's hashes of numbers can be predicted. An attacker can choose keys for which the search for a free place visits
all occupied places: a megabyte of them takes minutes, and as long again whenever the table is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import eq

FEW_KEYS = 1_000
"""Keys that a table may have whatever their hashes are: at most half a million steps."""
_STEPS_PER_KEY, _STEPS_IN_SET = 32, 256
"""Maximum steps per key, on average: two where hashes are spread, up to 16 and 100 where only high bits differ."""
SAME_HASH = 100
"""Maximum keys per hash: they are compared with each other, and long tuples take long to compare."""
_LINEAR_STEPS = 9  # of CPython's sets, before they jump
_MASK = 2**64 - 1


def check_hashes(hashes: Sequence[int], *, of_set: bool = False) -> None:
    """Check that a table of keys with these hashes, added in this order, is built in linear time.

    It follows CPython's search for a free place in tables of each size through which the table would grow, and of the
    next one.

    Raises:
        ValueError: More than 100 of them are equal, or it takes far more steps than keys that were not chosen for that.
    """
    count, size = len(hashes), 2_048
    ordered = sorted(hashes)
    if any(map(eq, ordered, ordered[SAME_HASH:])):
        raise ValueError(_said(hashes))
    if count <= FEW_KEYS:
        return
    walk = _steps_in_set if of_set else _steps_in_dict
    differ = not any(map(eq, ordered, ordered[1:]))
    while True:
        part = hashes[: size * 2 // 3]  # a table grows when it is filled to two thirds, a set to three fifths
        if not differ or max(part) - min(part) >= size:  # otherwise each has a place of its own
            walk(part, size)
        if size > 3 * count:
            return
        size *= 2


def _steps_in_dict(hashes: Sequence[int], size: int) -> None:
    taken, mask, steps, most = bytearray(size), size - 1, 0, _STEPS_PER_KEY * len(hashes)
    for hashed in hashes:
        at = hashed & mask
        if taken[at]:
            hashed &= _MASK
            while taken[at]:
                hashed >>= 5
                at = (5 * at + hashed + 1) & mask
                steps += 1
            if steps > most:
                raise ValueError(_said(hashes))
        taken[at] = 1


def _steps_in_set(hashes: Sequence[int], size: int) -> None:
    taken, mask, steps, most = bytearray(size), size - 1, 0, _STEPS_IN_SET * len(hashes)
    for hashed in hashes:
        at = hashed & mask
        if taken[at]:
            hashed &= _MASK
            while True:
                end = at + _LINEAR_STEPS if at + _LINEAR_STEPS <= mask else at
                free = taken.find(0, at, end + 1)
                if free >= 0:
                    steps += free - at
                    at = free
                    break
                hashed >>= 5
                steps += end + 1 - at
                at = (5 * at + hashed + 1) & mask
            if steps > most:
                raise ValueError(_said(hashes))
        taken[at] = 1


def _said(hashes: Sequence[int]) -> str:
    return f"a table of its {len(hashes):,} keys takes quadratic time, by their hashes; use keys that are text"
