"""Curves in bounded memory: no spike is lost, and what is odd stays visible."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.messages import MetricsLogged, TrainStepEnded
from sinks.live.series import MOST_POINTS, MOST_POINTS_IN_ALL, MOST_SERIES, Series, SeriesStore, plain, points_of


def logged(seq: int, **metrics: float) -> Any:
    return MetricsLogged("demo", 1, seq, float(seq), 0, seq, 0, "train", metrics=metrics)


def fill(values: list[float], pieces: int = 1) -> Series:
    series, size = Series(), max(1, len(values) // pieces)
    for begin in range(0, len(values), size):
        part = values[begin : begin + size]
        steps = list(range(begin, begin + len(part)))
        series.extend(steps, [float(step) for step in steps], part)
    return series


def test_values_that_are_not_finite_are_named_and_do_not_spoil_the_mean() -> None:
    """NaN and infinities in a long series: the point keeps the mean of the others, and says what was there."""
    values = [1.0] * 10_000
    values[4_321], values[9_999] = math.nan, -math.inf
    series = fill(values)
    shown = plain(series)
    assert sorted(word for _, word in series.odd) == ["-inf", "nan"]
    assert set(shown["mean"]) == {1.0}
    assert sorted(shown["nonfinite"].values()) == ["-inf", "nan"]
    assert series.step[int(next(i for i, t in shown["nonfinite"].items() if t == "nan"))] >= 4_321
    assert msgspec.json.decode(msgspec.json.encode(shown)) == shown


def test_a_series_without_a_finite_value_is_null_in_json() -> None:
    """A loss that is NaN from the first step on."""
    shown = plain(fill([math.nan] * 3))
    assert shown["mean"] == [None, None, None]
    assert not {"min", "max"} & set(shown)  # each point is one value
    assert shown["nonfinite"] == {"0": "nan", "1": "nan", "2": "nan"}


@pytest.mark.parametrize("last", [7.5, math.nan, -math.inf])
def test_the_last_value_is_distinct_from_its_point(last: float) -> None:
    """A point of many values has their mean, and the name of what was odd in it; the last value is beside them."""
    shown = plain(fill([math.nan if index % 2 else 1.0 for index in range(3 * MOST_POINTS)] + [1.0, last]))
    assert shown["last"] == (last if math.isfinite(last) else str(last))


def test_numbers_near_the_largest_do_not_become_infinite() -> None:
    """Their sum overflows a float; their mean does not."""
    series = fill([1.7e308] * (3 * MOST_POINTS))
    assert all(mean == pytest.approx(1.7e308) for mean in series.mean)
    opposed = fill([1.7e308, -1.7e308] * (2 * MOST_POINTS))
    assert all(math.isfinite(mean) for mean in opposed.mean)


def test_more_names_than_are_kept_are_counted() -> None:
    """A name that is different at each step fills no memory."""
    store = SeriesStore()
    for seq in range(1, MOST_SERIES + 51):
        store.add([logged(seq, **{f"m{seq}": 1.0})])
    assert len(store.series) == MOST_SERIES
    assert store.left_out == 50


def test_many_series_share_a_bound() -> None:
    """A thousand metrics for thousands of steps take no more than the bound of all."""
    store = SeriesStore()
    for seq in range(1, 1_500):
        store.add([logged(seq, **{f"m{index}": 1.0 for index in range(500)})])
    assert sum(len(series.step) for series in store.series.values()) <= MOST_POINTS_IN_ALL
    assert {series.count for series in store.series.values()} == {1_499}


def test_a_long_series_keeps_extremes_and_counts() -> None:
    """A million values, one spike each way."""
    values = [0.5] * 1_000_000
    values[123_456], values[765_432] = 9.0, -9.0
    series = fill(values, pieces=100)
    assert MOST_POINTS // 2 <= len(series.step) <= MOST_POINTS
    assert max(series.high) == 9.0
    assert min(series.low) == -9.0
    assert (max(plain(series)["max"]), min(plain(series)["min"])) == (9.0, -9.0)
    assert series.count == 1_000_000
    assert series.step[-1] == 999_999
    assert series.last == 0.5


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(2, 20), st.integers(1, 50))
def test_each_point_is_what_its_values_say(values: list[float], most: int, piece: int) -> None:
    """However the values come: each point's mean, extremes and last step are those of a run of values."""
    series = Series()
    for begin in range(0, len(values), piece):
        part = values[begin : begin + piece]
        steps = list(range(begin, begin + len(part)))
        series.extend(steps, [float(s) for s in steps], part, most)
    assert len(series.step) <= most
    begin = 0
    for index, weight in enumerate(series.weight):
        part = values[begin : begin + weight]
        begin += weight
        assert series.mean[index] == pytest.approx(sum(part) / weight, rel=1e-6, abs=1e-3)
        assert (series.low[index], series.high[index], series.step[index]) == (min(part), max(part), begin - 1)
    assert begin == len(values)


def test_it_resumes_from_stored_curves() -> None:
    """Encoded and decoded, it takes further events as if nothing had happened."""
    generator = random.Random(0)
    events = [logged(seq, loss=generator.random()) for seq in range(1, 5_001)]
    whole, part = SeriesStore(), SeriesStore()
    whole.add(events[:3_000])
    whole.add(events[3_000:])
    part.add(events[:3_000])
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(part), type=SeriesStore)
    again.add(events[3_000:])
    assert again == whole
    assert again.cursor == 5_000


NUMBER = st.none() | st.floats()


@given(st.lists(st.tuples(NUMBER, NUMBER, NUMBER, st.none() | st.integers(1, 9), st.floats(0, 1)), max_size=20))
def test_steps_together_are_what_each_is(found: list[Any]) -> None:
    """The quick way for many steps has the names and the numbers of the one way in which numbers are named."""
    events = [
        TrainStepEnded("demo", 1, i, float(i), 0, i, 0, "train", loss=a, lr=b, grad_norm=c, rows=rows, step_s=s)
        for i, (a, b, c, rows, s) in enumerate(found, 1)
    ]
    store, expected = SeriesStore(), dict[str, Series]()
    store.add(events)
    for event in events:
        for name, value in points_of(event):
            expected.setdefault(name, Series()).extend([event.global_step], [event.time], [value])
    assert repr(dict(sorted(store.series.items()))) == repr(dict(sorted(expected.items())))


def test_steps_have_a_throughput() -> None:
    """Rows a second, where rows were counted and time has passed."""
    step = TrainStepEnded("demo", 1, 1, 0.0, 0, 1, 0, "train", loss=1.0, rows=32, step_s=0.5)
    assert dict(points_of(step))["rows_per_s"] == 64.0
    assert "rows_per_s" not in dict(points_of(msgspec.structs.replace(step, step_s=0.0)))
