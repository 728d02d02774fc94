"""A few facts about a run as HTML, for notebooks: readable in both colour schemes, and where styles are removed."""

from __future__ import annotations

import datetime
import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from events.text import plain_text

if TYPE_CHECKING:
    from events.protocol import RunResult

_SIGNS = {"finished": "✓", "running": "●", "stopped": "■", "failed": "✗", "cancelled": "■", "lost": "✗"}
_COLOURS = {"finished": "#2da44e", "running": "#2f81f7", "stopped": "#bf8700", "failed": "#d1242f", "lost": "#d1242f"}
_MOST_CHARS = 500
"""Maximum characters per text."""
_MOST_PROBLEMS = 10
_MOST_METRICS = 12
"""Maximum metrics per card; the losses come first."""
_CELL = "text-align:left;vertical-align:top;padding:1px 12px 1px 0;border:0;background:none;white-space:normal"


def card(title: str, status: str, rows: Iterable[tuple[str, str]], problems: Sequence[str]) -> str:
    """Return a card with a title, a status, named values and problems. All texts are escaped."""
    colour = _COLOURS.get(status, "#6e7781")
    sign = _SIGNS.get(status, "·") if not problems or status != "finished" else "!"
    if problems and status == "finished":
        colour = _COLOURS["stopped"]
    shown = [
        f'<tr style="background:none"><th style="{_CELL};font-weight:normal;opacity:.7">{escaped(name)}</th>'
        f'<td style="{_CELL};overflow-wrap:anywhere">{escaped(value)}</td></tr>'
        for name, value in rows
    ]
    return (
        f'<div style="border:1px solid rgba(128,128,128,.35);border-left:4px solid {colour};border-radius:4px;'
        f'padding:6px 12px;margin:4px 0;max-width:60em;line-height:1.5">'
        f'<div><b>{escaped(title)}</b> &nbsp;<span style="color:{colour}">{sign} {escaped(status)}</span></div>'
        f'<table style="border:0;margin:2px 0 0 0">{"".join(shown)}</table>{warnings(problems)}</div>'
    )


def warnings(problems: Sequence[str]) -> str:
    """Return problems, one per line; of many the last ones."""
    if not problems:
        return ""
    skipped = len(problems) - _MOST_PROBLEMS
    lines = [f"{skipped:,} more before these", *problems[-_MOST_PROBLEMS:]] if skipped > 0 else problems
    rows = "".join(f"<div>! {escaped(line)}</div>" for line in lines)
    return f'<div style="border-left:4px solid #bf8700;padding-left:8px;margin:4px 0">{rows}</div>'


def escaped(text: str) -> str:
    """Return text on one line, of bounded length, as HTML."""
    return html.escape(plain_text(text, _MOST_CHARS))


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds: ``0:04:12``; 0 if the clock was set back meanwhile."""
    return str(datetime.timedelta(seconds=round(max(0.0, seconds))))


def result_card(result: RunResult) -> str:
    """Return the card of a run that has ended."""
    steps = f"{result.global_step:,}" + (f", {result.epochs:,} epochs" if result.epochs else "")
    rows = [("steps", steps), ("training took", duration(result.ledger.wall_s))]
    if result.reason:
        rows.append(("reason", result.reason))
    if result.best_metric is not None:
        rows.append((f"best {result.best or 'metric'}", f"{result.best_metric:.5g}"))
    metrics = sorted(result.metrics.items(), key=lambda item: "loss" not in item[0])
    rows += [(name, f"{value:.5g}") for name, value in metrics[:_MOST_METRICS]]
    if len(metrics) > _MOST_METRICS:
        rows.append((f"and {len(metrics) - _MOST_METRICS:,} more", "in result.metrics"))
    places = {
        "best checkpoint": result.best_checkpoint,
        "checkpoint": result.checkpoint if result.checkpoint != result.best_checkpoint else None,
        "weights": result.weights,
        "folder": result.run_dir,
    }
    rows += [(name, place) for name, place in places.items() if place]
    return card(result.run_id, result.status, rows, result.problems)
