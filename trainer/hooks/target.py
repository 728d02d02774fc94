"""Run a callback's hooks as an observer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from events.bus.backlog import Payload, Published
from events.messages import CheckpointStaged, Event, RunEnded, TrainStepEnded
from trainer.data.tensor_state import part_of
from trainer.errors import add_note
from trainer.hooks.capture import collate_steps
from trainer.hooks.hooks import CallbackHooks, Hook, add_hint, hook_arguments, hook_of, wants_outputs
from trainer.hooks.recorder import MetricRecorder
from trainer.hooks.signatures import clear_error, requires_outputs


class CallbackTarget:
    """Runs a callback's observer and fenced hooks, in order, on one thread; the supervisor drives it."""

    payloads = True
    blocking = True

    def __init__(self, hooks: CallbackHooks, device: torch.device, recorder: MetricRecorder) -> None:
        self.observer = hooks.name
        """Its name in events and messages."""
        self._callback = hooks
        self._hooks = hooks.observed
        self._step_hook: Hook = hooks.observed.get(TrainStepEnded, lambda *_: None)
        self._wants_outputs = wants_outputs(self._step_hook)
        self._device = device
        self._recorder = recorder
        self._batch: Sequence[Published] = ()
        self._outputs: dict[int, tuple[torch.Tensor, ...]] = {}  # collated outputs by the index in the batch
        self._done = 0
        self._doing = "open"

    @property
    def progress(self) -> tuple[str, int | None]:
        return self._doing, self._done

    def open(self) -> None:
        """Make the run's device current on the callback's thread."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def deliver(self, batch: Sequence[Published], /) -> None:
        """Run the hooks of a batch. A retry of the same batch resumes at the hook that failed."""
        if batch is not self._batch:
            self._batch, self._done = batch, 0
            self._outputs = collate_steps(batch) if len(batch) > 1 and self._wants_outputs else {}
        while True:
            self._run_steps(batch)
            if self._done == len(batch) or self._callback.disabled:
                break
            event, payload = batch[self._done]
            self._run(event, payload)
            if payload is not None and payload.fence is not None:
                payload.fence.release(self.observer)  # after a failure the supervisor releases it
            self._done += 1
        self._batch, self._outputs = (), {}

    def _run_steps(self, batch: Sequence[Published]) -> None:
        """Run the hooks of the steps that come next, as long as their outputs are ready and the loop does not wait.

        It does little for each, because this thread competes with the loop for the interpreter lock.
        """
        hook, ready, callback, handling = self._step_hook, self._outputs, self._callback, self._recorder.handling
        wants_outputs = self._wants_outputs
        event: Event | None = None
        outputs: tuple[Any, ...] = ()
        try:
            while self._done < len(batch) and not callback.disabled:
                following, payload = batch[self._done]
                if type(following) is not TrainStepEnded:
                    break
                if payload is not None and payload.fence is not None:
                    break
                outputs = ()
                if payload is not None and wants_outputs:
                    if self._done not in ready:
                        break
                    outputs = ready.pop(self._done)
                event = following
                self._doing = "on_end_train_step"
                handling(event)
                hook(event.global_step, *outputs)
                self._done += 1
        except BaseException as raised:
            assert event is not None
            self._raise(raised, event, hook, (event.global_step, *outputs), {})
        finally:
            if event is not None:
                handling(None)

    def _run(self, event: Event, payload: Payload | None) -> None:
        if isinstance(event, CheckpointStaged):
            self._add_state(payload)
            return
        if isinstance(event, RunEnded) and event.status not in ("finished", "stopped"):
            return  # the hook runs only after training finishes
        self._doing = hook_of(event)
        fenced = payload is not None and payload.fence is not None and type(event) in self._callback.fenced
        hook = self._hooks[type(event)]
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        self._recorder.handling(event, fenced=fenced)
        try:
            outputs = self._outputs.pop(self._done, None)
            if outputs is None and payload is not None and payload.outputs is not None:
                outputs = payload.outputs.collated()
                if not outputs and type(event) is TrainStepEnded and requires_outputs(hook):
                    return  # `train_step` has returned None on this rank, and not on another
            args, kwargs = hook_arguments(event, outputs or ())
            hook(*args, **kwargs)
        except BaseException as raised:
            self._raise(raised, event, hook, args, kwargs)
        finally:
            self._recorder.handling(None)

    def _raise(
        self, raised: BaseException, event: Event, hook: Hook, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> NoReturn:
        """Raise what a hook has raised, clearly and with a note where it happened."""
        error = raised
        if type(raised) is TypeError:
            error = clear_error(raised, self.observer, self._doing, hook, args, kwargs)
        self._callback.failed = True
        add_hint(error)
        add_note(error, f"raised by {self.observer}.{self._doing} at global_step {event.global_step}")
        if error is raised:
            raise raised
        raise error from None

    def _add_state(self, payload: Payload | None) -> None:
        """Contribute the callback's state to a checkpoint, once it has processed every event before the snapshot."""
        part = payload.outputs.part_of(self.observer) if payload is not None else None
        if part is None:
            return
        self._doing = "state_dict"
        try:
            part.set(part_of(self._callback.saved_state()))
        except BaseException as error:  # handled like a hook's
            self._callback.failed = True
            add_note(error, f"raised by {self.observer}.state_dict")
            raise

    def abandon(self) -> None:
        """Disable all hooks, including inline ones; the rest of the current batch is skipped."""
        self._callback.disabled = True

    def close(self) -> None:
        """Do nothing: `on_end_train` is a callback's last call."""
