"""The observers of an attempt: callbacks, sinks, the writers of checkpoints, the journal; and how they are drained."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from events.bus.observer import Observer
from events.bus.pump import Pump
from events.bus.supervisor import Supervisor, health_at_end, report_observers
from events.bus.target import SinkTarget
from events.checkpoint.files import CHECKPOINTS_DIR
from events.journal.writer import Journal
from events.log import RunLog, show_problems
from events.messages import CheckpointFailed, CheckpointStaged, ObserverFailed, ObserversReported
from events.protocol import ObserverReport
from events.safe_files import unlink_below
from events.sink import Delivery, Place, RunInfo, Sink, delivery_of
from events.tracebacks import describe
from trainer.arguments import TrainerArguments
from trainer.callback_interface import CallbackInterface
from trainer.checkpoint.resume import CheckpointPlan
from trainer.errors import add_note
from trainer.hooks.hooks import CallbackHooks, HookTable, check_state_keys
from trainer.hooks.recorder import MetricRecorder
from trainer.hooks.target import CallbackTarget
from trainer.loop.control import Control
from trainer.media import MediaWriter
from trainer.module_interface import ModuleInterface
from trainer.run.cancellation import outliving
from trainer.run.versions import versions

Callback = CallbackInterface | tuple[CallbackInterface, Delivery]
SinkLike = Sink | tuple[Sink, Delivery]

_JOURNAL_WAIT_S = 5.0
"""Maximum seconds that a checkpoint waits for the journal to hold the events before it."""
_SETTLE_S = 0.01
_LOOK_S = 0.1
"""Seconds between two checks, during that wait, whether the journal can write."""
HURRIED_DRAIN_S = 0.5
"""Maximum seconds per drain after a second signal."""


class Observers:
    """The observers of an attempt. In the event loop, except where another thread is named.

    Attributes:
        pump: The loop's events on their way to the observers.
        host: The process in which sinks run (`sinks.host.process.SinkHost`); None if none does.
        writer: Writes checkpoints; None if the run takes none.
    """

    def __init__(
        self,
        pump: Pump,
        info: RunInfo,
        plan: CheckpointPlan,
        control: Control,
        arguments: TrainerArguments,
        log: RunLog,
        media: MediaWriter,
    ) -> None:
        self.host: Any = None
        self.writer: Any = None
        self.pump = pump
        self._ring = pump.ring
        self._info = info
        self._plan = plan
        self._control = control
        self._arguments = arguments
        self._log = log
        self._media = media
        self._supervisor = Supervisor(pump, self.on_fatal)
        self._journal: Observer | None = None
        self._consoles: list[Observer] = []
        self._checkpoints: list[Observer] = []  # the writer, then the uploader
        self._is_over = False
        self._shown: list[str] = []  # problems that a console has shown

    # ------------------------------------------------------------------------------------------- adding

    def add_journal(self, journal: Journal | None) -> None:
        """Add the journal, if the run keeps one. It comes first: a checkpoint waits for it."""
        if journal is None:
            return
        self._journal = self._supervisor.add("journal", SinkTarget(journal, self._info), journal.delivery)

    def add_callbacks(
        self,
        members: Iterable[tuple[CallbackInterface, Delivery | None]],
        device: Any,
        recorder: MetricRecorder,
        hooks: frozenset[str],
    ) -> HookTable:
        """Add the callbacks; those whose hooks all run on the thread of the loop get no observer.

        Args:
            hooks: Names of the hooks that the task calls.
        """
        table = HookTable(CallbackHooks(callback, delivery, hooks) for callback, delivery in members)
        if self._plan.settings is not None or self._plan.resumes:
            check_state_keys(table.callbacks)
        for callback in table.callbacks:
            if self._info.rank and not isinstance(callback.callback, ModuleInterface):
                table.left |= callback.leave_observers()
            if callback.observed:
                types = {*callback.observed, *([CheckpointStaged] if callback.stateful else [])}
                delivery = msgspec.structs.replace(callback.delivery, types=frozenset(types))
                target = CallbackTarget(callback, device, recorder)
                observer = self._supervisor.add(callback.name, target, delivery)
                callback.observer = observer
                callback.name = target.observer = observer.name
                for kind in callback.fenced:
                    table.fenced.setdefault(kind, []).append(observer.name)
        return table

    def add_sinks(self, sinks: Iterable[SinkLike], sinks_in: Place) -> None:
        """Add the sinks: each on a thread, or in the sink host."""
        hosted: list[Any] = []
        child: Any = importlib.import_module("sinks.host.child")
        for sink in sinks:
            described, delivery = split(sink)
            delivery = delivery or delivery_of(described)
            name = type(described).__name__.lower()
            if (delivery.runs_in or sinks_in) == "thread":
                observer = self._supervisor.add(name, SinkTarget(described, self._info), delivery)
                if getattr(described, "shows_warnings", False):
                    self._consoles.append(observer)
                if self._info.run_dir is not None:  # its place in the host, where it may have been before, is void
                    with contextlib.suppress(OSError):
                        unlink_below(self._info.run_dir, child.Place.file(observer.name))
            else:
                name = self._supervisor.take_name(name)
                hosted.append(child.HostedSink.of(name, described, delivery, self.pump.last_seq))
        if hosted:
            process: Any = importlib.import_module("sinks.host.process")
            times_s = self._arguments.drain_timeout_s, self._arguments.ledger_interval_s
            self.host = process.SinkHost(self._info, hosted, self._ring, *times_s, self.on_fatal)

    def add_checkpoints(self, module: ModuleInterface, weights: Callable[[], Any], *, divided: bool) -> None:
        """Add the observers that write checkpoints, and upload them.

        Args:
            weights: Returns the weights to keep at the end of the run; None if there are none.
            divided: Every rank writes its part; else rank 0 writes all.
        """
        plan, ring, kind = self._plan, self._ring, type(module)
        if plan.settings is None:
            return
        sinks: Any = importlib.import_module("sinks.checkpoints.writer")
        if plan.store is None:  # of another rank
            if divided and self._info.run_dir is not None:
                part = sinks.RankWriter(Path(self._info.run_dir) / CHECKPOINTS_DIR, plan.settings.end_timeout_s)
                self._checkpoints.append(self._supervisor.add("checkpoints", part, sinks.WRITER_DELIVERY))
            return
        self.writer = writer = sinks.CheckpointWriter(
            plan.store,
            plan.settings,
            origin=ring.origin,
            publish=ring.publish,
            sync_journal=self._sync_journal,
            weights=weights,
            module=f"{kind.__module__}.{kind.__qualname__}",
            versions=versions(),
            url=plan.url,
        )
        self._checkpoints.append(self._supervisor.add("checkpoints", writer, sinks.WRITER_DELIVERY))
        if plan.url is not None:
            sinks = importlib.import_module("sinks.checkpoints.uploader")
            uploader = sinks.CheckpointUploader(
                plan.store,
                plan.url,
                plan.settings,
                ring.publish,
                ring.origin,
                writer.retain,
                give_up=writer.without_uploads,
            )
            self._checkpoints.append(self._supervisor.add("uploads", uploader, sinks.UPLOADER_DELIVERY))

    # --------------------------------------------------------------------------------- while the run lasts

    def start(self, tasks: anyio.abc.TaskGroup) -> None:
        """Run every observer in a task, and report their health at each interval."""
        for observer in self._supervisor.observers:
            tasks.start_soon(outliving, observer.run, name=f"stagecast {observer.name}")
        if self.host is not None:
            self.host.start()
        tasks.start_soon(outliving, self._report, name="stagecast health")

    def discard(self) -> None:
        """The run will not start: release their queues."""
        for observer in self._supervisor.observers:
            observer.source.discard()

    @property
    def run_dir(self) -> str | None:
        """The run's folder; on all ranks that of rank 0."""
        return self._info.run_dir

    def has_console(self) -> bool:
        """Whether a console of this process shows the events. Any thread."""
        return any(observer.circuit != "disabled" for observer in self._consoles)

    def on_fatal(self, error: BaseException) -> None:
        """An observer with the policy ``fatal`` has failed: end the run."""
        text = describe(error)
        observers = [one for one in self._supervisor.observers if one.error == text]
        if not getattr(error, "__notes__", None):  # a callback's names its hook and step already
            failed = " or ".join(one.name for one in observers)
            add_note(error, f"raised by the observer {failed} after global_step {self._ring.origin.global_step}")
        # The note names the callback; a hook is named as it is on the loop's thread.
        phases = [
            one.doing if isinstance(one.target, CallbackTarget) else f"{one.name}.{one.doing}" for one in observers
        ]
        self._control.fail(error, " or ".join(phases) or None)
        self._ring.release()

    def journal_settled(self) -> bool:
        """Whether the journal has written all that was delivered so far, or cannot write at present."""
        if self._journal is None or self._is_over:
            return True
        return self._journal.source.statistics.queued == 0 or self._journal.circuit != "closed"

    @property
    def keeps_journal(self) -> bool:
        """Whether the run has a journal."""
        return self._journal is not None

    async def _report(self) -> None:
        origin, interval_s = self._ring.origin, self._arguments.ledger_interval_s
        await report_observers(self._supervisor.observers, origin, self._ring.publish, interval_s)

    def _sync_journal(self, seq: int) -> None:
        """Return when the journal has all up to ``seq`` on stable storage, or is in trouble. On any other thread."""
        target = self._journal.target if self._journal is not None else None
        if self._journal is None or not isinstance(target, SinkTarget):
            return
        writer: Any = target.writer
        if writer is not None and not self._journal.is_failing:
            self._ring.flush()
            with contextlib.suppress(OSError):  # its own failure, which its next write meets and reports
                deadline = time.monotonic() + _JOURNAL_WAIT_S
                while not writer.wait_for(seq, _LOOK_S):
                    if self._journal.is_failing or time.monotonic() > deadline:
                        return
                writer.sync()

    # ----------------------------------------------------------------------------------- at the end of the run

    def hurry(self, timeout_s: float = HURRIED_DRAIN_S) -> None:
        """Leave the observers no more than a moment in each drain."""
        self._supervisor.hurry(timeout_s)
        if self.host is not None:
            self.host.hurry(timeout_s)

    def leave_uploads(self) -> None:
        """Do not wait for uploads: the next attempt resumes them."""
        if (uploads := self._uploads) is not None:
            uploads.target.abandon()
            self._supervisor.leave(uploads)

    async def drain(
        self, *, cancelled: bool, interrupted: bool, on_failure: Callable[[], object]
    ) -> list[ObserverReport]:
        """Drain callbacks, checkpoints, sinks, consoles, the journal: each receives how those before it have ended.

        Args:
            cancelled: The run was cancelled: its uploads are left.
            interrupted: A second signal has ended it: each drain has a moment.
            on_failure: Called after each drain: publishes once that a fatal observer has failed in it.
        """
        self._log.publish_rest()
        if interrupted:
            self._supervisor.hurry(HURRIED_DRAIN_S)
        if cancelled:
            self.leave_uploads()
        supervisor, settings, timeout_s = self._supervisor, self._plan.settings, self._arguments.drain_timeout_s
        last_s = timeout_s if settings is None or cancelled else settings.end_timeout_s
        callbacks = [one for one in supervisor.observers if isinstance(one.target, CallbackTarget)]
        apart = [*callbacks, *self._checkpoints, *self._consoles, *([self._journal] if self._journal else [])]
        sinks = [one for one in supervisor.observers if one not in apart]
        reports: list[ObserverReport] = []

        async def drain(observers: list[Observer], timeout_s: float) -> None:
            add(await supervisor.drain(observers, timeout_s) if observers else [])

        def add(ended: list[ObserverReport]) -> None:
            for report in ended:
                reports.append(report)
                if report.state == "stuck":
                    self._publish_stuck(report)
            on_failure()

        await drain(callbacks, timeout_s)
        if self._media.used:  # callbacks can log no more, and sinks are to receive it
            await anyio.to_thread.run_sync(self._media.close, timeout_s, limiter=anyio.CapacityLimiter(1))
        for observer in self._checkpoints:
            await drain([observer], last_s)
        self._publish_left_uploads()
        if self.host is None:
            await drain(sinks, timeout_s)
        else:
            add(await self._drain_with_host(self.host, sinks, timeout_s))
        self._publish_ends(reports)
        await self.pump.drain()
        self._shown = self.pump.health.problems if self._consoles else []  # by the time a console is closed
        self._log.leave_console(failed=False)
        await drain(self._consoles, timeout_s)
        await drain([self._journal] if self._journal is not None else [], timeout_s)
        await self.pump.drain()
        self.pump.close()
        return reports

    def end(self) -> None:
        """End all waits for the journal, after any failure."""
        self._is_over = True

    def problems(self, reports: list[ObserverReport], *, on_stderr: bool) -> list[str]:
        """What is unhealthy about the run, at its very end; problems that no console has shown go to stderr."""
        health, consoles = self.pump.health, {observer.name for observer in self._consoles}
        ends = [health_at_end(report) for report in reports]
        health.add(ObserversReported(*self._ring.origin.header(), observers=ends))
        unseen = any(report.state != "closed" for report in reports if report.observer in consoles)
        self._log.leave_console(failed=unseen)
        shown = [] if unseen else self._shown
        show_problems([one for one in health.problems if one not in shown], on_stderr=on_stderr)
        return health.problems

    @property
    def _uploads(self) -> Observer | None:
        return self._checkpoints[1] if len(self._checkpoints) > 1 else None

    async def _drain_with_host(self, host: Any, sinks: list[Observer], timeout_s: float) -> list[ObserverReport]:
        """Drain the sinks here and those in the host at the same time."""
        here: list[ObserverReport] = []
        there: list[ObserverReport] = []
        timeout_s = self._supervisor.limited(timeout_s)

        async def drain_here() -> None:
            here.extend(await self._supervisor.drain(sinks, timeout_s))

        async with anyio.create_task_group() as both:
            both.start_soon(drain_here)
            await self.pump.drain()
            with anyio.move_on_after(min(timeout_s, _JOURNAL_WAIT_S)):
                while not self.journal_settled():  # noqa: ASYNC110  # nothing reports it
                    await anyio.sleep(_SETTLE_S)
            there += await host.finish(self._journalled_seq(), timeout_s)
        return here + there

    def _journalled_seq(self) -> int | None:
        target: Any = self._journal.target if self._journal is not None else None
        return target.writer.written_seq if target is not None and target.writer is not None else None

    def _publish_stuck(self, report: ObserverReport) -> None:
        header, error = self._ring.origin.header(), report.error or "it did not end in time"
        self._ring.publish(
            ObserverFailed(*header, observer=report.observer, error=error, during="drain", action="disabled")
        )

    def _publish_ends(self, reports: list[ObserverReport]) -> None:
        """Publish how the drained observers have ended, unless all have received everything."""
        lost = any(one.state != "closed" or one.left or one.dropped for one in reports)
        if lost or self.pump.health.has_failing_observers:
            header, ends = self._ring.origin.header(), [health_at_end(one) for one in reports]
            self._ring.publish(ObserversReported(*header, observers=ends))

    def _publish_left_uploads(self) -> None:
        """Publish which checkpoints are not in the remote store now that the run is over."""
        if (uploads := self._uploads) is None:
            return
        target: Any = uploads.target
        try:
            left = [str(name) for name in target.left()]
        except OSError as error:
            left, text = [""], f"the checkpoints that were not uploaded cannot be listed: {describe(error)}"
        else:
            text = f"{', '.join(left)} not uploaded when the run ended ({uploads.error or 'there was no time'})"
        if left:
            header = self._ring.origin.header()
            self._ring.publish(CheckpointFailed(*header, checkpoint=left[0], error=text, during="upload"))


def split(member: Any) -> tuple[Any, Any]:
    """An observer and the `Delivery` that it is paired with, or None."""
    # Not any tuple: a sink may be a named one.
    return member if type(member) is tuple and len(member) == 2 else (member, None)
