"""Stop a run whose metric no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from events.errors import CheckpointMismatch
from events.log import logger
from trainer.callback_interface import CallbackInterface
from trainer.callbacks.checks import Checks, is_finite


class EarlyStopping(CallbackInterface):
    """Stops the run when a metric has not improved for ``patience`` validations in a row::

        from trainer import Checkpoints, Trainer, TrainerArguments
        from trainer.callbacks import EarlyStopping

        result = Trainer(
            module,
            TrainerArguments(epochs=100),
            callbacks=[EarlyStopping(monitor="accuracy", mode="max", patience=5, min_delta=0.001)],
            checkpoints=Checkpoints(best="accuracy", best_mode="max"),
        ).train()
        print(result.status, result.reason)  # stopped accuracy has not improved for 5 evaluations (patience): ...

    The run ends as by `Run.stop`: with a checkpoint if it takes any, its last hooks, and the status ``stopped``. It
    ends right after the validation, so at the same step each time. A run that does not validate is checked at the end
    of each epoch but the last.

    The metric has its name in `RunResult.metrics`: ``val_loss``, ``val_loss/KEY`` for other dataloaders, or a name
    logged in the validation by ``val_step``, the module's own ``on_end_val_epoch``, or an inline or fenced hook. A
    validation without the metric is skipped; `MonitorMissing` and a warning report it. ``train_epoch_loss`` is checked
    at the end of each epoch. The value is read on the loop's thread: one wait for the device per validation, in the
    ledger's ``readback``.

    Checkpoints contain its state. A resumed run that it had stopped gets one validation in which to improve. Resuming
    with another ``monitor`` or ``mode`` resets the state.

    Args:
        monitor: The metric's name.
        mode: ``"min"``: smaller is better; ``"max"``: larger.
        patience: Maximum validations in a row without an improvement; reaching it ends the run.
        min_delta: Minimum difference from the best value that counts as an improvement, exclusive.
        check_finite: Stop at once when the metric is NaN or infinite. Otherwise that is not an improvement.
        target: Stop as soon as the metric has reached this value, or is better.

    Raises:
        ArgumentsError: An argument is invalid.
        MetricNotFound: In a run, if the first validation does not log the metric; names the metrics that it logs.
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
            "monitor='train_loss' is the loss of a single step; follow 'train_epoch_loss', the epoch's mean",
        )
        checks.that(mode in ("min", "max"), f"mode must be 'min' or 'max', not {mode!r:.80}")
        checks.count("patience", patience)
        checks.that(
            is_finite(min_delta) and min_delta >= 0, f"min_delta must be a number from 0, not {min_delta!r:.80}"
        )
        checks.flag("check_finite", check_finite)
        checks.that(target is None or is_finite(target), f"target must be a number or None, not {target!r:.80}")
        checks.done()
        self.best: float | None = None
        """The best value so far."""
        self.best_step = 0
        """``global_step`` of that validation."""
        self.waited = 0
        """Validations since then."""
        self.monitor = monitor
        """The metric's name: the loop calls `should_stop` only with that metric."""
        self._mode = mode
        self._patience = patience
        self._min_delta = min_delta
        self._check_finite = check_finite
        self._target = target

    def should_stop(self, global_step: int, metrics: Mapping[str, float | torch.Tensor]) -> str | None:
        """Return a reason to stop the run, or None. The loop calls it after a validation, on its thread.

        Args:
            global_step: Optimizer steps finished.
            metrics: Those of the validation; tensors are on their device.
        """
        name = self.monitor
        value = float(metrics[name])  # SYNC: once per validation, because the run may end by it
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

    def state_dict(self) -> dict[str, object]:
        """The state for a checkpoint."""
        return {
            "monitor": self.monitor,
            "mode": self._mode,
            "best": self.best,
            "best_step": self.best_step,
            "waited": self.waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned, if it has the same metric and mode."""
        if (state["monitor"], state["mode"]) != (self.monitor, self._mode):
            logger.warning(
                f"EarlyStopping starts without the checkpoint's state, which is of {state['monitor']!r} (mode"
                f" {state['mode']!r}), not of {self.monitor!r} (mode {self._mode!r})"
            )
            return
        best, best_step, waited = state["best"], state["best_step"], state["waited"]
        if not isinstance(best, float | int | None) or not isinstance(waited, int):
            raise CheckpointMismatch("the checkpoint's EarlyStopping has a best value or a count that is not a number")
        self.best, self.best_step, self.waited = best, best_step, waited
