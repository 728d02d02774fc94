"""The checkpoints of one run in a remote store. Their layout is in `events.checkpoint.remote_layout`."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Set
from pathlib import Path

import xxhash

from events.checkpoint import disk
from events.checkpoint.files import check_file, check_size, open_file, verify
from events.checkpoint.lineage import (
    AttemptNote,
    Lineage,
    attempt_name,
    decode_attempt,
    encode_attempt,
    is_attempt_name,
)
from events.checkpoint.manifest import (
    MANIFEST_BYTES,
    MANIFEST_NAME,
    CheckpointName,
    FileEntry,
    Manifest,
    decode_manifest,
    encode_manifest,
)
from events.checkpoint.objects import Limits, Objects
from events.checkpoint.parallel import in_order
from events.checkpoint.remote_layout import (
    PARTS_NAME,
    FilePart,
    Parts,
    decode_parts,
    encode_parts,
    folders_of,
    parts_for,
    plan_of,
    visible,
)
from events.checkpoint.store import NOTE_BYTES, CheckpointStore, Upload
from events.errors import CheckpointDamaged, CheckpointNotFound, CheckpointTooNew, UploadError

_THREAD = "stagecast-upload"
_MOST_PARTS = 10**6
"""Maximum objects per checkpoint."""
_LOST = 1_000
"""Maximum missing objects per checkpoint for an error that names the first one."""
_READ_BYTES = 16 * 2**20
"""Maximum bytes per read."""


class RemoteStore(Lineage):
    """The checkpoints of one run below a URL. Any thread; every method waits for the store, within its `Limits`.

    Only the process that holds the run folder may write. Every method may raise `UploadError`: the store cannot be
    reached, or refuses.

    Args:
        url: Of the run's checkpoints (`events.checkpoint.objects.run_url`).

    Raises:
        UploadError: The URL is invalid, or contains credentials.
    """

    def __init__(self, url: str, limits: Limits | None = None) -> None:
        self._limits = limits if limits is not None else Limits()
        self._objects = Objects(url, self._limits)
        self.url = self._objects.url
        self.folder = self._objects.folder
        """The folder of a ``file://`` URL; None for any other."""

    def check(self) -> None:
        """Check that the store can be reached and listed."""
        self._objects.check()

    def url_of(self, name: CheckpointName) -> str:
        """Return the URL of a checkpoint, which need not exist."""
        return f"{self.url}/{name}"

    # ------------------------------------------------------------------------------------------- reading

    def names(self) -> list[CheckpointName]:
        return visible(folders_of(self._objects.sizes()))

    def manifest(self, name: CheckpointName) -> Manifest:
        data = self._objects.get(f"{name}/{MANIFEST_NAME}", MANIFEST_BYTES)
        if data is None:
            raise CheckpointNotFound(f"there is no checkpoint {self.url_of(name)}")
        manifest = decode_manifest(data, f"{self.url_of(name)}/{MANIFEST_NAME}")
        if manifest.name != name:
            raise CheckpointDamaged(f"{self.url_of(name)}/{MANIFEST_NAME} is that of {manifest.name}")
        return manifest

    def attempts(self) -> dict[int, AttemptNote]:
        keys = [key for key, size in self._objects.sizes().items() if is_attempt_name(key) and size <= NOTE_BYTES]
        reads = (functools.partial(self._objects.get, key, NOTE_BYTES) for key in keys)
        with contextlib.closing(in_order(reads, self._limits.parallel, _THREAD)) as found:
            decoded = [decode_attempt(key, data) for key, data in zip(keys, found, strict=True) if data is not None]
        return {attempt.attempt: attempt for attempt in decoded if attempt is not None}

    def download(self, name: CheckpointName, into: Path) -> Path:
        """Copy a checkpoint to a local folder of checkpoints, unless a valid copy exists there; return its folder.

        Every file is compared with the manifest while it is written. The copy is committed as any checkpoint is, so
        that a killed process leaves no partial one.

        Raises:
            CheckpointNotFound: The checkpoint does not exist, or was removed during the download.
            CheckpointDamaged: Objects are missing, or hold other bytes than were written.
            CheckpointTooNew: A later version wrote it.
            OSError: The disk failed.
        """
        store = CheckpointStore(into)
        if os.path.lexists(store.path(name)):
            with contextlib.suppress(CheckpointDamaged, CheckpointNotFound):
                verify(store.path(name), store.manifest(name))
                return store.path(name)
            store.remove(name)
        manifest = self.manifest(name)
        plan = self.plan(manifest)
        into.parent.mkdir(parents=True, exist_ok=True)
        store.make()
        folder = store.begin(name)
        try:
            for file, entry in manifest.files.items():
                with contextlib.closing(self.read(name, plan[file])) as data:
                    check_file(folder.path / file, entry, disk.write_parts(folder, file, data))
            path = store.commit(manifest)
        except BaseException:  # propagates unchanged, without the partial copy
            store.abandon(name)
            raise
        store.mark_uploaded(name, Upload(self.url_of(name), time.time()))
        return path

    def plan(self, manifest: Manifest) -> dict[str, list[FilePart]]:
        """Return the objects of a checkpoint's files, if all of them exist in the right sizes.

        Raises:
            CheckpointDamaged, CheckpointNotFound: Otherwise.
        """
        name = manifest.name
        noted = self._parts(name)
        if noted != parts_for(manifest, noted.part_bytes):
            raise CheckpointDamaged(f"{self.url_of(name)}/{PARTS_NAME} is that of another checkpoint")
        sizes = self._objects.sizes(f"{name}/")
        plan = plan_of(manifest, noted.part_bytes, len(sizes) + _LOST)
        for parts in plan.values():
            for part in parts:
                found = sizes.get(f"{name}/{part.key}")
                if found is None:
                    raise self._lost(name, part.key)
                if found != part.nbytes:
                    where = f"{self.url_of(name)}/{part.key}"
                    raise CheckpointDamaged(f"{where} has {found:,} bytes instead of {part.nbytes:,}")
        return plan

    def _parts(self, name: CheckpointName) -> Parts:
        data = self._objects.get(f"{name}/{PARTS_NAME}", NOTE_BYTES)
        if data is None:
            raise self._lost(name, PARTS_NAME)
        return decode_parts(data, f"{self.url_of(name)}/{PARTS_NAME}")

    def read(self, name: CheckpointName, parts: list[FilePart]) -> Generator[bytes]:
        """Yield the bytes of a file, in pieces. Close it (`contextlib.closing`) where the loop over it may raise.

        Args:
            parts: From `plan`.

        Raises:
            CheckpointDamaged, CheckpointNotFound: An object is missing, or has another size.
        """

        def pieces() -> Iterator[tuple[FilePart, int, int]]:
            for part in parts:
                for begin in range(0, part.nbytes, _READ_BYTES):
                    yield part, begin, min(_READ_BYTES, part.nbytes - begin)

        reads = (functools.partial(self._objects.get_range, f"{name}/{part.key}", *at) for part, *at in pieces())
        with contextlib.closing(in_order(reads, self._limits.parallel, _THREAD)) as found:
            for (part, begin, nbytes), data in zip(pieces(), found, strict=True):
                if data is None:
                    raise self._lost(name, part.key)
                if len(data) != nbytes:
                    where = f"{self.url_of(name)}/{part.key}"
                    raise CheckpointDamaged(f"{where} has {begin + len(data):,} bytes instead of {part.nbytes:,}")
                yield data

    def _lost(self, name: CheckpointName, key: str) -> CheckpointNotFound | CheckpointDamaged:
        """Return the error for a missing object of a checkpoint that was complete a moment ago."""
        if self._objects.get(f"{name}/{MANIFEST_NAME}", MANIFEST_BYTES) is None:  # it is removed first
            return CheckpointNotFound(f"the checkpoint {self.url_of(name)} was removed while it was read")
        return CheckpointDamaged(f"{self.url_of(name)}/{key} is missing")

    # ------------------------------------------------------------------------------------------- writing

    def upload(
        self,
        folder: Path,
        manifest: Manifest,
        part_bytes: int,
        progress: Callable[[int, int], None],
        cancelled: Callable[[], bool],
    ) -> bool:
        """Upload the missing parts of a checkpoint; return whether it is complete, which it is unless cancelled.

        Every file is read, and compared with the manifest, before the checkpoint becomes visible. No request is pending
        when this returns or raises.

        Args:
            folder: Of its files.
            progress: Called on this thread with the uploaded and the total bytes.
            cancelled: Called before each part.

        Raises:
            CheckpointDamaged: A local file was changed.
            UploadError: The store cannot be reached, refuses, or holds another checkpoint of this name.
            OSError: A file cannot be read.
        """
        name = manifest.name
        if self._is_there(name, manifest):
            return True
        plan = plan_of(manifest, part_bytes, _MOST_PARTS)
        keys = [part.key for parts in plan.values() for part in parts]
        if len({*keys, PARTS_NAME, MANIFEST_NAME}) != len(keys) + 2:
            raise UploadError(f"{folder} has files whose parts would have the names of other files: {', '.join(plan)}")
        for file, entry in manifest.files.items():
            check_size(folder, file, entry)
        there = self._begin(name, manifest, part_bytes)
        puts = self._puts(folder, manifest, plan, there, cancelled)
        done = 0
        with contextlib.closing(in_order(puts, self._limits.parallel, _THREAD)) as results:
            for nbytes in results:
                done += nbytes
                progress(done, manifest.nbytes)
        if cancelled():
            return False
        # Another process that believes this one dead may have deleted parts.
        sizes = self._objects.sizes(f"{name}/")
        for part in (part for parts in plan.values() for part in parts):
            if sizes.get(f"{name}/{part.key}") != part.nbytes:
                raise UploadError(
                    f"{self.url_of(name)}/{part.key} was deleted during the upload; give the run another run_id"
                )
        self._objects.put(f"{name}/{MANIFEST_NAME}", encode_manifest(manifest))
        return True

    def _is_there(self, name: CheckpointName, manifest: Manifest) -> bool:
        """Whether the store holds the complete checkpoint; an incomplete one becomes invisible."""
        try:
            found = self.manifest(name)
            if found == manifest:
                self.plan(manifest)
                return True
        except CheckpointNotFound:
            return False
        except CheckpointDamaged:
            found = manifest
        except CheckpointTooNew:
            found = None
        if found != manifest:
            raise UploadError(
                f"{self.url_of(name)} is another checkpoint than the local one of that name; give the run another"
                f" run_id or upload URL"
            )
        self._objects.delete(f"{name}/{MANIFEST_NAME}")
        return False

    def _begin(self, name: CheckpointName, manifest: Manifest, part_bytes: int) -> dict[str, int]:
        """Write `PARTS_NAME`; return the sizes of the objects that exist already."""
        parts = parts_for(manifest, part_bytes)
        there = self._objects.sizes(f"{name}/")
        if f"{name}/{PARTS_NAME}" in there:
            with contextlib.suppress(CheckpointDamaged, CheckpointNotFound):
                if self._parts(name) == parts:
                    return there
        self._delete(there)
        self._objects.put(f"{name}/{PARTS_NAME}", encode_parts(parts))
        return {}

    def _puts(
        self,
        folder: Path,
        manifest: Manifest,
        plan: dict[str, list[FilePart]],
        there: dict[str, int],
        cancelled: Callable[[], bool],
    ) -> Iterator[Callable[[], int]]:
        """Yield calls that upload the missing parts; each returns the bytes of its part."""
        for file, entry in manifest.files.items():
            digest = xxhash.xxh3_128()
            with io.BufferedReader(open_file(folder, file)) as source:
                for part in plan[file]:
                    if cancelled():
                        return
                    key = f"{manifest.name}/{part.key}"
                    # New bytes, not reused memory: a request that timed out may still be pending. No local variable
                    # keeps them during the upload.
                    yield functools.partial(
                        self._put, key, _hashed(source.read(part.nbytes), digest), there.get(key) == part.nbytes
                    )
                found = os.fstat(source.fileno()).st_size
            check_file(folder / file, entry, FileEntry(found, digest.hexdigest()))

    def _put(self, key: str, data: bytes, is_there: bool) -> int:
        if not is_there:
            self._objects.put(key, data)
        return len(data)

    def note(self, attempts: Iterable[AttemptNote]) -> None:
        """Write the notes of attempts, and delete those of later ones, which an earlier run of this name has left."""
        noted = self.attempts()
        last = 0
        for attempt in attempts:
            last = max(last, attempt.attempt)
            if noted.get(attempt.attempt) != attempt:
                self._objects.put(attempt_name(attempt.attempt), encode_attempt(attempt))
        self._delete(attempt_name(number) for number in noted if number > last)

    def remove(self, name: CheckpointName) -> None:
        """Remove a checkpoint: first its manifest, so that no reader sees a partial one."""
        self._objects.delete(f"{name}/{MANIFEST_NAME}")
        self._delete(self._objects.sizes(f"{name}/"))

    def reap(self, keep: Set[CheckpointName] = frozenset()) -> list[CheckpointName]:
        """Remove the objects of killed uploads and removals; return their checkpoints. Not during an upload.

        Args:
            keep: Checkpoints that will be uploaded.
        """
        folders = folders_of(self._objects.sizes())
        whole = visible(folders)
        orphans = [name for name in folders if name not in whole and name not in keep]
        for name in orphans:
            self.remove(name)
        self._objects.clear_staged()
        return orphans

    def _delete(self, keys: Iterable[str]) -> None:
        # One request each: many servers, such as Google's, have no request for a list.
        deletes = (functools.partial(self._objects.delete, key) for key in list(keys))
        for _ in in_order(deletes, self._limits.parallel, _THREAD):
            pass


def _hashed(data: bytes, digest: xxhash.xxh3_128) -> bytes:
    digest.update(data)
    return data
