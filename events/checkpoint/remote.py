"""The checkpoints of one run in a remote store: uploaded part by part, visible only once whole, downloaded, removed.

How they lie there: `events.checkpoint.remote_layout`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Set
from pathlib import Path

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
)
from events.checkpoint.manifest import (
    MANIFEST_BYTES,
    MANIFEST_NAME,
    CheckpointName,
    Manifest,
    decode_manifest,
    encode_manifest,
)
from events.checkpoint.objects import Limits, Objects
from events.checkpoint.parallel import in_order
from events.checkpoint.remote_layout import (
    PARTS_NAME,
    Part,
    Parts,
    decode_parts,
    encode_parts,
    folders_of,
    parts_for,
    plan_of,
    visible,
)
from events.checkpoint.store import NOTE_BYTES, CheckpointStore, Upload, check_file, check_size, open_file, verify
from events.errors import CheckpointDamaged, CheckpointNotFound, CheckpointTooNew, UploadError

_THREAD = "stagecast-upload"
_MOST_PARTS = 10**6
"""Maximum objects per checkpoint."""
LOST = 1_000
"""Objects that may be lost of a checkpoint for the first of them to be named."""
_READ_BYTES = 16 * 2**20
"""How much of an object is read at once."""


class RemoteStore:
    """The checkpoints of one run below a URL. Any thread; everything waits for the store, as `Limits` says.

    One process at a time may write: the one that holds the run's folder. Others may read meanwhile. Every method may
    raise `UploadError`: the store cannot be reached or refuses, with what to do about it.

    Args:
        url: Where the run's checkpoints are (`events.checkpoint.objects.run_url`).

    Raises:
        UploadError: It is no such URL, or contains credentials.
    """

    def __init__(self, url: str, limits: Limits | None = None) -> None:
        self._limits = limits if limits is not None else Limits()
        self._objects = Objects(url, self._limits)
        self.url = self._objects.url

    def check(self) -> None:
        """See whether the store can be reached and listed."""
        self._objects.check()

    def url_of(self, name: CheckpointName) -> str:
        """Where a checkpoint is, or would be."""
        return f"{self.url}/{name}"

    # ------------------------------------------------------------------------------------------- reading

    def names(self) -> list[CheckpointName]:
        """All checkpoints that are whole, in the order in which they came about."""
        return visible(folders_of(self._objects.sizes()))

    def manifest(self, name: CheckpointName) -> Manifest:
        """Read a checkpoint's manifest.

        Raises:
            CheckpointNotFound: There is no such checkpoint.
            CheckpointDamaged: The manifest is not as it was written.
            CheckpointTooNew: A later version wrote it.
        """
        data = self._objects.get(f"{name}/{MANIFEST_NAME}", MANIFEST_BYTES)
        if data is None:
            raise CheckpointNotFound(f"there is no checkpoint {self.url_of(name)}")
        manifest = decode_manifest(data, f"{self.url_of(name)}/{MANIFEST_NAME}")
        if manifest.name != name:
            raise CheckpointDamaged(f"{self.url_of(name)}/{MANIFEST_NAME} is that of {manifest.name}")
        return manifest

    def line(self) -> list[CheckpointName]:
        """The checkpoints that the run as it stands has come from, the newest first."""
        sizes = self._objects.sizes()
        return line_of(visible(folders_of(sizes)), self._attempts(sizes), lambda name: self.manifest(name).parent)

    def candidates(self) -> Iterator[CheckpointName]:
        """What to try to resume from, best first; as `CheckpointStore.candidates`."""
        return candidates_of(self.line(), self.names())

    @property
    def last_attempt(self) -> int:
        """The newest attempt of which there is a trace; 0 for none."""
        sizes = self._objects.sizes()
        return max([*self._attempts(sizes), *(name.attempt for name in folders_of(sizes))], default=0)

    def attempts(self) -> dict[int, AttemptNote]:
        """What each attempt started from, as far as it was noted."""
        return self._attempts(self._objects.sizes())

    def _attempts(self, sizes: Mapping[str, int]) -> dict[int, AttemptNote]:
        keys = [key for key, size in sizes.items() if is_attempt_name(key) and size <= NOTE_BYTES]
        reads = (functools.partial(self._objects.get, key, NOTE_BYTES) for key in keys)
        with contextlib.closing(in_order(reads, self._limits.parallel, _THREAD)) as found:
            decoded = [decode_attempt(key, data) for key, data in zip(keys, found, strict=True) if data is not None]
        return {attempt.attempt: attempt for attempt in decoded if attempt is not None}

    def download(self, name: CheckpointName, into: Path) -> Path:
        """Copy a checkpoint to a local folder of checkpoints; one that is there already, and whole, stays as it is.

        Every file is compared with the manifest while it is written. The checkpoint has its name only once it is whole
        and durable, so that whatever is killed leaves nothing that could be taken for one.

        Returns:
            Its folder.

        Raises:
            CheckpointNotFound: There is no such checkpoint, or it was removed meanwhile.
            CheckpointDamaged: Objects are missing, or hold other bytes than were written.
            CheckpointTooNew: A later version wrote it.
            OSError: The disk refused.
        """
        store = CheckpointStore(into)
        if os.path.lexists(store.path(name)):
            with contextlib.suppress(CheckpointDamaged, CheckpointNotFound):
                verify(store.path(name), store.manifest(name))
                return store.path(name)
            store.remove(name)
        manifest = self.manifest(name)
        noted = self._parts(name)
        if noted != parts_for(manifest, noted.part_bytes):
            raise CheckpointDamaged(f"{self.url_of(name)}/{PARTS_NAME} is that of another checkpoint")
        into.parent.mkdir(parents=True, exist_ok=True)
        store.make()
        plan = self._whole(manifest, noted.part_bytes)
        folder = store.begin(name)
        try:
            for file, entry in manifest.files.items():
                parts = plan[file]
                with contextlib.closing(self._read(name, parts)) as data:
                    found = disk.write_parts(folder, file, data)
                check_file(folder.path / file, entry.nbytes, entry.xxh3_128, *found)
            path = store.commit(manifest)
        except BaseException:  # goes on as itself, without what is there of the copy
            store.abandon(name)
            raise
        store.mark_uploaded(name, Upload(self.url_of(name), time.time()))
        return path

    def download_attempts(self, into: Path) -> None:
        """Copy the notes of what attempts started from, so that the next one gets a number of its own.

        Raises:
            OSError: The disk refused.
        """
        into.parent.mkdir(parents=True, exist_ok=True)
        store = CheckpointStore(into)
        store.make()
        for attempt in self.attempts().values():
            store.note(attempt)

    def _whole(self, manifest: Manifest, part_bytes: int) -> dict[str, list[Part]]:
        """What a checkpoint consists of, if all of that is there, in the right sizes: before the disk is filled.

        Raises:
            CheckpointDamaged, CheckpointNotFound: It is not.
        """
        name = manifest.name
        sizes = self._objects.sizes(f"{name}/")
        plan = plan_of(manifest, part_bytes, len(sizes) + LOST)
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

    def _read(self, name: CheckpointName, parts: list[Part]) -> Generator[bytes]:
        """The bytes of a file, in pieces."""

        def pieces() -> Iterator[tuple[Part, int, int]]:
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
        """What to raise where an object is missing of a checkpoint that was visible just now."""
        if self._objects.get(f"{name}/{MANIFEST_NAME}", MANIFEST_BYTES) is None:  # it goes first
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
        """Upload a checkpoint, or what is missing of it.

        Every file is read, and compared with the manifest, before the checkpoint becomes visible. When this returns or
        raises, nothing of it is under way any more.

        Args:
            folder: Where its files are.
            progress: Called on this thread with the bytes that are there, and the bytes of all.
            cancelled: Asked before each part.

        Returns:
            Whether it is whole in the store; False if it was cancelled.

        Raises:
            CheckpointDamaged: A local file is not as it was written.
            UploadError: Also if the store holds another checkpoint of this name.
            OSError: A file cannot be read.
        """
        name = manifest.name
        if self._is_there(name, manifest):
            return True
        plan = plan_of(manifest, part_bytes, _MOST_PARTS)
        keys = [part.key for parts in plan.values() for part in parts]
        if len({*keys, PARTS_NAME, MANIFEST_NAME}) != len(keys) + 2:
            raise UploadError(f"{folder} has files whose parts would be called as other files are: {', '.join(plan)}")
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
        # Whoever believes that this process is dead may have deleted parts since.
        if missing := self._missing(name, plan):
            raise UploadError(f"{self.url_of(name)}/{missing[0]} is gone, though it was put: does another run use it?")
        self._objects.put(f"{name}/{MANIFEST_NAME}", encode_manifest(manifest))
        return True

    def _is_there(self, name: CheckpointName, manifest: Manifest) -> bool:
        """Whether a checkpoint is whole in the store already. If it is there but is not whole, it disappears."""
        try:
            found = self.manifest(name)
            if found == manifest:
                self._whole(manifest, self._parts(name).part_bytes)
                return True
        except CheckpointNotFound:
            return False
        except CheckpointDamaged:
            found = manifest
        except CheckpointTooNew:
            found = None
        if found != manifest:
            raise UploadError(
                f"{self.url_of(name)} is another checkpoint than the local one of that name: give the run another"
                f" run_id, or another place to upload to"
            )
        self._objects.delete(f"{name}/{MANIFEST_NAME}")
        return False

    def _missing(self, name: CheckpointName, plan: dict[str, list[Part]]) -> list[str]:
        """The parts that are not there, or have another size."""
        sizes = self._objects.sizes(f"{name}/")
        parts = [part for parts in plan.values() for part in parts]
        return [part.key for part in parts if sizes.get(f"{name}/{part.key}") != part.nbytes]

    def _begin(self, name: CheckpointName, manifest: Manifest, part_bytes: int) -> dict[str, int]:
        """Note what is going to be uploaded; returns what is there of it already."""
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
        plan: dict[str, list[Part]],
        there: dict[str, int],
        cancelled: Callable[[], bool],
    ) -> Iterator[Callable[[], int]]:
        """The calls that put the parts which are not there; each returns how many bytes then are."""
        for file, entry in manifest.files.items():
            digest = xxhash.xxh3_128()
            with open_file(folder, file) as source:
                for part in plan[file]:
                    if cancelled():
                        return
                    key = f"{manifest.name}/{part.key}"
                    # Nothing here keeps the part's bytes while it is being put.
                    yield self._put_call(key, source, part.nbytes, digest, there.get(key) == part.nbytes)
                found = os.fstat(source.fileno()).st_size
            check_file(folder / file, entry.nbytes, entry.xxh3_128, found, digest.hexdigest())

    def _put_call(
        self, key: str, source: io.FileIO, nbytes: int, digest: xxhash.xxh3_128, is_there: bool
    ) -> Callable[[], int]:
        # Bytes of its own, not memory that is used again: a request that was given up may still be on its way.
        data = _read_exactly(source, nbytes)
        digest.update(data)
        return functools.partial(self._put, key, None if is_there else data, nbytes)

    def _put(self, key: str, data: bytes | None, nbytes: int) -> int:
        if data is not None:
            self._objects.put(key, data)
        return nbytes

    def note(self, attempts: Iterable[AttemptNote]) -> None:
        """Note what attempts started from, and forget later ones: they are of a run that had this name before."""
        sizes = self._objects.sizes()
        noted = self._attempts(sizes)
        last = 0
        for attempt in attempts:
            last = max(last, attempt.attempt)
            if noted.get(attempt.attempt) != attempt:
                self._objects.put(attempt_name(attempt.attempt), encode_attempt(attempt))
        self._delete(attempt_name(number) for number in noted if number > last)

    def remove(self, name: CheckpointName) -> None:
        """Remove a checkpoint: first its manifest, so that no reader sees half of it."""
        self._objects.delete(f"{name}/{MANIFEST_NAME}")
        self._delete(self._objects.sizes(f"{name}/"))

    def reap(self, keep: Set[CheckpointName] = frozenset()) -> list[CheckpointName]:
        """Remove what killed uploads, and killed removals, have left. Only while nothing is being uploaded.

        Args:
            keep: Those that are still going to be uploaded.

        Returns:
            Of which checkpoints there was something.
        """
        folders = folders_of(self._objects.sizes())
        whole = visible(folders)
        orphans = [name for name in folders if name not in whole and name not in keep]
        for name in orphans:
            self.remove(name)
        self._objects.clear_staged()
        return orphans

    def _delete(self, keys: Iterable[str]) -> None:
        # One request each: not every server, nor any of Google's, takes a list.
        deletes = (functools.partial(self._objects.delete, key) for key in list(keys))
        for _ in in_order(deletes, self._limits.parallel, _THREAD):
            pass


def _read_exactly(source: io.FileIO, nbytes: int) -> bytes:
    """So many bytes of a file, or fewer if it ends."""
    data = source.read(nbytes) or b""
    while len(data) < nbytes and (more := source.read(nbytes - len(data))):
        data += more
    return data
