"""Print a table of the runs in a folder."""

from __future__ import annotations

import csv
import io
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from events.errors import RunFolderError
from events.table.columns import FIXED, Column, Columns, Value, ordered, row
from events.table.conditions import select
from events.table.entry import RunEntry, as_json
from events.table.table import RunTable
from events.text import plain_text
from sinks.format import cells, format_duration, format_number
from trainer.cli.text import echo, echo_error

_LEAST_WIDTH = 40
_PIPE_WIDTH = 200
"""Columns of the terminal if there is none."""
_MOST_DIFFERING = 8
"""Maximum hyperparameters that are shown without ``--columns``."""
_MOST_CELLS = 40
"""Maximum terminal columns per column of the table..."""
_LEAST_CELLS = 8
"""...and the width down to which one shrinks before others are left out."""
_STYLES = {"failed": "31", "damaged": "31", "lost": "33", "silent": "33", "running": "32", "paused": "32"}


def runs(
    folder: str, sort: str, *, reverse: bool, filters: list[str], columns: str, as_json: bool, as_csv: bool
) -> int:
    """Print the runs; returns the exit code.

    Raises:
        RunFolderError: The folder does not exist.
        ArgumentsError: A condition cannot be read, or names an unknown column.
    """
    if not Path(folder).is_dir():
        raise RunFolderError(f"{folder} is not a folder; name a run folder, or a folder of run folders")
    table = RunTable(folder)
    entries = table.look()
    known = Columns(entries)
    if columns == "help":
        echo(*(plain_text(name, 300) for name in known.names))
        return 0
    found = ordered(select(entries, filters, known), _names(sort), known)
    found = found[::-1] if reverse else found
    chosen = [known.column(name) for name in _names(columns)]
    if as_json:
        _print_json(found, chosen)
    elif as_csv:
        _print_csv(found, chosen or [known.column(name) for name in known.names])
    elif found:
        _print_table(found, chosen or _usual(found, known), bool(chosen))
    else:
        among = f"; {len(entries):,} do not match" if entries else f"; start one with Trainer(run_dir='{folder}/NAME')"
        echo_error(f"no runs in {plain_text(folder)}{among}")
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _usual(entries: Sequence[RunEntry], known: Columns) -> list[Column]:
    """Return the columns that are shown unless others are asked for, the most telling first."""
    is_over = all(one.run.status == "finished" for one in entries)
    names = ["name", "status", *([] if is_over else ["progress", "left_s"])]
    monitored = list(dict.fromkeys(one.monitored for one in entries if one.monitored is not None))
    names += [f"{kind}.{name}" for name in monitored[:2] for kind in ("best", "last")]
    names += [f"config.{name}" for name in known.differing(entries)[:_MOST_DIFFERING]]
    names += ["health", "step", "duration_s", "tags", "updated"]
    found = [known.column(name) for name in names]
    return [one for one in found if one.name == "name" or any(one.of(entry) not in (None, "", ()) for entry in entries)]


def _print_json(entries: Sequence[RunEntry], chosen: Sequence[Column]) -> None:
    rows = [{one.name: one.of(entry) for one in chosen} if chosen else row(entry) for entry in entries]
    plain = [
        {name: as_json(value) if isinstance(value, float) else value for name, value in found.items()} for found in rows
    ]
    print(msgspec.json.format(msgspec.json.encode(plain), indent=2).decode())


def _print_csv(entries: Sequence[RunEntry], chosen: Sequence[Column]) -> None:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([one.name for one in chosen])
    for entry in entries:
        values = (one.of(entry) for one in chosen)
        writer.writerow([", ".join(value) if isinstance(value, tuple) else value for value in values])
    print(out.getvalue(), end="")


# --------------------------------------------------------------------------------------------- the table


def _print_table(entries: Sequence[RunEntry], chosen: Sequence[Column], is_asked: bool) -> None:
    width = max(_LEAST_WIDTH, shutil.get_terminal_size((_PIPE_WIDTH, 24)).columns)
    texts = [[plain_text(one.name, 300), *(value_text(one, entry) for entry in entries)] for one in chosen]
    widths = _fitted([min(_MOST_CELLS, max(map(cells, column))) for column in texts], width)
    shown = [
        [_padded(text, size, is_right=_is_number(one, entries)) for text in column]
        for one, column, size in zip(chosen, texts, widths, strict=False)
    ]
    lines = ["  ".join(parts).rstrip() for parts in zip(*shown, strict=True)]
    echo(lines[0], style="1")
    for entry, line in zip(entries, lines[1:], strict=True):
        echo(line, style=_STYLES.get(str(FIXED["status"](entry)), ""))
    hidden = [one.name for one in chosen[len(widths) :]]
    if hidden and is_asked:
        echo_error(f"no room in {width} terminal columns for {', '.join(hidden)}; use --csv, or fewer columns")


def _fitted(widths: list[int], room: int) -> list[int]:
    """Shrink the widest columns until all fit; the last ones are left out where that is not enough."""
    widths = [*widths]
    while sum(widths) + 2 * (len(widths) - 1) > room:
        widest = max(range(len(widths)), key=widths.__getitem__)
        if widths[widest] <= _LEAST_CELLS and len(widths) > 1:
            widths.pop()
        elif widths[widest] > 2 * _LEAST_CELLS or len(widths) < 3:
            widths[widest] -= 1
        else:
            widths.pop()
    return widths


def _padded(text: str, width: int, *, is_right: bool) -> str:
    if cells(text) > width:  # the end of a name often tells runs or metrics apart
        begin = _first(text, width // 2)
        text = f"{begin}…{_first(text[::-1], width - 1 - cells(begin))[::-1]}"
    pad = " " * (width - cells(text))
    return pad + text if is_right else text + pad


def _first(text: str, width: int) -> str:
    """Return the first characters that fit."""
    cut = ""
    for char in text:
        if cells(cut + char) > width:
            break
        cut += char
    return cut


def _is_number(column: Column, entries: Sequence[RunEntry]) -> bool:
    return any(isinstance(value := column.of(entry), int | float) and not isinstance(value, bool) for entry in entries)


def value_text(column: Column, entry: RunEntry) -> str:
    """Return a value in a few characters, as a printable line."""
    value = column.of(entry)
    if value is None:
        return ""
    if (form := _FORMS.get(column.name)) is not None and isinstance(value, int | float):
        return form(value)
    return plain_text(_plain(value), 300)


def _plain(value: Value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return format_number(value) if not value.is_integer() or abs(value) >= 1e15 else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else ", ".join(value) if isinstance(value, tuple) else str(value)


def _ago(unix_s: float) -> str:
    return f"{format_duration(max(0.0, time.time() - unix_s))} ago" if math.isfinite(unix_s) else ""


_FORMS: dict[str, Callable[[float], str]] = {
    "progress": lambda value: f"{value:.0%}",
    "left_s": format_duration,
    "duration_s": format_duration,
    "started": _ago,
    "updated": _ago,
}
