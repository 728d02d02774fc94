"""The thread that trains: what it does around its task, from seeding to the event of the end."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import sys
import threading
import weakref

import anyio
import torch

from events.checkpoint.snapshot import Part
from events.errors import RunCancelled
from events.log import current_origin, logger
from events.messages import CheckpointFailed, LedgerReported, RunEnded, StallLedger, Status
from events.tracebacks import describe, format_stack, format_traceback
from trainer.data.loaders import release_frames
from trainer.data.rng import seed_everything
from trainer.data.tensor_state import part_of
from trainer.errors import ContractError, add_note
from trainer.hooks.hooks import add_hint
from trainer.loop.attempt import Attempt
from trainer.loop.boundary import Boundary, StopRequested
from trainer.loop.checkpointing import Checkpointing
from trainer.loop.workers import take_stop_of_dead_workers
from trainer.run.compilation import compile_steps
from trainer.run.task import Task

STUCK = "the training thread is stuck"
_AT_EXIT_S = 2.0
"""How long the end of the process waits for each loop that is still running."""
_running: weakref.WeakSet[LoopThread] = weakref.WeakSet()
_seeded_runs: list[str] = []
_seed_lock = threading.Lock()
_claim_lock = threading.Lock()  # held while a run looks whether a module is free, and takes it


@dataclasses.dataclass
class Ending:
    """How the loop has ended."""

    status: Status = "failed"
    reason: str | None = None
    error: BaseException | None = None
    """What ended it, if it was an exception."""
    traceback: str | None = None
    phase: str | None = None


class LoopThread:
    """Trains or tests one module. `run` is called on the thread that is to do it; `start` gives it one of its own.

    Attributes:
        ending: How it has ended.
        task: What it does.
        weights: The module's weights when training has ended cleanly, if they are wanted; set before `RunEnded`.
        total: The ledger of the whole run, once it is over.
        ended: Set in the event loop when nothing more will be published.
    """

    def __init__(self, attempt: Attempt) -> None:
        self.ending = Ending()
        self.weights: Part | None = None
        self.total = StallLedger()
        self.ended = anyio.Event()
        self._attempt = attempt
        self._logging = [
            attempt.module,
            *(one.callback for one in attempt.hooks.callbacks if one.callback is not attempt.module),
        ]
        self._checkpoints = Checkpointing(attempt, attempt.plan.settings if attempt.task == "train" else None)
        self._boundary = Boundary(attempt, self._checkpoints)
        self.task = Task(self._boundary)
        self._thread: threading.Thread | None = None
        self._ending_lock = threading.Lock()  # whoever takes it publishes the end: the loop, or who gives it up
        self._is_given_up = False

    # ----------------------------------------------------------------------------------- from other threads

    def start(self) -> None:
        """Run in a thread of its own. Should the process end meanwhile, the loop ends first."""
        _running.add(self)
        name = f"stagecast-loop-{self._attempt.origin.run_id}"
        self._thread = threading.Thread(target=self.run, name=name, daemon=True)
        self._thread.start()

    def end(self, timeout_s: float) -> None:
        """The process ends: stop at the next step, whoever still listens."""
        self._attempt.control.fail(RunCancelled(f"run {self._attempt.origin.run_id} was cancelled: the process ended"))
        self._attempt.bus.release()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def join(self) -> None:
        """Wait for the thread's end, after `ended`: its last act was to say so, which is microseconds ago."""
        if self._thread is not None:
            self._thread.join()

    def give_up(self) -> str:
        """It does not end in time: the end is published in its place. Returns where it hangs."""
        self._is_given_up = True
        grace_s = self._attempt.arguments.stop_grace_s
        text = f"the training thread reached no step boundary within {grace_s:g} s (stop_grace_s) of being cancelled"
        frame = sys._current_frames().get(self._thread.ident or 0) if self._thread else None
        stack = None if frame is None else format_stack(frame)
        if stack is not None:
            text += f"; it is in {self._attempt.phase}:\n{stack}"
        if self._ending_lock.acquire(blocking=False):
            self._publish_end(Ending("cancelled", STUCK, traceback=stack, phase=self._attempt.phase))
        return text

    def release(self) -> None:
        """Give back the module and the callbacks, whose last hooks have run, and the memory of checkpoints."""
        self._checkpoints.release()
        self.weights = None
        vars(self._attempt.module).pop("_total_steps", None)
        for one in self._logging:
            if vars(one).get("_stagecast_recorder") is self._attempt.recorder:
                del vars(one)["_stagecast_recorder"]

    # ----------------------------------------------------------------------------------- on the loop's thread

    def run(self) -> None:
        """Train or test. Never raises: what ended the run is in `ending`."""
        attempt, control = self._attempt, self._attempt.control
        token = current_origin.set(attempt.origin)
        seeded = attempt.arguments.seed is not None
        try:
            if seeded:
                _note_seeded(attempt.origin.run_id)
            on_cuda = attempt.device.type == "cuda"
            try:
                # Python runs signal handlers only at calls and jumps: none runs between the end of this part, however
                # it ends, and the assignment in `finally`.
                control.interruptible = True
                control.raise_if_interrupted()
                # For as long as the loop runs: under `Trainer.train` the thread is the host's.
                with torch.cuda.device(attempt.device) if on_cuda else contextlib.nullcontext():
                    try:
                        self._main()
                    except StopRequested:
                        raise
                    except Exception as error:  # the module's own code may read data of its own, within a step
                        take_stop_of_dead_workers(self._boundary, error, checkpoint=False)
                        raise
            finally:
                control.interruptible = False
            self.ending = Ending("finished")
        except StopRequested as stop:
            self.ending = Ending("stopped", stop.reason)
        except BaseException as error:  # the loop's border: told to all observers, then raised by the run's door
            _drop_first_frame(error)  # this one, or the frame and its exception would keep each other
            self._record(error)
        finally:
            try:
                self._finish()
                current_origin.reset(token)
            finally:  # whatever a signal has cut short
                if seeded:
                    _forget_seeded(attempt.origin.run_id)
                _running.discard(self)
                if self.ending.error is not None:
                    release_frames(self.ending.error)
                if self._is_given_up:
                    self.release()  # no one has waited for this thread
                attempt.bus.post(self.ended.set)

    def _main(self) -> None:
        attempt, arguments, module = self._attempt, self._attempt.arguments, self._attempt.module
        if attempt.device.type == "cuda":
            attempt.readback.compute_stream = torch.cuda.current_stream(attempt.device)
        torch.get_num_threads()  # torch gives a new thread the host's setting only when it is asked for
        attempt.recorder.bind()
        if arguments.seed is not None:
            seed_everything(arguments.seed)
        self._claim()
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                raise ContractError(f"the parameter {name} is on the meta device; give it data with to_empty()")
        module.to(attempt.device)
        if warning := arguments.batch_size_warning():
            logger.warning(warning)
        restore = compile_steps(module, arguments.compile_options) if arguments.compile else None
        try:
            if attempt.task == "train":
                self.task.train()
            else:
                self.task.test()
        finally:
            if restore is not None:
                restore()

    def _claim(self) -> None:
        """Let the module and the callbacks log to this run."""
        with _claim_lock:
            for one in self._logging:
                if one._stagecast_recorder is not None:
                    kind, does = ("module", "trained") if one is self._attempt.module else ("callback", "used")
                    name = type(one).__name__
                    raise ContractError(f"this {name} is being {does} by another run; give each run its own {kind}")
            for one in self._logging:  # not a submodule, not in the state dict
                object.__setattr__(one, "_stagecast_recorder", self._attempt.recorder)

    def _record(self, error: BaseException) -> None:
        """An exception has ended the run."""
        attempt = self._attempt
        self.ending = ending = Ending(status_after(error), describe(error), error)
        if ending.status == "failed":
            from_elsewhere = error is attempt.control.error
            ending.phase = attempt.control.phase if from_elsewhere else attempt.phase
            ending.traceback = format_traceback(error)
            step = attempt.origin.global_step
            if not from_elsewhere:  # an observer's exception names its hook already
                add_hint(error)
                add_note(error, f"stagecast: in {attempt.phase} after global_step {step}")
            logger.error(f"the run failed after global_step {step}: {ending.reason}", published=True)

    def _finish(self) -> None:
        """Publish the ledger and the end; for a run that was not cut short, with the hooks of `RunEnded`."""
        attempt, control = self._attempt, self._attempt.control
        attempt.origin.stage = None
        if not self._ending_lock.acquire(blocking=False):
            return
        if control.interruption is not None and self._is_clean:
            self._record(control.interruption)  # a second signal arrived since the last step
        try:
            if not self.task.started:  # it failed before it knew how long an epoch is
                self.task.publish_started(None)
            settings = self._checkpoints.settings
            if settings is not None and settings.weights and self._is_clean:
                self._keep_weights()
            self.total = attempt.ledger.total()
            attempt.bus.publish(LedgerReported(*attempt.origin.header(), scope="run", ledger=self.total))
            if self._is_clean:
                attempt.phase = "on_end_train"
                event = self._event_of(self.ending)
                fence = self._boundary.send(event)
                try:
                    control.interruptible = True
                    control.raise_if_interrupted()
                    self._boundary.run_hooks(event, fence)
                finally:
                    control.interruptible = False
            else:
                self._publish_end(self.ending)
        except BaseException as error:  # a hook at the very end failed, or the run was cancelled during it
            self._record(error)
            self._publish_end(self.ending)  # whatever was published before: the last `RunEnded` counts

    @property
    def _is_clean(self) -> bool:
        return self.ending.status in ("finished", "stopped")

    def _event_of(self, ending: Ending) -> RunEnded:
        header = self._attempt.origin.header()
        return RunEnded(
            *header, status=ending.status, reason=ending.reason, traceback=ending.traceback, phase=ending.phase
        )

    def _publish_end(self, ending: Ending) -> None:
        self._attempt.bus.publish(self._event_of(ending))

    def _keep_weights(self) -> None:
        try:
            # Tied ones under each of their names: that is what `load_state_dict` looks for.
            self.weights = part_of(dict(self._attempt.module.state_dict())).without_aliases()
        except Exception as error:  # the loop's border: a run that has finished is not lost for want of this file
            text, header = describe(error), self._attempt.origin.header()
            self._attempt.bus.publish(
                CheckpointFailed(*header, checkpoint="weights.safetensors", error=text, during="stage")
            )
            logger.warning(f"the weights alone are not kept: {text}", published=True)


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
