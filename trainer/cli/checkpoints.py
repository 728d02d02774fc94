"""``stagecast checkpoints list`` and ``verify``, without torch."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable
from typing import Literal

import msgspec

from events.checkpoint.manifest import CheckpointName, Manifest, Metric
from events.errors import CheckpointDamaged, CheckpointNotFound, CheckpointTooNew
from events.text import plain_text
from trainer.cli.sources import Source, chosen, open_source, problem
from trainer.cli.text import echo

State = Literal["whole", "damaged", "newer"]
"""Newer: in a format of a later version."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint in ``list --json``. Values of its manifest are null if that cannot be read."""

    name: str
    path: str
    state: State
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
        echo(f"no checkpoints in {path}")
    return 0


def verify(path: str, names: list[CheckpointName]) -> int:
    """Read every byte of checkpoints, all or the named ones; returns the exit code. Raises as `show` does."""
    from sinks.format import format_bytes, format_duration

    source = open_source(path)
    wanted = chosen(source, names)
    if not wanted:
        echo(f"no checkpoints in {path}")
    code = 0
    for name in wanted:
        began = time.perf_counter()
        try:
            manifest, state, reason = _inspect(source, name, bytewise=True)
            if manifest is not None and reason is None:
                reason = f"{format_bytes(manifest.nbytes)} in {format_duration(time.perf_counter() - began)}"
            code = code if state == "whole" else 1
            verdict = f"{state}  {reason}"
        except CheckpointNotFound:
            verdict = "deleted meanwhile"
        echo(f"{name!s:{max(len(str(one)) for one in wanted)}}  {verdict}")
    return code


def _rows(source: Source) -> Iterable[Row]:
    open_to_resume = bool(source.line)  # without a lineage, resuming starts a new run
    fields = ("epoch", "time", "nbytes", "metric", "reasons", "run_id", "module")
    for name in source.names:
        try:
            manifest, state, reason = _inspect(source, name)
        except CheckpointNotFound:
            continue
        yield Row(
            name=str(name),
            path=source.path(name),
            state=state,
            problem=reason,
            in_line=name in source.line,
            resumes=open_to_resume and state == "whole",
            uploaded=source.uploaded(name),
            step=name.step,
            attempt=name.attempt,
            **{field: getattr(manifest, field, None) for field in fields},
        )
        open_to_resume = open_to_resume and state == "damaged"  # resuming only falls back from damage


def _inspect(
    source: Source, name: CheckpointName, *, bytewise: bool = False
) -> tuple[Manifest | None, State, str | None]:
    """Read a checkpoint's manifest and check its files; returns the state and its reason, if it is not whole.

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
        state: State = "newer" if isinstance(error, CheckpointTooNew) else "damaged"
        return manifest, state, problem(source, name, error)
    return manifest, "whole", None


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
            f"{row.metric.name}={format_number(row.metric.value)}" if row.metric is not None else "",
            ", ".join(row.reasons or []),
            f"{row.state}, uploaded" if row.uploaded is not None else row.state,
            "resumes here" if row.resumes else "in line" if row.in_line else "superseded",
        ])  # fmt: skip
    columns = []
    for column in zip(*lines, strict=True):
        if any(column[1:]):
            texts = [plain_text(cell) for cell in column]
            width, right = max(map(cells, texts)), column[0] in ("step", "age", "size")
            pads = [" " * (width - cells(text)) for text in texts]
            columns.append([pad + text if right else text + pad for text, pad in zip(texts, pads, strict=True)])
    head, *bodies = ("  ".join(parts).rstrip() for parts in zip(*columns, strict=True))
    echo(head, style="1")
    for row, body in zip(rows, bodies, strict=True):
        echo(body, style="31" if row.problem else "32" if row.resumes else "" if row.in_line else "2")
        if row.problem is not None:
            echo(f"    {row.problem}", style="31")
    for place in sorted({row.uploaded.removesuffix(f"/{row.name}") for row in rows if row.uploaded is not None}):
        echo(f"uploaded to {place}", style="2")
