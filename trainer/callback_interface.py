# ruff: noqa: B024, B027 - hooks are deliberately plain no-ops: an implementation overrides the ones it needs.
"""The hooks of the contract, and the lane that each runs on. `trainer.module_interface` has the table."""

from __future__ import annotations

import contextlib
import enum
import inspect
import itertools
import numbers
from abc import ABC
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

import torch

from trainer.audio import Audio
from trainer.data.tensors import parts_of
from trainer.hooks.metric_objects import MetricObject, is_metric
from trainer.media import Histogram, Image, Logged, as_logged
from trainer.peers import CALLS
from trainer.tables import Table

HOOKS: tuple[str, ...] = (
    "on_begin_train_epoch",
    "on_end_train_step",
    "on_end_train_epoch",
    "on_end_backward",
    "on_end_val_epoch",
    "on_end_train",
)
"""The names of all hooks, in the contract's order."""

LANE_ATTRIBUTE = "__stagecast_lane__"
"""The attribute of a hook's function that holds its mark, a `Lane`."""

OF_A_RUN = ("_stagecast_recorder", "_stagecast_manual")
"""Attributes that a run sets and removes: plain ones, so that no state dict contains them."""

Reduction = Literal["mean", "last", "max", "sum"]
"""What the values of one name become in a step with several micro-batches, or in an evaluation of a dataloader."""

_Hook = TypeVar("_Hook", bound=Callable[..., Any])


class Lane(enum.Enum):
    """The place where a hook runs; see the table at the top of this module."""

    INLINE = "inline"
    FENCED = "fenced"
    OBSERVER = "observer"


def inline(hook: _Hook) -> _Hook:
    """Run this hook on the loop's thread, at its exact place, on live state. The loop waits for it."""
    return _mark(hook, Lane.INLINE)


def fenced(hook: _Hook) -> _Hook:
    """Run this hook on the callback's thread while the loop waits for it at the boundary."""
    return _mark(hook, Lane.FENCED)


def observer(hook: _Hook) -> _Hook:
    """Run this hook on the callback's thread while the loop continues; it receives copies."""
    return _mark(hook, Lane.OBSERVER)


def _mark(hook: _Hook, lane: Lane) -> _Hook:
    try:
        setattr(hook, LANE_ATTRIBUTE, lane)
    except AttributeError:
        raise TypeError(
            f"@{lane.value} cannot mark {hook!r}; put it on the function, where the hook is defined"
        ) from None
    return hook


class Recorder(Protocol):
    """Receives the values of `CallbackInterface.log`; the trainer attaches one for the length of a run."""

    def log(self, name: str, value: float | torch.Tensor | Logged, reduce: Reduction, /) -> None:
        """Record one value without waiting for the device; called from any thread.

        A tensor has one real element on any device, perhaps with a graph. The caller may change it in place as soon
        as this returns, so detach and copy it here.
        """
        ...

    def log_metric(self, name: str | None, metric: MetricObject, owner: object, /) -> None:
        """Record the value of a metric object when the epoch or the evaluation ends. None: under its own names."""
        ...


class CallbackInterface(ABC):
    """Hooks that observe a training run. Override the ones you need; a hook without an override costs nothing.

    Collated outputs are positional, one value per output of the step: tensors ``(B, ...)`` are concatenated
    along dimension 0 to ``(sum of B, ...)``, scalars ``()`` stack to ``(calls,)``, and tensors of other shapes, like
    all other values, become a list with one entry per call.

    A callback that has ``state_dict()`` and ``load_state_dict(state)`` is part of checkpoints. Its key there is its
    attribute ``state_key`` or, by default, its class and constructor arguments, such as
    ``EMA(module=Net, decay=0.99)``. ``state_dict`` is called on the thread of its hooks, after every hook that precedes
    the checkpoint; it returns plain values and tensors. ``load_state_dict`` is called before the first hook of a
    resumed run.

    A callback may have more methods, which are called on the loop's thread.
    ``should_stop(global_step, metrics)`` is called after each validation (or epoch, in a run that does not validate)
    with its metrics; a returned reason stops the run as `Run.stop` does, before the next step. If the callback has an
    attribute ``monitor``, the name of a metric, it is called only when that metric exists; otherwise `MonitorMissing`
    is published, and `MetricNotFound` raised at the first validation. ``bind_optimizers(optimizers)`` is called once,
    before the first step. ``around_run(run, module)``, with a `RunInfo`, returns a context manager, which is entered on
    the loop's thread before anything is read or trained and left after the last step, however the run ends.

    A callback or the module may have three more hooks, which run inline on the loop's thread:
    ``on_begin_val_epoch(global_step, key)`` before each dataloader of a validation, in eval mode;
    ``on_end_test_epoch(global_step, *outputs, key)`` after each dataloader of `Trainer.test`; and
    ``on_before_optimizer_step(global_step)`` when the gradients of a step are complete, unscaled (float16) and clipped;
    it may change them. It does not run for a skipped step.
    """

    _stagecast_recorder: Recorder | None = None  # of the run; a plain attribute, so that no state dict contains it
    _records_arguments: ClassVar[bool] = True
    _stagecast_built_with: str = ""  # the arguments of the constructor, for the default `state_key`

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Record the constructor's arguments."""
        new = super().__new__
        self = new(cls) if new is object.__new__ else new(cls, *args, **kwargs)
        if (args or kwargs) and cls._records_arguments:  # copying passes no arguments
            with contextlib.suppress(AttributeError):  # a class with __slots__
                object.__setattr__(self, "_stagecast_built_with", _shown_arguments(cls, args, kwargs))
        return self

    def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        """Run before a training epoch; returns before its first forward. Fenced, unless marked inline.

        Args:
            global_step: Optimizer steps finished so far; 0 in a new run's first epoch.
            epoch: The epoch's number, from 0.
        """

    def on_end_train_step(self, global_step: int, *train_step_collated_outputs: Any) -> None:
        """Run after an optimizer step and its schedulers. Inline for the module itself, else observer lane.

        The module's own hook receives the outputs detached, on their device and not copied: clone a tensor that a
        later step overwrites. Reading a number from them waits for the device, unless the hook is marked `observer`.

        Args:
            global_step: Optimizer steps finished, including this one; from 1.
            *train_step_collated_outputs: The outputs of `train_step`, collated over the micro-batches of this step.
                For ``loss, logits`` they are ``(micro-batches,)`` losses and ``(rows of the step, C)`` logits.
        """

    def on_end_train_epoch(self, global_step: int, *train_step_collated_outputs: Any) -> None:
        """Run after a training epoch and its validation. Observer lane; fenced for the module itself.

        Overriding it makes the trainer keep the outputs of the whole epoch in host memory, up to
        ``TrainerArguments.epoch_outputs_limit_bytes``; `EpochOutputsTooLarge` beyond that is this hook's failure.

        Args:
            global_step: Optimizer steps finished.
            *train_step_collated_outputs: The outputs of `train_step`, collated over all micro-batches of the epoch.
        """

    def on_end_backward(self, global_step: int, loss_tensor: torch.Tensor) -> None:
        """Run after the backward pass of one micro-batch. Inline, unless marked: it sees the live gradients.

        They include those of earlier micro-batches of the same step, weighted by rows. Under float16 they are
        multiplied by the scale of the gradient scaler; ``on_before_optimizer_step`` sees them unscaled.

        Args:
            global_step: Optimizer steps finished, without the current one.
            loss_tensor: The loss as `train_step` returned it: not detached, not scaled. Keeping it keeps its graph.
        """

    def on_end_val_epoch(self, global_step: int, *val_step_collated_outputs: Any, key: str = "default") -> None:
        """Run after the validation over one dataloader. Observer lane; fenced for the module itself.

        Runs once for each dataloader, in their order. Overriding it makes the trainer keep the outputs of
        that dataloader in host memory, up to ``TrainerArguments.epoch_outputs_limit_bytes``.

        Args:
            global_step: Optimizer steps finished.
            *val_step_collated_outputs: The outputs of `val_step`, collated over all batches of this dataloader.
            key: The dataloader's key in `get_val_dataloaders`; ``"default"`` for a single dataloader.
        """

    def on_end_train(self, global_step: int) -> None:
        """Run after training has ended or was stopped: the last hook. Observer lane; fenced for the module itself.

        Args:
            global_step: Optimizer steps finished.
        """

    def log(
        self,
        name: str,
        value: float | int | torch.Tensor | Histogram | Image | Audio | Table | str | Any,
        *,
        reduce: Reduction = "mean",
    ) -> None:
        """Record a number under a name, for a `MetricsLogged` event; or a histogram, image, figure, sound, table, text.

        Does nothing outside of a run. Call it from a step or a hook, on any thread. It waits neither for the device
        nor for an observer: a tensor is read later, with the value that it has now. Under `torch.compile` it runs
        outside of the compiled graph. With several ranks, a number of `train_step` is of rank 0's part of the batch.

        A metric object has ``update``, ``compute`` and ``reset``, as those of torchmetrics have. Update it in the step
        and log it there: ``compute`` runs on the loop's thread, where it may wait for the device, after the last batch
        of the dataloader in validation and testing, and of the epoch in training; ``reset`` runs after the hooks of
        that end. In a hook at the end of an epoch it is computed at once. The states of the torchmetrics objects that
        are attributes of the module are part of checkpoints, logged or not. Use one object for training and another for
        validation. For the value of a step, log the number that ``self.acc(predicted, target)`` returns.

        Args:
            name: Not empty, and not the name of a built-in metric, such as ``train_loss`` or ``lr``. Each name is one
                series: use different names in training and validation.
            value: A number (also NumPy's) or a real tensor of one element, of any shape, on any device. A
                `Histogram`, `Image`, `Audio` or `Table` of `trainer`, or a pandas DataFrame; a matplotlib figure, which
                is drawn at once, on the calling thread (so prefer a hook of the observer lane to a step); or a text.
                All but histograms and short texts become files, on a thread of their own. Or a metric object.
            reduce: How the numbers of a name become one, if it is logged several times in an evaluation of a
                dataloader, or by the micro-batches of a step: the mean, weighted as the loss is; the last; the
                largest; or the sum. Each name has one. Batches of weight 0 do not count. A hook off the loop's thread
                publishes each number.

        Raises:
            TypeError: ``name`` is not a string, or ``value`` is not a real number.
            ValueError: ``name`` is empty or reserved, the tensor does not have exactly one element, or ``reduce`` is
                another one than before.
        """
        recorder = self._stagecast_recorder
        if recorder is None:
            return
        # The common cases first: this runs in the step.
        if type(name) is not str or not name:
            name = _checked_name(name)
        if type(value) is not float:
            if isinstance(value, torch.Tensor):
                if value.numel() != 1 or value.dtype.is_complex or value.layout is not torch.strided:
                    raise _bad_tensor(name, value)
            elif is_metric(value):
                if reduce != "mean":
                    raise ValueError(
                        f"log({name!r}) got reduce={reduce!r} for a {type(value).__name__}, which combines the batches"
                        f" itself; leave reduce out"
                    )
                recorder.log_metric(name, value, self)
                return
            else:
                value = _as_value(name, value, reduce)
        if reduce != "mean" and reduce not in get_args(Reduction):
            raise ValueError(f"log({name!r}) got reduce={reduce!r}; it must be one of {', '.join(get_args(Reduction))}")
        recorder.log(name, value, reduce)

    def log_dict(self, values: Mapping[str, Any] | MetricObject, *, reduce: Reduction = "mean") -> None:
        """Call `log` for each name and value; raises as it does.

        Args:
            values: Values by name; or a metric object whose ``compute`` returns them, such as a
                `torchmetrics.MetricCollection`.
        """
        if is_metric(values):
            if self._stagecast_recorder is not None:
                self._stagecast_recorder.log_metric(None, values, self)
            return
        if not isinstance(values, Mapping):
            raise TypeError(f"log_dict() takes a dict of names and values, not {values!r:.80}")
        named: Mapping[str, Any] = values
        for name, value in named.items():
            self.log(name, value, reduce=reduce)

    def __getstate__(self) -> Any:
        """Copies and pickles belong to no run: they carry no recorder."""
        state: Any = super().__getstate__()
        values, slots = state if isinstance(state, tuple) else (state, None)
        values = {name: value for name, value in (values or {}).items() if name not in OF_A_RUN}
        return values if slots is None else (values, slots)


class _Refusal:
    """A method that only other trainers have: calling it raises an error that names the replacement."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise AttributeError(f"stagecast has no {self._name}(); {CALLS[self._name]}")


for _name in CALLS:
    setattr(CallbackInterface, _name, _Refusal(_name))


def _as_value(name: str, value: Any, reduce: object) -> float | Logged:
    """Return anything but floats, tensors and metric objects as `log` records it."""
    logged = as_logged(value)
    if logged is not None and reduce != "mean":
        raise ValueError(f"log({name!r}) got reduce={reduce!r} for something that is not a number; leave reduce out")
    return logged or _as_float(name, value)


def _shown_arguments(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Format arguments by name; an object that is not a plain value appears as its class."""
    try:
        bound = inspect.signature(kind.__init__).bind(None, *args, **kwargs)  # type: ignore[misc]  # of this very class
    except (TypeError, ValueError):  # wrong ones, which the constructor will refuse; or written in C
        return _shown_argument([*args, kwargs])
    return ", ".join(f"{name}={_shown_argument(value)}" for name, value in list(bound.arguments.items())[1:])


_PLAIN = (bool, numbers.Number, str, bytes, enum.Enum, PurePath, torch.dtype, torch.device)


def _shown_argument(value: Any, depth: int = 4) -> str:
    try:
        return _shown(value, depth)
    except Exception:  # attributes or repr of a user's object must not fail the callback's construction
        return type(value).__name__


def _shown(value: Any, depth: int) -> str:
    if isinstance(value, str | bytes):
        return repr(value[:200])
    if value is None or isinstance(value, _PLAIN):
        return f"{value!r:.200}"
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    shown = "" if isinstance(value, list | tuple | set | frozenset | dict) else type(value).__name__
    if isinstance(value, set | frozenset):  # sorted, because the order of a set differs between processes
        parts = sorted(_shown_argument(one, depth - 1) for one in itertools.islice(value, 1_000)) if depth else ["..."]
        return f"{{{', '.join(parts[:20])}}}"
    if isinstance(value, list | tuple):
        # A list may hold itself.
        parts = [_shown_argument(one, depth - 1) for one in value[:20]] if depth else ["..."]
        return f"[{', '.join(parts)}]"
    named = parts_of(value)
    if named is None:
        return shown
    parts = sorted(f"{key!r:.40}: {_shown_argument(one, depth - 1)}" for key, one in named[:20]) if depth else ["..."]
    return f"{shown}{{{', '.join(parts)}}}"


def _checked_name(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"log() takes a string as the name of a metric, not {name!r}")
    if not name:
        raise ValueError("log() got an empty name; give the metric a name, such as 'accuracy'")
    return str(name)


def _bad_tensor(name: str, value: torch.Tensor) -> Exception:
    if value.numel() != 1:
        return ValueError(
            f"log({name!r}) got a tensor of shape {tuple(value.shape)}, which does not have one element; "
            "reduce it first, for example with .mean()"
        )
    if value.dtype.is_complex:
        return TypeError(f"log({name!r}) got a tensor of {value.dtype}; log its .abs(), .real or .imag")
    return TypeError(f"log({name!r}) got a tensor with the layout {value.layout}; log its .to_dense()")


def _as_float(name: str, value: object) -> float:
    # NumPy's complex numbers have a __float__ that drops the imaginary part. Plain numbers skip the check against the
    # abstract class, which takes a microsecond.
    plain = isinstance(value, (int, float))
    is_complex = not plain and isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    if is_complex or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise TypeError(f"log({name!r}) takes a number or a tensor of one element, not {value!r}")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"log({name!r}) cannot turn {value!r} into one number: {error}") from error


def checked_number(name: str, value: Any) -> float | torch.Tensor:
    """Return a number of any kind as one that `log` records. Raises as it does."""
    if not isinstance(value, torch.Tensor):
        return _as_float(name, value)
    if value.numel() != 1 or value.dtype.is_complex or value.layout is not torch.strided:
        raise _bad_tensor(name, value)
    return value
