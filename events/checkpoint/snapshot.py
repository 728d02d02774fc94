"""What the loop hands to the writer of checkpoints: a copy of the state, and who gives it back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import msgspec

from events.checkpoint.manifest import CheckpointName, Metric
from events.checkpoint.tensor_file import TensorInfo

READER = "*"
"""The owner of what has been read of the run's numbers: no observer's name."""
_POLL_S = 0.1  # how often somebody who may never answer is asked whether they still will


class Part(msgspec.Struct, frozen=True):
    """A piece of a checkpoint with files of its own: ``NAME.msgpack``, and ``NAME.safetensors`` if it has tensors."""

    state: bytes
    """What is no tensor (`events.checkpoint.packing`)."""
    tensors: list[tuple[TensorInfo, memoryview]] = []
    """Each with its elements, in memory that nobody changes any more."""
    aliases: dict[str, str] = {}
    """Further names of these tensors."""

    def without_aliases(self) -> Part:
        """The same with each tensor under all of its names, for readers that know of no aliases."""
        known = {info.name: (info, data) for info, data in self.tensors}
        more = []
        for alias, name in self.aliases.items():
            info, data = known[name]
            more.append((msgspec.structs.replace(info, name=alias), data))
        return Part(self.state, [*self.tensors, *more])


class LatePart:
    """A part that somebody else adds, on their own thread, when they have come to this place in the run.

    Args:
        is_given_up: Whether they never will; asked on the waiting thread.
        essential: Whether they are to be waited for as long as they may come.
    """

    def __init__(self, is_given_up: Callable[[], bool] = lambda: False, *, essential: bool = True) -> None:
        self._is_given_up = is_given_up
        self._essential = essential
        self._there = threading.Event()
        self._part: Part | None = None

    def set(self, part: Part) -> None:
        """Add it. Any thread; never waits."""
        self._part = part
        self._there.set()

    def get(self, timeout_s: float) -> Part | None:
        """Wait for it; None if nobody will add it any more.

        Args:
            timeout_s: How long, if it is not essential; None is returned after that, too.
        """
        waited_s = 0.0
        while not self._there.wait(_POLL_S):
            waited_s += _POLL_S
            if self._is_given_up():
                return None
            if not self._essential and waited_s > timeout_s:
                return None
        return self._part


class LazyPart:
    """A part that is made when it is written, on the writer's thread, of what nobody changes any more."""

    def __init__(self, make: Callable[[], Part]) -> None:
        self._make = make

    def get(self, timeout_s: float) -> Part:
        """Make it. Raises what making it raises."""
        return self._make()


class Snapshot:
    """The state of a run between two steps, in memory.

    Args:
        image: The tensor file as it is to be written, from page-aligned memory, filled up to a page's end.
        nbytes: How many bytes of it are the file.
        state: The rest of the state.
        parts: What others add, by the name of their files.
        owners: Which of them an observer is to add, by the observer's name.
        wait: Returns when the copies from the device have arrived; on the writer's thread.
        release: Gives the memory back.
    """

    def __init__(
        self,
        name: CheckpointName,
        *,
        parent: str | None,
        metric: Metric | None,
        image: memoryview,
        nbytes: int,
        state: bytes,
        parts: Mapping[str, LatePart | LazyPart],
        owners: Mapping[str, str],
        wait: Callable[[], None],
        release: Callable[[], None],
    ) -> None:
        self.name = name
        self.parent = parent
        self.metric = metric
        self.nbytes = nbytes
        self.state = state
        self.parts = parts
        self.owners = owners
        self.wait = wait
        self.failed = False
        """Set by the writer when it will not be durable."""
        self.durable = False
        """Set by the writer when it is."""
        self._image: memoryview | None = image
        self._release = release
        self._lock = threading.Lock()

    @property
    def image(self) -> memoryview:
        """See the class. Not to be had after `release`."""
        assert self._image is not None
        return self._image

    def part_of(self, owner: str) -> LatePart | None:
        """The part that somebody is to add; None if nothing is expected of them."""
        part = self.parts.get(self.owners.get(owner, ""))
        return part if isinstance(part, LatePart) else None

    @property
    def released(self) -> bool:
        """Whether the memory was given back."""
        return self._image is None

    def release(self) -> None:
        """Give the memory back. Any thread; may be called twice."""
        with self._lock:
            image, self._image = self._image, None
        if image is not None:
            self._release()
