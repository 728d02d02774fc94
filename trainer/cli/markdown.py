"""Runs as Markdown, to paste where they are discussed: results, what differs between them, and their origin."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence

from events.table.columns import FIXED, Column, Columns
from events.table.entry import RunEntry
from events.text import plain_text
from trainer.cli.runs import value_text

_MOST_METRICS = 8
"""Maximum metrics in the table of results."""
_OF_MACHINE = ("system/", "ledger/")
_OF_LOOP = frozenset({"lr", "grad_norm", "step_s"})
_SPECIAL = re.compile(r"[\\`*\[\]<>|~&]|(?<![^\W_])_|_(?![^\W_])|^\s*[-+#=]|^\s*\d+(?=[.)](?:\s|$))")
"""Characters that would be markup where they stand: an underscore within a word, or a minus behind one, would not."""


def markdown(entries: Sequence[RunEntry], title: str | None = None, notes: str = "") -> str:
    """Return runs as Markdown (with the tables of GitHub's), the best value of each metric in bold.

    Text of the runs is escaped: it makes no link, picture or markup. ``notes`` are Markdown already.
    """
    usual = _name(entries[0]) if len(entries) == 1 else f"{len(entries):,} runs"
    head = f"# {_escaped(title) if title else usual}"
    parts = [head, notes.strip(), _results(entries), _differing(entries), *map(_about, entries)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(entries: Sequence[RunEntry]) -> str:
    known = Columns(entries)
    monitored = list(dict.fromkeys(one.monitored for one in entries if one.monitored is not None))
    names = [name for name in known.metrics if not name.startswith(_OF_MACHINE) and name not in _OF_LOOP]
    names.sort(key=lambda name: name not in monitored)
    best = {name: _winner(entries, name) for name in names[:_MOST_METRICS]}
    fixed = [Column(name, FIXED[name]) for name in ("status", "step", "duration_s")]
    heads = ["run", "status", "step", "duration", *(_escaped(f"best {name}") for name in best)]
    rows = [
        [
            _name(entry),
            *(_escaped(value_text(column, entry)) for column in fixed),
            *(_value(entry, name, winner) for name, winner in best.items()),
        ]
        for entry in entries
    ]
    left = len(names) - len(best)
    more = f"\n\nMetrics that are not shown: {left:,}. `stagecast runs --columns=help` lists them." if left > 0 else ""
    return _table(heads, rows, left=2) + more


def _winner(entries: Sequence[RunEntry], name: str) -> float | None:
    """Return the best value of a metric over several runs."""
    metrics = [entry.metrics[name] for entry in entries if name in entry.metrics]
    values = [metric.best for metric in metrics if math.isfinite(metric.best)]
    if len(values) < 2:
        return None
    return min(values) if metrics[0].is_least_best else max(values)


def _value(entry: RunEntry, name: str, winner: float | None) -> str:
    metric = entry.metrics.get(name)
    if metric is None:
        return ""
    text = _escaped(value_text(Column(name, lambda one: one.metrics[name].best), entry))
    return f"**{text}**" if metric.best == winner else text


def _differing(entries: Sequence[RunEntry]) -> str:
    known = Columns(entries)
    names = known.differing(entries)
    if not names:
        return "" if len(entries) == 1 else "The runs have the same hyperparameters."
    columns = [known.column(f"config.{name}") for name in names]
    rows = [
        [_escaped(column.name.removeprefix("config.")), *(_escaped(value_text(column, entry)) for entry in entries)]
        for column in columns
    ]
    return "## What differs\n\n" + _table(["hyperparameter", *map(_name, entries)], rows, left=1)


def _about(entry: RunEntry) -> str:
    run = entry.run
    lines = [f"## {_name(entry)}"]
    if entry.notes.note:
        lines.append("> " + "  \n> ".join(_escaped(line) for line in entry.notes.note.splitlines()))
    started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.started)) if run.started else ""
    commit = f"{run.git_commit}{' with changes' if run.git_dirty else ''}" if run.git_commit else ""
    facts = [
        ("tags", _escaped(", ".join(entry.notes.tags))),
        ("started", started),
        ("commit", _code(commit)),
        ("command", _code(run.command_line or "")),
        ("module", _code(run.module or "")),
        ("device", _escaped(run.device or "")),
        ("health", _escaped(", ".join(entry.health))),
        *(("problem", _escaped(problem)) for problem in run.problems),
    ]
    lines.append("\n".join(f"- {name}: {text}" for name, text in facts if text))
    return "\n\n".join(line for line in lines if line)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Return a table, whose columns but the first ones are aligned to the right."""
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *rows))


def _name(entry: RunEntry) -> str:
    return _escaped(entry.label)


def _escaped(text: str) -> str:
    return _SPECIAL.sub(_escape, plain_text(text, 1_000))


def _escape(found: re.Match[str]) -> str:
    text = found.group().lstrip()
    return f"{text}\\" if text.isdigit() else f"\\{text}"


def _code(text: str) -> str:
    """Return text in backticks, more of them than it has in a row."""
    text = plain_text(text, 1_000)
    if not text:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"
