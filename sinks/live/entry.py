"""The entry in the table of runs of a run that is shown from memory, without its journal."""

from __future__ import annotations

import math

import msgspec

from events.table.entry import MetricSummary, RunEntry, flattened, health_of, is_least_best
from sinks.live.series import Series
from sinks.live.view import RunView


def entry_of(view: RunView) -> RunEntry:
    """Return the entry of a run that is shown from memory; steps of its best values are those of the curves' points."""
    run = msgspec.structs.replace(view.run, latest=dict(view.run.latest))
    own = {name if name not in view.arguments else f"config/{name}": value for name, value in view.config.items()}
    metrics = {
        name: _summary(name, series, run.steps_per_epoch)
        for name, series in view.curves.series.items()
        if name != "rows_per_s"  # computed for charts only
    }
    if run.best in metrics:
        metrics[run.best].is_least_best = run.best_mode == "min"
    return RunEntry(
        run,
        flattened(view.arguments | own),
        metrics,
        health=health_of(run, metrics, view.health),
        total_steps=view.total_steps,
        left_s=view.run_left_s if run.status == "running" else None,
        name=run.run_id,
        folder=".",
    )


def _summary(name: str, series: Series, steps_per_epoch: int | None) -> MetricSummary:
    def epoch(step: int) -> int:
        return max(0, step - 1) // steps_per_epoch if steps_per_epoch else 0

    found = MetricSummary(last=series.last, is_least_best=is_least_best(name))
    if not series.step:
        return found
    found.epoch = epoch(series.step[-1])
    lows = [value for value in series.low if not math.isnan(value)]
    if lows:
        found.low, found.high = min(lows), max(value for value in series.high if not math.isnan(value))
        found.low_step, found.high_step = (
            series.step[series.low.index(found.low)],
            series.step[series.high.index(found.high)],
        )
        found.low_epoch, found.high_epoch = epoch(found.low_step), epoch(found.high_step)
    if not math.isfinite(series.last):
        bad = len(series.step)
        while bad and math.isnan(series.mean[bad - 1]):
            bad -= 1
        found.bad_since = series.step[min(bad, len(series.step) - 1)]
    return found
