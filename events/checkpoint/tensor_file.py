"""The layout of a tensor file: a safetensors file, so that any reader of those opens it.

Eight bytes with the length of the header, little-endian; the header, JSON; the elements
(https://github.com/huggingface/safetensors, "Format"). Ours is padded with spaces so that the elements begin at a page,
and they stand without gaps, those of the largest items first, so that each tensor is aligned to its item.

What the format has no name for stands in its ``__metadata__`` under ``stagecast``, as JSON: ``aliases`` (tensors that
are the same memory are stored once: the other names lead to that one) and ``views`` (elements stored under another
type, with the name of their own: complex128 as pairs of float64).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from events.checkpoint.disk import PAGE
from events.errors import CheckpointDamaged

ITEM_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2": 1,
    "F8_E5M2FNUZ": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
"""The types of elements that a tensor file holds, by their names in the format, with the bytes of one."""

_HEADER_LIMIT = 100_000_000  # readers of safetensors refuse longer ones


class TensorInfo(msgspec.Struct, frozen=True):
    """One tensor as it is stored."""

    name: str
    dtype: str
    """One of `ITEM_BYTES`."""
    shape: tuple[int, ...]
    view: str = ""
    """The type that its elements really are, where that is not ``dtype``; its last dimension then belongs to it."""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return elements_of(self.shape) * ITEM_BYTES[self.dtype]


def elements_of(shape: Sequence[int], most: int | None = None) -> int:
    """Count the elements of a shape. Linear in its dimensions, whatever they are: a product of many large ones is not.

    Args:
        shape: Dimensions, none of them negative.
        most: Raise once there are more; None counts them all.

    Raises:
        ValueError: There are more than ``most``.
    """
    if 0 in shape:
        return 0
    count = 1
    for size in shape:
        count *= size
        if most is not None and count > most:
            raise ValueError(f"a shape of {len(shape)} dimensions has more than {most:,} elements")
    return count


class Layout(msgspec.Struct, frozen=True):
    """Where everything stands in a tensor file."""

    header: bytes
    """All that comes before the first element; a multiple of a page."""
    offsets: list[int]
    """Of each tensor, in bytes from the file's beginning, in the order in which they were given."""
    nbytes: int
    """Of the whole file."""


class TensorFile(msgspec.Struct, frozen=True):
    """What stands in a tensor file's header."""

    tensors: dict[str, tuple[TensorInfo, int]]
    """Each with its offset in bytes from the file's beginning."""
    aliases: dict[str, str]


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[Annotated[int, Meta(ge=0, lt=2**48)], ...]
    data_offsets: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]


class _Notes(msgspec.Struct, omit_defaults=True):
    aliases: dict[str, str] = {}
    views: dict[str, str] = {}


def lay_out(tensors: Sequence[TensorInfo], aliases: dict[str, str]) -> Layout:
    """Lay out a file.

    Args:
        tensors: Names are unique.
        aliases: Further names of these tensors.
    """
    order = sorted(range(len(tensors)), key=lambda i: -ITEM_BYTES[tensors[i].dtype])  # stable: equal ones stay in order
    begins = [0] * len(tensors)
    header: dict[str, Any] = {}
    notes = _Notes(aliases, {one.name: one.view for one in tensors if one.view})
    if notes.aliases or notes.views:
        header["__metadata__"] = {"stagecast": msgspec.json.encode(notes).decode()}
    end = 0
    for index in order:
        one = tensors[index]
        begins[index] = end
        end += one.nbytes
        header[one.name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": (begins[index], end)}
    text = msgspec.json.encode(header)
    length = -(-(8 + len(text)) // PAGE) * PAGE
    return Layout(
        (length - 8).to_bytes(8, "little") + text.ljust(length - 8),
        [length + begin for begin in begins],
        length + end,
    )


def read_layout(data: memoryview, where: str) -> TensorFile:
    """Read a file's header, ours or another writer's.

    Args:
        data: The whole file.
        where: Its path, for the message.

    Raises:
        CheckpointDamaged: It is no such file, or the header does not go with the file's length.
    """
    try:
        return _read_layout(data)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise CheckpointDamaged(f"{where} is no safetensors file: {error}") from error


def _read_layout(data: memoryview) -> TensorFile:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _HEADER_LIMIT):
        raise ValueError("it is shorter than its header says")
    header = msgspec.json.decode(bytes(data[8 : 8 + length]), type=dict[str, msgspec.Raw])
    metadata = msgspec.json.decode(header.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
    notes = msgspec.json.decode(metadata.get("stagecast", "{}"), type=_Notes)
    begin = 8 + length
    tensors: dict[str, tuple[TensorInfo, int]] = {}
    for name, raw in header.items():
        entry = msgspec.json.decode(raw, type=_Entry)
        first, end = entry.data_offsets
        if entry.dtype not in ITEM_BYTES:
            raise ValueError(f"the tensor {name!r:.200} has the unknown type {entry.dtype!r:.40}")
        try:
            nbytes = elements_of(entry.shape, len(data)) * ITEM_BYTES[entry.dtype]
        except ValueError as error:
            raise ValueError(f"the tensor {name!r:.200} does not fit where it should be: {error}") from None
        if end - first != nbytes or begin + end > len(data):
            shape = f"shape {entry.shape}" if len(entry.shape) <= 8 else f"{len(entry.shape)} dimensions"
            raise ValueError(f"the tensor {name!r:.200} of {shape} does not fit where it should be")
        info = TensorInfo(name, entry.dtype, entry.shape, notes.views.get(name, ""))
        tensors[name] = info, begin + first
    _check_overlaps(tensors)
    for alias, name in notes.aliases.items():
        if name not in tensors or alias in tensors:
            raise ValueError(f"the name {alias!r:.200} leads to no tensor")
    return TensorFile(tensors, notes.aliases)


def _check_overlaps(tensors: dict[str, tuple[TensorInfo, int]]) -> None:
    """See that each byte belongs to one tensor: copies of tensors that share theirs would fill the memory.

    Raises:
        ValueError: One belongs to two.
    """
    places = sorted((offset, offset + info.nbytes, name) for name, (info, offset) in tensors.items() if info.nbytes)
    for (_, end, first), (begin, _, second) in itertools.pairwise(places):
        if begin < end:
            raise ValueError(f"the tensors {first!r:.200} and {second!r:.200} overlap")
