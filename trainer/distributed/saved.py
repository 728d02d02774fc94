"""What the ranks tell each other about their checkpoints, through the store of the process group."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec

from events.checkpoint.shards import Begun, Left, Written
from events.checkpoint.snapshot import LazyPart, Part
from events.errors import UnstorableState
from events.log import in_this_run, logger
from events.tracebacks import describe
from trainer.data.tensor_state import part_of
from trainer.distributed.world import World

_KEPT = 4
"""States of a rank that stay in the store: rank 0 writes two checkpoints at a time."""
_WAIT = timedelta(seconds=30)
"""How long rank 0's writer waits for a state, after which the checkpoint lacks it."""


_part = msgspec.msgpack.Decoder(Part | str)


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
        try:
            value: Part | str = part_of(make())
        except UnstorableState as error:  # rank 0 logs it
            value = str(error)
        world.store.set(key, msgspec.msgpack.encode(value))
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
                part = _part.decode(own.get(key))
                if isinstance(part, str):
                    raise UnstorableState(part)
                return part
            except Exception as error:  # a border: the weights are worth more than this
                logger.warning(
                    f"a checkpoint lacks the random generators of rank {rank}, so a run that resumes from it is not"
                    f" exact: {describe(error)}"
                )
                return part_of(None)

        return read


class Mail:
    """The messages of this rank about its sharded checkpoints, and those of the others. On the loop's thread."""

    def __init__(self, world: World) -> None:
        self._rank = world.rank
        self._store = world.store
        self._connections = threading.local()  # a connection waits for one answer at a time
        self._sent: deque[str] = deque()
        self.box = Box(self, "")
        """Of the present checkpoint."""

    def open(self, place: str) -> None:
        """Begin the messages about a checkpoint, which the other ranks name alike."""
        self.box = Box(self, f"save/{place}")

    def send(self, message: Begun | Written | Left) -> None:
        """Send a message about the present checkpoint."""
        self.box.send(message)

    def set(self, checkpoint: str, value: bytes) -> None:
        """Set the message of this rank about a checkpoint. Any thread."""
        key = f"{checkpoint}/{self._rank}"
        self._connection.set(key, value)
        if key not in self._sent:
            self._sent.append(key)
            if len(self._sent) > 2 * _KEPT:
                self._connection.delete_key(self._sent.popleft())

    def get(self, checkpoint: str, rank: int) -> bytes | None:
        """Return the message of a rank about a checkpoint, if there is one. Any thread."""
        key = f"{checkpoint}/{rank}"
        return self._connection.get(key) if self._connection.check([key]) else None

    @property
    def _connection(self) -> Any:
        if (own := getattr(self._connections, "store", None)) is None:
            own = self._connections.store = self._store.clone()
        return own


_messages = msgspec.json.Decoder(Begun | Written | Left)


class Box:
    """See `events.checkpoint.shards.Mailbox`."""

    def __init__(self, mail: Mail, checkpoint: str) -> None:
        self._mail = mail
        self._checkpoint = checkpoint

    def send(self, message: Begun | Written | Left) -> None:
        self._mail.set(self._checkpoint, msgspec.json.encode(message))

    def look(self, rank: int) -> Begun | Written | Left | None:
        data = self._mail.get(self._checkpoint, rank)
        return None if data is None else _messages.decode(data)
