"""Checkpoints on disk and in remote stores, read through one interface, without torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import xxhash

from events.checkpoint import files, store
from events.checkpoint.lineage import by_age, is_attempt_name, ranked
from events.checkpoint.manifest import MANIFEST_NAME, CheckpointName, Manifest
from events.checkpoint.remote import RemoteStore
from events.checkpoint.remote_layout import FilePart
from events.errors import CheckpointDamaged, CheckpointNotFound
from events.run.folder import LOCK_NAME


class LocalSource:
    """Checkpoints on disk: of a run folder, of a folder of checkpoints, or a single one, even if renamed.

    Raises:
        CheckpointNotFound: The path is none of these.
    """

    def __init__(self, path: str) -> None:
        folder = Path(os.path.abspath(path))
        if not folder.is_dir():
            raise CheckpointNotFound(f"{path} {'is not a folder' if folder.exists() else 'does not exist'}")
        entries = os.listdir(folder)
        self.where = path
        self.only = CheckpointName.parse(folder.name)
        """The checkpoint at the path, if it is a single one."""
        self._renamed: Path | None = None
        if self.only is not None:
            folder = folder.parent
        elif MANIFEST_NAME in entries:
            self._renamed, self.only = folder, files.read_manifest(folder).name
        elif store.CHECKPOINTS_DIR in entries or LOCK_NAME in entries:
            folder /= store.CHECKPOINTS_DIR
        elif entries and not any(CheckpointName.parse(entry) or is_attempt_name(entry) for entry in entries):
            raise CheckpointNotFound(f"{path} is not a run folder, and holds no checkpoints")
        self._store = store.CheckpointStore(folder)
        alone = [self.only] if self.only is not None and self._renamed is not None else None
        self.line = alone or self._store.line()
        self.names = alone or by_age(self.line, self._store.names())[::-1]
        """All checkpoints: those of the lineage, then the superseded ones, newest first."""

    def path(self, name: CheckpointName) -> str:
        return str(self._renamed or self._store.path(name))

    def uploaded(self, name: CheckpointName) -> str | None:
        upload = self._store.upload_of(name) if self._renamed is None else None
        return upload.url if upload is not None else None

    def manifest(self, name: CheckpointName) -> Manifest:
        return files.read_manifest(Path(self.path(name)))

    def ranked(self, on_unread: Callable[[str, Exception], None]) -> list[CheckpointName]:
        """The checkpoints of the lineage with a metric, the best first.

        Args:
            on_unread: Called with name and error of each unreadable manifest.
        """
        return ranked(self._store.scores(on_unread=on_unread))

    def check(self, manifest: Manifest) -> None:
        """Compare the sizes of a checkpoint's files with its manifest. Raises `CheckpointDamaged`."""
        for file, entry in manifest.files.items():
            files.check_size(Path(self.path(manifest.name)), file, entry)

    def verify(self, manifest: Manifest) -> None:
        """Read all of its files. Raises `CheckpointDamaged`."""
        files.verify(Path(self.path(manifest.name)), manifest)

    def read(self, manifest: Manifest, file: str) -> memoryview:
        """Read a file to memory and verify it. Raises `CheckpointDamaged`, or `KeyError` without such a file."""
        return files.read_file(Path(self.path(manifest.name)), file, manifest.files[file])


class RemoteSource:
    """Checkpoints in a remote store: of a run, or a single one. Its members are those of `LocalSource`.

    Raises:
        CheckpointNotFound: There is no such checkpoint or folder.
        UploadError: The address is invalid or the store unreachable; raised by all methods.
    """

    def __init__(self, url: str) -> None:
        base, _, last = url.rstrip("/").rpartition("/")
        self.only = CheckpointName.parse(last)
        self.where = base if self.only is not None else url.rstrip("/")
        self._store = RemoteStore(self.where)
        self._plans: dict[CheckpointName, dict[str, list[FilePart]]] = {}
        self.line = self._store.line()
        self.names = by_age(self.line, self._store.names())[::-1]
        self.path = self.uploaded = self._store.url_of
        self.manifest = self._store.manifest
        folder = self._store.folder
        if self.only not in (None, *self.names) or (folder is not None and not folder.is_dir()):
            raise CheckpointNotFound(f"{url} does not exist")

    def ranked(self, on_unread: Callable[[str, Exception], None]) -> list[CheckpointName]:
        return ranked(self._store.scores(on_unread=on_unread))

    def check(self, manifest: Manifest) -> None:
        self._plans[manifest.name] = self._store.plan(manifest)

    def verify(self, manifest: Manifest) -> None:
        for file in manifest.files:
            self._read(manifest, file, None)

    def read(self, manifest: Manifest, file: str) -> memoryview:
        memory = files.memory_for(f"{self.path(manifest.name)}/{file}", manifest.files[file].nbytes)
        self._read(manifest, file, memory)
        return memory

    def _read(self, manifest: Manifest, file: str, into: memoryview | None) -> None:
        """Read a file in pieces, several at a time, because the store may be far away."""
        if manifest.name not in self._plans:
            self.check(manifest)
        digest, done = xxhash.xxh3_128(), 0
        with contextlib.closing(self._store.read(manifest.name, self._plans[manifest.name][file])) as pieces:
            for piece in pieces:
                digest.update(piece)
                if into is not None:
                    into[done : done + len(piece)] = piece
                done += len(piece)
        if digest.hexdigest() != manifest.files[file].xxh3_128:
            raise CheckpointDamaged(f"{self.path(manifest.name)}/{file} holds other bytes than were written")


Source = LocalSource | RemoteSource


def open_source(path: str) -> Source:
    return RemoteSource(path) if "://" in path else LocalSource(path)


def chosen(source: Source, names: list[CheckpointName]) -> list[CheckpointName]:
    """The named checkpoints, or all of the source. Raises `CheckpointNotFound`."""
    there = source.names if source.only is None else [source.only]
    for name in names:
        if name not in there:
            raise CheckpointNotFound(f"there is no checkpoint {name} in {source.where}")
    return list(dict.fromkeys(names)) or there


def problem(source: Source, name: CheckpointName, error: object) -> str:
    """An error's text without the checkpoint's path."""
    return str(error).replace(f"{source.path(name)}/", "")
