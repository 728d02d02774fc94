"""The learning rate at which the loss falls fastest."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from events.log import logger
from events.messages import TrainStepEnded
from trainer.arguments import TrainerArguments
from trainer.errors import ArgumentsError, NonFiniteError
from trainer.loop.optimizers import as_optimizers
from trainer.loop.schedule import Schedule
from trainer.module_interface import ModuleInterface
from trainer.tuning.trial import tuning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMOOTHING = 0.98
"""Weight that the smoothed loss keeps of itself per step, corrected for its start."""
_DIVERGED = 4.0
"""The test ends when the smoothed loss exceeds this many times the lowest one."""


class LearningRates(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `find_learning_rate`; the lists have one number for each step until the loss diverged."""

    lrs: list[float]
    losses: list[float]
    """As measured, before the step with the learning rate."""
    smoothed: list[float]
    suggestion: float | None
    """Where the smoothed loss falls fastest; None if it never falls."""
    linear: bool = False

    def plot(self) -> Figure:
        """Draw the losses over the learning rates, with the suggestion.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            figure: Figure = importlib.import_module("matplotlib.figure").Figure(layout="constrained")
        except ImportError as error:
            raise ImportError("plot() needs matplotlib; pip install 'stagecast[media]'") from error
        axes = figure.subplots()
        axes.plot(self.lrs, self.losses, color="tab:blue", alpha=0.3, label="loss")
        axes.plot(self.lrs, self.smoothed, color="tab:blue", label="smoothed")
        if self.suggestion is not None:
            at = self.smoothed[self.lrs.index(self.suggestion)]
            axes.plot([self.suggestion], [at], "o", color="tab:red", label=f"suggestion {self.suggestion:.3g}")
        axes.set(xscale="linear" if self.linear else "log", xlabel="learning rate", ylabel="loss")
        axes.legend()
        return figure


def find_learning_rate(
    module: ModuleInterface,
    arguments: TrainerArguments | None = None,
    *,
    low: float = 1e-8,
    high: float = 1.0,
    steps: int = 100,
    linear: bool = False,
    optimizer: int = 0,
) -> LearningRates:
    """Train with a learning rate that grows at each step, and suggest the one at which the loss falls fastest::

        found = find_learning_rate(module, arguments)
        found.plot().savefig("lr.png")
        module.lr = found.suggestion

    The range test is that of L. N. Smith, "Cyclical Learning Rates for Training Neural Networks" (2017), section 3.3;
    the suggestion is the steepest descent of the smoothed loss over the logarithm of the learning rate, without the
    first tenth of the steps and the last one, as fastai and Lightning have it. The test ends when the smoothed loss
    exceeds four times the lowest one, or is NaN or infinite.

    Steps are real ones: by the arguments' batch size, accumulation and precision, also with closures (L-BFGS) and with
    ``manual_optimization``. The module's schedulers do not step. Then the module, its gradients, the random generators,
    and what the module holds are bit for bit as before; no run folder is written. The hooks of the module run, no
    callbacks and no validation. Waits for the test.

    Args:
        module: What to train.
        arguments: How it will be trained.
        low: The first learning rate.
        high: The last one.
        steps: Optimizer steps; if the data has fewer, it is read again, with a warning.
        linear: Whether the learning rate grows by equal amounts, not by equal factors.
        optimizer: Index of the optimizer whose learning rate grows; the others keep theirs. Its parameter groups keep
            their ratios to the first one, whose learning rate is reported.

    Raises:
        ArgumentsError: An argument is wrong.
        Exception: What a step raises, as itself.
    """
    _check(low, high, steps)
    shares = [i / (steps - 1) for i in range(steps)]
    lrs = [low + (high - low) * share if linear else low * (high / low) ** share for share in shares]
    curve = _Curve()
    with tuning(module, arguments) as made, _ramped(module, lrs, optimizer):
        try:
            watch = made.train(steps, curve.add, non_finite="warn")
        except NonFiniteError:  # too many skipped steps: float16 at a learning rate that is too high
            logger.info("find_learning_rate: the gradients have diverged")
        else:
            if watch.steps_per_epoch is not None and watch.steps_per_epoch < len(curve.losses):
                logger.warning(
                    f"find_learning_rate reads the data again: an epoch has {watch.steps_per_epoch} steps, and the test"
                    f" has taken {len(curve.losses)}; use fewer steps if the loss must be that of new rows"
                )
    count = len(curve.losses)
    return _result(lrs[:count], curve, linear)


@contextmanager
def _ramped(module: ModuleInterface, lrs: list[float], index: int) -> Iterator[None]:
    """Have the module return a scheduler that sets these learning rates, and no other."""
    own = module.get_optimizers_schedulers

    def get_optimizers_schedulers(estimated_global_steps_per_epoch: int, epochs: int) -> Any:
        optimizers, _ = as_optimizers(own(estimated_global_steps_per_epoch, epochs))
        return optimizers, [Schedule(_Ramp(_chosen(optimizers, index), lrs), "step")]

    before = vars(module).get("get_optimizers_schedulers")
    object.__setattr__(module, "get_optimizers_schedulers", get_optimizers_schedulers)
    try:
        yield
    finally:
        vars(module).pop("get_optimizers_schedulers", None)  # the trial has restored the module, unless it never began
        if before is not None:
            object.__setattr__(module, "get_optimizers_schedulers", before)


def _check(low: float, high: float, steps: int) -> None:
    for name, number in (("low", low), ("high", high)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
            raise ArgumentsError(f"find_learning_rate got {name}={number!r}; give a finite number above 0")
    if high <= low:
        raise ArgumentsError(f"find_learning_rate got high={high}, which is not above low={low}; give a higher one")
    if type(steps) is not int or steps < 10:
        raise ArgumentsError(f"find_learning_rate got steps={steps!r}; give an integer >= 10")


def _chosen(optimizers: list[torch.optim.Optimizer], index: int) -> torch.optim.Optimizer:
    if type(index) is not int or not 0 <= index < len(optimizers):
        raise ArgumentsError(
            f"find_learning_rate got optimizer={index!r}, and the module has {len(optimizers)}; give an index from 0"
        )
    return optimizers[index]


def _result(lrs: list[float], curve: _Curve, linear: bool) -> LearningRates:
    first, last = len(lrs) // 10, len(lrs) - 1
    suggestion: float | None = None
    if last - first >= 2:
        falls = torch.tensor(curve.smoothed[first:last], dtype=torch.float64)
        over = torch.tensor(lrs[first:last], dtype=torch.float64).log()
        (slopes,) = torch.gradient(falls, spacing=(over,))
        steepest = int(slopes.argmin())
        suggestion = lrs[first + steepest] if slopes[steepest] < 0 else None
    if suggestion is None:
        logger.warning(
            f"find_learning_rate has no suggestion: the loss did not fall in {len(lrs)} steps; lower low, or look at"
            f" the plot"
        )
    return LearningRates(lrs=lrs, losses=curve.losses, smoothed=curve.smoothed, suggestion=suggestion, linear=linear)


class _Curve:
    """The losses of a test, until they diverge. On the sink's thread, and read after the run."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self._mean = 0.0
        self._has_ended = False

    def add(self, event: TrainStepEnded) -> bool:
        """Add a step; returns whether the loss has diverged, after which steps are ignored."""
        loss = event.loss
        if self._has_ended:
            return True
        if loss is None or not math.isfinite(loss):
            self._has_ended = True
            return True
        self._mean = _SMOOTHING * self._mean + (1 - _SMOOTHING) * loss
        now = self._mean / (1 - _SMOOTHING ** (len(self.losses) + 1))
        self.losses.append(loss)
        self.smoothed.append(now)
        best = min(self.smoothed)
        self._has_ended = now > best + (_DIVERGED - 1) * abs(best)  # losses may be negative
        return self._has_ended


class _Ramp:
    """Sets the learning rate of each step. A scheduler."""

    def __init__(self, optimizer: torch.optim.Optimizer, lrs: list[float]) -> None:
        self._groups = optimizer.param_groups
        self._lrs = iter(lrs)
        first = float(self._groups[0]["lr"])
        self._ratios = [float(group["lr"]) / first if first else 1.0 for group in self._groups]
        self.step()

    def step(self) -> None:
        """Set the next one; the last stays."""
        lr = next(self._lrs, None)
        if lr is None:
            return
        for group, ratio in zip(self._groups, self._ratios, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr * ratio)
            else:
                group["lr"] = lr * ratio
