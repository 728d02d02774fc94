"""The thread that trains: its work around the task, from seeding to the last event."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import sys
import threading
import weakref
from typing import Any

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
from trainer.distributed.ending import speaks
from trainer.distributed.local import is_split
from trainer.errors import ArgumentsError, ContractError, PeerFailed, add_note
from trainer.hooks.hooks import add_hint
from trainer.loop.attempt import Attempt
from trainer.loop.boundary import Boundary, StopRequested
from trainer.loop.checkpointing import Checkpointing
from trainer.loop.workers import take_stop_of_dead_workers
from trainer.run.compilation import compile_steps
from trainer.run.task import Task

STUCK = "the training thread is stuck"
_AT_EXIT_S = 2.0
"""Maximum seconds that the exit of the process waits per running loop."""
_running: weakref.WeakSet[LoopThread] = weakref.WeakSet()
_seeded_runs: list[str] = []
_seed_lock = threading.Lock()
_claim_lock = threading.Lock()  # held while a run claims its module


@dataclasses.dataclass
class Ending:
    """The end of the loop."""

    status: Status = "failed"
    reason: str | None = None
    error: BaseException | None = None
    """The exception that ended it, if any."""
    traceback: str | None = None
    phase: str | None = None


class LoopThread:
    """Trains or tests one module, on the calling thread (`run`) or on a new one (`start`).

    Attributes:
        ending: Its end.
        task: Its work.
        weights: The module's weights when training has ended cleanly, or only their names if those of the best
            checkpoint are wanted; None if none are. Set before `RunEnded`.
        total: The ledger of the whole run, once it is over.
        ended: Set in the event loop when nothing more will be published.
    """

    def __init__(self, attempt: Attempt) -> None:
        self.ending = Ending()
        self.weights: Part | list[str] | None = None
        self.total = StallLedger()
        self.ended = anyio.Event()
        self._attempt = attempt
        self._logging = [
            attempt.module,
            *(one.callback for one in attempt.hooks.callbacks if one.callback is not attempt.module),
        ]
        self._checkpoints = self._make_checkpoints()
        self._boundary = Boundary(attempt, self._checkpoints)
        self.task = Task(self._boundary)
        self._thread: threading.Thread | None = None
        self._ending_lock = threading.Lock()  # its holder publishes the end: the loop, or `abandon`
        self._is_abandoned = False

    # ----------------------------------------------------------------------------------- from other threads

    def start(self) -> None:
        """Run in a thread, which ends before the process exits."""
        _running.add(self)
        name = f"stagecast-loop-{self._attempt.origin.run_id}"
        self._thread = threading.Thread(target=self.run, name=name, daemon=True)
        self._thread.start()

    def end(self, timeout_s: float) -> None:
        """Cancel the run because the process exits; waits for at most ``timeout_s``."""
        self._attempt.control.fail(RunCancelled(f"run {self._attempt.origin.run_id} was cancelled: the process ended"))
        self._attempt.ring.release()
        if self._thread is not None:
            self._thread.join(timeout_s)

    @property
    def has_thread(self) -> bool:
        """Whether it runs on a thread of its own, not on the calling one."""
        return self._thread is not None

    def join(self) -> None:
        """Wait for the thread's end, microseconds after `ended`."""
        if self._thread is not None:
            self._thread.join()

    def abandon_for(self, error: PeerFailed) -> None:
        """End the run in place of a loop that hangs in a collective, because another rank has failed."""
        self._is_abandoned = True
        if self._ending_lock.acquire(blocking=False):
            self._record(error)
            self._publish_end(self.ending)

    def abandon(self) -> str:
        """Publish the end of the run in place of a loop that hangs; return a description with its stack."""
        self._is_abandoned = True
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
        """Release the module, the callbacks and the memory of checkpoints, after the last hooks."""
        self._checkpoints.release()
        self._attempt.recorder.objects.close()
        self.weights = None
        vars(self._attempt.module).pop("_total_steps", None)
        for one in self._logging:
            if vars(one).get("_stagecast_recorder") is self._attempt.recorder:
                del vars(one)["_stagecast_recorder"]

    # ----------------------------------------------------------------------------------- on the loop's thread

    def run(self) -> None:
        """Train or test. Never raises: `ending` holds the exception."""
        attempt, control = self._attempt, self._attempt.control
        token = current_origin.set(attempt.origin)
        seeded = attempt.arguments.seed is not None
        try:
            if seeded:
                _note_seeded(attempt.origin.run_id)
            on_cuda = attempt.device.type == "cuda"
            try:
                # Python runs signal handlers only at calls and jumps, so that none runs between the end of this block
                # and the assignment in `finally`.
                control.interruptible = True
                control.raise_if_interrupted()
                # Restored at the end: under `Trainer.train` the thread is the host's.
                with torch.cuda.device(attempt.device) if on_cuda else contextlib.nullcontext():
                    try:
                        self._main()
                    except StopRequested:
                        raise
                    except Exception as error:  # the module's code may read from its own dataloader within a step
                        take_stop_of_dead_workers(self._boundary, error, checkpoint=False)
                        raise
            finally:
                control.interruptible = False
            self.ending = Ending("finished")
        except StopRequested as stop:
            self.ending = Ending("stopped", stop.reason)
        except BaseException as error:  # the loop's border: published, then raised by `Trainer.train` or `Run`
            _drop_first_frame(error)  # breaks the cycle of this frame and the exception
            self._record(self._explained(error))
        finally:
            try:
                self._finish()
                current_origin.reset(token)
            finally:  # even if a signal interrupts the above
                if seeded:
                    _forget_seeded(attempt.origin.run_id)
                _running.discard(self)
                if self.ending.error is not None:
                    release_frames(self.ending.error)
                if self._is_abandoned:
                    self.release()  # no one waits for this thread
                attempt.ring.post(self.ended.set)

    def _main(self) -> None:
        attempt, arguments, module = self._attempt, self._attempt.arguments, self._attempt.module
        if attempt.device.type == "cuda":
            attempt.readback.compute_stream = torch.cuda.current_stream(attempt.device)
        torch.get_num_threads()  # torch applies the host's setting to a new thread at this call
        attempt.recorder.bind()
        if arguments.seed is not None:
            seed_everything(arguments.seed)
        self._claim()
        if not attempt.world.shards:  # else each rank gets its part of the module when that is distributed
            self._check_module()
            module.to(attempt.device)
        if warning := attempt.batching.batch_size_warning():
            logger.warning(warning)
        restore = compile_steps(module, arguments.compile_options) if arguments.compile else None
        try:
            with contextlib.ExitStack() as around:
                self._enter_callbacks(around)
                {"train": self.task.train, "validate": self.task.validate, "test": self.task.test}[attempt.task]()
        finally:
            if restore is not None:
                restore()

    def _check_module(self) -> None:
        for name, parameter in self._attempt.module.named_parameters():
            if parameter.is_meta:
                raise ContractError(f"the parameter {name} is on the meta device; give it data with to_empty()")
            if is_split(parameter):
                raise ArgumentsError(f"the parameter {name} is divided among ranks; set strategy='fsdp'")

    def _enter_callbacks(self, around: contextlib.ExitStack) -> None:
        attempt = self._attempt
        for callback in attempt.hooks.callbacks:
            if callback.around_run is not None:
                attempt.phase = "around_run"
                try:
                    manager: Any = callback.around_run(attempt.info, attempt.module)
                    around.enter_context(manager)
                except Exception as error:  # a supervisor's border: reported, and raised unless it only disables
                    add_note(error, f"raised by {callback.name}.around_run")
                    attempt.fail_hook(callback, "around_run", error)

    def _make_checkpoints(self) -> Checkpointing:
        attempt = self._attempt
        settings = attempt.plan.settings if attempt.task == "train" else None
        if not attempt.world.is_distributed:
            return Checkpointing(attempt, settings)
        from trainer.distributed.checkpointing import checkpointing_of  # late, because a single process needs it not

        return checkpointing_of(attempt, settings)

    def _claim(self) -> None:
        """Make the module and the callbacks log to this run."""
        with _claim_lock:
            for one in self._logging:
                if one._stagecast_recorder is not None:
                    kind, does = ("module", "trained") if one is self._attempt.module else ("callback", "used")
                    name = type(one).__name__
                    raise ContractError(f"this {name} is being {does} by another run; give each run its own {kind}")
            for one in self._logging:  # neither a submodule nor in the state dict
                object.__setattr__(one, "_stagecast_recorder", self._attempt.recorder)

    def _explained(self, error: BaseException) -> BaseException:
        """Return the exception that has ended the run: with several ranks, perhaps the failure of another one."""
        agent = self._attempt.control.agent
        if agent is None:
            return error
        if self._attempt.control.stopped_by == "SIGTERM":
            agent.hurry()
        return agent.explain(error)

    def _record(self, error: BaseException) -> None:
        """Note the exception that ended the run."""
        attempt = self._attempt
        self.ending = ending = Ending(status_after(error), describe(error), error)
        if isinstance(error, PeerFailed):
            ending.reason, ending.phase, error.reported = str(error), error.phase, True
            if speaks(attempt.world.rank, error.rank):
                logger.error(f"the run failed after global_step {attempt.origin.global_step}: {error}", published=True)
        elif ending.status == "failed":
            from_elsewhere = error is attempt.control.error
            ending.phase = attempt.control.phase if from_elsewhere else attempt.phase
            ending.traceback = format_traceback(error)
            step = attempt.origin.global_step
            if not from_elsewhere:  # an observer's exception names its hook already
                add_hint(error)
                add_note(error, f"stagecast: in {attempt.phase} after global_step {step}")
            logger.error(f"the run failed after global_step {step}: {ending.reason}", published=True)

    def _finish(self) -> None:
        """Publish the ledger and the end; unless the run failed or was cancelled, run the hooks of `RunEnded`."""
        attempt, control = self._attempt, self._attempt.control
        attempt.origin.stage = None
        if not self._ending_lock.acquire(blocking=False):
            return
        if control.interruption is not None and self._is_clean:
            self._record(control.interruption)  # a second signal arrived since the last step
        attempt.world.stays = attempt.world.shards and self._is_clean
        try:
            if not self.task.started:  # it failed before the length of an epoch was known
                self.task.publish_started(None)
            settings = self._checkpoints.settings
            if settings is not None and settings.weights and self._is_clean and attempt.world.leads:
                self._keep_weights(settings.weights == "best")
            self.total = attempt.ledger.total()
            attempt.ring.publish(LedgerReported(*attempt.origin.header(), scope="run", ledger=self.total))
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
        except BaseException as error:  # of a last hook, or a cancellation during it
            self._record(self._explained(error))
            self._publish_end(self.ending)  # the last `RunEnded` counts

    @property
    def _is_clean(self) -> bool:
        return self.ending.status in ("finished", "stopped")

    def _event_of(self, ending: Ending) -> RunEnded:
        header = self._attempt.origin.header()
        return RunEnded(
            *header, status=ending.status, reason=ending.reason, traceback=ending.traceback, phase=ending.phase
        )

    def _publish_end(self, ending: Ending) -> None:
        self._attempt.ring.publish(self._event_of(ending))

    def _keep_weights(self, best: bool) -> None:
        try:
            state = dict(self._attempt.module.state_dict())
            names = [name for name, value in state.items() if isinstance(value, torch.Tensor)]
            if others := state.keys() - names:
                logger.warning(f"weights.safetensors lacks {', '.join(sorted(others))}, which is not a tensor")
            with self._attempt.averaging.applied(self._checkpoints.stager.gate):
                by_name = best or self._attempt.world.shards  # the writer reads them from a checkpoint
                self.weights = names if by_name else part_of({name: state[name] for name in names})
        except Exception as error:  # the loop's border: a finished run does not fail without this file
            text, header = describe(error), self._attempt.origin.header()
            self._attempt.ring.publish(
                CheckpointFailed(*header, checkpoint="weights.safetensors", error=text, during="stage")
            )
            logger.warning(f"the weights cannot be saved: {text}", published=True)


def status_after(error: BaseException) -> Status:
    """Return the status of a run that an exception ended."""
    cancelled = isinstance(error, (RunCancelled, KeyboardInterrupt, SystemExit))
    return "cancelled" if cancelled else "failed"


def _drop_first_frame(error: BaseException) -> None:
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next


@atexit.register
def _end_all() -> None:
    """End the loops of all runs: a thread in torch at interpreter exit aborts the process."""
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
    with _seed_lock, contextlib.suppress(ValueError):  # a signal arrived before it was added
        _seeded_runs.remove(run_id)
