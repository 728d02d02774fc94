"""How the checkpoints of one run lie in a remote store.

::

    s3://bucket/prefix/RUN_ID/
        attempt-2.json                                as in the run's folder of checkpoints
        step-500.a1/
            parts.json                                written first: the size of the parts, and the manifest's hash
            tensors.safetensors.00000-of-00003        a file larger than a part: parts, all but the last of one size
            tensors.safetensors.00001-of-00003
            tensors.safetensors.00002-of-00003
            state.msgpack                             any other file: one object
            manifest.json                             written last, byte for byte the local one

**Visible** is a checkpoint whose ``manifest.json`` is there: it comes last and goes first. Every object is put as a
whole, by one request: a multipart upload would be left behind, invisible and paid for, by a process that is killed.

**By hand**: parts sort as they follow each other, so ``cat tensors.safetensors.*-of-* > tensors.safetensors`` makes a
file of them, and the folder is then a checkpoint like any other.

**Resuming**: an object that is there with the right size is not uploaded again if ``parts.json`` says that it belongs
to the same manifest, in which the hashes of all files stand. What is there of any other is deleted first. So a run that
begins anew under the name of an earlier one is never mixed with what that one had uploaded.
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
    """``parts.json``: how files were divided, and which checkpoint's they are."""

    part_bytes: Int64
    manifest_xxh3_128: str


class Part(NamedTuple):
    """An object that holds a file, or some of it."""

    key: str
    """Its name within the checkpoint."""
    nbytes: int


def parts_for(manifest: Manifest, part_bytes: int) -> Parts:
    """The ``parts.json`` of a checkpoint."""
    return Parts(part_bytes, xxhash.xxh3_128_hexdigest(encode_manifest(manifest)))


def encode_parts(parts: Parts) -> bytes:
    """The bytes of ``parts.json``."""
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


def plan_of(manifest: Manifest, part_bytes: int, most: int) -> dict[str, list[Part]]:
    """The objects that each file of a checkpoint consists of.

    Args:
        most: Maximum objects. A stranger may have written the manifest and ``parts.json``: a list of all parts that
            they claim would fill the memory.

    Raises:
        CheckpointDamaged: It consists of more.
    """
    count = sum(max(1, -(-entry.nbytes // part_bytes)) for entry in manifest.files.values())
    if count > most:
        raise CheckpointDamaged(f"{manifest.name} would consist of {count:,} objects, and {most:,} are there at most")
    return {file: parts_of(file, entry.nbytes, part_bytes) for file, entry in manifest.files.items()}


def parts_of(file: str, nbytes: int, part_bytes: int) -> list[Part]:
    """The objects that a file consists of, in order."""
    if nbytes <= part_bytes:
        return [Part(file, nbytes)]
    count = -(-nbytes // part_bytes)
    width = max(5, len(str(count)))  # or they would not sort as they follow each other
    sizes = [part_bytes] * (count - 1) + [nbytes - part_bytes * (count - 1)]
    return [Part(f"{file}.{index:0{width}}-of-{count:0{width}}", size) for index, size in enumerate(sizes)]


def folders_of(keys: Iterable[str]) -> dict[CheckpointName, set[str]]:
    """What there is of each checkpoint, whole or not."""
    folders: dict[CheckpointName, set[str]] = {}
    for key in keys:
        folder, separator, file = key.partition("/")
        name = CheckpointName.parse(folder) if separator else None
        if name is not None:
            folders.setdefault(name, set()).add(file)
    return folders


def visible(folders: dict[CheckpointName, set[str]]) -> list[CheckpointName]:
    """Those that are whole, in the order in which they came about.

    A manifest alone is none: a request that was late may have written it after the checkpoint was removed.
    """
    return sorted(name for name, files in folders.items() if {MANIFEST_NAME, PARTS_NAME} <= files)
