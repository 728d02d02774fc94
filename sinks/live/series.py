"""Curves of a run in bounded memory, for charts, late clients and reports.

Each point of a series has the mean, the smallest and the largest value of several steps. A series with too many points
merges them in pairs, so that the curve of a run of any length fits a screen, and no spike is lost.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import add
from typing import Annotated, TypeVar

import msgspec

from events.bounds import INT_MAX, Count, Int64, NonFinite
from events.messages import Event, TrainStepEnded
from events.metrics import metrics_of

MOST_POINTS = 2_000
"""Maximum points per series; a long one has at least half of them."""
MOST_POINTS_IN_ALL = 250_000
"""Maximum points per run: with many series, each has fewer."""
MOST_SERIES = 2_000
"""Maximum series per run; names are untrusted."""


_Choice = Callable[[float, float], float]
_Value = TypeVar("_Value")
_Points = Annotated[list[_Value], msgspec.Meta(max_length=MOST_POINTS)]
"""Bounded before it is decoded."""


class Series(msgspec.Struct):
    """One curve: column by column, a point after the other.

    Attributes:
        step: The last ``global_step`` in each point.
        time: Unix seconds of that.
        mean: Of the finite values in it; NaN if none is.
        low: The smallest finite value in it; NaN if none is.
        high: The largest one.
        weight: How many values are in it.
        odd: Points in which a value was not finite, in their order: their index, and ``nan``, ``inf`` or ``-inf``.
    """

    step: _Points[Int64] = []
    time: _Points[float] = []
    mean: _Points[float] = []
    low: _Points[float] = []
    high: _Points[float] = []
    weight: _Points[Count] = []
    odd: _Points[tuple[Count, NonFinite]] = []  # a stranger could choose colliding keys of a dict
    width: Count = 1
    """Values per point; a power of two."""
    last: float = math.nan
    """The last value, finite or not."""

    @property
    def count(self) -> int:
        """Total number of values."""
        return sum(self.weight)

    @property
    def is_sound(self) -> bool:
        """Whether its columns are consistent; a stored series may have been altered."""
        length = len(self.step)
        columns: tuple[Sequence[object], ...] = (self.time, self.mean, self.low, self.high, self.weight)
        return (
            all(len(column) == length for column in columns)
            and all(before < after for (before, _), (after, _) in itertools.pairwise(self.odd))
            and (not self.odd or self.odd[-1][0] < length)
            and all(weight > 0 for weight in self.weight)
            and self.count <= INT_MAX
            and self.width > 0
        )

    def extend(self, steps: list[int], times: list[float], values: list[float], most: int = MOST_POINTS) -> None:
        """Add values in order, with a maximum of points. Steps are nearly always in order."""
        begin, count = 0, len(values)
        if count:
            self.last = values[-1]
        while begin < count:
            room = self.width - self.weight[-1] if self.weight else 0
            if room <= 0 and len(self.step) >= most:
                self._halve()
                continue
            end = min(begin + (room if room > 0 else self.width), count)
            self._put(steps[end - 1], times[end - 1], values[begin:end], new=room <= 0)
            begin = end

    def _put(self, step: int, time: float, values: list[float], *, new: bool) -> None:
        """Add a value to the last point, or to a new one."""
        weight, total = len(values), sum(values)
        if math.isfinite(total):
            mean = total / weight
        else:  # one of them is not, or they are so large that their sum is not
            odd = next((value for value in values if not math.isfinite(value)), None)
            if odd is not None:
                self._mark(len(self.step) - (0 if new else 1), _word(odd))
            values = [value for value in values if math.isfinite(value)]
            total = sum(values)
            if values and math.isfinite(total):
                mean = total / len(values)
            else:
                mean = sum(value / len(values) for value in values) if values else math.nan
        low, high = (min(values), max(values)) if values else (math.nan, math.nan)
        if new:
            self.step.append(step)
            self.time.append(time)
            self.mean.append(mean)
            self.low.append(low)
            self.high.append(high)
            self.weight.append(weight)
            return
        self.step[-1], self.time[-1] = step, time
        self.mean[-1] = _mean(self.mean[-1], self.weight[-1], mean, weight)
        self.low[-1] = _pick(min, self.low[-1], low)
        self.high[-1] = _pick(max, self.high[-1], high)
        self.weight[-1] += weight

    def _mark(self, index: int, word: NonFinite) -> None:
        """Record a non-finite value in the newest point."""
        if self.odd and self.odd[-1][0] == index:
            self.odd.pop()
        self.odd.append((index, word))

    def _halve(self) -> None:
        """Merge pairs of points."""
        merged = Series(width=self.width * 2, last=self.last)
        pairs = len(self.step) // 2 * 2
        left, right, rest = slice(0, pairs, 2), slice(1, pairs, 2), slice(pairs, None)
        merged.step = self.step[right] + self.step[rest]
        merged.time = self.time[right] + self.time[rest]
        weights = self.weight[left], self.weight[right]
        merged.weight = [*map(add, *weights), *self.weight[rest]]
        merged.mean = [*map(_mean, self.mean[left], weights[0], self.mean[right], weights[1]), *self.mean[rest]]
        # Only a point with a value that was not finite may be NaN.
        low: _Choice = partial(_pick, min) if self.odd else min
        high: _Choice = partial(_pick, max) if self.odd else max
        merged.low = [*map(low, self.low[left], self.low[right]), *self.low[rest]]
        merged.high = [*map(high, self.high[left], self.high[right]), *self.high[rest]]
        for index, word in self.odd:
            merged._mark(index // 2, word)
        for name in self.__struct_fields__:
            setattr(self, name, getattr(merged, name))


_Column = tuple[list[int], list[float], list[float]]
"""Steps, times and values under a name."""


class SeriesStore(msgspec.Struct):
    """All curves of a run, and their position in its journal."""

    cursor: Count = 0
    """``seq`` of the last event in them."""
    series: Annotated[dict[str, Series], msgspec.Meta(max_length=MOST_SERIES)] = {}
    left_out: Count = 0
    """Values under names beyond `MOST_SERIES`."""

    @property
    def is_sound(self) -> bool:
        """Whether it is within its bounds; stored curves may have been altered."""
        return all(series.is_sound for series in self.series.values())

    def add(self, events: Iterable[Event]) -> None:
        """Add the numbers of events, in order."""
        columns: dict[str, _Column] = {}
        steps: list[TrainStepEnded] = []
        for event in events:
            if event.seq > self.cursor:
                self.cursor = event.seq
            if type(event) is TrainStepEnded:
                steps.append(event)
                continue
            for name, value in points_of(event):
                column = columns.setdefault(name, ([], [], []))
                column[0].append(event.global_step)
                column[1].append(event.time)
                column[2].append(value)
        if steps:
            _add_steps(steps, columns)
        for name in columns:
            if name not in self.series and len(self.series) < MOST_SERIES:
                self.series[name] = Series()
        most = min(MOST_POINTS, MOST_POINTS_IN_ALL // max(1, len(self.series)))
        for name, column in columns.items():
            series = self.series.get(name)
            if series is None:
                self.left_out += len(column[0])
            else:
                series.extend(*column, most)


def _add_steps(steps: list[TrainStepEnded], columns: dict[str, _Column]) -> None:
    """Add the points of steps, which `points_of` has too, column by column: most events of a long journal are steps."""
    numbers, times = [step.global_step for step in steps], [step.time for step in steps]
    named: dict[str, list[float | None]] = {
        "step_s": [step.step_s for step in steps],
        "train_loss": [step.loss for step in steps],
        "lr": [step.lr for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "rows_per_s": [
            step.rows / step.step_s if step.rows is not None and step.step_s > 0 else None for step in steps
        ],
    }
    for name, values in named.items():
        there = [value for value in values if value is not None]
        if len(there) == len(values):
            column = numbers, times, there
        elif there:
            some = [index for index, value in enumerate(values) if value is not None]
            column = [numbers[index] for index in some], [times[index] for index in some], there
        else:
            continue
        logged = columns.get(name)
        if logged is not None:  # the user has a metric of this name: the curve has both
            column = logged[0] + column[0], logged[1] + column[1], logged[2] + column[2]
        columns[name] = column


def points_of(event: Event) -> list[tuple[str, float]]:
    """Return the numbers of an event for charts: its metrics, and the rows per second of a step."""
    found = metrics_of(event)
    if isinstance(event, TrainStepEnded) and event.rows is not None and event.step_s > 0:
        found.append(("rows_per_s", event.rows / event.step_s))
    return found


def thinned(series: Series, most: int) -> Series:
    """Return a series with a maximum of points; the same one if it has no more."""
    thin = copy.copy(series)
    while len(thin.step) > max(1, most):
        thin._halve()  # replaces the columns, which the copy shares
    return thin


def plain(series: Series) -> dict[str, object]:
    """Encode a series for JSON, without NaN and infinities, times in milliseconds.

    ``min`` and ``max`` are left out if each point is one value: they are ``mean`` then.
    """

    def column(values: list[float]) -> Sequence[float | None]:
        # A point is without a finite value only if it has one that is not.
        return values if not series.odd else [value if math.isfinite(value) else None for value in values]

    shown: dict[str, object] = {
        "step": series.step,
        "mean": column(series.mean),
        "time": [round(time, 3) for time in series.time],
        "count": series.count,
        # The mean of the last point is another number, once several values are in it.
        "last": as_json(series.last) if series.step else None,
    }
    if series.width > 1:
        shown |= {"min": column(series.low), "max": column(series.high)}
    if series.odd:
        shown["nonfinite"] = {str(index): word for index, word in series.odd}
    return shown


def as_json(value: float) -> float | NonFinite:
    """Encode a number for JSON: non-finite ones are ``nan``, ``inf`` or ``-inf``."""
    return value if math.isfinite(value) else _word(value)


def _word(value: float) -> NonFinite:
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _mean(first: float, first_weight: int, second: float, second_weight: int) -> float:
    """Return the mean of two points. Non-finite values count in the weights, which is accurate enough."""
    if math.isnan(first) or math.isnan(second):
        return second if math.isnan(first) else first
    # Half of the difference, twice, because the difference may overflow.
    part = (second / 2 - first / 2) * (second_weight / (first_weight + second_weight))
    return first + part + part


def _pick(choose: Callable[[float, float], float], first: float, second: float) -> float:
    if math.isnan(first) or math.isnan(second):
        return second if math.isnan(first) else first
    return choose(first, second)
