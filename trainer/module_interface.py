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

import enum
import functools
import types
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from trainer.callback_interface import OF_A_RUN
from trainer.callback_interface import CallbackInterface as CallbackInterface  # the contract has both here
from trainer.data.rows import count_rows
from trainer.errors import ContractError
from trainer.unheard import in_words, unheard_methods

if TYPE_CHECKING:
    from trainer.loop.manual import ManualSteps


class Stage(enum.Enum):
    """The stage that a step belongs to."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


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

    current_epoch: int = 0
    """The epoch that is trained, from 0; the trainer sets it before it asks for the epoch's dataloader."""

    _records_arguments = False
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
        """Build the dataloader of one training epoch. Called every epoch; ``self.current_epoch`` is its number.

        It may return another one each time: other data, or batches of another size than ``batch_size``. Schedulers are
        told the number of steps before, by the first dataloader and ``TrainerArguments.batch_size_schedule``. A module
        that keeps one dataloader keeps its persistent workers, too; a new batch size needs a new one.

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
    ) -> torch.Tensor | tuple[Any, ...] | None:
        """Compute the loss of one micro-batch. Gradients are enabled; the module is in train mode.

        Args:
            global_step: The optimizer step that this micro-batch works towards: finished + 1, from 1.
            batch: A batch of the training dataloader, on the host; move it to the device (`trainer.to_device`).
            device: The model's device.

        Returns:
            The loss: a tensor of one element with a graph, the mean over the micro-batch; or a tuple that
            begins with it. Further outputs should be tensors; overridden hooks receive them collated. Or None to leave
            the micro-batch out of its step, with what it logged where the whole step has no loss. A step without any
            loss is skipped and published as `StepSkipped`.
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

    def fsdp_units(self) -> Iterable[torch.nn.Module]:
        """Return the submodules whose parameters ``strategy="fsdp"`` gathers together, for their passes alone.

        Called once per run, before the optimizers are built. The default is each member of a `torch.nn.ModuleList`:
        the blocks of a transformer. The rest of the module is one more unit. ``Fsdp(units=...)`` replaces it.
        """
        members = (one for each in self.modules() if isinstance(each, torch.nn.ModuleList) for one in each)
        return [one for one in members if not isinstance(one, (torch.nn.ModuleList, torch.nn.ModuleDict))]

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
        for name in OF_A_RUN:
            state.pop(name, None)
        for name in ("train_step", "val_step", "test_step"):
            if hasattr(state.get(name), "_torchdynamo_orig_callable"):
                del state[name]
        return state


_CALLED_BY_USERS = frozenset({"forward", "log", "log_dict", "optimize"})


@functools.cache
def contract_names(kind: type[CallbackInterface]) -> frozenset[str]:
    """The methods of `ModuleInterface`, or of `CallbackInterface`, that the trainer calls."""
    classes = (CallbackInterface, ModuleInterface) if issubclass(kind, ModuleInterface) else (CallbackInterface,)
    names = {name for one in classes for name, value in vars(one).items() if isinstance(value, types.FunctionType)}
    return frozenset(name for name in names - _CALLED_BY_USERS if not name.startswith("_"))
