"""Map events to hooks and hooks to lanes; run a callback's hooks as an observer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from events.bus.observer import Observer
from events.errors import CheckpointError
from events.messages import (
    BackwardEnded,
    Event,
    RunEnded,
    TrainEpochEnded,
    TrainEpochStarted,
    TrainStepEnded,
    ValEpochEnded,
)
from events.sink import CALLBACK_DELIVERY, Delivery
from trainer.callback_interface import LANE_ATTRIBUTE, CallbackInterface, Lane
from trainer.errors import ArgumentsError, add_note
from trainer.hooks.signatures import takes_outputs
from trainer.module_interface import ModuleInterface
from trainer.peers import hint_for

TaskName = Literal["train", "validate", "test"]

Hook = Callable[..., object]
_Hook = TypeVar("_Hook", bound=Hook)

EVENT_OF_HOOK: dict[str, type[Event]] = {
    "on_begin_train_epoch": TrainEpochStarted,
    "on_end_train_step": TrainStepEnded,
    "on_end_train_epoch": TrainEpochEnded,
    "on_end_backward": BackwardEnded,
    "on_end_val_epoch": ValEpochEnded,
    "on_end_train": RunEnded,
}
"""Every hook of the contract and its event."""

BEYOND_CONTRACT = ("on_before_optimizer_step", "on_begin_val_epoch", "on_end_test_epoch")
"""Optional hooks outside of the contract, which run on the loop's thread: with complete gradients, unscaled and
clipped; before a dataloader is validated; after one was tested, with the outputs."""

HOOKS_OF_TASK: dict[TaskName, frozenset[str]] = {
    "train": frozenset({*EVENT_OF_HOOK, *BEYOND_CONTRACT}) - {"on_end_test_epoch"},
    "validate": frozenset({"on_begin_val_epoch", "on_end_val_epoch"}),
    "test": frozenset({"on_end_test_epoch"}),
}
"""The hooks that are called, by task."""

_HOOK_OF_EVENT = {kind: name for name, kind in EVENT_OF_HOOK.items()}

_WITH_OUTPUTS = frozenset({TrainStepEnded, TrainEpochEnded, BackwardEnded, ValEpochEnded})
"""The events whose hooks receive tensors."""

_COLLATED = frozenset({TrainStepEnded, TrainEpochEnded, ValEpochEnded})
"""The events whose hooks receive any number of outputs."""

_NO_OUTPUTS = "__stagecast_no_outputs__"


def without_outputs(hook: _Hook) -> _Hook:
    """Mark an inline `on_end_train_step` that ignores its outputs: none are kept and collated for it."""
    setattr(hook, _NO_OUTPUTS, True)
    return hook


def _without_its_outputs(hook: Hook) -> Hook:
    """Wrap a hook that accepts no outputs."""

    @without_outputs
    def call(global_step: int, *outputs: object, **named: object) -> None:
        hook(global_step, **named)

    return call


def overridden_hooks(callback: CallbackInterface) -> dict[str, Hook]:
    """The hooks that this callback overrides, by name."""
    found: dict[str, Hook] = {}
    for name in EVENT_OF_HOOK:
        hook = getattr(callback, name)
        if getattr(hook, "__func__", hook) is not getattr(CallbackInterface, name):
            found[name] = hook
    return found


def hook_of(event: Event) -> str:
    """The name of an event's hook; the event's own name if it has none."""
    return _HOOK_OF_EVENT.get(type(event), type(event).__name__)


def lane_of(callback: CallbackInterface, name: str, hook: Hook) -> Lane:
    """The lane of a hook: its mark, or the contract's default."""
    marked: Lane | None = getattr(hook, LANE_ATTRIBUTE, None)
    if marked is not None:
        return marked
    if name == "on_end_backward":
        return Lane.INLINE  # it receives the undetached loss, which lives only until the next backward
    if name == "on_begin_train_epoch":
        return Lane.FENCED  # "before model forward"
    if isinstance(callback, ModuleInterface):  # it reads the module that is trained
        return Lane.INLINE if name == "on_end_train_step" else Lane.FENCED
    return Lane.OBSERVER


def wants_outputs(hook: Hook) -> bool:
    """Whether a hook reads the outputs of the step."""
    return not getattr(hook, _NO_OUTPUTS, False)


class InlineHook(NamedTuple):
    """A hook on the loop's thread."""

    owner: CallbackHooks
    name: str
    call: Hook

    @property
    def wants_outputs(self) -> bool:
        """Whether it reads the outputs of the step."""
        return wants_outputs(self.call)


class CallbackHooks:
    """One callback's hooks, sorted by lane.

    Args:
        hooks: Names of those that the task calls.

    Raises:
        ArgumentsError: A hook that runs only inline has another mark, or its ``state_key`` is not a string.
    """

    def __init__(
        self, callback: CallbackInterface, delivery: Delivery | None, hooks: frozenset[str] = HOOKS_OF_TASK["train"]
    ) -> None:
        self.callback = callback
        self.name = self.kind
        self.delivery = delivery or CALLBACK_DELIVERY
        self.observer: Observer | None = None
        """Runs its hooks of the other lanes, if it has any."""
        self.disabled = False
        """True once it was disabled after a failure: none of its hooks runs, on any lane."""
        self.failed = False
        """True once one of its hooks, or its ``state_dict``, has raised on its own thread."""
        # The module's own state is `ModuleInterface.get_state`.
        kept = (getattr(callback, "state_dict", None), getattr(callback, "load_state_dict", None))
        self.stateful = all(map(callable, kept)) and not isinstance(callback, ModuleInterface)
        """Whether it has ``state_dict`` and ``load_state_dict``, for checkpoints."""
        self.state_key = self._state_key(callback)
        """The key of its state in checkpoints, unique in the run."""
        self.should_stop = self._optional(callback, "should_stop")
        """Called on the loop's thread after a validation, with ``global_step`` and its metrics; returns a reason to
        stop the run, or None."""
        monitor = getattr(callback, "monitor", None)
        self.monitor = monitor if self.should_stop is not None and isinstance(monitor, str) else None
        """The metric without which ``should_stop`` is not called."""
        self.bind_optimizers = self._optional(callback, "bind_optimizers")
        """Called with the run's optimizers, once, on the loop's thread before the first step."""
        self.around_run = self._optional(callback, "around_run")
        """Called with `RunInfo` and the module on the loop's thread; returns a context manager around the run."""
        beyond = {name: self._inline_hook(callback, name) for name in BEYOND_CONTRACT}
        self.beyond = {name: hook for name, hook in beyond.items() if hook is not None and name in hooks}
        """Its hooks of `BEYOND_CONTRACT`, by name."""
        self.inline: dict[type[Event], InlineHook] = {}
        self.observed: dict[type[Event], Hook] = {}
        self.fenced: set[type[Event]] = set()
        for name, hook in overridden_hooks(callback).items():
            if name not in hooks:
                continue
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

    @property
    def has_observer_on_rank_0(self) -> bool:
        """Whether a hook of a training run is not inline, so that rank 0 has an observer for it."""
        names = overridden_hooks(self.callback).keys() & HOOKS_OF_TASK["train"]
        return any(EVENT_OF_HOOK[name] not in self.inline for name in names)

    def leave_observers(self) -> set[type[Event]]:
        """Keep the hooks for which the loop waits: those that only observe run on rank 0, unless the delivery says all.

        The ranks would otherwise write the same files, and report the same numbers.

        Returns:
            The events for which rank 0 then has a hook that takes outputs, and this rank has none.
        """
        if self.delivery.ranks == "all":
            return set()
        left = {kind: hook for kind, hook in self.observed.items() if kind not in self.fenced}
        self.observed = {kind: hook for kind, hook in self.observed.items() if kind in self.fenced}
        return {kind for kind, hook in left.items() if wants_outputs(hook)}

    @property
    def kind(self) -> str:
        """The name of the callback's class."""
        return type(self.callback).__name__

    @property
    def has_own_key(self) -> bool:
        """Whether the callback defines the key of its state itself."""
        return getattr(self.callback, "state_key", None) is not None

    def _inline_hook(self, callback: CallbackInterface, name: str) -> InlineHook | None:
        if not callable(method := getattr(callback, name, None)):
            return None
        if getattr(method, LANE_ATTRIBUTE, Lane.INLINE) is not Lane.INLINE:
            raise ArgumentsError(f"{self.name}.{name} runs only inline; remove its mark")
        if name == "on_end_test_epoch" and not takes_outputs(method):
            method = _without_its_outputs(method)
        return InlineHook(self, name, method)

    def _optional(self, callback: CallbackInterface, name: str) -> Hook | None:
        """An optional method of callbacks outside of the contract; a module's method of that name is not called."""
        method: Hook | None = getattr(callback, name, None)
        return method if callable(method) and not isinstance(callback, ModuleInterface) else None

    def _state_key(self, callback: CallbackInterface) -> str:
        key = getattr(callback, "state_key", None)
        if key is None:
            return f"{self.kind}({callback._stagecast_built_with})"
        if not isinstance(key, str) or not key:
            raise ArgumentsError(f"{self.kind}.state_key is {key!r:.80}; give it a string that is not empty")
        return key

    def state_dict(self) -> object:
        """The callback's ``state_dict()``."""
        return self.callback.state_dict()  # type: ignore[attr-defined]  # `stateful` has checked it

    def saved_state(self) -> dict[str, object]:
        """Its entry in a checkpoint. Exceptions of its ``state_dict`` propagate."""
        kind = None if self.has_own_key else self.kind  # an own key is the only way to find the state
        return {"key": self.state_key, "kind": kind, "state": self.state_dict()}

    def load_state_dict(self, state: object) -> None:
        """Restore a state that `state_dict` returned. Exceptions of the callback propagate."""
        self.callback.load_state_dict(state)  # type: ignore[attr-defined]

    @property
    def is_essential(self) -> bool:
        """Whether its failure ends the run."""
        return self.delivery.on_error == "fatal"

    def is_disabled(self) -> bool:
        """Whether it is disabled, so that a checkpoint does not need its state.

        Raises:
            CheckpointError: It is essential and has failed: a run cannot resume without its state.
        """
        if self.failed and self.is_essential:
            raise CheckpointError(f"the callback {self.name} failed before the checkpoint's step")
        return self.disabled


class HookTable:
    """The hooks of all callbacks, for the loop.

    Args:
        callbacks: In calling order, the module itself first.
    """

    def __init__(self, callbacks: Iterable[CallbackHooks]) -> None:
        self.callbacks = list(callbacks)
        _number_names(self.callbacks)
        self.inline: dict[type[Event], list[InlineHook]] = {
            kind: [c.inline[kind] for c in self.callbacks if kind in c.inline] for kind in EVENT_OF_HOOK.values()
        }
        self.beyond = {name: [c.beyond[name] for c in self.callbacks if name in c.beyond] for name in BEYOND_CONTRACT}
        """Hooks of `BEYOND_CONTRACT`, by name."""
        self.left: set[type[Event]] = set()
        """The events for which only rank 0 has a hook that takes outputs: those of this rank, too."""
        self.fenced: dict[type[Event], list[str]] = {}
        """Names of the observers that the loop waits for, by event; set once they are subscribed."""

    def of(self, kind: type[Event]) -> list[CallbackHooks]:
        """Callbacks with a hook for this event that are not disabled."""
        return [c for c in self.callbacks if not c.disabled and (kind in c.inline or kind in c.observed)]

    def wanting_outputs(self, kind: type[Event]) -> list[CallbackHooks]:
        """Those of `of` whose hook reads outputs."""
        return [c for c in self.of(kind) if wants_outputs(c.observed.get(kind) or c.inline[kind].call)]


def check_state_keys(callbacks: Iterable[CallbackHooks]) -> None:
    """Check that the states of all callbacks have different keys in a checkpoint.

    Raises:
        ArgumentsError: Two have the same key.
    """
    seen: set[str] = set()
    for callback in callbacks:
        if callback.stateful and callback.state_key in seen:
            raise ArgumentsError(
                f"two callbacks with a state have the state_key {callback.state_key!r}; give each a state_key of its"
                f" own"
            )
        seen.add(callback.state_key)


def _number_names(callbacks: Iterable[CallbackHooks]) -> None:
    """Number callbacks of one class: ``Clip``, ``Clip-2``."""
    seen: Counter[str] = Counter()
    for callback in callbacks:
        seen[callback.name] += 1
        if seen[callback.name] > 1:
            callback.name = f"{callback.name}-{seen[callback.name]}"


def add_hint(error: BaseException) -> None:
    """Add a note with the replacement if the user's code used a name of another trainer."""
    if (hint := hint_for(error, CallbackInterface)) is not None:
        add_note(error, f"stagecast: {hint}")


def hook_arguments(event: Event, outputs: Sequence[Any]) -> tuple[tuple[object, ...], dict[str, object]]:
    """The arguments of an event's hook, by the contract."""
    if isinstance(event, TrainEpochStarted):
        return (event.global_step, event.epoch), {}
    if isinstance(event, BackwardEnded):  # one loss is not collated
        return (event.global_step, *(loss.reshape(()) for loss in outputs)), {}
    if isinstance(event, ValEpochEnded):
        return (event.global_step, *outputs), {"key": event.key}
    return (event.global_step, *outputs), {}
