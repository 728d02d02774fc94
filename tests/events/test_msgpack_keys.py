"""Maps that would take long to build, or much memory, are found wherever they are, and nothing else is."""

from __future__ import annotations

import contextlib
import math
import random
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext

from events.hash_tables import check_hashes
from events.msgpack_keys import GROWTH, check_keys

atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=40),
    st.binary(max_size=40),
    st.sampled_from(["x" * 300, "x" * 70_000, b"x" * 300, b"x" * 70_000]),
    st.builds(lambda code, size: Ext(code, b"x" * size), st.just(5), st.sampled_from([0, 1, 2, 4, 8, 16, 17, 300])),
)
numbers = st.one_of(st.integers(-(2**63), 2**64 - 1), st.integers(-200, 200), st.floats())
keys = st.one_of(st.integers(-(2**63), 2**64 - 1), st.text(max_size=40), st.binary(max_size=3), st.none(), st.floats())


def trees(keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        atoms,
        lambda inner: st.one_of(
            st.lists(inner, max_size=20), st.lists(numbers, max_size=40), st.dictionaries(keys, inner, max_size=20)
        ),
        max_leaves=30,
    )


@settings(deadline=None)
@given(trees(keys), trees(keys), st.integers(0, 3), st.lists(numbers, min_size=1, max_size=20))
def test_an_array_as_a_key_is_found_and_nothing_else(tree: Any, other: Any, depth: int, key: list[Any]) -> None:
    """Behind and between any other values; also with bytes that are not of one object."""
    data = msgspec.msgpack.encode(tree)
    check_keys(data)
    check_keys(memoryview(data))
    bad: Any = {1: tree, tuple(key): other}
    for _ in range(depth):
        bad = [tree, 1, 2.5, {"a": bad, "b": other}]
    with pytest.raises(ValueError, match="a map has an array as a key"):
        check_keys(msgspec.msgpack.encode(bad))


@pytest.mark.fuzz
@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_pass_or_are_refused(data: bytes) -> None:
    """What is cut or malformed is left to the decoder."""
    with contextlib.suppress(ValueError):
        check_keys(data)


def test_deep_nesting_is_refused_with_little_memory() -> None:
    """Before the decoder would exhaust the stack."""
    with pytest.raises(ValueError, match="10,000 levels deep"):
        check_keys(b"\x91" * 1_000_000)


def array(item: bytes, count: int) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big") + item * count


SHAPES = {
    "empty lists": b"\x90",
    "empty maps": b"\x80",
    "lists in lists": b"\x91\x91\x90",
    "deep": b"\x91" * 9 + b"\x90",
    "small maps": b"\x81\0\0",
    "maps": b"\x86" + bytes(range(12)),
    "negative": b"\xf0",
    "small numbers": b"\x92\0\xf0",
    "numbers": b"\xcd\xff\xff",
    "empty texts": b"\xa0",
    "wide texts": b"\xa4\xf0\x9f\x98\x80",
    "bytes": b"\xc4\x02ab",
    "extensions": b"\xc7\0\5",
    "tuples": b"\x93\xc7\0\1\0\0",
    "big keys": b"\x81\xa3abc\x90",
    "mixed": b"\x94\x80\xa1a\xcd\1\2\x90",
}


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_data_that_would_fill_the_memory_is_refused(shape: str) -> None:
    """What passes takes four times its length and the room; what is refused is not decoded."""
    item, room = SHAPES[shape], 2**20
    passed = refused = 0
    for count in (1_000, 5_000, 10_000, 20_000, 50_000, 200_000):
        data = array(item, count)
        try:
            check_keys(data, room)
        except ValueError:
            refused += 1
            continue
        passed += 1
        tracemalloc.start()
        try:
            msgspec.msgpack.decode(data)
            assert tracemalloc.get_traced_memory()[1] <= GROWTH * len(data) + room
        finally:
            tracemalloc.stop()
    assert passed
    assert refused


def test_a_list_that_is_longer_than_the_data_is_refused() -> None:
    """Before the items that there are would be decoded."""
    with pytest.raises(ValueError, match="it was cut: a list or map has 1,001 values, and 1,000 bytes follow"):
        check_keys(b"\xdd" + (1_001).to_bytes(4, "big") + b"\x90" * 1_000)


def test_what_users_keep_passes() -> None:
    """Numbers in any number, small texts and tuples by the million."""
    for tree in (
        [0.5] * 3_000_000, list(range(3_000_000)), [-1.5] * 100_000 + list(range(-100_000, 0)),
        [f"sample{index}" for index in range(1_000_000)], [[Ext(1, b""), 1, 2]] * 1_000_000,
        {index: [index, 0.5] for index in range(1_000_000)},
    ):  # fmt: skip
        check_keys(msgspec.msgpack.encode(tree))


def chained(count: int) -> list[int]:
    """Keys of a table of 2,048 places: a third lie one behind the other on the path along which each search ends,
    and the others come to its beginning on places that are taken."""
    generator, mask = random.Random(1), 2_047
    keys, at = [], 1
    taken: dict[int, int] = {}
    for index in range(count // 3):
        taken[at] = index
        keys.append(at)
        at = (5 * at + 1) & mask
    while len(keys) < count:
        key = generator.randrange(2_048, 2**20)
        place, rest = key & mask, key
        while place in taken and rest:
            rest >>= 5
            place = (5 * place + rest + 1) & mask
        if taken.get(place, count) < count // 9:
            while at in taken:
                at = (5 * at + 1) & mask
            taken[at] = len(keys)
            keys.append(key)
    return keys


@pytest.mark.parametrize("as_kind", [int, float])
@pytest.mark.parametrize("cut", [0, 1])
def test_numbers_as_keys_that_were_chosen_to_collide_are_refused(as_kind: Any, cut: int) -> None:
    """A megabyte of them would take minutes; also behind and in other values, and in data that was cut."""
    bad = dict.fromkeys(map(as_kind, chained(1_360)), 0)
    for tree in (bad, [1, {"a": bad}], {1: bad, 2: {}}, [bad] * 2):
        data = msgspec.msgpack.encode(tree)
        with pytest.raises(ValueError, match=r"its 1,\d+ keys takes quadratic time"):
            check_keys(data[: len(data) - cut])


def tables() -> dict[str, list[Any]]:
    """Keys that users have: counts by id, by time, by a float."""
    count = range(20_000)
    return {
        "ids": list(count),
        "shuffled": random.Random(1).sample(count, len(count)),
        "random": random.Random(1).sample(range(2**62), len(count)),
        "negative": [-index for index in count],
        "nanoseconds": [1_700_000_000_000_000_000 + 1_000_000_000 * index for index in count],
        "snowflakes": [(1_700_000_000_000 + index) << 22 for index in count],
        "high bits": [index << 40 for index in count],
        "tenths": [0.1 * index for index in count],
        "powers of two": [index * 2.0**-20 for index in count],
        "many NaNs": [math.nan for _ in count],
    }


@pytest.mark.parametrize("kind", tables())
def test_the_keys_of_a_users_table_pass(kind: str) -> None:
    """In a map, and as members of a set."""
    keys = tables()[kind]
    body = b"".join(msgspec.msgpack.encode(key) + b"\x00" for key in keys)
    check_keys(b"\xdf" + len(keys).to_bytes(4, "big") + body)
    if kind != "many NaNs":
        check_hashes([hash(key) for key in keys], of_set=True)
