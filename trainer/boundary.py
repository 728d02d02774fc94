"""The border between the loop and everyone else: publishing, inline and fenced hooks, commands, and every wait for
them.

All of it runs on the loop's thread. Places where the loop may wait carry a comment that begins with ``WAIT``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from time import perf_counter_ns as clock
from typing import Any, Literal

from events.backlog import Payload
from events.bus import Bus
from events.errors import FenceBroken
from events.fence import Fence
from events.log import logger
from events.messages import CommandTaken, Event, LedgerReported, LoopHeld
from events.metrics import TRAIN_EPOCH_LOSS
from events.origin import Origin
from events.protocol import AnyCommand, Checkpoint, Pause, Resume, Stop
from trainer.checkpointing import Checkpointing
from trainer.collate import collate_outputs, detach_copy
from trainer.control import Control
from trainer.errors import EpochOutputsTooLarge, add_note
from trainer.hooks import CallbackHooks, HookTable, InlineHook, add_hint, hook_arguments, hook_of
from trainer.ledger import Ledger
from trainer.outputs import EpochOutputs
from trainer.recorder import MetricRecorder
from trainer.signatures import clear_error

_ANNOUNCE_WAIT_S = 5.0


class StopRequested(Exception):  # not an error: the way out of every phase when a stop was taken
    """A stop was taken at a step boundary."""

    def __init__(self, reason: str | None) -> None:
        super().__init__(reason)
        self.reason = reason


class Boundary:
    """What the loop does between its steps.

    Args:
        on_failed_hook: Decides by the callback's policy what it means that a hook of it has failed on this thread;
            raises the exception to end the run.
        ledger_interval_s: How often the ledger is published.
    """

    def __init__(
        self,
        bus: Bus,
        origin: Origin,
        control: Control,
        hooks: HookTable,
        ledger: Ledger,
        recorder: MetricRecorder,
        checkpoints: Checkpointing,
        *,
        on_failed_hook: Callable[[CallbackHooks, str, Exception], None],
        ledger_interval_s: float,
    ) -> None:
        self.bus = bus
        self.origin = origin
        self.control = control
        self.hooks = hooks
        self.ledger = ledger
        self.checkpoints = checkpoints
        checkpoints.wait_for_fence, checkpoints.within = self.wait_for_fence, self.within
        self.phase = "setup"
        """What the loop is doing, for messages."""
        self.stop_wanted = False
        """Whether a callback has asked to stop the run; to be taken before anything else is trained."""
        self._recorder = recorder
        self._on_failed_hook = on_failed_hook
        self._ledger_interval_ns = int(min(ledger_interval_s, 1e9) * 1e9)  # infinity is no integer
        self.ledger_due = clock() + self._ledger_interval_ns
        """When the ledger is to be published next, on ``perf_counter_ns``."""
        self._noticed: set[str] = set()

    def cross(self, mark: int) -> int:
        """A step boundary: commands are taken here, and the loop waits here for whoever must not miss an event.

        Args:
            mark: Time (``perf_counter_ns``) up to which the ledger is complete.

        Returns:
            The time up to which it is complete now.

        Raises:
            StopRequested: a stop was taken.
            BaseException: the run was cancelled, or a fatal observer failed.
        """
        if self.control.pending:
            self.take_commands()
            mark = clock()
        if self.bus.gated:
            self._wait_for_room()
            mark = clock()
        if mark > self.ledger_due:
            self.ledger_due = mark + self._ledger_interval_ns
            self.bus.publish(LedgerReported(*self.origin.header(), "interval", self.ledger.interval()))
        return mark

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """The loop does this from here to the end of the block, and then what it did before.

        An exception leaves the phase as it is: where the run ends by it, that is what its end names.
        """
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    # ------------------------------------------------------------------------------------ events and hooks

    def publish(self, event: Event, outputs: EpochOutputs | None = None) -> None:
        """Publish a stage's event, wait until its fenced hooks have returned, and run its inline hooks.

        Raises:
            BaseException: a fenced or inline hook failed and its policy is fatal, or the run was cancelled.
        """
        self.run_hooks(event, self.send(event, outputs), outputs)

    def send(self, event: Event, outputs: EpochOutputs | None = None) -> Fence | None:
        """Publish a stage's event. Returns the fence that `run_hooks` waits for, if the event has fenced hooks."""
        mark = clock()
        kind = type(event)
        fence = self.fence(kind)
        payload = None
        if outputs is not None or fence is not None:
            receivers = len(self.bus.payload_receivers.get(kind, ()))
            if outputs is not None:
                outputs.shared = receivers + bool(self.hooks.inline.get(kind)) > 1
            payload = Payload(outputs, fence, outputs.nbytes if outputs is not None and receivers else 0)
        self.bus.publish(event, payload)
        self.ledger.publish += clock() - mark
        return fence

    def run_hooks(self, event: Event, fence: Fence | None, outputs: EpochOutputs | None = None) -> None:
        """Wait until the fenced hooks of an event have returned, then run its inline hooks. Raises as `publish`."""
        if fence is not None:
            with self.within(hook_of(event)):
                self.wait_for_fence(fence)
        inline = self.hooks.inline.get(type(event))
        if inline:
            mark = clock()
            with self.within(hook_of(event)):
                args, kwargs = hook_arguments(event, outputs.collated() if outputs is not None else ())
            self.ledger.publish += clock() - mark
            self.run_inline(inline, *args, **kwargs)
            if self._recorder.values:  # now, or they would be taken for numbers of the next step
                self._recorder.take(getattr(event, "key", None))

    def run_inline(self, hooks: list[InlineHook], *args: Any, **kwargs: Any) -> None:
        """Run hooks here and now; charged to the ledger."""
        mark = clock()
        self.checkpoints.stager.gate()  # they may change what is being copied
        before = self.phase
        for hook in hooks:
            if not hook.owner.disabled:
                self.phase = hook.name
                try:
                    hook.call(*args, **kwargs)
                except Exception as raised:  # a supervisor's border: reported, and raised unless it only disables
                    error = clear_error(raised, hook.owner.name, hook.name, hook.call, args, kwargs)
                    add_hint(error)
                    add_note(error, f"raised by {hook.owner.name}.{hook.name} at global_step {self.origin.global_step}")
                    self._on_failed_hook(hook.owner, hook.name, error)
        self.phase = before
        spent = clock() - mark
        self.ledger.inline += spent
        self.ledger.aside += spent

    def run_inline_step(self, hooks: list[InlineHook], live: list[tuple[Any, ...]] | None) -> None:
        """Run inline hooks of the end of a step, with outputs that are detached but neither copied nor moved.

        Args:
            live: The outputs of each micro-batch; None if no hook wants them.
        """
        outputs: tuple[Any, ...] = ()
        if live is not None:
            mark = clock()
            outputs = collate_outputs([detach_copy(values, clone=False) for values in live], self.notice)
            self.ledger.publish += clock() - mark
        self.run_inline(hooks, self.origin.global_step, *outputs)
        if self._recorder.values:
            self._recorder.take()

    def ask_to_stop(self, *, epoch_loss: bool | None = None) -> None:
        """Metrics are judged: ask the callbacks that may stop the run.

        Args:
            epoch_loss: Only those that follow ``train_epoch_loss``; False: only the others. None: all.
        """
        mark, before = clock(), self.phase
        for callback in self.hooks.callbacks:
            self.phase = before
            if callback.should_stop is None or callback.disabled:
                continue
            if epoch_loss is not None and epoch_loss != (callback.monitor == TRAIN_EPOCH_LOSS):
                continue
            step, self.phase = self.origin.global_step, "should_stop"
            try:
                monitor, recorder = callback.monitor, self._recorder
                if monitor is not None and recorder.monitored(monitor, callback.name, required=True) is None:
                    continue
                reason = callback.should_stop(step, recorder.judged)  # SYNC: it reads the number that it follows
                if not isinstance(reason, str | None):
                    raise TypeError(f"should_stop() must return the reason to stop, a string, or None, not {reason!r}")
            except Exception as error:  # a supervisor's border: reported, and raised unless it only disables
                add_note(error, f"raised by {callback.name}.should_stop at global_step {step}")
                self._on_failed_hook(callback, "should_stop", error)
            else:
                if reason is not None:
                    self.stop_wanted = True
                    self.control.send(Stop(id=f"callback-{callback.name}", reason=reason))
        self.phase = before
        self.ledger.readback += clock() - mark

    def epoch_outputs(self, kind: type[Event], hook: str, limit_bytes: int) -> EpochOutputs | None:
        """Where outputs are kept for this hook; None if no callback has it, or none any more.

        When they outgrow the limit, that is the failure of the callbacks that wanted them.
        """
        callbacks = self.hooks.wanting_outputs(kind)
        if not callbacks:
            return None

        # First the one that ends the run, if there is one.
        callbacks.sort(key=lambda callback: callback.delivery.on_error != "fatal")

        def on_too_large(error: EpochOutputsTooLarge) -> None:
            for callback in callbacks:
                if not callback.disabled:
                    self._on_failed_hook(callback, hook, error)

        return EpochOutputs(limit_bytes, f"{callbacks[0].name}.{hook}", self.notice, on_too_large)

    def fence(self, kind: type[Event]) -> Fence | None:
        """A fence for an event of this type; None if no hook of it is fenced."""
        fenced = self.hooks.fenced.get(kind)
        return Fence(fenced) if fenced else None

    def wait_for_fence(self, fence: Fence) -> None:
        """Wait until every fenced hook of an event has returned."""
        begin = clock()
        announced = False
        self.checkpoints.stager.gate()  # the hooks may change what is being copied
        self.bus.flush()
        try:
            while not fence.wait(0.05):  # WAIT: fenced hooks; the period bounds how late a cancellation is seen
                self.control.raise_if_failed()
                if not self.bus.alive:
                    names = ", ".join(fence.waiting)
                    raise FenceBroken(f"the loop waited for {names}, but the event loop that runs them has ended")
                if not announced and clock() - begin > _ANNOUNCE_WAIT_S * 1e9:
                    announced = True
                    self._announce("fence", fence.waiting, begin)
        finally:
            spent = clock() - begin
            self.ledger.fence += spent
            self.ledger.aside += spent
        if announced:
            self._announce("fence", [], begin)
        self.control.raise_if_failed()

    def _wait_for_room(self) -> None:
        begin = clock()
        announced = False
        before, self.phase = self.phase, "waiting for observers"
        while not self.bus.wait_for_room(0.1):  # WAIT: an observer that sees everything, or the host's event loop
            if self.control.pending:
                self.ledger.backpressure += clock() - begin
                self.take_commands()
                begin = clock()
            if not announced and clock() - begin > _ANNOUNCE_WAIT_S * 1e9:
                announced = True
                self._announce("backpressure", self.bus.blocked_by, begin)
        self.ledger.backpressure += clock() - begin
        if announced:
            self._announce("backpressure", [], begin)
        self.phase = before

    def _announce(self, cause: Literal["fence", "backpressure"], observers: list[str], begin: int) -> None:
        """Say that the loop is waiting for these observers; for none: that it goes on."""
        wait_s = (clock() - begin) / 1e9
        self.bus.publish(LoopHeld(*self.origin.header(), cause, observers, wait_s, not observers))
        if observers:
            logger.warning(
                f"the training loop has waited {wait_s:.1f} s for {', '.join(observers)} ({cause})", published=True
            )

    def notice(self, text: str) -> None:
        """Log a remark, once; what stands behind its colon may be another each time."""
        subject = text.partition(":")[0]
        if subject not in self._noticed:
            self._noticed.add(subject)
            logger.warning(text)

    # -------------------------------------------------------------------------------------------- commands

    def take_commands(self, *, checkpoint: bool = True) -> None:
        """Take what has come in. A stop wins over everything else; a pause is waited out here.

        Args:
            checkpoint: Whether a checkpoint can be taken here.

        Raises:
            StopRequested: a stop was taken.
            BaseException: the run was cancelled, or a fatal observer failed.
        """
        self.control.raise_if_failed()
        paused = self._obey(self.control.take(), False, checkpoint)
        if not paused:
            return
        begin = clock()
        before, self.phase = self.phase, "paused"
        try:
            while paused:
                self.control.wait(1.0)  # WAIT: paused until told otherwise
                self.control.raise_if_failed()
                paused = self._obey(self.control.take(), paused, checkpoint)
        finally:
            self.ledger.paused += clock() - begin
        self.phase = before

    def _obey(self, commands: list[AnyCommand], paused: bool, checkpoint: bool) -> bool:
        """Carry out commands in order, then take the checkpoint they ask for; returns whether the run is paused."""
        stop: Stop | None = None
        checkpoint_ids: list[str] = []
        for command in commands:
            match command:
                case Stop():
                    stop = stop or command
                case Checkpoint():
                    checkpoint_ids.append(command.id)
                case Pause():
                    paused = True
                case Resume():
                    paused = False
            name = type(command).__name__.lower()
            self.bus.publish(CommandTaken(*self.origin.header(), name, command.id, command.reason))
        reasons = ["command"] if checkpoint_ids else []
        if stop is not None and stop.checkpoint:
            reasons.append("stop")
        if reasons and checkpoint:
            self.checkpoints.on_command(reasons, checkpoint_ids)
        elif checkpoint_ids:
            self.checkpoints.refuse(checkpoint_ids, "the run stops within a step")
        if stop is not None:
            raise StopRequested(stop.reason)
        return paused
