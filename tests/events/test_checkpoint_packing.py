"""The packing of a checkpoint's state: a value returns with its type, or is refused by its path."""

from __future__ import annotations

import base64
import contextlib
import enum
import itertools
import math
import random
import subprocess
import sys
import tracemalloc
import uuid
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from msgspec.msgpack import Ext

from events.checkpoint import packing, packing_types
from events.errors import CheckpointDamaged, UnstorableState
from events.msgpack_keys import check_keys

CODES = [1, 2, 3, 4, 10, 11, 12, *range(20, 32), *range(40, 46), 50, 51, 60, 61]


class Tensor:
    """Stands for a tensor: equal by name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tensor) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


class Vocabulary:
    """A registered type."""

    def __init__(self, words: Any) -> None:
        self.words = words


class Phase(enum.Enum):
    WARMUP = "warmup"


class Level(enum.IntEnum):
    LOW = 1


class Text(str):
    __slots__ = ()


Point = namedtuple("Point", "x y")


class Tokyo(tzinfo):
    def utcoffset(self, moment: datetime | None) -> timedelta:
        return timedelta(hours=9)


def place(path: str, value: Any) -> str | None:
    """Return the name of a tensor."""
    return value.name if isinstance(value, Tensor) else None


def back(tree: Any) -> Any:
    return packing.decode(packing.encode(tree, place), Tensor)


def form(value: Any) -> Any:
    """Return what distinguishes a value: its type, those of its parts, their order, the bits of a float."""
    kind = type(value)
    if kind is dict or kind is OrderedDict or kind is Counter:
        return kind, [(form(key), form(item)) for key, item in value.items()]
    if kind is set or kind is frozenset:
        return kind, sorted(map(form, value), key=repr)
    if kind is list or kind is tuple:
        return kind, [form(item) for item in value]
    if kind is deque:
        return kind, [form(item) for item in value], value.maxlen
    if kind is slice:
        return kind, form((value.start, value.stop, value.step))
    if kind is float:
        return kind, value.hex(), math.copysign(1, value)
    if kind is complex:
        return kind, form((value.real, value.imag))
    if kind is datetime or kind is time:
        return kind, value.replace(tzinfo=None), value.fold, type(value.tzinfo), repr(value.tzinfo)
    if kind is np.ndarray:
        # By field: the padding between them belongs to no value.
        content = [form(value[name]) for name in value.dtype.names] if value.dtype.names else value.tobytes()
        return kind, value.dtype, value.dtype.str, value.shape, content
    if isinstance(value, np.generic):
        return kind, form(np.asarray(value)) if value.dtype.names else (value.dtype, value.tobytes())
    if kind is Tensor:
        return kind, value.name
    if kind is int:
        return kind, hex(value)
    if kind is Vocabulary:
        return kind, form(value.words)
    return kind, repr(value)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test with one registered type."""
    monkeypatch.setattr(packing_types, "registered", {})
    monkeypatch.setattr(packing_types, "registered_names", {})
    packing.register(Vocabulary, "tests.Vocabulary", lambda vocabulary: vocabulary.words, Vocabulary)


# ------------------------------------------------------------------------------------------- any value

text = st.text(st.characters(codec=None)) | st.just("\ud800") | st.just("a\udc80\udc80")
paths = st.builds(
    lambda kind, parts: kind(*parts),
    st.sampled_from([Path, PurePosixPath, PureWindowsPath]),
    st.lists(st.text("ab./\u00e9\udc80", max_size=4), max_size=3),
)
offsets = st.timedeltas(timedelta(hours=-23), timedelta(hours=23))
zones = (
    st.just(UTC)
    | st.builds(timezone, offsets)
    | st.builds(timezone, offsets, text)
    | st.sampled_from([ZoneInfo("UTC"), ZoneInfo("Europe/Berlin"), ZoneInfo("America/New_York")])
)
folds = st.integers(0, 1)
times = st.builds(lambda moment, fold: moment.replace(fold=fold), st.times(timezones=st.none() | zones), folds)
moments = st.builds(
    lambda moment, zone, fold: moment.replace(tzinfo=zone, fold=fold), st.datetimes(), st.none() | zones, folds
)
elements = st.sampled_from([*"?bhilBHILefdFDgG", ">i4", ">f8", "S3", "U2", "<M8[ns]", ">M8[25s]", "m8[D]", "M8", "V3"])
structures = st.recursive(
    elements.map(np.dtype),
    lambda inner: st.lists(st.tuples(inner, st.sampled_from([(), (2,), (2, 1)])), min_size=1, max_size=3).flatmap(
        lambda fields: st.booleans().map(
            lambda align: np.dtype([(f"f{i}", *field) for i, field in enumerate(fields)], align=align)
        )
    ),
    max_leaves=4,
)


def filled(dtype: np.dtype[Any], shape: tuple[int, ...], seed: int, order: int) -> np.ndarray[Any, Any]:
    """Return an array of random bits, C-contiguous, Fortran-ordered or strided."""
    whole = np.zeros(shape, dtype)
    if "U" not in str(dtype):  # random bits are not characters
        whole = np.frombuffer(random.Random(seed).randbytes(whole.nbytes), dtype).reshape(shape).copy()
    if "b1" in str(dtype.descr) or "?" in str(dtype.descr):
        whole = np.zeros(shape, dtype)
    return (whole, np.asfortranarray(whole), whole[..., ::-1] if shape else whole)[order]


arrays = st.builds(
    filled,
    structures,
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    st.integers(),
    st.integers(0, 2),
)
scalars = (
    st.builds(lambda dtype, seed: filled(dtype, (), seed, 0)[()], structures, st.integers())
    | text.map(np.str_)
    | st.binary(max_size=3).map(np.bytes_)
)
decimals = st.decimals() | st.sampled_from([Decimal("sNaN123"), Decimal("-0E-30"), Decimal("1E+400000")])
whole_numbers = (
    st.integers()
    | st.sampled_from([2**63, -(2**63) - 1, 2**64 - 1, 2**64, -(2**200)])
    | st.builds(pow, st.just(10), st.just(6000))
)
hashable_leaves = (
    st.none()
    | st.booleans()
    | whole_numbers
    | st.floats()
    | text
    | st.binary()
    | st.complex_numbers()
    | st.fractions()
    | st.builds(range, st.integers(), st.integers(), st.integers(1))
    | st.uuids()
    | paths
    | st.dates()
    | times
    | moments
    | st.timedeltas()
    | zones
    | text.map(Tensor)
)
hashables = st.recursive(
    hashable_leaves,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
leaves = hashables | st.binary().map(bytearray) | decimals | arrays | scalars


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.dictionaries(hashables, inner, max_size=3)
    return (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(text | st.integers(), inner, max_size=3)
        | pairs
        | pairs.map(OrderedDict)
        | pairs.map(Counter)
        | st.sets(hashables, max_size=3)
        | st.builds(lambda items, more: deque(items, len(items) + more), st.lists(inner, max_size=3), st.integers(0, 3))
        | st.lists(inner, max_size=3).map(deque)
        | st.builds(slice, inner, inner, inner)
        | inner.map(Vocabulary)
    )


trees = st.recursive(leaves, containers, max_leaves=12)


# ---------------------------------------------------------------------------------- what cannot be stored


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Phase.WARMUP, r"Phase that cannot.*member of an enum; store its value"),
        (Level.LOW, r"Level that cannot.*member of an enum"),
        (Point(1, 2), r"Point that cannot.*not exactly a tuple"),
        (defaultdict(list), r"collections\.defaultdict that cannot.*not exactly a dict"),
        (Text("a"), r"Text that cannot.*not exactly a str"),
        (type("Old", (datetime,), {})(2020, 1, 1), "Old that cannot.*not exactly a datetime.datetime"),
        (object(), "object that cannot.*not a plain value"),
        (print, "builtin_function_or_method that cannot"),
        (int, "type that cannot"),
        (memoryview(b"a"), "memoryview that cannot"),
        (Tensor("a"), r"Tensor that cannot"),
        (np.ma.masked_array([1]), r"numpy\.ma\.MaskedArray that cannot"),
        (np.dtype("f4"), "Float32DType that cannot"),
    ],
)
def test_a_value_of_another_type_is_refused_by_path_and_type(value: Any, said: str) -> None:
    with pytest.raises(UnstorableState, match=rf"^callbacks\.2\.best is a .*{said}.*`register`$"):
        packing.encode({2: {"best": value}}, at="callbacks")


def zone_from_a_file() -> ZoneInfo:
    file = next(folder / "UTC" for folder in map(Path, zoneinfo.TZPATH) if (folder / "UTC").exists())
    with file.open("rb") as opened:
        return ZoneInfo.from_file(opened)


NO_ELEMENTS = r"numpy\.ndarray that .* keeps elements of .*convert them"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.array([object()]), NO_ELEMENTS),
        (np.array(["a"], dtype=np.dtypes.StringDType()), NO_ELEMENTS),
        (np.rec.array([(1,)], dtype=[("a", "i4")]).view(np.ndarray), NO_ELEMENTS),
        (np.zeros(2, {"names": ["a", "b"], "formats": ["i4", "O"]}), NO_ELEMENTS),
        (np.zeros(2, [(("a title", "a"), "i4")]), NO_ELEMENTS),
        (zone_from_a_file(), "ZoneInfo that cannot.*None is not a time zone"),
        ({2**61 * i - i: 1 for i in range(2**70, 2**70 + 1_001)}, "dict that cannot be stored: 1,001 of its keys"),
        (Fraction(2**5000, 3), "Fraction that cannot be stored: .* 5,001 bits"),
        (range(2**5000), "range that cannot be stored: .* 5,001 bits"),
    ],
)
def test_a_value_that_could_not_be_read_again_is_refused(value: Any, said: str) -> None:
    with pytest.raises(UnstorableState, match=f"^a is a .*{said}"):
        packing.encode({"a": value})


def test_a_refused_value_is_named_wherever_it_is() -> None:
    """Paths have indices of sequences and keys of dicts; nothing of registered types."""
    for tree, path in (
        ([0, ({"a.b": object()},)], r"1\.0\.a\.b"),
        ({(1, "x"): [object()]}, r"\(1, 'x'\)\.0"),
        (OrderedDict({2: deque([1, object()])}), r"2\.1"),
        ({"v": Vocabulary({"w": object()})}, r"v\.w"),
        ({"t": slice(object())}, "t"),
        ({"when": datetime(2020, 1, 1, tzinfo=Tokyo())}, "when"),
        ({10**5000: object()}, "<int>"),
        ({object(): 1}, "the state"),
    ):
        with pytest.raises(UnstorableState, match=f"^{path} is a "):
            packing.encode(tree)


def test_a_value_that_contains_itself_is_refused_by_its_path() -> None:
    """Before anything is placed twice. A value that occurs twice side by side is written twice."""
    placed: list[str] = []
    loop: dict[str, Any] = {"weight": Tensor("weight")}
    loop["again"] = deque([1, Vocabulary((loop,))])
    with pytest.raises(UnstorableState, match=r"^model\.again\.1\.0 is a dict that cannot.*: it is model again"):
        packing.encode({"model": loop}, lambda path, value: placed.append(path) or "name")  # type: ignore[func-returns-value]
    assert placed == ["model.weight"]
    items: list[Any] = []
    items.append(items)
    with pytest.raises(UnstorableState, match=r"^0 is a list that cannot.*: it is the whole state again"):
        packing.encode(items)
    shared = [1, (2,)]
    assert back([shared, {"a": shared}, ((), ())]) == [shared, {"a": shared}, ((), ())]


def nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    tree: Any = 1
    for _ in range(depth):
        tree = wrap(tree)
    return tree


WRAPS: list[Callable[[Any], Any]] = [
    lambda tree: [tree],
    lambda tree: (tree,),
    lambda tree: {"a": tree},
    lambda tree: OrderedDict(a=tree),
    lambda tree: frozenset([tree]),
    slice,
    Vocabulary,
]


@pytest.mark.parametrize("wrap", WRAPS)
def test_nesting_beyond_the_limit_is_refused_and_within_it_returns(wrap: Callable[[Any], Any]) -> None:
    deepest = nested(packing.MAX_DEPTH, wrap)
    assert form(back(deepest)) == form(deepest)
    with pytest.raises(UnstorableState, match="more than 200 levels deep"):
        packing.encode(nested(packing.MAX_DEPTH + 1, wrap))
    with pytest.raises(UnstorableState, match="more than 200 levels deep"):
        packing.encode(nested(100_000, lambda tree: [tree]))


def test_bytes_that_msgpack_cannot_hold_are_refused_by_their_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_BYTES_LIMIT", 100)
    for value in (bytes(101), bytearray(101), np.zeros(101, np.int8)):
        with pytest.raises(UnstorableState, match=r"^replay is a bytes .*4 GiB.*tensor"):
            packing.encode({"replay": value})
    assert back(bytes(100)) == bytes(100)


def test_errors_of_the_users_functions_have_the_path_and_the_cause() -> None:
    packing.register(Point, "tests.Point", lambda point: point.z, Point._make)
    with pytest.raises(UnstorableState, match=r"^a\.0 is a .*Point.*to_plain raised AttributeError.*'z'"):
        packing.encode({"a": [Point(1, 2)]})

    def fail(plain: Any) -> Any:
        raise RuntimeError("no such word")

    data = packing.encode({"model": [Vocabulary(1)]})
    packing.register(Vocabulary, "tests.Vocabulary", str, fail)
    with pytest.raises(CheckpointDamaged, match=r"^model\.0 cannot.*'tests\.Vocabulary' raised RuntimeError") as caught:
        packing.decode(data)
    assert isinstance(caught.value.__cause__.__cause__, RuntimeError)  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------- what cannot be read


def packed(tree: Any, entries: int = 0) -> bytes:
    """Return a file of any content."""
    return msgspec.msgpack.encode([entries, tree])


def marked(code: int, *parts: Any) -> list[Any]:
    return [Ext(code, b""), *parts]


def check_decoder(data: bytes) -> None:
    """A value or `CheckpointDamaged`: anything else fails the test."""
    with contextlib.suppress(CheckpointDamaged):
        packing.decode(data, Tensor)


@pytest.mark.fuzz
@settings(deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_damaged(data: bytes) -> None:
    check_decoder(data)
    check_decoder(b"\x92\x00" + data)


@pytest.mark.fuzz
@settings(deadline=None)
@given(trees, st.data())
def test_cut_and_flipped_states_raise_nothing_but_damaged(tree: Any, data: st.DataObject) -> None:
    encoded = packing.encode(tree, place)
    with pytest.raises(CheckpointDamaged):
        packing.decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])
    flipped = bytearray(encoded)
    for _ in range(data.draw(st.integers(1, 5))):
        flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    check_decoder(bytes(flipped))


raw_leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 100)
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=9)
) | st.sampled_from(
    ["", "<f4", "|O", "U", "S", "|V0", "<U1", "UTC", "../x", "1e999999999", "names", "tests.Vocabulary"]
)
raw_trees = st.recursive(
    raw_leaves,
    lambda inner: (
        st.builds(lambda code, parts: marked(code, *parts), st.sampled_from(CODES), st.lists(inner, max_size=4))
        | st.builds(marked, st.sampled_from(CODES), inner, inner, inner)
        | st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["names", "formats", "offsets", "itemsize", 1]), inner, max_size=5)
    ),
    max_leaves=12,
)


@pytest.mark.fuzz
@settings(deadline=None)
@given(raw_trees)
def test_marks_before_any_parts_raise_nothing_but_damaged(tree: Any) -> None:

    def entries(tree: Any) -> int:
        items = tree if isinstance(tree, list) else tree.values() if isinstance(tree, dict) else ()
        return (len(tree) if isinstance(tree, dict) else 0) + sum(map(entries, items))

    check_decoder(packed(tree, entries(tree)))


LONG_KEYS = [marked(1, *[0] * 9, *[-1 - (i >> bit & 1) for bit in range(8)]) for i in range(200)]
"""Tuples of one hash: each would be compared with all others, value by value."""
ARRAY_KEYS = [bytes([0xDC, 0, 20]) + bytes(0xFE + (i >> bit & 1) for bit in range(20)) for i in range(40_000)]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the state cannot be restored: .*load an older"),
        (packed(1)[:-1], "it was cut"),
        (packed(1) + b"\x00", "trailing"),
        (msgspec.msgpack.encode(1), "not an array of a number and a tree"),
        (msgspec.msgpack.encode([0, 1, 2]), "not an array of a number and a tree"),
        (msgspec.msgpack.encode([True, {"a": 1}]), "not an array of a number and a tree"),
        (b"\x92\x02\x82\x01\x05\x01\x06", "maps have 1 entries, and 2 were written"),
        (b"\x92\x02\x82\xa1a\x05\xa1a\x06", "maps have 1 entries, and 2 were written"),
        (b"\x92\x01\x81\x90\x01", "an array as a key"),
        (b"\x92\x01\x81\x80\x01", "hashable"),
        (b"\x92\x00\xd6\xff\x00\x00\x00\x01", "msgpack's datetime"),
        (packed([5, Ext(1, b"")]), "1 cannot be restored: msgpack's Ext"),
        (packed([Ext(1, b"x")]), "0 cannot be restored: msgpack's Ext"),
        (packed({"a": marked(10, 1, 2, 1, 3)}, 1), "^a cannot be restored: it has equal keys"),
        (packed(marked(10, True, 2, 1, 3)), "equal keys"),
        (packed(marked(10, [], 2)), "unhashable"),
        (packed(marked(11, 1)), "code 11"),
        (packed(marked(12, {}, 1)), "unhashable"),
        (packed(marked(2, 1, 1)), "equal members"),
        (packed(marked(3, [])), "unhashable"),
        (packed(marked(4)), "code 4"),
        (packed(marked(4, 1, 2, 1)), "more items than its maxlen"),
        (packed(marked(22, 10**12)), "not bytes"),
        (packed(marked(24, "many")), "code 24"),
        (packed(marked(25, 1, 0)), "Fraction"),
        (packed(marked(25, "1e999999999")), "not int"),
        (packed(marked(26, 1, 2, 0)), "zero"),
        (packed(marked(28, b"short")), "16"),
        (packed(marked(40, b"\x07\xe4\x63\x63")), "not int"),
        (packed(marked(41, 25, 0, 0, 0, None, 0)), "hour"),
        (packed(marked(43, 10**12, 0, 0)), "code 43"),
        (packed(marked(45, "../../etc/passwd")), "is not a time zone"),
        (packed(marked(45, "Mars/Olympus")), "provide that"),
        (packed(marked(45, "Europe")), "code 45"),
        (packed(marked(50, "|O", marked(1, 1), bytes(8))), "'|O' is not a dtype"),
        (packed(marked(50, "f4,f4", marked(1, 1), bytes(8))), "not a dtype"),
        (packed(marked(50, "<f4", marked(1, 2), bytes(4))), "has 4 bytes"),
        (packed(marked(50, "<f4", marked(1, -1), b"")), "code 50"),
        (packed(marked(50, "<f4", marked(26, 0, 10**18, 1), b"")), "code 50"),
        (packed(marked(50, ["<f4", marked(26, 0, 10**18, 1)], marked(1, 0), b"")), "are not whole numbers in a list"),
        (packed(marked(51, "S", 10**12)), "code 51"),
        (packed(marked(51, "U", 5)), "code 51"),
        (packed(marked(60, "weight")), "the tensor 'weight', which does not exist.*provide"),
        (packed(marked(61, "unheard.Of", 1)), "'unheard.Of'.*not imported.*provide"),
        (packed(marked(61, [], 1)), "code 61"),
        (packed(marked(25, marked(20, b"\x01" * 1_000), 3)), "7,993 bits, more than 4,096"),
        (packed(marked(26, 0, marked(20, b"\x01" * 1_000), 3)), "7,993 bits, more than 4,096"),
        (packed(marked(50, "<f4", marked(1, *[2**47] * 65), bytes(4))), "65 dimensions, of up to 48 bits"),
        (packed(marked(51, "<U1", b"\xff\xff\xff\x7f")), "does not fit its bytes"),
        (packed(marked(50, "<M8[0D]", marked(1, 1), bytes(8))), "not a dtype"),
        (packed(marked(50, "|V0", marked(1, 2**62), b"")), "more than 65,536 elements of 0 bytes"),
        (packed(marked(50, "<f4", marked(1, marked(20, b"\x01" * 1_000)), bytes(4))), "of up to 7993 bits"),
        (packed(marked(50, "<f4", marked(1, 1), 4)), "not the bytes of elements"),
        (packed(marked(2, *LONG_KEYS)), "its 200 keys takes quadratic time"),
        (packed(marked(10, *[part for key in LONG_KEYS for part in (key, 1)])), "its 200 keys takes quadratic time"),
        (
            b"\x92\x00\xdf" + (40_000).to_bytes(4, "big") + b"\xc0".join(ARRAY_KEYS) + b"\xc0",
            "a map has an array as a key",
        ),
        (packed({"a": [Ext(99, b"later")]}, 1), r"^a\.0 cannot be restored: a newer version .* 99.*update stagecast"),
        (packed({"a": [marked(99, 1)]}, 1), r"^a\.0 cannot be restored: a newer version .* 99.*update stagecast"),
        (packed({"a": [Ext(-7, b"")]}, 1), r"^a cannot be restored: a newer version .* -7.*update stagecast"),
    ],
    ids=map(str, itertools.count()),  # the bytes are long
)
def test_content_that_is_never_written_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(CheckpointDamaged, match=said):
        packing.decode(data)


def fields(formats: list[Any], offsets: list[Any], itemsize: Any = 8) -> dict[str, Any]:
    return {"names": ["a", "b"][: len(formats)], "formats": formats, "offsets": offsets, "itemsize": itemsize}


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (fields(["<i4"], [2**31 - 4]), "outside of 8 bytes"),
        (fields(["<i4"], [2**32 - 4]), "from 0 to"),
        (fields(["<i4"], [-4]), "from 0 to"),
        (fields(["<i4", "<i4"], [0, 5]), "outside of 8 bytes"),
        (fields(["<i4"], [0], 2**31), "from 0 to"),
        (fields(["<i4"], [0.0]), "whole numbers"),
        (fields(["<i4", "<i4"], [0]), "shorter"),
        (fields([fields(["<i4"], [2**31 - 4])], [0]), "outside of 8 bytes"),
        (fields([["|u1", [2**31 - 9]]], [4_096]), "outside of 8 bytes"),
        (fields([["|u1", [2**16, 2**16 + 1]]], [0]), "more than"),
        (["<i4", [2**30 + 2]], "more than"),
        (["|V0", [2**31 - 1] * 40], "more than"),
        (["<i4", [-2]], "from 0 to"),
        ([fields(["<i4"], [8]), [1]], "outside of 8 bytes"),
    ],
)
def test_elements_that_reach_outside_of_their_bytes_are_refused(dtype: Any, said: str) -> None:
    """NumPy accepts such a type, and reads and writes beside the array."""
    entries = str(dtype).count("names") * 4
    for code, shape in ((50, [marked(1, 1)]), (51, [])):
        with pytest.raises(CheckpointDamaged, match=said):
            packing.decode(packed(marked(code, dtype, *shape, bytes(8)), entries))


def colliding(kind: str) -> list[Any]:
    """Return parts of 1,001 different keys of one hash."""
    modulus = 2**61 - 1  # Python hashes numbers modulo this
    if kind == "big integers":
        return [marked(20, (1 + i * modulus).to_bytes(16, "little")) for i in range(1_001)]
    if kind == "fractions":
        return [marked(25, 7 * i % modulus, i) for i in range(1, 8_000, 7)][:1_001]
    if kind == "UUIDs":
        return [marked(28, (1 + i * modulus).to_bytes(16, "big")) for i in range(1_001)]
    return [marked(1, *[-1 - (i >> bit & 1) for bit in range(10)], i // 1_024) for i in range(1_024)]


@pytest.mark.parametrize("kind", ["big integers", "fractions", "UUIDs", "tuples"])
@pytest.mark.parametrize("code", [2, 3, 10, 12])
def test_keys_that_all_have_one_hash_are_refused(kind: str, code: int) -> None:
    keys = colliding(kind)
    parts = keys if code < 10 else [part for key in keys for part in (key, 1)]
    with pytest.raises(CheckpointDamaged, match=r"keys takes quadratic time, by their hashes"):
        packing.decode(packed(marked(code, *parts)))


@pytest.mark.parametrize("kind", [dict, OrderedDict, Counter, set, frozenset])
def test_a_users_large_tables_return(kind: Any) -> None:
    for keys in (range(3_000), [index * 2.0**-20 for index in range(3_000)], [(index, 0.5) for index in range(3_000)]):
        value = kind(dict.fromkeys(keys, 1))
        assert back(value) == value


@pytest.mark.parametrize("begin", [b"\x91", b"\x81\x01", b"\x92\xc7\x00\x01"])
def test_endless_nesting_in_the_file_is_refused(begin: bytes) -> None:
    for depth in (201, 400, 100_000):
        with pytest.raises(CheckpointDamaged, match=r"deep|depth"):
            packing.decode(b"\x92\x00" + begin * depth + b"\x01")


def test_memory_follows_the_input_not_what_it_claims() -> None:
    tracemalloc.start()
    try:
        for data in (
            b"\x92\x00\xdd\xff\xff\xff\xff",
            b"\x92\x00" + b"\xdd\x0f\xff\xff\xff" * 100,
            b"\x92\x00\xdf\xff\xff\xff\xff\x01",
            b"\x92\x00\xc6\xff\xff\xff\xff",
            packed(marked(50, "<f8", marked(1, 2**30), b"")),
            packed(marked(50, "<f8", marked(1, "a", 10**6, 10**3), b"")),
            packed(marked(50, "|V2000000000", marked(1, 0), b"")),
            packed(marked(50, ["<f8", [10**8]], marked(1, 1), b"")),
            packed(marked(4, 2**62)),
            packed(marked(51, "S", 2**30)),
            packed(marked(25, marked(24, "1e999999999"), None)),
        ):
            check_decoder(data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_missing_tensor_is_named_by_its_path() -> None:
    """Errors of the lookup that are not about the checkpoint propagate unchanged."""
    data = packing.encode({"model": [Tensor("w")]}, place)

    def fail(error: Exception) -> Callable[[str], Any]:
        def tensor(name: str) -> Any:
            raise error

        return tensor

    for error in (KeyError("w"), ValueError("w"), OSError("w")):
        with pytest.raises(CheckpointDamaged, match=r"^model\.0 cannot be restored: '?w"):
            packing.decode(data, fail(error))
    with pytest.raises(RuntimeError, match="out of memory"):
        packing.decode(data, fail(RuntimeError("out of memory")))
    with pytest.raises(CheckpointDamaged, match="the tensor 5, which does not exist"):
        packing.decode(packed(marked(60, 5)), Tensor)


def test_an_array_without_numpy_names_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    data = packing.encode({"a": np.zeros(2)})
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(CheckpointDamaged, match=r"^a cannot be restored: .*numpy.*provide that"):
        packing.decode(data)


# -------------------------------------------------------------------------------------------- round trips


@settings(deadline=None, max_examples=200)
@given(trees)
def test_every_value_returns_with_its_type(tree: Any) -> None:
    assert form(back(tree)) == form(tree)


@settings(deadline=None)
@given(arrays | scalars)
def test_every_array_returns_with_its_dtype(value: Any) -> None:
    returned = back(value)
    assert form(returned) == form(value)
    if type(returned) is np.ndarray:
        assert returned.flags.writeable
        assert returned.flags.aligned


def test_keys_keep_their_types() -> None:
    for key in (1, True, 1.0, "1", b"1", None, (1, True), np.int64(1), 2**70, "\ud800", frozenset([1]), Path("1")):
        (returned,) = back({key: "a"})
        assert form(returned) == form(key)
    assert list(back({"b": 1, 2: 1, "a": 1, (): 1, 0: 1})) == ["b", 2, "a", (), 0]


def test_values_that_other_encodings_lose_return() -> None:
    nan = float("nan")
    for value in (
        -0.0,
        nan,
        complex(-0.0, nan),
        2**63 - 1,
        2**64,
        -(2**63) - 1,
        b"",
        bytearray(),
        [bytearray()],
        [()],
        [[], (), {}, set()],
        datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
        timezone(timedelta(0)),
        timezone(timedelta(0), "UTC"),
        deque([1], 0),
        deque([1, 2], 5),
        Decimal("1.10"),
        range(0, 10, 3),
        np.float64("nan"),
        np.str_("a\0"),
        np.bytes_(b"a\0"),
        np.void(b""),
        np.datetime64("NaT"),
        np.longdouble("0.1"),
        np.zeros((0, 3)),
        np.zeros(3, []),
    ):
        assert form(back(value)) == form(value)
    assert back(timezone.utc) is timezone.utc  # noqa: UP017 - that object
    assert type(back(PurePath("a"))) is type(PurePath("a"))


def test_the_state_of_every_generator_returns() -> None:
    python = random.Random(1)
    state = back(python.getstate())
    expected = python.random()
    python.setstate(state)
    assert python.random() == expected
    old = np.random.RandomState(1)
    old_state = back(old.get_state())
    expected = old.random_sample()
    old.set_state(old_state)
    assert old.random_sample() == expected
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64):
        new = np.random.Generator(kind(1))
        new_state = back(new.bit_generator.state)
        assert form(new_state) == form(new.bit_generator.state)
        expected = new.random()
        new.bit_generator.state = new_state
        assert new.random() == expected


def test_paths_return_as_those_of_this_system() -> None:
    assert back(Path("a/b")) == Path("a/b")
    assert type(back(Path("a"))) is type(Path("a"))
    data = packing.encode(Path("a/b"))
    assert data == packed(marked(29, "a/b"))
    assert form(back(PureWindowsPath("C:\\a"))) == form(PureWindowsPath("C:\\a"))


# ---------------------------------------------------------------------------- tensors and registered types


def test_a_tensor_is_placed_by_its_path_and_fetched_by_its_name() -> None:
    state = {
        "state": {5: {"step": 1, "exp_avg": Tensor("a")}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}],
        "layer.weight": (Tensor("b"),),
    }
    placed: dict[str, Any] = {}

    def record(path: str, value: Any) -> str:
        placed[path] = value
        return path

    data = packing.encode(state, record, at="optimizers.0")
    assert list(placed) == ["optimizers.0.state.5.exp_avg", "optimizers.0.layer.weight.0"]
    assert packing.decode(data, placed.__getitem__) == state
    assert packing.decode(packing.encode(Tensor("c"), record), placed.__getitem__) == Tensor("c")
    assert placed[""] == Tensor("c")


def test_only_tensors_are_placed_also_those_of_registered_types() -> None:
    placed: list[str] = []

    def record(path: str, value: Any) -> str:
        placed.append(path)
        return value.name  # type: ignore[no-any-return]

    packing.encode([1, "a", np.zeros(1), np.float32(1), Vocabulary(None), Path(), {(1,): Tensor("")}], record)
    tree = {"v": Vocabulary({"inner": Vocabulary([Tensor("w")])})}
    assert form(packing.decode(packing.encode(tree, record), Tensor)) == form(tree)
    assert placed == ["6.(1,)", "v.inner.0"]


def test_a_subclass_is_stored_once_it_is_registered() -> None:
    packing.register(Phase, "tests.Phase", lambda phase: phase.value, Phase)
    packing.register(Point, "tests.Point", tuple, Point._make)
    assert back([Phase.WARMUP]) == [Phase.WARMUP]
    assert type(back(Point(1, (2,)))) is Point
    with pytest.raises(UnstorableState, match="Sub that cannot"):
        packing.encode(type("Sub", (Vocabulary,), {})(1))


def test_registering_again_replaces_and_a_taken_name_is_refused() -> None:
    old = packing.encode(Vocabulary(1))
    packing.register(Vocabulary, "tests.Vocabulary", lambda value: value.words, lambda plain: ("new", plain))
    assert packing.decode(old) == ("new", 1)
    packing.register(Vocabulary, "tests.Words", lambda value: value.words, lambda plain: ("second", plain))
    assert packing.decode(old) == ("new", 1)
    assert packing.decode(packing.encode(Vocabulary(1))) == ("second", 1)
    with pytest.raises(ValueError, match=r"'tests\.Words' belongs to .*Vocabulary; choose another one for .*Point"):
        packing.register(Point, "tests.Words", tuple, Point._make)
    with pytest.raises(ValueError, match="dict is stored without registration"):
        packing.register(dict, "tests.dict", list, dict)


def test_a_class_that_was_defined_again_is_the_same_type() -> None:
    for _ in range(2):
        again = type("Again", (), {})
        packing.register(again, "tests.Again", lambda value: None, lambda plain, kind=again: kind())
        assert type(back(again())) is again


# ------------------------------------------------------------------------------------------------ the format


def golden_tree() -> Any:
    """A value of every code."""
    return [
        {"plain": [None, True, 1, 1.5, "a", b"b"], 2: (1,), "sets": [{1}, frozenset([2])]},
        [deque([1], 3), {(): 1}, OrderedDict(a=1), Counter(a=2)],
        [2**64, "\ud800", bytearray(b"a"), 1 - 2j, Decimal("1.0"), Fraction(1, 3), range(1, 5, 2), slice(None, 2)],
        [uuid.UUID(int=5), Path("a/b"), PurePosixPath("a/b"), PureWindowsPath("a/b")],
        [date(2024, 1, 2), time(1, 2, 3, 4, UTC, fold=1), datetime(2024, 1, 2, 3, 4, 5, 6, ZoneInfo("Europe/Berlin"))],
        [timedelta(-1, 2, 3), timezone(timedelta(hours=1), "A")],
        [np.arange(3, dtype=">i2"), np.zeros(1, [("a", "<f4", (2,)), ("b", "<M8[s]")]), np.float16(1), np.str_("a")],
        [Tensor("w"), Vocabulary(["a"])],
    ]


GOLDEN = (
    "kgeYg6VwbGFpbpbAwwHLP/gAAAAAAAChYcQBYgKSxwABAaRzZXRzkpLHAAIBkscAAwKUk8cABAEDk8cACpHHAAEBk8cAC6FhAZPH"
    "AAyhYQKYkscAFMQJAAAAAAAAAAABkscAFcQD7aCAkscAFsQBYZPHABfLP/AAAAAAAADLwAAAAAAAAACSxwAYozEuMJPHABkBA5TH"
    "ABoBBQKUxwAbwALAlJLHABzEEAAAAAAAAAAAAAAAAAAAAAWSxwAdo2EvYpLHAB6jYS9ikscAH6NhXGKTlMcAKM0H6AECl8cAKQEC"
    "AwSSxwAslMcAKwAAAAGaxwAqzQfoAQIDBAUGkscALa1FdXJvcGUvQmVybGluAJKUxwAr/wIDk8cALJTHACsAzQ4QAKFBlJTHADKj"
    "PmkykscAAQPEBgAAAAEAApTHADKEpW5hbWVzkqFhoWKnZm9ybWF0c5KSozxmNJECpjxNOFtzXadvZmZzZXRzkgAIqGl0ZW1zaXpl"
    "EJLHAAEBxBAAAAAAAAAAAAAAAAAAAAAAk8cAM6M8ZjLEAgA8k8cAM6FVoWGSkscAPKF3k8cAPbB0ZXN0cy5Wb2NhYnVsYXJ5kaFh"
)


def test_the_format_never_changes() -> None:
    """For a new code add a second tree with its bytes; never change these."""
    data = base64.b64decode(GOLDEN)
    assert form(packing.decode(data, Tensor)) == form(golden_tree())
    assert packing.encode(golden_tree(), place) == data
    assert {code for code in CODES if bytes([0xC7, 0, code]) in data} == set(CODES)


def test_plain_state_is_plain_msgpack() -> None:
    tree = {"epoch": 3, "metrics": {"loss": [0.5, None]}, 7: {True: b"x"}}
    assert msgspec.msgpack.decode(packing.encode(tree)) == [5, tree]
    assert msgspec.msgpack.decode(packing.encode([2**64 - 1, -(2**63), "a"])) == [0, [2**64 - 1, -(2**63), "a"]]


def test_packing_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from events.checkpoint import packing; packing.decode(packing.encode([1, (2,)])); "
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_state_of_too_many_small_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("events.checkpoint.packing.ALWAYS_FITS_BYTES", 0)
    monkeypatch.setattr("events.checkpoint.packing.check_keys", lambda data: check_keys(data, 2**20))
    with pytest.raises(UnstorableState, match=r"callbacks\.seen has too many small values: .* keep them as a tensor"):
        packing.check_readable(packing.encode([[] for _ in range(20_000)]), "callbacks.seen")
    packing.check_readable(packing.encode(["x" * 20_000] * 10), "callbacks.seen")
