"""The format of all values in a checkpoint that are not tensors: msgpack, exact in value and type, without pickle.

Later versions read this file format forever. They may add codes; a code never changes its meaning.

The file is an array of two: the number of entries in all maps, and the tree. (Readers of msgpack silently keep the last
of two equal keys; the number reveals them.) None, bool, int within 64 bits, float, Unicode str and bytes are written
directly; a list is an array, and a dict with such keys a map. Any other value is an array that starts with its mark, an
extension without payload. The rest of the array, by code:

====  ================  ======================================================================================
code  mark of           rest of the array
====  ================  ======================================================================================
1     tuple             its items; so for 2 set, 3 frozenset
4     deque             its items, then its maxlen
10    dict              key, value, key, value ... in their order; so for 11 OrderedDict, 12 Counter
20    int               bytes: two's complement, little-endian; only beyond 64 bits
21    str               bytes: UTF-8, a lone surrogate as three; only with surrogates, or 2**30 characters
22    bytearray         bytes
23    complex           real, imaginary
24    Decimal           str
25    Fraction          numerator, denominator
26    range             start, stop, step; so for 27 slice
28    UUID              bytes, big-endian
29    Path              str with forward slashes; read as a path of the reading system
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
61    registered type   its name (`register`), the result of its ``to_plain``
====  ================  ======================================================================================

A dtype is NumPy's protocol string (``"<f4"``, ``">M8[s]"``), a list of base and dimensions for a subarray, or a map of
names, formats, offsets and itemsize for a structure. It is read as an equal dtype: longlong as int64.

Any thread. A value that occurs twice in the tree is written twice.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import msgspec
from msgspec.msgpack import Ext

from events.checkpoint import packing_numpy, packing_types
from events.checkpoint.packing_types import ATOMS, FORMS, KNOWN, MAKERS, NATIVE, name_of
from events.checkpoint.packing_types import register as register
from events.errors import CheckpointDamaged, UnstorableState
from events.msgpack_keys import ALWAYS_FITS_BYTES, check_keys
from events.text import is_encodable

MAX_DEPTH = 200
"""Maximum levels of containers per tree."""

_PAIRS, _RECORDS, _TENSOR = 10, 20, 60  # codes; the first two start a group
_BYTES_LIMIT = 2**32 - 1  # msgpack's
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1
_HERE = object()  # the label of a part that shares the path of the whole

# Errors of damaged content, and of a machine without a needed module or file.
_UNREADABLE = (ValueError, TypeError, ArithmeticError, OSError, RecursionError)
_LACKING = (LookupError, ImportError)


def encode(tree: object, place: Callable[[str, object], str | None] | None = None, at: str = "") -> bytes:
    """Encode a tree of plain values.

    Args:
        tree: The values, of the types in the table above. Types are matched exactly: a subclass is another type.
        place: Receives path and value of every value of another type. Returns the name in the tensor file for a
            tensor, otherwise None.
        at: The path of ``tree``; paths continue it with keys and indices: ``optimizers.0.state.5.exp_avg``.

    Raises:
        UnstorableState: A value has another type, contains itself, or is too deep; names path, type and fix.
    """
    writer = _Writer(place, at)
    packed = writer.pack(tree)
    return msgspec.msgpack.encode([writer.entries, packed])


def check_readable(data: bytes, what: str) -> None:
    """Check that `decode` accepts the result of `encode`. Takes half as long as encoding: not for the loop.

    Args:
        what: The state, for the message.

    Raises:
        UnstorableState: Its many small values would take more memory than `decode` allows.
    """
    if len(data) > ALWAYS_FITS_BYTES:
        try:
            check_keys(data)
        except ValueError as error:
            raise UnstorableState(
                f"{what} has too many small values: {error}; keep them as a tensor or an array"
            ) from error


def decode(data: bytes | memoryview, tensor: Callable[[str], object] | None = None) -> Any:
    """Decode the result of `encode`, to the same values of the same types.

    No name in the data is imported or called, except registered ones. Memory is a small multiple of the data's length.

    Args:
        data: The bytes.
        tensor: Returns the tensor of a name. Its LookupError, ValueError, TypeError or OSError becomes
            `CheckpointDamaged`.

    Raises:
        CheckpointDamaged: The bytes are not such a tree, or a value needs a registered type, NumPy or a time zone that
            does not exist here. Names path and fix.
    """
    reader = _Reader(tensor)
    try:
        check_keys(data)
        raw = msgspec.msgpack.decode(data)
    except _UNREADABLE as error:
        raise reader.damaged(str(error)) from error
    if type(raw) is not list or len(raw) != 2 or type(raw[0]) is not int:
        raise reader.damaged("it is not an array of a number and a tree")
    tree = reader.unpack(raw[1])
    if reader.entries != raw[0]:
        raise reader.damaged(f"its maps have {reader.entries} entries, and {raw[0]} were written")
    return tree


def _is_native(value: object) -> bool:
    """Whether msgpack holds the value as it is."""
    if type(value) is str:
        return len(value) < 2**30 and (value.isascii() or is_encodable(value))
    if type(value) is int:
        return _INT_MIN <= value <= _INT_MAX
    if type(value) is bytes:
        return len(value) <= _BYTES_LIMIT
    return type(value) in ATOMS


class _Writer:
    """Turns a tree into values that msgspec can write. One Python frame per level, because trees may be deep."""

    def __init__(self, place: Callable[[str, object], str | None] | None, at: str) -> None:
        self.place = place
        self.labels: list[object] = [at] if at else []  # the path to the current value
        self.open: dict[int, int] = {}  # ids of the values around it, with the lengths of their paths
        self.entries = 0

    def pack(self, value: object) -> object:
        if _is_native(value):
            return value
        packed: dict[object, object] | list[object]
        self.enter(value)
        if type(value) is dict and all(map(_is_native, value)):
            packed = {}
            for key, item in value.items():
                self.labels[-1] = key
                packed[key] = self.pack(item)
            self.entries += len(packed)
        else:
            code, parts = self.parts(value)
            packed = [Ext(code, b"")] if code else []
            if _all_native(parts):
                packed += parts  # the fast path of long sequences of numbers
            else:
                for index, part in enumerate(parts):
                    self.labels[-1] = _label(code, index, cast("Sequence[object]", parts))
                    packed.append(self.pack(part))
        self.labels.pop()
        del self.open[id(value)]
        return packed

    def enter(self, value: object) -> None:
        if id(value) in self.open:
            whole = _path(self.labels[: self.open[id(value)]]) or "the whole state"
            raise self.refused(value, f"it is {whole} again, which contains it; remove one of them")
        if len(self.open) >= MAX_DEPTH:
            raise self.refused(value, f"it is more than {MAX_DEPTH} levels deep; make the state flatter")
        self.open[id(value)] = len(self.labels)
        self.labels.append(_HERE)

    def parts(self, value: object) -> tuple[int, Collection[object]]:
        kind = type(value)
        form = FORMS.get(kind) or packing_types.registered.get(kind)
        try:
            if form is not None:
                return form.code, form.split(value)
            if kind.__module__ == "numpy" and (parts := packing_numpy.parts_of(value)) is not None:
                return parts
        except ValueError as error:
            raise self.refused(value, str(error)) from error
        name = self.place(_path(self.labels), value) if self.place is not None else None
        if name is None:
            raise self.refused(value, _reason(kind))
        return _TENSOR, (name,)

    def refused(self, value: object, why: str) -> UnstorableState:
        where = _short(_path(self.labels)) or "the state"
        return UnstorableState(f"{where} is a {name_of(type(value))} that cannot be stored: {why}")


class _Reader:
    """Turns the values that msgspec has read into the tree; lists and maps in place."""

    def __init__(self, tensor: Callable[[str], object] | None) -> None:
        self.tensor = tensor
        self.labels: list[object] = []
        self.entries = 0

    def unpack(self, raw: object) -> object:
        if type(raw) in NATIVE:
            return raw
        if type(raw) is Ext and raw.code not in MAKERS and raw.code != _TENSOR:
            raise self.unknown(raw.code)
        if len(self.labels) >= MAX_DEPTH:
            raise self.damaged(f"it is more than {MAX_DEPTH} levels deep")
        self.labels.append(_HERE)
        made: object = raw
        if type(raw) is dict:
            if not NATIVE.issuperset(map(type, raw)):
                raise self.damaged("it is a map with keys that are never written in a map")
            self.entries += len(raw)
            for key, item in raw.items():
                if type(item) not in NATIVE:
                    self.labels[-1] = key
                    raw[key] = self.unpack(item)
            self.labels.pop()
        elif type(raw) is list:
            marked = bool(raw) and type(raw[0]) is Ext and not raw[0].data
            code, parts = (raw[0].code, raw[1:]) if marked else (0, raw)
            for index, part in enumerate(parts):
                if type(part) not in NATIVE:
                    self.labels[-1] = _label(code, index, parts)
                    parts[index] = self.unpack(part)
            self.labels.pop()
            made = self.make(code, parts) if marked else parts
        else:
            raise self.damaged(f"msgpack's {type(raw).__name__} is never written here")
        return made

    def make(self, code: int, parts: list[object]) -> object:
        make = self.placed if code == _TENSOR else MAKERS.get(code)
        if make is None:
            raise self.unknown(code)
        try:
            return make(parts) if code < _RECORDS else make(*parts)
        except _UNREADABLE as error:
            raise self.damaged(f"{error} (code {code})") from error
        except _LACKING as error:
            raise self.damaged(f"{error} (code {code})", "provide that, or load an older checkpoint") from error

    def placed(self, name: object) -> object:
        if self.tensor is None or type(name) is not str:
            raise LookupError(f"it is the tensor {name!r}, which does not exist")
        return self.tensor(name)

    def unknown(self, code: int) -> CheckpointDamaged:
        return self.damaged(f"a newer version wrote it, with the unknown code {code}", "update stagecast")

    def damaged(self, why: str, remedy: str = "load an older checkpoint") -> CheckpointDamaged:
        where = _short(_path(self.labels)) or "the state"
        return CheckpointDamaged(f"{where} cannot be restored: {_short(why)}; {remedy}")


def _all_native(parts: Collection[object]) -> bool:
    """Whether the parts are numbers of one kind that are written as they are; fast, and False for all others."""
    kinds = set(map(type, parts))
    if kinds == {int}:
        numbers = cast("Collection[int]", parts)
        return min(numbers) >= _INT_MIN and max(numbers) <= _INT_MAX
    return kinds <= ATOMS


# ------------------------------------------------------------------------------------------------ paths and text


def _label(code: int, index: int, parts: Sequence[object]) -> object:
    """Return a part's label in the path: its index in a sequence, its key in pairs, none in a record."""
    if code < _PAIRS:
        return index
    return parts[index - 1] if code < _RECORDS and index % 2 else _HERE


def _path(labels: list[object]) -> str:
    return ".".join([_text(label) for label in labels if label is not _HERE])


def _text(label: object) -> str:
    try:
        return label if type(label) is str else repr(label)
    except ValueError:  # Python refuses to print thousands of digits
        return f"<{name_of(type(label))}>"


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-100:]}"


def _reason(kind: type) -> str:
    if kind is bytes:
        return "it has 4 GiB or more; make it a tensor"
    if issubclass(kind, enum.Enum):
        instead = "a member of an enum; store its value or name"
    elif (base := next((base for base in kind.__mro__ if base in KNOWN), None)) is not None:
        instead = f"not exactly a {name_of(base)}; store one"
    else:
        instead = "not a plain value; store plain values"
    return f"it is {instead} instead, or add this type with `register`"
