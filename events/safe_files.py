"""Open files below a folder that a stranger may have prepared.

The folder itself is the user's choice and may be a link. Below it no link is followed, in no component of a path, and
only regular files are opened: a link could lead to any file of the user, a FIFO would block, a device has no end.
Descriptors are checked after opening, so a name that is exchanged meanwhile makes no difference.

On systems without ``O_NOFOLLOW`` (Windows) the components are looked at before opening instead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_SAFE = _NOFOLLOW
for _flag in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY", "O_NOINHERIT"):
    _SAFE |= getattr(os, _flag, 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_CHUNK = 32 * 2**20
_WRITES = os.O_WRONLY | os.O_RDWR
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


_guarded: set[Path] = set()


class UnsafeFile(OSError):
    """A path below the folder is a link, is not a regular file, or is larger than allowed."""


def guard(folder: str | os.PathLike[str]) -> None:
    """Refuse, from now on and in this process, also the links that lie in this folder itself, by their absolute paths.

    For a folder in which others may make run folders: below it, each run folder is a root of the functions here, and a
    root may otherwise be a link. The folder itself may be one.
    """
    _guarded.add(Path(os.path.abspath(folder)))


def open_below(root: str | os.PathLike[str], name: str, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """Open a regular file below a folder and return its descriptor, which is not inherited.

    Never waits for a FIFO or a device. May be called on any thread.

    Args:
        root: The folder, which may be reached through links.
        name: The file's path below it, with slashes, such as ``journal/00000001.jsonl``.
        flags: As `os.open` takes them. With one that writes, a file with several hard links is refused, because the
            others may lie outside of the folder.

    Raises:
        UnsafeFile: A component is a link, or the file is not a regular one.
        OSError: As `os.open` raises it, such as `FileNotFoundError`.
        ValueError: ``name`` is not a path below a folder.
    """
    with _parent_of(root, name) as (folder, path):
        try:
            fd = os.open(_at(folder, path), (flags & ~os.O_TRUNC) | _SAFE, mode, dir_fd=folder)
        except OSError as error:
            raise _explained(error, folder, path) from None
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or (folder is None and path.is_symlink()):
                raise _unsafe(found if folder is not None else os.lstat(path), path)
            if flags & _WRITES and found.st_nlink > 1:
                raise UnsafeFile(
                    errno.EMLINK,
                    f"it has {found.st_nlink} hard links, and a write would change the others; copy the folder",
                    str(path),
                )
            if flags & os.O_TRUNC:
                os.ftruncate(fd, 0)
            if folder is not None:
                os.set_blocking(fd, True)
        except BaseException:  # propagates unchanged, without the descriptor
            os.close(fd)
            raise
        return fd


def open_lock_below(root: str | os.PathLike[str], name: str) -> int:
    """Open a file to be locked, creating it if it is missing; returns its descriptor.

    Its owner alone may open it afterwards: whoever may read a file may lock it, and could hold up its owner.

    Raises:
        UnsafeFile, OSError: As `open_below`.
    """
    fd = open_below(root, name, os.O_RDWR | os.O_CREAT, 0o600)
    if hasattr(os, "fchmod") and os.fstat(fd).st_mode & 0o077:
        with contextlib.suppress(OSError):  # a file system without modes, or the file of a user who shares the folder
            os.fchmod(fd, 0o600)
    return fd


def read_below(root: str | os.PathLike[str], name: str, limit_bytes: int) -> bytes:
    """Read a whole regular file below a folder.

    Raises:
        UnsafeFile: It has more than ``limit_bytes``, also if it grows meanwhile; and as `open_below`.
    """
    fd = open_below(root, name)
    try:
        parts: list[bytes] = []
        left = limit_bytes + 1
        if os.fstat(fd).st_size <= limit_bytes:
            while left and (part := os.read(fd, min(left, 2**20))):
                parts.append(part)
                left -= len(part)
        else:
            left = 0
        if not left:
            raise UnsafeFile(errno.EFBIG, f"is larger than {limit_bytes:,} bytes", str(Path(root, name)))
        return b"".join(parts)
    finally:
        os.close(fd)


def stat_below(root: str | os.PathLike[str], name: str) -> os.stat_result:
    """Return the status of a file or folder below a folder; of a link, that of the link itself.

    Raises:
        UnsafeFile: A component before the last is a link.
        OSError: As `os.stat` raises it.
    """
    with _parent_of(root, name) as (folder, path):
        return os.stat(_at(folder, path), dir_fd=folder, follow_symlinks=False)


def list_below(root: str | os.PathLike[str], name: str) -> list[os.DirEntry[str]]:
    """List a folder below a folder, sorted by name. Ask the entries with ``follow_symlinks=False``.

    Raises:
        UnsafeFile: A component is a link.
        OSError: As `os.scandir` raises it, such as `FileNotFoundError`.
    """
    with open_folder_below(root, name) as (folder, path), os.scandir(path if folder is None else folder) as entries:
        found = []
        for entry in sorted(entries, key=lambda entry: entry.name):
            with contextlib.suppress(OSError):  # removed meanwhile
                entry.stat(follow_symlinks=False)  # the entry keeps it: later the descriptor is closed
                found.append(entry)
        return found


def make_folder_below(root: str | os.PathLike[str], name: str) -> None:
    """Make a folder below a folder where it is missing; its parent must exist.

    Raises:
        UnsafeFile: It, or a component before it, is a link or a file.
    """
    with _parent_of(root, name) as (folder, path), contextlib.suppress(FileExistsError):
        os.mkdir(_at(folder, path), dir_fd=folder)
    with open_folder_below(root, name):
        pass


def replace_below(
    root: str | os.PathLike[str],
    name: str,
    data: bytes | Iterable[bytes | memoryview],
    mode: int = 0o666,
    *,
    durable: bool = True,
) -> int:
    """Write a file below a folder as a whole, replacing one that is there; durable when it returns.

    The temporary file has a random name and is created exclusively, and removed on failure. Waits for the disk.

    Args:
        data: All bytes, or parts of them in their order.
        durable: False leaves it to the system when the file reaches the disk, and so waits less.

    Returns:
        The size of the file in bytes.

    Raises:
        UnsafeFile: A component is a link; the name itself may be one, which is replaced, not followed.
        OSError: The disk refused; the file is as it was.
    """
    nbytes = 0
    with _parent_of(root, name) as (folder, path):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            fd = os.open(_at(folder, temporary), os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE, mode, dir_fd=folder)
            try:
                for part in [data] if isinstance(data, bytes) else data:
                    nbytes += write_all(fd, part, temporary)
                if durable:
                    os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(_at(folder, temporary), _at(folder, path), src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:  # propagates unchanged, without the temporary file
            with contextlib.suppress(OSError):
                os.unlink(_at(folder, temporary), dir_fd=folder)
            raise
        if durable and folder is not None:
            sync_descriptor(folder)
    return nbytes


def write_all(fd: int, data: bytes | memoryview, where: object) -> int:
    """Write all bytes to a descriptor; returns their number. Raises `OSError` also where it accepts none."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += some(os.write(fd, view[done : done + _CHUNK]), where)
    return done


def some(written: int, where: object) -> int:
    """Return the number of bytes that were written, or raise `OSError` for none: a retry might never end."""
    if written == 0:
        raise OSError(errno.EIO, "the file takes no bytes", str(where))
    return written


def sync_descriptor(folder: int) -> None:
    """Make the names in an opened folder durable, where the file system can."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise


def unlink_below(root: str | os.PathLike[str], name: str) -> None:
    """Remove a file below a folder; a link is removed itself.

    Raises:
        UnsafeFile: A component before the last is a link.
        OSError: As `os.unlink` raises it.
    """
    with _parent_of(root, name) as (folder, path):
        os.unlink(_at(folder, path), dir_fd=folder)


@contextlib.contextmanager
def open_folder_below(root: str | os.PathLike[str], name: str) -> Iterator[tuple[int | None, Path]]:
    """Open a folder below a folder: its descriptor, for ``dir_fd=`` (None on Windows), and its path for messages.

    Args:
        name: As for `open_below`; or "." for the folder itself.

    Raises:
        UnsafeFile: A component is a link.
        OSError: As `os.open` raises it, such as `FileNotFoundError` and `NotADirectoryError`.
    """
    path, parts = Path(root), _parts(name)
    if path.parent in _guarded and path.name:
        path, parts = path.parent, (path.name, *parts)
    if not _NOFOLLOW:
        for part in parts:
            path /= part
            found = os.lstat(path)
            if not stat.S_ISDIR(found.st_mode):
                raise _unsafe(found, path)
        yield None, path
        return
    fd = os.open(path, _FOLDER)
    try:
        for part in parts:
            path /= part
            try:
                inner = os.open(part, _FOLDER | _NOFOLLOW, dir_fd=fd)
            except OSError as error:
                raise _explained(error, fd, path) from None
            os.close(fd)
            fd = inner
        yield fd, path
    finally:
        os.close(fd)


@contextlib.contextmanager
def _parent_of(root: str | os.PathLike[str], name: str) -> Iterator[tuple[int | None, Path]]:
    """Open the folder that has the last component: its descriptor, and the path of that component."""
    *parents, last = _parts(name) or ("",)
    if not last:
        raise ValueError(f"{name!r} is not a path below a folder; name a file in it")
    with open_folder_below(root, "/".join(parents) or ".") as (folder, path):
        yield folder, path / last


def kind_of(mode: int) -> str:
    """Name the kind of a file by its ``st_mode``, such as "a symbolic link"."""
    return _KINDS.get(stat.S_IFMT(mode), "a special file")


def _at(folder: int | None, path: Path) -> str:
    """The name to give to a system call beside ``dir_fd=folder``."""
    return str(path) if folder is None else path.name


def _parts(name: str) -> tuple[str, ...]:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name or (os.sep != "/" and (os.sep in name or ":" in name)):
        raise ValueError(f"{name!r} is not a path below a folder; use one without '..' that does not begin with '/'")
    return pure.parts


def _explained(error: OSError, folder: int | None, path: Path) -> OSError:
    """The error of an open that failed, as `UnsafeFile` where a link or a special file is the reason."""
    with contextlib.suppress(OSError):
        found = os.stat(_at(folder, path), dir_fd=folder, follow_symlinks=False)
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENOTDIR, errno.ENXIO) and not stat.S_ISREG(found.st_mode):
            return _unsafe(found, path)
    return type(error)(error.errno, error.strerror, str(path))


def _unsafe(found: os.stat_result, path: Path) -> UnsafeFile:
    return UnsafeFile(errno.ELOOP, f"it is {kind_of(found.st_mode)}, which is not opened below a run folder", str(path))
