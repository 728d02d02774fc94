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
from events.checkpoint.lineage import AttemptNote, by_age, expendable
from events.checkpoint.manifest import CheckpointName, Manifest
from events.checkpoint.objects import Limits
from events.checkpoint.remote import RemoteStore
from events.checkpoint.settings import Checkpoints
from events.checkpoint.store import CheckpointStore, Upload
from events.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound, CheckpointTooNew, UploadError
from events.log import logger
from events.messages import (
    CheckpointDeleted,
    CheckpointFailed,
    CheckpointSaved,
    CheckpointUploaded,
    CheckpointUploading,
    Event,
)
from events.origin import Header
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
        header: Builds the header of a new event (`events.origin.Origin.header`).
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
        header: Callable[[], Header],
        retain: Callable[[], None],
        limits: Limits | None = None,
        give_up: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._remote = RemoteStore(url, limits)
        self._settings = settings
        self._publish = publish
        self._header = header
        self._retain = retain
        self._give_up = give_up
        self._doing: Literal["open", "upload"] = "open"
        self._abandoned = threading.Event()
        self._ready = False
        self._untidy: CheckpointName | None = None  # the last upload since which the store was not tidied
        self._damaged: set[CheckpointName] = set()  # local ones that can never be uploaded
        self._metrics: dict[CheckpointName, float | None] = {}
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
            for name in self._pending()[:1]:
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
        attempt = self._header()[1]
        if self._is_anothers([name.attempt for name in self._remote.names() if name.attempt >= attempt]):
            return
        self._note()
        try:
            self._remote.reap(keep=set(self._pending()))
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
        name = next(iter(self._pending()), CheckpointName(0, self._header()[1]))
        self._fail(name, error, "upload")
        logger.error(f"uploads are disabled: {error}", published=True)
        self._abandoned.set()  # no retry, which would delay the end of the run
        self._give_up()
        return True

    def left(self) -> list[CheckpointName]:
        """The pending checkpoints. Waits for the disk; any thread."""
        return self._pending()

    def _pending(self) -> list[CheckpointName]:
        """The checkpoints to upload: the newest, and others that retention keeps."""
        names, line = self._store.names(), self._store.line()
        going = set(self._expendable(line, names, self._store.manifest))
        return [
            name
            for name in reversed(by_age(line, names))
            if name not in going and name not in self._damaged and not self._is_uploaded(name)
        ]

    def _is_uploaded(self, name: CheckpointName) -> bool:
        upload = self._store.upload_of(name)
        return upload is not None and upload.url == self._remote.url_of(name)

    def _expendable(
        self, line: list[CheckpointName], names: list[CheckpointName], read: Callable[[CheckpointName], Manifest]
    ) -> list[CheckpointName]:
        """The checkpoints among ``names`` that retention deletes."""
        settings = self._settings
        metrics = {name: self._metric(name, read) for name in names if settings.best is not None and settings.keep_best}
        known = {name: metric for name, metric in metrics.items() if metric is not None}
        return expendable(settings, line, names, known, None)

    def _metric(self, name: CheckpointName, read: Callable[[CheckpointName], Manifest]) -> float | None:
        if name not in self._metrics:
            try:
                metric = read(name).metric
            except (CheckpointNotFound, CheckpointDamaged, CheckpointTooNew):
                return None
            self._metrics[name] = metric.value if metric is not None and metric.name == self._settings.best else None
        return self._metrics[name]

    # --------------------------------------------------------------------------------------------- uploading

    def _upload_pending(self) -> None:
        while not self._abandoned.is_set():
            pending = self._pending()
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
            if manifest.run_id != self._header()[0]:
                logger.warning(f"{path} is not uploaded; it belongs to run {manifest.run_id!r:.200}")
                self._damaged.add(name)
                return False
            if not self._note():
                return False
            self._report(self._header_of(name, manifest), name, 0, manifest.nbytes, first=not self._failures["upload"])
            whole = self._remote.upload(
                path,
                manifest,
                self._settings.upload_part_bytes,
                lambda done, total: self._report(self._header_of(name, manifest), name, done, total),
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
        url, duration_s = self._remote.url_of(name), time.monotonic() - began
        self._publish(
            CheckpointUploaded(
                *self._header_of(name, manifest),
                checkpoint=str(name),
                url=url,
                nbytes=manifest.nbytes,
                duration_s=duration_s,
            )
        )
        self._retain()
        return True

    def _report(self, header: Header, name: CheckpointName, done: int, total: int, *, first: bool = False) -> None:
        now = time.monotonic()
        if first or now - self._reported_at >= PROGRESS_S:
            self._reported_at = now
            self._publish(
                CheckpointUploading(
                    *header, checkpoint=str(name), url=self._remote.url_of(name), done_bytes=done, total_bytes=total
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
            self._remote.reap(keep=set(self._pending()))
            for name in self._expendable(self._remote.line(), self._remote.names(), self._remote.manifest):
                if self._abandoned.is_set():
                    return
                self._remote.remove(name)
                self._publish(CheckpointDeleted(*self._header_of(name), checkpoint=str(name), where="remote"))
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
                    *self._header_of(name),
                    checkpoint=str(name),
                    error=describe(error),
                    during=during,
                    consecutive=count,
                )
            )

    def _header_of(self, name: CheckpointName, manifest: Manifest | None = None) -> Header:
        """The header of an event about a checkpoint: the current time, and the checkpoint's step."""
        run_id, attempt, seq, now, rank, _, epoch, _ = self._header()
        return (run_id, attempt, seq, now, rank, name.step, manifest.epoch if manifest is not None else epoch, None)
