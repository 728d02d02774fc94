"""Upload checkpoints in the background: the newest first, then others that retention keeps.

There is no queue: after each upload the run folder is read again. An event only wakes the uploader, so repeated or
dropped events do not matter, and checkpoints of earlier attempts are uploaded, too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from events.bus.backlog import Published
from events.checkpoint.lineage import AttemptNote, by_age
from events.checkpoint.manifest import CheckpointName
from events.checkpoint.objects import Limits
from events.checkpoint.remote import RemoteStore
from events.checkpoint.settings import Checkpoints
from events.checkpoint.store import CheckpointStore, Upload
from events.errors import CheckpointDamaged, CheckpointError, CheckpointTooNew, UploadError
from events.log import logger
from events.messages import (
    CheckpointDeleted,
    CheckpointFailed,
    CheckpointSaved,
    CheckpointUploaded,
    CheckpointUploading,
    Event,
)
from events.origin import Origin
from events.sink import Delivery
from events.tracebacks import describe

UPLOADER_DELIVERY = Delivery(
    types=frozenset({CheckpointSaved}),
    # It never holds the loop. If events are dropped during a long upload, the newest one still wakes it.
    overflow="drop_oldest",
    capacity=4_096,
    on_error="retry",
    # As long as the run lasts, because an outage of the network ends.
    retries=2**31 - 1,
    backoff_s=1.0,
    max_backoff_s=60.0,
    # An upload may take any time; `CheckpointUploading` reports its progress.
    timeout_s=None,
    slow_s=86_400.0,
)
"""The uploader's delivery. It retries until the run ends."""

PROGRESS_S = 1.0
"""Seconds between two `CheckpointUploading` of one upload."""


class CheckpointUploader:
    """A supervised observer (`events.bus.target.Target`).

    All but the constructor and `abandon` runs on its own thread.

    Args:
        store: The run's checkpoints. Only this process writes to it.
        url: The address of this run's uploads (`events.checkpoint.objects.run_url`).
        settings: Retention and the size of the parts.
        publish: Publishes an event; from any thread.
        origin: Builds the headers of new events.
        retain: Called after each upload to delete local checkpoints that waited for it. Must not raise.
        give_up: Called when uploads are disabled, so that no local checkpoint waits for them.
        limits: Timeouts of the store.

    Raises:
        UploadError: The URL is not that of a store, or contains credentials.
    """

    payloads = False
    blocking = True

    def __init__(
        self,
        store: CheckpointStore,
        url: str,
        settings: Checkpoints,
        publish: Callable[[Event], None],
        origin: Origin,
        retain: Callable[[], None],
        limits: Limits | None = None,
        give_up: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._remote = RemoteStore(url, limits)
        self._settings = settings
        self._publish = publish
        self._origin = origin
        self._retain = retain
        self._give_up = give_up
        self._doing: Literal["open", "upload"] = "open"
        self._abandoned = threading.Event()
        self._ready = False
        self._untidy: CheckpointName | None = None  # the last upload since which the store was not tidied
        self._damaged: set[CheckpointName] = set()  # local ones that can never be uploaded
        self._failures = {"upload": 0, "delete": 0}  # in a row
        self._noted: dict[int, AttemptNote] = {}
        self._reported_at = 0.0

    @property
    def progress(self) -> tuple[str, int | None]:
        return self._doing, None

    def open(self) -> None:
        """Check the store, remove unfinished uploads of a killed process, and upload pending checkpoints.

        If the store holds checkpoints of another run of this name, `CheckpointFailed` reports it and uploads are
        disabled.

        Raises:
            UploadError: The store is unreachable, or refuses access.
        """
        try:
            self._prepare()
        except UploadError as error:
            for name in self.left()[:1]:
                self._fail(name, error, "upload")
            raise
        self._upload_pending()

    def deliver(self, batch: Sequence[Published], /) -> None:
        """Upload pending checkpoints. A retry after a failure resumes the upload.

        Raises:
            UploadError: The store is unreachable, or refuses access.
            OSError: The disk fails.
        """
        self._doing = "upload"
        self._upload_pending()

    def abandon(self) -> None:
        """Stop at the next part."""
        self._abandoned.set()

    def close(self) -> None:
        """Do nothing."""

    # ------------------------------------------------------------------------------------------- what is due

    def _prepare(self) -> None:
        if self._ready:
            return  # an upload failed, not the preparation
        self._remote.check()
        later = [name.attempt for name in self._remote.names() if name.attempt >= self._origin.attempt]
        if self._is_anothers(later):
            return
        self._note()
        try:
            self._remote.reap(keep=set(self.left()))
        except UploadError as error:  # perhaps the credentials may write, but not delete
            logger.warning(f"unfinished uploads cannot be removed: {error}")
        self._ready = True

    def _note(self) -> bool:
        """Write the origins of new attempts to the store; False if another run of this name has written there.

        An attempt has an origin only once it has started to train.
        """
        attempts = self._store.attempts()
        if attempts != self._noted:
            if self._is_anothers():
                return False
            self._remote.note(attempts.values())
            self._noted = attempts
        return True

    def _is_anothers(self, attempts: Sequence[int] = ()) -> bool:
        """Whether the store holds another run of this name; if so, disable uploads and deletions there.

        Args:
            attempts: Attempts that are known to be of another run.
        """
        own = self._store.attempts()
        strangers = [
            *attempts,
            *(number for number, note in self._remote.attempts().items() if own.get(number) != note),
        ]
        if not strangers:
            return False
        error = UploadError(
            f"{self._remote.url} holds attempt {max(strangers)} of another run of this name; use another run_id or"
            f" upload address, or resume that run with resume='auto' in an empty folder"
        )
        name = next(iter(self.left()), CheckpointName(0, self._origin.attempt))
        self._fail(name, error, "upload")
        logger.error(f"uploads are disabled: {error}", published=True)
        self._abandoned.set()  # no retry, which would delay the end of the run
        self._give_up()
        return True

    def left(self) -> list[CheckpointName]:
        """The checkpoints to upload: the newest, and others that retention keeps. Waits for the disk; any thread."""
        store = self._store
        going = store.expendable(self._settings, self._origin.run_id)
        done = {*going, *self._damaged, *store.uploaded_to(self._remote.url)}
        return [name for name in reversed(by_age(store.line(), store.names())) if name not in done]

    # --------------------------------------------------------------------------------------------- uploading

    def _upload_pending(self) -> None:
        while not self._abandoned.is_set():
            pending = self.left()
            if pending and not self._upload(pending[0]):
                continue  # it was deleted or is damaged
            if self._untidy is not None and not self._abandoned.is_set():
                self._tidy(self._untidy)
            if not pending:
                return

    def _upload(self, name: CheckpointName) -> bool:
        """Upload a checkpoint; returns whether it was completed."""
        path, began = self._store.path(name), time.monotonic()
        try:
            manifest = self._store.manifest(name)
            if manifest.run_id != self._origin.run_id:
                logger.warning(f"{path} is not uploaded; it belongs to run {manifest.run_id!r:.200}")
                self._damaged.add(name)
                return False
            if not self._note():
                return False
            epoch = manifest.epoch
            self._report(name, epoch, 0, manifest.nbytes, first=not self._failures["upload"])
            whole = self._remote.upload(
                path,
                manifest,
                self._settings.upload_part_bytes,
                lambda done, total: self._report(name, epoch, done, total),
                self._abandoned.is_set,
            )
            if whole:
                with self._store.lock:  # not in a folder that retention deletes
                    self._store.mark_uploaded(name, Upload(self._remote.url_of(name), time.time()))
        except (CheckpointError, OSError) as error:
            if not path.is_dir():  # retention has deleted it meanwhile; its unfinished upload is reaped
                self._untidy = name
                return False
            self._fail(name, error, "upload")
            if isinstance(error, CheckpointDamaged | CheckpointTooNew):
                self._damaged.add(name)  # a retry cannot help
                self._untidy = name
                return False
            raise
        if not whole:
            return False
        self._failures["upload"] = 0
        self._untidy = name
        self._publish(
            CheckpointUploaded(
                *self._origin.header_at(name.step, epoch),
                checkpoint=str(name),
                url=self._remote.url_of(name),
                nbytes=manifest.nbytes,
                duration_s=time.monotonic() - began,
            )
        )
        self._retain()
        return True

    def _report(self, name: CheckpointName, epoch: int, done: int, total: int, *, first: bool = False) -> None:
        now = time.monotonic()
        if first or now - self._reported_at >= PROGRESS_S:
            self._reported_at = now
            self._publish(
                CheckpointUploading(
                    *self._origin.header_at(name.step, epoch),
                    checkpoint=str(name),
                    url=self._remote.url_of(name),
                    done_bytes=done,
                    total_bytes=total,
                )
            )

    def _tidy(self, name: CheckpointName) -> None:
        """Remove expendable checkpoints and abandoned uploads from the store.

        `CheckpointFailed` reports a failure, for example a missing permission, and uploads continue; it is retried
        after the next one.
        """
        try:
            if self._is_anothers():  # it may have started meanwhile
                return
            self._remote.reap(keep=set(self.left()))
            for name in self._remote.expendable(self._settings, self._origin.run_id):
                if self._abandoned.is_set():
                    return
                self._remote.remove(name)
                header = self._origin.header_at(name.step)
                self._publish(CheckpointDeleted(*header, checkpoint=str(name), where="remote"))
        except UploadError as error:
            self._fail(name, error, "delete")
        else:
            self._failures["delete"] = 0
        self._untidy = None

    # ---------------------------------------------------------------------------------------------- reporting

    def _fail(self, name: CheckpointName, error: Exception, during: Literal["upload", "delete"]) -> None:
        count = self._failures[during] = self._failures[during] + 1
        if count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th...: an outage may be long
            self._publish(
                CheckpointFailed(
                    *self._origin.header_at(name.step),
                    checkpoint=str(name),
                    error=describe(error),
                    during=during,
                    consecutive=count,
                )
            )
