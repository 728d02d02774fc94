"""The observer that writes staged snapshots to durable folders, and deletes old checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from events.checkpoint import disk, packing
from events.checkpoint.lineage import ranked
from events.checkpoint.manifest import SHARDED_FORMAT, STATE_NAME, TENSORS_NAME, CheckpointName, Manifest
from events.checkpoint.settings import Checkpoints
from events.checkpoint.shards import Begun, Left
from events.checkpoint.snapshot import Part, Snapshot
from events.checkpoint.store import CheckpointStore
from events.errors import CheckpointsFailing
from events.log import logger
from events.messages import (
    CheckpointDeleted,
    CheckpointFailed,
    CheckpointSaved,
    CheckpointSkipped,
    CheckpointStaged,
    Event,
    RunEnded,
)
from events.origin import Origin, header_of
from events.sink import Delivery
from events.tracebacks import describe
from sinks.checkpoints.shards import RankBusy, gather
from sinks.checkpoints.shards import RankWriter as RankWriter
from sinks.checkpoints.snapshots import SnapshotTarget, write_part
from sinks.checkpoints.weights import WeightsWriter

WRITER_DELIVERY = Delivery(
    types=frozenset({CheckpointStaged, RunEnded}),
    overflow="block",
    on_error="fatal",
    slow_s=60.0,
    latency_s=0.01,
)
"""The writer's delivery. It handles failures itself, until `CheckpointsFailing` ends the run."""
_PART_TIMEOUT_S = 60.0
"""Seconds to wait for the state of a callback that may be disabled; restarted whenever the callback makes progress."""


class CheckpointWriter(SnapshotTarget):
    """Writes the snapshots, on rank 0 of several those of all, and deletes old checkpoints.

    Args:
        store: The run's checkpoints.
        origin: Builds the headers of events without an event of their own.
        publish: `Ring.publish`.
        sync_journal: Returns when the events up to a ``seq`` are on stable storage, or cannot be: the journal must
            contain the steps that a resumed run does not repeat.
        weights: See `sinks.checkpoints.weights.WeightsWriter`.
        module: Qualified name of the module's class.
        versions: See `events.checkpoint.manifest.Manifest`.
        url: The address of the run's uploads; None without uploads.
    """

    payloads = True
    blocking = True

    def __init__(
        self,
        store: CheckpointStore,
        settings: Checkpoints,
        *,
        origin: Origin,
        publish: Callable[[Event], None],
        sync_journal: Callable[[int], None],
        weights: Callable[[], Part | list[str] | None],
        module: str,
        versions: dict[str, str],
        url: str | None = None,
    ) -> None:
        super().__init__()
        self.last_saved: Path | None = None
        """The newest durable checkpoint."""
        self.best: tuple[Path, float] | None = None
        """After the run's end: its durable checkpoint with the best metric, and the metric; None without one."""
        self._store = store
        self._settings = settings
        self._origin = origin
        self._publish = publish
        self._sync_journal = sync_journal
        self.weights = WeightsWriter(store, settings, publish, weights)
        self._module = module
        self._versions = versions
        self._url = url
        self._failures = 0
        self._undeleted: set[CheckpointName] = set()
        self._ended = False

    # ------------------------------------------------------------------------------------------- writing

    def _save(self, event: CheckpointStaged, snapshot: Snapshot) -> None:
        began = time.time()
        try:
            try:
                manifest, path = self._write(event, snapshot)
            except BaseException as error:  # delete the unfinished files first
                snapshot.failed = True
                if snapshot.rank is not None:
                    with contextlib.suppress(RuntimeError):  # the ranks cannot reach each other: the run ends
                        snapshot.rank.mailbox.send(Left(describe(error)))
                self._store.abandon(snapshot.name)
                raise
            finally:
                snapshot.release()
        except RankBusy as busy:
            self._skip(event, busy.rank)
            return
        except Exception as error:  # of the disk, a callback's state_dict or a device: the run continues
            self._fail(event, error)
            return
        self._failures = 0
        snapshot.durable = True
        self.last_saved = path
        now = time.time()
        metric = snapshot.metric.value if snapshot.metric is not None else None
        self._publish(
            CheckpointSaved(
                *header_of(event),
                checkpoint=str(snapshot.name),
                path=str(path),
                nbytes=manifest.nbytes,
                durable_s=now - event.time,
                write_s=now - began,
                reasons=event.reasons,
                command_ids=event.command_ids,
                metric=metric,
                missing=manifest.missing,
            )
        )
        self.retain()

    def _write(self, event: CheckpointStaged, snapshot: Snapshot) -> tuple[Manifest, Path]:
        folder = self._store.begin(snapshot.name)
        if snapshot.rank is not None:
            snapshot.rank.mailbox.send(Begun(folder.path.name))
        snapshot.wait()
        files = {TENSORS_NAME: disk.write_image(folder, TENSORS_NAME, snapshot.image, snapshot.nbytes)}
        snapshot.release()  # the loop may need the memory, while the rest waits for callbacks
        missing: list[str] = []
        owners = {part: owner for owner, part in snapshot.owners.items()}
        packing.check_readable(snapshot.state, STATE_NAME)
        files[STATE_NAME] = disk.write_parts(folder, STATE_NAME, [snapshot.state])
        for name, late in snapshot.parts.items():
            part = late.get(_PART_TIMEOUT_S)
            if part is None:
                missing.append(owners.get(name, name))
                logger.warning(f"checkpoint {snapshot.name} has no state of {missing[-1]}", published=True)
            else:
                write_part(folder, name, part, files)
        if snapshot.rank is not None:
            files |= gather(folder, snapshot.rank, self._settings.end_timeout_s, lambda: self._abandoned)
        manifest = Manifest(
            format=1 if snapshot.rank is None else SHARDED_FORMAT,
            run_id=event.run_id,
            attempt=snapshot.name.attempt,
            global_step=snapshot.name.step,
            revision=snapshot.name.revision,
            epoch=event.epoch,
            seq=event.seq,
            time=event.time,
            parent=snapshot.parent,
            reasons=event.reasons,
            metric=snapshot.metric,
            module=self._module,
            versions=self._versions,
            missing=missing,
            files=files,
        )
        self._sync_journal(event.seq)
        return manifest, self._store.commit(manifest)

    def _skip(self, event: CheckpointStaged, rank: int) -> None:
        """Another rank has skipped the checkpoint."""
        self._publish(CheckpointSkipped(*header_of(event), reasons=event.reasons, writing=[], busy_rank=rank))
        if event.command_ids:
            why = f"rank {rank} is still writing the checkpoints before it"
            self._publish(
                CheckpointFailed(
                    *header_of(event), checkpoint=event.checkpoint, error=why, command_ids=event.command_ids
                )
            )

    def _fail(self, event: CheckpointStaged, error: Exception) -> None:
        self._failures += 1
        self._publish(
            CheckpointFailed(
                *header_of(event),
                checkpoint=event.checkpoint,
                error=describe(error),
                consecutive=self._failures,
                command_ids=event.command_ids,
            )
        )
        logger.warning(
            f"checkpoint {event.checkpoint} could not be written: {describe(error)}", exc_info=error, published=True
        )
        if self._failures >= self._settings.max_failures:
            raise CheckpointsFailing(
                f"{self._failures} checkpoints in a row could not be made durable, the last one with"
                f" {describe(error)}; make room in {self._store.folder}, or use another run_dir"
            ) from error

    def _end(self, event: RunEnded) -> None:
        self._ended = True
        self._store.sweep()
        with self._store.lock:
            self._find_best()
            self.weights.write(event)

    # ----------------------------------------------------------------------------------------- retention

    def retain(self) -> None:
        """Delete expendable checkpoints. Any thread: the uploader calls it, too."""
        with self._store.lock:
            try:
                uploaded = self._store.uploaded_to(self._url) if self._url is not None else None
                going = self._store.expendable(self._settings, self._origin.run_id, uploaded)
                left = self._undeleted - {*self._store.names()}  # their names were removed, but not their files
            except OSError as error:  # the folder cannot be read: nothing is deleted, and saved checkpoints stay
                self._publish(
                    CheckpointFailed(*self._origin.header(), checkpoint="", error=describe(error), during="delete")
                )
                logger.warning(f"no checkpoint is deleted from {self._store.folder}: {describe(error)}", published=True)
                return
            for name in [*sorted(left), *going]:
                self._delete(name, going.get(name))
            if self._ended and going:  # after an upload, which may have kept the best one until now
                self._find_best()

    def _find_best(self) -> None:
        settings, store = self._settings, self._store
        if settings.best is None:
            return
        try:
            scores = store.scores(settings.best, run_id=self._origin.run_id)
        except OSError as error:
            logger.warning(f"the best checkpoint in {store.folder} cannot be looked up: {describe(error)}")
            return
        best = next(iter(ranked(scores, settings.best_mode)), None)
        self.best = (store.path(best), scores[best].value) if best is not None else None

    def without_uploads(self) -> None:
        """Stop waiting for uploads before a deletion, because there will be none. Any thread."""
        self._url = None

    def _delete(self, name: CheckpointName, manifest: Manifest | None) -> None:
        """Delete a checkpoint; a failure is published once, and retried at the next retention."""
        header = self._origin.header_at(name.step, manifest.epoch if manifest is not None else None)
        try:
            self._store.remove(name)
        except OSError as error:
            if name not in self._undeleted:
                self._undeleted.add(name)
                self._publish(CheckpointFailed(*header, checkpoint=str(name), error=describe(error), during="delete"))
            return
        self._undeleted.discard(name)
        self._publish(CheckpointDeleted(*header, checkpoint=str(name)))
