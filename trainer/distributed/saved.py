"""The state of the other ranks in rank 0's checkpoints: random generators, and places in dataloaders."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from events.checkpoint.snapshot import LazyPart, Part
from events.log import in_this_run, logger
from events.tracebacks import describe
from trainer.data.tensor_state import part_of
from trainer.distributed.world import World

_KEPT = 4
"""States of a rank that stay in the store: rank 0 writes two checkpoints at a time."""
_WAIT = timedelta(seconds=30)
"""How long rank 0's writer waits for a state, after which the checkpoint lacks it."""


class RankStates:
    """Sends the state of this rank to rank 0, whose writer waits for it; no loop does.

    Each rank takes a checkpoint at the same places in training, and names its state by the place.

    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._sent: deque[str] = deque()

    def send(self, place: object, make: Callable[[], dict[str, Any]]) -> None:
        """Send this rank's state at a place; nothing on rank 0. One request to the store, which does not wait for
        others."""
        world = self._world
        if world.leads:
            return
        key = f"state/{world.rank}/{place}"
        if key in self._sent:
            return
        world.store.set(key, pickle.dumps(make()))
        self._sent.append(key)
        if len(self._sent) > _KEPT:
            world.store.delete_key(self._sent.popleft())

    def parts(self, place: object) -> dict[str, LazyPart]:
        """Return the parts of a checkpoint that hold the states of the other ranks at a place."""
        return {f"rank-{rank}": LazyPart(self._read(rank, place)) for rank in range(1, self._world.size)}

    def _read(self, rank: int, place: object) -> Callable[[], Part]:
        store, key = self._world.store, f"state/{rank}/{place}"

        @in_this_run
        def read() -> Part:
            try:
                own = store.clone()  # a connection waits for one answer at a time
                own.wait([key], _WAIT)
                # Written by our own process on the other rank.
                return part_of(pickle.loads(own.get(key)))
            except Exception as error:  # a border: the weights are worth more than this
                logger.warning(
                    f"a checkpoint lacks the random generators of rank {rank}, so a run that resumes from it is not"
                    f" exact: {describe(error)}"
                )
                return part_of(None)

        return read
