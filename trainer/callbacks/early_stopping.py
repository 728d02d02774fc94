"""Stop a run whose metric no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from events.errors import CheckpointMismatch
from events.log import logger
from trainer.callbacks.checks import Checks, is_finite
from trainer.module_interface import CallbackInterface


class EarlyStopping(CallbackInterface):
    """Stops the run when a metric has not improved for some validations in a row::

        from trainer import Checkpoints, Trainer, TrainerArguments
        from trainer.callbacks import EarlyStopping

        result = Trainer(
            module,
            TrainerArguments(epochs=100),
            callbacks=[EarlyStopping(monitor="accuracy", mode="max", patience=5, min_delta=0.001)],
            checkpoints=Checkpoints(best="accuracy", best_mode="max"),
        ).train()
        print(result.status, result.reason)  # stopped accuracy has not improved for 5 evaluations (patience): ...

    The run ends as by `Run.stop`: with a checkpoint, where it takes any, the hooks of its end, and the status
    ``stopped``. It does so right after the validation, before anything else is trained: at the same step each time. A
    run that does not validate is judged at the end of each epoch; after the last epoch there is nothing to stop.

    The metric is looked for where `RunResult.metrics` has it: ``val_loss``, ``val_loss/KEY`` for other dataloaders, and
    what was logged in the validation, by ``val_step``, by the module's own ``on_end_val_epoch``, or by an inline or
    fenced hook. A validation that lacks the metric is not judged: `MonitorMissing` and a warning report it. The metric
    ``train_epoch_loss`` is judged at the end of each epoch. The value is read on the loop's thread: one wait for the
    device in each validation, in the ledger's ``readback``.

    What it knows is part of checkpoints. A run that it has stopped and that is resumed gets one validation in which to
    improve. On resuming with another ``monitor`` or ``mode`` it begins anew.

    Args:
        monitor: The metric's name.
        mode: ``"min"``: smaller is better; ``"max"``: larger.
        patience: So many validations in a row without an improvement end the run.
        min_delta: By how much more than this a value must be better than the best one to count as an improvement.
        check_finite: Stop at once when the metric is NaN or infinite. Otherwise that is no improvement.
        target: Stop as soon as the metric has reached this value, or is better.

    Raises:
        ArgumentsError: one of them cannot be used.
        MetricNotFound: in a run, if the first validation does not produce the metric; names those that it produces.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
        *,
        check_finite: bool = True,
        target: float | None = None,
    ) -> None:
        checks = Checks("EarlyStopping")
        checks.that(isinstance(monitor, str) and bool(monitor), f"monitor must be a metric's name, not {monitor!r:.80}")
        checks.that(
            monitor != "train_loss",
            "monitor='train_loss' is the loss of a single step: follow 'train_epoch_loss', the epoch's mean",
        )
        checks.that(mode in ("min", "max"), f"mode must be 'min' or 'max', not {mode!r:.80}")
        checks.whole("patience", patience)
        checks.that(
            is_finite(min_delta) and min_delta >= 0, f"min_delta must be a number from 0, not {min_delta!r:.80}"
        )
        checks.flag("check_finite", check_finite)
        checks.that(target is None or is_finite(target), f"target must be a number or None, not {target!r:.80}")
        checks.done()
        self.best: float | None = None
        """The best value so far."""
        self.best_step = 0
        """``global_step`` of the validation in which that was."""
        self.waited = 0
        """Validations since then."""
        self.monitor = monitor
        """The metric's name: the loop calls `should_stop` when that metric is there."""
        self._mode = mode
        self._patience = patience
        self._min_delta = min_delta
        self._check_finite = check_finite
        self._target = target

    def should_stop(self, global_step: int, metrics: Mapping[str, float | torch.Tensor]) -> str | None:
        """A validation is over: returns why the run is to stop, or None. Called by the loop, on its thread.

        Args:
            global_step: Optimizer steps finished.
            metrics: What that validation has produced; tensors are on their device.
        """
        name = self.monitor
        value = float(metrics[name])  # SYNC: once per validation, because the user wants the run to end by it
        if self._check_finite and not math.isfinite(value):
            return f"{name} is {value} at step {global_step} (check_finite); {self._best_so_far}"
        if self._is_improved(value):
            self.best, self.best_step, self.waited = value, global_step, 0
        else:
            self.waited += 1
        if self._target is not None and math.isfinite(value) and not self._is_better(self._target, value):
            return f"{name} is {value:.6g} at step {global_step}, which reaches the target of {self._target:.6g}"
        if self.waited >= self._patience:
            times = f"{self.waited} evaluations" if self.waited > 1 else "1 evaluation"
            return f"{name} has not improved for {times} (patience): it is {value:.6g}, {self._best_so_far}"
        return None

    @property
    def _best_so_far(self) -> str:
        if self.best is None:
            return "and there was no better value"
        return f"its best value was {self.best:.6g} at step {self.best_step}"

    def _is_better(self, value: float, than: float) -> bool:
        return value < than if self._mode == "min" else value > than

    def _is_improved(self, value: float) -> bool:
        if self.best is None or not math.isfinite(value):
            return math.isfinite(value)
        delta = -self._min_delta if self._mode == "min" else self._min_delta
        return self._is_better(value, self.best + delta)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "monitor": self.monitor,
            "mode": self._mode,
            "best": self.best,
            "best_step": self.best_step,
            "waited": self.waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, if it is of this metric."""
        if (state["monitor"], state["mode"]) != (self.monitor, self._mode):
            logger.warning(
                f"EarlyStopping begins anew: that of the checkpoint followed {state['monitor']!r} (mode"
                f" {state['mode']!r}), and this one follows {self.monitor!r} (mode {self._mode!r})"
            )
            return
        best, best_step, waited = state["best"], state["best_step"], state["waited"]
        if not isinstance(best, float | int | None) or not isinstance(waited, int):
            raise CheckpointMismatch("the checkpoint's EarlyStopping has a best value or a count that is not a number")
        self.best, self.best_step, self.waited = best, best_step, waited
