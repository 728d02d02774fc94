"""The content of the files of sinks, read and as it must be."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from events.messages import Event
from events.metrics import metrics_of
from events.sink import RunInfo
from events.wire import encode_json
from sinks import CSV, JSONL, TensorBoard


class Files(NamedTuple):
    """A sink of files, and what is in its files."""

    sink: Callable[[str | None], Any]
    """Builds it for a path."""
    name: str
    """Its default path in the run folder."""
    found: Callable[[Path], object]
    """Reads what is at a path."""
    wanted: Callable[[Sequence[Event]], object]
    """What must be there of these events."""

    def write(self, path: Path, events: Sequence[Event], run_id: str = "demo", attempt: int = 1) -> None:
        writer = self.sink(str(path)).open(RunInfo(run_id, attempt=attempt))
        writer.write(events)
        writer.close()


Row = tuple[object, ...]
"""The columns of a table; the value as text, because NaN does not equal itself."""


def rows_of(path: Path) -> list[Row]:
    with open(path, newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    types = (str, int, int, float, int, int, str, str, float)
    parsed = [[kind(text) for kind, text in zip(types, row, strict=True)] for row in rows]
    return [(*row[:-1], repr(row[-1])) for row in parsed]


def rows_for(events: Sequence[Event]) -> list[Row]:
    return [
        (e.run_id, e.attempt, e.seq, e.time, e.global_step, e.epoch, e.stage or "", name, repr(float(value)))
        for e in events
        for name, value in metrics_of(e)
    ]


def scalars_of(folder: Path) -> dict[str, list[tuple[int, str, float]]]:
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = board.Tags()["scalars"]
    return {tag: [(one.step, repr(one.value), one.wall_time) for one in board.Scalars(tag)] for tag in tags}


def scalars_for(events: Sequence[Event]) -> dict[str, list[tuple[int, str, float]]]:
    found: dict[str, list[tuple[int, str, float]]] = {}
    for event in events:
        for name, value in metrics_of(event):
            found.setdefault(name, []).append((event.global_step, repr(float(np.float32(value))), event.time))
    return found


def lines_for(events: Sequence[Event]) -> bytes:
    return b"".join(encode_json(event) + b"\n" for event in events)


CSV_FILES = Files(CSV, "metrics.csv", rows_of, rows_for)
JSONL_FILES = Files(JSONL, "events.jsonl", Path.read_bytes, lines_for)
TENSORBOARD_FILES = Files(TensorBoard, "tensorboard", scalars_of, scalars_for)
