"""The checkpoints of a run on disk: committed atomically, found by their line, removed.

::

    checkpoints/
        attempt-2.json        the parent of attempt 2, from which "auto" finds the line
        step-500.a1/          a checkpoint; it has this name only once it is complete and durable
            tensors.safetensors
            state.msgpack
            manifest.json     written last; lists and hashes the others
            uploaded          its URL in the remote store, after the upload
        .step-550.a1.5f0c31d2.tmp/   a checkpoint that is being written, or the rest of a killed process

**Commit**: all files are written and fsynced in a temporary folder, the manifest last; the folder is fsynced, renamed,
and its parent fsynced; then `CheckpointSaved` is published. The temporary folder is new, has a random name, and stays
open, so that no other user can prepare it, nor redirect a write through a link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from events.checkpoint import disk
from events.checkpoint.files import CHECKPOINTS_DIR as CHECKPOINTS_DIR
from events.checkpoint.files import RESUMED_DIR as RESUMED_DIR
from events.checkpoint.files import read_manifest, root_of
from events.checkpoint.lineage import (
    AttemptNote,
    Lineage,
    attempt_name,
    decode_attempt,
    encode_attempt,
    is_attempt_name,
)
from events.checkpoint.manifest import MANIFEST_NAME, CheckpointName, Manifest, encode_manifest
from events.errors import CheckpointDamaged, CheckpointNotFound, CheckpointTooNew
from events.safe_files import make_folder_below, open_folder_below, read_below, replace_below

WEIGHTS_NAME = "weights.safetensors"
"""File in the run folder with the module's weights."""
_UPLOADED_NAME = "uploaded"
NOTE_BYTES = 65_536
"""Maximum bytes per note: of an attempt, of an upload."""
LAST_SEQ = 2**51
"""Maximum ``seq`` that a run continues from; a greater one is damage."""


class Upload(msgspec.Struct, frozen=True):
    """The upload of a checkpoint."""

    url: str
    time: float
    """Unix seconds of its completion."""


class CheckpointStore(Lineage):
    """The checkpoints in one folder. Any thread; every method waits for the disk.

    Only the process that holds the run folder may write. Reading needs no lock.

    The folder may be untrusted: no link below it is followed, and the ``checkpoints`` of a run folder may not be a link
    itself. Every method may raise `UnsafeFile`, an `OSError`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._root, self._within = root_of(self.folder)
        self._new: dict[CheckpointName, disk.Folder] = {}  # neither committed nor abandoned yet
        self._left: dict[CheckpointName, set[str]] = {}  # temporary folders that may exist
        self.lock = threading.Lock()
        """Held from listing checkpoints to removing some of them."""

    # ------------------------------------------------------------------------------------------- reading

    def names(self) -> list[CheckpointName]:
        return sorted(name for entry in self._entries() if (name := CheckpointName.parse(entry)) is not None)

    def _entries(self) -> list[str]:
        try:
            with self._opened() as folder:
                return os.listdir(folder.path if folder.fd is None else folder.fd)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def path(self, name: CheckpointName) -> Path:
        """Return the folder of a checkpoint, which need not exist."""
        return self.folder / str(name)

    def manifest(self, name: CheckpointName) -> Manifest:
        return read_manifest(self.path(name))

    def attempts(self) -> dict[int, AttemptNote]:
        return {note.attempt: note for note in self._notes().values() if note is not None}

    def damaged_notes(self) -> dict[str, CheckpointDamaged]:
        """Return the errors of changed notes, and of missing notes of attempts with checkpoints, by file."""
        notes = self._notes()
        damaged = {
            file: CheckpointDamaged(f"{self.folder / file} was changed, so that the parent of its attempt is unknown")
            for file, note in notes.items()
            if note is None
        }
        for attempt in {name.attempt for name in self.names()}:
            file = attempt_name(attempt)
            if file not in notes:
                damaged[file] = CheckpointDamaged(
                    f"{self.folder / file} is missing, although that attempt has checkpoints"
                )
        return damaged

    def _notes(self) -> dict[str, AttemptNote | None]:
        """Return the notes by file; None for a damaged one."""
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
        """Number of the newest attempt; 0 for none."""
        return max([*self.attempts(), *(name.attempt for name in self.names())], default=0)

    @property
    def last_seq(self) -> int:
        """The greatest ``seq`` in a manifest; 0 for none."""
        seq = 0
        for name in self.names():
            with contextlib.suppress(CheckpointDamaged, CheckpointNotFound, CheckpointTooNew):
                found = self.manifest(name).seq
                seq = max(seq, found if found < LAST_SEQ else 0)
        return seq

    @property
    def source(self) -> str | None:
        """Checkpoint of another run that the newest attempt started from, if its line has no checkpoint yet."""
        attempts = self.attempts()
        return attempts[max(attempts)].source if attempts and not self.line() else None

    # ------------------------------------------------------------------------------------------- writing

    def prepare(self, attempt: AttemptNote) -> None:
        """Start an attempt: create the folder, remove temporary folders of killed processes, and write the note.

        Raises:
            OSError: The disk failed.
        """
        self.make()
        # The folders above may be new too, or a killed process has created them without this.
        for above in self.folder.absolute().parents:
            with contextlib.suppress(PermissionError):  # not created by this user
                disk.sync_folder(above)
            if os.path.ismount(above):
                break
        for entry in self._entries():
            if entry.startswith((".step-", ".attempt-")) and entry.endswith(".tmp"):
                try:
                    self._discard(entry)
                except OSError as error:  # harmless
                    from events.log import logger  # here, because readers do not need this slow import

                    logger.warning(f"{self.folder / entry}, left by a killed process, cannot be removed: {error}")
        self.note(attempt)

    def make(self) -> None:
        """Create the folder if it is missing. Raises `OSError`."""
        if self._within:
            make_folder_below(self._root, self._within)
        else:
            self.folder.mkdir(exist_ok=True)

    def note(self, attempt: AttemptNote) -> None:
        """Write the note of an attempt durably. Raises `OSError`."""
        replace_below(self._root, self._within + attempt_name(attempt.attempt), encode_attempt(attempt))

    def begin(self, name: CheckpointName) -> disk.Folder:
        """Create the temporary folder for a checkpoint's files; it stays open until `commit`.

        Raises:
            OSError: The disk failed.
        """
        self._close(name)
        with self._opened() as folder:
            self._new[name] = made = folder.make(self._temporary(name))
        return made

    def join(self, temporary: str) -> disk.Folder:
        """Open the folder that `begin` has created in another process; the caller closes it. Raises `OSError`."""
        with self._opened() as folder:
            return folder.enter(temporary)

    def commit(self, manifest: Manifest) -> Path:
        """Commit a checkpoint whose files are written and fsynced in its temporary folder.

        Returns:
            The checkpoint's folder, complete and durable.

        Raises:
            OSError: The disk failed; the checkpoint does not exist.
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
                # Not durable: after a power failure the name might be gone, although other files refer to it.
                with contextlib.suppress(OSError):
                    folder.rename(final, temporary)
                raise
        self._left[name].discard(temporary)
        self._close(name)
        return self.path(name)

    def abandon(self, name: CheckpointName) -> None:
        """Remove the temporary files of a checkpoint that will not be committed; ignores failures."""
        self._close(name)
        with contextlib.suppress(OSError):
            self._discard_left(name)

    def sweep(self) -> None:
        """Remove the files that other processes have written to checkpoints after `abandon`; ignores failures."""
        for name in self._left.keys() - self._new.keys():
            with contextlib.suppress(OSError):
                self._discard_left(name)

    def remove(self, name: CheckpointName) -> None:
        """Remove a checkpoint atomically: first its name, then its files.

        Raises:
            OSError: The disk failed. The checkpoint is complete, or has lost its name.
        """
        self._discard_left(name)  # of an earlier try
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
        """Remove a temporary folder, if it exists, once it is certain that it has no other name."""
        with self._opened() as folder, contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(folder.stat(temporary).st_mode):
                # Otherwise a power failure could restore a checkpoint's name without its files.
                folder.sync()
            folder.remove(temporary)

    def _temporary(self, name: CheckpointName) -> str:
        """Return the name of a new temporary folder, which is remembered until it is removed."""
        temporary = f".{name}.{secrets.token_hex(4)}.tmp"
        self._left.setdefault(name, set()).add(temporary)
        return temporary

    def _close(self, name: CheckpointName) -> None:
        if (new := self._new.pop(name, None)) is not None:
            new.close()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[disk.Folder]:
        """Open the folder without following links below the user's folder. Raises `UnsafeFile` and other `OSError`."""
        with open_folder_below(self._root, self._within or ".") as (fd, path):
            yield disk.Folder(path, fd)

    # ------------------------------------------------------------------------------------------- uploads

    def mark_uploaded(self, name: CheckpointName, upload: Upload) -> None:
        """Note that a checkpoint was uploaded. Raises `OSError`."""
        replace_below(self._root, f"{self._within}{name}/{_UPLOADED_NAME}", msgspec.json.encode(upload) + b"\n")

    def uploaded_to(self, url: str) -> set[CheckpointName]:
        """Return the checkpoints that were uploaded below the URL of a run, and not only to an earlier one."""
        uploads = {name: self.upload_of(name) for name in self.names()}
        return {name for name, upload in uploads.items() if upload is not None and upload.url == f"{url}/{name}"}

    def upload_of(self, name: CheckpointName) -> Upload | None:
        """Return the noted upload of a checkpoint; None without a readable note."""
        try:
            data = read_below(self._root, f"{self._within}{name}/{_UPLOADED_NAME}", NOTE_BYTES)
            return msgspec.json.decode(data, type=Upload)
        except (OSError, ValueError, RecursionError):
            return None
