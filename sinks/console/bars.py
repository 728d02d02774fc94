"""The progress of a run: an epoch row, a step row and a validation row with bars, or one line without."""

from __future__ import annotations

import math
from typing import NamedTuple

from events.run.state import RunState
from events.run.summary import EvaluationProgress
from sinks.console.text import Line, Span, crop
from sinks.format import cells, format_duration, format_number, format_rate, plain_text


class _Row(NamedTuple):
    label: str
    counter: str
    fraction: float | None
    tail: list[Span]
    """Texts behind the bar, most important first; the last ones are omitted if there is no room."""


_LABEL = 5
_PERCENT = 4
_TAIL = 39
_COMPACT_TAIL = 31
"""Columns of the texts behind the bars. Fixed, so that the length of a bar does not depend on its text."""
_BAR = range(6, 41)
"""Lengths of a bar; with less room there is none."""
_COMPACT_BELOW = 64


def bar_rows(state: RunState, width: int, *, ascii_only: bool = False) -> list[list[Span]]:
    """Lay the rows out in at most ``width`` columns; no row contains a line break.

    Two rows during training, a third during validation, one during a test. Numbers keep their columns from one call to
    the next while the totals are the same.
    """
    compact = width < _COMPACT_BELOW
    now = state.evaluation
    rows = [_epoch_row(state, compact), _step_row(state, compact)]
    if now is not None:
        rows = [_evaluation_row(now)] if now.stage == "test" else [*rows, _evaluation_row(now)]
    counts = max(len(row.counter) for row in rows)
    room = width - (_LABEL + 1 + counts + 1) - (1 + _PERCENT) - (2 + (_COMPACT_TAIL if compact else _TAIL))
    bar = min(room, _BAR.stop - 1) if room >= _BAR.start else 0
    return [_lay_out(row, counts, bar, width, ascii_only) for row in rows]


def _epoch_row(state: RunState, compact: bool) -> _Row:
    left_s, run = state.run_left_s, state.run
    elapsed = f"{format_duration(state.pace.elapsed_s)} elapsed"
    if left_s is None:
        tail = [Span(elapsed, "dim")]
    elif compact:
        tail = [Span(f"{format_duration(left_s)} left")]
    else:  # above the step row's own "left"
        tail = [Span(f"{elapsed:<25}", "dim"), Span(f"{format_duration(left_s)} left")]
    total = state.total_steps
    fraction = run.global_step / total if total else None
    return _Row("epoch", _count(run.epoch + 1, run.epochs), fraction, tail)


def _step_row(state: RunState, compact: bool) -> _Row:
    steps, loss = state.steps, state.pace.loss
    tail = []
    if loss is not None:
        tail.append(Span(f"loss {format_number(loss):<6}", "" if math.isfinite(loss) else "bad"))
    if state.run.paused:
        tail.append(Span("paused", "warn"))
    elif state.pace.rate is not None:
        rate = format_rate(state.pace.rate, short=compact)
        tail.append(Span(rate if compact else f"{rate:<12}"))
        if state.epoch_left_s is not None and state.evaluation is None:
            tail.append(Span(f"{format_duration(state.epoch_left_s)} left"))
    fraction = state.step_in_epoch / steps if steps else None
    return _Row("step", _count(state.step_in_epoch, steps), fraction, tail)


def _evaluation_row(now: EvaluationProgress) -> _Row:
    fraction = now.step / now.steps if now.steps else None
    return _Row(now.stage, _count(now.step, now.steps), fraction, [Span(plain_text(now.key, 60), "dim")])


def _count(done: int, total: int | None) -> str:
    """``7/500``, padded to the width of ``500/500``, so that its neighbours do not move."""
    return str(done) if total is None else f"{done:>{len(str(total))}}/{total}"


def _lay_out(row: _Row, counts: int, bar: int, width: int, ascii_only: bool) -> list[Span]:
    # Rounded down: 100 % only after the last step.
    percent = "" if row.fraction is None else f"{min(100, math.floor(100 * row.fraction))}%"
    spans = [Span(f"{row.label:<{_LABEL}} ", "head"), Span(f"{row.counter:>{counts}} ")]
    if bar:
        spans += [*_bar(row.fraction, bar, ascii_only), Span(" ")]
    spans.append(Span(f"{percent:>{_PERCENT}}"))
    used = sum(cells(span.text) for span in spans)
    for span in _fitting(row, width - used):
        if used + 2 + cells(span.text.rstrip()) > width:
            break
        spans += [Span("  "), span]
        used += 2 + cells(span.text)
    return crop(spans, width)


def _fitting(row: _Row, room: int) -> list[Span]:
    """The texts behind the bar; if they are too long, the neighbour before the time left is omitted."""
    tail = row.tail
    shorter = [tail[0], tail[2]] if len(tail) == 3 else tail[-1:] if row.label == "epoch" else tail
    return shorter if _length(shorter) <= room < _length(tail) else tail


def _length(tail: list[Span]) -> int:
    return sum(2 + cells(span.text) for span in tail[:-1]) + sum(2 + cells(span.text.rstrip()) for span in tail[-1:])


def _bar(fraction: float | None, length: int, ascii_only: bool) -> list[Span]:
    if fraction is None:  # no total: keep the columns
        return [Span(" " * length)]
    done = min(length, int(length * fraction))
    full, rest = ("#", ".") if ascii_only else ("━", "─")
    style = "done" if done == length else "bar"
    return [Span(full * done, style), Span(rest * (length - done), "dim")]


def progress_line(state: RunState) -> Line:
    """The progress as a permanent line, if no bars can be drawn."""
    run, now = state.run, state.evaluation
    parts = [f"epoch {run.epoch + 1}" + (f"/{run.epochs}" if run.epochs is not None else "")]
    if now is not None:
        of = f"/{now.steps:,}" if now.steps is not None else ""
        parts.append(f"{now.stage} {plain_text(now.key, 60)} {now.step:,}{of}")
        return _parts(state.pace.time, parts[1:] if now.stage == "test" else parts)
    steps = state.steps
    percent = f" ({100 * state.step_in_epoch // steps} %)" if steps else ""
    parts.append(f"step {state.step_in_epoch:,}" + (f"/{steps:,}{percent}" if steps is not None else ""))
    if state.pace.loss is not None:
        parts.append(f"loss {format_number(state.pace.loss)}")
    if run.paused:
        parts.append("paused")
    elif state.pace.rate is not None:
        parts.append(format_rate(state.pace.rate))
    run_left_s = state.run_left_s
    left_s = run_left_s if run_left_s is not None else state.epoch_left_s
    if left_s is not None:
        parts.append(f"{format_duration(left_s)} left" + (" in this epoch" if run_left_s is None else ""))
    return _parts(state.pace.time, parts)


def _parts(time: float, parts: list[str]) -> Line:
    return Line(time, "note", [(Span(part),) for part in parts])
