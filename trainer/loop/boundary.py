"""The border between the loop and everyone else: publishing, inline and fenced hooks, commands, and every wait for
them.

All of it runs on the loop's thread. Places where the loop may wait carry a comment that begins with ``WAIT``.
"""

from __future__ import annotations

import math
from time import perf_counter_ns as clock
from typing import TYPE_CHECKING, Any, Literal

from events.bus.backlog import Payload
from events.bus.fence import Fence
from events.errors import FenceBroken
from events.log import logger
from events.messages import CommandTaken, Event, LedgerReported, LoopHeld
from events.metrics import TRAIN_EPOCH_LOSS
from events.protocol import AnyCommand, Checkpoint, Pause, Resume, Stop
from trainer.checkpoint.due import NEVER
from trainer.distributed.failure import WAITING, peer_failed
from trainer.errors import EpochOutputsTooLarge, add_note
from trainer.hooks.capture import EpochOutputs
from trainer.hooks.collate import collate_outputs, detached
from trainer.hooks.hooks import InlineHook, add_hint, hook_arguments, hook_of
from trainer.hooks.signatures import clear_error
from trainer.loop.attempt import Attempt
from trainer.loop.checkpointing import Checkpointing
from trainer.loop.ledger import Row

if TYPE_CHECKING:
    from trainer.distributed.agent import Agent

_ANNOUNCE_WAIT_S = 5.0
BY_MINUTES = "stagecast-minutes"
"""The id by which rank 0 proposes a checkpoint that is due by the clock."""


class StopRequested(Exception):  # not an error: the way out of every phase when a stop was taken
    """A stop was taken at a step boundary."""

    def __init__(self, reason: str | None) -> None:
        super().__init__(reason)
        self.reason = reason


class Boundary:
    """What the loop does between its steps.

    Attributes:
        stop_wanted: A callback has asked to stop the run; to be obeyed before anything else is trained.
    """

    def __init__(self, attempt: Attempt, checkpoints: Checkpointing) -> None:
        self.attempt = attempt
        self.checkpoints = checkpoints
        self.stop_wanted = False
        self._agreed: list[AnyCommand] = []  # what callbacks of several ranks want
        self._interval_ns = int(min(attempt.arguments.ledger_interval_s, 1e9) * 1e9)  # infinity is not an integer
        self._ledger_due = clock() + self._interval_ns
        self._ends_ns: float = math.inf

    def limit_time(self, limit_s: float | None) -> None:
        """Stop the run at the first boundary after a time from now; None: never."""
        self._ends_ns = math.inf if limit_s is None else clock() + limit_s * 1e9

    def cross(self) -> None:
        """Cross a step boundary: obey commands, and wait for observers that must not miss an event.

        Raises:
            StopRequested: A stop was obeyed.
            BaseException: The run was cancelled, or a fatal observer failed.
        """
        attempt = self.attempt
        if attempt.ledger.since > self._ends_ns:
            self._ends_ns = math.inf
            attempt.control.send(Stop(id="max-time", reason=f"max_time_s={attempt.arguments.max_time_s:g} is over"))
        self.tick()
        if attempt.ring.gated:
            self._wait_for_room()
        if attempt.ledger.since > self._ledger_due:
            self._ledger_due = attempt.ledger.since + self._interval_ns
            attempt.ring.publish(
                LedgerReported(*attempt.origin.header(), scope="interval", ledger=attempt.ledger.interval())
            )

    def tick(self, kind: str | None = None) -> None:
        """Obey commands at a place that all ranks reach, in the same order. WAIT: for rank 0's grant, if there are
        several.

        Args:
            kind: Of the work between such places, whose pace is its own; by default the stage.
        """
        attempt, agent = self.attempt, self.attempt.control.agent
        if agent is None:
            if attempt.control.pending:
                self.take_commands()
            return
        due = self.checkpoints.due
        if attempt.ledger.since >= due.agreed_ns and agent.rank == 0:
            due.agreed_ns = NEVER
            agent.send(Checkpoint(id=BY_MINUTES))
        if agent.reach(kind or attempt.origin.stage):
            self._take_agreed(agent)

    def glance(self) -> None:
        """Obey commands at a place that depends on the time, so that ranks do not share it: in a single process."""
        if self.attempt.control.pending and self.attempt.control.agent is None:
            self.take_commands()

    # ------------------------------------------------------------------------------------ events and hooks

    def publish(self, event: Event, outputs: EpochOutputs | None = None) -> None:
        """Publish a stage's event, wait until its fenced hooks have returned, and run its inline hooks.

        Raises:
            BaseException: a fenced or inline hook failed and its policy is fatal, or the run was cancelled.
        """
        self.run_hooks(event, self.send(event, outputs), outputs)

    def send(self, event: Event, outputs: EpochOutputs | None = None) -> Fence | None:
        """Publish a stage's event. Returns the fence that `run_hooks` waits for, if the event has fenced hooks."""
        attempt, kind = self.attempt, type(event)
        with attempt.ledger.within("publish"):
            fence = self.fence(kind)
            payload = None
            if outputs is not None or fence is not None:
                receivers = len(attempt.ring.audience.payload_receivers.get(kind, ()))
                if outputs is not None:
                    outputs.shared = receivers + bool(attempt.hooks.inline.get(kind)) > 1
                payload = Payload(outputs, fence, outputs.nbytes if outputs is not None and receivers else 0)
            attempt.ring.publish(event, payload)
        return fence

    def run_hooks(self, event: Event, fence: Fence | None, outputs: EpochOutputs | None = None) -> None:
        """Wait until the fenced hooks of an event have returned, then run its inline hooks. Raises as `publish`."""
        if fence is not None:
            with self.attempt.within(hook_of(event)):
                self.wait_for_fence(fence)
        inline = self.attempt.hooks.inline.get(type(event))
        if inline:
            with self.attempt.ledger.within("publish"), self.attempt.within(hook_of(event)):
                args, kwargs = hook_arguments(event, outputs.collated() if outputs is not None else ())
            self.run_inline(inline, *args, **kwargs)
            if self.attempt.recorder.values:  # now, or they would be taken for numbers of the next step
                self.attempt.recorder.flush(getattr(event, "key", None))

    def run_inline(self, hooks: list[InlineHook], *args: Any, **kwargs: Any) -> None:
        """Run hooks here and now."""
        attempt = self.attempt
        row, phase = attempt.ledger.enter("inline"), attempt.phase
        self.checkpoints.stager.gate()  # they may change the sources of a copy
        for hook in hooks:
            if not hook.owner.disabled:
                attempt.phase = hook.name
                try:
                    hook.call(*args, **kwargs)
                except Exception as raised:  # a supervisor's border: reported, and raised unless it only disables
                    error = clear_error(raised, hook.owner.name, hook.name, hook.call, args, kwargs)
                    add_hint(error)
                    step = attempt.origin.global_step
                    add_note(error, f"raised by {hook.owner.name}.{hook.name} at global_step {step}")
                    attempt.fail_hook(hook.owner, hook.name, error)
        attempt.phase = phase
        attempt.ledger.enter(row)

    def run_inline_step(self, hooks: list[InlineHook], live: list[tuple[Any, ...]] | None) -> None:
        """Run inline hooks of the end of a step, with outputs that are detached but neither copied nor moved.

        Args:
            live: The outputs of each micro-batch; None if no hook wants them.
        """
        attempt = self.attempt
        outputs: tuple[Any, ...] = ()
        if live is not None:
            with attempt.ledger.within("publish"):
                outputs = collate_outputs([detached(values) for values in live], attempt.notice)
        self.run_inline(hooks, attempt.origin.global_step, *outputs)
        if attempt.recorder.values:
            attempt.recorder.flush()

    def ask_to_stop(self, *, epoch_loss: bool | None = None) -> None:
        """Metrics are judged: ask the callbacks that may stop the run.

        Args:
            epoch_loss: Only those that follow ``train_epoch_loss``; False: only the others. None: all.
        """
        attempt = self.attempt
        step, recorder, phase = attempt.origin.global_step, attempt.recorder, attempt.phase
        stops: list[AnyCommand] = []
        with attempt.ledger.within("readback"):
            for callback in attempt.hooks.callbacks:
                attempt.phase = phase
                monitor = callback.monitor
                if callback.should_stop is None or callback.disabled:
                    continue
                if epoch_loss is not None and epoch_loss != (monitor == TRAIN_EPOCH_LOSS):
                    continue
                attempt.phase = "should_stop"
                try:
                    if monitor is not None and recorder.monitored(monitor, callback.name, required=True) is None:
                        continue
                    reason = callback.should_stop(step, recorder.judged)  # SYNC: it reads the number that it follows
                    if not isinstance(reason, str | None):
                        raise TypeError(
                            f"should_stop() must return the reason to stop, a string, or None, not {reason!r}"
                        )
                except Exception as error:  # a supervisor's border: reported, and raised unless it only disables
                    add_note(error, f"raised by {callback.name}.should_stop at global_step {step}")
                    attempt.fail_hook(callback, "should_stop", error)
                else:
                    if reason is not None:
                        stops.append(Stop(id=f"callback-{callback.name}", reason=reason))
            attempt.phase = phase
        if attempt.control.agent is None:
            for stop in stops:
                attempt.control.send(stop)
        elif any(callback.should_stop is not None for callback in attempt.hooks.callbacks):
            stops = next(filter(None, attempt.world.gather(stops)), [])  # WAIT: for all ranks
            self._agreed += stops
        self.stop_wanted |= bool(stops)

    def epoch_outputs(self, kind: type[Event], hook: str, limit_bytes: int) -> EpochOutputs | None:
        """Where outputs are kept for this hook; None if no callback has it, or none any more.

        When they outgrow the limit, that is the failure of the callbacks that wanted them.
        """
        callbacks = self.attempt.hooks.wanting_outputs(kind)
        if not callbacks:
            if kind in self.attempt.hooks.left:
                return EpochOutputs(limit_bytes, f"rank 0's {hook}", self.attempt.notice, lambda error: None)
            return None

        # First the one that ends the run, if there is one.
        callbacks.sort(key=lambda callback: callback.delivery.on_error != "fatal")

        def on_too_large(error: EpochOutputsTooLarge) -> None:
            for callback in callbacks:
                if not callback.disabled:
                    self.attempt.fail_hook(callback, hook, error)

        return EpochOutputs(limit_bytes, f"{callbacks[0].name}.{hook}", self.attempt.notice, on_too_large)

    def fence(self, kind: type[Event]) -> Fence | None:
        """A fence for an event of this type; None if no hook of it is fenced."""
        fenced = self.attempt.hooks.fenced.get(kind)
        return Fence(fenced) if fenced else None

    def wait_for_fence(self, fence: Fence) -> None:
        """Wait until every fenced hook of an event has returned."""
        attempt = self.attempt
        began, announced = clock(), False
        self.checkpoints.stager.gate()  # the hooks may change the sources of a copy
        with attempt.ledger.within("fence"):
            attempt.ring.flush()
            while not fence.wait(0.05):  # WAIT: fenced hooks; the period bounds how late a cancellation is seen
                attempt.control.raise_if_failed()
                if not attempt.ring.alive:
                    names = ", ".join(fence.waiting)
                    raise FenceBroken(f"the loop waited for {names}, but the event loop that runs them has ended")
                if not announced and clock() - began > _ANNOUNCE_WAIT_S * 1e9:
                    announced = True
                    self._announce("fence", fence.waiting, began)
        if announced:
            self._announce("fence", [], began)
        attempt.control.raise_if_failed()

    def _wait_for_room(self) -> None:
        attempt = self.attempt
        began, announced = clock(), False
        with attempt.ledger.within("backpressure"), attempt.within("waiting for observers"):
            while not attempt.ring.wait_for_room(0.1):  # WAIT: for a lossless observer, or the host's event loop
                if attempt.control.agent is not None:
                    attempt.control.raise_if_failed()
                elif attempt.control.pending:
                    self.take_commands()
                    began = clock()
                if not announced and clock() - began > _ANNOUNCE_WAIT_S * 1e9:
                    announced = True
                    self._announce("backpressure", attempt.ring.blocked_by, began)
        if announced:
            self._announce("backpressure", [], began)

    def _announce(self, cause: Literal["fence", "backpressure"], observers: list[str], begin: int) -> None:
        """Publish that the loop waits for observers; without any, that it continues."""
        wait_s = (clock() - begin) / 1e9
        self.attempt.ring.publish(
            LoopHeld(
                *self.attempt.origin.header(), cause=cause, observers=observers, wait_s=wait_s, released=not observers
            )
        )
        if observers:
            logger.warning(
                f"the training loop has waited {wait_s:.1f} s for {', '.join(observers)} ({cause})", published=True
            )

    # -------------------------------------------------------------------------------------------- commands

    def take_commands(self, *, checkpoint: bool = True) -> None:
        """Execute the pending commands; waits during a pause. A stop overrides all other commands.

        Args:
            checkpoint: Whether a checkpoint can be taken here.

        Raises:
            StopRequested: A stop was pending.
            BaseException: The run was cancelled, or a fatal observer failed.
        """
        if self.attempt.control.agent is not None:  # the others come with ticks
            agreed, self._agreed = self._agreed, []
            self._obey(agreed, False, checkpoint)
            return
        self.attempt.control.raise_if_failed()
        paused = self._obey(self.attempt.control.take(), False, checkpoint)
        if not paused:
            return
        with self.attempt.ledger.within("paused"), self.attempt.within("paused"):
            while paused:
                self.attempt.control.wait(1.0)  # WAIT: paused until a command ends it
                self.attempt.control.raise_if_failed()
                paused = self._obey(self.attempt.control.take(), paused, checkpoint)

    def _take_agreed(self, agent: Agent) -> None:
        """Take the decisions of the ranks that are due at this tick, and wait until it is granted."""
        attempt, paused = self.attempt, False
        while True:
            row: Row = "paused" if paused else "other"
            with attempt.ledger.within(row), attempt.within("paused" if paused else WAITING):
                decision = agent.next_decision(paused=paused)  # WAIT: for a grant; paused until a command ends it
            if decision is None:
                return
            if decision.failure is not None:
                own = attempt.control.error if decision.failure.rank == agent.rank else None
                raise own or peer_failed(decision.failure)
            paused = self._obey(decision.commands, paused, True)

    def _obey(self, commands: list[AnyCommand], paused: bool, checkpoint: bool) -> bool:
        """Execute commands in order, then take a requested checkpoint; return whether the run is paused."""
        stop: Stop | None = None
        checkpoint_ids: list[str] = []
        by_minutes = False
        for command in commands:
            match command:
                case Checkpoint(id=id) if id == BY_MINUTES:
                    by_minutes = True
                    continue
                case Stop():
                    stop = stop or command
                case Checkpoint():
                    checkpoint_ids.append(command.id)
                case Pause():
                    paused = True
                case Resume():
                    paused = False
            name = type(command).__name__.lower()
            self.attempt.ring.publish(
                CommandTaken(*self.attempt.origin.header(), command=name, command_id=command.id, reason=command.reason)
            )
        reasons = ["command"] if checkpoint_ids else []
        if stop is not None and stop.checkpoint:
            reasons.append("stop")
        if reasons and checkpoint:
            if (fence := self.checkpoints.on_command(reasons, checkpoint_ids)) is not None:
                self.wait_for_fence(fence)
        elif checkpoint_ids:
            self.checkpoints.refuse(checkpoint_ids, "the run stops within a step")
        elif by_minutes and (fence := self.checkpoints.take(["minutes"])) is not None:
            self.wait_for_fence(fence)
        if stop is not None:
            raise StopRequested(stop.reason)
        return paused
