"""Takes the checkpoints of a run, on the loop's thread. Nothing here writes to a disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from time import perf_counter_ns as clock
from typing import Any

from events.bus.backlog import Payload
from events.bus.fence import Fence
from events.checkpoint.manifest import CheckpointName, Metric
from events.checkpoint.packing import check_readable
from events.checkpoint.settings import Checkpoints
from events.checkpoint.shards import RankPart, outputs_name
from events.checkpoint.snapshot import READER, LatePart, LazyPart, Part, Snapshot
from events.errors import CheckpointsFailing, UnstorableState
from events.log import logger
from events.messages import CheckpointFailed, CheckpointSkipped, CheckpointStaged, LoopHeld
from events.tracebacks import describe
from trainer.checkpoint.due import BestScores, DuePolicy
from trainer.checkpoint.position import Position
from trainer.checkpoint.slab import Slab, SlabPool
from trainer.checkpoint.staging import Stager
from trainer.data.tensor_state import Collected
from trainer.errors import add_note
from trainer.hooks.capture import EpochOutputs
from trainer.loop.attempt import Attempt
from trainer.loop.optimization import Optimization
from trainer.loop.run_state import late_tensors, run_state, stateful

PREPARING, TAKING = "preparing checkpoints", "taking a checkpoint"
_ANNOUNCE_WAIT_S = 5.0


class Checkpointing:
    """Takes the checkpoints of one run.

    A method that takes one returns a fence if callbacks have hooks on both lanes and a state: the caller waits for it.

    Attributes:
        position: Position of the loop.
        outputs: Outputs of the current epoch, if a hook receives them at its end.
        loader: Dataloader of the current epoch, or of the one before; None without a position to resume from.
        due: When the next checkpoint is due.
        stager: Copies the state.

    Args:
        settings: None disables checkpoints; requests are answered with `CheckpointFailed`.
    """

    def __init__(self, attempt: Attempt, settings: Checkpoints | None) -> None:
        self.position = Position()
        self.outputs: EpochOutputs | None = None
        self.loader: Any = None
        self.due = DuePolicy(settings, alone=attempt.world.size == 1)
        self.stager = Stager(attempt.device)
        self.settings = settings
        self._attempt = attempt
        self._best = BestScores(settings, {}) if settings is not None else None
        self._optimization: Optimization | None = None
        self._pool: SlabPool | None = None
        self._prepared = False
        self._parent: str | None = None
        self._metric: tuple[int, float] | None = None  # of the last validation, with its step
        self._snapshots: list[Snapshot] = []  # unreleased ones, and the last one
        self._last_place: tuple[Any, ...] = ()
        self._failures = 0

    @property
    def enabled(self) -> bool:
        """Whether the run takes checkpoints."""
        return self.settings is not None

    def resume(self, position: Position, parent: str | None, scores: dict[int, float]) -> None:
        """Continue from a checkpoint.

        Args:
            parent: Its name, if it is of this run.
            scores: Metrics of the existing checkpoints up to it, by step.
        """
        self.position, self._parent = position, parent
        if self.settings is not None:
            self._best = BestScores(self.settings, scores)
        if parent is not None:
            self._last_place = self._place

    def start(self, optimization: Optimization) -> None:
        """Check, before the first step, that all of the state can be stored.

        Raises:
            UnstorableState: A value cannot be stored; names its path.
        """
        self._optimization = optimization
        if self.settings is None:
            return
        for callback in stateful(self._attempt):
            if callback.is_essential:  # any other is only disabled when it fails
                collected = Collected if callback.has_observer_on_rank_0 else self._collected
                try:
                    check_readable(collected({callback.name: callback.state_dict()}).state, callback.name)
                except Exception as error:  # a supervisor's border: reported, and raised unless it only disables
                    add_note(error, f"raised by {callback.name}.state_dict")
                    self._attempt.fail_hook(callback, "state_dict", error)
        if self._copies:
            self._pool = SlabPool(self._attempt.device, self._attempt.ring.cpu_time)
        check_readable(self._collected(self._tree()).state, "the state of the run")
        self.due.start(self._attempt.origin.global_step, clock())

    def release(self) -> None:
        """Release the memory at the end of the run: a user may keep the run object."""
        self._pool = self._optimization = self.outputs = None
        self._snapshots.clear()
        self.stager.release()

    # --------------------------------------------------------------------------------------------- when

    def after_step(self, *, last: bool) -> Fence | None:
        """Take a due checkpoint after a step and its validation. ``last``: `after_epoch` is called next."""
        if self.settings is None:
            return None
        if not self._prepared and self._pool is not None:
            self._prepared = True
            with self._attempt.ledger.within("checkpoint"), self._attempt.within(PREPARING):
                self._pool.prepare(self.stager.lay_out(self._collected(self._tree())))
        return self._take_for(self.due.after_step(self._attempt.origin.global_step, clock(), last=last))

    def after_validation(self) -> None:
        """Note whether the metric of a validation, or of an epoch without one, is among the best.

        `after_step` or `after_epoch`, the next call, takes the checkpoint.
        """
        settings, attempt = self.settings, self._attempt
        if settings is None or settings.best is None or self._best is None:
            return
        value = attempt.recorder.monitored(settings.best, "Checkpoints(best=)", required=False)
        if value is None:
            return
        with attempt.ledger.within("readback"):
            number = float(value)  # SYNC: once per validation, because the user keeps the best checkpoint
        step = attempt.origin.global_step
        self._metric = step, number
        if attempt.world.share(self._best.enters(step, number)):
            self.due.found_best(step)

    def after_epoch(self, epoch: int) -> Fence | None:
        """Take a due checkpoint after an epoch, its validation and its schedulers."""
        return self._take_for(self.due.after_epoch(epoch, clock()))

    def at_end(self) -> Fence | None:
        """Take the checkpoint at the end of training."""
        if self.settings is None or not self.settings.at_end or self._is_taken:
            return None
        return self.take(["end"], must=True)

    def on_command(self, reasons: list[str], command_ids: list[str]) -> Fence | None:
        """Take the checkpoint that a command requests."""
        if self.settings is None:
            if command_ids:
                why = "this run takes no checkpoints: it has no folder, or was made with checkpoints=False"
                self.refuse(command_ids, why)
        elif command_ids or not self._is_taken:
            return self.take(reasons, command_ids, must=True)
        return None

    # ---------------------------------------------------------------------------------------------- what

    def refuse(self, command_ids: list[str], why: str) -> None:
        """Answer requests with `CheckpointFailed`."""
        self._publish_failure("", why, 1, command_ids)

    def _take_for(self, reasons: list[str]) -> Fence | None:
        return self.take(reasons) if reasons else None

    def take(self, reasons: list[str], command_ids: Iterable[str] = (), *, must: bool = False) -> Fence | None:
        """Take a checkpoint now.

        Args:
            must: Wait for memory, whatever the policy, because it was requested.

        Raises:
            CheckpointsFailing: Too many consecutive checkpoints have failed.
            BaseException: The run was cancelled during the wait.
        """
        settings, pool = self.settings, self._pool
        if settings is None:
            return None
        assert pool is not None
        with self._attempt.ledger.within("checkpoint"), self._attempt.within(TAKING):
            try:
                return self._take(settings, pool, reasons, list(command_ids), must)
            finally:
                self.due.taken(clock())

    def _take(
        self, settings: Checkpoints, pool: SlabPool, reasons: list[str], command_ids: list[str], must: bool
    ) -> Fence | None:
        began, slab = clock(), None
        try:
            slab = self._wait_for_slab(pool, must or settings.when_busy == "wait")
            if slab is not None:
                return self._stage(settings, pool, slab, reasons, command_ids, began)
        except BaseException as error:
            if slab is not None:
                pool.give_back(slab)
            self._leave(describe(error))
            if not isinstance(error, UnstorableState | MemoryError):
                raise
            self._fail(settings, error, command_ids)
        else:
            self._leave("")
            self._skip(reasons, command_ids)
        return None

    def _leave(self, error: str) -> None:
        """Tell the other ranks that this one takes no part in the checkpoint: it has failed, or is busy."""

    def _skip(self, reasons: list[str], command_ids: list[str]) -> None:
        """Skip a checkpoint, because both copies in memory are being written."""
        origin = self._attempt.origin
        writing = [str(one.name) for one in self._snapshots if not one.released]
        self._attempt.ring.publish(
            CheckpointSkipped(*origin.header(), reasons=reasons, writing=writing, busy_rank=origin.rank)
        )
        if command_ids:
            why = "the run is to stop without a checkpoint, and those before it are still being written"
            self.refuse(command_ids, why)

    def _stage(
        self,
        settings: Checkpoints,
        pool: SlabPool,
        slab: Slab,
        reasons: list[str],
        command_ids: list[str],
        began: int,
    ) -> Fence | None:
        attempt, optimization = self._attempt, self._optimization
        assert optimization is not None
        with attempt.averaging.withdrawn(self.stager.gate), optimization.evaluation(self.stager.gate):
            collected = self._collected(self._tree())
            staged = self.stager.copy(collected, slab, late_tensors(attempt, optimization))
        parts, owners = self._parts()
        attempt.control.raise_if_failed()  # the parts lack a fatal callback that has just failed
        name = self._next_name()
        metric = self._metric[1] if self._metric is not None and self._metric[0] == name.step else None
        score = None
        if metric is not None and math.isfinite(metric):
            score = Metric(settings.best or "", metric, settings.best_mode)
        snapshot = Snapshot(
            name,
            parent=self._parent,
            metric=score,
            image=staged.image,
            nbytes=staged.nbytes,
            state=collected.state,
            parts=parts,
            owners=owners,
            rank=self._part_of_rank(collected),
            wait=staged.wait,
            give_back=lambda: pool.give_back(slab),
        )
        self._snapshots = [one for one in self._snapshots if not one.released] + [snapshot]
        self._last_place, self._failures = self._place, 0
        if score is not None and self._best is not None:
            self._best.add(name.step, score.value, snapshot)
        nbytes, blocked_s = staged.nbytes + len(collected.state), (clock() - began) / 1e9
        prefault_s, slab.prefault_s = slab.prefault_s, None
        event = CheckpointStaged(
            *attempt.origin.header(),
            checkpoint=str(name),
            reasons=reasons,
            nbytes=nbytes,
            blocked_s=blocked_s,
            command_ids=command_ids,
            metric=metric,
            prefault_s=prefault_s,
        )
        fence = self._fence()
        attempt.ring.publish(event, Payload(snapshot, fence))
        if not {"stop", "end"} & set(reasons):
            pool.prepare(slab.nbytes)  # the other slab, which is needed from now on
        return fence

    def _fence(self) -> Fence | None:
        """Return a fence for callbacks whose inline hooks could change the state that another thread reads."""
        both = [one for one in stateful(self._attempt) if one.observed and (one.inline or one.should_stop)]
        torn = [one.name for one in both if one.is_essential]
        return Fence(torn) if torn else None

    def _next_name(self) -> CheckpointName:
        origin, last = self._attempt.origin, self._last
        revision = last.name.revision + 1 if last is not None and last.name.step == origin.global_step else 1
        return CheckpointName(origin.global_step, origin.attempt, revision)

    @property
    def _copies(self) -> bool:
        """Whether this rank copies state of the run."""
        return True

    def _collected(self, tree: object) -> Collected:
        """Divide a state into the tensors to copy and the rest."""
        return Collected(tree)

    def _part_of_rank(self, collected: Collected) -> RankPart | None:
        """Describe the copy, if it is that of one rank of several."""
        return None

    def _tree(self) -> dict[str, Any]:
        assert self._optimization is not None
        return run_state(self._attempt, self._optimization, self.position, self.loader)

    def _follow(self) -> None:
        """Change the weights and the schedule of checkpoints as rank 0 does when it takes one."""
        assert self._optimization is not None
        with self._attempt.averaging.withdrawn(self.stager.gate), self._optimization.evaluation(self.stager.gate):
            pass
        self._last_place = self._place
        self.due.taken(clock())

    def _parts(self) -> tuple[dict[str, LatePart | LazyPart], dict[str, str]]:
        """Return the parts that other threads contribute, and their files by contributor."""
        ring = self._attempt.ring
        parts: dict[str, LatePart | LazyPart] = {"readings": LatePart(lambda: not ring.alive)}
        owners = {READER: "readings"}
        if (kept := self._kept) is not None:
            parts[outputs_name(self._attempt.origin.rank)] = LazyPart(kept)
        for number, callback in enumerate(stateful(self._attempt)):
            if callback.observed:
                part = owners[callback.name] = f"callback-{number}"
                parts[part] = LatePart(callback.is_disabled, essential=callback.is_essential)
        return parts, owners

    @property
    def _kept(self) -> Callable[[], Part] | None:
        """Builds the outputs that are kept for the end of the epoch, on any thread; None without."""
        return self.outputs.part() if self.outputs is not None and self.position.phase != "begin" else None

    @property
    def _last(self) -> Snapshot | None:
        return self._snapshots[-1] if self._snapshots else None

    @property
    def _place(self) -> tuple[Any, ...]:
        origin, position = self._attempt.origin, self.position
        done = len(position.validated_keys), position.validated_at
        return origin.global_step, origin.epoch, position.phase, position.batches, *done

    @property
    def _is_taken(self) -> bool:
        """Whether the last checkpoint, or the one resumed from, is of this position and has not failed."""
        return self._last_place == self._place and not (self._last is not None and self._last.failed)

    # ----------------------------------------------------------------------------------------- the rest

    def _wait_for_slab(self, pool: SlabPool, wait: bool) -> Slab | None:
        slab, control = pool.take(0.0), self._attempt.control
        begin, announced = time.monotonic(), False
        while slab is None and wait and not control.stops_without_checkpoint:
            control.raise_if_failed()
            slab = pool.take(0.1)  # WAIT: both slabs are being written
            if not announced and time.monotonic() - begin > _ANNOUNCE_WAIT_S:
                announced = True
                self._announce(begin, released=False)
        if announced:
            self._announce(begin, released=True)
        return slab

    def _announce(self, begin: float, *, released: bool) -> None:
        """Publish the start or the end of a wait for the disk."""
        wait_s, header = time.monotonic() - begin, self._attempt.origin.header()
        self._attempt.ring.publish(
            LoopHeld(*header, cause="checkpoint", observers=["checkpoints"], wait_s=wait_s, released=released)
        )
        if not released:
            logger.warning(f"the training loop has waited {wait_s:.1f} s for checkpoints to be written", published=True)

    def _publish_failure(self, name: str, error: str, failures: int, command_ids: list[str]) -> None:
        header = self._attempt.origin.header()
        self._attempt.ring.publish(
            CheckpointFailed(
                *header, checkpoint=name, error=error, during="stage", consecutive=failures, command_ids=command_ids
            )
        )

    def _fail(self, settings: Checkpoints, error: Exception, command_ids: list[str]) -> None:
        self._failures += 1
        name = str(self._next_name())
        self._publish_failure(name, describe(error), self._failures, command_ids)
        logger.warning(f"checkpoint {name} could not be taken: {describe(error)}", published=True)
        if self._failures >= settings.max_failures:
            raise CheckpointsFailing(
                f"{self._failures} checkpoints in a row could not be taken (max_failures); the last one: {error}"
            ) from error
