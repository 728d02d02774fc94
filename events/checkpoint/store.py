"""The checkpoints of a run on disk: committed as a whole, found by their line, verified, removed.

::

    checkpoints/
        attempt-2.json        what attempt 2 started from: it is its line that "auto" follows
        step-500.a1/          a checkpoint; its name stands there only once it is whole and durable
            tensors.safetensors
            state.msgpack
            manifest.json     written last; lists and hashes the others
            uploaded          once it is in the remote store: where
        .step-550.a1.5f0c31d2.tmp/   one that is being written, or what a killed process has left of one

**Commit**: all files are written and fsynced in a temporary folder, the manifest last; the folder is fsynced, renamed,
and its parent fsynced. Only then is the checkpoint announced. The temporary folder is new, has a random name, and stays
open: no one can have prepared it, and nothing is written through a link that takes its place.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import xxhash

from events.checkpoint import disk
from events.checkpoint.lineage import (
    AttemptNote,
    attempt_name,
    candidates_of,
    decode_attempt,
    encode_attempt,
    is_attempt_name,
    line_of,
    scores_of,
)
from events.checkpoint.manifest import (
    MANIFEST_BYTES,
    MANIFEST_NAME,
    CheckpointName,
    FileEntry,
    Manifest,
    Metric,
    decode_manifest,
    encode_manifest,
)
from events.errors import CheckpointDamaged, CheckpointNotFound, CheckpointTooNew
from events.safe_files import make_folder_below, open_below, open_folder_below, read_below, replace_below

CHECKPOINTS_DIR = "checkpoints"
"""The folder of checkpoints within a run's folder."""
RESUMED_DIR = "resumed"
"""The folder of downloaded checkpoints of other runs within a run's folder."""
WEIGHTS_NAME = "weights.safetensors"
"""The module's weights alone, in the run's folder."""
_UPLOADED_NAME = "uploaded"
_CHUNK = 32 * 2**20
NOTE_BYTES = 65_536
"""Maximum bytes per note: of an attempt, of an upload."""
LAST_SEQ = 2**51
"""No run comes so far: a greater number is damage, or malice, and is not counted on from."""


class Upload(msgspec.Struct, frozen=True):
    """Where a checkpoint was uploaded to."""

    url: str
    time: float
    """Unix seconds at which it was whole there."""


class CheckpointStore:
    """The checkpoints in one folder. Any thread; everything waits for the disk.

    One process at a time may write to it: the one that holds the run's folder. Reading needs no lock.

    The folder may be a stranger's: below it no link is followed, nor is the folder itself one where it is the
    ``checkpoints`` of a run's folder. Every method may raise `UnsafeFile`, an `OSError`, where it is.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._root, self._within = _root_of(self.folder)
        self._new: dict[CheckpointName, disk.Folder] = {}  # begun, neither committed nor abandoned
        self._left: dict[CheckpointName, set[str]] = {}  # temporary folders that exist, or may
        self.lock = threading.Lock()
        """Held by whoever decides what is to be removed, from looking at what there is to removing it."""

    # ------------------------------------------------------------------------------------------- reading

    def names(self) -> list[CheckpointName]:
        """All checkpoints that were committed, in the order in which they came about. Looks at names only."""
        return sorted(name for entry in self._entries() if (name := CheckpointName.parse(entry)) is not None)

    def _entries(self) -> list[str]:
        try:
            with self._opened() as folder:
                return os.listdir(folder.path if folder.fd is None else folder.fd)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def path(self, name: CheckpointName) -> Path:
        """Where a checkpoint is, or would be."""
        return self.folder / str(name)

    def manifest(self, name: CheckpointName) -> Manifest:
        """Read a checkpoint's manifest.

        Raises:
            CheckpointNotFound: There is no such checkpoint.
            CheckpointDamaged: The manifest is missing or changed.
            CheckpointTooNew: A later version wrote it.
        """
        return read_manifest(self.path(name))

    def line(self) -> list[CheckpointName]:
        """The checkpoints that the run as it stands has come from, the newest first."""
        return line_of(self.names(), self.attempts(), lambda name: self.manifest(name).parent)

    def scores(
        self,
        metric: str | None = None,
        on_unread: Callable[[str, Exception], None] = lambda name, error: None,
        run_id: str | None = None,
    ) -> dict[CheckpointName, Metric]:
        """The metric of each checkpoint of the line that has one; see `events.checkpoint.lineage.scores_of`."""
        return scores_of(self.line(), self.manifest, metric, on_unread, run_id)

    def attempts(self) -> dict[int, AttemptNote]:
        """What each attempt started from, as far as it was noted."""
        return {note.attempt: note for note in self._notes().values() if note is not None}

    def damaged_notes(self) -> dict[str, CheckpointDamaged]:
        """The notes of attempts that are changed, or missing where there are checkpoints: by file, what is wrong."""
        notes = self._notes()
        damaged = {
            file: CheckpointDamaged(
                f"{self.folder / file} was cut or changed: what its attempt started from is not sure"
            )
            for file, note in notes.items()
            if note is None
        }
        for attempt in {name.attempt for name in self.names()}:
            file = attempt_name(attempt)
            if file not in notes:
                damaged[file] = CheckpointDamaged(
                    f"{self.folder / file} is missing, though that attempt has checkpoints"
                )
        return damaged

    def _notes(self) -> dict[str, AttemptNote | None]:
        """By file; None for what is damaged."""
        notes: dict[str, AttemptNote | None] = {}
        for entry in self._entries():
            if is_attempt_name(entry):
                try:
                    notes[entry] = decode_attempt(entry, read_below(self._root, self._within + entry, NOTE_BYTES))
                except OSError:
                    notes[entry] = None
        return notes

    @property
    def last_attempt(self) -> int:
        """The newest attempt of which there is a trace; 0 for none."""
        return max([*self.attempts(), *(name.attempt for name in self.names())], default=0)

    @property
    def last_seq(self) -> int:
        """The greatest ``seq`` that a checkpoint knows of; 0 for none."""
        seq = 0
        for name in self.names():
            with contextlib.suppress(CheckpointDamaged, CheckpointNotFound, CheckpointTooNew):
                found = self.manifest(name).seq
                seq = max(seq, found if found < LAST_SEQ else 0)
        return seq

    @property
    def source(self) -> str | None:
        """Where else the newest attempt began, if it has no checkpoint of its own yet."""
        attempts = self.attempts()
        return attempts[max(attempts)].source if attempts and not self.line() else None

    def candidates(self) -> Iterator[CheckpointName]:
        """What to try to resume from, best first: the line, and should all of it be damaged, whatever else there is.

        Nothing if the newest attempt began anew and has no checkpoint yet: that is what it is to be continued as.
        """
        return candidates_of(self.line(), self.names())

    # ------------------------------------------------------------------------------------------- writing

    def prepare(self, attempt: AttemptNote) -> None:
        """Begin an attempt: make the folder, remove what a killed process has left, and note where the line goes on.

        Raises:
            OSError: The disk refused.
        """
        self.make()
        # What it lies in may be new too, or was made by a process that was killed before it came to this.
        for above in self.folder.absolute().parents:
            with contextlib.suppress(PermissionError):  # one that we may not read is not one that we have made
                disk.sync_folder(above)
            if os.path.ismount(above):
                break
        for entry in self._entries():
            if entry.startswith((".step-", ".attempt-")) and entry.endswith(".tmp"):
                try:
                    self._discard(entry)
                except OSError as error:  # it is in nobody's way
                    from events.log import logger  # not for those who only look: it takes its time

                    logger.warning(f"{self.folder / entry} is left of a process that was killed, and stays: {error}")
        self.note(attempt)

    def make(self) -> None:
        """Make the folder where it is missing. Raises `OSError` if the disk refused."""
        if self._within:
            make_folder_below(self._root, self._within)
        else:
            self.folder.mkdir(exist_ok=True)

    def note(self, attempt: AttemptNote) -> None:
        """Note durably what an attempt started from. Raises `OSError` if the disk refused."""
        replace_below(self._root, self._within + attempt_name(attempt.attempt), encode_attempt(attempt))

    def begin(self, name: CheckpointName) -> disk.Folder:
        """Make the temporary folder in which a checkpoint's files are to be written; it stays open until `commit`.

        Raises:
            OSError: The disk refused.
        """
        self._close(name)
        with self._opened() as folder:
            self._new[name] = made = folder.make(self._temporary(name))
        return made

    def commit(self, manifest: Manifest) -> Path:
        """Give a checkpoint its name, when all of its files are written and fsynced in its temporary folder.

        Returns:
            The checkpoint's folder. It is whole and durable.

        Raises:
            OSError: The disk refused; there is no checkpoint of that name.
        """
        name = manifest.name
        new = self._new[name]
        temporary, final = new.path.name, str(name)
        disk.write_parts(new, MANIFEST_NAME, [encode_manifest(manifest)])
        new.sync()
        with self._opened() as folder:
            folder.rename(temporary, final)
            try:
                if not folder.has(new, final):
                    raise OSError(errno.ESTALE, "another process has exchanged the folder", str(new.path))
                folder.sync()
            except OSError:
                # Not durable, so not to be had: its name may be gone after a power failure, and others may go by it.
                with contextlib.suppress(OSError):
                    folder.rename(final, temporary)
                raise
        self._left[name].discard(temporary)
        self._close(name)
        return self.path(name)

    def abandon(self, name: CheckpointName) -> None:
        """Remove what was written of a checkpoint that is not to be committed; as far as the disk lets us."""
        self._close(name)
        with contextlib.suppress(OSError):
            self._discard_left(name)

    def remove(self, name: CheckpointName) -> None:
        """Remove a checkpoint. It is gone at once and as a whole: first its name, then its files.

        Raises:
            OSError: The disk refused. What is left has no checkpoint's name any more, or is still whole.
        """
        self._discard_left(name)  # what an earlier try has left
        with self._opened() as folder:
            temporary = self._temporary(name)
            try:
                folder.rename(str(name), temporary)
            except FileNotFoundError:
                self._left[name].discard(temporary)
                return
        self._discard_left(name)

    def _discard_left(self, name: CheckpointName) -> None:
        for temporary in list(self._left.get(name, ())):
            self._discard(temporary)
            self._left[name].discard(temporary)

    def _discard(self, temporary: str) -> None:
        """Remove a temporary folder, if there is one, when it is certain that it has no other name."""
        with self._opened() as folder, contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(folder.stat(temporary).st_mode):
                # Or, after a power failure, a checkpoint's name might be back without files.
                folder.sync()
            folder.remove(temporary)

    def _temporary(self, name: CheckpointName) -> str:
        """The name of a new temporary folder, which is remembered until it is known to be gone."""
        temporary = f".{name}.{secrets.token_hex(4)}.tmp"
        self._left.setdefault(name, set()).add(temporary)
        return temporary

    def _close(self, name: CheckpointName) -> None:
        if (new := self._new.pop(name, None)) is not None:
            new.close()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[disk.Folder]:
        """Open the folder, following no link below the user's one. Raises `UnsafeFile` and other `OSError`."""
        with open_folder_below(self._root, self._within or ".") as (fd, path):
            yield disk.Folder(path, fd)

    # ------------------------------------------------------------------------------------------- uploads

    def mark_uploaded(self, name: CheckpointName, upload: Upload) -> None:
        """Note that a checkpoint is whole in a remote store. Raises `OSError` if the disk refuses."""
        replace_below(self._root, f"{self._within}{name}/{_UPLOADED_NAME}", msgspec.json.encode(upload) + b"\n")

    def upload_of(self, name: CheckpointName) -> Upload | None:
        """Where a checkpoint was uploaded to; None if it was not, as far as this folder knows."""
        try:
            data = read_below(self._root, f"{self._within}{name}/{_UPLOADED_NAME}", NOTE_BYTES)
            return msgspec.json.decode(data, type=Upload)
        except (OSError, ValueError, RecursionError):
            return None


def _root_of(folder: Path) -> tuple[Path, str]:
    """A folder of checkpoints as the user's folder, which may be a link, and what is below it: no link.

    Returns:
        That folder, and the path below it, which is empty or ends with a slash.
    """
    if folder.name in (CHECKPOINTS_DIR, RESUMED_DIR):
        return folder.parent, f"{folder.name}/"
    return folder, ""


def _checkpoint_root_of(folder: Path) -> tuple[Path, str]:
    """The same of the folder of one checkpoint, of any name."""
    if CheckpointName.parse(folder.name) is None:
        return folder, ""
    root, within = _root_of(folder.parent)
    return root, f"{within}{folder.name}/"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the checkpoint in a folder of any name; see `CheckpointStore.manifest`."""
    path = folder / MANIFEST_NAME
    root, within = _checkpoint_root_of(folder)
    try:
        data = read_below(root, within + MANIFEST_NAME, MANIFEST_BYTES)
    except FileNotFoundError as error:
        if folder.is_dir():
            raise CheckpointDamaged(f"{path} is missing: the folder holds no whole checkpoint") from error
        raise CheckpointNotFound(f"{folder} does not exist") from error
    except OSError as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error}") from error
    manifest = decode_manifest(data, str(path))
    if CheckpointName.parse(folder.name) not in (None, manifest.name):
        raise CheckpointDamaged(f"{path} is that of {manifest.name}: the folder was renamed, or the file exchanged")
    return manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Read every file of a checkpoint and compare it with its manifest.

    Raises:
        CheckpointDamaged: A file is missing, cut or changed, or is not a regular one; names the first one.
    """
    for name, entry in manifest.files.items():
        with _opened(folder, name, entry) as file:
            digest = xxhash.xxh3_128()
            nbytes = 0
            while nbytes <= entry.nbytes and (chunk := file.read(_CHUNK)):  # no further: it may grow meanwhile
                digest.update(chunk)
                nbytes += len(chunk)
        check_file(folder / name, entry.nbytes, entry.xxh3_128, nbytes, digest.hexdigest())


def check_size(folder: Path, name: str, entry: FileEntry) -> None:
    """Compare the size of a checkpoint's file with its manifest. Raises as `verify` does."""
    with _opened(folder, name, entry):
        pass


def read_file(folder: Path, name: str, entry: FileEntry) -> memoryview:
    """Read a file of a checkpoint to page-aligned memory, and compare it with its manifest.

    Raises:
        CheckpointDamaged: It is missing, cut or changed, is not a regular one, or has more bytes than this machine
            has memory.
    """
    path = folder / name
    with _opened(folder, name, entry) as file:
        memory = memory_for(path, entry.nbytes)
        digest = xxhash.xxh3_128()
        done = 0
        while done < entry.nbytes and (count := file.readinto(memory[done : done + _CHUNK])):
            digest.update(memory[done : done + count])
            done += count
        if done == entry.nbytes and file.read(1):
            done = os.fstat(file.fileno()).st_size
    check_file(path, entry.nbytes, entry.xxh3_128, done, digest.hexdigest())
    return memory


def read_weights(path: Path, *, follow: bool) -> memoryview:
    """Read a safetensors file to memory that may be written to.

    Args:
        follow: Whether the file may be a link.

    Raises:
        CheckpointDamaged: It is not a regular file, has more bytes than this machine has memory, or is cut meanwhile.
        OSError: It cannot be read.
    """
    if follow:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    else:
        fd = open_below(path.parent, path.name)
    with open(fd, "rb", buffering=0) as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointDamaged(f"{path} is not a regular file")
        memory = memory_for(path, found.st_size)
        done = 0
        while done < len(memory) and (count := file.readinto(memory[done : done + _CHUNK])):
            done += count
    if done < len(memory):
        raise CheckpointDamaged(f"{path} was cut while it was read")
    return memory


def memory_for(path: Path | str, nbytes: int) -> memoryview:
    """Page-aligned memory for a file. Raises `CheckpointDamaged` if it has more bytes than this machine has memory."""
    if nbytes > _MEMORY_BYTES:
        raise CheckpointDamaged(f"{path} has {nbytes:,} bytes, more than the memory of this machine")
    return memoryview(mmap.mmap(-1, max(1, nbytes)))[:nbytes]


def open_file(folder: Path, name: str) -> io.FileIO:
    """Open a regular file of a checkpoint, following no link. Raises `UnsafeFile` and other `OSError`."""
    root, within = _checkpoint_root_of(folder)
    return open(open_below(root, within + name), "rb", buffering=0)


@contextlib.contextmanager
def _opened(folder: Path, name: str, entry: FileEntry) -> Iterator[io.FileIO]:
    """A file of a checkpoint, opened if it is a regular one of the size in the manifest."""
    path = folder / name
    try:
        with open_file(folder, name) as file:
            size = os.fstat(file.fileno()).st_size
            check_file(path, entry.nbytes, "", size, "")  # before so much is read, or memory is asked for
            yield file
    except OSError as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error.strerror or error}") from error


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return 2**62


_MEMORY_BYTES = _memory_bytes()


def check_file(path: Path, nbytes: int, digest: str, found_nbytes: int, found_digest: str) -> None:
    """Compare a file with what its manifest says. Raises `CheckpointDamaged`."""
    if found_nbytes != nbytes:
        raise CheckpointDamaged(f"{path} has {found_nbytes:,} bytes instead of {nbytes:,}: it was cut or replaced")
    if found_digest != digest:
        raise CheckpointDamaged(f"{path} holds other bytes than were written: its hash is not that of the manifest")
