"""Dataloaders: the order of their data, their length, their workers, and skipping in them."""

from __future__ import annotations

import contextlib
import hashlib
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
from trainer.errors import DataLoaderError

# ------------------------------------------------------------------------------------------------ samplers


class ShuffledSampler(Sampler[int]):
    """Yields the indices of a data set in an order that (seed, epoch) alone determines.

    `make_train_sampler` makes subclasses of it. It uses a generator of its own, so the order
    depends on no global state and changes none. Iterating it again gives the same order.
    """

    seed: ClassVar[int] = 0
    epoch: ClassVar[int] = 0
    instances: ClassVar[int] = 0
    """How many samplers of this very class were made: 1 once the dataloader uses it."""
    skip: ClassVar[int] = 0
    """How many indices at the beginning are left out, because a run is resumed behind them. The length stays."""
    iterations: ClassVar[int] = 0
    """How often samplers of this very class were iterated, in this process."""

    def __init__(self, data_source: Sized) -> None:
        self.data_source = data_source
        type(self).instances += 1

    def __iter__(self) -> Iterator[int]:
        type(self).iterations += 1
        # Hashed, as seed + epoch would give (0, 1) and (1, 0) the same order.
        digest = hashlib.blake2b(f"{self.seed}:{self.epoch}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
        # On the host, whatever the program's default device is: nothing is waited for.
        order = torch.randperm(len(self.data_source), generator=generator, device="cpu")
        skip, type(self).skip = self.skip, 0  # once: the module may keep its loader for the epochs that follow
        yield from order[skip:].tolist()  # of a host tensor: no device is waited for

    def __len__(self) -> int:
        return len(self.data_source)


def make_train_sampler(
    seed: int, epoch: int | None, base: type[ShuffledSampler] = ShuffledSampler
) -> type[ShuffledSampler]:
    """Make a sampler class for training data; it counts its instances.

    Args:
        epoch: None: that of ``base``, also when it changes there.
    """
    own = {"seed": seed, "instances": 0, "skip": 0, "iterations": 0} | ({} if epoch is None else {"epoch": epoch})
    return type("TrainSampler", (base,), own)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a dataloader and what it takes its indices and rows from which epoch it is, where they have ``set_epoch``.

    torch's `DistributedSampler` has one, and would give each epoch the same order without it.
    """
    for part in _parts_of_loader(loader):
        if callable(method := getattr(part, "set_epoch", None)):
            method(epoch)


def hides_epoch(loader: Any) -> bool:
    """Whether persistent workers have a copy of the data set that `set_epoch` does not reach."""
    dataset = getattr(loader, "dataset", None)
    if not has_live_workers(loader) or not callable(getattr(dataset, "set_epoch", None)):
        return False
    return not any(map(_is_shared, getattr(dataset, "__dict__", {}).values()))  # it may share its epoch with them


def _is_shared(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return bool(value.is_shared())  # type: ignore[no-untyped-call]  # torch's
    return isinstance(value, SynchronizedBase)


def _parts_of_loader(loader: Any) -> list[Any]:
    """A dataloader and what it takes its indices and rows from, each once."""
    batches = getattr(loader, "batch_sampler", None)
    parts = loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)
    return list({id(part): part for part in (*parts, getattr(loader, "dataset", None))}.values())


def data_rows(loader: Any) -> int | None:
    """Rows of a dataloader's data set, or else its batches; None if it has no length."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        return loader_length(loader)
    try:
        return len(dataset)
    except Exception:  # of no use to the dataloader either, which has a sampler of its own then
        return None


def state_of_order(loader: Any) -> torch.Tensor | None:
    """The state of the generator that decides the order of a dataloader of torch's; None if that is unknown."""
    for sampler in _parts_of_loader(loader):
        if isinstance(sampler, _DRAWING):
            return torch.get_rng_state() if sampler.generator is None else sampler.generator.get_state()
    return None


_DRAWING = RandomSampler, SubsetRandomSampler, WeightedRandomSampler


def has_live_workers(loader: Any) -> bool:
    """Whether persistent workers that have read an epoch will read the next one."""
    return keeps_workers(loader) and getattr(loader, "_iterator", None) is not None


def keeps_workers(loader: Any) -> bool:
    """Whether a dataloader is of torch's and has persistent workers."""
    return isinstance(loader, DataLoader) and loader.num_workers > 0 and loader.persistent_workers


def iterate(loader: Any, seed: int | None) -> Iterator[Any]:
    """Iterate a dataloader; one whose persistent workers this process did not start yet, as if it had.

    torch draws the seed of new workers from the loader's generator, and draws none when workers read another epoch.

    Args:
        seed: That of the new workers, if there would be none in a run that was not interrupted; None: it draws one.
    """
    if seed is None or not keeps_workers(loader) or has_live_workers(loader):
        return iter(loader)
    own, loader.generator = loader.generator, torch.Generator("cpu").manual_seed(seed)
    try:
        return iter(loader)
    finally:
        loader.generator = own


def end_iteration(batches: Any, loader: Any) -> None:
    """End the workers of an iteration, whoever still refers to it. Persistent workers belong to their dataloader.

    The frames of an exception refer to it, for example. Without this, a later garbage collection would end the workers,
    on any thread, which waits for each of them.
    """
    if type(loader).__iter__ is DataLoader.__iter__:  # any other may hand out one iterator again and again
        _end_workers(batches)
        if _has_dead_workers(batches):  # they would read no other epoch
            _shut_down(batches)
            loader._iterator = None


def _end_workers(batches: Any) -> None:
    if isinstance(batches, _MultiProcessingDataLoaderIter) and not batches._persistent_workers:
        _shut_down(batches)


def _has_dead_workers(batches: Any) -> bool:
    is_open = isinstance(batches, _MultiProcessingDataLoaderIter) and not batches._shutdown
    return is_open and not all(worker.is_alive() for worker in batches._workers)


def _shut_down(batches: _MultiProcessingDataLoaderIter) -> None:
    if not batches._shutdown:
        # A worker that was killed while it looked at the event has its lock forever, and `_shutdown_workers` waits for
        # it without a limit; whoever lives has it for microseconds. Any process may release it.
        lock: Any = vars(batches._workers_done_event)["_cond"]
        lock.acquire(timeout=_LOCK_S)
        lock.release()
    batches._shutdown_workers()  # what its `__del__` calls; does nothing the second time


_LOCK_S = 1.0


def release_frames(error: BaseException) -> None:
    """Empty the frames behind an exception of a run that is over, but those of the user's own code.

    They hold its dataloaders, batches and graphs for as long as somebody keeps the exception. The user's frames stay
    as they are, for a debugger; only the workers of an iteration that one of their variables holds are ended.
    """
    for one in chain_of(error):
        for frame, _ in traceback.walk_tb(one.__traceback__):
            if is_ours(frame.f_code.co_filename) or frame.f_code.co_filename.startswith(_DATA_FOLDER):
                with contextlib.suppress(RuntimeError):  # it is being executed
                    frame.clear()
            else:
                for value in list(frame.f_locals.values()):
                    _end_workers(value)


_DATA_FOLDER = os.path.dirname(torch.utils.data.__file__)


# ------------------------------------------------------------------------------------------------- loaders


def own_batches(
    loader: Iterable[Any], micro_batch: int, sampler_cls: type[Sampler[int]]
) -> Callable[[int], int] | None:
    """Tell how many indices each batch of a loader is made of, where that is certain.

    Returns:
        A function from a batch's index to its indices (0 beyond the last one), or None: the loader is not torch's,
        does not use a sampler of ``sampler_cls``, or does its batching otherwise than in ``micro_batch`` rows.
    """
    if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, sampler_cls):
        return None
    if type(loader).__iter__ is not DataLoader.__iter__:
        return None
    batches = loader.batch_sampler
    # A subclass may batch in any way it likes, so the very class.
    if type(batches) is not BatchSampler or batches.sampler is not loader.sampler:
        return None
    if batches.batch_size != micro_batch or not isinstance(loader.sampler, Sized):
        return None
    total = len(loader.sampler)
    full, rest = divmod(total, micro_batch)
    count = full + (1 if rest and not batches.drop_last else 0)

    def indices(index: int) -> int:
        return micro_batch if index < full else rest if index < count else 0

    return indices


def loader_length(loader: Iterable[Any]) -> int | None:
    """Batches that a loader says it will yield; None if it does not know."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except Exception as error:
        # It has no __len__, or a loader, dataset or sampler below it has none; not: a None below it has none.
        text = str(error)
        of_torch = isinstance(loader, DataLoader | torch.utils.data.Dataset)
        has_none = of_torch or not hasattr(type(loader), "__len__") or ("has no len()" in text and "None" not in text)
        is_missing = has_none and not text.endswith("cannot be interpreted as an integer")
        if isinstance(error, NotImplementedError) or (isinstance(error, TypeError) and is_missing):
            return None
        # The user's own code: its class must stand beside whatever it raised.
        raise DataLoaderError(
            f"len() of a {type(loader).__name__} failed ({error}); return the number of batches from 0 up, or leave"
            f" __len__ out"
        ) from error


def as_val_loaders(value: Any, what: str = "get_val_dataloaders") -> dict[str, Iterable[Any]]:
    """Bring what a module's method returned into one form: dataloaders by key, in their order.

    Args:
        value: One loader (gets the key ``"default"``), a mapping of them, or None for none.
        what: The method that returned it, for the message.

    Raises:
        DataLoaderError: Something in it is no iterable, or a key is not a string; it says what and where.
    """
    if value is None:
        return {}
    loaders = dict(value) if isinstance(value, Mapping) else {"default": value}
    for key, loader in loaders.items():
        if not isinstance(key, str) or not key:
            raise DataLoaderError(f"{what}() returned the key {key!r:.80}: keys are strings that are not empty")
        if (problem := name_problem(key)) is not None:
            raise DataLoaderError(f"{what}() returned the key {key!r:.80}, which {problem}; use a short, printable one")
        where = f"{what}()[{key!r}]" if isinstance(value, Mapping) else f"{what}()"
        if isinstance(loader, (str, bytes)) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
            raise DataLoaderError(f"{where} returned {loader!r}: it must be a dataloader, or any iterable of batches")
        if isinstance(loader, (list, tuple)) and loader and all(isinstance(one, DataLoader) for one in loader):
            raise DataLoaderError(
                f"{where} returned a {type(loader).__name__} of dataloaders: return a dict, to name them"
            )
    return loaders


def skip_batches(loader: Any, batches: int, micro_batch: int) -> bool:
    """Have a dataloader begin behind its first batches without reading them.

    Returns:
        False if it cannot: it is not torch's, or does not take its indices from the one sampler that we own. Then it is
        as it was.
    """
    if own_batches(loader, micro_batch, ShuffledSampler) is None:
        return False
    sampler_cls = type(loader.sampler)
    if sampler_cls.instances != 1:
        return False  # others take indices from it, too: they would skip as much
    sampler_cls.skip = batches * micro_batch
    return True


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators of their own that a dataloader of torch's, its samplers and its data draw from."""
    found = [getattr(owner, "generator", None) for owner in _parts_of_loader(loader)]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def has_state(loader: Any) -> bool:
    """Whether a dataloader keeps its own position."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))
