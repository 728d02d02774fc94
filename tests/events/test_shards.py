"""The table of a sharded checkpoint, and its parts put together."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.checkpoint.manifest import FileEntry
from events.checkpoint.shards import (
    SHARDS_NAME,
    Chunk,
    RankNote,
    Shards,
    StoredTensors,
    decode_note,
    decode_shards,
    encode_note,
    encode_shards,
    tensors_name,
)
from events.checkpoint.tensor_file import TensorInfo, lay_out
from events.errors import CheckpointDamaged

WHERE = "checkpoints/step-5.a1/shards.json"


@st.composite
def split_tensors(draw: st.DrawFn) -> tuple[int, list[Chunk]]:
    """A tensor of up to three dimensions, cut along some of them."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for size in shape:
        cuts = [0, *sorted(draw(st.sets(st.integers(1, size), max_size=2)) - {size}), size]
        pairs = list(itertools.pairwise(cuts))
        boxes = [((*begin, a), (*sizes, b - a)) for begin, sizes in boxes for a, b in pairs]
    chunks = [Chunk(rank, "w", shape, begin, sizes, "F32") for rank, (begin, sizes) in enumerate(boxes)]
    return len(boxes), draw(st.permutations(chunks))


@given(split_tensors())
def test_parts_that_cover_a_tensor_once_are_read_in_any_order(split: tuple[int, list[Chunk]]) -> None:
    world_size, chunks = split
    tensors, aliases = decode_shards(encode_shards(Shards(world_size, chunks, {"v": "w"})), WHERE)
    assert tensors == {"w": chunks}
    assert aliases == {"v": "w"}


@given(split_tensors(), st.data())
def test_a_part_that_is_missing_doubled_or_moved_is_damage(split: tuple[int, list[Chunk]], data: st.DataObject) -> None:
    world_size, chunks = split
    one = data.draw(st.sampled_from(chunks))
    if not one.shape or len(chunks) == 1:
        return
    longer = (one.sizes[0] + 1, *one.sizes[1:])
    moved = (one.offsets[0] + 1, *one.offsets[1:])
    others = [chunk for chunk in chunks if chunk is not one]
    for damaged in (
        others,
        [*chunks, one],
        [*others, msgspec.structs.replace(one, sizes=longer)],
        [*others, msgspec.structs.replace(one, offsets=moved)],
    ):
        with pytest.raises(CheckpointDamaged, match=r"overlap, or some are missing|lies outside"):
            decode_shards(encode_shards(Shards(world_size, damaged)), WHERE)


def chunk(**changes: Any) -> Chunk:
    return msgspec.structs.replace(Chunk(0, "w", (4,), (0,), (4,), "F32"), **changes)


@pytest.mark.parametrize(
    ("shards", "why"),
    [
        (Shards(1, [chunk(rank=1)]), "in a file of rank 1 of 1"),
        (Shards(1, [chunk(dtype="F99")]), "unknown type 'F99'"),
        (Shards(2, [chunk(sizes=(2,)), chunk(rank=1, offsets=(2,), sizes=(2,), dtype="F64")]), "different tensors"),
        (Shards(1, [chunk(offsets=(0, 0))]), "lies outside"),
        (Shards(1, [chunk()], {"v": "u"}), "the alias 'v' has no tensor"),
        (Shards(1, [chunk()], {"w": "w"}), "the alias 'w' has no tensor, or is the name of one"),
    ],
)
def test_a_table_that_contradicts_itself_is_damage(shards: Shards, why: str) -> None:
    with pytest.raises(CheckpointDamaged, match=why):
        decode_shards(encode_shards(shards), WHERE)


@pytest.mark.parametrize("change", [lambda data: data[:-2], lambda data: data.replace(b"F32", b"F16"), lambda _: b"{}"])
def test_changed_bytes_of_tables_and_notes_are_damage(change: Callable[[bytes], bytes]) -> None:
    note = RankNote(1, {"rank-1.safetensors": FileEntry(8, "0" * 32)}, [chunk()], {})
    assert decode_note(encode_note(note), WHERE) == note
    with pytest.raises(CheckpointDamaged, match=WHERE):
        decode_note(change(encode_note(note)), WHERE)
    with pytest.raises(CheckpointDamaged, match=WHERE):
        decode_shards(change(encode_shards(Shards(1, [chunk()]))), WHERE)


def files_of(chunks: list[Chunk], elements: np.ndarray) -> dict[str, memoryview]:
    """The files of ranks that have one part each."""
    files = {SHARDS_NAME: memoryview(encode_shards(Shards(len(chunks), chunks, {"v": "w"})))}
    for one in chunks:
        box = tuple(slice(b, b + n) for b, n in zip(one.offsets, one.sizes, strict=True))
        layout = lay_out([TensorInfo("w", "F32", one.sizes)], {})
        files[tensors_name(one.rank)] = memoryview(layout.header + np.ascontiguousarray(elements[box]).tobytes())
    return files


@given(split_tensors())
def test_parts_are_put_together_as_the_whole_tensor(split: tuple[int, list[Chunk]]) -> None:
    _, chunks = split
    elements = np.random.default_rng(0).random(chunks[0].shape, dtype=np.float32)
    files = files_of(chunks, elements)
    tensors = StoredTensors({SHARDS_NAME: FileEntry(0, "")}, files.__getitem__, WHERE)
    info, data = tensors.get(tensors.key_of("v"))
    assert info.shape == elements.shape
    assert np.array_equal(np.frombuffer(data, np.float32).reshape(info.shape), elements)


def test_a_part_of_another_shape_than_the_table_has_is_damage() -> None:
    elements = np.zeros((4, 2), np.float32)
    chunks = [Chunk(rank, "w", (4, 2), (2 * rank, 0), (2, 2), "F32") for rank in (0, 1)]
    other = files_of([Chunk(0, "w", (4, 1), (0, 0), (4, 1), "F32")], elements[:, :1])[tensors_name(0)]
    files = files_of(chunks, elements) | {tensors_name(1): other}
    with pytest.raises(CheckpointDamaged, match=r"rank-1\.safetensors has another 'w' than listed"):
        StoredTensors({SHARDS_NAME: FileEntry(0, "")}, files.__getitem__, WHERE).get("w")
