"""Hostile headers of a checkpoint's data: of a tensor file, a manifest, notes, the parts of a file in a store."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgspec
import pytest

from events.checkpoint.lineage import AttemptNote, decode_attempt, encode_attempt
from events.checkpoint.manifest import FileEntry, Manifest, decode_manifest, encode_manifest
from events.checkpoint.remote_layout import decode_parts
from events.checkpoint.tensor_file import TensorInfo, elements_of, read_layout
from events.errors import CheckpointDamaged

BIG = 10**399


def header_of(**entries: Any) -> memoryview:
    """A tensor file of 4 bytes."""
    text = msgspec.json.encode(entries)
    return memoryview(len(text).to_bytes(8, "little") + text + bytes(4))


def entry(shape: list[int], end: int = 4) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize(
    "shape", [[2**47] * 400_000, [2**47] * 400_000 + [0], [2] * 400_000, [BIG], [-1], [2**47, 2**47], [1] * 10 + [2]]
)
def test_a_shape_that_does_not_fit_is_refused_at_once_with_a_short_message(shape: list[int]) -> None:
    """The product of many large dimensions takes quadratic time."""
    with pytest.raises(CheckpointDamaged, match="is not a safetensors file: ") as caught:
        read_layout(header_of(weight=entry(shape)), "file")
    assert len(str(caught.value)) < 500


def test_tensors_that_share_bytes_are_refused() -> None:
    """Their copies could fill the memory."""
    with pytest.raises(CheckpointDamaged, match="'a' and 'b' overlap"):
        read_layout(header_of(a=entry([1]), b=entry([1]), c=entry([0], 0)), "file")


def test_shapes_with_a_zero_and_many_ones_are_counted() -> None:
    assert elements_of([2**47] * 1_000_000 + [0]) == 0
    assert TensorInfo("a", "F32", (2**47,) * 1_000_000 + (0,)).nbytes == 0
    assert list(read_layout(header_of(a=entry([1] * 10_000), b=entry([0, 2**47], 0)), "file").tensors) == ["a", "b"]


def test_names_and_types_are_shortened_in_messages() -> None:
    long = "x" * 1_000_000
    views = msgspec.json.encode({"aliases": {long: long}}).decode()
    for entries in (
        {long: entry([2])},
        {long: {"dtype": long, "shape": [1], "data_offsets": [0, 4]}},
        {"__metadata__": {"stagecast": views}},
    ):
        with pytest.raises(CheckpointDamaged) as caught:
            read_layout(header_of(**entries), "file")
        assert len(str(caught.value)) < 700


PLACE: dict[str, Any] = {"run_id": "r", "attempt": 1, "global_step": 2, "epoch": 0, "seq": 9, "time": 1.5}
MANIFEST = Manifest(**PLACE, parent=None, reasons=[], files={"a": FileEntry(1, "")})


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"attempt": BIG}, "Expected `int`"),
        ({"global_step": 2**63}, "Expected `int`"),
        ({"epoch": -BIG}, "Expected `int`"),
        ({"seq": BIG}, "Expected `int`"),
        ({"format": BIG}, "Expected `int`"),
        ({"files": {"a": FileEntry(BIG, "")}}, "Expected `int`"),
        ({"files": {"a": FileEntry(-1, "")}}, "Expected `int`"),
        ({"files": {"../a": FileEntry(1, "")}}, r"lists the file '\.\./a', .* points outside"),
        ({"files": {"manifest.json": FileEntry(1, "")}}, "lists the file 'manifest.json', .* at itself"),
    ],
)
def test_a_signed_manifest_has_integers_within_64_bits_and_files_within_its_folder(
    fields: dict[str, Any], problem: str
) -> None:
    assert decode_manifest(encode_manifest(MANIFEST), "file") == MANIFEST
    with pytest.raises(CheckpointDamaged, match=f"file .*{problem}"):
        decode_manifest(encode_manifest(msgspec.structs.replace(MANIFEST, **fields)), "file")


def test_notes_and_parts_have_integers_within_64_bits() -> None:
    assert decode_attempt(f"attempt-{BIG}.json", encode_attempt(AttemptNote(BIG, None))) is None
    with pytest.raises(CheckpointDamaged, match="was changed: Expected `int`"):
        decode_parts(b'{"part_bytes":%d,"manifest_xxh3_128":""}' % BIG, "file")


def test_a_manifest_that_would_fill_the_memory_is_damage_and_not_decoded() -> None:
    files = {f"part{index}.msgpack": FileEntry(1, "0" * 32) for index in range(10_000)}
    many = msgspec.structs.replace(MANIFEST, files=files)
    assert decode_manifest(encode_manifest(many), "m") == many
    data = encode_manifest(msgspec.structs.replace(MANIFEST, reasons=["ab"] * 1_500_000))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointDamaged, match=r"m may take .* bytes of memory"):
            decode_manifest(data, "m")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
