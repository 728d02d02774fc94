"""The contents of a display: HTML for the progress, and the page itself with the run in it, of bounded size."""

from __future__ import annotations

import base64
import functools
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from events.card import card, duration, escaped, warnings
from events.run.state import RunState
from sinks.console.bars import progress_line
from sinks.format import format_number
from sinks.live.embedded import document, inert
from sinks.live.frames import encode
from sinks.live.series import MOST_POINTS, plain, thinned
from sinks.live.view import LogEntry, RunView

MOST_PACKED = 360_000
"""Maximum bytes of the packed page with its run, which the notebook's file keeps. The page alone takes a third."""
MOST_MESSAGE = 1_000_000
"""Maximum bytes per message that follows; a Jupyter server forwards a megabyte per second by default."""
MOST_OF_A_FRAME = 1_500
"""Maximum points per frame."""
_POINTS_IN_ALL = 40_000
"""Points of all curves with which the packing starts, so that it need not try often."""
_FEWEST_POINTS = 8
"""Of a curve, however many there are."""
_MOST_LINES = 200
"""Maximum lines of the log, and maximum checkpoints, in a snapshot that had to be reduced."""
FILES = ("image", "audio", "table")
"""Media that are files of the run folder, which a notebook's page cannot reach."""


class Options(msgspec.Struct, frozen=True):
    """How the page and the notebook around it find each other."""

    id: str
    """Of the display."""
    kernel: str | None
    """The kernel's id at its Jupyter server, by which commands reach it; None if it takes none."""
    live: bool
    """Whether messages follow."""


@functools.cache
def host() -> tuple[str, str]:
    """Return the name of an object in the notebook's window, and the script that makes it.

    The name has the hash of the script, because notebooks with other versions share the window.
    """
    script = Path(__file__).with_name("host.js").read_text("utf-8")
    name = f"stagecast_{zlib.crc32(script.encode()):08x}"
    return name, script.replace("HOST", name)


def charts_html(view: RunView, options: Options) -> str:
    """Return the page with the run in it, packed, and the script that unpacks it into a frame."""
    name, script = host()
    around = {"host": name, **msgspec.structs.asdict(options)}
    packed = ""
    for shown in _snapshots(view):
        data = encode({"runs": [shown], "media": {}, "notebook": around})
        packed = base64.b64encode(gzip.compress(document(data).encode("utf-8", "replace"), mtime=0)).decode()
        if len(packed) <= MOST_PACKED:
            break
    return (
        f'<div data-stagecast-charts="{options.id}" data-packed="{packed}"></div>'
        f"<script>{script}\n{name}.open({_script_json(options)}, document.currentScript);</script>"
    )


def message_of(view: RunView) -> bytes:
    """Return a snapshot for a page that is open already."""
    data = b""
    for shown in _snapshots(view):
        data = encode(shown)
        if len(data) <= MOST_MESSAGE:
            break
    return data


def _snapshots(view: RunView) -> Iterator[dict[str, object]]:
    """Yield the whole snapshot, then smaller ones: without histograms and texts, and with fewer points per curve."""
    most = min(MOST_POINTS, max(_FEWEST_POINTS, _POINTS_IN_ALL // max(1, len(view.curves.series))))
    yield _snapshot(view, most, is_reduced=False)
    while most >= _FEWEST_POINTS:
        yield _snapshot(view, most, is_reduced=True)
        most //= 2


def _snapshot(view: RunView, most: int, *, is_reduced: bool) -> dict[str, object]:
    """Return a snapshot with a maximum of points per curve."""
    told = view.snapshot()
    told["series"] = {name: plain(thinned(series, most)) for name, series in view.curves.series.items()}
    told["media"] = [one for one in view.media if one.kind not in FILES]
    if is_reduced:
        checkpoints = list(view.checkpoints.values())[-_MOST_LINES:]
        told |= {"media": [], "histograms": {}, "log": view.log[-_MOST_LINES:], "checkpoints": checkpoints}
    return told


def reduced(points: dict[str, tuple[list[int], list[float | str]]]) -> dict[str, tuple[list[int], list[float | str]]]:
    """Return the points of a frame, of many at least the extremes; the next snapshot has the exact curves."""
    most = max(4, MOST_OF_A_FRAME // max(1, len(points)))
    return {name: column if len(column[0]) <= most else _extremes(*column, most) for name, column in points.items()}


def _extremes(steps: list[int], values: list[float | str], most: int) -> tuple[list[int], list[float | str]]:
    """Return the least and the greatest value of each part, the first one that is not finite, and the last of all."""
    width = -(-3 * len(values) // most)
    kept = {len(values) - 1}
    for begin in range(0, len(values), width):
        part = range(begin, min(begin + width, len(values)))
        numbers = [index for index in part if not isinstance(values[index], str)]
        if numbers:
            kept |= {min(numbers, key=lambda one: values[one]), max(numbers, key=lambda one: values[one])}
        if len(numbers) < len(part):
            kept.add(next(index for index in part if isinstance(values[index], str)))
    chosen = sorted(kept)
    return [steps[index] for index in chosen], [values[index] for index in chosen]


def progress_html(view: RunView, options: Options, message: bytes | None) -> str:
    """Return the progress as text and a bar, the warnings, and the message for the page below."""
    state = progress_text(view)
    if view.run.paused and view.evaluation is not None:  # only the line of training has it
        state = f"paused · {state}"
    total = view.total_steps
    value = f' value="{view.run.global_step / total:.4f}"' if total else ""
    bar = f'<progress max="1"{value} style="width:100%"></progress>'
    text = f"<div><b>{escaped(view.run.run_id)}</b> {escaped(state)}</div>{bar}"
    name, _ = host()
    feed = f"{name}.feed({_script_json(options)}, {inert(message.decode())})" if message else f"{name}.tidy()"
    script = f"<script>if (window.{name}) {feed};</script>"
    return f'<div data-stagecast="{options.id}" style="max-width:60em">{text}</div>{warnings(warned(view))}{script}'


def progress_text(state: RunState) -> str:
    """Return the progress in one line."""
    return progress_line(state).text


def end_html(view: RunView, options: Options) -> str:
    """Return the card of a run that has ended."""
    run = view.run
    rows = [("steps", f"{run.global_step:,}" + (f", {view.epochs_done:,} epochs" if view.epochs_done else ""))]
    if run.started and run.ended:
        rows.append(("took", duration(run.ended - run.started)))
    if run.reason:
        rows.append(("reason", run.reason))
    for name, series in view.curves.series.items():
        if name.split("/")[0] in ("train_loss", "val_loss"):
            rows.append((name, format_number(series.last)))
    if (newest := view.newest_checkpoint) is not None:
        rows.append(("checkpoint", newest.folder))
    problems = [*run.problems, *(line for line in warned(view) if line not in run.problems)]
    name, _ = host()
    text = card(run.run_id, run.status, rows[:_MOST_LINES], problems)
    return f'<div data-stagecast="{options.id}">{text}</div><script>if (window.{name}) {name}.tidy();</script>'


def warned(view: RunView) -> list[str]:
    """Return the warnings and errors of the log."""

    def is_grave(line: LogEntry) -> bool:
        return line.level != "info" and line.kind != "RunEnded"

    return [line.text for line in view.log if is_grave(line)]


def _script_json(options: Options) -> str:
    return inert(msgspec.json.encode(options).decode())
