"""Log the learning rates of every parameter group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from trainer.callback_interface import CallbackInterface, inline
from trainer.callbacks.checks import Checks, must_be_trained
from trainer.hooks.hooks import without_outputs
from trainer.module_interface import ModuleInterface


class LearningRateMonitor(CallbackInterface):
    """Logs each parameter group's learning rate: ``lr/optimizer0/group0``, and so on::

        from trainer import Trainer, TrainerArguments
        from trainer.callbacks import LearningRateMonitor

        module = MyModule()
        Trainer(
            module,
            TrainerArguments(epochs=3),
            callbacks=[LearningRateMonitor(module, every_n_steps=10, momentum=True)],
        ).train()

    The value is the rate of the step, as in `TrainStepEnded.lr`, which only has that of the first group. Optimizers and
    groups are numbered from 0, in the order of ``get_optimizers_schedulers``; groups may be added later. A tensor is
    logged as a tensor, so nothing waits for the device. A skipped step logs nothing. It has no state for checkpoints.

    Args:
        module: The trained module, which logs the values.
        every_n_steps: Log when ``global_step`` is a multiple of this.
        momentum: Log ``momentum/optimizer0/group0``, too, if the group has one: its ``momentum``, or the first of its
            ``betas``.

    Raises:
        ArgumentsError: An argument is invalid.
        ContractError: In a run that does not train this module.
    """

    def __init__(self, module: ModuleInterface, every_n_steps: int = 1, *, momentum: bool = False) -> None:
        checks = Checks("LearningRateMonitor")
        checks.module(module)
        checks.count("every_n_steps", every_n_steps)
        checks.flag("momentum", momentum)
        checks.done()
        self._module = module
        self._every_n_steps = every_n_steps
        self._momentum = momentum
        self._optimizers: Sequence[torch.optim.Optimizer] = ()
        self._used: list[tuple[str, float | torch.Tensor]] = []

    def bind_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Receive the run's optimizers; the loop calls it before the first step."""
        must_be_trained(self, self._module)
        self._optimizers = optimizers

    def on_end_backward(self, global_step: int, loss_tensor: torch.Tensor) -> None:
        """Record the rates of the current step, before the schedulers change them."""
        if (global_step + 1) % self._every_n_steps == 0:
            self._used = list(self._read())

    @inline
    @without_outputs
    def on_end_train_step(self, global_step: int, *train_step_collated_outputs: object) -> None:
        """Log the recorded rates."""
        if global_step % self._every_n_steps == 0:
            for name, value in self._used:
                self._module.log(name, value)

    def _read(self) -> Iterator[tuple[str, float | torch.Tensor]]:
        for i, optimizer in enumerate(self._optimizers):
            for j, group in enumerate(optimizer.param_groups):
                yield f"lr/optimizer{i}/group{j}", _copied(group["lr"])
                if self._momentum:
                    found = group["momentum"] if "momentum" in group else group.get("betas", (None,))[0]
                    if found is not None:
                        yield f"momentum/optimizer{i}/group{j}", _copied(found)


def _copied(value: float | torch.Tensor) -> float | torch.Tensor:
    """Copy a value on its device, because a scheduler may change it in place."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else float(value)
