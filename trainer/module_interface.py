# ruff: noqa: B024, B027 - hooks are deliberately plain no-ops: an implementation overrides the ones it needs.
"""The contract between a user's module and the trainer.

A user implements `ModuleInterface`: the model, its optimizers, its dataloaders and the recipe of a step.
The trainer owns the loop and calls these methods; this module does not depend on the trainer.

**Global step.** ``global_step`` counts finished optimizer steps. `ModuleInterface.train_step` receives the step
that it works towards (finished + 1, the same for all micro-batches of that step); every hook, `val_step` and
`test_step` receive the number of finished steps. So the first ``train_step`` receives 1, and so does the hook
after it. A step that is skipped because its loss or gradients were not finite is not counted.

**Lane and thread of each hook.** `trainer/README.md` has the same table.

| hook | owner | lane | thread | receives |
|---|---|---|---|---|
| `on_begin_train_epoch` | module, callback | fenced | its own; the loop waits | the epoch; the module at rest |
| `on_end_backward` | module, callback | inline | the loop's | the live loss and gradients (scaled under float16) |
| `on_end_train_step` | module | inline | the loop's | the step's outputs, detached, on their device |
| `on_end_train_step` | callback | observer | its own | detached host copies of the step's outputs |
| `on_end_val_epoch` | module | fenced | its own; the loop waits | detached host copies; the module at rest |
| `on_end_val_epoch` | callback | observer | its own | detached host copies |
| `on_end_train_epoch` | module | fenced | its own; the loop waits | detached host copies; the module at rest |
| `on_end_train_epoch` | callback | observer | its own | detached host copies |
| `on_end_train` | module | fenced | its own; the loop waits | the module at rest |
| `on_end_train` | callback | observer | its own | the step |

`inline`, `fenced` and `observer` choose another lane for a hook. A hook of the observer lane that reads the module or
an optimizer sees them some steps later: mark it `inline`. It must not use global random generators either, because it
would change the loop's numbers. Outputs are only kept for hooks that accept them. An exception in a hook ends the run
with that exception, unless the callback was added with another error policy; no hook of a disabled callback runs, on
any lane.

Under ``precision="float16"`` the gradients that `on_end_backward` sees are multiplied by the scale of the gradient
scaler.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import itertools
import numbers
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from trainer.data.rows import count_rows
from trainer.data.tensors import parts_of
from trainer.errors import ContractError
from trainer.media import Histogram, Image, Logged, as_logged
from trainer.peers import CALLS
from trainer.unheard import in_words, unheard_methods

if TYPE_CHECKING:
    from trainer.loop.manual import ManualSteps

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

_OF_A_RUN = ("_stagecast_recorder", "_stagecast_manual")
"""Attributes that a run sets and removes: plain ones, so that no state dict contains them."""

_Hook = TypeVar("_Hook", bound=Callable[..., Any])


class Stage(enum.Enum):
    """The stage that a step belongs to."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


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

    def log(self, name: str, value: float | torch.Tensor | Logged, /) -> None:
        """Record one value without waiting for the device; called from any thread.

        A tensor has one real element on any device, perhaps with a graph. The caller may change it in place as soon
        as this returns, so detach and copy it here.
        """
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

    A callback may have two more methods, which are called on the loop's thread.
    ``should_stop(global_step, metrics)`` is called after each validation (or epoch, in a run that does not validate)
    with its metrics; a returned reason stops the run as `Run.stop` does, before the next step. If the callback has an
    attribute ``monitor``, the name of a metric, it is called only when that metric exists; otherwise `MonitorMissing`
    is published, and `MetricNotFound` raised at the first validation. ``bind_optimizers(optimizers)`` is called once,
    before the first step.

    A callback or the module may have two more hooks, which run inline on the loop's thread:
    ``on_begin_val_epoch(global_step, key)`` before each dataloader of a validation, in eval mode, and
    ``on_before_optimizer_step(global_step)`` when the gradients of a step are complete, unscaled (float16) and clipped;
    it may change them. It does not run for a skipped step.
    """

    _stagecast_recorder: Recorder | None = None  # of the run; a plain attribute, so that no state dict contains it
    _stagecast_built_with: str = ""  # the arguments of the constructor, for the default `state_key`

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Record the constructor's arguments."""
        new = super().__new__
        self = new(cls) if new is object.__new__ else new(cls, *args, **kwargs)
        if (args or kwargs) and not issubclass(cls, ModuleInterface):  # copying passes no arguments
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

    def log(self, name: str, value: float | int | torch.Tensor | Histogram | Image | str | Any) -> None:
        """Record a number under a name, for a `MetricsLogged` event; or a histogram, an image, a figure or a text.

        Does nothing outside of a run. Call it from a step or a hook, on any thread. It waits neither for the device
        nor for an observer: a tensor is read later, with the value that it has now. Under `torch.compile` it runs
        outside of the compiled graph.

        Args:
            name: Not empty, and not the name of a built-in metric, such as ``train_loss`` or ``lr``. Each name is one
                series: use different names in training and validation.
            value: A number (also NumPy's) or a real tensor of one element, of any shape, on any device. A
                `trainer.Histogram` or `trainer.Image`; a matplotlib figure, which is drawn at once, on the calling
                thread (so prefer a hook of the observer lane to a step); or a text. Images, figures and long texts
                are written to files in the run folder, on a thread of their own.

        Raises:
            TypeError: ``name`` is not a string, or ``value`` is not a real number.
            ValueError: ``name`` is empty or reserved, or the tensor does not have exactly one element.
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
            else:
                value = as_logged(value) or _as_float(name, value)
        recorder.log(name, value)

    def __getstate__(self) -> Any:
        """Copies and pickles belong to no run: they carry no recorder."""
        state: Any = super().__getstate__()
        values, slots = state if isinstance(state, tuple) else (state, None)
        values = {name: value for name, value in (values or {}).items() if name not in _OF_A_RUN}
        return values if slots is None else (values, slots)


class ModuleInterface(torch.nn.Module, CallbackInterface):
    """A model together with its optimizers, its data, the recipe of a step, and hooks of its own.

    All methods but the hooks run on the loop's thread. `forward` is reserved: it dispatches on the stage. Put the
    network's own forward into a submodule, or into a method of another name.
    """

    if not TYPE_CHECKING:  # a type checker must see `__init__` alone

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            """Raise TypeError for missing methods; it names replacements for methods of other trainers."""
            if cls.__abstractmethods__:
                lacks = f"{cls.__name__} lacks {', '.join(sorted(cls.__abstractmethods__))}"
                found = unheard_methods(cls, contract_names(ModuleInterface))
                raise TypeError(f"{lacks}; {in_words(found) or 'define them as ModuleInterface describes'}")
            new = super().__new__
            return new(cls) if new is object.__new__ else new(cls, *args, **kwargs)

    manual_optimization: bool = False
    """Whether `train_step` applies its losses itself, with `optimize`."""

    _stagecast_manual: ManualSteps | None = None  # of the run

    def optimize(
        self,
        loss: torch.Tensor | None,
        optimizer: int | torch.optim.Optimizer = 0,
        *,
        closure: Callable[[], torch.Tensor] | None = None,
        retain_graph: bool = False,
    ) -> bool:
        """Apply a loss to the parameters of one optimizer; call it within `train_step`, any number of times::

            class Gan(ModuleInterface):
                manual_optimization = True

                def train_step(self, global_step, batch, device):
                    loss = self.critic_loss(batch)
                    self.optimize(loss, 0)
                    if global_step % 5 == 0:
                        self.optimize(self.generator_loss(batch), 1)
                    return loss.detach()

        It runs the backward pass (scaled with float16) and its hooks, clips and checks the gradients of the optimizer's
        parameters by `TrainerArguments`, steps the optimizer, and clears **all** gradients: those of other networks are
        not applied. Gradients of an earlier ``loss.backward()`` are applied, too.

        With ``manual_optimization`` each call of `train_step` is one ``global_step``. Schedulers step after it, unless
        every update of the call was skipped. A batch is not split into micro-batches. The first output of `train_step`
        is the loss for display, and needs no graph. Stepping an optimizer directly works, too, but without clipping
        and checks. Gradients that are kept from one `train_step` to the next are not part of checkpoints.

        Args:
            loss: A real tensor of one element with a graph; None with a closure.
            optimizer: Its index in `get_optimizers_schedulers`, or the optimizer itself.
            closure: Computes the loss, for optimizers that evaluate it several times per step (not with float16).
            retain_graph: Keep the graph for a later loss.

        Returns:
            Whether the optimizer has stepped: False if the step was skipped for a loss or gradient that is not finite.

        Raises:
            ContractError: There is no loss, no such optimizer, or no ``manual_optimization``.
            NonFiniteError: ``non_finite="stop"``, or too many steps in a row were skipped.
        """
        if self._stagecast_manual is None:
            raise ContractError(
                f"optimize() works within train_step of a run with manual_optimization; set manual_optimization = True"
                f" in {type(self).__name__}"
            )
        return self._stagecast_manual.optimize(loss, optimizer, closure, retain_graph)

    _total_steps: int | None = None  # of the run, as `_recorder`

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None outside of a run, and without a limit for data of unknown length.

        Set from `get_optimizers_schedulers` until the run ends. A run that stops early takes fewer.
        """
        return self._total_steps

    @abstractmethod
    def get_optimizers_schedulers(
        self, estimated_global_steps_per_epoch: int, epochs: int
    ) -> tuple[Iterable[torch.optim.Optimizer], Iterable[Any]]:
        """Build the optimizers and schedulers. Called once per run, with the model on its device.

        Args:
            estimated_global_steps_per_epoch: Optimizer steps of an epoch, from the training dataloader's length and the
                limits; 0 if unknown. If ``max_steps`` ends the run within an epoch, it is the average over the epochs,
                rounded up.
            epochs: Epochs that the run will train, the last of them perhaps in part. The product of both is the
                length of the run (up to the rounding), so a schedule of that length ends with the run; `total_steps`
                is exact. With ``reset_optimizers_schedulers`` both count the rest of the run.

        Returns:
            The optimizers, at least one, and the schedulers, any number. All optimizers step together; all
            schedulers step after each step or each epoch (``TrainerArguments.scheduler_interval``). A
            `trainer.Schedule` around a scheduler gives it an interval or a metric of its own.

            Optimizers with ``eval()`` and ``train()`` (schedule-free ones) are switched to evaluation for
            validations, checkpoints and the end of the run, and to training otherwise.

            If the ``step`` of one of them needs a closure (L-BFGS, SAM), each is stepped with a closure, in their
            order. Each evaluation runs the forward and backward passes of the whole step on the same micro-batches,
            with new random numbers (dropout); the hooks of the backward pass run in each, and the step's loss, outputs
            and logged values are those of the first. float16 is refused.
        """

    @abstractmethod
    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Iterable[Any]:
        """Build the dataloader of one training epoch. Called every epoch.

        Args:
            sampler: A `torch.utils.data.Sampler` class; instantiate it with the data set. It shuffles by the run's
                seed and the epoch; data with an order of its own may ignore it.
            batch_size: Rows of a micro-batch on one device.

        Returns:
            A `torch.utils.data.DataLoader`, or any other iterable of batches.

        Example::

            dataset = self.train_dataset
            return DataLoader(dataset, batch_size=batch_size, sampler=sampler(dataset))
        """

    @abstractmethod
    def get_val_dataloaders(
        self, sampler: type[Any], batch_size: int
    ) -> Mapping[str, Iterable[Any]] | Iterable[Any] | None:
        """Build the dataloader(s) of one validation. Called for every validation.

        Args:
            sampler: A `torch.utils.data.Sampler` class that keeps the order; instantiate it with the data set.
            batch_size: Rows of a validation batch on one device.

        Returns:
            One dataloader, with the key ``"default"``; a dictionary of them, by key; or None or an empty dictionary
            for no validation. `on_end_val_epoch` receives the key.
        """

    def get_test_dataloaders(
        self, sampler: type[Any], batch_size: int
    ) -> Mapping[str, Iterable[Any]] | Iterable[Any] | None:
        """Build the dataloader(s) of the test stage as `get_val_dataloaders` does; by default none."""
        return None

    def forward(self, stage: Stage, global_step: int, batch: Any, device: torch.device | str | int) -> Any:
        """Run the step of a stage and return its outputs; the other arguments are those of the step.

        Raises:
            AttributeError: ``stage`` is not a `Stage`.
        """
        if stage is Stage.TRAIN:
            return self.train_step(global_step, batch, device)
        if stage is Stage.VAL:
            return self.val_step(global_step, batch, device)
        if stage is Stage.TEST:
            return self.test_step(global_step, batch, device)
        allowed = ", ".join(str(one) for one in Stage)  # type: ignore[unreachable]  # callers may be untyped
        raise AttributeError(f"{type(self).__name__}.forward() got the stage {stage!r}; it must be one of {allowed}")

    @abstractmethod
    def train_step(
        self, global_step: int, batch: Any, device: torch.device | str | int
    ) -> torch.Tensor | tuple[Any, ...]:
        """Compute the loss of one micro-batch. Gradients are enabled; the module is in train mode.

        Args:
            global_step: The optimizer step that this micro-batch works towards: finished + 1, from 1.
            batch: A batch of the training dataloader, on the host; move it to the device (`trainer.to_device`).
            device: The model's device.

        Returns:
            The loss: a tensor of one element with a graph, the mean over the micro-batch; or a tuple that
            begins with it. Further outputs should be tensors; overridden hooks receive them collated.
        """

    @abstractmethod
    def val_step(
        self, global_step: int, batch: Any, device: torch.device | str | int
    ) -> torch.Tensor | tuple[Any, ...]:
        """Compute the outputs of one validation batch. Under `torch.no_grad`; the module is in eval mode.

        Args:
            global_step: Optimizer steps finished.
            batch: A batch of the validation dataloader, on the host.
            device: The model's device.

        Returns:
            A tensor or a tuple of tensors to collect: loss, logits, and so on; or None. If the first one is a
            floating-point number, or a vector ``(rows,)`` of them, its mean over all rows (or by `batch_weight`) is
            the metric ``val_loss``. Batches that return None do not count in it.
        """

    def test_step(
        self, global_step: int, batch: Any, device: torch.device | str | int
    ) -> torch.Tensor | tuple[Any, ...]:
        """Compute the outputs of one test batch, as `val_step` does; by default with `val_step`."""
        return self.val_step(global_step, batch, device)

    def batch_weight(self, batch: Any) -> float:
        """Return a batch's weight in an accumulated step, in ``train_epoch_loss``, ``val_loss`` and logged means.

        Override it if a step's loss is not a mean over rows: return the number of target tokens for a language
        model. Accumulated steps then equal one large batch. The default is the number of rows. Called for each batch
        of training, validation and testing, on the loop's thread, before the step.

        Args:
            batch: A batch of the dataloader, on the host unless the dataloader moves it.

        Returns:
            A finite number from 0, or a tensor of one element on the host. With weight 0 the batch's step runs without
            a backward; the weights of an optimizer step must not all be 0.

        Raises:
            BatchWeightError: In a run, if it returns something else.
        """
        return float(count_rows(batch, None).rows or 1)

    def get_state(self) -> dict[str, Any]:
        """Return the module's state for a checkpoint; by default its state dict, not copied.

        Called between two steps, on the loop's thread, for each checkpoint: it should be fast. The state consists of
        tensors (copied by the trainer), plain values and containers of them in any nesting;
        `events.checkpoint.packing.register` adds other types.
        """
        return dict(self.state_dict())

    def update_state(self, state: dict[str, Any]) -> None:
        """Restore the state that `get_state` returned.

        Raises:
            RuntimeError: By default, if names or shapes are not those of this module.
        """
        self.load_state_dict(state)

    def __getstate__(self) -> Any:
        """Copies and pickles of a module carry no recorder, and no compiled steps, which are bound to the original."""
        state = self.__dict__.copy()
        for name in _OF_A_RUN:
            state.pop(name, None)
        for name in ("train_step", "val_step", "test_step"):
            if hasattr(state.get(name), "_torchdynamo_orig_callable"):
                del state[name]
        return state


class _Refusal:
    """A method that only other trainers have: calling it raises an error that names the replacement."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise AttributeError(f"stagecast has no {self._name}(); {CALLS[self._name]}")


for _name in CALLS:
    setattr(CallbackInterface, _name, _Refusal(_name))

_CALLED_BY_USERS = frozenset({"forward", "log", "optimize"})


@functools.cache
def contract_names(kind: type[CallbackInterface]) -> frozenset[str]:
    """The methods of `ModuleInterface`, or of `CallbackInterface`, that the trainer calls."""
    classes = (CallbackInterface, ModuleInterface) if issubclass(kind, ModuleInterface) else (CallbackInterface,)
    names = {name for one in classes for name, value in vars(one).items() if isinstance(value, types.FunctionType)}
    return frozenset(name for name in names - _CALLED_BY_USERS if not name.startswith("_"))


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
