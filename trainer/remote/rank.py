"""A process of a launched run as one of several ranks: where they meet, without torchrun.

torch's elastic launcher would start each rank in a session of its own, out of reach of the launching process: a rank
could outlive a launcher that is killed, and its messages would need another way.
"""

from __future__ import annotations

import importlib
import os
import queue
from typing import Any

import msgspec

from events.process import Parent

_stores: list[Any] = []
"""Lives as long as the process: the other ranks use it to the end."""


class Join(msgspec.Struct, frozen=True, tag="join", tag_field="command"):
    """The ranks meet in the store at this port of this machine."""

    port: int


class Serving(msgspec.Struct, frozen=True, tag=True):
    """Rank 0 serves the ranks' store at this port."""

    port: int


def share_cores(processes: int) -> None:
    """Set ``OMP_NUM_THREADS``, unless it is set, to the part of the cores that each of some processes gets."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))


def join_ranks(rank: int, processes: int, parent: Parent, joins: queue.SimpleQueue[Join]) -> None:
    """Set what torchrun sets in the environment of a rank. WAIT: for rank 0, whose process serves the store.

    The port is chosen by the system as the store opens it, so that no other process can take it meanwhile.
    """
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]  # of the launching process, which may be a rank of another job
    share_cores(processes)  # before torch is imported
    distributed: Any = importlib.import_module("torch.distributed")
    if rank == 0:
        store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        _stores.append(store)
        port = store.port
        parent.send(Serving(port))
    else:
        port = joins.get().port
    number, size = str(rank), str(processes)
    os.environ.update(RANK=number, LOCAL_RANK=number, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
