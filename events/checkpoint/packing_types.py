"""How `events.checkpoint.packing` writes the values of each type, and the registration of further types."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from operator import attrgetter
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from types import NoneType
from typing import Any, NamedTuple, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

from events.checkpoint import packing_numpy
from events.hash_tables import SAME_HASH, check_hashes

T = TypeVar("T")

REGISTERED = 61
"""The code of registered types."""
ATOMS = frozenset({NoneType, bool, float})
"""Types each of whose values is written without a mark."""
NATIVE = ATOMS | {int, str, bytes}
"""Types most of whose values are written without a mark."""
_INT_BITS = 4_096
"""Maximum bits per integer in a type that computes with several: a fraction, a range."""
_SALTED = frozenset({str, bytes, NoneType, bool})  # their hashes differ between processes, or they are few
_ZONE = re.compile(r"[\w+-]+(/[\w+-]+)*", re.ASCII)  # no path that leaves the folder of time zones


class Form(NamedTuple):
    """How the values of a type are written."""

    code: int  # 0: no mark
    split: Callable[[Any], Collection[object]]  # returns the parts; raises ValueError for a value without any
    make: Callable[..., object]  # receives the list of parts; from code 20 on, each part as an argument


registered: dict[type, Form] = {}
registered_names: dict[str, tuple[type, Callable[[Any], object]]] = {}


def register(kind: type[T], name: str, to_plain: Callable[[T], object], from_plain: Callable[[Any], object]) -> None:
    """Register a type that is not in the table of `events.checkpoint.packing`, best in the module that defines it.

    Args:
        kind: The type, without its subclasses.
        name: Name of the type in the file, such as ``"myproject.Vocabulary"``. A type that is registered under a
            second name is written under that one, and read under both.
        to_plain: Returns a value of the types in the table, of registered types, or of tensors.
        from_plain: Returns the original value.

    Raises:
        ValueError: The type is in the table, or the name belongs to another type. A class that is defined again, in a
            notebook or by a reload, is the same type.
    """
    if kind in KNOWN:
        raise ValueError(f"{name_of(kind)} is stored without registration; register types of your own")
    other, _ = registered_names.get(name, (kind, None))
    if name_of(other) != name_of(kind):
        raise ValueError(f"the name {name!r} belongs to {name_of(other)}; choose another one for {name_of(kind)}")

    def split(value: T) -> tuple[str, object]:
        try:
            return name, to_plain(value)
        except Exception as error:  # the user's code: the writer adds the path
            raise ValueError(f"its to_plain raised {error!r}; correct that") from error

    registered[kind] = Form(REGISTERED, split, _make_registered)
    registered_names[name] = kind, from_plain


def name_of(kind: type) -> str:
    """Return the qualified name of a type; without the module for a built-in one."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _spread(keys: Collection[T]) -> Collection[T]:
    """Refuse keys that share a hash, which could not be read again. Only constructed ones (big integers) do."""
    if len(keys) > SAME_HASH and not _SALTED.issuperset(map(type, keys)):
        hashed, count = Counter(map(hash, keys)).most_common(1)[0]
        if count > SAME_HASH:
            raise ValueError(f"{count:,} of its keys have one hash, {hashed}; use keys that differ in theirs")
    return keys


def _items(mapping: Mapping[object, object]) -> list[object]:
    _spread(mapping)
    return [part for pair in mapping.items() for part in pair]


def _check_keys(keys: list[object], *, of_set: bool = False) -> None:
    """Refuse untrusted keys whose table would take quadratic time, before it is built."""
    if len(keys) > SAME_HASH and not _SALTED.issuperset(map(type, keys)):
        check_hashes(list(map(hash, keys)), of_set=of_set)


def _pairs(kind: Callable[[dict[object, object]], object]) -> Callable[[list[object]], object]:
    def make(parts: list[object]) -> object:
        keys = parts[::2]
        _check_keys(keys)
        pairs = dict(zip(keys, parts[1::2], strict=True))
        if 2 * len(pairs) != len(parts):
            raise ValueError("it has equal keys")
        return kind(pairs)

    return make


def _members(kind: Callable[[Iterable[object]], Collection[object]]) -> Callable[[list[object]], object]:
    def make(parts: list[object]) -> object:
        _check_keys(parts, of_set=True)
        members = kind(parts)
        if len(members) != len(parts):
            raise ValueError("it has equal members")
        return members

    return make


def _deque(parts: list[Any]) -> deque[object]:
    *items, maxlen = parts
    if maxlen is not None and maxlen < len(items):
        raise ValueError("it has more items than its maxlen")
    return deque(items, maxlen)


def _exactly(kind: type, make: Callable[..., object]) -> Callable[..., object]:
    """Refuse other types: a constructor might compute the digits of "1e999999999", or 10**9 zero bytes."""

    def checked(*parts: object) -> object:
        if not {kind}.issuperset(map(type, parts)):
            raise TypeError(f"it has parts that are not {kind.__name__}")
        return make(*parts)

    return checked


def _short_ints(parts: tuple[T, ...]) -> tuple[T, ...]:
    """Bound the length of integers whose arithmetic takes quadratic time."""
    longest = max((part.bit_length() for part in parts if isinstance(part, int)), default=0)
    if longest > _INT_BITS:
        raise ValueError(f"it has an integer of {longest:,} bits, more than {_INT_BITS:,}; store it as an int or text")
    return parts


def _zone_key(key: object) -> str:
    if type(key) is not str or _ZONE.fullmatch(key) is None:
        raise ValueError(f"{key!r} is not a time zone of the IANA database")
    return key


def _make_registered(name: object, plain: object) -> object:
    if type(name) is not str or name not in registered_names:
        raise LookupError(f"no type is registered as {name!r}: the module that registers it is not imported")
    try:
        return registered_names[name][1](plain)
    except Exception as error:  # the user's code, on data that may be damaged: the reader adds the path
        raise ValueError(f"from_plain of {name!r} raised {error!r}") from error


_range = attrgetter("start", "stop", "step")
_date = attrgetter("year", "month", "day")
_time = attrgetter("hour", "minute", "second", "microsecond", "tzinfo", "fold")

FORMS: dict[type, Form] = {
    list: Form(0, lambda value: value, list),
    tuple: Form(1, lambda value: value, tuple),
    set: Form(2, _spread, _members(set)),
    frozenset: Form(3, _spread, _members(frozenset)),
    deque: Form(4, lambda value: [*value, value.maxlen], _deque),
    dict: Form(10, _items, _pairs(dict)),
    OrderedDict: Form(11, _items, _pairs(OrderedDict)),
    Counter: Form(12, _items, _pairs(Counter)),
    int: Form(
        20,
        lambda value: (value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True),),
        _exactly(bytes, lambda data: int.from_bytes(data, "little", signed=True)),
    ),
    str: Form(
        21,
        lambda value: (value.encode("utf-8", "surrogatepass"),),
        _exactly(bytes, lambda data: data.decode("utf-8", "surrogatepass")),
    ),
    bytearray: Form(22, lambda value: (bytes(value),), _exactly(bytes, bytearray)),
    complex: Form(23, attrgetter("real", "imag"), _exactly(float, complex)),
    Decimal: Form(24, lambda value: (str(value),), _exactly(str, Decimal)),
    Fraction: Form(
        25,
        lambda value: _short_ints((value.numerator, value.denominator)),
        _exactly(int, lambda *parts: Fraction(*_short_ints(parts))),
    ),
    range: Form(26, lambda value: _short_ints(_range(value)), lambda *parts: range(*_short_ints(parts))),
    slice: Form(27, _range, slice),
    UUID: Form(28, lambda value: (value.bytes,), _exactly(bytes, lambda data: UUID(bytes=data))),
    PosixPath: Form(29, lambda path: (path.as_posix(),), _exactly(str, Path)),
    WindowsPath: Form(29, lambda path: (path.as_posix(),), _exactly(str, Path)),
    PurePosixPath: Form(30, lambda path: (str(path),), _exactly(str, PurePosixPath)),
    PureWindowsPath: Form(31, lambda path: (str(path),), _exactly(str, PureWindowsPath)),
    date: Form(40, _date, _exactly(int, date)),
    time: Form(41, _time, lambda *parts: time(*parts[:5], fold=parts[5])),
    datetime: Form(42, lambda value: _date(value) + _time(value), lambda *parts: datetime(*parts[:8], fold=parts[8])),
    timedelta: Form(43, attrgetter("days", "seconds", "microseconds"), _exactly(int, timedelta)),
    timezone: Form(44, lambda value: value.__getinitargs__(), timezone),
    ZoneInfo: Form(45, lambda value: (_zone_key(value.key),), lambda key: ZoneInfo(_zone_key(key))),
}
KNOWN = NATIVE | FORMS.keys()
MAKERS: dict[int, Callable[..., object]] = {
    **{form.code: form.make for form in FORMS.values() if form.code},
    packing_numpy.ARRAY: packing_numpy.array,
    packing_numpy.SCALAR: packing_numpy.scalar,
    REGISTERED: _make_registered,
}
