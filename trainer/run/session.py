"""One attempt at a run: the loop on its thread, the bus and the observers in an event loop, and how they end."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import time
from collections.abc import Iterable
from contextvars import Token
from pathlib import Path
from typing import Any, Literal

import anyio
import msgspec

from events.bounds import LAST_ATTEMPT
from events.bus.catch_up import WrittenJournal
from events.bus.observer import Observer
from events.bus.pump import Pump
from events.bus.ring import Ring
from events.bus.supervisor import Supervisor, health_at_end, report_observers
from events.bus.target import SinkTarget
from events.checkpoint.settings import Checkpoints
from events.checkpoint.store import CHECKPOINTS_DIR, LAST_SEQ, CheckpointStore
from events.errors import RunCancelled, RunFolderError, TrainingThreadStuck
from events.journal.writer import Journal
from events.log import RunLog, current_origin, logger, show_problems
from events.messages import (
    CheckpointFailed,
    CheckpointStaged,
    NonFiniteGradient,
    NonFiniteLoss,
    ObserverFailed,
    ObserversReported,
    RunEnded,
    TrainStepEnded,
)
from events.origin import Origin, header_of
from events.protocol import ObserverReport, RunResult
from events.run.folder import ARGUMENTS_NAME, CONFIG_NAME, RunFolder
from events.run.inbox import Inbox
from events.safe_files import unlink_below
from events.sink import Delivery, Place, RunInfo, Sink, delivery_of
from events.tracebacks import describe, format_traceback
from trainer.arguments import TrainerArguments
from trainer.checkpoint.resume import CheckpointPlan
from trainer.errors import REMEDY, NonFiniteGradientError, NonFiniteLossError, add_note
from trainer.hooks.hooks import CallbackHooks, CallbackTarget, HookTable, check_state_keys
from trainer.hooks.readback import DeviceReadback
from trainer.hooks.recorder import MetricRecorder
from trainer.loop.attempt import Attempt, TaskName
from trainer.loop.control import Control
from trainer.loop.precision import Precision
from trainer.media import MediaWriter
from trainer.module_interface import CallbackInterface, ModuleInterface
from trainer.run.cancellation import outliving
from trainer.run.device import resolve_device
from trainer.run.loop_thread import STUCK, LoopThread, status_after
from trainer.run.system import SystemSampler
from trainer.run.versions import versions

Callback = CallbackInterface | tuple[CallbackInterface, Delivery]
SinkLike = Sink | tuple[Sink, Delivery]

_JOURNAL_WAIT_S = 5.0
"""How long a checkpoint waits for the journal to have what led to it. The journal is the lesser good."""
_SETTLE_S = 0.01
_LOOK_S = 0.1
"""How often it is seen meanwhile whether the journal can write at all."""
_ABORTED_DRAIN_S = 0.5
"""How long each of callbacks, sinks and journal may take after a second signal."""


class Session:
    """Everything that one call of `Trainer.train`, `Trainer.run` or `Trainer.test` needs.

    The constructor checks and opens what can fail before anything runs. Then `loop` runs on one thread and
    `serve` in an event loop on another; `serve` returns when the loop has ended and the observers are drained.

    Raises:
        RunFolderError: the run's folder is held by somebody else, belongs to another run or cannot be written.
        ArgumentsError: the device does not exist.
    """

    def __init__(
        self,
        module: ModuleInterface,
        arguments: TrainerArguments,
        *,
        task: TaskName,
        control: Control,
        callbacks: Iterable[Callback],
        sinks: Iterable[SinkLike],
        journal: Journal | None,
        run_id: str,
        run_dir: Path | None,
        settings: Checkpoints | None,
        resume: str | os.PathLike[str] | None,
        init_from: str | os.PathLike[str] | None,
        interactive: bool,
        on_stderr: bool,
        sinks_in: Place,
        config: dict[str, Any],
    ) -> None:
        self.error: BaseException | None = None
        """What the run's door has to raise, once `serve` has returned."""
        self.result: RunResult | None = None
        self.control = control
        self.finished = anyio.Event()
        self._on_stderr = on_stderr
        self._consoles: list[Observer] = []
        self._shown: list[str] = []  # problems that a console has shown
        self._context: Token[Origin | None] | None = None
        self._module = module
        self.arguments = arguments
        self._device = resolve_device(arguments.device)
        precision = Precision(arguments.precision, self._device.type)
        self._run_id = run_id
        began_ns = time.time_ns()
        self.folder = RunFolder.open(run_dir, run_id) if run_dir is not None else None
        try:
            folder = str(self.folder.path) if self.folder is not None else None
            self._plan = self._make_plan(settings, resume, init_from)
            self._connect(journal is None)
            attempt = RunInfo(self._run_id, self.origin.attempt, 0, folder, interactive)
            self._journal = self._add_journal(journal, attempt)
            self._checkpoint_observers: list[Observer] = []
            self._uploads: Observer | None = None
            # The contract has no hook for a test.
            members = [(module, None), *map(split, callbacks)] if task == "train" else []
            hooks = self._add_callbacks(members)
            self._inbox = Inbox(self.folder.path, control.send, began_ns) if self.folder is not None else None
            self._host = self._add_sinks(sinks, attempt, sinks_in)
            interval_s = arguments.system_interval_s
            self._system = SystemSampler(interval_s, self.pump, folder) if interval_s is not None else None
            self.loop = LoopThread(
                Attempt(
                    task=task,
                    module=module,
                    arguments=arguments,
                    device=self._device,
                    precision=precision,
                    control=control,
                    bus=self.bus,
                    hooks=hooks,
                    recorder=self._recorder,
                    readback=self._readback,
                    plan=self._plan,
                    config=config,
                )
            )
            self._writer = self._add_checkpoints() if task == "train" else None
            if self.folder is not None:
                self.folder.write_json(ARGUMENTS_NAME, arguments.to_dict())
                if config:
                    self.folder.write_json(CONFIG_NAME, config)
            self.loop.task.on_started = self._log.start
            self._log.begin(self._has_console)
            self._leave_context()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Let go of what the constructor opened, because the session will not run."""
        self._leave_context()
        if hasattr(self, "_log"):
            self._log.leave_console(failed=True)
            self._log.end()
        for observer in self._supervisor.observers if hasattr(self, "_supervisor") else ():
            observer.source.discard()
        if hasattr(self, "bus"):
            self.bus.close()
        self._close_folder()

    def _leave_context(self) -> None:
        if self._context is not None:
            current_origin.reset(self._context)
            self._context = None

    def _make_plan(
        self,
        settings: Checkpoints | None,
        resume: str | os.PathLike[str] | None,
        init_from: str | os.PathLike[str] | None,
    ) -> CheckpointPlan:
        if self.folder is None:
            return CheckpointPlan(None, None, resume, None, init_from)
        url: str | None = None
        if settings is not None and settings.upload is not None:
            url = importlib.import_module("events.checkpoint.objects").run_url(settings.upload, self._run_id)
        store = CheckpointStore(self.folder.path / CHECKPOINTS_DIR)
        plan = CheckpointPlan(settings, store, resume, url, init_from, self._run_id)
        plan.check()
        return plan

    def _connect(self, keeps_history: bool) -> None:
        folder, store = self.folder, self._plan.store
        # Above everything that the journal or a checkpoint knows: either may have been lost.
        attempt = max(folder.last_attempt if folder is not None else 0, store.last_attempt if store is not None else 0)
        seq = max(folder.last_seq if folder is not None else 0, store.last_seq if store is not None else 0)
        if attempt >= LAST_ATTEMPT or seq >= LAST_SEQ:  # made up: events and checkpoints after it could not be read
            raise RunFolderError(
                f"the run folder {folder.path if folder is not None else None} has attempt {attempt:,} and event"
                f" {seq:,}, after which nothing can be numbered; choose another folder"
            )
        if folder is not None:
            folder.claim(attempt + 1)  # before anything uses the number: a kill may come before it is in the journal
        self.origin = Origin(self._run_id, attempt + 1)
        self._context = current_origin.set(self.origin)  # the threads that the constructor makes log for this run
        self._readback = DeviceReadback(self._on_loss, self._on_gradient)
        self.bus = Ring(self.origin)
        self.pump = Pump(
            self.bus,
            readback=self._readback,
            history=4_096 if keeps_history else 0,
            first_seq=seq + 1,
            journal=WrittenJournal(folder.journal_dir, self.journal_settled)
            if folder is not None and not keeps_history
            else None,
        )
        self._log = RunLog(self.origin, self.bus.publish)
        self._media = MediaWriter(folder.path if folder is not None else None, self.bus.publish, self.origin)
        self._recorder = MetricRecorder(self.bus, self._media)
        self._supervisor = Supervisor(self.pump, self._on_fatal)
        self._grace = anyio.Event()  # set when the run is cancelled: the loop has `stop_grace_s` from then on
        self._stuck: str | None = None

    def _add_journal(self, journal: Journal | None, run: RunInfo) -> Observer | None:
        if journal is None:
            return None
        return self._supervisor.add("journal", SinkTarget(journal, run), journal.delivery)

    def _add_callbacks(self, members: Iterable[tuple[CallbackInterface, Delivery | None]]) -> HookTable:
        table = HookTable(CallbackHooks(callback, delivery) for callback, delivery in members)
        if self._plan.settings is not None or self._plan.resumes:
            check_state_keys(table.callbacks)
        for callback in table.callbacks:
            if callback.observed:
                types = {*callback.observed, *([CheckpointStaged] if callback.stateful else [])}
                delivery = msgspec.structs.replace(callback.delivery, types=frozenset(types))
                target = CallbackTarget(callback, self._device, self._recorder)
                observer = self._supervisor.add(callback.name, target, delivery)
                callback.observer = observer
                callback.name = target.observer = observer.name
                for kind in callback.fenced:
                    table.fenced.setdefault(kind, []).append(observer.name)
        return table

    def _add_sinks(self, sinks: Iterable[SinkLike], run: RunInfo, sinks_in: Place) -> Any:
        """Add the sinks; returns the host of those that run in a process of their own, None if none does."""
        hosted: list[Any] = []
        host: Any = importlib.import_module("sinks.host.child")
        for sink in sinks:
            described, delivery = split(sink)
            delivery = delivery or delivery_of(described)
            name = type(described).__name__.lower()
            if (delivery.runs_in or sinks_in) == "thread":
                observer = self._supervisor.add(name, SinkTarget(described, run), delivery)
                if getattr(described, "shows_warnings", False):
                    self._consoles.append(observer)
                if run.run_dir is not None:  # it may have been in a host before: from now on that place says nothing
                    with contextlib.suppress(OSError):
                        unlink_below(run.run_dir, host.Place.file(observer.name))
            else:
                since = self.pump.last_seq
                hosted.append(host.HostedSink.of(self._supervisor.take_name(name), described, delivery, since))
        if not hosted:
            return None
        process: Any = importlib.import_module("sinks.host.process")
        times_s = self.arguments.drain_timeout_s, self.arguments.ledger_interval_s
        return process.SinkHost(run, hosted, self.bus, *times_s, self._on_fatal)

    def _add_checkpoints(self) -> Any:
        """The observers that write checkpoints, and upload them."""
        plan, bus = self._plan, self.bus
        if plan.settings is None or plan.store is None:
            return None
        kind = type(self._module)
        sinks: Any = importlib.import_module("sinks.checkpoints.writer")
        writer = sinks.CheckpointWriter(
            plan.store,
            plan.settings,
            origin=self.origin,
            publish=bus.publish,
            sync_journal=self._sync_journal,
            weights=lambda: self.loop.weights,
            module=f"{kind.__module__}.{kind.__qualname__}",
            versions=versions(),
            url=plan.url,
        )
        self._checkpoint_observers.append(self._supervisor.add("checkpoints", writer, sinks.WRITER_DELIVERY))
        if plan.url is not None:
            sinks = importlib.import_module("sinks.checkpoints.uploader")
            header = self.origin.header
            uploader = sinks.CheckpointUploader(
                plan.store, plan.url, plan.settings, bus.publish, header, writer.retain, give_up=writer.without_uploads
            )
            self._uploads = self._supervisor.add("uploads", uploader, sinks.UPLOADER_DELIVERY)
            self._checkpoint_observers.append(self._uploads)
        return writer

    def _has_console(self) -> bool:
        """Whether a console of this process shows what is published. Any thread."""
        return any(observer.circuit != "disabled" for observer in self._consoles)

    # ------------------------------------------------------------------------------ from observers and threads

    def _sync_journal(self, seq: int) -> None:
        """Return when the journal has all up to ``seq`` on stable storage, or is in trouble. On any other thread."""
        target = self._journal.target if self._journal is not None else None
        if self._journal is None or not isinstance(target, SinkTarget):
            return
        writer: Any = target.writer
        if writer is not None and not self._journal.is_failing:
            self.bus.flush()
            with contextlib.suppress(OSError):  # its own failure, which its next write meets and tells of
                deadline = time.monotonic() + _JOURNAL_WAIT_S
                while not writer.wait_for(seq, _LOOK_S):
                    if self._journal.is_failing or time.monotonic() > deadline:
                        return
                writer.sync()

    def _on_loss(self, event: TrainStepEnded, consecutive: int) -> None:
        """A loss that is not finite has been read; it belongs to a step that is over."""
        stop = self.arguments.non_finite == "stop"
        loss = event.loss if event.loss is not None else float("nan")
        if consecutive & (consecutive - 1) == 0:  # the 1st, 2nd, 4th, 8th...: a diverged run is not flooded
            action: Literal["warned", "stopped"] = "stopped" if stop else "warned"
            self.bus.publish(
                NonFiniteLoss(*header_of(event), loss=loss, action=action, consecutive=consecutive, of_seq=event.seq)
            )
        if consecutive == 1:
            logger.warning(f"the loss of step {event.global_step} is {loss}", published=True)
        if stop:
            self.control.fail(
                NonFiniteLossError(f"the loss of step {event.global_step} is {loss} and non_finite='stop'; {REMEDY}")
            )

    def _on_gradient(self, event: TrainStepEnded, consecutive: int) -> None:
        """A gradient that is not finite has been read; it belongs to a step that is over, whose loss was finite."""
        stop = self.arguments.non_finite == "stop"
        if consecutive & (consecutive - 1) == 0:
            action: Literal["warned", "stopped"] = "stopped" if stop else "warned"
            self.bus.publish(
                NonFiniteGradient(*header_of(event), action=action, consecutive=consecutive, of_seq=event.seq)
            )
        if consecutive == 1:
            logger.warning(
                f"a gradient of step {event.global_step} is NaN or infinite, its loss is {event.loss}", published=True
            )
        if stop:
            self.control.fail(
                NonFiniteGradientError(
                    f"a gradient of step {event.global_step} is NaN or infinite and non_finite='stop'; {REMEDY}"
                )
            )

    def _on_fatal(self, error: BaseException) -> None:
        text = describe(error)
        observers = [one for one in self._supervisor.observers if one.error == text]
        if not getattr(error, "__notes__", None):  # a callback's names its hook and step already
            failed = " or ".join(one.name for one in observers)
            add_note(error, f"raised by the observer {failed} after global_step {self.origin.global_step}")
        # The note names the callback; a hook is named as it is on the loop's thread.
        phases = [
            one.doing if isinstance(one.target, CallbackTarget) else f"{one.name}.{one.doing}" for one in observers
        ]
        self.control.fail(error, " or ".join(phases) or None)
        self.bus.release()

    def cancel(self, reason: str) -> None:
        """End the run at its next step boundary without the hooks of the end. From the event loop's thread."""
        self.control.fail(RunCancelled(f"run {self._run_id} was cancelled: {reason}"))
        self.bus.release()
        self._grace.set()

    def hurry(self) -> None:
        """Somebody cannot wait for the observers: leave them no more than a moment. Any thread."""
        self.bus.post(self._hurry)

    def _hurry(self) -> None:
        self._supervisor.hurry(_ABORTED_DRAIN_S)
        if self._host is not None:
            self._host.hurry(_ABORTED_DRAIN_S)

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._grace.is_set()

    # -------------------------------------------------------------------------------- in the event loop

    async def serve(self) -> None:
        """Deliver events until the loop has ended and the observers are drained. Survives cancellation around it."""
        await outliving(self._serve)

    async def _serve(self) -> None:
        token = current_origin.set(self.origin)
        reports: list[ObserverReport] = []
        with anyio.CancelScope(shield=True):
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(outliving, self.pump.run, name="stagecast bus")
                    for observer in self._supervisor.observers:
                        tasks.start_soon(outliving, observer.run, name=f"stagecast {observer.name}")
                    if self._host is not None:
                        self._host.start()
                    if self._inbox is not None:
                        self._inbox.start()
                    if self._system is not None:
                        tasks.start_soon(outliving, self._system.run, name="stagecast system")
                    tasks.start_soon(outliving, self._report_observers, name="stagecast health")
                    await self._wait_for_loop()
                    if self._system is not None:
                        await self._system.stop()
                    reports = await self._drain()
                    tasks.cancel_scope.cancel()
                self._conclude(reports)
            except BaseException:
                self.control.fail(RunCancelled(f"run {self._run_id} was cancelled: its event loop has failed"))
                raise
            finally:
                if self._system is not None:
                    self._system.abandon()
                if self._stuck is None:
                    self.loop.release()
                if self._inbox is not None:
                    self._inbox.stop()
                self._log.end()
                self._close_folder()
                self.finished.set()
                current_origin.reset(token)

    async def _report_observers(self) -> None:
        await report_observers(
            self._supervisor.observers, self.origin, self.bus.publish, self.arguments.ledger_interval_s
        )

    async def _wait_for_loop(self) -> None:
        """Wait for the loop's end; once the run is cancelled, no longer than the grace period."""
        async with anyio.create_task_group() as watch:

            async def expire() -> None:
                await self._grace.wait()
                await anyio.sleep(self.arguments.stop_grace_s)
                self._stuck = self.loop.give_up()
                watch.cancel_scope.cancel()

            watch.start_soon(outliving, expire)
            await self.loop.ended.wait()
            self.loop.join()
            watch.cancel_scope.cancel()

    async def _drain(self) -> list[ObserverReport]:
        """Drain callbacks, checkpoints, sinks, consoles, the journal: each gets how those before it have ended."""
        self._log.publish_rest()
        stages = self._stages()
        if isinstance(self.loop.ending.error, (KeyboardInterrupt, SystemExit)):  # a second signal
            self._supervisor.hurry(_ABORTED_DRAIN_S)
        reports: list[ObserverReport] = []
        told = False
        for timeout_s, observers in stages:
            ended: list[ObserverReport] = []
            if observers is stages[-2][1]:
                self._publish_ends(reports)
                await self.pump.drain()
                self._shown = self.pump.health.problems if observers else []  # by the time a console is closed
                self._log.leave_console(failed=False)
            if observers is stages[-3][1] and self._host is not None:
                ended = await self._drain_with_host(observers, timeout_s)
            elif observers:
                ended = await self._supervisor.drain(observers, timeout_s)
            for report in ended:
                if report.state == "stuck":
                    self._publish_stuck(report)
            reports += ended
            if (failure := self._failed_in_drain) is not None and not told:
                told = True
                trace = format_traceback(failure)
                phase = self.control.phase or "the end of the run"
                ended_as = RunEnded(
                    *self.origin.header(),
                    status=status_after(failure),
                    reason=describe(failure),
                    traceback=trace,
                    phase=phase,
                )
                self.bus.publish(ended_as)
            if observers is stages[0][1] and self._media.used:  # callbacks can log no more, and sinks are to get it
                await anyio.to_thread.run_sync(self._media.close, timeout_s, limiter=anyio.CapacityLimiter(1))
            if self._uploads is not None and observers == [self._uploads]:
                self._tell_of_left_uploads(self._uploads)
        await self.pump.drain()
        self.pump.close()
        return reports

    def _publish_stuck(self, report: ObserverReport) -> None:
        error = report.error or "it did not end in time"
        self.bus.publish(
            ObserverFailed(
                *self.origin.header(), observer=report.observer, error=error, during="drain", action="disabled"
            )
        )

    def _publish_ends(self, reports: list[ObserverReport]) -> None:
        """Publish what became of the events of observers that were drained, unless all is well."""
        if self.pump.health.has_failing_observers or any(
            one.state != "closed" or one.left or one.dropped for one in reports
        ):
            self.bus.publish(
                ObserversReported(*self.origin.header(), observers=[health_at_end(one) for one in reports])
            )

    async def _drain_with_host(self, sinks: list[Observer], timeout_s: float) -> list[ObserverReport]:
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
                while not self.journal_settled():  # noqa: ASYNC110  # it is asked, and tells nobody
                    await anyio.sleep(_SETTLE_S)
            there += await self._host.finish(self._journalled_seq(), timeout_s)
        return here + there

    def _journalled_seq(self) -> int | None:
        target: Any = self._journal.target if self._journal is not None else None
        return target.writer.written_seq if target is not None and target.writer is not None else None

    def leave_uploads(self) -> None:
        """Wait no longer for uploads: the next attempt goes on with them. Any thread, and a signal handler."""
        self.bus.post(self._leave_uploads)

    def _leave_uploads(self) -> None:
        if self._uploads is not None:
            self._uploads.target.abandon()
            self._supervisor.leave(self._uploads)

    def _tell_of_left_uploads(self, uploads: Observer) -> None:
        """The run is over: say what of it is not in the remote store."""
        target: Any = uploads.target
        try:
            left = [str(name) for name in target.left()]
        except OSError as error:
            left, text = [""], f"the checkpoints that were not uploaded cannot be listed: {describe(error)}"
        else:
            text = f"{', '.join(left)} not uploaded when the run ended ({uploads.error or 'there was no time'})"
        if left:
            self.bus.publish(CheckpointFailed(*self.origin.header(), checkpoint=left[0], error=text, during="upload"))

    def _stages(self) -> list[tuple[float, list[Observer]]]:
        """Who is drained together, and how long that may take."""
        callbacks: list[Observer] = []
        sinks: list[Observer] = []
        for observer in self._supervisor.observers:
            if isinstance(observer.target, CallbackTarget):
                callbacks.append(observer)
            elif observer is not self._journal and observer not in (*self._checkpoint_observers, *self._consoles):
                sinks.append(observer)
        settings, timeout_s = self._plan.settings, self.arguments.drain_timeout_s
        last_s = timeout_s if settings is None or self.cancelled else settings.end_timeout_s
        if self.cancelled:
            self._leave_uploads()  # whoever cancels a run does not wait for them
        return [
            (timeout_s, callbacks),
            *((last_s, [observer]) for observer in self._checkpoint_observers),
            (timeout_s, sinks),
            (timeout_s, self._consoles),
            (timeout_s, [self._journal] if self._journal is not None else []),
        ]

    def _conclude(self, reports: list[ObserverReport]) -> None:
        loop, failure = self.loop, self._failed_in_drain
        status, reason, self.error = loop.ending.status, loop.ending.reason, loop.ending.error
        if self._stuck is not None:
            status, reason, self.error = "cancelled", STUCK, TrainingThreadStuck(self._stuck)
        elif failure is not None:
            status, reason, self.error = status_after(failure), describe(failure), failure
        best = self._writer.best if self._writer is not None else None
        self.result = RunResult(
            run_id=self._run_id,
            attempt=self.origin.attempt,
            status=status,
            reason=reason,
            global_step=self.origin.global_step,
            epochs=loop.task.epochs,
            metrics=dict(self._readback.summary),
            ledger=loop.total,
            observers=reports,
            run_dir=str(self.folder.path) if self.folder is not None else None,
            checkpoint=self._last_checkpoint,
            best_checkpoint=str(best[0]) if best is not None else None,
            best_metric=best[1] if best is not None else None,
            problems=self._problems(reports),
        )

    def outcome(self) -> RunResult:
        """Return the result, once the session has finished; raises what ended the run."""
        error = self.error
        if error is not None:
            try:
                raise error
            finally:
                del self, error  # or this frame and the exception would keep each other
        assert self.result is not None
        return self.result

    def forget_error(self) -> None:
        """Keep the exception no longer that ended the run: its frames refer to all that the user's code held."""
        self.error = self.loop.ending.error = self.control.error = None

    @property
    def _failed_in_drain(self) -> BaseException | None:
        """What a fatal observer raised while it was drained: the loop was over already, and could not raise it."""
        failure = self.control.error
        over = self.loop.ending.error is None and self._stuck is None
        return failure if over and not isinstance(failure, RunCancelled) else None

    def _problems(self, reports: list[ObserverReport]) -> list[str]:
        """What is unhealthy about the run, at its very end; what no console has shown goes to stderr."""
        health, consoles = self.pump.health, {observer.name for observer in self._consoles}
        health.add(ObserversReported(*self.origin.header(), observers=[health_at_end(report) for report in reports]))
        problems = health.problems
        unseen = any(report.state != "closed" for report in reports if report.observer in consoles)
        self._log.leave_console(failed=unseen)
        shown = [] if unseen else self._shown
        show_problems([one for one in problems if one not in shown], on_stderr=self._on_stderr)
        return problems

    @property
    def _last_checkpoint(self) -> str | None:
        """The newest durable one of the run: of this attempt, else the one of this run that it has gone on from."""
        saved = self._writer.last_saved if self._writer is not None else None
        return str(saved) if saved is not None else self.loop.task.resumed_from

    @property
    def journal_dir(self) -> Path | None:
        """Where the journal is; None if the run keeps none."""
        return self.folder.journal_dir if self._journal is not None and self.folder is not None else None

    def journal_settled(self) -> bool:
        """Whether the journal has written all that was delivered so far, or cannot write at present."""
        if self._journal is None or self.finished.is_set():
            return True
        return self._journal.source.statistics.queued == 0 or self._journal.circuit != "closed"

    def _close_folder(self) -> None:
        if self.folder is not None:
            self.folder.close()


def new_run_id() -> str:
    """A name that sorts by time and is not taken: ``20260131-235959-a1b2c3``."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def console() -> Sink:
    """The default sink of `Trainer.train`, imported only when it is wanted."""
    sink: Sink = importlib.import_module("sinks").Console()
    return sink


def split(member: Any) -> tuple[Any, Any]:
    """An observer and the `Delivery` that it is paired with, or None."""
    # Not any tuple: a sink may be a named one.
    return member if type(member) is tuple and len(member) == 2 else (member, None)
