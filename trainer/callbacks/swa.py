"""Stochastic weight averaging."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import SWALR, update_bn

from trainer.averaging import AveragedWeights
from trainer.callback_interface import inline
from trainer.callbacks.checks import Checks, is_finite
from trainer.hooks.hooks import without_outputs
from trainer.loop.saved_state import checked_scheduler

AnnealStrategy = Literal["cos", "linear"]
_NUMBERS = ("epoch", "averaged_at", "fresh_at")


class SWA(AveragedWeights):
    """Stochastic weight averaging: the equal average of the weights late in training, with a constant learning rate::

        from trainer import Trainer, TrainerArguments
        from trainer.callbacks import SWA

        module = MyModule()
        swa = SWA(module, start_epoch=75, lr=0.05)
        trainer = Trainer(module, TrainerArguments(epochs=100), callbacks=[swa])
        trainer.train()  # from epoch 75, the validations use the averaged weights
        torch.save(swa.weights(), "averaged.pt")

    From its start on, it averages the weights at the end of each epoch, before its validation, or every
    ``every_n_steps``. Until then, and in a run that ends earlier, validations use the trained weights. Checkpoints
    contain the average, bit for bit, and the trained weights, from which a run resumes.

    **Batch norm.** The running statistics of the trained weights do not fit the averaged ones. Before each validation
    of a new average, and at the end of training, those of the average are computed from the training data with
    `torch.optim.swa_utils.update_bn`: ``get_train_dataloader`` is called once more with a sequential sampler, and
    ``train_step`` for each batch, without gradients; what it logs is discarded. Batch norms in eval mode (frozen ones)
    are left as they are.

    References: P. Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018.

    Args:
        module: The trained module, or a part of it.
        start_epoch: The first epoch whose weights are averaged, counted from 0.
        start_step: The first ``global_step`` whose weights are averaged; give one of the two.
        every_n_steps: Average when ``global_step`` is a multiple of this; None: at the end of each epoch.
        lr: The learning rate from the start on. `torch.optim.swa_utils.SWALR` then replaces the schedulers of the
            module, for all parameter groups. None: the schedulers of the module continue.
        anneal: Epochs (steps with ``start_step``) in which the learning rate is brought to ``lr``; 0: at once.
        anneal_strategy: ``"cos"`` or ``"linear"``.
        validate: Validate the averaged weights; see `EMA`.
        update_bn: Compute batch norm statistics. A number: the maximum of batches for it.

    Raises:
        ArgumentsError: An argument is invalid.
        ContractError: In a run that trains no parameter of this module; with a batch norm, in one with
            ``manual_optimization``, unless ``update_bn=False``.
        OptimizerError: With ``validate``, in a run with a schedule-free optimizer.
        CheckpointMismatch: On resuming with the average of another model; names the mismatches.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        start_epoch: int | None = None,
        start_step: int | None = None,
        every_n_steps: int | None = None,
        lr: float | None = None,
        anneal: int = 10,
        anneal_strategy: AnnealStrategy = "cos",
        validate: bool = True,
        update_bn: bool | int = True,
    ) -> None:
        checks = Checks("SWA")
        checks.that(isinstance(module, nn.Module), f"module must be an instance of a torch module, not {module!r:.80}")
        checks.that((start_epoch is None) != (start_step is None), "give one of start_epoch and start_step")
        checks.that(
            start_epoch is None or (type(start_epoch) is int and start_epoch >= 0),
            f"start_epoch must be an integer >= 0, not {start_epoch!r:.80}",
        )
        for name, value in (("start_step", start_step), ("every_n_steps", every_n_steps)):
            if value is not None:
                checks.count(name, value)
        checks.that(lr is None or (is_finite(lr) and lr >= 0), f"lr must be a number from 0 or None, not {lr!r:.80}")
        checks.that(type(anneal) is int and anneal >= 0, f"anneal must be an integer >= 0, not {anneal!r:.80}")
        checks.that(
            anneal_strategy in get_args(AnnealStrategy),
            f"anneal_strategy must be 'cos' or 'linear', not {anneal_strategy!r:.80}",
        )
        checks.flag("validate", validate)
        if not isinstance(update_bn, bool):
            checks.count("update_bn", update_bn)
        checks.done()
        super().__init__(module, buffers=False, validate=validate)
        self._start_epoch, self._start_step = start_epoch, start_step
        self._every_n_steps = every_n_steps
        self._rate = None if lr is None else (float(lr), anneal, anneal_strategy)
        self._update_bn = update_bn
        self._epoch = 0
        self._averaged_at = 0  # the step of the last average at the end of an epoch
        self._fresh_at = 0  # the number of steps of the average that the batch norm statistics belong to
        self._partial: list[torch.Tensor] | None = None  # statistics that are being computed, while not applied
        self._is_computing = False
        self._optimizers: list[torch.optim.Optimizer] = []
        self._replace: Callable[[list[Any], bool], None] | None = None
        self._schedulers: list[SWALR] = []
        self._resumed: list[Any] | None = None  # their states in the checkpoint from which the next run resumes

    # --------------------------------------------------------------------------------------------------- when

    def bind_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Start anew, unless the run resumes; raises as that of `AveragedWeights`."""
        super().bind_optimizers(optimizers)
        if self._resumed is None:
            self.steps = self._epoch = self._averaged_at = self._fresh_at = 0
            self._average = {}
            self._follow(join=False)
        self._optimizers, self._schedulers = list(optimizers), []

    def bind_schedules(self, replace: Callable[[list[Any], bool], None]) -> None:
        """Continue with the learning rate of the checkpoint."""
        self._replace = replace
        if self._resumed:
            self._take_over(self._resumed)
        self._resumed = None

    @inline
    def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        """Start, if it is time; follow parameters that were added, unfrozen or replaced."""
        super().on_begin_train_epoch(global_step, epoch)
        self._epoch = epoch
        self._begin(global_step)

    @inline
    @without_outputs
    def on_end_train_step(self, global_step: int, *train_step_collated_outputs: object) -> None:
        """Average, if it is time."""
        if self._start_step is not None:
            self._begin(global_step)
        every = self._every_n_steps
        if every is not None and global_step % every == 0 and self._has_started(global_step):
            self.add()

    def end_epoch(self, global_step: int) -> None:
        """Average, if that is due at the end of each epoch."""
        if self._every_n_steps is None and self._has_started(global_step) and global_step != self._averaged_at:
            self.add()
            self._averaged_at = global_step

    def weight_of_next(self) -> float:
        """That of an equal average."""
        return 1 / (self.steps + 1)

    def _has_started(self, global_step: int) -> bool:
        if self._start_step is not None:
            return global_step >= self._start_step
        return self._epoch >= (self._start_epoch or 0)

    # ------------------------------------------------------------------------------------------ the learning rate

    def _begin(self, global_step: int) -> None:
        if self._rate is None or not self._has_started(global_step):
            return
        if not self._schedulers:
            self._take_over([])
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group.setdefault("swa_lr", self._rate[0])  # one that was added since; SWALR requires it

    def _take_over(self, saved: list[Any]) -> None:
        """Replace the module's schedulers. ``saved``: the states to continue with."""
        if self._rate is None or self._replace is None:
            return
        lr, anneal, strategy = self._rate
        for number, optimizer in enumerate(self._optimizers):
            groups, resumes = optimizer.param_groups, number < len(saved)
            before = [float(group["lr"]) for group in groups] if resumes else []  # SYNC: on resuming
            scheduler = SWALR(optimizer, lr, anneal, strategy)  # sets the rate of its first step
            if resumes:
                scheduler.load_state_dict(checked_scheduler(scheduler, saved[number], "the state of SWA"))
                for group, rate in zip(groups, before, strict=True):
                    if isinstance(group["lr"], torch.Tensor):
                        group["lr"].fill_(rate)
                    else:
                        group["lr"] = rate
            self._schedulers.append(scheduler)
        self._replace(list(self._schedulers), self._start_step is not None)

    # -------------------------------------------------------------------------------------- batch norm statistics

    @property
    def norms(self) -> list[_BatchNorm]:
        """The batch norms of the module that keep running statistics, unless ``update_bn=False``."""
        if self._update_bn is False:
            return []
        found = [one for one in self._module.modules() if isinstance(one, _BatchNorm)]
        return [one for one in found if one.running_mean is not None and not is_lazy(one.running_mean)]

    @property
    def is_stale(self) -> bool:
        """Whether the statistics of `norms` are those of an earlier average."""
        return bool(self._average) and self._fresh_at != self.steps and bool(self.norms)

    def recompute(self, batches: Iterable[Any], run: Callable[[Any], object]) -> None:
        """Compute the statistics of those batch norms that are in training mode, in the block of `applied`."""
        if not isinstance(self._update_bn, bool):
            batches = islice(batches, self._update_bn)
        norms = [one for one in self.norms if one.training]
        momenta = [one.momentum for one in norms]
        self._is_computing = True
        try:
            update_bn(((batch,) for batch in batches), _Normalised(norms, run))
        finally:
            self._is_computing, self._partial = False, None
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        with torch.no_grad():
            for tensor, average in self._statistics():
                average.copy_(tensor)
        self._fresh_at = self.steps

    def apply(self) -> None:
        """Begin the block of `applied`; again, while statistics are computed, with what there is of them."""
        super().apply()
        if self._partial is not None:
            with torch.no_grad():
                for (tensor, _), partial in zip(self._statistics(), self._partial, strict=True):
                    tensor.copy_(partial)

    def restore(self) -> None:
        """End the block of `applied`."""
        self._partial = [tensor.clone() for tensor, _ in self._statistics()] if self._is_computing else None
        super().restore()

    def _statistics(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        own = {id(buffer) for norm in self.norms for buffer in norm.buffers(recurse=False)}
        return [pair for pair in self.averages() if id(pair[0]) in own]

    # ---------------------------------------------------------------------------------------------- in checkpoints

    def state_dict(self) -> dict[str, object]:
        """The state for a checkpoint; the averages are not copied."""
        schedulers = [
            {name: value for name, value in one.state_dict().items() if not callable(value)} for one in self._schedulers
        ]
        numbers = {"epoch": self._epoch, "averaged_at": self._averaged_at, "fresh_at": self._fresh_at}
        return super().state_dict() | numbers | {"schedulers": schedulers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        super().load_state_dict(state)
        self._epoch, self._averaged_at, self._fresh_at = (state[name] for name in _NUMBERS)
        self._resumed = state["schedulers"]

    def _is_sound(self, state: dict[str, Any]) -> bool:
        numbers = all(type(state[name]) is int for name in _NUMBERS)
        return super()._is_sound(state) and numbers and isinstance(state["schedulers"], list)


class _Normalised(nn.Module):
    """What `update_bn` takes for the model: the batch norms whose statistics it computes, and a call for a batch."""

    def __init__(self, norms: list[_BatchNorm], run: Callable[[Any], object]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)
        self._run = run

    def forward(self, batch: Any) -> None:
        self._run(batch)
