"""The layout of a tensor file, which is a safetensors file for any reader.

Eight bytes with the length of the header, little-endian; the header, JSON; the elements
(https://github.com/huggingface/safetensors, "Format"). Our header is padded with spaces so that the elements start at a
page; they follow without gaps, the largest items first, so that each tensor is aligned to its item.

``stagecast`` in the ``__metadata__`` holds, as JSON, ``aliases`` (tensors that share memory are stored once, under one
name) and ``views`` (the real types of elements that are stored as another type: complex128 as pairs of float64).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated

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
"""Bytes per element, by the type's name in the format."""

_HEADER_LIMIT = 100_000_000  # readers of safetensors refuse longer headers


class TensorInfo(msgspec.Struct, frozen=True):
    """One tensor as it is stored."""

    name: str
    dtype: str
    """One of `ITEM_BYTES`."""
    shape: tuple[int, ...]
    view: str = ""
    """Real type of the elements, if not ``dtype``; its last dimension is then part of the element."""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return elements_of(self.shape) * ITEM_BYTES[self.dtype]


def elements_of(shape: Sequence[int], most: int | None = None) -> int:
    """Count the elements of a shape, in linear time even for many large dimensions.

    Args:
        shape: Dimensions, none of them negative.
        most: Maximum elements; None for any.

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
    """The offsets in a tensor file."""

    header: bytes
    """All bytes before the first element; a multiple of a page."""
    offsets: list[int]
    """Of each given tensor, in bytes from the start of the file."""
    nbytes: int
    """Of the whole file."""


class TensorFile(msgspec.Struct, frozen=True):
    """The content of a tensor file's header."""

    tensors: dict[str, tuple[TensorInfo, int]]
    """Each with its offset in bytes from the start of the file."""
    aliases: dict[str, str]


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[Annotated[int, Meta(ge=0, lt=2**48)], ...]
    data_offsets: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]


class _Notes(msgspec.Struct, omit_defaults=True):
    aliases: dict[str, str] = {}
    views: dict[str, str] = {}


def lay_out(
    tensors: Sequence[TensorInfo], aliases: dict[str, str], metadata: Mapping[str, str] | None = None
) -> Layout:
    """Lay out a file.

    Args:
        tensors: Names are unique.
        aliases: Further names of these tensors.
        metadata: Further entries of ``__metadata__``.
    """
    order = sorted(range(len(tensors)), key=lambda i: -ITEM_BYTES[tensors[i].dtype])  # stable: equal ones stay in order
    begins = [0] * len(tensors)
    header: dict[str, object] = {}
    notes = _Notes(aliases, {one.name: one.view for one in tensors if one.view})
    texts = dict(metadata or {})
    if notes.aliases or notes.views:
        texts["stagecast"] = msgspec.json.encode(notes).decode()
    if texts:
        header["__metadata__"] = texts
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
        CheckpointDamaged: The data is not such a file, or the header contradicts its length.
    """
    try:
        return _read_layout(data)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise CheckpointDamaged(f"{where} is not a safetensors file: {error}") from error


def _read_layout(data: memoryview) -> TensorFile:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _HEADER_LIMIT):
        raise ValueError("it is shorter than its header requires")
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
            raise ValueError(f"the alias {alias!r:.200} has no tensor, or is the name of one")
    return TensorFile(tensors, notes.aliases)


def _check_overlaps(tensors: dict[str, tuple[TensorInfo, int]]) -> None:
    """Check that tensors do not overlap: copies of overlapping ones could fill the memory.

    Raises:
        ValueError: Two tensors overlap.
    """
    places = sorted((offset, offset + info.nbytes, name) for name, (info, offset) in tensors.items() if info.nbytes)
    for (_, end, first), (begin, _, second) in itertools.pairwise(places):
        if begin < end:
            raise ValueError(f"the tensors {first!r:.200} and {second!r:.200} overlap")
