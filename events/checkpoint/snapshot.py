"""A snapshot of the state, which the loop passes to the writer of checkpoints."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping

import msgspec

from events.checkpoint.manifest import CheckpointName, Metric
from events.checkpoint.shards import RankPart
from events.checkpoint.tensor_file import TensorInfo

READER = "*"
"""Contributor of the numbers that were read back: not an observer's name."""
_POLL_S = 0.1  # seconds between two checks whether the contributor was disabled


class Part(msgspec.Struct, frozen=True):
    """A piece of a checkpoint with files of its own: ``NAME.msgpack``, and ``NAME.safetensors`` if it has tensors."""

    state: bytes
    """Everything but tensors (`events.checkpoint.packing`)."""
    tensors: list[tuple[TensorInfo, memoryview]] = []
    """Each with its elements, in memory that no longer changes."""
    aliases: dict[str, str] = {}
    """Further names of these tensors."""


class LatePart:
    """A part that an observer contributes on its thread, once it has processed every event before the snapshot.

    Args:
        is_disabled: Whether the observer will never contribute; called on the waiting thread.
        essential: Whether to wait without a timeout.
    """

    def __init__(self, is_disabled: Callable[[], bool] = lambda: False, *, essential: bool = True) -> None:
        self._is_disabled = is_disabled
        self._essential = essential
        self._there = threading.Event()
        self._part: Part | None = None

    def set(self, part: Part) -> None:
        """Contribute the part. Any thread; never waits."""
        self._part = part
        self._there.set()

    def get(self, timeout_s: float) -> Part | None:
        """Wait for the part; None if its observer was disabled, or after the timeout.

        Args:
            timeout_s: Maximum seconds, unless the part is essential.
        """
        waited_s = 0.0
        while not self._there.wait(_POLL_S):
            waited_s += _POLL_S
            if self._is_disabled():
                return None
            if not self._essential and waited_s > timeout_s:
                return None
        return self._part


class LazyPart:
    """A part that is created on the writer's thread, from objects that no longer change."""

    def __init__(self, make: Callable[[], Part]) -> None:
        self._make = make

    def get(self, timeout_s: float) -> Part:
        """Create the part; exceptions of that propagate."""
        return self._make()


@dataclasses.dataclass(eq=False)
class Snapshot:
    """The state of a run between two steps, in memory."""

    name: CheckpointName
    _: dataclasses.KW_ONLY
    parent: str | None
    metric: Metric | None
    image: memoryview
    """The tensor file in page-aligned memory, padded to a page's end. Empty after `release`."""
    nbytes: int
    """Bytes of the file without the padding."""
    state: bytes
    """The rest of the state."""
    parts: Mapping[str, LatePart | LazyPart]
    """Contributed parts, by the name of their files."""
    owners: Mapping[str, str]
    """Names of the parts, by contributing observer."""
    rank: RankPart | None = None
    """The part of this rank, if each rank stores its own; on all but rank 0, ``state`` is what the rank has for
    itself."""
    wait: Callable[[], None]
    """Waits for the copies from the device; on the writer's thread."""
    give_back: Callable[[], None]
    """Releases the memory; called once, by `release`."""
    failed: bool = False
    """Set by the writer if the write failed."""
    durable: bool = False
    """Set by the writer once the checkpoint is durable."""
    released: bool = False
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def part_of(self, owner: str) -> LatePart | None:
        """Return the part that an observer must contribute; None without one."""
        part = self.parts.get(self.owners.get(owner, ""))
        return part if isinstance(part, LatePart) else None

    def release(self) -> None:
        """Release the memory. Any thread; may be called twice."""
        with self._lock:
            before, self.released = self.released, True
        if not before:
            self.image = memoryview(b"")
            self.give_back()
