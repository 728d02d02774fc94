"""The layout of the checkpoints of one run in a remote store.

::

    s3://bucket/prefix/RUN_ID/
        attempt-2.json                                as in the local folder of checkpoints
        step-500.a1/
            parts.json                                written first: size of the parts, hash of the manifest
            tensors.safetensors.00000-of-00003        a file larger than a part: parts, all but the last of one size
            tensors.safetensors.00001-of-00003
            tensors.safetensors.00002-of-00003
            state.msgpack                             any other file: one object
            manifest.json                             written last, byte for byte the local one

A checkpoint with ``manifest.json`` is **visible**: the manifest is written last and removed first. Every object is
written by one request: a killed process would leave a multipart upload behind, invisible and paid for.

**By hand**: parts sort in their order, so that ``cat tensors.safetensors.*-of-* > tensors.safetensors`` joins them; the
folder is then a normal checkpoint.

**Resuming**: an existing object of the right size is not uploaded again if ``parts.json`` holds the hash of the same
manifest, which lists the hashes of all files. Objects of any other manifest are deleted first, so that a new run never
mixes with an earlier one of its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec
import xxhash

from events.bounds import Int64
from events.checkpoint.manifest import MANIFEST_NAME, CheckpointName, Manifest, encode_manifest
from events.errors import CheckpointDamaged

PARTS_NAME = "parts.json"


class Parts(msgspec.Struct, frozen=True):
    """``parts.json``: the division of files, and the checkpoint that they belong to."""

    part_bytes: Int64
    manifest_xxh3_128: str


class FilePart(NamedTuple):
    """An object with a file, or a part of it."""

    key: str
    """Its name within the checkpoint."""
    nbytes: int


def parts_for(manifest: Manifest, part_bytes: int) -> Parts:
    """Return the ``parts.json`` of a checkpoint."""
    return Parts(part_bytes, xxhash.xxh3_128_hexdigest(encode_manifest(manifest)))


def encode_parts(parts: Parts) -> bytes:
    """Return the bytes of ``parts.json``."""
    return msgspec.json.encode(parts) + b"\n"


def decode_parts(data: bytes, where: str) -> Parts:
    """Read a ``parts.json``. Raises `CheckpointDamaged`."""
    try:
        parts = msgspec.json.decode(data, type=Parts)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{where} was changed: {error}") from error
    if parts.part_bytes < 1:
        raise CheckpointDamaged(f"{where} was changed: it has parts of {parts.part_bytes} bytes")
    return parts


def plan_of(manifest: Manifest, part_bytes: int, most: int) -> dict[str, list[FilePart]]:
    """Return the objects of each file of a checkpoint.

    Args:
        most: Maximum objects, because an untrusted manifest and ``parts.json`` may claim more than fit the memory.

    Raises:
        CheckpointDamaged: There would be more.
    """
    count = sum(max(1, -(-entry.nbytes // part_bytes)) for entry in manifest.files.values())
    if count > most:
        raise CheckpointDamaged(f"{manifest.name} would consist of {count:,} objects, and {most:,} are there at most")
    return {file: parts_of(file, entry.nbytes, part_bytes) for file, entry in manifest.files.items()}


def parts_of(file: str, nbytes: int, part_bytes: int) -> list[FilePart]:
    """Return the objects of a file, in order."""
    if nbytes <= part_bytes:
        return [FilePart(file, nbytes)]
    count = -(-nbytes // part_bytes)
    width = max(5, len(str(count)))  # so that names sort in the order of the parts
    sizes = [part_bytes] * (count - 1) + [nbytes - part_bytes * (count - 1)]
    return [FilePart(f"{file}.{index:0{width}}-of-{count:0{width}}", size) for index, size in enumerate(sizes)]


def folders_of(keys: Iterable[str]) -> dict[CheckpointName, set[str]]:
    """Return the files of each checkpoint, complete or not."""
    folders: dict[CheckpointName, set[str]] = {}
    for key in keys:
        folder, separator, file = key.partition("/")
        name = CheckpointName.parse(folder) if separator else None
        if name is not None:
            folders.setdefault(name, set()).add(file)
    return folders


def visible(folders: dict[CheckpointName, set[str]]) -> list[CheckpointName]:
    """Return the complete checkpoints, the oldest first.

    A manifest alone is not one: a late request may have written it after the checkpoint was removed.
    """
    return sorted(name for name, files in folders.items() if {MANIFEST_NAME, PARTS_NAME} <= files)
