"""Keep an exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from events.log import logger
from trainer.averaging import AveragedWeights
from trainer.callback_interface import inline
from trainer.callbacks.checks import Checks, is_finite
from trainer.hooks.hooks import without_outputs


class EMA(AveragedWeights):
    """Keeps an exponential moving average of the weights, ``decay * average + (1 - decay) * weights`` at each step::

        from trainer import Trainer, TrainerArguments
        from trainer.callbacks import EMA

        module = MyModule()
        ema = EMA(module, decay=0.999, validate=True)
        trainer = Trainer(module, TrainerArguments(epochs=10), callbacks=[ema])
        trainer.train()  # the validations use the averaged weights
        outputs = trainer.test()  # and so does the test
        torch.save(ema.weights(), "averaged.pt")

    The average starts with the weights after the first step. It is computed on the loop's thread and on the weights'
    device, right after each optimizer step that is not skipped. The weights are read in place, also under
    torch.compile. Checkpoints contain the average, bit for bit, and the trained weights, from which a run resumes.

    Only trained parameters are averaged and copied. A parameter that is added or unfrozen later joins at the beginning
    of the next epoch, with a warning. Weights in half precision are averaged in float32, which would otherwise lose
    small updates.

    Args:
        module: The trained module, or a part of it.
        decay: The weight of the average at each step, in [0, 1).
        every_n_steps: Average when ``global_step`` is a multiple of this.
        buffers: Average floating-point buffers, too (such as a batch norm's running mean), and copy the others at each
            averaged step. Otherwise the buffers of the module are used with the averaged weights.
        validate: Validate the averaged weights: the module has them during each validation of the run, in
            `Trainer.validate` and in `Trainer.test`, and its own weights again afterwards, bit for bit. ``val_loss``,
            and all that follows it (the best checkpoint, schedulers, early stopping), is then that of the average;
            ``weights.safetensors``, ``stagecast checkpoints export`` and ``init_from`` use the average, too. False:
            the trained weights are validated, and `applied` gives the module the average. At most one callback of a
            run may validate its average.

    Raises:
        ArgumentsError: An argument is invalid.
        ContractError: In a run that trains no parameter of this module.
        OptimizerError: With ``validate``, in a run with a schedule-free optimizer.
        CheckpointMismatch: On resuming with the average of another model; names the mismatches.
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float = 0.999,
        *,
        every_n_steps: int = 1,
        buffers: bool = False,
        validate: bool = False,
    ) -> None:
        checks = Checks("EMA")
        checks.that(isinstance(module, nn.Module), f"module must be an instance of a torch module, not {module!r:.80}")
        checks.that(
            is_finite(decay) and 0 <= decay < 1, f"decay must be a number from 0 to less than 1, not {decay!r:.80}"
        )
        checks.count("every_n_steps", every_n_steps)
        checks.flag("buffers", buffers)
        checks.flag("validate", validate)
        checks.done()
        super().__init__(module, buffers=buffers, validate=validate)
        self._decay = float(decay)
        self._every_n_steps = every_n_steps

    @inline
    @without_outputs
    def on_end_train_step(self, global_step: int, *train_step_collated_outputs: object) -> None:
        """Update the average."""
        if global_step % self._every_n_steps == 0:
            self.add()

    def weight_of_next(self) -> float:
        """The same at each step."""
        return 1 - self._decay

    def state_dict(self) -> dict[str, object]:
        """The state for a checkpoint; the averages are not copied."""
        return super().state_dict() | {"decay": self._decay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        super().load_state_dict(state)
        if state["decay"] != self._decay:
            logger.warning(
                f"EMA(decay={self._decay:g}) continues an average that was taken with decay={state['decay']:g};"
                f" build it with that decay to resume exactly"
            )

    def _is_sound(self, state: dict[str, Any]) -> bool:
        return super()._is_sound(state) and type(state["decay"]) is float
