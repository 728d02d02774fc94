"""The backlog beside its model, a list."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from events.bus.backlog import Backlog, Item, Payload, item_of
from events.messages import Event, MetricsLogged, NonFiniteLoss, RunEnded, TrainStepEnded

LIMITS = st.integers(1, 12)
PARTS = st.integers(0, 12)
SPARE = st.sampled_from([-1, 0, 0, 1, 2**62])
KINDS = st.sampled_from(
    ["step", "large step", "loss", "ended", "large ended", "x", "y", "xy of a", "yz of a", "x of b"]
)


def item(kind: str, at: int) -> Item:
    """Build ``step``, ``loss``, ``ended`` or metrics; ``xy of a`` are the metrics x and y of the dataloader a."""
    header: Any = ("run", 1, at, 0.0, 0, at, 0, None)
    names, _, key = kind.partition(" of ")
    events: dict[str, Event] = {
        "step": TrainStepEnded(*header),
        "loss": NonFiniteLoss(*header, 1.0, "warned"),
        "ended": RunEnded(*header, "finished"),
    }
    event = events.get(kind.removeprefix("large ")) or MetricsLogged(
        *header, dict.fromkeys(names, float(at)), key or None
    )
    return item_of((event, Payload(nbytes=10_000) if "large" in kind else None))


def size_of(items: list[Item]) -> int:
    return sum(size for _, _, size in items)


class BacklogMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.backlog = Backlog()
        self.model: list[Item] = []
        self.published: list[tuple[Item, dict[str, float]]] = []

    @rule(kinds=st.lists(KINDS, min_size=1, max_size=12))
    def extend(self, kinds: list[str]) -> None:
        items = [item(kind, len(self.published) + at) for at, kind in enumerate(kinds, 1)]
        self.published += [(one, dict(getattr(one[0], "metrics", {}))) for one in items]
        self.backlog.extend(iter(items))
        self.model += items

    @rule(limit=LIMITS, part=PARTS, spare=SPARE)
    def take(self, limit: int, part: int, spare: int) -> None:
        limit_bytes = size_of(self.model[:part]) + spare
        count = 0
        while count < min(limit, len(self.model)) and (not count or size_of(self.model[: count + 1]) <= limit_bytes):
            count += 1
        assert self.backlog.take(limit, limit_bytes) == self.model[:count]
        del self.model[:count]

    @rule(limit=LIMITS, part=PARTS, spare=SPARE, hard_limit=LIMITS, hard_part=PARTS)
    def drop_oldest(self, limit: int, part: int, spare: int, hard_limit: int, hard_part: int) -> None:
        """The oldest that may be dropped go first, the others only beyond the hard limit."""
        kept = [one for one in self.model if not one[0].droppable]
        limit_bytes = size_of(self.model[-part:]) + spare
        hard = max(limit, hard_limit), max(limit_bytes, size_of(kept[:hard_part]) + spare)
        rest, dropped = self.model, []

        def exceeds(most: int, most_bytes: int) -> bool:
            return len(rest) > most or (size_of(rest) > most_bytes and len(rest) > 1)

        for one in list(rest):
            if one[0].droppable and exceeds(limit, limit_bytes):
                dropped.append(one)
                rest.remove(one)
        while exceeds(*hard):
            dropped.append(rest.pop(0))
        assert self.backlog.drop_oldest(limit, limit_bytes, *hard) == dropped

    @rule()
    def conflate(self) -> None:
        """Of each type and key the newest stays, and each metric keeps its last value."""
        newest: dict[Any, Item] = {}
        metrics: dict[Any, dict[str, float]] = {}
        for one in self.model:
            key = (type(one[0]), getattr(one[0], "key", None)) if one[0].droppable else one[0].seq
            newest[key] = one
            metrics[key] = metrics.get(key, {}) | getattr(one[0], "metrics", {})
        gone = [one for one in self.model if one not in newest.values()]
        assert sorted(self.backlog.conflate(), key=lambda one: one[0].seq) == gone
        self.model = sorted(newest.values(), key=lambda one: one[0].seq)
        for key, one in newest.items():
            if isinstance(one[0], MetricsLogged) and one[0].metrics != metrics[key]:
                merged = MetricsLogged("run", 1, one[0].seq, 0.0, 0, one[0].seq, 0, None, metrics[key], one[0].key)
                self.model[self.model.index(one)] = item_of((merged, one[1]))

    @invariant()
    def agrees(self) -> None:
        assert (len(self.backlog), self.backlog.nbytes) == (len(self.model), size_of(self.model))
        assert self.backlog.oldest == (self.model[0][0] if self.model else None)

    def teardown(self) -> None:
        assert self.backlog.take(2**62) == self.model
        assert self.backlog.nbytes == 0
        for (event, _, _), metrics in self.published:  # other subscriptions share them
            assert getattr(event, "metrics", {}) == metrics


TestBacklog = BacklogMachine.TestCase
TestBacklog.settings = settings(deadline=None, max_examples=100, stateful_step_count=20)


@pytest.mark.parametrize("kind", ["step", "loss", "ended", "metrics"])
def test_the_size_of_an_event_is_at_least_the_memory_that_it_takes(kind: str) -> None:
    for names in (1, 3, 100):
        logged = "".join(chr(0x4E00 + number) for number in range(names))
        tracemalloc.start()
        items = [item(logged if kind == "metrics" else kind, at) for at in range(200)]
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert taken <= size_of(items)
    large = item("large " + kind.replace("metrics", "step"), 1)
    assert large[2] - item(kind.replace("metrics", "step"), 1)[2] == 10_000
