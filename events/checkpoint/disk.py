"""Durable files, written without holding the interpreter lock.

They are written to an opened folder (`Folder`), so that a link cannot redirect a write. Large files use direct I/O, if
the file system supports it: from page-aligned memory to the disk, without the page cache, which would copy every byte
once more and be flushed at an arbitrary time. Every change of the disk calls a function of ``os`` by its name, so that
tests can replace it there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import xxhash

from events.checkpoint.manifest import FileEntry
from events.checkpoint.parallel import beside
from events.safe_files import some, sync_descriptor, write_all

PAGE = 4096
"""Alignment of direct I/O: in memory, in the file, and of the length."""
_CHUNK = 32 * 2**20
_DIRECT = getattr(os, "O_DIRECT", 0)
# Errors of a file system without direct I/O, from the open or the first write.
_NO_DIRECT = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_ENTER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_FOLDER = _ENTER | getattr(os, "O_NOFOLLOW", 0)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
for _flag in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):
    _CREATE |= getattr(os, _flag, 0)
_BY_DESCRIPTOR = {os.open, os.stat, os.unlink, os.rmdir} <= os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")


class Folder:
    """An opened folder, which stays the same even if its path is replaced.

    Args:
        path: For messages, and for systems without ``dir_fd`` (Windows).
        fd: Its descriptor, which `close` closes; None on such a system.
    """

    def __init__(self, path: Path, fd: int | None) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Open the user's folder, through links if there are any."""
        return cls(path, os.open(path, _ENTER) if _BY_DESCRIPTOR else None)

    def make(self, name: str) -> Folder:
        """Create and open a folder in it. Raises `FileExistsError` and other `OSError`."""
        os.mkdir(self._at(name), dir_fd=self.fd)
        return self.enter(name)

    def enter(self, name: str) -> Folder:
        """Open a folder in it. Raises `OSError`."""
        return Folder(self.path / name, os.open(name, _FOLDER, dir_fd=self.fd) if self.fd is not None else None)

    def create(self, name: str, flags: int = 0) -> int:
        """Create a file in it exclusively, and return its descriptor."""
        return os.open(self._at(name), _CREATE | flags, 0o644, dir_fd=self.fd)

    def read(self, name: str, nbytes: int) -> bytes:
        """Read a file in it, up to a number of bytes, without following links. Raises `OSError`."""
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(self._at(name), flags, dir_fd=self.fd), "rb") as file:
            return file.read(nbytes)

    def stat(self, name: str) -> os.stat_result:
        """The status of a file or folder in it; of a link, that of the link itself."""
        return os.stat(self._at(name), dir_fd=self.fd, follow_symlinks=False)

    def has(self, other: Folder, name: str) -> bool:
        """Whether another opened folder still has that name in it."""
        return other.fd is None or os.path.samestat(os.fstat(other.fd), self.stat(name))

    def rename(self, old: str, new: str) -> None:
        """Rename a file or folder in it, replacing an existing file."""
        os.replace(self._at(old), self._at(new), src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its content, without following links; a missing one is not an error.

        Folders are entered by descriptor, so that a link that replaces one is not followed either.
        """
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISDIR(self.stat(name).st_mode):
                os.unlink(self._at(name), dir_fd=self.fd)
            elif self.fd is not None:
                _remove_folder(name, self.fd)
            else:
                inner = Folder(self.path / name, None)
                for inside in os.listdir(inner.path):
                    inner.remove(inside)
                os.rmdir(inner.path)

    def sync(self) -> None:
        """Make the names in it durable, where the system can."""
        if self.fd is not None:
            sync_descriptor(self.fd)
        else:
            sync_folder(self.path)

    def close(self) -> None:
        """Close its descriptor. May be called twice."""
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _at(self, name: str) -> str:
        return name if self.fd is not None else str(self.path / name)


def write_image(folder: Folder, name: str, image: memoryview, nbytes: int) -> FileEntry:
    """Write a new file from page-aligned memory.

    Args:
        image: Bytes of the file, aligned to a page and padded to a multiple of `PAGE`.
        nbytes: Bytes of the file without the padding.

    Raises:
        OSError: The disk failed.
    """
    hashed = beside(lambda: _hash(image[:nbytes]), "stagecast-checkpoint-hash")  # takes a tenth of the time of the disk
    try:
        fd, direct = _open_for_image(folder, name)
        try:
            _write_at(fd, image if direct else image[:nbytes], direct)
            if direct:
                os.ftruncate(fd, nbytes)
            os.fsync(fd)
        finally:
            os.close(fd)
    finally:
        digest = hashed()
    return FileEntry(nbytes, digest)


def entry_of(data: bytes) -> FileEntry:
    """Describe a file with these bytes."""
    return FileEntry(len(data), _hash(memoryview(data)))


def _hash(data: memoryview) -> str:
    return xxhash.xxh3_128(data).hexdigest()  # releases the interpreter lock


def write_parts(folder: Folder, name: str, parts: Iterable[bytes | memoryview]) -> FileEntry:
    """Write a new file from its parts, each requested in turn.

    Raises:
        OSError: The disk failed.
    """
    digest = xxhash.xxh3_128()
    nbytes = 0
    fd = folder.create(name)
    try:
        for part in parts:
            view = memoryview(part).cast("B")
            for begin in range(0, len(view), _CHUNK):
                chunk = view[begin : begin + _CHUNK]
                digest.update(chunk)
                nbytes += write_all(fd, chunk, folder.path / name)
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileEntry(nbytes, digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if os.name == "nt":
        return  # a folder cannot be opened there, and its entries are journalled by the file system
    fd = os.open(path, _ENTER)
    try:
        sync_descriptor(fd)
    finally:
        os.close(fd)


_MOST_DEPTH = 64
"""Maximum levels of folders to remove: each takes a descriptor and a recursive call."""


def _remove_folder(name: str, within: int, depth: int = 0) -> None:
    if depth > _MOST_DEPTH:
        raise OSError(errno.ELOOP, f"folders are more than {_MOST_DEPTH} levels deep; remove them by hand", name)
    fd = os.open(name, _FOLDER, dir_fd=within)
    try:
        for inside in os.listdir(fd):
            found = os.stat(inside, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):  # of a file browser, of a notebook
                _remove_folder(inside, fd, depth + 1)
            else:
                os.unlink(inside, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=within)


def _open_for_image(folder: Folder, name: str) -> tuple[int, bool]:
    if _DIRECT:
        try:
            return folder.create(name, _DIRECT), True
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
        folder.remove(name)  # some file systems create the file and then fail
    return folder.create(name), False


def _write_at(fd: int, image: memoryview, direct: bool) -> None:
    done = 0
    while done < len(image):
        chunk = image[done : done + _CHUNK]
        try:
            done += some(_pwrite(fd, chunk, done), fd)
        except OSError as error:
            if not direct or error.errno not in _NO_DIRECT:
                raise
            _leave_direct(fd)
            direct = False
        if direct and done % PAGE:  # an almost full disk wrote a part: the rest is not aligned
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
