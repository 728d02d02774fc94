"""The file of a report: the page, its modules and its runs, compressed; the browser unpacks them."""

from __future__ import annotations

import base64
import gzip
import itertools
import math
import sys
from array import array
from collections.abc import Callable, Sequence
from operator import sub
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from events.table.entry import MetricSummary, RunEntry
from sinks.live.embedded import UNPACK, inert, library, modules, page_without_scripts
from sinks.live.frames import encode
from sinks.live.series import Series, plain, thinned
from sinks.live.view import LogEntry

MOST_BYTES = 1_000_000
"""Maximum bytes of a report without its media; its curves have at least half of them."""
_NEXT = b'</script>\n<script type="text/plain" id="values">'


class Detail(NamedTuple):
    """How much of its curves and logs a report has; None for all."""

    points: int | None
    """Maximum points per curve."""
    scale: int | None
    """Steps per interquartile range of a curve to which its values are rounded."""
    lines: int | None
    """Maximum lines per log."""


_DETAILS = (
    Detail(None, None, None),
    Detail(2_000, 100_000, None),
    Detail(1_000, 10_000, 500),
    Detail(500, 1_000, 300),
    Detail(500, 400, 300),
    Detail(250, 1_000, 200),
    Detail(125, 1_000, 100),
    Detail(64, 1_000, 50),
    Detail(32, 1_000, 25),
    Detail(16, 1_000, 10),
)
_TIME_SCALE = 10_000
_MOST_SPREADS = 3
"""Maximum runs whose merged points keep their lowest and highest value: charts draw them for no more curves."""


class ReportRun(NamedTuple):
    """A run of a report."""

    entry: RunEntry
    snapshot: dict[str, Any]
    """The first message to a client, without ``series`` and ``log``."""
    curves: dict[str, Series]
    log: list[LogEntry]
    points: int
    """Of the longest curve on the page of the run."""


def document(
    data: dict[str, Any], media: dict[str, str], runs: Sequence[ReportRun], *, full: bool
) -> tuple[bytes, list[str]]:
    """Return the file, with as much of the curves and logs as fits, or all if ``full``; and sentences on what it lacks.

    Args:
        data: The members of the report beside its runs.
        media: Images, sounds and tables by their address on the page, as data addresses.
    """
    report = data | {"runs": [run.snapshot for run in runs]}
    packed = _packed(encode({"library": library(), "modules": modules(), "report": report}))
    shown = inert(msgspec.json.encode(media).decode("utf-8", "replace"))
    head, tail = _page(packed, shown)
    room = max(MOST_BYTES - len(head) - len(tail) + len(shown), MOST_BYTES // 2)
    curves, notices = _fitting(runs, room, full=full)
    return head + curves + tail, notices


def _fitting(runs: Sequence[ReportRun], room: int, *, full: bool) -> tuple[bytes, list[str]]:
    """Return the most detailed curves that fit, and sentences on what they lack."""
    values = sum(len(one.step) for run in runs for one in run.curves.values())
    for detail in _DETAILS[:0] if full else _DETAILS[:-1]:
        if values <= (1 if detail.points is None else 8) * room:  # others are not packed in vain
            curves, notices = _pack(runs, detail)
            if len(curves) <= room:
                return curves, notices
    return _pack(runs, _DETAILS[0 if full else -1])


def _pack(runs: Sequence[ReportRun], detail: Detail) -> tuple[bytes, list[str]]:
    packing = Packing(runs, detail)
    notices = _notices(runs, detail, packing.most)
    shown: dict[str, object] = {"columns": packing.steps, "times": packing.times, "runs": packing.runs}
    return _packed(encode(shown | {"notices": notices})) + _NEXT + _packed(bytes(packing.data)), notices


def _notices(runs: Sequence[ReportRun], detail: Detail, points: int) -> list[str]:
    found = []
    if any(run.points > points for run in runs):
        found.append(f"curves have at most {points:,} points each, to fit 1 MB; --full keeps all")
    if detail.lines is not None and any(len(run.log) > detail.lines for run in runs):
        found.append(f"logs have their newest {detail.lines:,} lines, to fit 1 MB; --full keeps all")
    return found


class Packing:
    """Curves as JSON, and their rounded values as bytes.

    The columns of steps and times, which many curves share, are numbered. A rounded column is 32-bit integers, each
    the difference from the one before it (zigzag), first all low bytes, then the next ones: so they compress well.
    """

    def __init__(self, runs: Sequence[ReportRun], detail: Detail) -> None:
        self.steps: list[list[int]] = []
        self.times: list[Any] = []
        self.runs: list[dict[str, object]] = []
        self.data = bytearray()
        self.most = 0
        """Points of the longest curve."""
        self._numbers: dict[tuple[int, tuple[float, ...]], int] = {}
        self._detail = detail
        self._has_spreads = len(runs) <= _MOST_SPREADS
        for run in runs:
            series = {name: self._add(one, run.entry.metrics.get(name)) for name, one in run.curves.items()}
            self.runs.append({"series": series, "log": run.log[-(detail.lines or len(run.log)) :]})

    def _add(self, series: Series, metric: MetricSummary | None) -> dict[str, object]:
        points, scale, _ = self._detail
        if points is not None:
            series = thinned(series, points)
        self.most = max(self.most, len(series.step))
        shown = plain(series)
        shown["step"] = self._number(series.step, self.steps, lambda: series.step)
        rounding = None if scale is None else Rounding.of(series.mean, scale)
        if rounding is not None:
            mean = rounding.steps_of(series.mean)
            columns = [mean]
            if self._has_spreads and series.width > 1:
                low, high = rounding.steps_of(series.low), rounding.steps_of(series.high)
                columns += [list(map(sub, mean, low)), list(map(sub, high, mean))]
            shown |= {"mean": self._put(rounding, columns, [i for i, one in enumerate(series.mean) if one != one])}
            shown.pop("min", None)
            shown.pop("max", None)
        shown["time"] = self._number(series.time, self.times, lambda: self._time(series.time))
        if metric is not None and math.isfinite(metric.low):
            shown["ends"] = [metric.low, metric.low_step, metric.high, metric.high_step]
        return shown

    def _number(self, column: Sequence[float], columns: list[Any], make: Callable[[], Any]) -> int:
        """Return the number of a column, which is added to ``columns`` if it is new."""
        key = id(columns), tuple(column)
        if key not in self._numbers:
            self._numbers[key] = len(columns)
            columns.append(make())
        return self._numbers[key]

    def _time(self, column: list[float]) -> object:
        scale = self._detail.scale
        rounding = None if scale is None else Rounding.of(column, max(_TIME_SCALE, scale))
        if rounding is None:
            return [round(time, 3) for time in column]
        return self._put(rounding, [rounding.steps_of(column)], [])

    def _put(self, rounding: Rounding, columns: list[list[int]], gaps: list[int]) -> dict[str, object]:
        """Add rounded columns to the bytes; return how they are read."""
        at, length = len(self.data), len(columns[0])
        for column in columns:
            changes = [now - before for before, now in itertools.pairwise([0, *column])]
            data = array("I", [2 * one if one >= 0 else -2 * one - 1 for one in changes])
            if sys.byteorder == "big":
                data.byteswap()
            flat = data.tobytes()
            for byte in range(4):
                self.data += flat[byte::4]
        return {"at": at, "length": length, "columns": len(columns), "gaps": gaps, **rounding._asdict()}


class Rounding(NamedTuple):
    """Rounds values near the middle of a column to steps of equal size, and those far from it by their distance."""

    middle: float
    size: float
    scale: int

    @classmethod
    def of(cls, column: Sequence[float], scale: int) -> Rounding | None:
        """Return the rounding of a column; None if it has no finite value, or far too distant ones."""
        there = sorted(value for value in column if math.isfinite(value))
        if not there:
            return None
        first, middle, third = (there[share * (len(there) - 1) // 4] for share in (1, 2, 3))
        spread = there[-1] - there[0]
        size = (third - first) or spread or 1.0
        return cls(middle, size, scale) if spread / size < 1e100 else None

    def steps_of(self, column: Sequence[float]) -> list[int]:
        """Return the steps from the middle; 0 for values that are not finite."""
        middle, size, scale = self
        most = sys.float_info.max  # the lowest and highest values of points may be much farther away than the means
        ratios = (max(-most, min((value - middle) / size, most)) if math.isfinite(value) else 0.0 for value in column)
        return [round(math.asinh(ratio) * scale) for ratio in ratios]


def _page(packed: bytes, media: str) -> tuple[bytes, bytes]:
    """Return the page before the packed curves, and behind them."""
    head, _, tail = page_without_scripts().partition("</body>")
    opening = '<script type="text/plain" id="{}">'
    head += (
        f'<script type="application/json" id="report-media">{media}</script>\n'
        f"{opening.format('packed')}{packed.decode()}</script>\n{opening.format('curves')}"
    )
    unpack = (Path(__file__).with_name("page") / UNPACK).read_text("utf-8")
    return head.encode(), f"</script>\n<script>\n{unpack}</script>\n</body>{tail}".encode()


def _packed(data: bytes) -> bytes:
    """Compress data; the result is text in ASCII."""
    return base64.b64encode(gzip.compress(data, mtime=0))
