"""The files of one checkpoint on disk: opened without following links, read, and compared with their manifest."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from events.checkpoint.manifest import (
    MANIFEST_BYTES,
    MANIFEST_NAME,
    CheckpointName,
    FileEntry,
    Manifest,
    decode_manifest,
)
from events.errors import CheckpointDamaged, CheckpointNotFound
from events.safe_files import open_below, read_below

CHECKPOINTS_DIR = "checkpoints"
"""The folder of checkpoints within a run folder."""
RESUMED_DIR = "resumed"
"""The folder of downloaded checkpoints of other runs within a run folder."""
_CHUNK = 32 * 2**20


def root_of(folder: Path) -> tuple[Path, str]:
    """Split the path of a folder of checkpoints at the user's folder, which alone may be a link.

    Returns:
        The user's folder, and the path below it, which is empty or ends with a slash.
    """
    if folder.name in (CHECKPOINTS_DIR, RESUMED_DIR):
        return folder.parent, f"{folder.name}/"
    return folder, ""


def _checkpoint_root_of(folder: Path) -> tuple[Path, str]:
    """Split the path of a checkpoint's folder, of any name, likewise."""
    if CheckpointName.parse(folder.name) is None:
        return folder, ""
    root, within = root_of(folder.parent)
    return root, f"{within}{folder.name}/"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the checkpoint in a folder of any name; see `Lineage.manifest`."""
    path = folder / MANIFEST_NAME
    root, within = _checkpoint_root_of(folder)
    try:
        data = read_below(root, within + MANIFEST_NAME, MANIFEST_BYTES)
    except FileNotFoundError as error:
        if folder.is_dir():
            raise CheckpointDamaged(f"{path} is missing; load another checkpoint") from error
        raise CheckpointNotFound(f"{folder} does not exist") from error
    except OSError as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error}") from error
    manifest = decode_manifest(data, str(path))
    if CheckpointName.parse(folder.name) not in (None, manifest.name):
        raise CheckpointDamaged(
            f"{path} belongs to {manifest.name}; restore the folder's name, or load another checkpoint"
        )
    return manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Read every file of a checkpoint and compare it with its manifest.

    Raises:
        CheckpointDamaged: A file is missing, truncated, changed, or not a regular one; names the first one.
    """
    for name, entry in manifest.files.items():
        with _opened(folder, name, entry) as file:
            digest = xxhash.xxh3_128()
            nbytes = 0
            while nbytes <= entry.nbytes and (chunk := file.read(_CHUNK)):  # a file that grows is damaged
                digest.update(chunk)
                nbytes += len(chunk)
        check_file(folder / name, entry, FileEntry(nbytes, digest.hexdigest()))


def check_size(folder: Path, name: str, entry: FileEntry) -> None:
    """Compare the size of a checkpoint's file with its manifest. Raises as `verify` does."""
    with _opened(folder, name, entry):
        pass


def read_file(folder: Path, name: str, entry: FileEntry) -> memoryview:
    """Read a file of a checkpoint into page-aligned memory, and compare it with its manifest.

    Raises:
        CheckpointDamaged: The file is missing, truncated, changed, not a regular one, or larger than the memory.
    """
    path = folder / name
    with _opened(folder, name, entry) as file:
        memory = memory_for(path, entry.nbytes)
        digest = xxhash.xxh3_128()
        done = _fill(memory, file, digest.update)
        if done == entry.nbytes and file.read(1):
            done = os.fstat(file.fileno()).st_size
    check_file(path, entry, FileEntry(done, digest.hexdigest()))
    return memory


def map_file(folder: Path, name: str) -> memoryview:
    """Map a file of a checkpoint that `verify` has accepted, without memory of its own. Raises `CheckpointDamaged`."""
    try:
        with open_file(folder, name) as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise CheckpointDamaged(f"{folder / name} cannot be read: {error}") from error


def read_weights(path: Path, *, follow: bool, maps: bool = False) -> memoryview:
    """Read a safetensors file into writable memory.

    Args:
        follow: Whether the file may be a link.
        maps: Map the file instead, whose parts are read when they are used; changes stay in memory.

    Raises:
        CheckpointDamaged: The file is not a regular one, larger than the memory, or truncated during the read.
        OSError: The file cannot be read.
    """
    if follow:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    else:
        fd = open_below(path.parent, path.name)
    with open(fd, "rb", buffering=0) as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointDamaged(f"{path} is not a regular file")
        if maps and found.st_size:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        memory = memory_for(path, found.st_size)
        if _fill(memory, file) < len(memory):
            raise CheckpointDamaged(f"{path} was truncated while it was read")
    return memory


def _fill(memory: memoryview, file: io.FileIO, on_chunk: Callable[[memoryview], object] = lambda chunk: None) -> int:
    """Read a file into memory until either ends; return the bytes."""
    done = 0
    while done < len(memory) and (count := file.readinto(memory[done : done + _CHUNK])):
        on_chunk(memory[done : done + count])
        done += count
    return done


def memory_for(path: Path | str, nbytes: int) -> memoryview:
    """Allocate page-aligned memory. Raises `CheckpointDamaged` for more bytes than this machine's memory."""
    if nbytes > _MEMORY_BYTES:
        raise CheckpointDamaged(f"{path} has {nbytes:,} bytes, more than the memory of this machine")
    return memoryview(mmap.mmap(-1, max(1, nbytes)))[:nbytes]


def open_file(folder: Path, name: str) -> io.FileIO:
    """Open a regular file of a checkpoint without following links. Raises `UnsafeFile` and other `OSError`."""
    root, within = _checkpoint_root_of(folder)
    return open(open_below(root, within + name), "rb", buffering=0)


@contextlib.contextmanager
def _opened(folder: Path, name: str, entry: FileEntry) -> Iterator[io.FileIO]:
    """Open a regular file of a checkpoint, if it has the size in the manifest."""
    path = folder / name
    try:
        with open_file(folder, name) as file:
            size = os.fstat(file.fileno()).st_size
            check_file(path, entry, FileEntry(size, entry.xxh3_128))  # before any memory is allocated
            yield file
    except OSError as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error.strerror or error}") from error


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return 2**62


_MEMORY_BYTES = _memory_bytes()


def check_file(path: Path, entry: FileEntry, found: FileEntry) -> None:
    """Compare a file with its manifest. Raises `CheckpointDamaged`."""
    if found.nbytes != entry.nbytes:
        raise CheckpointDamaged(
            f"{path} has {found.nbytes:,} bytes instead of {entry.nbytes:,}; load another checkpoint"
        )
    if found != entry:
        raise CheckpointDamaged(f"{path} holds other bytes than were written; load another checkpoint")
