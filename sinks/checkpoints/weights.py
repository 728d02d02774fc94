"""The file with the module's weights alone, at the end of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable

from events.checkpoint.files import map_file, verify
from events.checkpoint.lineage import ranked
from events.checkpoint.manifest import STATE_NAME, CheckpointName, Metric
from events.checkpoint.settings import Checkpoints
from events.checkpoint.shards import StoredTensors
from events.checkpoint.snapshot import Part
from events.checkpoint.store import WEIGHTS_NAME, CheckpointStore
from events.checkpoint.weights import Weights, metadata_of, weights_in
from events.errors import CheckpointError
from events.log import logger
from events.messages import CheckpointFailed, Event, RunEnded, WeightsSaved
from events.origin import header_of
from events.safe_files import replace_below
from events.tracebacks import describe


class WeightsWriter:
    """Writes the weights of the last step or of the best checkpoint. On the thread of the checkpoint writer.

    Args:
        store: The run's checkpoints.
        publish: `Ring.publish`.
        weights: Returns the module's weights once training has ended cleanly, or only their names if a checkpoint is
            to be read: the best one, or the last one of a module that is divided among ranks; else None.
    """

    def __init__(
        self,
        store: CheckpointStore,
        settings: Checkpoints,
        publish: Callable[[Event], None],
        weights: Callable[[], Part | list[str] | None],
    ) -> None:
        self.path: str | None = None
        """The file that was written."""
        self._store = store
        self._settings = settings
        self._publish = publish
        self._weights = weights

    def write(self, event: RunEnded) -> None:
        """Replace the file atomically, durable before `WeightsSaved`; a failure is published and leaves the old one."""
        found = self._weights()
        if found is None or self.path is not None:  # a second `RunEnded` reports the failure of a last hook
            return
        path = self._store.folder.parent / WEIGHTS_NAME
        try:
            if isinstance(found, Part):
                name, metric, weights = self._last(found, event)
            else:
                name, metric, weights = (self._best if self._settings.weights == "best" else self._newest)(found, event)
            step = event.global_step if name is None else name.step
            metadata = metadata_of(event.run_id, step, None if name is None else str(name), metric)
            nbytes = replace_below(path.parent, path.name, weights.file(metadata)[0])
        except (OSError, CheckpointError) as error:
            self._publish(CheckpointFailed(*header_of(event), checkpoint=WEIGHTS_NAME, error=describe(error)))
            logger.warning(f"the weights could not be written to {path}: {describe(error)}", published=True)
            return
        self.path = str(path)
        checkpoint = None if name is None else str(name)
        self._publish(WeightsSaved(*header_of(event), path=self.path, nbytes=nbytes, checkpoint=checkpoint))

    def _last(self, part: Part, event: RunEnded) -> tuple[CheckpointName | None, Metric | None, Weights]:
        scores = self._scores(event)
        metric = next((score for name, score in scores.items() if name.step == event.global_step), None)
        return None, metric, Weights.of(part)

    def _newest(self, names: list[str], event: RunEnded) -> tuple[CheckpointName | None, Metric | None, Weights]:
        name = next(iter(self._store.line()), None)
        if name is None or name.step != event.global_step:
            raise CheckpointError(
                f"no checkpoint in {self._store.folder} is of step {event.global_step}, the last one, and the weights"
                f" are divided among ranks; train with Checkpoints(at_end=True)"
            )
        return name, self._store.manifest(name).metric, self._read(name, names)

    def _best(self, names: list[str], event: RunEnded) -> tuple[CheckpointName | None, Metric | None, Weights]:
        scores = self._scores(event)
        for name in ranked(scores, self._settings.best_mode):
            try:
                return name, scores[name], self._read(name, names)
            except CheckpointError as error:
                logger.warning(f"weights='best' skips a checkpoint: {error}")
        raise CheckpointError(
            f"weights='best': no checkpoint of the run in {self._store.folder} has the metric {self._settings.best!r};"
            f" log it in a validation, or use weights='last'"
        )

    def _scores(self, event: RunEnded) -> dict[CheckpointName, Metric]:
        return self._store.scores(self._settings.best, run_id=event.run_id) if self._settings.best is not None else {}

    def _read(self, name: CheckpointName, names: list[str]) -> Weights:
        path = self._store.path(name)
        verify(path, manifest := self._store.manifest(name))
        tensors = StoredTensors(manifest.files, functools.partial(map_file, path), str(path))
        saved = weights_in(map_file(path, STATE_NAME), tensors, str(path))
        if saved.averaged_by is not None and saved.problem is not None:
            logger.warning(f"{path}: {saved.problem}")
        if (weights := saved.of_module(names)) is not None:
            return weights
        logger.warning(
            f"{path} does not hold the module's state dict once, because get_state() is overridden; all of its tensors"
            f" are written"
        )
        return saved
