"""Runs as plain columns and rows, which ``pandas.DataFrame`` takes as they are."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from events.errors import RunFolderError
from events.journal.history import read_history
from events.journal.segment import JOURNAL_DIR
from events.metrics import metrics_of
from events.table.columns import Columns, ordered, row
from events.table.conditions import select
from events.table.table import RunTable


def frame(run: str | os.PathLike[str], metrics: Iterable[str] | None = None) -> dict[str, list[Any]]:
    """Return the metrics of a run as columns, one row per step, without the steps that a later attempt has repeated.

    ``step`` and ``epoch`` are integers, ``time`` is in Unix seconds, and each metric is a column of floats, NaN at the
    steps without a value; of several values at one step, the last. ``pandas.DataFrame(frame("runs/demo"))`` takes it.

    Args:
        run: The run folder; its run may be in progress.
        metrics: Names of `events.metrics.metrics_of`; None for all.

    Raises:
        RunFolderError: The folder has no journal, or it cannot be read.
    """
    journal_dir = _journal_of(run)
    wanted = None if metrics is None else frozenset([metrics] if isinstance(metrics, str) else metrics)
    rows: dict[int, tuple[int, float]] = {}
    values: dict[str, dict[int, float]] = {name: {} for name in wanted or ()}
    try:
        for event in read_history(journal_dir):
            for name, value in metrics_of(event):
                if wanted is None or name in wanted:
                    rows[event.global_step] = event.epoch, event.time
                    values.setdefault(name, {})[event.global_step] = value
    except OSError as error:
        raise RunFolderError(f"{run} cannot be read: {error}") from error
    steps = sorted(rows)
    columns: dict[str, list[Any]] = {
        "step": steps,
        "epoch": [rows[step][0] for step in steps],
        "time": [rows[step][1] for step in steps],
    }
    for name, found in values.items():
        columns[name if name not in columns else f"last.{name}"] = [found.get(step, math.nan) for step in steps]
    return columns


def runs(
    folder: str | os.PathLike[str] = "runs", *, where: str | Iterable[str] = (), sort: str | Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Return a row for each run in a folder, at any depth, the newest first: what ``stagecast runs`` shows.

    The keys are the columns of `events.table.columns`: ``name``, ``status``, ``health``, ``duration_s`` and the like,
    ``config.NAME`` for hyperparameters, ``last.NAME`` and ``best.NAME`` for metrics. A run has only the keys of its own
    hyperparameters and metrics. ``pandas.DataFrame(runs("runs"))`` takes the list.

    Args:
        folder: A folder with run folders at any depth, or a run folder.
        where: Conditions such as ``"lr > 0.01 and val_loss < 0.5"``, or regular expressions on the name.
        sort: Columns to sort by; ``-NAME`` for the greatest first.

    Raises:
        RunFolderError: The folder does not exist.
        ArgumentsError: A condition cannot be read, or names an unknown column.
    """
    if not Path(folder).is_dir():
        raise RunFolderError(f"{folder} is not a folder; name a run folder, or a folder of run folders")
    entries = RunTable(folder).look()
    columns = Columns(entries)
    entries = select(entries, [where] if isinstance(where, str) else list(where), columns)
    return [row(entry) for entry in ordered(entries, [sort] if isinstance(sort, str) else list(sort), columns)]


def _journal_of(run: str | os.PathLike[str]) -> Path:
    journal_dir = Path(run) / JOURNAL_DIR
    if not journal_dir.is_dir():
        raise RunFolderError(f"{run} has no journal in {JOURNAL_DIR}/; name the folder of a run with a journal")
    return journal_dir
