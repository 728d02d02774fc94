"""``stagecast replay``: its output on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial

import anyio

from events.errors import SinkMisconfigured
from events.journal.reader import SkippedLine
from events.messages import Event, ObserverFailed, ObserverRecovered
from events.sink import Sink
from trainer.cli.text import echo, echo_error
from trainer.config import UNREADABLE, parse_yaml

_SHOWN = 5
"""Maximum damaged journal lines that are listed one by one."""


def replay(run_dir: str, to: Sequence[Sequence[str]], since: int) -> int:
    """Send a run to sinks; returns the exit code.

    Args:
        to: For each sink its name and its options as ``name=value``.

    Raises:
        RunFolderError: There is no journal.
        SinkMisconfigured: There is no such sink, or an option is wrong.
    """
    from sinks.replay import replay as feed

    sinks = [_sink(name, options) for name, *options in to]
    skipped: list[SkippedLine] = []
    reports = anyio.run(partial(feed, run_dir, sinks, since=since, on_health=_print_health, skipped=skipped))
    _print_skipped(skipped)
    for report in reports:
        left = f", {report.left:,} not" if report.left else ""
        state = f" ({report.state}: {report.error})" if report.state != "closed" else ""
        echo(f"{report.observer}: {report.delivered:,} events delivered{left}{state}")
    whole = all(line.torn for line in skipped)  # a line that a crash has torn was never an event
    return 0 if whole and all(report.state == "closed" and not report.left for report in reports) else 1


def _sink(name: str, options: Sequence[str]) -> Sink:
    from sinks.registry import build_sink

    values: dict[str, object] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise SinkMisconfigured(f"--to {name} {option}: the option must look like NAME=VALUE")
        values[key] = _parsed(value)
    sink = build_sink(name, values)
    check = getattr(sink, "check", None)
    if callable(check):
        check()
    return sink


def _parsed(text: str) -> object:
    """Parse a list or a mapping; other text is converted to the option's type later."""
    if text.startswith(("[", "{")):
        with contextlib.suppress(*UNREADABLE):
            return parse_yaml(text)
    return text


def _print_skipped(skipped: Sequence[SkippedLine]) -> None:
    """Print the first skipped lines of the journal, and the number of others."""
    for line in skipped[:_SHOWN]:
        what = "torn when the process of the run died" if line.torn else f"skipped: {line.reason}"
        if line.first_seq is not None and line.last_seq is not None:
            lost = line.last_seq - line.first_seq + 1
            what += f"; {lost:,} event{'s are' if lost > 1 else ' is'} lost"
        echo_error(f"{line.path}, line {line.line}: {what}")
    if len(skipped) > _SHOWN:
        echo_error(f"... and {len(skipped) - _SHOWN:,} more lines")


def _print_health(event: Event) -> None:
    from sinks.format import format_duration

    if isinstance(event, ObserverFailed):
        echo_error(f"{event.observer} failed in {event.during} ({event.action}): {event.error}")
    elif isinstance(event, ObserverRecovered):
        echo_error(f"{event.observer} recovered after {format_duration(event.outage_s)}")
