"""The processes that train a run together: ranks, process groups, and what rank 0 decides for all of them."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch

from events.tracebacks import describe
from trainer.arguments import TrainerArguments
from trainer.distributed.options import Ddp, Fsdp
from trainer.distributed.sharding import seed_for
from trainer.errors import ArgumentsError, PeerFailed

T = TypeVar("T")

_stores: dict[tuple[str, str], Any] = {}
"""The connections to the launchers' stores, by address: rank 0 may be the server, which must live as long as the
process."""
_opened = 0  # runs of this process so far; each has its own keys in the store


class World:
    """The ranks of a run. `SINGLE` is that of a single process, which needs no torch.distributed.

    Attributes:
        rank: This process, from 0.
        size: Number of processes.
        local_rank: This process among those of its host.
        host: Name of its host.
        strategy: How the model is distributed; None: not at all.
        store: Torch's key-value store for this run and this restart of the processes; None in a single process.
        decisions: A gloo group for what all ranks agree on, used on the loop's thread alone; None in a single process.
        stays: Whether the process groups stay when the run has ended, because the parameters are divided among them.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int | None = None) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.host = socket.gethostname()
        self.strategy: Ddp | Fsdp | None = None
        self.stays = False
        self.store: Any = None
        self.decisions: Any = None
        self._dist: Any = None

    @property
    def data_rank(self) -> int:
        """This process's part of the data."""
        return self.rank

    @property
    def data_size(self) -> int:
        """Number of parts of the data."""
        return self.size

    @property
    def is_distributed(self) -> bool:
        """Whether the ranks exchange gradients: a group of one rank does, too."""
        return self._dist is not None

    @property
    def shards(self) -> bool:
        """Whether each rank has only a part of each parameter."""
        return isinstance(self.strategy, Fsdp)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which has the run's folder, journal and sinks."""
        return not self.rank

    def prefixed(self, prefix: str) -> Any:
        """Return the store, with a prefix for its keys."""
        return self._dist.PrefixStore(prefix, self.store)

    # ---------------------------------------------------------------------------------------- collectives

    def gather(self, value: T) -> list[T]:
        """Return the value of each rank, by rank. WAIT: for all ranks. The thread that uses `decisions` only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._dist.all_gather_object(values, value, group=self.decisions)
        return values

    def collect(self, value: T) -> list[T]:
        """Return the value of each rank on rank 0, and nothing on the others. WAIT: for all ranks."""
        values: list[Any] | None = [None] * self.size if self.leads else None
        self._dist.gather_object(value, values, dst=0, group=self.decisions)
        return values or []

    def share(self, value: T) -> T:
        """Return the value of rank 0. WAIT: for rank 0."""
        if self.size == 1:
            return value
        values = [value]
        self._dist.broadcast_object_list(values, src=0, group=self.decisions)
        return values[0]

    def minimum(self, value: int) -> int:
        """Return the smallest value of any rank. WAIT: for all ranks."""
        if self.size == 1:
            return value
        number = torch.tensor(value, dtype=torch.int64, device="cpu")
        self._dist.all_reduce(number, op=self._dist.ReduceOp.MIN, group=self.decisions)
        return int(number)

    def together(self, what: Callable[[], T]) -> T:
        """Call a function, and return once it has returned on every rank. WAIT: for all ranks.

        Raises:
            PeerFailed: It has raised on a lower rank; names that rank.
            Exception: It has raised here, and on no lower rank: its exception.
        """
        if self.size == 1:
            return what()
        error: Exception | None = None
        results: list[T] = []
        try:
            results.append(what())
        except Exception as raised:  # a border: reported to the other ranks, and raised by the lowest one
            error = raised
        failures = self.gather(None if error is None else (self.host, describe(error)))
        for rank, failure in enumerate(failures):
            if failure is None:
                continue
            if rank == self.rank and error is not None:
                raise error
            raise PeerFailed(f"rank {rank} on {failure[0]}: {failure[1]}", rank=rank)
        return results[0]

    def check_equal(self, what: str, facts: Mapping[str, object]) -> None:
        """Check that facts are the same on all ranks. WAIT: for all ranks.

        Args:
            what: What the ranks must be started with, for the message.

        Raises:
            ArgumentsError: They differ; raised on rank 0, and `PeerFailed` on the others.
        """
        if len(set(self.gather(seed_for(sorted(facts.items()))))) == 1:
            return
        everyone = self.gather((self.host, dict(facts)))

        def check() -> None:
            first = everyone[0][1]
            for rank, (host, others) in enumerate(everyone):
                for name in {**first, **others}:
                    if first.get(name) != others.get(name):
                        raise ArgumentsError(
                            f"{name} is {others.get(name)!r:.200} on rank {rank} ({host}) and {first.get(name)!r:.200}"
                            f" on rank 0; start every rank with the same {what}"
                        )

        self.together(check)


SINGLE = World()
"""A single process."""


def joins_ranks(arguments: TrainerArguments, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a run has other ranks to join, or an error to raise because it has none."""
    return arguments.strategy not in ("auto", "single") or _strategy_of(arguments, environment) is not None


def leads(arguments: TrainerArguments, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one that reports a run: rank 0, or a single process."""
    return not joins_ranks(arguments, environment) or environment.get("RANK", "0") == "0"


@contextlib.contextmanager
def opened(arguments: TrainerArguments, environment: Mapping[str, str] = os.environ) -> Iterator[World]:
    """Join the other ranks for the length of a block. WAIT: until all of them are there.

    Raises:
        ArgumentsError: The arguments do not fit the environment that ``torchrun`` sets.
    """
    strategy = _strategy_of(arguments, environment)
    if strategy is None:
        yield SINGLE
        return
    world = World(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", 0)))
    world.strategy = strategy
    on_cuda = _places(world, arguments)
    dist: Any = importlib.import_module("torch.distributed")
    world._dist = dist
    timeout = timedelta(seconds=arguments.collective_timeout_s)
    joins = not dist.is_initialized()  # else the host's own group is used, and stays
    if joins:
        world.store = _store_of(dist, environment, timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=world.store,
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
        )
    else:
        world.store = dist.distributed_c10d._get_default_store()
    try:
        world.decisions = dist.new_group(backend="gloo", timeout=timeout)
        if not joins:  # an earlier run may have left keys in it
            world.store = dist.PrefixStore(world.share(f"stagecast/{secrets.token_hex(8)}"), world.store)
        world.together(lambda: arguments.of_rank(world.size))
        yield world
    finally:
        world._dist = world.store = None
        if joins and not world.stays:
            world.decisions = None
            dist.destroy_process_group()
        elif world.decisions is not None:
            dist.destroy_process_group(world.decisions)


@atexit.register
def _leave() -> None:
    """Leave the groups that have stayed; those of the host, if it has left them to the end of the process, too."""
    if _opened and (dist := sys.modules.get("torch.distributed")) is not None and dist.is_initialized():
        dist.destroy_process_group()


def _strategy_of(arguments: TrainerArguments, environment: Mapping[str, str]) -> Ddp | Fsdp | None:
    named = arguments.strategy
    if named == "single":
        return None
    missing = [name for name in ("RANK", "WORLD_SIZE") if not environment.get(name, "").isdecimal()]
    if named == "auto":
        return None if missing or int(environment["WORLD_SIZE"]) == 1 else Ddp()
    if missing:
        raise ArgumentsError(
            f"strategy={named!r} needs {' and '.join(missing)} in the environment; start the script with torchrun"
            f" --nproc-per-node=N"
        )
    return Ddp() if named == "ddp" else Fsdp() if named == "fsdp" else named


def _places(world: World, arguments: TrainerArguments) -> bool:
    """Select this rank's device, before any group is made; returns whether it is CUDA's."""
    device = arguments.device
    on_cuda = torch.cuda.is_available() and (device == "auto" or device.partition(":")[0] == "cuda")
    if not on_cuda:
        return False
    count, local = torch.cuda.device_count(), world.local_rank or 0
    if ":" in device and world.size > 1 and device != f"cuda:{local}":
        raise ArgumentsError(f"device={device!r} is not the one of LOCAL_RANK={local}; set it to 'cuda' or 'auto'")
    if ":" not in device and local >= count:
        raise ArgumentsError(
            f"LOCAL_RANK={local} has no device of its own among {count}; start torchrun with --nproc-per-node={count}"
            f" at most, or set device='cpu'"
        )
    torch.cuda.set_device(local if ":" not in device else device)
    return True


def _store_of(dist: Any, environment: Mapping[str, str], timeout: timedelta) -> Any:
    """Connect to the launcher's store, with keys that no earlier life of these processes has used.

    torchrun restarts processes with the same store, in which the addresses of the dead ones remain.
    """
    global _opened
    address = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if address not in _stores:
        rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
        _stores[address] = next(rendezvous.rendezvous("env://", timeout=timeout))[0]
    _opened += 1
    job, restart = environment.get("TORCHELASTIC_RUN_ID", ""), "0"
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # else rank 0 serves it, and each life a new one
        restart = environment.get("TORCHELASTIC_RESTART_COUNT", "0")  # differs between nodes
    return dist.PrefixStore(f"stagecast/{job}/{restart}/{_opened}", _stores[address])
