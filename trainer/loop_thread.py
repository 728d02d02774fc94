"""The thread that trains: what it does around the loop, from seeding to the event of the end."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal

import anyio
import torch

from events.bus import Bus
from events.checkpoint.snapshot import Part
from events.errors import RunCancelled
from events.log import current_origin, logger
from events.messages import (
    CheckpointFailed,
    CheckpointRejected,
    LedgerReported,
    ObserverFailed,
    RunEnded,
    RunResumed,
    RunStarted,
    StallLedger,
    Status,
)
from events.tracebacks import describe, format_stack, format_traceback
from trainer.arguments import TrainerArguments
from trainer.boundary import Boundary, StopRequested
from trainer.checkpointing import PREPARING, Checkpointing, has_state
from trainer.compilation import compile_steps
from trainer.control import Control
from trainer.data import as_val_loaders, map_tensors, release_frames, seed_everything
from trainer.errors import ContractError, add_note
from trainer.evaluation import Evaluation
from trainer.hooks import CallbackHooks, HookTable, add_hint
from trainer.ledger import Ledger
from trainer.loop import TrainingLoop
from trainer.module_interface import ModuleInterface, Stage
from trainer.optimization import Optimization
from trainer.position import Position
from trainer.precision import Precision
from trainer.readback import DeviceReadback
from trainer.recorder import MetricRecorder
from trainer.resume import CheckpointPlan, Loaded, takes_state_by_default
from trainer.rng import capture_rng, restore_rng
from trainer.tensor_state import part_of
from trainer.versions import versions
from trainer.workers import take_stop_of_dead_workers

Task = Literal["train", "test"]

_IN_ORDER = ("finished", "stopped")
STUCK = "the training thread is stuck"
_AT_EXIT_S = 2.0
"""How long the end of the process waits for each loop that is still running."""
_running: weakref.WeakSet[LoopThread] = weakref.WeakSet()
_seeded_runs: list[str] = []
_seed_lock = threading.Lock()
_claim_lock = threading.Lock()  # held while a run looks whether a module is free, and takes it


class LoopThread:
    """Trains or tests one module. `run` is called on the thread that is to do it; `start` gives it one of its own.

    Args:
        readback: Told which stream the loop computes on.
        plan: What is to be done about checkpoints.
        config: The user's hyperparameters, for `RunStarted`.
    """

    def __init__(
        self,
        module: ModuleInterface,
        arguments: TrainerArguments,
        device: torch.device,
        precision: Precision,
        *,
        task: Task,
        control: Control,
        bus: Bus,
        hooks: HookTable,
        recorder: MetricRecorder,
        readback: DeviceReadback,
        plan: CheckpointPlan,
        config: dict[str, Any],
    ) -> None:
        self.status: Status = "failed"
        self.reason: str | None = None
        self.error: BaseException | None = None
        """What ended the loop, if it was an exception."""
        self._traceback: str | None = None
        self._phase: str | None = None
        self.outputs: dict[str, tuple[Any, ...]] = {}
        """What a test returned, per key."""
        self.epochs = 0
        """Epochs that were finished."""
        self.weights: Part | None = None
        """The module's weights when training has ended in order, if they are wanted; set before `RunEnded`."""
        self.total = StallLedger()
        """The ledger of the whole run, once it is over."""
        self.on_started: Callable[[], None] | None = None
        """Called once `RunStarted` is published, the first event of an attempt."""
        self.ended = anyio.Event()
        """Set in the event loop when nothing more will be published."""
        self._module = module
        self._arguments = arguments
        self._device = device
        self._precision = precision
        self._task = task
        self._control = control
        self._bus = bus
        self._origin = bus.origin
        self._recorder = recorder
        self._readback = readback
        self._ledger = Ledger(device, bus.cpu_time.read_ns)
        self._hooks = hooks
        self._logging = [module, *(one.callback for one in hooks.callbacks if one.callback is not module)]
        """All that log to this run."""
        self._plan = plan
        self._config = config
        self._rejected: list[tuple[str, str]] = []  # text only: an exception would keep its frames
        self._loaded: Loaded | None = None
        self._checkpoints = Checkpointing(
            plan.settings if task == "train" else None,
            module=module,
            device=device,
            precision=precision,
            hooks=hooks,
            recorder=recorder,
            bus=bus,
            control=control,
            ledger=self._ledger,
            on_failed_hook=self._on_failed_hook,
        )
        self._boundary = Boundary(
            bus,
            bus.origin,
            control,
            hooks,
            self._ledger,
            recorder,
            self._checkpoints,
            on_failed_hook=self._on_failed_hook,
            ledger_interval_s=arguments.ledger_interval_s,
        )
        self._evaluation = Evaluation(
            module,
            device,
            precision,
            self._boundary,
            recorder,
            batch_size=arguments.evaluation_batch_size,
            outputs_limit_bytes=arguments.epoch_outputs_limit_bytes,
        )
        self._thread: threading.Thread | None = None
        self._started = False
        self._ending = threading.Lock()  # whoever takes it publishes the end: the loop, or who gives it up
        self._given_up = False

    @property
    def resumed_from(self) -> str | None:
        """The folder of the checkpoint of this run that it has gone on from."""
        loaded = self._loaded
        return str(loaded.folder) if loaded is not None and self._plan.name_of(loaded) is not None else None

    # ----------------------------------------------------------------------------------- from other threads

    def start(self) -> None:
        """Run in a thread of its own. Should the process end meanwhile, the loop ends first."""
        _running.add(self)
        self._thread = threading.Thread(target=self.run, name=f"stagecast-loop-{self._origin.run_id}", daemon=True)
        self._thread.start()

    def end(self, timeout_s: float) -> None:
        """The process ends: stop at the next step, whoever still listens."""
        self._control.fail(RunCancelled(f"run {self._origin.run_id} was cancelled: the process ended"))
        self._bus.release()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def join(self) -> None:
        """Wait for the thread's end, after `ended`: its last act was to say so, which is microseconds ago."""
        if self._thread is not None:
            self._thread.join()

    def give_up(self) -> str:
        """It does not end in time: the end is published in its place. Returns where it hangs."""
        self._given_up = True
        grace_s = self._arguments.stop_grace_s
        text = f"the training thread reached no step boundary within {grace_s:g} s (stop_grace_s) of being cancelled"
        frame = sys._current_frames().get(self._thread.ident or 0) if self._thread else None
        stack = None if frame is None else format_stack(frame)
        if stack is not None:
            text += f"; it is in {self._boundary.phase}:\n{stack}"
        if self._ending.acquire(blocking=False):
            self._bus.publish(RunEnded(*self._origin.header(), "cancelled", STUCK, stack, self._boundary.phase))
        return text

    def release(self) -> None:
        """Give back the module and the callbacks, whose last hooks have run, and the memory of checkpoints."""
        self._checkpoints.release()
        self.weights = None
        vars(self._module).pop("_total_steps", None)
        for one in self._logging:
            if vars(one).get("_stagecast_recorder") is self._recorder:
                del vars(one)["_stagecast_recorder"]

    # ----------------------------------------------------------------------------------- on the loop's thread

    def run(self) -> None:
        """Train or test. Never raises: what ended the run is in `error`."""
        token = current_origin.set(self._origin)
        seeded = self._arguments.seed is not None
        try:
            if seeded:
                _note_seeded(self._origin.run_id)
            on_cuda = self._device.type == "cuda"
            try:
                # Python runs signal handlers only at calls and jumps: none runs between the end of this part, however
                # it ends, and the assignment in `finally`.
                self._control.interruptible = True
                self._control.raise_if_interrupted()
                # For as long as the loop runs: under `Trainer.train` the thread is the host's.
                with torch.cuda.device(self._device) if on_cuda else contextlib.nullcontext():
                    try:
                        self._main()
                    except StopRequested:
                        raise
                    except Exception as error:  # the module's own code may read data of its own, within a step
                        take_stop_of_dead_workers(self._boundary, error, checkpoint=False)
                        raise
            finally:
                self._control.interruptible = False
            self.status = "finished"
        except StopRequested as stop:
            self.status, self.reason = "stopped", stop.reason
        except BaseException as error:  # the loop's border: told to all observers, then raised by the run's door
            _drop_first_frame(error)  # this one, or the frame and its exception would keep each other
            self._record(error)
        finally:
            try:
                self._finish()
                current_origin.reset(token)
            finally:  # whatever a signal has cut short
                if seeded:
                    _forget_seeded(self._origin.run_id)
                _running.discard(self)
                if self.error is not None:
                    release_frames(self.error)
                if self._given_up:
                    self.release()  # nobody has waited for this thread
                self._bus.post(self.ended.set)

    def _main(self) -> None:
        if self._device.type == "cuda":
            self._readback.compute_stream = torch.cuda.current_stream(self._device)
        torch.get_num_threads()  # torch gives a new thread the host's setting only when it is asked for
        self._recorder.bind()
        if self._arguments.seed is not None:
            seed_everything(self._arguments.seed)
        with _claim_lock:
            for one in self._logging:
                if one._stagecast_recorder is not None:
                    kind, does = ("module", "trained") if one is self._module else ("callback", "used")
                    name = type(one).__name__
                    raise ContractError(f"this {name} is being {does} by another run; give each run its own {kind}")
            for one in self._logging:
                object.__setattr__(one, "_stagecast_recorder", self._recorder)  # not a submodule, not in the state dict
        for name, parameter in self._module.named_parameters():
            if parameter.is_meta:
                raise ContractError(f"the parameter {name} is on the meta device; give it data with to_empty()")
        self._module.to(self._device)
        if warning := self._arguments.batch_size_warning():
            logger.warning(warning)
        restore = compile_steps(self._module, self._arguments.compile_options) if self._arguments.compile else None
        try:
            if self._task == "train":
                self._train()
            else:
                self._test()
        finally:
            if restore is not None:
                restore()

    def _train(self) -> None:
        loaded = self._load()
        if loaded is None:
            self._boundary.phase = "reading the weights to start from"
            self._plan.load_weights(self._module)
        loop = TrainingLoop(
            self._module,
            self._arguments,
            self._device,
            precision=self._precision,
            boundary=self._boundary,
            evaluation=self._evaluation,
            recorder=self._recorder,
        )
        position = self._checkpoints.position
        if loaded is None:
            # Drawn from torch's generator, so that a host that has seeded it itself gets the same order each time; on
            # the CPU, so that no device is waited for.
            seed = self._arguments.seed
            position.sampler_seed = int(torch.randint(2**62, (), device="cpu").item()) if seed is None else seed
        else:
            if position.phase == "begin":
                loop.recall_loader()
                self._restore_again(loaded)
            restore_rng((position.phase != "begin" and position.rng_at_loader) or loaded.rng, self._device)
        loader = loop.ask_for_first_loader()
        rng = capture_rng(self._device)
        if loaded is not None and position.phase != "begin":
            self._restore_again(loaded)
        steps = loop.steps_of(loader)
        arguments = self._arguments
        limits = arguments.micro_batch_size, arguments.accumulation_steps, arguments.max_train_steps_per_epoch
        if loaded is None or arguments.reset_optimizers_schedulers or position.limits != limits:
            position.steps_per_epoch, position.limits = steps or 0, limits
        if arguments.total_steps(steps) is None:
            logger.warning(
                "get_train_dataloader() returned data without a length, so get_optimizers_schedulers() gets 0 steps per"
                " epoch; set max_steps or max_train_steps_per_epoch if a scheduler needs the number"
            )
        self._publish_started(steps)
        if loaded is not None and isinstance(loader, Iterator) and not has_state(loader) and self._origin.epoch > 0:
            logger.warning(
                "get_train_dataloader() returned an iterator, which begins anew in each process: what earlier epochs"
                " have read of it comes again; give it state_dict and load_state_dict to have it go on"
            )
        optimization = self._make_optimization(position)
        if loaded is not None:
            self._restore(loaded, optimization)
            restore_rng(rng, self._device)
        optimization.zero_grad()  # what the host has left in the gradients is none of the first step's
        self._bind_optimizers(optimization)
        self._boundary.phase = PREPARING
        self._checkpoints.start(optimization)
        # Not before all of that: an attempt that fails before it trains leaves the line, and the history, as they are.
        self._plan.prepare(self._origin.attempt, loaded)
        self._publish_resumed(loaded)
        self._boundary.phase = "setup"
        self._ledger.start()
        try:
            del loader
            loop.run(optimization, loaded)
        finally:
            self.epochs = loop.epochs_finished
            self._checkpoints.loader = None  # or its workers would live on
            loop.close()
            vars(self._module).pop("_stagecast_manual", None)
            optimization.close(self._checkpoints.stager.gate)

    def _make_optimization(self, position: Position) -> Optimization:
        self._boundary.phase = "get_optimizers_schedulers"
        steps_per_epoch, origin = position.steps_per_epoch or None, self._origin
        total = self._arguments.total_steps(steps_per_epoch, (origin.epoch, position.planned_steps))
        object.__setattr__(self._module, "_total_steps", total)
        if total is not None and self._arguments.reset_optimizers_schedulers:
            total = max(1, total - origin.global_step)  # new schedulers begin here
        told = self._arguments.steps_and_epochs(steps_per_epoch, total)
        returned = self._module.get_optimizers_schedulers(*told)
        made = Optimization(returned, self._module.parameters, self._arguments, self._precision, self._recorder)
        trained = {
            id(one) for optimizer in made.optimizers for group in optimizer.param_groups for one in group["params"]
        }
        self._precision.check((name, one) for name, one in self._module.named_parameters() if id(one) in trained)
        return made

    def _bind_optimizers(self, optimization: Optimization) -> None:
        for callback in self._hooks.callbacks:
            if callback.bind_optimizers is not None and not callback.disabled:
                self._boundary.phase = "bind_optimizers"
                try:
                    callback.bind_optimizers(optimization.optimizers)
                except Exception as error:  # a supervisor's border: reported, and raised unless it only disables
                    add_note(error, f"raised by {callback.name}.bind_optimizers")
                    self._on_failed_hook(callback, "bind_optimizers", error)

    # -------------------------------------------------------------------------------------------- resuming

    def _load(self) -> Loaded | None:
        """Read the checkpoint to go on from, if there is one, and note what this attempt starts from."""
        self._boundary.phase = "reading the checkpoint"
        plan, origin = self._plan, self._origin
        loaded = self._loaded = plan.load(self._reject)
        if loaded is not None:
            loaded.restore_module(self._module)
            loaded.restore_frozen(self._module)
            origin.global_step, origin.epoch = loaded.global_step, loaded.epoch
            self._checkpoints.go_on(loaded.position, plan.name_of(loaded), plan.scores_up_to(loaded))
        return loaded

    def _reject(self, name: str, error: Exception) -> None:
        self._rejected.append((name, describe(error)))

    def _restore_again(self, loaded: Loaded) -> None:
        """The run had asked for this dataloader already: what a module counts in that method, it has counted."""
        if not takes_state_by_default(self._module):
            self._boundary.phase = "restoring the checkpoint"
            loaded.restore_module(self._module)

    def _restore(self, loaded: Loaded, optimization: Optimization) -> None:
        """Put back all of a checkpoint but the module, which has its state, and the place in the data."""
        self._boundary.phase = "restoring the checkpoint"
        if not self._arguments.reset_optimizers_schedulers:
            loaded.restore_optimization(optimization)
            if self._precision.scaler is not None and loaded.state["scaler"] is not None:
                self._precision.scaler.load_state_dict(loaded.state["scaler"])
        loaded.restore_callbacks(self._hooks.callbacks, self._on_failed_hook)
        self._recorder.load_state_dict(map_tensors(torch.clone, loaded.state["metrics"]))
        if "readings" in loaded.parts:
            self._readback.restore(loaded.parts["readings"])
        loaded.forget()

    def _test(self) -> None:
        self._boundary.phase = "reading the checkpoint"
        loaded = self._loaded = self._plan.load(self._reject)
        if loaded is not None:
            loaded.restore_module(self._module)
            self._origin.global_step, self._origin.epoch = loaded.global_step, loaded.epoch
            loaded.forget()
        elif self._plan.load_weights(self._module):
            pass
        elif self._plan.resumes:
            logger.warning("there is no checkpoint to resume from: the module is tested as it is")
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
        self._ledger.start()
        self.outputs = self._evaluation.run(Stage.TEST, loaders, None, keep=True)

    def _publish_started(self, steps: int | None) -> None:
        origin, arguments = self._origin, self._arguments
        self._started = True
        kind, settings = type(self._module), self._plan.settings
        started = RunStarted(
            *origin.header(),
            f"{kind.__module__}.{kind.__qualname__}",
            arguments.epoch_limit,
            steps,
            arguments.max_steps,
            arguments.to_dict(),
            str(self._device),
            versions(),
            socket.gethostname(),
            os.getpid(),
            self._config,
            settings.best if settings is not None else None,
            settings.best_mode if settings is not None else "min",
        )
        self._bus.publish(started)
        if self.on_started is not None:
            self.on_started()
        for name, error in self._rejected:
            self._bus.publish(CheckpointRejected(*origin.header(), name, error))

    def _publish_resumed(self, loaded: Loaded | None) -> None:
        """Training begins at another place than where the attempt before has ended.

        Not told by a test, nor by an attempt that fails before it begins: what has been trained stays as it is.
        """
        origin = self._origin
        if loaded is not None:
            in_line = self._plan.name_of(loaded) is not None
            # The steps of earlier attempts that are done again are superseded: all of them, if this run goes on from
            # another one's checkpoint.
            after_seq = loaded.manifest.seq if in_line else 0
            self._bus.publish(RunResumed(*origin.header(), str(loaded.manifest.name), after_seq))
        elif origin.attempt > 1:
            self._bus.publish(RunResumed(*origin.header(), None, 0))

    def _record(self, error: BaseException) -> None:
        self.error = error
        self.status = status_after(error)
        self.reason = describe(error)
        if self.status == "failed":
            from_elsewhere = error is self._control.error
            self._phase = self._control.phase if from_elsewhere else self._boundary.phase
            self._traceback = format_traceback(error)
            step = self._origin.global_step
            if not from_elsewhere:  # an observer's exception names its hook already
                add_hint(error)
                add_note(error, f"stagecast: in {self._boundary.phase} after global_step {step}")
            logger.error(f"the run failed after global_step {step}: {self.reason}", published=True)

    def _finish(self) -> None:
        """Publish the ledger and the end; for an orderly end, with the hooks of `RunEnded`."""
        origin = self._origin
        origin.stage = None
        if not self._ending.acquire(blocking=False):
            return
        if self._control.interruption is not None and self.status in _IN_ORDER:
            self._record(self._control.interruption)  # a second signal arrived since the last step
        try:
            if not self._started:  # it failed before it knew how long an epoch is
                self._publish_started(None)
            if self._checkpoints.keeps_weights and self.status in _IN_ORDER:
                self._keep_weights()
            self.total = self._ledger.total()
            self._bus.publish(LedgerReported(*origin.header(), "run", self.total))
            ended = RunEnded(*origin.header(), self.status, self.reason, self._traceback, self._phase)
            if self.status in _IN_ORDER:
                self._boundary.phase = "on_end_train"
                fence = self._boundary.send(ended)
                try:
                    self._control.interruptible = True
                    self._control.raise_if_interrupted()
                    self._boundary.run_hooks(ended, fence)
                finally:
                    self._control.interruptible = False
            else:
                self._bus.publish(ended)
        except BaseException as error:  # a hook at the very end failed, or the run was cancelled during it
            self._record(error)
            # Whatever was published before: the last word of a run counts.
            self._bus.publish(RunEnded(*origin.header(), self.status, self.reason, self._traceback, self._phase))

    def _keep_weights(self) -> None:
        try:
            # Tied ones under each of their names: that is what `load_state_dict` looks for.
            self.weights = part_of(dict(self._module.state_dict())).without_aliases()
        except Exception as error:  # the loop's border: a run that has finished is not lost for want of this file
            text = describe(error)
            self._bus.publish(CheckpointFailed(*self._origin.header(), "weights.safetensors", text, "stage"))
            logger.warning(f"the weights alone are not kept: {text}", published=True)

    def _on_failed_hook(self, callback: CallbackHooks, hook: str, error: Exception) -> None:
        fatal, text = callback.delivery.on_error == "fatal", describe(error)
        action: Literal["fatal", "disabled"] = "fatal" if fatal else "disabled"
        self._bus.publish(ObserverFailed(*self._origin.header(), callback.name, text, hook, action))
        if fatal:
            self._control.fail(error, hook)
            raise error
        # Not retried, whatever the policy: its place in the step is gone.
        callback.disabled = True
        if (observer := callback.observer) is not None:
            self._bus.post(lambda: observer.disable(text))
        logger.warning(f"callback {callback.name} failed in {hook} (disabled): {text}", exc_info=error, published=True)


def status_after(error: BaseException) -> Status:
    """How a run has ended that an exception ended, whichever phase and thread raised it."""
    cancelled = isinstance(error, (RunCancelled, KeyboardInterrupt, SystemExit))
    return "cancelled" if cancelled else "failed"


def _drop_first_frame(error: BaseException) -> None:
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next


@atexit.register
def _end_all() -> None:
    """End the loops of runs that nobody has left: a thread that is in torch when the interpreter goes aborts it."""
    for loop in list(_running):
        loop.end(_AT_EXIT_S)


def _note_seeded(run_id: str) -> None:
    with _seed_lock:
        if _seeded_runs:
            others = ", ".join(_seeded_runs)
            logger.warning(
                f"the seeded runs {run_id} and {others} share the random generators of this process, so none of them is"
                f" reproducible; train them one after the other, or with launch()"
            )
        _seeded_runs.append(run_id)


def _forget_seeded(run_id: str) -> None:
    with _seed_lock, contextlib.suppress(ValueError):  # a signal came before it was noted
        _seeded_runs.remove(run_id)
