"""The averaged weights of a run: in validations and in checkpoints. On the loop's thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from events.log import logger
from trainer.averaging import AveragedWeights
from trainer.data.tensors import map_tensors
from trainer.distributed.local import local
from trainer.errors import ContractError, add_note
from trainer.hooks.hooks import CallbackHooks
from trainer.module_interface import ModuleInterface

if TYPE_CHECKING:
    from trainer.loop.optimization import Optimization

Gate = Callable[[], None]
"""Has the device wait for a copy of the weights that is under way."""


class Averaging:
    """The callbacks of a run that average its weights, of which one may have its average validated."""

    def __init__(
        self, callbacks: Iterable[CallbackHooks], fail: Callable[[CallbackHooks, str, Exception], None]
    ) -> None:
        self._callbacks = [one for one in callbacks if isinstance(one.callback, AveragedWeights)]
        self._applied: AveragedWeights | None = None
        self._fail = fail

    @property
    def wanted(self) -> bool | None:
        """Whether the averaged weights are to be validated; None if no callback averages any."""
        return self._validated is not None if self._callbacks else None

    @property
    def _validated(self) -> AveragedWeights | None:
        return next((average for one, average in self._of_run() if average.validate), None)

    def _of_run(self) -> Iterator[tuple[CallbackHooks, AveragedWeights]]:
        for one in self._callbacks:
            if not one.disabled and isinstance(one.callback, AveragedWeights):
                yield one, one.callback

    @contextlib.contextmanager
    def applied(self, gate: Gate) -> Iterator[None]:
        """Give the module the averaged weights within the block, if they are validated and exist yet."""
        average = self._validated
        if average is None or not average.steps or average.is_applied:
            yield
            return
        with self._applying(average, gate):
            yield

    @contextlib.contextmanager
    def _applying(self, average: AveragedWeights, gate: Gate) -> Iterator[None]:
        gate()
        average.apply()
        self._applied = average
        try:
            yield
        finally:
            self._applied = None
            gate()
            average.restore()

    @contextlib.contextmanager
    def withdrawn(self, gate: Gate) -> Iterator[None]:
        """Within a block of `applied`, give the module its own weights again: checkpoints hold these."""
        average = self._applied
        if average is None:
            yield
            return
        gate()
        average.restore()
        try:
            yield
        finally:
            gate()
            average.apply()

    def bind(self, optimization: Optimization, module: ModuleInterface) -> None:
        """Before the first step, after ``bind_optimizers`` of the callbacks.

        Raises:
            ContractError: `train_step` cannot be called to compute batch norm statistics, because it trains.
        """
        for _, average in self._of_run():
            average.bind_schedules(optimization.schedules.replace)
            if average.norms and module.manual_optimization:
                raise ContractError(
                    f"{average.name} computes batch norm statistics by calling train_step(), which trains with"
                    f" manual_optimization; give it update_bn=False"
                )

    def end_epoch(self, global_step: int) -> None:
        """An epoch has had its last step, and its validation comes next; may be called several times."""
        for one, average in self._of_run():
            try:
                average.end_epoch(global_step)
            except Exception as error:  # a supervisor's border: reported, and raised unless it only disables
                add_note(error, f"raised by {one.name}.end_epoch at global_step {global_step}")
                self._fail(one, "end_epoch", error)

    def stale(self, *, last: bool) -> list[AveragedWeights]:
        """The averages whose batch norm statistics are needed, and are those of an earlier average.

        Args:
            last: At the end of training, which needs all of them; else a validation comes next.
        """
        return [average for _, average in self._of_run() if average.is_stale and (last or average.validate)]

    def recompute(
        self, average: AveragedWeights, batches: Iterable[Any], run: Callable[[Any], object], gate: Gate
    ) -> None:
        """Compute the batch norm statistics of an average; see `AveragedWeights.recompute`."""
        with self._applying(average, gate):
            average.recompute(batches, run)

    def warn_of_none(self) -> None:
        """Training has ended: warn of callbacks that have averaged nothing."""
        for one, average in self._of_run():
            if not average.steps:
                logger.warning(f"{one.state_key} has averaged nothing, because the run ended before it started")

    def saved(self, module: Any) -> dict[str, Any]:
        """The module's state as part of a checkpoint, with a second one that has the averaged weights.

        Both share the tensors that are not averaged, and the second one those of the callback's state: each is stored
        once.
        """
        found = [pair for pair in self._of_run() if pair[1].steps]
        if not found:
            return {"module": module}
        one, average = next((pair for pair in found if pair[1].validate), found[0])
        averages = {_memory_of(tensor): value for tensor, value in average.averages()}
        state = map_tensors(lambda tensor: averages.get(_memory_of(tensor), tensor), module)
        if state is module:  # get_state() returns copies, or nothing that is averaged
            if average.validate:
                logger.warning(
                    f"get_state() returns none of the tensors that {average.name} averages, so checkpoints hold the"
                    f" average only for resuming; return the tensors themselves, not copies"
                )
            return {"module": module}
        saved = {"key": one.state_key, "validated": average.validate, "stale": average.is_stale, "module": state}
        return {"module": module, "averaged": saved}


def _memory_of(tensor: torch.Tensor) -> object:
    """A value that only tensors with the same memory share."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or not tensor.numel():
        return object()
    return local(tensor).data_ptr(), tensor.dtype, tensor.shape
