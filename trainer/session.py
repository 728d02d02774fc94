"""One attempt at a run: the loop on its thread, the bus and the observers in an event loop, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import platform
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import anyio
import msgspec
import torch

from events.bus import Bus
from events.errors import RunCancelled, TrainingThreadStuck
from events.folder import RunFolder
from events.journal import Journal
from events.log import current_origin, logger
from events.messages import (
    LedgerReported,
    NonFiniteLoss,
    ObserverFailed,
    RunEnded,
    RunResumed,
    RunStarted,
    StallLedger,
    Status,
    TrainStepEnded,
)
from events.origin import Origin, header_of
from events.protocol import ObserverReport, RunResult
from events.sink import Delivery, RunInfo, Sink, delivery_of
from events.supervisor import Observer, SinkTarget, Supervisor, describe
from trainer.arguments import TrainerArguments
from trainer.boundary import Boundary, StopRequested
from trainer.control import Control
from trainer.data import as_val_loaders, resolve_device, seed_everything
from trainer.errors import ContractError, NonFiniteLossError, add_note
from trainer.evaluation import Evaluation
from trainer.hooks import CallbackHooks, CallbackTarget, HookTable, InlineHook
from trainer.ledger import Ledger
from trainer.loop import TrainingLoop
from trainer.module_interface import CallbackInterface, ModuleInterface, Stage, make_log_opaque
from trainer.optimization import Optimization
from trainer.precision import Precision
from trainer.readback import DeviceReadback
from trainer.recorder import MetricRecorder

Callback = CallbackInterface | tuple[CallbackInterface, Delivery]
SinkLike = Sink | tuple[Sink, Delivery]
Task = Literal["train", "test"]

_seeded_runs = 0
_seed_lock = threading.Lock()
_claim_lock = threading.Lock()  # held while a run looks whether a module is free, and takes it
_ABORTED_DRAIN_S = 0.5
"""How long each of callbacks, sinks and journal may take after a second signal."""


class Session:
    """Everything that one call of `Trainer.train`, `Trainer.run` or `Trainer.test` needs.

    The constructor checks and opens what can fail before anything runs. Then `run_loop` runs on one thread and
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
        task: Task,
        control: Control,
        callbacks: Iterable[Callback],
        sinks: Iterable[SinkLike],
        journal: Journal | None,
        run_id: str | None,
        run_dir: str | os.PathLike[str] | None,
        interactive: bool,
    ) -> None:
        self.task = task
        self.outputs: dict[str, tuple[Any, ...]] = {}
        """What a test returned, per key."""
        self.error: BaseException | None = None
        """What ended the loop, if it was an exception."""
        self.result: RunResult | None = None
        self.control = control
        self.finished = anyio.Event()
        self._module = module
        self._arguments = arguments
        self._device = resolve_device(arguments.device)
        self._precision = Precision(arguments.precision, self._device.type)
        self._callbacks = [split(callback) for callback in callbacks]
        self._run_id = run_id or new_run_id()
        self._folder: RunFolder | None = None
        if journal is not None or run_dir is not None:
            self._folder = RunFolder.open(run_dir or Path("runs") / self._run_id, self._run_id)
        try:
            self._build(list(sinks), journal, interactive)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Let go of what the constructor opened, because the session will not run."""
        for observer in self._supervisor.observers if hasattr(self, "_supervisor") else ():
            observer.subscription.discard()
        if hasattr(self, "bus"):
            self.bus.discard()
        self._close_folder()

    def _build(self, sinks: list[SinkLike], journal: Journal | None, interactive: bool) -> None:
        arguments, folder = self._arguments, self._folder
        attempt = folder.last_attempt + 1 if folder is not None else 1
        self.origin = Origin(self._run_id, attempt)
        self._readback = DeviceReadback(self._on_loss)
        self.bus = Bus(
            self.origin,
            readback=self._readback,
            history=0 if journal is not None else 4_096,
            first_seq=folder.last_seq + 1 if folder is not None else 1,
            spill_dir=str(folder.path) if folder is not None else None,
        )
        self.recorder = MetricRecorder(self.bus)
        self.ledger = Ledger(self._device)
        self._supervisor = Supervisor(self.bus, self._on_fatal)
        self._loop_ended = anyio.Event()
        self._loop_thread: threading.Thread | None = None
        self._started = False
        self._ending = threading.Lock()  # whoever takes it publishes the end: the loop, or `serve` when that is stuck
        self._grace = anyio.Event()  # set when the run is cancelled: the loop has `stop_grace_s` from then on
        self._stuck: str | None = None
        self._final_ledger = StallLedger()
        self._status: Status = "failed"
        self._reason: str | None = None
        self._epochs = 0

        run_dir = str(folder.path) if folder is not None else None
        run = RunInfo(self._run_id, attempt, 0, run_dir, interactive)
        self._journal: Observer | None = None
        if journal is not None:
            self._journal = self._supervisor.add("journal", SinkTarget(journal, run), journal.delivery)
        self._add_callbacks()
        for sink in sinks:
            described, delivery = split(sink)
            name = type(described).__name__.lower()
            self._supervisor.add(name, SinkTarget(described, run), delivery or delivery_of(described))
        self._boundary = Boundary(
            self.bus,
            self.origin,
            self.control,
            self._hooks,
            self.ledger,
            self.recorder,
            on_inline_error=self._on_inline_error,
            ledger_interval_s=arguments.ledger_interval_s,
        )
        self._evaluation = Evaluation(
            self._module,
            self._device,
            self._precision,
            self._boundary,
            self.recorder,
            outputs_limit_bytes=arguments.epoch_outputs_limit_bytes,
        )
        if folder is not None:
            folder.write_arguments(_plain(arguments))

    def _add_callbacks(self) -> None:
        members: list[tuple[CallbackInterface, Delivery | None]] = []
        if self.task == "train":  # the contract has no hook for a test
            members = [(self._module, None), *self._callbacks]
        hooks = [CallbackHooks(callback, delivery) for callback, delivery in members]
        self._hooks = HookTable(hooks)
        for callback in hooks:
            if callback.observed:
                delivery = msgspec.structs.replace(callback.delivery, types=frozenset(callback.observed))
                target = CallbackTarget(callback, self._device, self.recorder)
                observer = self._supervisor.add(callback.name, target, delivery)
                callback.name = target.observer = observer.name
                for kind in callback.fenced:
                    self._hooks.fenced.setdefault(kind, []).append(observer.name)

    # --------------------------------------------------------------------------------- on the loop's thread

    def run_loop(self) -> None:
        """Train or test. Never raises: what ended the run is in `error`, and `serve` is told."""
        global _seeded_runs
        token = current_origin.set(self.origin)
        seeded = self._arguments.seed is not None
        try:
            self._count_seeded(1 if seeded else 0)
            on_cuda = self._device.type == "cuda"
            # For as long as the loop runs: under `Trainer.train` the thread is the host's.
            with torch.cuda.device(self._device) if on_cuda else contextlib.nullcontext():
                self._main()
            self._status = "finished"
        except StopRequested as stop:
            self._status, self._reason = "stopped", stop.reason
        except BaseException as error:  # the loop's border: told to all observers, then raised by the run's door
            self._record(error)
        finally:
            try:
                self._finish_loop()
                self._count_seeded(-1 if seeded else 0)
                current_origin.reset(token)
            finally:  # whatever a signal has cut short
                if self._stuck is not None:
                    self._detach()  # nobody has waited for this thread
                self.bus.post(self._loop_ended.set)

    def _main(self) -> None:
        if self._device.type == "cuda":
            self._readback.compute_stream = torch.cuda.current_stream(self._device)
        torch.get_num_threads()  # torch gives a new thread the host's setting only when it is asked for
        self.recorder.bind()
        if self._arguments.seed is not None:
            seed_everything(self._arguments.seed)
        with _claim_lock:
            if self._module._recorder is not None:
                kind = type(self._module).__name__
                raise ContractError(f"this {kind} is being trained by another run: give each run a module of its own")
            object.__setattr__(self._module, "_recorder", self.recorder)  # not a submodule, not in the state dict
        self._module.to(self._device)
        if warning := self._arguments.batch_size_warning():
            logger.warning(warning)
        restore = _compile(self._module, self._arguments)
        try:
            if self.task == "train":
                self._train()
            else:
                self._test()
        finally:
            restore()

    def _train(self) -> None:
        # Drawn from torch's generator, so that a host that has seeded it itself gets the same order each time.
        seed = self._arguments.seed
        sampler_seed = seed if seed is not None else int(torch.randint(2**62, ()).item())
        loop = TrainingLoop(
            self._module,
            self._arguments,
            self._device,
            precision=self._precision,
            boundary=self._boundary,
            evaluation=self._evaluation,
            recorder=self.recorder,
            sampler_seed=sampler_seed,
        )
        loader = loop.train_loader(0)
        steps = loop.steps_of(loader)
        if steps is None:
            logger.warning(
                "get_train_dataloader() returned data without a length: get_optimizers_schedulers() is told 0 steps"
                " per epoch; set max_train_steps_per_epoch if a scheduler needs the number"
            )
        self._publish_started(steps)
        self._boundary.phase = "get_optimizers_schedulers"
        returned = self._module.get_optimizers_schedulers(steps or 0, self._arguments.epochs)
        parameters = self._module.parameters()
        optimization = Optimization(returned, parameters, self._arguments, self._precision, self.recorder.latest)
        optimization.zero_grad()  # what the host has left in the gradients is none of the first step's
        self.ledger.start()
        try:
            loop.run(optimization, loader)
        finally:
            self._epochs = loop.epochs_finished
            optimization.zero_grad()

    def _test(self) -> None:
        self._publish_started(None)
        self._boundary.phase = "get_test_dataloaders"
        sampler = torch.utils.data.SequentialSampler
        batch_size = self._arguments.evaluation_batch_size
        loaders = as_val_loaders(
            self._module.get_test_dataloaders(sampler, batch_size),
            "get_test_dataloaders",
        )
        if not loaders:
            raise ContractError(
                f"{type(self._module).__name__}.get_test_dataloaders() returned no dataloader: implement it (and"
                f" test_step, unless val_step will do) to use Trainer.test()"
            )
        self.ledger.start()
        self.outputs = self._evaluation.run(Stage.TEST, loaders, None, keep=True)

    def _publish_started(self, steps: int | None) -> None:
        origin, arguments = self.origin, self._arguments
        self._started = True
        kind = type(self._module)
        started = RunStarted(
            *origin.header(),
            f"{kind.__module__}.{kind.__qualname__}",
            arguments.epochs,
            steps,
            arguments.max_steps,
            _plain(arguments),
            str(self._device),
            {"python": platform.python_version(), "torch": str(torch.__version__), "stagecast": _own_version()},
            socket.gethostname(),
            os.getpid(),
        )
        self.bus.publish(started)
        if origin.attempt > 1:
            # Nothing of the earlier attempts is taken over, so their steps are superseded from the first one on.
            self.bus.publish(RunResumed(*origin.header()))

    def _record(self, error: BaseException) -> None:
        self.error = error
        cancelled = isinstance(error, (RunCancelled, KeyboardInterrupt, SystemExit))
        self._status = "cancelled" if cancelled else "failed"
        self._reason = describe(error)
        if not cancelled:
            step = self.origin.global_step
            if error is not self.control.error:  # an observer's exception names its hook already
                add_note(error, f"stagecast: in {self._boundary.phase} after global_step {step}")
            logger.error(f"the run failed after global_step {step}: {self._reason}")

    def _finish_loop(self) -> None:
        """Publish the ledger and the end; for an orderly end, with the hooks of `RunEnded`."""
        origin = self.origin
        origin.stage = None
        if not self._ending.acquire(blocking=False):
            return
        try:
            if not self._started:  # it failed before it knew how long an epoch is
                self._publish_started(None)
            self._final_ledger = self.ledger.total()
            self.bus.publish(LedgerReported(*origin.header(), "run", self._final_ledger))
            ended = RunEnded(*origin.header(), self._status, self._reason)
            if self._status in ("finished", "stopped"):
                self._boundary.phase = "on_end_train"
                self._boundary.publish(ended)
            else:
                self.bus.publish(ended)
        except BaseException as error:  # a hook at the very end failed, or the run was cancelled during it
            self._record(error)

    def _count_seeded(self, change: int) -> None:
        global _seeded_runs
        with _seed_lock:
            _seeded_runs += change
            if change > 0 and _seeded_runs > 1:
                logger.warning(
                    "two runs in this process seed the global random generators: neither of them is reproducible"
                )

    # ------------------------------------------------------------------------------ from observers and threads

    def _on_loss(self, event: TrainStepEnded, consecutive: int) -> None:
        """A loss that is not finite has been read; it belongs to a step that is over."""
        stop = self._arguments.non_finite_loss == "stop"
        loss = event.loss if event.loss is not None else float("nan")
        if consecutive & (consecutive - 1) == 0:  # the 1st, 2nd, 4th, 8th...: a diverged run is not flooded
            action: Literal["warned", "stopped"] = "stopped" if stop else "warned"
            self.bus.publish(NonFiniteLoss(*header_of(event), loss, action, consecutive))
        if consecutive == 1:
            logger.warning(f"the loss of step {event.global_step} is {loss}")
        if stop:
            self.control.fail(
                NonFiniteLossError(
                    f"the loss of step {event.global_step} is {loss}, and non_finite_loss is 'stop'; lower the learning"
                    f" rate, set clip_grads, or choose 'skip' or 'warn'"
                )
            )

    def _on_fatal(self, error: BaseException) -> None:
        if not getattr(error, "__notes__", None):  # a callback's names its hook and step already
            failed = [one.name for one in self._supervisor.observers if one.error == describe(error)]
            add_note(error, f"raised by the observer {' or '.join(failed)} after global_step {self.origin.global_step}")
        self.control.fail(error)
        self.bus.release()

    def _on_inline_error(self, hook: InlineHook, error: Exception) -> None:
        fatal = hook.delivery.on_error == "fatal"
        add_note(error, f"raised by {hook.callback}.{hook.name} at global_step {self.origin.global_step}")
        failed = ObserverFailed(
            *self.origin.header(), hook.callback, describe(error), hook.name, "fatal" if fatal else "disabled"
        )
        self.bus.publish(failed)
        if fatal:
            self.control.fail(error)
            raise error
        hook.disabled = True  # an inline hook cannot be retried: its place in the step is gone
        logger.warning(f"{hook.callback}.{hook.name} failed and is disabled: {describe(error)}", exc_info=error)

    def cancel(self, reason: str) -> None:
        """End the run at its next step boundary without the hooks of the end. From the event loop's thread."""
        self.control.fail(RunCancelled(f"run {self._run_id} was cancelled: {reason}"))
        self.bus.release()
        self._grace.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._grace.is_set()

    # -------------------------------------------------------------------------------- in the event loop

    async def serve(self) -> None:
        """Deliver events until the loop has ended and the observers are drained. Survives cancellation around it."""
        await _outliving(self._serve)

    async def _serve(self) -> None:
        token = current_origin.set(self.origin)
        reports: list[ObserverReport] = []
        with anyio.CancelScope(shield=True):
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_outliving, self.bus.run, name="stagecast bus")
                    for observer in self._supervisor.observers:
                        tasks.start_soon(_outliving, observer.run, name=f"stagecast {observer.name}")
                    await self._wait_for_loop()
                    if self._loop_thread is not None and self._stuck is None:
                        self._loop_thread.join()  # its last act was to say that it has ended: microseconds
                    reports = await self._drain()
                    tasks.cancel_scope.cancel()
                self._conclude(reports)
            except BaseException:
                self.control.fail(RunCancelled(f"run {self._run_id} was cancelled: its event loop has failed"))
                raise
            finally:
                if self._stuck is None:
                    self._detach()
                self._close_folder()
                self.finished.set()
                current_origin.reset(token)

    def _detach(self) -> None:
        """Give the module back: its last hooks have run, and may have logged."""
        if vars(self._module).get("_recorder") is self.recorder:
            del vars(self._module)["_recorder"]

    async def _wait_for_loop(self) -> None:
        """Wait for the loop's end; once the run is cancelled, no longer than the grace period."""
        async with anyio.create_task_group() as watch:

            async def expire() -> None:
                await self._grace.wait()
                await anyio.sleep(self._arguments.stop_grace_s)
                self._stuck = self._where_the_loop_is()
                if self._ending.acquire(blocking=False):
                    ended = RunEnded(*self.origin.header(), "cancelled", "the training thread is stuck")
                    self.bus.publish(ended)
                watch.cancel_scope.cancel()

            watch.start_soon(_outliving, expire)
            await self._loop_ended.wait()
            watch.cancel_scope.cancel()

    async def _drain(self) -> list[ObserverReport]:
        """Drain callbacks, then sinks, then the journal: each is told how those before it have ended."""
        stages: dict[str, list[Observer]] = {"callbacks": [], "sinks": [], "journal": []}
        for observer in self._supervisor.observers:
            stage = "callbacks" if observer.target.payloads else "journal" if observer is self._journal else "sinks"
            stages[stage].append(observer)
        timeout_s = self._arguments.drain_timeout_s
        if isinstance(self.error, (KeyboardInterrupt, SystemExit)):  # a second signal: somebody wants it to end now
            timeout_s = min(timeout_s, _ABORTED_DRAIN_S)
        reports: list[ObserverReport] = []
        for observers in stages.values():
            if observers:
                reports += await self._supervisor.drain(observers, timeout_s)
        await self.bus.drain()
        self.bus.close()
        return reports

    def _conclude(self, reports: list[ObserverReport]) -> None:
        if self._stuck is not None:
            self.error = TrainingThreadStuck(self._stuck)
            self._status, self._reason = "cancelled", "the training thread is stuck"
        elif self.error is None and self.control.error is not None and not isinstance(
            self.control.error, RunCancelled
        ):
            # An observer failed fatally while it was drained: the loop was over already, and could not raise it.
            self.error = self.control.error
            self._status, self._reason = "failed", describe(self.control.error)
        self.result = RunResult(
            run_id=self._run_id,
            attempt=self.origin.attempt,
            status=self._status,
            reason=self._reason,
            global_step=self.origin.global_step,
            epochs=self._epochs,
            metrics=dict(self._readback.summary),
            ledger=self._final_ledger,
            observers=reports,
            run_dir=str(self._folder.path) if self._folder is not None else None,
        )

    def _where_the_loop_is(self) -> str:
        grace_s = self._arguments.stop_grace_s
        text = f"the training thread reached no step boundary within {grace_s:g} s (stop_grace_s) of being cancelled"
        frame = sys._current_frames().get(self._loop_thread.ident or 0) if self._loop_thread else None
        if frame is not None:
            text += f"; it is in {self._boundary.phase}:\n" + "".join(traceback.format_stack(frame)).rstrip()
        return text

    @property
    def journal_dir(self) -> Path | None:
        """Where the journal is; None if the run keeps none."""
        return self._folder.journal_dir if self._journal is not None and self._folder is not None else None

    def journal_settled(self) -> bool:
        """Whether the journal has written all that was delivered so far, or cannot write at present."""
        if self._journal is None or self.finished.is_set():
            return True
        return self._journal.subscription.statistics.queued == 0 or self._journal.circuit != "closed"

    def _close_folder(self) -> None:
        if self._folder is not None:
            self._folder.close()

    def start_thread(self) -> None:
        """Run the loop in a thread of its own."""
        self._loop_thread = threading.Thread(
            target=self.run_loop, name=f"stagecast-loop-{self._run_id}", daemon=True
        )
        self._loop_thread.start()


async def _outliving(function: Callable[[], Awaitable[None]]) -> None:
    """Run a task that the end of the host's program must not cut short: it ends in order when the run does.

    ``asyncio.run`` cancels all tasks when its main coroutine has returned, the one that holds the run, too, which then
    ends the run; that takes a pump and observers that work. trio cancels only through scopes, which `Session.serve`
    shields, but raises Ctrl-C in whatever code is just running.
    """
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        asyncio._unregister_task(task)  # documented in "Extending asyncio"
        # An eager task is registered only when it waits for the first time.
        asyncio.get_running_loop().call_soon(asyncio._unregister_task, task)
        await function()
    else:
        import trio

        @trio.lowlevel.enable_ki_protection
        async def protected() -> None:
            await function()

        await protected()


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


def _plain(arguments: TrainerArguments) -> Any:
    """The arguments as plain values; what is none, such as a function as torch.compile's backend, is text."""
    return msgspec.to_builtins(arguments, enc_hook=str)


def _compile(module: ModuleInterface, arguments: TrainerArguments) -> Callable[[], None]:
    """Compile the step methods in place, so that names in the state dict stay as they are; returns what undoes it."""
    if not arguments.compile:
        return lambda: None
    make_log_opaque(module)
    steps = ("train_step", "val_step", "test_step")
    before = {name: vars(module)[name] for name in steps if name in vars(module)}
    for name in steps:
        object.__setattr__(module, name, torch.compile(getattr(module, name), **arguments.compile_options))

    def restore() -> None:
        for name in steps:
            vars(module).pop(name, None)
        vars(module).update(before)

    return restore


def _own_version() -> str:
    try:
        return version("stagecast")
    except PackageNotFoundError:
        return "unknown"
