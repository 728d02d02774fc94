"""The largest batch that fits in memory."""

from __future__ import annotations

from typing import Any

from events.log import logger
from trainer.arguments import TrainerArguments
from trainer.data.rows import count_rows
from trainer.errors import ArgumentsError, ContractError, EmptyDataLoader
from trainer.module_interface import ModuleInterface, Stage
from trainer.tuning.trial import Tuning, free, out_of_memory, tuning


def find_batch_size(
    module: ModuleInterface,
    arguments: TrainerArguments | None = None,
    *,
    max_size: int | None = None,
    steps: int = 3,
    bisect: bool = True,
) -> int:
    """Find how many rows of a forward and backward pass fit in memory, by training with more and more of them::

        size = find_batch_size(module, arguments)
        arguments = msgspec.structs.replace(arguments, gpu_batch_size_limit=size)

    Each try takes real steps: with the arguments' precision, compilation and optimizers, and with accumulation where a
    step has more rows than the size. It starts with the micro-batch of the arguments, doubles it, halves it if that
    does not fit, and bisects. It catches ``torch.OutOfMemoryError``, MemoryError and torch's errors of a failed
    allocation on the host. Then the module, its gradients, the random generators, and what the module holds are bit for
    bit as before; no run folder is written. The hooks of the module run, no callbacks and no validation. Leave a margin
    if rows differ in size. Waits for the tries. Each rank of `torchrun` tries for itself.

    Args:
        module: Takes ``batch_size`` in ``get_train_dataloader``.
        arguments: How the module will be trained.
        max_size: Maximum rows to try. None: as many as the data has.
        steps: Optimizer steps of each try; the optimizer's state exists after the first.
        bisect: Whether to search between the largest size that fits and the smallest that does not, to a row. False:
            stop at the start times or by a power of two.

    Returns:
        Rows for ``gpu_batch_size_limit``, which keeps ``train_batch_size`` and its mathematics; or for both.

    Raises:
        MemoryError: A batch of one row does not fit.
        ContractError: The dataloader ignores ``batch_size``, or another run trains the module.
        ArgumentsError: An argument is wrong, or ``max_size`` is needed because rows cannot be counted.
    """
    for name, number in (("max_size", max_size), ("steps", steps)):
        if number is not None and (type(number) is not int or number < 1):
            raise ArgumentsError(f"find_batch_size got {name}={number!r}; give an integer >= 1")
    with tuning(module, arguments) as made:
        size = _search(_Trials(made, steps), made.arguments.micro_batch_size, max_size, bisect)
    logger.info(f"find_batch_size: {size} rows fit")
    return size


def _search(trials: _Trials, size: int, most: int | None, bisect: bool) -> int:
    fits, fails = 0, 0  # the largest size that fits, and the smallest that does not; 0: not known
    size = size if most is None else min(size, most)
    while True:
        rows = trials.try_size(size, needs_rows=most is None)
        if rows is None:
            fails = size
        elif rows < size:
            logger.warning(
                f"get_train_dataloader() gives at most {rows} rows for batch_size={size}, which fit; larger batches"
                f" cannot be tried"
            )
            return rows
        else:
            fits = size
        if fits == most or (fails and (fails - fits <= 1 or (fits and not bisect))):
            break
        size = (fits + fails) // 2 if fails else min(2 * fits, most or 2 * fits)
    if not fits:
        raise MemoryError(f"a batch of one row cannot be trained: {trials.problem}; use a smaller model or input")
    return fits


class _Trials:
    def __init__(self, made: Tuning, steps: int) -> None:
        self._made, self._steps = made, steps
        self.problem = ""
        """Why the last size failed."""

    def try_size(self, size: int, *, needs_rows: bool) -> int | None:
        """Rows of the largest batch that was trained with a size; None if it does not fit."""
        made, seen = self._made, [0]
        module, wanted = made.module, made.arguments.train_batch_size
        accumulates = size < wanted and not module.manual_optimization

        def look(_: Any, args: tuple[Any, ...]) -> None:
            stage, _, batch, _ = args
            rows = count_rows(batch, size).rows if stage is Stage.TRAIN else 0
            if rows is None and needs_rows:
                raise ArgumentsError(
                    f"rows of a {type(batch).__name__} cannot be counted; give find_batch_size a max_size"
                )
            rows = size if rows is None else rows
            if rows > size:
                raise ContractError(
                    f"get_train_dataloader() returned a batch of {rows} rows for batch_size={size}; use the given size"
                )
            seen[0] = max(seen[0], rows)

        handle = module.register_forward_pre_hook(look)
        failure: str | None = None
        try:
            # Two micro-batches: in the second, the gradients of the first are in memory, too.
            made.train(self._steps, train_batch_size=2 * size if accumulates else size, gpu_batch_size_limit=size)
        except EmptyDataLoader as error:
            failure = str(error)  # drop_last, and fewer rows than this
        except Exception as error:  # a border: those of an allocation are the result, all others propagate
            failure = out_of_memory(error)
            if failure is None:
                raise
        finally:
            handle.remove()
        if failure is not None:
            self.problem = failure
            free()  # again: the exception had kept it until here
            logger.info(f"find_batch_size: {size} rows do not fit ({failure})")
            return None
        logger.info(f"find_batch_size: {size} rows fit")
        return seen[0]
