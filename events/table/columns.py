"""The columns of a table of runs, and their values as plain data."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple

from events.errors import ArgumentsError
from events.strict import nearest
from events.table.entry import MetricSummary, RunEntry, as_json

Value = str | int | float | bool | tuple[str, ...] | None

FIXED: dict[str, Callable[[RunEntry], Value]] = {
    "name": lambda one: one.label,
    "id": lambda one: one.name,
    "status": lambda one: "paused" if one.run.paused and one.run.status == "running" else one.run.status,
    "health": lambda one: tuple(one.health),
    "step": lambda one: one.run.global_step,
    "total_steps": lambda one: one.total_steps,
    "progress": lambda one: one.progress,
    "left_s": lambda one: one.left_s,
    "epoch": lambda one: one.run.epoch,
    "duration_s": lambda one: one.duration_s(time.time()),
    "started": lambda one: one.run.started or None,
    "updated": lambda one: one.run.updated or None,
    "epochs_since_best": lambda one: one.metrics[one.monitored].epochs_since_best if one.monitored else None,
    "tags": lambda one: one.notes.tags,
    "note": lambda one: one.notes.note,
    "colour": lambda one: one.notes.colour,
    "commit": lambda one: one.run.git_commit,
    "dirty": lambda one: one.run.git_dirty,
    "command": lambda one: one.run.command_line,
    "module": lambda one: one.run.module,
    "device": lambda one: one.run.device,
    "host": lambda one: one.run.host,
    "attempt": lambda one: one.run.attempt,
    "folder": lambda one: one.folder,
    "problems": lambda one: tuple(one.run.problems),
}
"""The columns that every run has. ``started`` and ``updated`` are Unix seconds, ``progress`` is from 0 to 1."""
_OF_METRIC: dict[str, Callable[[MetricSummary], float]] = {
    "last": lambda metric: metric.last,
    "best": lambda metric: metric.best,
    "min": lambda metric: metric.low,
    "max": lambda metric: metric.high,
    "best_step": lambda metric: metric.best_step,
}


class Column(NamedTuple):
    """A column: its full name, and the value of a run in it, None where the run has none."""

    name: str
    of: Callable[[RunEntry], Value]


class Columns:
    """The columns of some runs.

    ``config.NAME`` is a hyperparameter, and ``last.NAME``, ``best.NAME``, ``min.NAME``, ``max.NAME`` and
    ``best_step.NAME`` are values of a metric. A name alone is one of `FIXED`, otherwise a hyperparameter, otherwise the
    last value of a metric.
    """

    def __init__(self, entries: Iterable[RunEntry], listed: str = "--columns=help lists them") -> None:
        """Args: ``listed``: where a reader finds the columns, for the message about one that no run has."""
        entries = list(entries)
        self._listed = listed
        self._is_empty = not entries
        self.config = list(dict.fromkeys(name for entry in entries for name in entry.config))
        self.metrics = list(dict.fromkeys(name for entry in entries for name in entry.metrics))
        self._of_config, self._of_metrics = frozenset(self.config), frozenset(self.metrics)

    @property
    def names(self) -> list[str]:
        """The full names: those that every run has, hyperparameters, then last and best values of metrics."""
        values = (f"{kind}.{name}" for name in self.metrics for kind in ("last", "best"))
        return [*FIXED, *(f"config.{name}" for name in self.config), *values]

    def find(self, name: str) -> Column | None:
        """Return a column by its full name or its name alone; None if no run has it."""
        if name in FIXED:
            return Column(name, FIXED[name])
        kind, _, rest = name.partition(".")
        if kind == "config" and rest in self._of_config:
            return _of_config(rest)
        if kind in _OF_METRIC and rest in self._of_metrics:
            return _of_metric(kind, rest)
        if name in self._of_config:
            return _of_config(name)
        return _of_metric("last", name) if name in self._of_metrics else None

    def column(self, name: str) -> Column:
        """Return a column by its full name or its name alone.

        Raises:
            ArgumentsError: No run has it; the message suggests a similar one.
        """
        found = self.find(name)
        if found is None and self._is_empty:
            return Column(name, lambda entry: None)
        if found is None:
            near = nearest(name, [*FIXED, *self.config, *self.metrics, *self.names], {})
            hint = f"did you mean {near}?" if near is not None else self._listed
            raise ArgumentsError(f"{name!r:.100} is not a column of these runs; {hint}")
        return found

    def differing(self, entries: Sequence[RunEntry]) -> list[str]:
        """The hyperparameters whose values differ between runs, where several have them."""
        return [name for name in self.config if len({repr(entry.config.get(name)) for entry in entries}) > 1]


def _of_config(name: str) -> Column:
    return Column(f"config.{name}", lambda entry: entry.config.get(name))


def _of_metric(kind: str, name: str) -> Column:
    read = _OF_METRIC[kind]
    return Column(f"{kind}.{name}", lambda entry: read(entry.metrics[name]) if name in entry.metrics else None)


def row(entry: RunEntry) -> dict[str, Any]:
    """Return a run as one row of plain values: the columns of `FIXED`, then ``config.``, ``last.`` and ``best.``."""
    found: dict[str, Any] = {name: read(entry) for name, read in FIXED.items()}
    found |= {f"config.{name}": value for name, value in entry.config.items()}
    for name, metric in entry.metrics.items():
        found |= {f"last.{name}": metric.last, f"best.{name}": metric.best}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def page_row(entry: RunEntry, metrics: Container[str] | None = None, most_config: int | None = None) -> dict[str, Any]:
    """Return a run as a row of the page's table and of a report: plain data, which JSON can hold.

    It changes only with the run and its notes: the duration of a running run ends at its newest event. Numbers that are
    not finite are ``"nan"``, ``"inf"`` or ``"-inf"``. A metric is ``[last, best, best_step, epochs_since_best,
    is_least_best]``, where ``best`` is None without a finite value. Texts of hyperparameters are cut after 500
    characters.

    Args:
        metrics: The names of the metrics; None for all.
        most_config: Maximum hyperparameters, the first ones; None for all.
    """
    run, notes = entry.run, entry.notes
    found: dict[str, Any] = {name: FIXED[name](entry) for name in _ON_PAGE}
    return found | {
        "name": entry.name,
        "label": entry.label,
        "health": list(entry.health),
        "problems": list(run.problems),
        "duration_s": entry.duration_s(run.updated),
        "monitored": entry.monitored,
        "notes": {"name": notes.name, "tags": list(notes.tags), "note": notes.note, "colour": notes.colour},
        "config": {name: _page_value(one) for name, one in itertools.islice(entry.config.items(), most_config)},
        "metrics": {
            name: _page_metric(metric) for name, metric in entry.metrics.items() if metrics is None or name in metrics
        },
    }


_MOST_CHARS = 500
_ON_PAGE = (
    *("folder", "status", "step", "total_steps", "progress", "left_s", "epoch", "started", "updated"),
    *("commit", "dirty", "command", "module", "device", "host", "attempt"),
)


def _page_value(value: Value) -> Value:
    if isinstance(value, str):
        return value if len(value) <= _MOST_CHARS else f"{value[:_MOST_CHARS]}…"
    return as_json(value) if isinstance(value, float) else value


def _page_metric(metric: MetricSummary) -> list[Any]:
    best = metric.best
    has_best = not math.isnan(best)
    return [
        as_json(metric.last),
        best if has_best else None,
        metric.best_step if has_best else None,
        metric.epochs_since_best if has_best else None,
        metric.is_least_best,
    ]


def ordered(entries: Sequence[RunEntry], names: Sequence[str], columns: Columns) -> list[RunEntry]:
    """Sort runs by columns, the first one first; a name that begins with ``-`` sorts the greatest first.

    Numbers are before texts, and runs without a value are last. Raises `ArgumentsError` for an unknown column.
    """
    found = list(entries)
    for name in reversed(names):
        is_down = name.startswith("-") and columns.find(name) is None
        column = columns.column(name[1:] if is_down else name)
        values = {id(entry): _sortable(column.of(entry)) for entry in found}
        have = [entry for entry in found if values[id(entry)] is not None]
        have.sort(key=lambda entry: values[id(entry)] or (0, 0.0, ""), reverse=is_down)  # used at once
        found = have + [entry for entry in found if values[id(entry)] is None]
    return found


def _sortable(value: Value) -> tuple[int, float, str] | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool | int | float):
        return 0, value, ""
    return 1, 0.0, value if isinstance(value, str) else ", ".join(value)
