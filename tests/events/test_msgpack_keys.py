"""Maps whose keys are arrays are found wherever they are, and nothing else is."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext

from events.msgpack_keys import check_keys

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


def test_containers_that_would_fill_the_memory_are_refused() -> None:
    """An empty list has one byte, and sixty of them when it is decoded; many small ones with a content pass."""
    check_keys(msgspec.msgpack.encode([[0.5]] * 1_200_000))
    for empty in (b"\x90", b"\x80"):
        with pytest.raises(ValueError, match=r"more than 1,000,000 arrays and maps"):
            check_keys(b"\xdd" + (1_100_000).to_bytes(4, "big") + empty * 1_100_000)
