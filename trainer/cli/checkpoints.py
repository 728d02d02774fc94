"""``stagecast checkpoints list`` and ``verify``, without torch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable
from typing import Literal

import msgspec

from events.checkpoint.manifest import CheckpointName, Manifest, Metric
from events.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound, CheckpointTooNew
from trainer.cli.sources import Source, chosen, open_source, plain, problem
from trainer.cli.text import echo


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint in ``list --json``. Values of its manifest are null if that cannot be read."""

    name: str
    path: str
    state: Literal["whole", "damaged", "newer"]  # newer: in a format of a later version
    problem: str | None
    in_line: bool  # an ancestor of the run's current state; if not, a resume from an earlier one superseded it
    resumes: bool  # resume="auto" selects it
    uploaded: str | None  # the address, if known
    step: int
    attempt: int
    epoch: int | None
    time: float | None  # Unix seconds
    nbytes: int | None
    metric: Metric | None
    reasons: list[str] | None
    run_id: str | None
    module: str | None


def show(path: str, *, as_json: bool) -> int:
    """List checkpoints: those of the lineage, then the superseded ones, newest first; returns the exit code.

    Raises:
        CheckpointError: The path has no checkpoints, or a store cannot be read.
        OSError: The disk cannot be read.
    """
    source = open_source(path)
    rows = [row for row in _rows(source) if source.only is None or row.name == str(source.only)]
    if as_json:
        print(json.dumps(msgspec.to_builtins(rows), indent=2))  # in ASCII, whatever the terminal's encoding
    elif rows:
        _print_table(rows)
    else:
        echo(f"no checkpoints in {plain(path)}")
    return 0


def verify(path: str, names: list[CheckpointName]) -> int:
    """Read every byte of checkpoints, all or the named ones; returns the exit code. Raises as `show` does."""
    from sinks.format import format_bytes, format_duration

    source = open_source(path)
    wanted = chosen(source, names)
    if not wanted:
        echo(f"no checkpoints in {plain(path)}")
    code = 0
    for name in wanted:
        began = time.perf_counter()
        try:
            manifest, error = _inspect(source, name, bytewise=True)
            if manifest is None or error is not None:
                code, verdict = 1, f"{_state(error)}  {problem(source, name, error)}"
            else:
                verdict = f"whole  {format_bytes(manifest.nbytes)} in {format_duration(time.perf_counter() - began)}"
        except CheckpointNotFound:
            verdict = "deleted meanwhile"
        echo(f"{name!s:{max(len(str(one)) for one in wanted)}}  {verdict}")
    return code


def _rows(source: Source) -> Iterable[Row]:
    open_to_resume = bool(source.line)  # without a lineage, resuming starts a new run
    fields = ("epoch", "time", "nbytes", "metric", "reasons", "run_id", "module")
    for name in source.names:
        try:
            manifest, error = _inspect(source, name)
        except CheckpointNotFound:
            continue
        yield Row(
            name=str(name),
            path=source.path(name),
            state=_state(error),
            problem=problem(source, name, error) if error is not None else None,
            in_line=name in source.line,
            resumes=open_to_resume and error is None,
            uploaded=source.uploaded(name),
            step=name.step,
            attempt=name.attempt,
            **{field: getattr(manifest, field, None) for field in fields},
        )
        # Resuming only falls back from damaged checkpoints.
        open_to_resume = open_to_resume and isinstance(error, CheckpointDamaged)


def _inspect(
    source: Source, name: CheckpointName, *, bytewise: bool = False
) -> tuple[Manifest | None, CheckpointError | None]:
    """Read a checkpoint's manifest and check its files; returns the problem, if any.

    Raises:
        CheckpointNotFound: It was deleted meanwhile, by a running run.
    """
    manifest = None
    try:
        manifest = source.manifest(name)
        source.check(manifest)
        if bytewise:
            source.verify(manifest)
    except (CheckpointDamaged, CheckpointTooNew) as error:
        with contextlib.suppress(CheckpointDamaged, CheckpointTooNew):
            source.manifest(name)
        return manifest, error
    return manifest, None


def _state(error: Exception | None) -> Literal["whole", "damaged", "newer"]:
    return "whole" if error is None else "newer" if isinstance(error, CheckpointTooNew) else "damaged"


def _print_table(rows: list[Row]) -> None:
    from sinks.format import cells, format_bytes, format_duration, format_number

    now = time.time()
    lines = [["checkpoint", "step", "age", "size", "metric", "taken for", "state", "line"]]
    for row in rows:
        lines.append([
            row.name,
            str(row.step),
            format_duration(now - row.time) if row.time is not None else "",
            format_bytes(row.nbytes) if row.nbytes is not None else "",
            f"{plain(row.metric.name)}={format_number(row.metric.value)}" if row.metric is not None else "",
            plain(", ".join(row.reasons or [])),
            f"{row.state}, uploaded" if row.uploaded is not None else row.state,
            "resumes here" if row.resumes else "in line" if row.in_line else "superseded",
        ])  # fmt: skip
    columns = []
    for column in zip(*lines, strict=True):
        if any(column[1:]):
            width, right = max(map(cells, column)), column[0] in ("step", "age", "size")
            pads = [" " * (width - cells(cell)) for cell in column]
            columns.append([pad + cell if right else cell + pad for cell, pad in zip(column, pads, strict=True)])
    head, *texts = ("  ".join(parts).rstrip() for parts in zip(*columns, strict=True))
    _print_styled(head, "1")
    for row, text in zip(rows, texts, strict=True):
        _print_styled(text, "31" if row.problem else "32" if row.resumes else "" if row.in_line else "2")
        if row.problem is not None:
            _print_styled(f"    {row.problem}", "31")
    for place in sorted({row.uploaded.removesuffix(f"/{row.name}") for row in rows if row.uploaded is not None}):
        _print_styled(f"uploaded to {plain(place)}", "2")


def _print_styled(text: str, style: str) -> None:
    """Print a line, in a terminal with an ANSI style. Not with rich, which only sinks import and may be missing."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    print(text if plain or not style else f"\x1b[{style}m{text}\x1b[m")
