"""Which hook runs for which event, on which lane; and the observer that runs a callback's hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from events.bus.backlog import Payload, Published
from events.bus.observer import Observer
from events.errors import CheckpointError
from events.messages import (
    BackwardEnded,
    CheckpointStaged,
    Event,
    RunEnded,
    TrainEpochEnded,
    TrainEpochStarted,
    TrainStepEnded,
    ValEpochEnded,
)
from events.sink import CALLBACK_DELIVERY, Delivery
from trainer.data.tensor_state import part_of
from trainer.errors import ArgumentsError, add_note
from trainer.hooks.capture import collate_steps
from trainer.hooks.recorder import MetricRecorder
from trainer.hooks.signatures import clear_error, takes_outputs
from trainer.module_interface import LANE_ATTRIBUTE, CallbackInterface, Lane, ModuleInterface
from trainer.peers import hint_for

Hook = Callable[..., Any]
_Hook = TypeVar("_Hook", bound=Hook)

EVENT_OF_HOOK: dict[str, type[Event]] = {
    "on_begin_train_epoch": TrainEpochStarted,
    "on_end_train_step": TrainStepEnded,
    "on_end_train_epoch": TrainEpochEnded,
    "on_end_backward": BackwardEnded,
    "on_end_val_epoch": ValEpochEnded,
    "on_end_train": RunEnded,
}
"""Every hook of the contract and the event it answers."""

_HOOK_OF_EVENT = {kind: name for name, kind in EVENT_OF_HOOK.items()}

_WITH_OUTPUTS = frozenset({TrainStepEnded, TrainEpochEnded, BackwardEnded, ValEpochEnded})
"""The events whose hooks get tensors."""

_COLLATED = frozenset({TrainStepEnded, TrainEpochEnded, ValEpochEnded})
"""The events whose hooks get any number of outputs."""

_NO_OUTPUTS = "__stagecast_no_outputs__"


def without_outputs(hook: _Hook) -> _Hook:
    """Mark an inline `on_end_train_step` that looks at no outputs: none are kept and collated for it."""
    setattr(hook, _NO_OUTPUTS, True)
    return hook


def _without_its_outputs(hook: Hook) -> Hook:
    """Call a hook that takes no outputs without them."""

    @without_outputs
    def call(global_step: int, *outputs: Any, **named: Any) -> None:
        hook(global_step, **named)

    return call


def overridden_hooks(callback: CallbackInterface) -> dict[str, Hook]:
    """The hooks that this callback implements, by name. The contract's own do nothing and are left out."""
    found: dict[str, Hook] = {}
    for name in EVENT_OF_HOOK:
        hook = getattr(callback, name)
        if getattr(hook, "__func__", hook) is not getattr(CallbackInterface, name):
            found[name] = hook
    return found


def hook_of(event: Event) -> str:
    """The name of the hook that answers an event; where none does, the event's own."""
    return _HOOK_OF_EVENT.get(type(event), type(event).__name__)


def lane_of(callback: CallbackInterface, name: str, hook: Hook) -> Lane:
    """The lane a hook runs on: as it is marked, else as the contract needs it."""
    marked: Lane | None = getattr(hook, LANE_ATTRIBUTE, None)
    if marked is not None:
        return marked
    if name == "on_end_backward":
        return Lane.INLINE  # it gets the undetached loss, which lives only until the next backward
    if name == "on_begin_train_epoch":
        return Lane.FENCED  # "before model forward"
    if isinstance(callback, ModuleInterface):  # it reads the module that is trained
        return Lane.INLINE if name == "on_end_train_step" else Lane.FENCED
    return Lane.OBSERVER


def wants_outputs(hook: Hook) -> bool:
    """Whether a hook looks at what the step returned."""
    return not getattr(hook, _NO_OUTPUTS, False)


class InlineHook(NamedTuple):
    """A hook on the loop's thread."""

    owner: CallbackHooks
    name: str
    call: Hook

    @property
    def wants_outputs(self) -> bool:
        """Whether it looks at what the step returned."""
        return wants_outputs(self.call)


class CallbackHooks:
    """One callback's hooks, sorted by lane.

    Raises:
        ArgumentsError: its delivery names event types, or catches up from the journal, which keeps no outputs.
    """

    def __init__(self, callback: CallbackInterface, delivery: Delivery | None) -> None:
        self.kind = self.name = type(callback).__name__
        self.delivery = delivery or CALLBACK_DELIVERY
        self.observer: Observer | None = None
        """What runs its hooks that are not inline, if it has any."""
        self.disabled = False
        """True once it has failed and was given up: no hook of it runs any more, on any lane."""
        self.failed = False
        """True once a hook of it, or its ``state_dict``, has raised on its own thread."""
        # The module's own state is `ModuleInterface.get_state`.
        kept = (getattr(callback, "state_dict", None), getattr(callback, "load_state_dict", None))
        self.stateful = all(map(callable, kept)) and not isinstance(callback, ModuleInterface)
        """Whether it has ``state_dict`` and ``load_state_dict``, for checkpoints."""
        self.state_key = self._state_key(callback)
        """What its state is found again by: told apart from all others of the run."""
        self.names_itself = getattr(callback, "state_key", None) is not None
        """Whether that is a key of its own, not the one by default."""
        self.should_stop = self._optional(callback, "should_stop")
        """Asked on the loop's thread when a validation is over, with ``global_step`` and what it has produced:
        returns a reason to stop the run, or None."""
        monitor = getattr(callback, "monitor", None)
        self.monitor = monitor if self.should_stop is not None and isinstance(monitor, str) else None
        """The metric without which ``should_stop`` is not called."""
        self.bind_optimizers = self._optional(callback, "bind_optimizers")
        """Given the run's optimizers, once, on the loop's thread before the first step."""
        self.callback = callback
        self.before_step = self._inline_hook(callback, "on_before_optimizer_step")
        self.begin_val = self._inline_hook(callback, "on_begin_val_epoch")
        self.inline: dict[type[Event], InlineHook] = {}
        self.observed: dict[type[Event], Hook] = {}
        self.fenced: set[type[Event]] = set()
        for name, hook in overridden_hooks(callback).items():
            kind = EVENT_OF_HOOK[name]
            lane = lane_of(callback, name, hook)
            if kind in _COLLATED and not takes_outputs(hook):
                hook = _without_its_outputs(hook)
            if lane is Lane.INLINE:
                self.inline[kind] = InlineHook(self, name, hook)
            else:
                self.observed[kind] = hook
                if lane is Lane.FENCED:
                    self.fenced.add(kind)
        if self.delivery.types is not None:
            raise ArgumentsError(
                f"the callback {self.name} comes with Delivery(types=...), but its hooks say what it gets: leave types"
                f" out, and hooks that it does not want"
            )
        if self.delivery.overflow == "catch_up":
            raise ArgumentsError(
                f"the callback {self.name} cannot catch up from the journal, which keeps no outputs; give it"
                f" overflow='block', which is the default and loses nothing, or 'drop_oldest'"
            )

    def _inline_hook(self, callback: CallbackInterface, name: str) -> InlineHook | None:
        """A hook beside the contract's, of a callback or of the module, which runs on the loop's thread."""
        method: Hook | None = getattr(callback, name, None)
        if not callable(method):
            return None
        if getattr(method, LANE_ATTRIBUTE, Lane.INLINE) is not Lane.INLINE:
            raise ArgumentsError(f"{self.name}.{name} runs only inline: remove its mark")
        return InlineHook(self, name, method)

    def _optional(self, callback: CallbackInterface, name: str) -> Hook | None:
        """A method that callbacks may have beside the contract's; the module's own methods are its own."""
        method: Hook | None = getattr(callback, name, None)
        if not callable(method) or isinstance(callback, ModuleInterface):
            return None
        return method

    def _state_key(self, callback: CallbackInterface) -> str:
        key = getattr(callback, "state_key", None)
        if key is None:
            return f"{self.kind}({callback._stagecast_built_with})"
        if not isinstance(key, str) or not key:
            raise ArgumentsError(f"{self.kind}.state_key is {key!r:.80}; give it a string that is not empty")
        return key

    def state_dict(self) -> Any:
        """Its state, as it keeps it."""
        return self.callback.state_dict()  # type: ignore[attr-defined]  # `stateful` has looked

    def saved_state(self) -> dict[str, Any]:
        """Its state as a checkpoint has it. Raises what its ``state_dict`` raises."""
        kind = None if self.names_itself else self.kind  # one that has a key of its own is found by nothing else
        return {"key": self.state_key, "kind": kind, "state": self.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        """Have it take over what `state_dict` returned. Raises what it raises."""
        self.callback.load_state_dict(state)  # type: ignore[attr-defined]

    @property
    def is_essential(self) -> bool:
        """Whether it must not fail or miss anything: a run without it is not the run that was asked for."""
        return self.delivery.on_error == "fatal"

    def is_given_up(self) -> bool:
        """Whether it will handle no event any more.

        Raises:
            CheckpointError: It has failed, and the run ends by that: what lacks its state is none to go on from.
        """
        if self.failed and self.is_essential:
            raise CheckpointError(f"the callback {self.name} has failed before it came to this place in the run")
        return self.disabled


class HookTable:
    """The hooks of all callbacks, as the loop looks them up.

    Args:
        callbacks: In the order in which they are called; the module itself first.
    """

    def __init__(self, callbacks: Iterable[CallbackHooks]) -> None:
        self.callbacks = list(callbacks)
        _number_names(self.callbacks)
        self.inline: dict[type[Event], list[InlineHook]] = {
            kind: [c.inline[kind] for c in self.callbacks if kind in c.inline] for kind in EVENT_OF_HOOK.values()
        }
        self.before_step = [c.before_step for c in self.callbacks if c.before_step is not None]
        """Run when the gradients of a step are complete, unscaled and clipped."""
        self.begin_val = [c.begin_val for c in self.callbacks if c.begin_val is not None]
        """Run before a dataloader is validated."""
        self.fenced: dict[type[Event], list[str]] = {}
        """Names of the observers that the loop waits for, by event; set once they are subscribed."""

    def of(self, kind: type[Event]) -> list[CallbackHooks]:
        """Callbacks with a hook for this event that are not disabled."""
        return [c for c in self.callbacks if not c.disabled and (kind in c.inline or kind in c.observed)]

    def wanting_outputs(self, kind: type[Event]) -> list[CallbackHooks]:
        """Those of them whose hook looks at outputs."""
        return [c for c in self.of(kind) if wants_outputs(c.observed.get(kind) or c.inline[kind].call)]


def check_state_keys(callbacks: Iterable[CallbackHooks]) -> None:
    """See that the states of all callbacks can be told apart in a checkpoint.

    Raises:
        ArgumentsError: two have the same key.
    """
    seen: set[str] = set()
    for callback in callbacks:
        if callback.stateful and callback.state_key in seen:
            raise ArgumentsError(
                f"two callbacks with a state have the state_key {callback.state_key!r}, so a checkpoint could mix them"
                f" up; give each a state_key of its own"
            )
        seen.add(callback.state_key)


def _number_names(callbacks: Iterable[CallbackHooks]) -> None:
    """Tell callbacks of one class apart, those too that have no observer: ``Clip``, ``Clip-2``."""
    seen: Counter[str] = Counter()
    for callback in callbacks:
        seen[callback.name] += 1
        if seen[callback.name] > 1:
            callback.name = f"{callback.name}-{seen[callback.name]}"


def add_hint(error: BaseException) -> None:
    """Note what serves instead, if a user's code has looked for a name of another trainer."""
    if (hint := hint_for(error, CallbackInterface)) is not None:
        add_note(error, f"stagecast: {hint}")


def hook_arguments(event: Event, outputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that the contract gives to the hook of an event."""
    if isinstance(event, TrainEpochStarted):
        return (event.global_step, event.epoch), {}
    if isinstance(event, BackwardEnded):  # one loss is not collated
        return (event.global_step, *(loss.reshape(()) for loss in outputs)), {}
    if isinstance(event, ValEpochEnded):
        return (event.global_step, *outputs), {"key": event.key}
    return (event.global_step, *outputs), {}


class CallbackTarget:
    """A callback as the supervisor sees it: runs its observer and fenced hooks, in order, on one thread."""

    payloads = True
    blocking = True

    def __init__(self, hooks: CallbackHooks, device: torch.device, recorder: MetricRecorder) -> None:
        self.observer = hooks.name
        """The name it is supervised under."""
        self._callback = hooks
        self._hooks = hooks.observed
        self._device = device
        self._recorder = recorder
        self._batch: Sequence[Published] = ()
        self._outputs: dict[int, tuple[Any, ...]] = {}  # of steps of the batch, by their place in it
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
        """Run the hooks of a batch. After a failure the same batch is taken up at the hook that failed."""
        if batch is not self._batch:
            self._batch, self._done = batch, 0
            self._outputs = collate_steps(batch) if len(batch) > 1 else {}
        while self._done < len(batch) and not self._callback.disabled:
            event, payload = batch[self._done]
            self._run(event, payload)
            if payload is not None and payload.fence is not None:
                payload.fence.release(self.observer)  # one that failed or is disabled is released by its supervisor
            self._done += 1
        self._batch, self._outputs = (), {}

    def _run(self, event: Event, payload: Payload | None) -> None:
        if isinstance(event, CheckpointStaged):
            self._add_state(payload)
            return
        if isinstance(event, RunEnded) and event.status not in ("finished", "stopped"):
            return  # the hook means "after training finishes"
        self._doing = hook_of(event)
        waited_for = payload is not None and payload.fence is not None and type(event) in self._callback.fenced
        self._recorder.handling(event, waited_for=waited_for)
        try:
            outputs = self._outputs.pop(self._done, None)
            if outputs is None:
                outputs = payload.outputs.collated() if payload is not None and payload.outputs is not None else ()
            args, kwargs = hook_arguments(event, outputs)
            hook = self._hooks[type(event)]
            try:
                hook(*args, **kwargs)
            except TypeError as raised:
                if (clear := clear_error(raised, self.observer, self._doing, hook, args, kwargs)) is raised:
                    raise
                raise clear from None
        except BaseException as error:
            self._callback.failed = True
            add_hint(error)
            add_note(error, f"raised by {self.observer}.{self._doing} at global_step {event.global_step}")
            raise
        finally:
            self._recorder.handling(None)

    def _add_state(self, payload: Payload | None) -> None:
        """A checkpoint is taken at this place in the run, to which the callback has come just now: add its state."""
        part = payload.outputs.part_of(self.observer) if payload is not None else None
        if part is None:
            return
        self._doing = "state_dict"
        try:
            part.set(part_of(self._callback.saved_state()))
        except BaseException as error:  # answered as a hook's would be
            self._callback.failed = True
            add_note(error, f"raised by {self.observer}.state_dict")
            raise

    def abandon(self) -> None:
        """Run no further hook, inline ones included: the rest of the batch in hand was given up."""
        self._callback.disabled = True

    def close(self) -> None:
        """Callbacks have nothing to close: `on_end_train` is their end."""
