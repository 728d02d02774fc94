"""The form in which a checkpoint keeps everything that is no tensor: msgpack, exact in value and type, no pickle.

This is a file format: later versions read it forever. They may add codes; a code never changes its meaning.

The file is an array of two: the number of entries in all its maps, and the tree. (Readers of msgpack keep the last of
two equal keys and say nothing; the number gives them away.) None, bool, int within 64 bits, float, Unicode str and
bytes stand in the tree as they are; a list is an array, a dict whose keys are such values a map. Anything else is an
array that begins with its mark, an extension without payload. What follows the mark, by its code:

====  ================  ======================================================================================
code  mark of           what follows in the array
====  ================  ======================================================================================
1     tuple             its items; so for 2 set, 3 frozenset
4     deque             its items, then its maxlen
10    dict              key, value, key, value ... in their order; so for 11 OrderedDict, 12 Counter
20    int               bytes: two's complement, little-endian; only where 64 bits do not hold it
21    str               bytes: UTF-8, each lone surrogate as three; only where there are some, or 2**30 characters
22    bytearray         bytes
23    complex           real, imaginary
24    Decimal           str
25    Fraction          numerator, denominator
26    range             start, stop, step; so for 27 slice
28    UUID              bytes, big-endian
29    Path              str with forward slashes; comes back as a path of the system that reads it
30    PurePosixPath     str; so for 31 PureWindowsPath
40    date              year, month, day
41    time              hour, minute, second, microsecond, tzinfo, fold
42    datetime          year, month, day, hour, minute, second, microsecond, tzinfo, fold
43    timedelta         days, seconds, microseconds
44    timezone          offset (a timedelta), then its name if it has one
45    ZoneInfo          key
50    NumPy array       dtype, tuple of its dimensions, bytes of the elements in C order
51    NumPy scalar      dtype, its bytes; for str_ ``"U"`` and a str, for bytes_ ``"S"`` and its bytes
60    tensor            its name in the tensor file
61    registered type   the name under which it was taught with `register`, what its ``to_plain`` gave
====  ================  ======================================================================================

A dtype is NumPy's protocol string (``"<f4"``, ``">M8[s]"``), a list of base and dimensions for a subarray, or a map of
names, formats, offsets and itemsize for a structure. An equal dtype comes back: longlong as int64.

All functions may be called from any thread. A value that the tree holds twice is written twice.
"""

from __future__ import annotations

import enum
import re
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from operator import attrgetter
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from types import NoneType
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
from msgspec.msgpack import Ext

from events.checkpoint import packing_numpy
from events.errors import CheckpointDamaged, UnstorableState
from events.hash_tables import SAME_HASH, check_hashes
from events.msgpack_keys import ALWAYS_FITS_BYTES, check_keys

MAX_DEPTH = 200
"""Levels of containers in containers that a tree may have."""

_PAIRS, _RECORDS, _TENSOR, _REGISTERED = 10, 20, 60, 61  # codes; the first two begin a group
_BYTES_LIMIT = 2**32 - 1  # msgpack's
_INT_BITS = 4_096
"""Maximum bits per integer in a type that computes with several: a fraction, a range."""
_SALTED = frozenset({str, bytes, NoneType, bool})  # their hashes differ from process to process, or they are few
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1
_ATOMS = frozenset({NoneType, bool, float})  # each value of these is written as it is
_NATIVE = _ATOMS | {int, str, bytes}
_HERE: Any = object()  # the label of a part that shares the path of the whole
_ZONE = re.compile(r"[\w+-]+(/[\w+-]+)*", re.ASCII)  # nothing that leaves the folder of time zones

_packer = msgspec.msgpack.Encoder()
_unpacker = msgspec.msgpack.Decoder()

# What damaged content raises when it is read and made into values, and what a machine that lacks something does.
_UNREADABLE = (ValueError, TypeError, ArithmeticError, OSError, RecursionError)
_LACKING = (LookupError, ImportError)


class _Form(NamedTuple):
    """How the values of a type are written."""

    code: int  # 0: no mark
    take: Callable[[Any], Collection[Any]]  # gives the parts; ValueError says why this value has none
    make: Callable[..., Any]  # of the list of parts, from code 20 on of the parts


_taught: dict[type, _Form] = {}
_taught_names: dict[str, tuple[type, Callable[[Any], Any]]] = {}


def encode(tree: Any, place: Callable[[str, Any], str | None] | None = None, at: str = "") -> bytes:
    """Encode a tree of plain values.

    Args:
        tree: The values, of the types in the table above. Types are matched exactly: a subclass is another type.
        place: Is asked, with path and value, about every value of another type. For a tensor it returns the name
            under which the tensor file will hold it, otherwise None.
        at: The path of ``tree``; paths continue it with keys and indices: ``optimizers.0.state.5.exp_avg``.

    Raises:
        UnstorableState: A value is of no such type, holds itself, or lies too deep; names the path, the type and what
            to do.
    """
    writer = _Writer(place, at)
    packed = writer.pack(tree)
    return _packer.encode([writer.entries, packed])


def check_readable(data: bytes, what: str) -> None:
    """Check that `decode` will take what `encode` returned. Takes half as long as encoding it: not for the loop.

    Args:
        what: The state, for the message.

    Raises:
        UnstorableState: It has so many small values that decoding it would take more memory than `decode` allows.
    """
    if len(data) > ALWAYS_FITS_BYTES:
        try:
            check_keys(data)
        except ValueError as error:
            raise UnstorableState(
                f"{what} has too many small values: {error}; keep them as a tensor or an array"
            ) from error


def decode(data: bytes | memoryview, tensor: Callable[[str], Any] | None = None) -> Any:
    """Decode what `encode` gave, to the same values of the same types.

    Nothing that the data names is imported or called, except what was given to `register` under that name. Memory
    is a small multiple of the length of the data.

    Args:
        data: The bytes.
        tensor: Gives the tensor of a name. If it raises that there is none (a LookupError, ValueError, TypeError or
            OSError), this comes out as `CheckpointDamaged`.

    Raises:
        CheckpointDamaged: The bytes are no such tree, or what one of its values needs is not there: a registered
            type, NumPy, a time zone. Names the path and what to do.
    """
    reader = _Reader(tensor)
    try:
        check_keys(data)
        raw = _unpacker.decode(data)
    except _UNREADABLE as error:
        raise reader.damaged(str(error)) from error
    if type(raw) is not list or len(raw) != 2 or type(raw[0]) is not int:
        raise reader.damaged("it is not an array of a number and a tree")
    tree = reader.unpack(raw[1])
    if reader.entries != raw[0]:
        raise reader.damaged(f"its maps have {reader.entries} entries, and {raw[0]} were written")
    return tree


def register(kind: type, name: str, to_plain: Callable[[Any], Any], from_plain: Callable[[Any], Any]) -> None:
    """Teach a type that is not in the table above: best in the module that defines it.

    Args:
        kind: The type; its subclasses are not included.
        name: What stands for the type in the file, such as ``"myproject.Vocabulary"``. A type that is registered
            under a second name is written under that one and still read under both.
        to_plain: Gives what to store: values of the types in the table, of registered types, tensors.
        from_plain: Gives the value back.

    Raises:
        ValueError: The type is in the table, or the name is that of another type. (A class that was defined again,
            in a notebook or by a reload, is the same type.)
    """
    if kind in _KNOWN:
        raise ValueError(f"{_name(kind)} is stored without being registered; register types of your own")
    other, _ = _taught_names.get(name, (kind, None))
    if _name(other) != _name(kind):
        raise ValueError(f"the name {name!r} is that of {_name(other)}; choose another one for {_name(kind)}")

    def take(value: Any) -> tuple[str, Any]:
        try:
            return name, to_plain(value)
        except Exception as error:  # somebody else's code: told with the path, the cause chained
            raise ValueError(f"its to_plain raised {error!r}; correct that") from error

    _taught[kind] = _Form(_REGISTERED, take, _from_taught)
    _taught_names[name] = kind, from_plain


class _Writer:
    """Turns a tree into what msgspec writes as it is. One Python frame a level: trees may be deep."""

    def __init__(self, place: Callable[[str, Any], str | None] | None, at: str) -> None:
        self.place = place
        self.labels: list[Any] = [at] if at else []  # the path to the value at hand
        self.open: dict[int, int] = {}  # ids of the values we are in; how many labels lead there
        self.entries = 0

    def pack(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is str:
            if len(value) < 2**30 and (value.isascii() or _is_unicode(value)):
                return value
        elif kind is int:
            if _INT_MIN <= value <= _INT_MAX:
                return value
        elif kind is bytes and len(value) <= _BYTES_LIMIT:
            return value
        packed: Any
        self.enter(value)
        if kind is dict and _NATIVE.issuperset(map(type, value)) and all(self.pack(key) is key for key in value):
            packed = {}
            for key, item in value.items():
                self.labels[-1] = key
                packed[key] = self.pack(item)
            self.entries += len(packed)
        else:
            code, parts = self.parts(value)
            packed = [Ext(code, b"")] if code else []
            kinds = set(map(type, parts))
            if kinds <= _ATOMS or (kinds == {int} and min(parts) >= _INT_MIN and max(parts) <= _INT_MAX):
                packed += parts  # the fast path of long sequences of numbers
            else:
                for index, part in enumerate(parts):
                    self.labels[-1] = _label(code, index, parts)
                    packed.append(self.pack(part))
        self.labels.pop()
        del self.open[id(value)]
        return packed

    def enter(self, value: Any) -> None:
        if id(value) in self.open:
            whole = _path(self.labels[: self.open[id(value)]]) or "the whole state"
            raise self.refused(value, f"it is {whole} again, which holds it; leave one of them out")
        if len(self.open) >= MAX_DEPTH:
            raise self.refused(value, f"it lies more than {MAX_DEPTH} levels deep; make the state flatter")
        self.open[id(value)] = len(self.labels)
        self.labels.append(_HERE)

    def parts(self, value: Any) -> tuple[int, Any]:
        kind = type(value)
        form = _FORMS.get(kind) or _taught.get(kind)
        try:
            if form is not None:
                return form.code, form.take(value)
            if kind.__module__ == "numpy" and (parts := packing_numpy.parts_of(value)) is not None:
                return parts
        except ValueError as error:
            raise self.refused(value, str(error)) from error
        name = self.place(_path(self.labels), value) if self.place is not None else None
        if name is None:
            raise self.refused(value, _reason(kind))
        return _TENSOR, (name,)

    def refused(self, value: Any, why: str) -> UnstorableState:
        where = _short(_path(self.labels)) or "the state"
        return UnstorableState(f"{where} is a {_name(type(value))} that cannot be stored: {why}")


class _Reader:
    """Turns what msgspec read into the tree, lists and maps in place."""

    def __init__(self, tensor: Callable[[str], Any] | None) -> None:
        self.tensor = tensor
        self.labels: list[Any] = []
        self.entries = 0

    def unpack(self, raw: Any) -> Any:
        kind = type(raw)
        if kind in _NATIVE:
            return raw
        if kind is Ext and raw.code not in _MAKERS:
            raise self.unknown(raw.code)
        if kind is not list and kind is not dict:
            raise self.damaged(f"msgpack's {kind.__name__} is never written there")
        if len(self.labels) >= MAX_DEPTH:
            raise self.damaged(f"it lies more than {MAX_DEPTH} levels deep, where nothing is written")
        self.labels.append(_HERE)
        if kind is dict:
            if not _NATIVE.issuperset(map(type, raw)):
                raise self.damaged("it is a map with keys that are never written so")
            self.entries += len(raw)
            for key, item in raw.items():
                if type(item) not in _NATIVE:
                    self.labels[-1] = key
                    raw[key] = self.unpack(item)
            self.labels.pop()
            return raw
        marked = bool(raw) and type(raw[0]) is Ext and not raw[0].data
        code, parts = (raw[0].code, raw[1:]) if marked else (0, raw)
        for index, part in enumerate(parts):
            if type(part) not in _NATIVE:
                self.labels[-1] = _label(code, index, parts)
                parts[index] = self.unpack(part)
        self.labels.pop()
        return self.make(code, parts) if marked else parts

    def make(self, code: int, parts: list[Any]) -> Any:
        if code not in _MAKERS:
            raise self.unknown(code)
        make = self.placed if code == _TENSOR else _MAKERS[code]
        try:
            return make(parts) if code < _RECORDS else make(*parts)
        except _UNREADABLE as error:
            raise self.damaged(f"{error} (code {code})") from error
        except _LACKING as error:
            raise self.damaged(f"{error} (code {code})", "provide that, or load an older checkpoint") from error

    def placed(self, name: Any) -> Any:
        if self.tensor is None or type(name) is not str:
            raise LookupError(f"it is the tensor {name!r}, and there is none")
        return self.tensor(name)

    def unknown(self, code: int) -> CheckpointDamaged:
        return self.damaged(f"a newer version wrote it, with the unknown code {code}", "update stagecast")

    def damaged(self, why: str, remedy: str = "load an older checkpoint") -> CheckpointDamaged:
        where = _short(_path(self.labels)) or "the state"
        return CheckpointDamaged(f"{where} cannot be restored: {_short(why)}; {remedy}")


# ------------------------------------------------------------------------------------------------ paths and text


def _label(code: int, index: int, parts: Any) -> Any:
    """What leads to one of the parts: the index in a sequence, the key in pairs, nothing in a record."""
    if code < _PAIRS:
        return index
    return parts[index - 1] if code < _RECORDS and index % 2 else _HERE


def _path(labels: list[Any]) -> str:
    return ".".join([_text(label) for label in labels if label is not _HERE])


def _text(label: Any) -> str:
    try:
        return label if type(label) is str else repr(label)
    except ValueError:  # Python refuses to write out thousands of digits
        return f"<{_name(type(label))}>"


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-100:]}"


def _name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _reason(kind: type) -> str:
    if kind is bytes:
        return "it has 4 GiB or more; make it a tensor"
    if issubclass(kind, enum.Enum):
        instead = "a member of an enum; store its value or name"
    elif (base := next((base for base in kind.__mro__ if base in _KNOWN), None)) is not None:
        instead = f"not exactly a {_name(base)}; store one"
    else:
        instead = "no plain value; store plain values"
    return f"it is {instead} instead, or teach checkpoints this type with `register`"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ----------------------------------------------------------------------------------------------------- the types


def _items(mapping: Any) -> list[Any]:
    _spread(list(mapping))
    return [part for pair in mapping.items() for part in pair]


def _check_keys(keys: list[Any], *, of_set: bool = False) -> None:
    """Refuse keys of a stranger whose table takes quadratic time, before it is built."""
    if len(keys) > SAME_HASH and not _SALTED.issuperset(map(type, keys)):
        check_hashes(list(map(hash, keys)), of_set=of_set)


def _spread(keys: Collection[Any]) -> Collection[Any]:
    """Refuse own keys of one hash, which could not be read again. Only made-up ones (big integers) have many."""
    if len(keys) > SAME_HASH and not _SALTED.issuperset(map(type, keys)):
        hashed, count = Counter(map(hash, keys)).most_common(1)[0]
        if count > SAME_HASH:
            raise ValueError(f"{count:,} of its keys have one hash, {hashed}; use keys that differ in theirs")
    return keys


def _short_ints(kind: Any) -> Callable[..., Any]:
    """Bound the length of a type's integers, whose arithmetic takes quadratic time."""

    def make(*parts: Any) -> Any:
        _check_ints(parts)
        return kind(*parts)

    return make


def _check_ints(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    longest = max((part.bit_length() for part in parts if type(part) is int), default=0)
    if longest > _INT_BITS:
        raise ValueError(f"it has an integer of {longest:,} bits, more than {_INT_BITS:,}; store it as an int or text")
    return parts


def _pairs(kind: type) -> Callable[[list[Any]], Any]:
    def make(parts: list[Any]) -> Any:
        keys = parts[::2]
        _check_keys(keys)
        pairs = dict(zip(keys, parts[1::2], strict=True))
        if 2 * len(pairs) != len(parts):
            raise ValueError("it has equal keys")
        return kind(pairs)

    return make


def _members(kind: type) -> Callable[[list[Any]], Any]:
    def make(parts: list[Any]) -> Any:
        _check_keys(parts, of_set=True)
        members = kind(parts)
        if len(members) != len(parts):
            raise ValueError("it has equal members")
        return members

    return make


def _deque(parts: list[Any]) -> deque[Any]:
    *items, maxlen = parts
    if maxlen is not None and maxlen < len(items):
        raise ValueError("it has more items than its maxlen")
    return deque(items, maxlen)


def _exactly(kind: type, make: Callable[..., Any]) -> Callable[..., Any]:
    """Guard what would take other types, too: it may compute the digits of "1e999999999", or 10**9 zero bytes."""

    def checked(*parts: Any) -> Any:
        if not {kind}.issuperset(map(type, parts)):
            raise TypeError(f"it has parts that are no {kind.__name__}")
        return make(*parts)

    return checked


def _zone_key(key: Any) -> str:
    if type(key) is not str or _ZONE.fullmatch(key) is None:
        raise ValueError(f"{key!r} names no time zone of the IANA database")
    return key


def _from_taught(name: str, plain: Any) -> Any:
    if name not in _taught_names:
        raise LookupError(f"no type is registered as {name!r}: the module that registers it is not imported")
    try:
        return _taught_names[name][1](plain)
    except Exception as error:  # somebody else's code, given what may be damaged: told with the path, the cause chained
        raise ValueError(f"from_plain of {name!r} raised {error!r}") from error


_range = attrgetter("start", "stop", "step")
_date = attrgetter("year", "month", "day")
_time = attrgetter("hour", "minute", "second", "microsecond", "tzinfo", "fold")

_FORMS: dict[type, _Form] = {
    list: _Form(0, lambda value: value, list),
    tuple: _Form(1, lambda value: value, tuple),
    set: _Form(2, _spread, _members(set)),
    frozenset: _Form(3, _spread, _members(frozenset)),
    deque: _Form(4, lambda value: [*value, value.maxlen], _deque),
    dict: _Form(10, _items, _pairs(dict)),
    OrderedDict: _Form(11, _items, _pairs(OrderedDict)),
    Counter: _Form(12, _items, _pairs(Counter)),
    int: _Form(
        20,
        lambda value: (value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True),),
        _exactly(bytes, lambda data: int.from_bytes(data, "little", signed=True)),
    ),
    str: _Form(
        21,
        lambda value: (value.encode("utf-8", "surrogatepass"),),
        _exactly(bytes, lambda data: data.decode("utf-8", "surrogatepass")),
    ),
    bytearray: _Form(22, lambda value: (bytes(value),), _exactly(bytes, bytearray)),
    complex: _Form(23, attrgetter("real", "imag"), _exactly(float, complex)),
    Decimal: _Form(24, lambda value: (str(value),), _exactly(str, Decimal)),
    Fraction: _Form(
        25,
        lambda value: _check_ints((value.numerator, value.denominator)),
        _exactly(int, _short_ints(Fraction)),
    ),
    range: _Form(26, lambda value: _check_ints(_range(value)), _short_ints(range)),
    slice: _Form(27, _range, slice),
    UUID: _Form(28, lambda value: (value.bytes,), _exactly(bytes, lambda data: UUID(bytes=data))),
    PosixPath: _Form(29, lambda path: (path.as_posix(),), _exactly(str, Path)),
    WindowsPath: _Form(29, lambda path: (path.as_posix(),), _exactly(str, Path)),
    PurePosixPath: _Form(30, lambda path: (str(path),), _exactly(str, PurePosixPath)),
    PureWindowsPath: _Form(31, lambda path: (str(path),), _exactly(str, PureWindowsPath)),
    date: _Form(40, _date, _exactly(int, date)),
    time: _Form(41, _time, lambda *parts: time(*parts[:5], fold=parts[5])),
    datetime: _Form(42, lambda value: _date(value) + _time(value), lambda *parts: datetime(*parts[:8], fold=parts[8])),
    timedelta: _Form(43, attrgetter("days", "seconds", "microseconds"), _exactly(int, timedelta)),
    timezone: _Form(44, lambda value: value.__getinitargs__(), timezone),
    ZoneInfo: _Form(45, lambda value: (_zone_key(value.key),), lambda key: ZoneInfo(_zone_key(key))),
}
_KNOWN = _NATIVE | _FORMS.keys()
_MAKERS: dict[int, Callable[..., Any]] = {
    **{form.code: form.make for form in _FORMS.values() if form.code},
    packing_numpy.ARRAY: packing_numpy.array,
    packing_numpy.SCALAR: packing_numpy.scalar,
    _TENSOR: _Reader.placed,
    _REGISTERED: _from_taught,
}
