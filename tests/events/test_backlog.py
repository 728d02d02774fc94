"""The backlog: what goes when it must be made smaller, and what never does."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from events.bus.backlog import Backlog, Item, Payload, item_of
from events.messages import MetricsLogged, NonFiniteLoss, RunEnded, TrainStepEnded

UNLIMITED = 2**62


def item(kind: type[Any], at: int, *fields: Any, nbytes: int = 0, **named: Any) -> Item:
    event = kind("run", 1, at, 0.0, 0, at, 0, None, *fields, **named)
    return item_of((event, Payload(nbytes=nbytes) if nbytes else None))


def step(at: int, nbytes: int = 0) -> Item:
    return item(TrainStepEnded, at, nbytes=nbytes)


def ended(at: int) -> Item:
    return item(RunEnded, at, "finished")


def logged(at: int, key: str | None = None, **metrics: float) -> Item:
    return item(MetricsLogged, at, metrics, key)


def filled(*items: Item) -> Backlog:
    backlog = Backlog()
    backlog.extend(items)
    return backlog


def seqs(items: list[Item]) -> list[int]:
    return [event.seq for event, _, _ in items]


def rest(backlog: Backlog) -> list[Item]:
    return backlog.take(UNLIMITED)


def test_the_oldest_droppable_events_go_first_and_the_others_stay_in_place() -> None:
    """Dropping passes over what must not be dropped and leaves the order as it was."""
    backlog = filled(step(1), ended(2), step(3), step(4), step(5))
    assert seqs(backlog.drop_oldest(3, UNLIMITED, 6, UNLIMITED)) == [1, 3]
    assert seqs(rest(backlog)) == [2, 4, 5]


def test_events_that_must_not_be_dropped_go_only_beyond_the_hard_limit() -> None:
    """The reserve ends somewhere, because memory is bounded whatever is published."""
    backlog = filled(*(ended(at) for at in range(1, 8)), step(8))
    assert seqs(backlog.drop_oldest(3, UNLIMITED, 6, UNLIMITED)) == [8, 1]
    assert seqs(rest(backlog)) == [2, 3, 4, 5, 6, 7]


def test_dropping_counts_bytes_as_well_as_events() -> None:
    """One event with a large payload is as much a reason to drop as many small ones."""
    backlog = filled(step(1, nbytes=10_000), step(2), step(3))
    assert seqs(backlog.drop_oldest(UNLIMITED, 5_000, UNLIMITED, 10_000)) == [1]
    assert backlog.nbytes == sum(size for _, _, size in rest(backlog))


def test_a_batch_ends_where_the_bytes_do_but_is_never_empty() -> None:
    """An event that is larger than any batch may be is still delivered, alone."""
    backlog = filled(step(1, nbytes=10_000), step(2, nbytes=100), step(3, nbytes=100), step(4, nbytes=10_000))
    assert [seqs(backlog.take(10, 5_000)) for _ in range(4)] == [[1], [2, 3], [4], []]


def test_a_batch_passes_from_the_events_set_aside_to_the_others_in_order() -> None:
    """What was set aside by dropping is older than everything else, whatever limits a batch has."""
    backlog = filled(ended(1), step(2), ended(3), step(4), step(5))
    backlog.drop_oldest(4, UNLIMITED, 8, UNLIMITED)
    assert [seqs(backlog.take(2, 8_192)) for _ in range(3)] == [[1, 3], [4, 5], []]


def test_conflating_keeps_the_newest_of_each_type_and_key() -> None:
    """Two validation sets do not hide each other's metrics, and other types have nothing to do with them."""
    backlog = filled(
        logged(1, "a", x=1.0),
        logged(2, "b", x=2.0),
        step(3),
        logged(4, "a", x=4.0),
        item(NonFiniteLoss, 5, 1.0, "warned"),
        step(6),
    )
    assert sorted(seqs(backlog.conflate())) == [1, 3]
    assert seqs(rest(backlog)) == [2, 4, 5, 6]


def test_conflating_does_not_change_events_that_others_share() -> None:
    """The merged metrics are in an event of their own."""
    old, new = logged(1, x=1.0, y=1.0), logged(2, x=2.0)
    backlog = filled(old, new)
    backlog.conflate()
    ((merged, _, _),) = rest(backlog)
    assert isinstance(merged, MetricsLogged)
    assert merged.metrics == {"x": 2.0, "y": 1.0}
    assert merged.seq == 2
    assert new[0].metrics == {"x": 2.0}  # type: ignore[attr-defined]
    assert old[0].metrics == {"x": 1.0, "y": 1.0}  # type: ignore[attr-defined]


ITEMS = st.lists(
    st.one_of(
        st.just("step"),
        st.just("ended"),
        st.tuples(
            st.sampled_from([None, "a"]),
            st.dictionaries(st.sampled_from("xyz"), st.integers(0, 9).map(float), min_size=1),
        ),
    ),
    max_size=40,
)


def build(plan: list[Any]) -> list[Item]:
    items = []
    for at, what in enumerate(plan, 1):
        if isinstance(what, tuple):
            items.append(logged(at, what[0], **what[1]))
        else:
            items.append(step(at) if what == "step" else ended(at))
    return items


def last_values(items: list[Item]) -> dict[tuple[str | None, str], float]:
    values = {}
    for event, _, _ in items:
        if isinstance(event, MetricsLogged):
            for name, value in event.metrics.items():
                values[event.key, name] = value
    return values


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(ITEMS, st.sampled_from(["conflate", "drop", "take"]), st.integers(1, 12)), max_size=6))
def test_whatever_is_done_order_bytes_and_last_values_hold(plan: list[tuple[list[Any], str, int]]) -> None:
    """Nothing is doubled, lost or reordered; every name keeps its last value; the bytes are those of the rest."""
    backlog = Backlog()
    items = build([what for part, _, _ in plan for what in part])
    at = 0
    out: list[Item] = []
    gone: list[Item] = []
    for part, action, limit in plan:
        backlog.extend(items[at : at + len(part)])
        at += len(part)
        if action == "conflate":
            gone += backlog.conflate()
        elif action == "drop":
            gone += backlog.drop_oldest(limit, UNLIMITED, 2 * limit, UNLIMITED)
            assert len(backlog) <= 2 * limit
        else:
            out += backlog.take(limit)
    conflated_only = all(action != "drop" for _, action, _ in plan)
    left = rest(backlog)
    assert backlog.nbytes == 0
    out += left
    assert seqs(out) == sorted(seqs(out))
    assert sorted(seqs(out) + seqs(gone)) == [event.seq for event, _, _ in items]
    if conflated_only:
        assert last_values(out) == last_values(items)
        assert all(event.droppable for event, _, _ in gone)
