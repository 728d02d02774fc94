"""Files that are on stable storage when the call returns, written without holding the interpreter lock.

Large ones are written with direct I/O where the file system takes it: from page-aligned memory to the disk, past the
page cache, which would copy every byte once more and be flushed at a time of its own choosing. Every call that changes
the disk is one of ``os``, by that name: what a test replaces there, it replaces here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterable
from pathlib import Path

import xxhash

PAGE = 4096
"""Alignment of direct I/O: in memory, in the file, and of the length."""
_CHUNK = 32 * 2**20
_DIRECT = getattr(os, "O_DIRECT", 0)
# What a file system says that does not take direct I/O, at opening or at the first write.
_NO_DIRECT = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def write_image(path: Path, image: memoryview, nbytes: int) -> str:
    """Write a new file from page-aligned memory, and hash it meanwhile on a thread of its own.

    Args:
        image: Bytes of the file, filled up to a multiple of `PAGE`; begins at a page.
        nbytes: How many of them are the file.

    Returns:
        The hash of the file's bytes (`events.checkpoint.manifest.FileEntry`).

    Raises:
        OSError: The disk refused.
    """
    hasher = _Hasher(image[:nbytes])
    try:
        fd, direct = _open_for_image(path)
        try:
            _write_at(fd, image if direct else image[:nbytes], direct)
            if direct:
                os.ftruncate(fd, nbytes)
            os.fsync(fd)
        finally:
            os.close(fd)
    finally:
        digest = hasher.result()
    return digest


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a new file that consists of these parts, each asked for in its turn; returns its size and its hash.

    Raises:
        OSError: The disk refused.
    """
    digest = xxhash.xxh3_128()
    nbytes = 0
    fd = os.open(path, _CREATE, 0o644)
    try:
        for part in parts:
            view = memoryview(part).cast("B")
            for begin in range(0, len(view), _CHUNK):
                chunk = view[begin : begin + _CHUNK]
                digest.update(chunk)
                done = 0
                while done < len(chunk):
                    done += _some(os.write(fd, chunk[done:]), path)
            nbytes += len(view)
        os.fsync(fd)
    finally:
        os.close(fd)
    return nbytes, digest.hexdigest()


def replace_file(path: Path, parts: Iterable[bytes | memoryview]) -> int:
    """Replace a file, or create it, as a whole: whenever the machine stops, there is the old one or the new one.

    Returns:
        Its size.

    Raises:
        OSError: The disk refused; an earlier file is still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        remove(temporary)
        nbytes, _ = write_parts(temporary, parts)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)
    return nbytes


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if os.name == "nt":
        return  # a folder cannot be opened there, and its entries are journalled by the file system
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, following no link; a missing one is not an error.

    A folder is entered by its descriptor, so a link that takes its place meanwhile is not followed either.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.stat(path, follow_symlinks=False).st_mode):
            os.unlink(path)
        elif _BY_DESCRIPTOR:
            _remove_folder(path, None)
        else:
            for name in os.listdir(path):
                remove(path / name)
            os.rmdir(path)


_BY_DESCRIPTOR = {os.open, os.stat, os.unlink, os.rmdir} <= os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")


_MOST_DEPTH = 64
"""Maximum levels of folders that are removed: each has a descriptor and a call of its own."""


def _remove_folder(name: Path | str, within: int | None, depth: int = 0) -> None:
    if depth > _MOST_DEPTH:
        raise OSError(errno.ELOOP, f"more than {_MOST_DEPTH} folders are in each other; remove them by hand", str(name))
    fd = os.open(name, _FOLDER, dir_fd=within)
    try:
        for inside in os.listdir(fd):
            if stat.S_ISDIR(
                os.stat(inside, dir_fd=fd, follow_symlinks=False).st_mode
            ):  # a file browser's, a notebook's
                _remove_folder(inside, fd, depth + 1)
            else:
                os.unlink(inside, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=within)


class _Hasher:
    """Hashes memory on a thread of its own, which needs a tenth of the time that the disk does."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._digest = ""
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = threading.Thread(
            target=self._run, name="stagecast-checkpoint-hash", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError:  # the system has no more threads
            self._thread = None
            self._run()

    def _run(self) -> None:
        try:
            self._digest = xxhash.xxh3_128(self._data).hexdigest()
        except BaseException as error:  # a thread's border: raised by `result`
            self._error = error

    def result(self) -> str:
        if self._thread is not None:
            self._thread.join()
        self._data = memoryview(b"")
        if self._error is not None:
            raise self._error
        return self._digest


def _open_for_image(path: Path) -> tuple[int, bool]:
    if _DIRECT:
        try:
            return os.open(path, _CREATE | _DIRECT, 0o644), True
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
        with contextlib.suppress(FileNotFoundError):  # some create it before they refuse
            os.unlink(path)
    return os.open(path, _CREATE, 0o644), False


def _write_at(fd: int, image: memoryview, direct: bool) -> None:
    done = 0
    while done < len(image):
        chunk = image[done : done + _CHUNK]
        try:
            done += _some(_pwrite(fd, chunk, done), fd)
        except OSError as error:
            if not direct or error.errno not in _NO_DIRECT:
                raise
            _leave_direct(fd)
            direct = False
        if direct and done % PAGE:  # a disk that is getting full wrote part of it: the rest is no longer aligned
            _leave_direct(fd)
            direct = False


def _pwrite(fd: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    os.lseek(fd, offset, os.SEEK_SET)  # Windows
    return os.write(fd, data)


def _leave_direct(fd: int) -> None:
    import fcntl

    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~_DIRECT)


def _some(written: int, where: object) -> int:
    if written == 0:
        raise OSError(errno.EIO, "the file takes no bytes", str(where))
    return written
