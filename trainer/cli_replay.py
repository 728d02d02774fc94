"""``stagecast replay``: what is said on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio

from events.errors import SinkMisconfigured
from events.messages import Event, ObserverFailed, ObserverRecovered
from events.protocol import ObserverReport
from events.sink import Sink


def replay(run_dir: Path, to: Sequence[Sequence[str]], since: int) -> int:
    """Feed a run to sinks; returns the exit code.

    Args:
        to: For each sink its name and its options as ``name=value``.

    Raises:
        RunFolderError: there is no journal.
    """
    from sinks.format import plain_text
    from sinks.replay import replay as feed

    try:
        sinks = [_sink(name, options) for name, *options in to]
    except SinkMisconfigured as error:
        print(f"stagecast replay: error: {plain_text(str(error), 2_000)}", file=sys.stderr)
        return 2

    async def run() -> list[ObserverReport]:
        return await feed(run_dir, sinks, since=since, on_health=_tell)

    reports = anyio.run(run)
    for report in reports:
        left = f", {report.left:,} not" if report.left else ""
        state = f" ({report.state}: {plain_text(report.error or '')})" if report.state != "closed" else ""
        print(f"{report.observer}: {report.delivered:,} events delivered{left}{state}")
    return 0 if all(report.state == "closed" and not report.left for report in reports) else 1


def _sink(name: str, options: Sequence[str]) -> Sink:
    from sinks.registry import build_sink

    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise SinkMisconfigured(f"--to {name} {option}: give the option as NAME=VALUE")
        values[key] = value
    sink = build_sink(name, values)
    check = getattr(sink, "check", None)
    if callable(check):
        check()
    return sink


def _tell(event: Event) -> None:
    from sinks.format import format_duration, plain_text

    if isinstance(event, ObserverFailed):
        print(f"{event.observer} failed in {event.during} ({event.action}): {plain_text(event.error)}", file=sys.stderr)
    elif isinstance(event, ObserverRecovered):
        print(f"{event.observer} recovered after {format_duration(event.outage_s)}", file=sys.stderr)
