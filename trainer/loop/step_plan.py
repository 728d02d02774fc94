"""How many optimizer steps a run takes, before it takes them: for schedulers and for displays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from trainer.arguments import TrainerArguments
from trainer.data.loaders import ShuffledSampler, loader_length, own_batches


class EpochSize(NamedTuple):
    """The length of an epoch's data, from which that of epochs with other batch sizes follows."""

    batches: int
    micro_batch: int
    """The batch size that the module was given."""
    rows: int | None
    """Rows of the data; None if the module does not batch by the given size and sampler, so that they are a guess."""
    drop_last: bool


class StepPlan:
    """The steps of a run's epochs, by its arguments and the size of its data.

    Args:
        arguments: With the batch sizes of one rank.
        length_of: Returns the micro-batches of an epoch of a rank.
    """

    def __init__(
        self, arguments: TrainerArguments, length_of: Callable[[Iterable[object]], int | None] = loader_length
    ) -> None:
        self._arguments = arguments
        self._length_of = length_of

    @property
    def key(self) -> str:
        """The arguments that decide it, apart from the run's limits: a plan by others is another one."""
        one = self._arguments
        schedule = sorted(one.batch_size_schedule.items())
        sizes = one.train_batch_size, one.gpu_batch_size_limit, schedule, one.batch_size_interval
        return f"{sizes} {one.max_train_steps_per_epoch}"

    def size_of(self, loader: Iterable[object], epoch: int) -> EpochSize | None:
        """The size of an epoch's data; None without a length."""
        batches, micro_batch = self._length_of(loader), self._arguments.micro_batch_of(epoch)
        if batches is None:
            return None
        batcher = getattr(loader, "batch_sampler", None)
        if own_batches(loader, ShuffledSampler) is None or batcher.batch_size != micro_batch:  # type: ignore[union-attr]
            return EpochSize(batches, micro_batch, None, False)
        return EpochSize(batches, micro_batch, len(batcher.sampler), batcher.drop_last)  # type: ignore[union-attr]

    def steps(self, size: EpochSize | None, epoch: int, done: int) -> int | None:
        """Optimizer steps of an epoch that ends with its data; None if unknown.

        Args:
            done: Steps of the run before it.
        """
        arguments, limit = self._arguments, self._arguments.max_train_steps_per_epoch
        if size is None:
            return limit
        left, steps = self._batches(size, epoch), 0
        while left > 0:  # once, or once more for each change within the epoch
            accumulation = arguments.accumulation_of(epoch, done + steps)
            count = -(-left // accumulation)  # the smaller last group is used, too
            change = self._next_change(done + steps) if arguments.batch_size_interval == "step" else None
            if change is not None:
                count = min(count, change - done - steps)
            steps, left = steps + count, left - count * accumulation
        return steps if limit is None else min(steps, limit)

    def run(self, size: EpochSize | None, epoch: int, done: int) -> tuple[int | None, int]:
        """Optimizer steps of the whole run, by every limit, and its epochs; None for a run without a known length.

        Args:
            size: Of the data of each epoch from this one on.
            epoch: Finished epochs.
            done: Their steps.
        """
        limit, most = self._arguments.epoch_limit, self._arguments.max_steps
        if self.steps(size, epoch, done) is None:
            return most, limit or 1
        while (limit is None or epoch < limit) and (most is None or done < most):
            steps = self.steps(size, epoch, done)
            if not steps:
                break
            alike = self._alike(epoch, done, steps)
            counts = [alike] if alike is not None else []
            counts += [limit - epoch] if limit is not None else []
            counts += [-(-(most - done) // steps)] if most is not None else []
            epoch, done = epoch + min(counts), done + min(counts) * steps
        return (done if most is None else min(done, most)), max(1, epoch)

    def numbers(self, size: EpochSize | None, epoch: int, done: int, *, trained: int | None) -> tuple[int, int]:
        """Arguments of `ModuleInterface.get_optimizers_schedulers`: steps per epoch, and epochs.

        Their product is the length of the run, rounded up to whole steps per epoch; 0 steps if it is unknown.

        Args:
            trained: Steps without which to count, because new schedulers begin after them; None: count all.
        """
        total, epochs = self.run(size, epoch, done)
        if total is None:
            return 0, epochs
        if trained is not None:
            total, epochs = max(1, total - trained), max(1, epochs - epoch)
        each = self.steps(size, epoch, done)
        if not self._arguments.batch_size_schedule:  # earlier epochs may have had other limits
            epochs = max(1, -(-total // each)) if each else self._arguments.epoch_limit or 1
        return -(-total // epochs), epochs

    def _batches(self, size: EpochSize, epoch: int) -> int:
        """Micro-batches of an epoch."""
        now = self._arguments.micro_batch_of(epoch)
        if now == size.micro_batch:
            return size.batches
        if size.rows is None:
            return -(-size.batches * size.micro_batch // now)
        return size.rows // now if size.drop_last else -(-size.rows // now)

    def _next_change(self, done: int) -> int | None:
        return min((start for start in self._arguments.batch_size_schedule if start > done), default=None)

    def _alike(self, epoch: int, done: int, steps: int) -> int | None:
        """The number of epochs from this one on that take as many steps; None: all."""
        by_step = self._arguments.batch_size_interval == "step"
        change = self._next_change(done if by_step else epoch)
        if change is None:
            return None
        return max(1, (change - done) // steps) if by_step else change - epoch
