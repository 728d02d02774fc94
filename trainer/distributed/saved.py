"""What the ranks tell each other about their checkpoints, through the store of the process group."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import msgspec

from events.checkpoint.shards import Begun, Left, Written, outputs_name
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


_PIECE_BYTES = 4 * 2**20
"""Of a value in the store, which takes 8 MiB at most."""
_OUTPUTS_BYTES = 64 * 2**20
"""Maximum bytes of a rank's outputs of an epoch that go through the store, which is in the memory of one host."""

_part = msgspec.msgpack.Decoder(Part | str)
_first_piece = msgspec.msgpack.Decoder(tuple[int, bytes])


class RankStates:
    """Sends the state of this rank to rank 0, whose writer waits for it; no loop does.

    Each rank takes a checkpoint at the same places in training, and names its state by the place.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._sent: dict[str, deque[str]] = {"state": deque(), "outputs": deque()}
        self._sender: ThreadPoolExecutor | None = None

    def send(self, place: object, make: Callable[[], dict[str, Any]], outputs: Callable[[], Part] | None) -> None:
        """Send this rank's state at a place; nothing on rank 0. One request to the store, which does not wait for
        others.

        Args:
            outputs: Returns the outputs that are kept for the end of the epoch, which a thread sends; None without.
        """
        if self._world.leads:
            return
        self._put(self._world.store, "state", place, lambda: part_of(make()))
        if outputs is not None:
            if self._sender is None:
                self._sender = ThreadPoolExecutor(1, "stagecast outputs")
                self._connection = self._world.store.clone()  # a connection waits for one answer at a time
            self._sender.submit(self._put, self._connection, "outputs", place, outputs)

    def _put(self, store: Any, kind: str, place: object, make: Callable[[], Part]) -> None:
        key, sent = f"{kind}/{self._world.rank}/{place}", self._sent[kind]
        if key in sent:
            return
        try:
            value: Part | str = make()
        except Exception as error:  # a border: rank 0 logs it
            value = describe(error)
        data = msgspec.msgpack.encode(value)
        if kind == "outputs" and len(data) > _OUTPUTS_BYTES:
            data = msgspec.msgpack.encode(f"they have {len(data):,} bytes, more than {_OUTPUTS_BYTES:,}")
        pieces = [data[at : at + _PIECE_BYTES] for at in range(0, len(data), _PIECE_BYTES)]
        for number, piece in enumerate(pieces[1:], 1):
            store.set(f"{key}/{number}", piece)
        store.set(key, msgspec.msgpack.encode((len(pieces), pieces[0])))
        sent.append(key)
        if len(sent) > _KEPT:
            old = sent.popleft()
            for number in range(1, _first_piece.decode(store.get(old))[0]):
                store.delete_key(f"{old}/{number}")
            store.delete_key(old)

    def release(self) -> None:
        """Send what is left, at the end of the run."""
        if self._sender is not None:
            self._sender.shutdown()

    def parts(self, place: object, *, outputs: bool) -> dict[str, LazyPart]:
        """Return the parts of a checkpoint that hold the states of the other ranks at a place.

        Args:
            outputs: Whether they send outputs, too.
        """
        others = range(1, self._world.size)
        parts = {f"rank-{rank}": LazyPart(self._read("state", rank, place, _LACKS_STATE)) for rank in others}
        if outputs:
            parts |= {
                outputs_name(rank): LazyPart(self._read("outputs", rank, place, _LACKS_OUTPUTS)) for rank in others
            }
        return parts

    def _read(self, kind: str, rank: int, place: object, lacks: str) -> Callable[[], Part]:
        store, key = self._world.store, f"{kind}/{rank}/{place}"

        @in_this_run
        def read() -> Part:
            try:
                own = store.clone()  # a connection waits for one answer at a time
                own.wait([key], _WAIT)
                count, first = _first_piece.decode(own.get(key))
                part = _part.decode(b"".join([first, *(own.get(f"{key}/{number}") for number in range(1, count))]))
                if isinstance(part, str):
                    raise UnstorableState(part)
                return part
            except Exception as error:  # a border: the weights are worth more than this
                logger.warning(f"a checkpoint lacks {lacks.format(rank=rank)}: {describe(error)}")
                return part_of(None)

        return read


_LACKS_STATE = "the random generators of rank {rank}, so a run that resumes from it is not exact"
_LACKS_OUTPUTS = (
    "the outputs of rank {rank} for the end of the epoch, so on_end_train_epoch of a run that resumes from it does not"
    " receive them"
)


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
