"""When a checkpoint is taken, and what is in it. All on the loop's thread; nothing here writes to a disk."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable
from time import perf_counter_ns as clock
from typing import Any

import torch

from events.backlog import Payload
from events.bus import Bus
from events.checkpoint.manifest import CheckpointName, Metric
from events.checkpoint.settings import Checkpoints
from events.checkpoint.snapshot import READER, LatePart, LazyPart, Snapshot
from events.errors import CheckpointsFailing, UnstorableState
from events.fence import Fence
from events.log import logger
from events.messages import CheckpointFailed, CheckpointSkipped, CheckpointStaged, LoopHeld
from events.observer import describe
from trainer.control import Control
from trainer.errors import add_note
from trainer.hooks import CallbackHooks, HookTable
from trainer.ledger import Ledger
from trainer.module_interface import ModuleInterface
from trainer.optimization import Optimization
from trainer.outputs import EpochOutputs
from trainer.position import SAVED_FIELDS, Position
from trainer.precision import Precision
from trainer.recorder import MetricRecorder
from trainer.rng import capture_rng
from trainer.slab import Slab, SlabPool
from trainer.staging import Stager
from trainer.tensor_state import Collected

NEVER = sys.maxsize
PREPARING, TAKING = "preparing checkpoints", "taking a checkpoint"
_ANNOUNCE_WAIT_S = 5.0


class Checkpointing:
    """Takes the checkpoints of one run.

    Args:
        settings: None: the run takes none, and says so to who asks for one.
    """

    def __init__(
        self,
        settings: Checkpoints | None,
        *,
        module: ModuleInterface,
        device: torch.device,
        precision: Precision,
        hooks: HookTable,
        recorder: MetricRecorder,
        bus: Bus,
        control: Control,
        ledger: Ledger,
        on_failed_hook: Callable[[CallbackHooks, str, Exception], None],
    ) -> None:
        self.position = Position()
        self.outputs: EpochOutputs | None = None
        """The outputs of the present epoch, where somebody wants them at its end."""
        self.loader: Any = None
        """The dataloader of the present epoch, or of the one before; None where it knows no place to go on."""
        self.due_step = NEVER
        """The loop comes to `after_step` when ``global_step`` has reached this..."""
        self.due_ns = NEVER
        """...or ``perf_counter_ns`` this."""
        self.stager = Stager(device)
        self._settings = settings
        self._module = module
        self._device = device
        self._precision = precision
        self._hooks = hooks
        self._recorder = recorder
        self._bus = bus
        self._origin = bus.origin
        self._control = control
        self._ledger = ledger
        self._on_failed_hook = on_failed_hook
        self._parent: str | None = None
        self._scores: dict[int, tuple[float, Snapshot | None]] = {}
        """The best metrics of the line's checkpoints, by step; with their snapshots while these may still fail."""
        self._is_best = False  # the last validation's metric is among the best, and its checkpoint is to be taken
        self._metric: tuple[int, float] | None = None  # the step it belongs to, and what it was
        self._optimization: Optimization | None = None
        self._pool: SlabPool | None = None
        self._prepared = False
        self._postponed: list[str] = []
        self._snapshots: list[Snapshot] = []  # those whose memory is not back yet
        self._last: Snapshot | None = None
        self._last_place: tuple[Any, ...] = ()
        self._failures = 0
        self.wait_for_fence: Callable[[Fence], None] = lambda fence: None
        """Set by the boundary: has the loop wait."""
        self.within: Callable[[str], contextlib.AbstractContextManager[None]] = lambda phase: contextlib.nullcontext()
        """Set by the boundary: names what the loop does."""

    @property
    def enabled(self) -> bool:
        """Whether the run takes checkpoints."""
        return self._settings is not None

    @property
    def best(self) -> str | None:
        """The metric that chooses the best one."""
        return self._settings.best if self._settings is not None else None

    @property
    def keeps_weights(self) -> bool:
        """Whether the module's weights alone are wanted when training has ended."""
        return self._settings is not None and self._settings.weights

    def go_on(self, position: Position, parent: str | None, scores: dict[int, float]) -> None:
        """Begin where a checkpoint was taken.

        Args:
            parent: Its name, if it is one of this run.
            scores: The metric of each checkpoint up to it that is still there, by step.
        """
        self.position, self._parent = position, parent
        self._scores = {step: (score, None) for step, score in scores.items()}
        if parent is not None:
            self._last_place = self._place

    def start(self, optimization: Optimization) -> None:
        """The state is complete: see that all of it can be stored, before anything is computed.

        Raises:
            UnstorableState: a value in it cannot be; names its path.
        """
        self._optimization = optimization
        if self._settings is None:
            return
        for callback in self._stateful():
            if callback.is_essential:  # whoever may fail later may do so then
                try:
                    Collected({callback.name: callback.state_dict()})
                except Exception as error:  # a supervisor's border: reported, and raised unless it only disables
                    add_note(error, f"raised by {callback.name}.state_dict")
                    self._on_failed_hook(callback, "state_dict", error)
        self._pool = SlabPool(self._device, self._bus.cpu_time)
        Collected(self._tree())
        self.due_step = self._origin.global_step + 1  # optimizers have their state from then on
        self._set_minutes()

    def release(self) -> None:
        """The run is over: let the memory go, though somebody may keep the run."""
        self._pool = self._last = self._optimization = self.outputs = None
        self._snapshots.clear()
        self.stager.release()

    # --------------------------------------------------------------------------------------------- when

    def after_step(self, *, last: bool) -> None:
        """A step is finished, its validation too if it had one. ``last``: so is the epoch; see `after_epoch`."""
        settings = self._settings
        if settings is None:
            return
        step = self._origin.global_step
        if not self._prepared and self._pool is not None:
            self._prepared = True
            mark = clock()
            with self.within(PREPARING):
                self._pool.prepare(self.stager.lay_out(Collected(self._tree())))
            self._ledger.checkpoint += clock() - mark
        reasons = []
        if settings.every_steps is not None:
            if step >= self.due_step and step % settings.every_steps == 0:
                reasons.append("steps")
            self.due_step = step + settings.every_steps - step % settings.every_steps
        else:
            self.due_step = NEVER
        if clock() >= self.due_ns:
            reasons.append("minutes")
        if self._is_best:
            reasons.append("best")
        if reasons and last:  # the one that is taken at the epoch's end has all that this one would
            self._postponed = reasons
        elif reasons:
            self.take(reasons)

    def after_validation(self) -> None:
        """A validation, or an epoch in its place, is finished: is its metric among the best `Checkpoints.keep_best`?

        The checkpoint is taken by `after_step` or `after_epoch`, whichever comes next, which is at once.
        """
        settings = self._settings
        if settings is None or settings.best is None:
            return
        value = self._recorder.monitored(settings.best, "Checkpoints(best=)", required=False)
        if value is None:
            return
        mark = clock()
        number = float(value)  # SYNC: once per validation, because the user wants the best one kept
        self._ledger.readback += clock() - mark
        self._metric = self._origin.global_step, number
        if math.isfinite(number) and self._enters_best(number, settings):
            self._is_best = True
            self.due_step = min(self.due_step, self._origin.global_step)

    def after_epoch(self, epoch: int) -> None:
        """An epoch is finished, its validation and schedulers too."""
        settings = self._settings
        if settings is None:
            return
        reasons, self._postponed = self._postponed, []
        if settings.every_epochs is not None and (epoch + 1) % settings.every_epochs == 0:
            reasons.append("epochs")
        if self._is_best and "best" not in reasons:
            reasons.append("best")
        if not reasons and clock() >= self.due_ns:
            reasons.append("minutes")
        if reasons:
            self.take(reasons)

    def at_end(self) -> None:
        """Training is finished."""
        if self._settings is not None and self._settings.at_end and not self._is_taken:
            self.take(["end"], must=True)

    def on_command(self, reasons: list[str], command_ids: list[str]) -> None:
        """Somebody asked for one, or stops the run."""
        if self._settings is None:
            if command_ids:
                why = "this run takes no checkpoints: it has no folder, or was made with checkpoints=False"
                self.refuse(command_ids, why)
        elif command_ids or not self._is_taken:
            self.take(reasons, command_ids, must=True)

    def refuse(self, command_ids: list[str], why: str) -> None:
        """Answer requests for a checkpoint that is not taken."""
        self._bus.publish(CheckpointFailed(*self._origin.header(), "", why, "stage", 1, command_ids))

    # ---------------------------------------------------------------------------------------------- what

    def take(self, reasons: list[str], command_ids: Iterable[str] = (), *, must: bool = False) -> None:
        """Take one now.

        Args:
            must: Wait for memory, whatever the policy: somebody asked for it.

        Raises:
            CheckpointsFailing: too many in a row have failed.
            BaseException: the run was cancelled meanwhile.
        """
        if self._settings is not None and self._pool is not None:
            with self.within(TAKING):
                self._take(self._settings, self._pool, reasons, command_ids, must)

    def _take(
        self, settings: Checkpoints, pool: SlabPool, reasons: list[str], command_ids: Iterable[str], must: bool
    ) -> None:
        mark = clock()
        fence: Fence | None = None
        try:
            slab = self._wait_for_slab(pool, must or settings.when_busy == "wait")
            if slab is None:
                writing = [str(one.name) for one in self._snapshots if not one.released]
                self._bus.publish(CheckpointSkipped(*self._origin.header(), reasons, writing))
                if ids := list(command_ids):
                    why = "the run is to stop without a checkpoint, and those before it are still being written"
                    self.refuse(ids, why)
                return
            try:
                fence = self._stage(slab, reasons, list(command_ids), mark)
            except (UnstorableState, MemoryError) as error:
                pool.give_back(slab)
                self._fail(error, list(command_ids))
            except BaseException:
                pool.give_back(slab)
                raise
        finally:
            self._is_best = False
            self._set_minutes()
            spent = clock() - mark
            self._ledger.checkpoint += spent
            self._ledger.aside += spent
        if fence is not None:
            self.wait_for_fence(fence)  # WAIT: callbacks with hooks on both lanes

    def _stage(self, slab: Slab, reasons: list[str], command_ids: list[str], mark: int) -> Fence | None:
        pool, settings = self._pool, self._settings
        assert pool is not None
        assert settings is not None
        assert self._optimization is not None
        with self._optimization.evaluation(self.stager.gate):
            collected = Collected(self._tree())
            staged = self.stager.copy(collected, slab, self._late_tensors())
        parts, owners = self._parts()
        self._control.raise_if_failed()  # a callback that has failed just now, by which the run ends, is not among them
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
            wait=staged.wait,
            release=lambda: pool.give_back(slab),
        )
        self._snapshots = [one for one in self._snapshots if not one.released] + [snapshot]
        self._last, self._last_place, self._failures = snapshot, self._place, 0
        if score is not None:
            self._scores[name.step] = score.value, snapshot
        nbytes, blocked_s = staged.nbytes + len(collected.state), (clock() - mark) / 1e9
        header = self._origin.header()
        prefault_s, slab.prefault_s = slab.prefault_s, None
        event = CheckpointStaged(*header, str(name), reasons, nbytes, blocked_s, command_ids, metric, prefault_s)
        # A callback's inline hooks, and `should_stop`, would go on changing the state that it is asked for elsewhere.
        torn = [
            one.name
            for one in self._stateful()
            if one.observed and (one.inline or one.should_stop) and one.is_essential
        ]
        fence = Fence(torn) if torn else None
        self._bus.publish(event, Payload(snapshot, fence))
        if not {"stop", "end"} & set(reasons):
            pool.prepare(slab.nbytes)  # the other one, now that there is going to be use for it
        return fence

    def _next_name(self) -> CheckpointName:
        step, last = self._origin.global_step, self._last.name if self._last is not None else None
        revision = last.revision + 1 if last is not None and last.step == step else 1
        return CheckpointName(step, self._origin.attempt, revision)

    def _tree(self) -> dict[str, Any]:
        """All that must be as it is at this moment."""
        optimization, position = self._optimization, self.position
        assert optimization is not None
        where = {name: getattr(position, name) for name in SAVED_FIELDS}
        if self.loader is not None and has_state(self.loader):
            where["loader_state"] = self.loader.state_dict()
        where["elapsed_s"] += time.monotonic() - position.began if position.phase != "begin" else 0.0
        return {
            "global_step": self._origin.global_step,
            "epoch": self._origin.epoch,
            "position": where,
            # A validation that is under way is done again, from the dataloader on that it is in.
            "rng": position.rng_at_validation or capture_rng(self._device),
            "module": self._module.get_state(),
            "frozen": [name for name, one in self._module.named_parameters() if not one.requires_grad],
            **optimization.state_dict(),
            "scaler": self._precision.scaler.state_dict() if self._precision.scaler is not None else None,
            "metrics": self._recorder.state_dict(),
            "callbacks": self._inline_states(),
        }

    def _inline_states(self) -> list[dict[str, Any]]:
        """The state of callbacks all of whose hooks run on this thread."""
        states: list[dict[str, Any]] = []
        for callback in self._stateful():
            if not callback.observed:
                try:
                    states.append(callback.saved_state())
                except Exception as error:  # a supervisor's border: reported, and raised unless it only disables
                    add_note(error, f"raised by {callback.name}.state_dict")
                    self._on_failed_hook(callback, "state_dict", error)
        return states

    def _parts(self) -> tuple[dict[str, LatePart | LazyPart], dict[str, str]]:
        """What is added by others, each on their own thread; and who adds which."""
        bus = self._bus
        parts: dict[str, LatePart | LazyPart] = {"readings": LatePart(lambda: not bus.alive)}
        owners = {READER: "readings"}
        if self.outputs is not None and self.position.phase != "begin":
            parts["outputs"] = LazyPart(self.outputs.part())
        for number, callback in enumerate(self._stateful()):
            if callback.observed:
                part = owners[callback.name] = f"callback-{number}"
                parts[part] = LatePart(callback.is_given_up, essential=callback.is_essential)
        return parts, owners

    def _stateful(self) -> list[CallbackHooks]:
        return [callback for callback in self._hooks.callbacks if callback.stateful and not callback.disabled]

    def _late_tensors(self) -> set[int]:
        """Where on the device those tensors are that nothing but the optimizers changes."""
        if self._device.type != "cuda" or self._optimization is None:
            return set()
        found = {parameter.data_ptr() for parameter in self._module.parameters()}
        for optimizer in self._optimization.optimizers:
            for state in optimizer.state.values():
                found.update(value.data_ptr() for value in state.values() if isinstance(value, torch.Tensor))
        return found

    @property
    def _place(self) -> tuple[Any, ...]:
        position = self.position
        done = len(position.validated_keys), position.validated_at
        return self._origin.global_step, self._origin.epoch, position.phase, position.batches, *done

    @property
    def _is_taken(self) -> bool:
        """Whether the last one is of this very place, and has not failed so far; the one resumed from counts."""
        return self._last_place == self._place and not (self._last is not None and self._last.failed)

    # ----------------------------------------------------------------------------------------- the rest

    def _wait_for_slab(self, pool: SlabPool, wait: bool) -> Slab | None:
        slab = pool.take(0.0)
        begin, announced = time.monotonic(), False
        while slab is None and wait and not self._control.stops_without_checkpoint:
            self._control.raise_if_failed()
            slab = pool.take(0.1)  # WAIT: both copies are being written, and this one must be taken
            if not announced and time.monotonic() - begin > _ANNOUNCE_WAIT_S:
                announced = True
                self._announce(begin, released=False)
        if announced:
            self._announce(begin, released=True)
        return slab

    def _announce(self, begin: float, *, released: bool) -> None:
        """Say that the loop is waiting for the disk; or that it goes on."""
        wait_s = time.monotonic() - begin
        self._bus.publish(LoopHeld(*self._origin.header(), "checkpoint", ["checkpoints"], wait_s, released))
        if not released:
            logger.warning(f"the training loop has waited {wait_s:.1f} s for checkpoints to be written", published=True)

    def _fail(self, error: Exception, command_ids: list[str]) -> None:
        self._failures += 1
        header, name = self._origin.header(), str(self._next_name())
        self._bus.publish(CheckpointFailed(*header, name, describe(error), "stage", self._failures, command_ids))
        logger.warning(f"checkpoint {name} could not be taken: {describe(error)}", published=True)
        assert self._settings is not None
        if self._failures >= self._settings.max_failures:
            raise CheckpointsFailing(
                f"{self._failures} checkpoints in a row could not be taken (max_failures); the last one: {error}"
            ) from error

    def _enters_best(self, number: float, settings: Checkpoints) -> bool:
        """Whether a metric is better than the last of the best ones, or these are not complete."""
        sign, step = 1 if settings.best_mode == "max" else -1, self._origin.global_step
        # A checkpoint that was not made durable is not kept, so it need not be beaten. One of this step holds the same
        # weights.
        ranked = sorted(
            ((sign * score, at, snapshot) for at, (score, snapshot) in self._scores.items() if at != step),
            key=lambda one: one[:2],
            reverse=True,
        )
        ranked = [one for one in ranked if one[2] is None or not one[2].failed]
        best = ranked[: settings.keep_best]
        enters = len(best) < settings.keep_best or bool(best and sign * number > best[-1][0])
        own = self._scores.get(step)
        if own is not None and (own[1] is None or not own[1].failed):
            enters = enters and sign * number > sign * own[0]
        # Those behind the best may come back while one of these can still fail.
        durable = [one for one in ranked if one[2] is None or one[2].durable][: settings.keep_best]
        kept = [*durable, *(one for one in ranked if one[2] is not None and not one[2].durable)]
        self._scores = {at: (sign * score, snapshot) for score, at, snapshot in kept}
        if own is not None:
            self._scores[step] = own
        return enters

    def _set_minutes(self) -> None:
        minutes = self._settings.every_minutes if self._settings is not None else None
        self.due_ns = NEVER if minutes is None else clock() + int(min(minutes, 1e6) * 60e9)


def has_state(loader: Any) -> bool:
    """Whether a dataloader keeps its own position."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))
