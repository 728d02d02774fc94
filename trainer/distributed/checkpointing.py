"""Takes the checkpoints of several ranks. On the loop's thread; no rank waits for another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from events.bus.fence import Fence
from events.checkpoint.settings import Checkpoints
from events.checkpoint.shards import Left, RankPart, outputs_name
from events.checkpoint.snapshot import LatePart, LazyPart
from trainer.checkpoint.sharded import RankCollected
from trainer.data.tensor_state import Collected
from trainer.distributed.saved import Mail, RankStates
from trainer.loop.attempt import Attempt
from trainer.loop.checkpointing import Checkpointing
from trainer.loop.run_state import rank_state


def checkpointing_of(attempt: Attempt, settings: Checkpoints | None) -> Checkpointing:
    """Return what takes the checkpoints of the ranks of a run."""
    return (ShardedCheckpointing if attempt.world.shards else ReplicatedCheckpointing)(attempt, settings)


class ReplicatedCheckpointing(Checkpointing):
    """Rank 0 takes the checkpoints; the others send it what they have for themselves."""

    def __init__(self, attempt: Attempt, settings: Checkpoints | None) -> None:
        super().__init__(attempt, settings)
        self._ranks = RankStates(attempt.world)

    @property
    def _copies(self) -> bool:
        return self._attempt.world.leads

    def take(self, reasons: list[str], command_ids: Iterable[str] = (), *, must: bool = False) -> Fence | None:
        if self.settings is None:
            return None
        self._ranks.send(self._place, lambda: rank_state(self._attempt, self.position, self.loader), self._kept)
        if self._copies:
            return super().take(reasons, command_ids, must=must)
        self._follow()
        return None

    def _parts(self) -> tuple[dict[str, LatePart | LazyPart], dict[str, str]]:
        parts, owners = super()._parts()
        return parts | self._ranks.parts(self._place, outputs=self._kept is not None), owners

    def release(self) -> None:
        super().release()
        self._ranks.release()


class ShardedCheckpointing(Checkpointing):
    """Each rank copies its own part at the same places; their writers make one checkpoint of them."""

    def __init__(self, attempt: Attempt, settings: Checkpoints | None) -> None:
        super().__init__(attempt, settings)
        self._mail = Mail(attempt.world)
        self._taken_here: tuple[tuple[Any, ...], int] = (), 0

    def take(self, reasons: list[str], command_ids: Iterable[str] = (), *, must: bool = False) -> Fence | None:
        place, times = self._taken_here
        self._taken_here = self._place, times + 1 if place == self._place else 1
        self._mail.open(f"{self._taken_here}")
        return super().take(reasons, command_ids, must=must)

    def _leave(self, error: str) -> None:
        with contextlib.suppress(RuntimeError):  # the ranks cannot reach each other: the run ends
            self._mail.send(Left(error))

    def _collected(self, tree: object) -> Collected:
        world = self._attempt.world
        own = rank_state(self._attempt, self.position, self.loader) if world.rank else None
        return RankCollected(tree, world.rank, own)

    def _part_of_rank(self, collected: Collected) -> RankPart:
        assert isinstance(collected, RankCollected)
        world = self._attempt.world
        return RankPart(world.rank, world.size, collected.chunks, collected.aliases, self._mail.box)

    def _parts(self) -> tuple[dict[str, LatePart | LazyPart], dict[str, str]]:
        parts, owners = super()._parts()
        if self._attempt.world.leads:
            return parts, owners
        own = outputs_name(self._attempt.world.rank)
        return {name: part for name, part in parts.items() if name == own}, {}

    @property
    def _is_taken(self) -> bool:
        # WAIT: for rank 0, at the end of training or at a stop: its writer knows which checkpoints have failed.
        return self._attempt.world.share(super()._is_taken)
