"""One attempt at a run: the loop on its thread, the bus and the observers in an event loop, and how they end."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from events.bounds import LAST_ATTEMPT
from events.bus.catch_up import WrittenJournal
from events.bus.pump import Pump
from events.bus.ring import Ring
from events.checkpoint.store import CHECKPOINTS_DIR, LAST_SEQ, CheckpointStore
from events.errors import RunCancelled, RunFolderError, TrainingThreadStuck
from events.ipython import kernel_shell
from events.journal.writer import Journal
from events.log import RunLog, logging_for
from events.messages import RunEnded
from events.origin import Origin
from events.protocol import ObserverReport, RunResult
from events.run.folder import ARGUMENTS_NAME, CONFIG_NAME
from events.run.inbox import Inbox
from events.sink import Place, RunInfo
from events.tracebacks import describe, drop_own_frames, format_traceback
from trainer.arguments import TrainerArguments
from trainer.checkpoint.resume import CheckpointPlan
from trainer.hooks.hooks import HOOKS_OF_TASK, TaskName
from trainer.hooks.readback import DeviceReadback
from trainer.hooks.recorder import MetricRecorder
from trainer.loop.attempt import Attempt
from trainer.loop.control import Control
from trainer.loop.non_finite import NonFinitePolicy
from trainer.loop.precision import Precision
from trainer.media import MediaWriter
from trainer.module_interface import ModuleInterface
from trainer.run.cancellation import outliving
from trainer.run.device import resolve_device
from trainer.run.loop_thread import STUCK, LoopThread, status_after
from trainer.run.observers import Callback, Observers, SinkLike, split
from trainer.run.place import RunPlace
from trainer.run.record import RunRecord
from trainer.run.system import SystemSampler

if TYPE_CHECKING:
    from trainer.run.ranks import RankSession

_HISTORY = 4_096
"""Events that are kept for late readers of a run without a journal."""


class Session:
    """Everything that one call of `Trainer.train`, `run`, `validate` or `test` needs.

    The constructor checks and opens what can fail before anything runs. Then `loop` runs on one thread and
    `serve` in an event loop on another; `serve` returns when the loop has ended and the observers are drained.

    Raises:
        RunFolderError: The run folder is held by another process, belongs to another run or cannot be written.
        ArgumentsError: The device does not exist.
    """

    error: BaseException | None = None
    """The exception for the caller, once `serve` has returned."""
    result: RunResult | None = None
    """The result, once `serve` has returned."""

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
        place: RunPlace,
        interactive: bool,
        on_stderr: bool,
        sinks_in: Place,
        record: RunRecord,
    ) -> None:
        self._on_stderr, self.finished = on_stderr, anyio.Event()  # set when `serve` returns
        self._grace = anyio.Event()  # set when the run is cancelled, which starts `stop_grace_s`
        self._stuck: str | None = None
        self._failed_in_drain: BaseException | None = None
        began_ns = time.time_ns()
        if not place.world.leads:  # rank 0 alone has the folder, the journal and the sinks
            sinks, journal = (), None
        device = resolve_device(arguments.device)
        precision = Precision(arguments.precision, device.type)
        # `unused` is closed only if the session does not run.
        with contextlib.ExitStack() as opened, contextlib.ExitStack() as unused, contextlib.ExitStack() as logging:
            self.folder = place.open() if place.world.leads else None
            if self.folder is not None:
                opened.callback(self.folder.close)
            plan = self._make_plan(place)
            number, seq = self._claim(plan) if place.attempt is None else (place.attempt, 0)
            ring = Ring(Origin(place.run_id, number, place.world.rank))
            unused.callback(ring.close)
            logging.enter_context(logging_for(ring.origin))  # threads that are started here log for this run
            policy = NonFinitePolicy(ring, control, stops=arguments.non_finite == "stop")
            readback = DeviceReadback(policy.on_loss, policy.on_gradient)
            pump = self._make_pump(ring, readback, seq, has_journal=journal is not None)
            log = self._open_log(ring, opened, unused)
            media = MediaWriter(self.folder.path if self.folder is not None else None, ring.publish, ring.origin)
            recorder = MetricRecorder(ring, media, module)
            info = RunInfo(place.run_id, number, place.world.rank, place.shown_dir, interactive)
            self.observers = Observers(pump, info, plan, control, arguments, log, media)
            unused.callback(self.observers.discard)
            self.observers.add_journal(journal)
            members, called = [(module, None), *map(split, callbacks)], HOOKS_OF_TASK[task]
            hooks = self.observers.add_callbacks(members, device, recorder, called)
            self._inbox = Inbox(self.folder.path, control, began_ns) if self.folder is not None else None
            self.observers.add_sinks(sinks, sinks_in)
            self._system = self._make_sampler(arguments.system_interval_s if place.world.leads else None)
            parts = control, ring, hooks, recorder, readback, plan, record, info, place.world
            self._attempt = Attempt(task, module, arguments, device, precision, *parts)
            self.loop = LoopThread(self._attempt)
            self._ranks = self._join_ranks(opened) if place.world.size > 1 else None
            if task == "train":
                self.observers.add_checkpoints(module, lambda: self.loop.weights, divided=place.world.shards)
            self._write_settings()
            self.loop.task.on_started = log.start
            log.begin(self.observers.has_console)
            self._opened, self._unused = opened.pop_all(), unused.pop_all()

    @property
    def run_dir(self) -> str | None:
        """The run's folder, also on ranks that do not hold it; None without one."""
        return self.observers.run_dir

    @property
    def ring(self) -> Ring:
        """The loop's side of the bus."""
        return self.observers.pump.ring

    @property
    def control(self) -> Control:
        """The loop's inbox."""
        return self._attempt.control

    @property
    def arguments(self) -> TrainerArguments:
        """The arguments of the run."""
        return self._attempt.arguments

    @property
    def origin(self) -> Origin:
        """Run, attempt and step."""
        return self.ring.origin

    def discard(self) -> None:
        """Close what the constructor opened, because the session will not run."""
        self._unused.close()
        self._opened.close()

    def _join_ranks(self, opened: contextlib.ExitStack) -> RankSession:
        from trainer.run.ranks import RankSession  # late, because a single process does not need it

        return RankSession(self._attempt, self.loop, self.run_dir, opened)

    def _make_plan(self, place: RunPlace) -> CheckpointPlan:
        settings = place.settings
        if self.folder is None:
            return CheckpointPlan(None if place.world.leads else settings, None, place.resume, None, place.init_from)
        url: str | None = None
        if settings is not None and settings.upload is not None:
            url = importlib.import_module("events.checkpoint.objects").run_url(settings.upload, place.run_id)
        store = CheckpointStore(self.folder.path / CHECKPOINTS_DIR)
        plan = CheckpointPlan(settings, store, place.resume, url, place.init_from, place.run_id)
        plan.check()
        return plan

    def _claim(self, plan: CheckpointPlan) -> tuple[int, int]:
        """Claim the number of this attempt; returns it, and the last ``seq`` of the run."""
        folder, store = self.folder, plan.store
        # Above the numbers of the journal and of all checkpoints: either may have been lost.
        attempt = max(folder.last_attempt if folder is not None else 0, store.last_attempt if store is not None else 0)
        seq = max(folder.last_seq if folder is not None else 0, store.last_seq if store is not None else 0)
        if attempt >= LAST_ATTEMPT or seq >= LAST_SEQ:  # a damaged or hostile number, after which none is valid
            raise RunFolderError(
                f"the run folder {folder.path if folder is not None else None} has attempt {attempt:,} and event"
                f" {seq:,}, after which nothing can be numbered; choose another folder"
            )
        if folder is not None:
            folder.claim(attempt + 1)  # first, because a kill may precede the number's first event in the journal
        return attempt + 1, seq

    def _make_pump(self, ring: Ring, readback: DeviceReadback, seq: int, *, has_journal: bool) -> Pump:
        written = None
        if self.folder is not None and has_journal:
            written = WrittenJournal(self.folder.journal_dir, lambda: self.observers.journal_settled())
        history = 0 if has_journal else _HISTORY
        return Pump(ring, readback=readback, history=history, first_seq=seq + 1, journal=written)

    def _open_log(self, ring: Ring, opened: contextlib.ExitStack, unused: contextlib.ExitStack) -> RunLog:
        log = RunLog(ring.origin, ring.publish)
        opened.callback(log.end)
        unused.callback(log.leave_console, failed=True)
        return log

    def _make_sampler(self, interval_s: float | None) -> SystemSampler | None:
        return SystemSampler(interval_s, self.observers.pump, self.run_dir) if interval_s is not None else None

    def _write_settings(self) -> None:
        if self.folder is not None:
            self.folder.write_json(ARGUMENTS_NAME, self.arguments.to_dict())
            if self._attempt.record.config:
                self.folder.write_json(CONFIG_NAME, self._attempt.record.config)

    # ------------------------------------------------------------------------------------- from other threads

    def cancel(self, reason: str) -> None:
        """End the run at its next step boundary without the hooks of the end. From the event loop's thread."""
        self.control.fail(RunCancelled(f"run {self.origin.run_id} was cancelled: {reason}"))
        self.ring.release()
        self._grace.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._grace.is_set()

    def hurry(self) -> None:
        """Shorten the drain of the observers. Any thread."""
        self.ring.post(self.observers.hurry)

    def leave_uploads(self) -> None:
        """Do not wait for uploads: the next attempt resumes them. Any thread, and a signal handler."""
        self.ring.post(self.observers.leave_uploads)

    @property
    def journal_dir(self) -> Path | None:
        """The folder of the journal; None without a journal."""
        return self.folder.journal_dir if self.folder is not None and self.observers.keeps_journal else None

    # -------------------------------------------------------------------------------- in the event loop

    async def serve(self) -> None:
        """Deliver events until the loop has ended and the observers are drained. Survives cancellation around it."""
        await outliving(self._serve)
        if self._ranks is not None:
            self._ranks.exit_if_lost()

    async def _serve(self) -> None:
        with logging_for(self.origin), anyio.CancelScope(shield=True):
            reports: list[ObserverReport] = []
            ranks = self._ranks
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(outliving, self.observers.pump.run, name="stagecast bus")
                    self.observers.start(tasks)
                    if self._inbox is not None:
                        self._inbox.start()
                    if self._system is not None:
                        tasks.start_soon(outliving, self._system.run, name="stagecast system")
                    await (self._wait_for_loop() if ranks is None else ranks.wait_for_loop(self._wait_for_loop))
                    if self._system is not None:
                        await self._system.stop()
                    if ranks is not None and ranks.has_failed:
                        self.observers.hurry(ranks.drain_s)
                    reports = await self.observers.drain(
                        cancelled=self.cancelled,
                        interrupted=isinstance(self.loop.ending.error, (KeyboardInterrupt, SystemExit)),
                        on_failure=self._publish_failure,
                    )
                    tasks.cancel_scope.cancel()
                self._conclude(reports)
            except BaseException:
                self.control.fail(RunCancelled(f"run {self.origin.run_id} was cancelled: its event loop has failed"))
                raise
            finally:
                if self._system is not None:
                    self._system.abandon()
                if self._stuck is None and (ranks is None or ranks.lost is None):
                    self.loop.release()
                if self._inbox is not None:
                    self._inbox.stop()
                self.observers.end()
                self._opened.close()
                self.finished.set()

    async def _wait_for_loop(self) -> None:
        """Wait for the loop's end, or for the grace period after a cancellation."""
        async with anyio.create_task_group() as watch:

            async def expire() -> None:
                await self._grace.wait()
                await anyio.sleep(self.arguments.stop_grace_s)
                self._stuck = self.loop.abandon()
                watch.cancel_scope.cancel()

            watch.start_soon(outliving, expire)
            await self.loop.ended.wait()
            self.loop.join()
            watch.cancel_scope.cancel()

    def _publish_failure(self) -> None:
        """Publish the failure of a fatal observer in its drain, once; the loop can no longer raise it."""
        failure = self.control.error
        is_over = self.loop.ending.error is None and self._stuck is None
        if failure is None or isinstance(failure, RunCancelled) or not is_over or self._failed_in_drain is not None:
            return
        self._failed_in_drain = failure
        self.ring.publish(
            RunEnded(
                *self.origin.header(),
                status=status_after(failure),
                reason=describe(failure),
                traceback=format_traceback(failure),
                phase=self.control.phase or "the end of the run",
            )
        )

    # ------------------------------------------------------------------------------------------ the result

    def _conclude(self, reports: list[ObserverReport]) -> None:
        loop, failure, writer = self.loop, self._failed_in_drain, self.observers.writer
        status, reason, self.error = loop.ending.status, loop.ending.reason, loop.ending.error
        if self._stuck is not None:
            status, reason, self.error = "cancelled", STUCK, TrainingThreadStuck(self._stuck)
        elif failure is not None:
            status, reason, self.error = status_after(failure), describe(failure), failure
        best, settings = writer.best if writer is not None else None, self._attempt.plan.settings
        saved = writer.last_saved if writer is not None else None
        self.result = RunResult(
            run_id=self.origin.run_id,
            attempt=self.origin.attempt,
            status=status,
            reason=reason,
            global_step=self.origin.global_step,
            epochs=loop.task.epochs,
            metrics=dict(self._attempt.readback.summary),
            ledger=loop.total,
            observers=reports,
            run_dir=self.run_dir,
            # The newest durable one of this attempt, otherwise the one that it resumed from.
            checkpoint=str(saved) if saved is not None else loop.task.resumed_from,
            best_checkpoint=str(best[0]) if best is not None else None,
            best_metric=best[1] if best is not None else None,
            best=settings.best if settings is not None and best is not None else None,
            weights=writer.weights.path if writer is not None else None,
            problems=self.observers.problems(reports, on_stderr=self._on_stderr),
        )
        if self._ranks is not None:
            self._ranks.leave_end(self.result)

    def outcome(self) -> RunResult:
        """Return the result of the finished session, or raise the exception that ended the run."""
        __tracebackhide__ = True
        error = self.error
        if error is not None:
            if kernel_shell() is not None:
                drop_own_frames(error)
            try:
                raise error
            finally:
                del self, error  # breaks the cycle of this frame and the exception
        assert self.result is not None
        return self.result

    def forget_error(self) -> None:
        """Release the exception that ended the run, whose frames refer to the user's objects."""
        self.error = self.loop.ending.error = self.control.error = self._failed_in_drain = None


def in_turn(make: Callable[[], Session], place: RunPlace, facts: Mapping[str, object]) -> Session:
    """Make a session on rank 0, which claims the attempt, and then on the other ranks. WAIT: for all ranks.

    Args:
        facts: What must be the same on all ranks.

    Raises:
        ArgumentsError: It is not; the error names the first difference.
        PeerFailed: Another rank could not make its own session.
    """
    world = place.world
    world.check_equal("program and arguments", facts)
    session = world.together(lambda: make() if place.world.leads else None)
    place.attempt = world.share(session.origin.attempt if session is not None else None)
    try:
        place.check_shared()
        return world.together(lambda: session if session is not None else make())
    except BaseException:
        if session is not None:
            session.discard()
        raise
