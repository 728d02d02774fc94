"""Logged tables, read from the run folder for other tools."""

from __future__ import annotations

import html

import msgspec

from events.log import logger
from events.messages import TableCell, TableContent, TableLogged
from sinks.files.appended import read_media

MOST_ROWS = 100
"""Maximum rows per table in Markdown."""


def read_table(run_dir: str | None, event: TableLogged, user: str) -> TableContent | None:
    """Read a table; None, with a warning, as for `read_media`, or if the file is not a table with equal rows."""
    data = read_media(run_dir, event, user)
    try:
        table = None if data is None else msgspec.json.decode(data, type=TableContent)
        if table is not None and any(len(row) != len(table.columns) for row in table.rows):
            raise ValueError("its rows differ in length")
    except ValueError as error:
        logger.warning(f"{user} cannot show {event.name!r:.200} of step {event.global_step}: {error}")
        return None
    return table


def markdown_of(table: TableContent) -> bytes:
    """A table in Markdown, which TensorBoard shows as a text."""
    head: list[list[TableCell]] = [[*table.columns], ["---"] * len(table.columns)]
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in [*head, *table.rows[:MOST_ROWS]]]
    more = len(table.rows) - MOST_ROWS
    notes = [
        f"{more:,} further rows are in the run folder" if more > 0 else "",
        f"The table has {table.cut}" if table.cut else "",
    ]
    return "\n\n".join(["\n".join(lines), *filter(None, notes)]).encode("utf-8", "backslashreplace")


def _cell(value: TableCell) -> str:
    text = "" if value is None else html.escape(str(value), quote=False)
    text = text.replace("|", "&#124;")  # a backslash does not escape it where another one precedes
    return " ".join(text.split())
