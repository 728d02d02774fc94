"""Dataloaders: samplers, lengths, workers, and skipping on resume."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from multiprocessing.sharedctypes import SynchronizedBase
from typing import Any, ClassVar

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data import SequentialSampler as SequentialSampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from events.text import name_problem
from events.tracebacks import chain_of, is_ours
from trainer.distributed.sharding import WHOLE, Shard, seed_for
from trainer.errors import DataLoaderError

# ------------------------------------------------------------------------------------------------ samplers


class ShuffledSampler(Sampler[int]):
    """Yields the indices of a data set in an order that (seed, epoch) alone determines.

    `make_train_sampler` creates subclasses. The order comes from a generator of its own: global state neither
    influences it nor changes. Iterating it again yields the same order.
    """

    seed: ClassVar[int] = 0
    epoch: ClassVar[int] = 0
    instances: ClassVar[int] = 0
    """Number of instances of this class: 1 once the dataloader uses it."""
    skip: ClassVar[int] = 0
    """Number of leading indices to skip, because a resumed run has used them. The length does not change."""
    iterations: ClassVar[int] = 0
    """Number of iterations over instances of this class, in this process."""
    shard: ClassVar[Shard] = WHOLE
    """This rank's part of the order."""
    drops: ClassVar[int] = 0
    """Number of rows at the end of the order that the dataloader drops, on any rank."""

    def __init__(self, data_source: Sized) -> None:
        self.data_source = data_source
        type(self).instances += 1

    def __iter__(self) -> Iterator[int]:
        type(self).iterations += 1
        # Hashed, because seed + epoch would give (0, 1) and (1, 0) the same order.
        generator = torch.Generator("cpu").manual_seed(seed_for(self.seed, self.epoch))
        # On the host, not the program's default device: `tolist` and the step must not wait for a device.
        order = torch.randperm(len(self.data_source), generator=generator, device="cpu")
        skip, type(self).skip = self.skip, 0  # once, because the module may keep its loader for later epochs
        yield from self.shard.take(order[skip : len(order) - self.drops].tolist())

    def __len__(self) -> int:
        return self.shard.length(self.rows)

    @property
    def rows(self) -> int:
        """Rows of the whole order, over all ranks."""
        return len(self.data_source) - self.drops


class ShardedSampler(torch.utils.data.SequentialSampler):
    """Yields this rank's part of the indices of a data set, in their order."""

    shard: ClassVar[Shard] = WHOLE
    drops: ClassVar[int] = 0

    def __iter__(self) -> Iterator[int]:
        return iter(self.shard.take(range(self.rows)))

    def __len__(self) -> int:
        return self.shard.length(self.rows)

    @property
    def rows(self) -> int:
        """Rows of the whole order, over all ranks."""
        return len(self.data_source) - self.drops


def sequential_sampler(shard: Shard) -> type[Sampler[int]]:
    """Return the sampler class for validation and test data."""
    if shard.world_size == 1:
        return torch.utils.data.SequentialSampler
    return type("ShardedSampler", (ShardedSampler,), {"shard": shard})


def make_train_sampler(
    seed: int, epoch: int | None, base: type[ShuffledSampler] = ShuffledSampler, shard: Shard = WHOLE
) -> type[ShuffledSampler]:
    """Create a sampler class for training data; ``epoch=None`` follows ``base.epoch``."""
    own: dict[str, Any] = {"seed": seed, "instances": 0, "skip": 0, "iterations": 0, "shard": shard, "drops": 0}
    own |= {} if epoch is None else {"epoch": epoch}
    return type("TrainSampler", (base,), own)


def set_epoch(loader: object, epoch: int) -> None:
    """Call ``set_epoch`` of a dataloader, its samplers and its data set, where they define it.

    torch's `DistributedSampler` does, and would otherwise yield the same order in each epoch.
    """
    for part in _parts_of_loader(loader):
        if callable(method := getattr(part, "set_epoch", None)):
            method(epoch)


def hides_epoch(loader: object) -> bool:
    """Whether persistent workers have a copy of the data set that `set_epoch` does not reach."""
    dataset = getattr(loader, "dataset", None)
    if not has_live_workers(loader) or not callable(getattr(dataset, "set_epoch", None)):
        return False
    return not any(map(_is_shared, getattr(dataset, "__dict__", {}).values()))  # shared memory does reach them


def _is_shared(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return bool(value.is_shared())  # type: ignore[no-untyped-call]  # torch's
    return isinstance(value, SynchronizedBase)


def _parts_of_loader(loader: object) -> list[object]:
    """A dataloader, its samplers and its data set, each once."""
    batches = getattr(loader, "batch_sampler", None)
    parts = loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)
    return list({id(part): part for part in (*parts, getattr(loader, "dataset", None))}.values())


def data_rows(loader: Iterable[object]) -> int | None:
    """Rows of a dataloader's data set, or its batches if it has no data set; None without a length."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        return loader_length(loader)
    try:
        return len(dataset)
    except Exception:  # a dataloader with a sampler of its own does not need the length
        return None


def state_of_order(loader: object) -> torch.Tensor | None:
    """The state of the generator behind the order of a torch dataloader; None if unknown."""
    for sampler in _parts_of_loader(loader):
        if isinstance(sampler, _DRAWING):
            return torch.get_rng_state() if sampler.generator is None else sampler.generator.get_state()
    return None


_DRAWING = RandomSampler, SubsetRandomSampler, WeightedRandomSampler


def has_live_workers(loader: object) -> bool:
    """Whether a dataloader has persistent workers that are already running."""
    return keeps_workers(loader) and getattr(loader, "_iterator", None) is not None


def keeps_workers(loader: object) -> bool:
    """Whether a torch dataloader uses persistent workers."""
    return isinstance(loader, DataLoader) and loader.num_workers > 0 and loader.persistent_workers


def iterate(loader: Any, seed: int | None) -> Iterator[Any]:
    """Iterate a dataloader without drawing a seed for persistent workers that a resumed run has to start again.

    torch draws the seed of new workers from the loader's generator, and draws none when workers read another epoch.

    Args:
        seed: The seed of the new workers, if an uninterrupted run would not start any here; None: the loader draws it.
    """
    if seed is None or not keeps_workers(loader) or has_live_workers(loader):
        return iter(loader)
    own, loader.generator = loader.generator, torch.Generator("cpu").manual_seed(seed)
    try:
        return iter(loader)
    finally:
        loader.generator = own


def end_iteration(batches: object, loader: object) -> None:
    """Stop the workers of an iteration, even if it is still referenced. Persistent workers keep running.

    The frames of an exception may reference the iteration. A later garbage collection would then stop the workers, on
    any thread, and wait for each of them.
    """
    # Another __iter__ may return the same iterator each time.
    if isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__:
        _end_workers(batches)
        if not isinstance(batches, _MultiProcessingDataLoaderIter) or batches._shutdown:
            return
        if not all(worker.is_alive() for worker in batches._workers):  # the next epoch needs new ones
            _shut_down(batches)
            loader._iterator = None


def _end_workers(batches: object) -> None:
    if isinstance(batches, _MultiProcessingDataLoaderIter) and not batches._persistent_workers:
        _shut_down(batches)


def _shut_down(batches: _MultiProcessingDataLoaderIter) -> None:
    if not batches._shutdown:
        # A worker that was killed while it read the event holds its lock forever, and `_shutdown_workers` waits for it
        # without a limit; a live worker holds it for microseconds. Any process may release it.
        lock: Any = vars(batches._workers_done_event)["_cond"]
        lock.acquire(timeout=_LOCK_S)
        lock.release()
    batches._shutdown_workers()  # idempotent; `__del__` calls it, too
    for worker in batches._workers:
        if worker.is_alive():  # it hangs, and ignores SIGTERM during a run of several ranks
            worker.kill()


_LOCK_S = 1.0


def release_frames(error: BaseException) -> None:
    """Clear the frames of an ended run's exception, except those of the user's own code.

    They hold dataloaders, batches and graphs for as long as the exception is referenced. The user's frames stay for a
    debugger; only the dataloader workers that their variables reference are stopped.
    """
    for one in chain_of(error):
        for frame, _ in traceback.walk_tb(one.__traceback__):
            if is_ours(frame.f_code.co_filename) or frame.f_code.co_filename.startswith(_DATA_FOLDER):
                with contextlib.suppress(RuntimeError):  # the frame is executing
                    frame.clear()
            else:
                for value in list(frame.f_locals.values()):
                    _end_workers(value)


_DATA_FOLDER = os.path.dirname(torch.utils.data.__file__)


# ------------------------------------------------------------------------------------------------- loaders


def own_batches(loader: Iterable[object], sampler_cls: type[Sampler[int]]) -> Callable[[int], int] | None:
    """Compute the number of indices in each batch of a loader, if it is certain.

    Returns:
        A function from a batch's index to its number of indices (0 beyond the last one); None if the loader is not
        torch's, uses another sampler than ``sampler_cls``, or batches in a way of its own.
    """
    if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, sampler_cls):
        return None
    if type(loader).__iter__ is not DataLoader.__iter__:
        return None
    batches = loader.batch_sampler
    # Not a subclass, which may batch in another way.
    if type(batches) is not BatchSampler or batches.sampler is not loader.sampler:
        return None
    if not isinstance(loader.sampler, Sized):
        return None
    total, micro_batch = len(loader.sampler), batches.batch_size
    full, rest = divmod(total, micro_batch)
    count = full + (1 if rest and not batches.drop_last else 0)

    def indices(index: int) -> int:
        return micro_batch if index < full else rest if index < count else 0

    return indices


def batch_rows(loader: object, given: int) -> int:
    """Rows of a dataloader's whole batches; ``given``, which the module was asked for, if it is not torch's."""
    own = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return own if isinstance(own, int) and own > 0 else given


def fit_shard(loader: Any, sampler_cls: type[ShuffledSampler] | type[ShardedSampler]) -> None:
    """Let a sampler that is shared among ranks know the batches of its dataloader: their rows, and those that it drops
    at the end, of all ranks and not of one."""
    if own_batches(loader, sampler_cls) is not None:
        used, batches = type(loader.sampler), loader.batch_sampler
        used.shard = used.shard._replace(block=batches.batch_size)
        used.drops = len(loader.sampler.data_source) % batches.batch_size if batches.drop_last else 0


def loader_length(loader: Iterable[object]) -> int | None:
    """``len()`` of a loader in batches; None if it has no length."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except Exception as error:
        # Missing: the loader, or a loader, dataset or sampler in it, has no __len__. A None in it is an error.
        text = str(error)
        of_torch = isinstance(loader, DataLoader | torch.utils.data.Dataset)
        has_none = of_torch or not hasattr(type(loader), "__len__") or ("has no len()" in text and "None" not in text)
        is_missing = has_none and not text.endswith("cannot be interpreted as an integer")
        if isinstance(error, NotImplementedError) or (isinstance(error, TypeError) and is_missing):
            return None
        raise DataLoaderError(
            f"len() of a {type(loader).__name__} failed ({error}); return the number of batches, or remove __len__"
        ) from error


def as_val_loaders(value: object, what: str = "get_val_dataloaders") -> dict[str, Iterable[Any]]:
    """Convert the return value of a module's method into dataloaders by key, in their order.

    Args:
        value: One loader (with the key ``"default"``), a mapping of them, or None for none.
        what: The method that returned it, for the message.

    Raises:
        DataLoaderError: A value is not iterable, or a key is not a short, printable string.
    """
    if value is None:
        return {}
    loaders: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"default": value}
    for key, loader in loaders.items():
        if not isinstance(key, str) or not key:
            raise DataLoaderError(f"{what}() returned the key {key!r:.80}; use a string that is not empty")
        if (problem := name_problem(key)) is not None:
            raise DataLoaderError(f"{what}() returned the key {key!r:.80}, which {problem}; use a short, printable one")
        where = f"{what}()[{key!r}]" if isinstance(value, Mapping) else f"{what}()"
        if isinstance(loader, (str, bytes)) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
            raise DataLoaderError(f"{where} returned {loader!r}; return a dataloader or another iterable of batches")
        if isinstance(loader, (list, tuple)) and loader and all(isinstance(one, DataLoader) for one in loader):
            raise DataLoaderError(f"{where} returned a {type(loader).__name__} of dataloaders; return a dict of them")
    return loaders


def skip_batches(loader: Any, batches: int) -> bool:
    """Start a dataloader after its first batches, of each rank, without reading them.

    Returns:
        False if impossible: the loader is not torch's, or uses another sampler than the trainer's; it is unchanged.
    """
    if own_batches(loader, ShuffledSampler) is None:
        return False
    sampler_cls = type(loader.sampler)
    if sampler_cls.instances != 1:
        return False  # other loaders share the class, and would skip, too
    sampler_cls.skip = batches * loader.batch_sampler.batch_size * sampler_cls.shard.world_size
    return True


def generators_of(loader: object) -> list[torch.Generator]:
    """The generators of a torch dataloader, its samplers and its data set."""
    found = [getattr(owner, "generator", None) for owner in _parts_of_loader(loader)]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def has_state(loader: object) -> bool:
    """Whether a dataloader saves and restores its own position."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))
