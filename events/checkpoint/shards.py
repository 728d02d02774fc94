"""A sharded checkpoint: which rank's file holds which part of which tensor, and how the ranks write it together.

``shards.json`` has a row per part::

    {"shards":{"world_size":2,"chunks":[[0,"module.a.weight",[6,4],[0,0],[3,4],"F32",""],...]},"xxh3_128":"..."}

Rank 0's parts are in ``tensors.safetensors``, those of rank K in ``rank-K.safetensors``, under the tensor's name. All
that the ranks have in common is rank 0's. ``rank-K.msgpack`` holds the state that rank K has for itself.

**Commit**, without a collective: the writer of rank 0 creates the temporary folder and names it to the others
(`Begun`). Each of them writes its files and a signed note of them, and answers with the note's hash (`Written`), or
that it takes no part (`Left`). Once all have answered, rank 0 checks the notes, and commits or abandons the checkpoint.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from events.checkpoint.manifest import TENSORS_NAME, FileEntry, sign, signed_in
from events.checkpoint.tensor_file import ITEM_BYTES, TensorFile, TensorInfo, elements_of, read_layout
from events.errors import CheckpointDamaged

SHARDS_NAME = "shards.json"
_Size = Annotated[int, Meta(ge=0, lt=2**48)]
_Rank = Annotated[int, Meta(ge=0, lt=2**20)]


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A part of a tensor, a box of its elements."""

    rank: _Rank
    """Whose file holds it."""
    name: str
    shape: tuple[_Size, ...]
    """Of the whole tensor, in elements of its real type."""
    offsets: tuple[_Size, ...]
    """First element of the part, per dimension."""
    sizes: tuple[_Size, ...]
    """Elements of the part, per dimension."""
    dtype: str
    view: str = ""
    """As in `events.checkpoint.tensor_file.TensorInfo`."""


class Shards(msgspec.Struct, frozen=True):
    """All parts of all tensors."""

    world_size: Annotated[int, Meta(ge=1, lt=2**20)]
    chunks: list[Chunk]
    aliases: dict[str, str] = {}
    """Names of tensors that share another's memory and are stored once."""


class RankNote(msgspec.Struct, frozen=True):
    """What a rank has written for a checkpoint."""

    rank: _Rank
    files: dict[str, FileEntry]
    chunks: list[Chunk]
    aliases: dict[str, str]


class Begun(msgspec.Struct, frozen=True, tag=True):
    """Rank 0 has created the folder of a checkpoint."""

    folder: str
    """Its name within the folder of checkpoints."""


class Written(msgspec.Struct, frozen=True, tag=True):
    """A rank has written its files durably, and a note of them."""

    note: FileEntry


class Left(msgspec.Struct, frozen=True, tag=True):
    """A rank takes no part in a checkpoint, which the others abandon."""

    error: str = ""
    """Its failure; empty: both of its copies in memory are still being written."""


class Mailbox(Protocol):
    """The messages of the ranks about one checkpoint, one per rank. Any thread; no call waits for another rank.

    Every method may raise `RuntimeError`: the ranks cannot reach each other.
    """

    def send(self, message: Begun | Written | Left) -> None:
        """Set the message of this rank, in place of an earlier one."""

    def look(self, rank: int) -> Begun | Written | Left | None:
        """Return the message of a rank; None before it has sent one."""
        ...


class RankPart(msgspec.Struct, frozen=True):
    """The part of one rank in the snapshot of a sharded checkpoint."""

    rank: int
    world_size: int
    chunks: list[Chunk]
    aliases: dict[str, str]
    mailbox: Mailbox


def tensors_name(rank: int) -> str:
    """Return the name of a rank's tensor file."""
    return TENSORS_NAME if rank == 0 else f"rank-{rank}.safetensors"


def state_name(rank: int) -> str:
    """Return the name of the file with what a rank alone has: its random generators, its place in the data."""
    return f"rank-{rank}.msgpack"


def outputs_name(rank: int) -> str:
    """Return the name, without a suffix, of the files with the outputs that a rank keeps for the end of an epoch."""
    return "outputs" if rank == 0 else f"outputs-{rank}"


def rank_of_outputs(name: str) -> int | None:
    """Return the rank in a name of `outputs_name`, with or without the suffix of the state; None in another name."""
    found = re.fullmatch(r"outputs(?:-([1-9][0-9]{0,6}))?(?:\.msgpack)?", name)
    return int(found[1] or 0) if found is not None else None


def note_name(rank: int) -> str:
    """Return the name of the file with a rank's note, which no committed checkpoint has."""
    return f"note-{rank}.json"


def encode_shards(shards: Shards) -> bytes:
    """Return the bytes of ``shards.json``."""
    return sign("shards", shards)


def decode_shards(data: bytes, where: str) -> tuple[dict[str, list[Chunk]], dict[str, str]]:
    """Read a table.

    Returns:
        The parts of each tensor, which cover it exactly, and the aliases of these tensors.

    Raises:
        CheckpointDamaged: The bytes were changed, or parts overlap, are missing, or contradict each other.
    """
    try:
        shards = msgspec.json.decode(signed_in("shards", data), type=Shards)
        tensors: dict[str, list[Chunk]] = {}
        for chunk in shards.chunks:
            tensors.setdefault(chunk.name, []).append(chunk)
            if chunk.rank >= shards.world_size:
                raise ValueError(f"{chunk.name!r:.200} is in a file of rank {chunk.rank} of {shards.world_size}")
        for name, chunks in tensors.items():
            _check(name, chunks)
        for alias, name in shards.aliases.items():
            if alias in tensors or name not in tensors:
                raise ValueError(f"the alias {alias!r:.200} has no tensor, or is the name of one")
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{where} is not a table of shards: {error}; load another checkpoint") from error
    return tensors, shards.aliases


def encode_note(note: RankNote) -> bytes:
    """Return the bytes of a rank's note."""
    return sign("note", note)


def decode_note(data: bytes, where: str) -> RankNote:
    """Read a rank's note. Raises `CheckpointDamaged`."""
    try:
        return msgspec.json.decode(signed_in("note", data), type=RankNote)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{where} is not the note of a rank: {error}") from error


def _check(name: str, chunks: list[Chunk]) -> None:
    """Check that parts have one type and shape, and cover every element once.

    Raises:
        ValueError: They do not.
    """
    first = chunks[0]
    if first.dtype not in ITEM_BYTES:
        raise ValueError(f"{name!r:.200} has the unknown type {first.dtype!r:.40}")
    for one in chunks:
        if (one.shape, one.dtype, one.view) != (first.shape, first.dtype, first.view):
            raise ValueError(f"{name!r:.200} has parts of different tensors")
        if not len(one.shape) == len(one.offsets) == len(one.sizes) or any(
            begin + size > whole for whole, begin, size in zip(one.shape, one.offsets, one.sizes, strict=True)
        ):
            raise ValueError(f"a part of {name!r:.200} lies outside of its tensor")
    boxes = [one for one in chunks if 0 not in one.sizes]
    if any(_overlaps(boxes)) or sum(elements_of(one.sizes) for one in boxes) != elements_of(first.shape):
        raise ValueError(f"the parts of {name!r:.200} overlap, or some are missing")


def _overlaps(boxes: Iterable[Chunk]) -> Iterable[bool]:
    """Compare each box with those that reach as far as it begins, in the first dimension."""
    reach: list[Chunk] = []
    for box in sorted(boxes, key=lambda one: one.offsets):
        reach = [one for one in reach if not one.offsets or one.offsets[0] + one.sizes[0] > box.offsets[0]]
        for other in reach:
            yield all(
                begin < other_begin + other_size and other_begin < begin + size
                for begin, size, other_begin, other_size in zip(
                    box.offsets, box.sizes, other.offsets, other.sizes, strict=True
                )
            )
        reach.append(box)


class StoredTensors:
    """The tensors of a checkpoint of any format, each of them whole in host memory. Does not need torch.

    Args:
        files: Of its manifest.
        read: Returns the verified content of a file.
        where: The checkpoint's folder, for messages.

    Raises:
        CheckpointDamaged: The files do not belong together; raised by `get`, too.
    """

    def __init__(self, files: Mapping[str, FileEntry], read: Callable[[str], memoryview], where: str) -> None:
        self._read, self._where = read, where
        self._open: dict[int, tuple[memoryview, TensorFile]] = {}
        self._chunks: dict[str, list[Chunk]] | None = None
        if SHARDS_NAME in files:
            self._chunks, self._aliases = decode_shards(bytes(read(SHARDS_NAME)), f"{where}/{SHARDS_NAME}")
        else:
            self._aliases = self._file(0)[1].aliases

    def key_of(self, name: str) -> str:
        """Return the name under which a tensor is stored."""
        return self._aliases.get(name, name)

    def get(self, name: str) -> tuple[TensorInfo, memoryview]:
        """Return a tensor and its elements. Raises `KeyError` for a name under which none is stored."""
        if self._chunks is None:
            return self._part(0, name)
        chunks = self._chunks[name]
        parts = [(one, *self._part(one.rank, name)) for one in chunks]
        first, info, data = parts[0]
        if len(chunks) == 1:
            return info, data
        extra = info.shape[len(first.sizes) :]  # a complex number may be stored as a pair
        whole = TensorInfo(name, info.dtype, first.shape + extra, info.view)
        target = memoryview(bytearray(whole.nbytes))
        for one, part, elements in parts:
            if part != TensorInfo(name, first.dtype, one.sizes + extra, first.view):
                raise CheckpointDamaged(
                    f"{self._where}: {tensors_name(one.rank)} has another {name!r:.200} than listed"
                )
            _copy_box(
                target, whole.shape, one.offsets + (0,) * len(extra), part.shape, elements, ITEM_BYTES[part.dtype]
            )
        return whole, target

    def _part(self, rank: int, name: str) -> tuple[TensorInfo, memoryview]:
        data, file = self._file(rank)
        info, offset = file.tensors[name]
        return info, data[offset : offset + info.nbytes]

    def _file(self, rank: int) -> tuple[memoryview, TensorFile]:
        if rank not in self._open:
            data = self._read(tensors_name(rank))
            self._open[rank] = data, read_layout(data, f"{self._where}/{tensors_name(rank)}")
        return self._open[rank]


def _copy_box(
    target: memoryview,
    shape: Sequence[int],
    offsets: Sequence[int],
    sizes: Sequence[int],
    elements: memoryview,
    item_bytes: int,
) -> None:
    """Copy the elements of a box to their places in a tensor, in runs that are contiguous in both."""
    first = len(shape)
    while first and sizes[first - 1] == shape[first - 1]:
        first -= 1
    first = max(0, first - 1)  # the first dimension of a run, of which the box may have a part
    strides = [elements_of(shape[i + 1 :]) * item_bytes for i in range(len(shape))]
    run = elements_of(sizes[first:]) * item_bytes
    if not run:
        return
    places = itertools.product(*(range(b, b + n) for b, n in zip(offsets[:first], sizes[:first], strict=True)))
    for number, place in enumerate(places):
        begin = sum(i * stride for i, stride in zip((*place, *offsets[first:]), strides, strict=True))
        target[begin : begin + run] = elements[number * run : (number + 1) * run]
