"""The library's logger, and where its warnings go.

Records go through structlog to the standard logger ``stagecast``, with ``run_id``, ``rank`` and ``global_step`` as
extra fields, and with texts that are safe to show (`PlainRecords`). The library configures nothing: where a handler of
the host takes them, on ``stagecast`` or on the root logger, they go there alone. Where none does, warnings and errors
appear on stderr, one line each, unless the console of their run shows them. Those of a run are published, too, as
`WarningLogged`.

To silence them, give the logger ``stagecast`` a handler or a higher level.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Literal, NamedTuple, ParamSpec, TypeVar

import structlog
from structlog.typing import EventDict

from events.masking import masked
from events.messages import Event, WarningLogged
from events.origin import Header, Origin
from events.stderr import Repeats, stderr
from events.stderr import flush_stderr as flush_stderr
from events.text import one_line, plain_lines
from events.tracebacks import describe, format_traceback, without_controls

current_origin: ContextVar[Origin | None] = ContextVar("stagecast_origin", default=None)
"""The run that the current thread or task works for."""

_MOST_HELD = 256
_MOST_CHARS = 10_000
"""Maximum characters per line on stderr, and per text that a handler of the host gets."""
_RESERVED = {*vars(logging.makeLogRecord({})), "message", "asctime"} - {"exc_info", "stack_info"}

P = ParamSpec("P")
R = TypeVar("R")
Level = Literal["warning", "error"]
_NUMBERS = {"warning": logging.WARNING, "error": logging.ERROR}


class Warned(NamedTuple):
    """One warning, as it was logged."""

    level: Level
    message: str
    exception: str | None
    """Traceback, if it is about an exception."""
    repeats: int
    """Identical ones before it, which were not shown."""
    time: float
    where: str
    """Run and step, in words; empty outside of any run."""

    @property
    def line(self) -> str:
        """It, in one line."""
        more = f" [{self.repeats:,} more like this before]" if self.repeats else ""
        return f"stagecast: {self.level}: {one_line(self.message, _MOST_CHARS)}{more}{self.where}\n"


# ------------------------------------------------------------------------------------- the warnings of a run


@contextlib.contextmanager
def logging_for(origin: Origin) -> Iterator[None]:
    """Let this thread or task, and those that it starts, log for a run."""
    token = current_origin.set(origin)
    try:
        yield
    finally:
        current_origin.reset(token)


class RunLog:
    """The warnings of one run: published as events, and left to its console where that shows them.

    Args:
        origin: Of the run. Threads and tasks that have it in `current_origin` log for the run.
        publish: Takes the events; must wait for nothing.
    """

    def __init__(self, origin: Origin, publish: Callable[[Event], None]) -> None:
        self._origin = origin
        self._publish = publish
        self._console: Callable[[], bool] = _no_console
        self._held: deque[Warned] = deque(maxlen=_MOST_HELD)  # left to the console
        self._before: list[Warned] | None = list(_collected.get() or ())
        self._lock = threading.RLock()  # a signal's handler may log while its own thread holds it
        self._pid = os.getpid()
        self.repeats = Repeats()
        _runs[origin] = self

    @property
    def is_ours(self) -> bool:
        """Whether this is the run's process, not one that was forked from it."""
        return self._pid == os.getpid()

    def take(self, warned: Warned, *, publish: bool) -> bool:
        """Publish it, once the run has started; returns whether the run's console will show it."""
        if publish:
            with self._lock:
                if self._before is not None:
                    self._before.append(warned)
                    publish = False
        if publish:
            self._publish(self._event(warned, self._origin.header()))
        if not self._console():
            return False
        self._held.append(warned)
        return True

    def begin(self, console: Callable[[], bool]) -> None:
        """The run is about to be served: what was logged before is on stderr, or with the host's handlers, already.

        Args:
            console: Says whether a console of this process shows what is published. Any thread.
        """
        for warned in self._before or ():
            _on_stderr.append((warned.time, warned.message))
        self._console = console

    def start(self) -> None:
        """The run has started: publish what was logged before, and from now on what is logged."""
        with self._lock:
            before, self._before = self._before or [], None
            run_id, attempt, seq, _, *rest = self._origin.header()
            for warned in before:
                self._publish(self._event(warned, (run_id, attempt, seq, warned.time, *rest)))  # type: ignore[arg-type]  # mypy loses the tuple's types

    def leave_console(self, *, failed: bool) -> None:
        """The console takes no more events: what is logged from now on goes to stderr.

        Args:
            failed: Whether it may not have shown what was left to it: that goes to stderr now.
        """
        self._console = _no_console
        if failed and not has_handlers():
            for warned in self._held:
                stderr.put(warned.line)
            self._held.clear()

    def publish_rest(self) -> None:
        """Publish how many identical warnings were held back since they were last shown."""
        for message, count in self.repeats.rest():
            _show(Warned("warning", message, None, count, time.time(), _where(self._origin)), self, publish=True)

    def end(self) -> None:
        """The run is over: nothing is published any more."""
        self._console = _no_console
        if _runs.get(self._origin) is self:
            del _runs[self._origin]

    @staticmethod
    def _event(warned: Warned, header: Header) -> WarningLogged:
        return WarningLogged(
            *header, level=warned.level, message=warned.message, exception=warned.exception, repeats=warned.repeats
        )


def _no_console() -> bool:
    return False


_runs: dict[Origin, RunLog] = {}
_repeats = Repeats()  # of what is logged outside of any run
_on_stderr: deque[tuple[float, str]] = deque(maxlen=_MOST_HELD)
_collected: ContextVar[list[Warned] | None] = ContextVar("stagecast_collected", default=None)
forward: list[Callable[[Warned], None]] = []
"""Take each warning of this process too, on the thread or task that logs it; a launched run adds one."""


@contextlib.contextmanager
def collecting(warnings: list[Warned]) -> Iterator[None]:
    """Collect what the current thread logs, and what the list holds already, for the run that it is about to begin."""
    token = _collected.set(warnings)
    try:
        yield
    finally:
        _collected.reset(token)


def collects(method: Callable[P, R]) -> Callable[P, R]:
    """Decorate a method that prepares runs: its object collects what it logs, in ``_warned``, for `collecting`."""

    @functools.wraps(method)
    def collected(*args: P.args, **kwargs: P.kwargs) -> R:
        with collecting(vars(args[0]).setdefault("_warned", [])):
            return method(*args, **kwargs)

    return collected


def is_on_stderr(event: WarningLogged) -> bool:
    """Whether this process has shown it before its run began, so that a console must not show it again."""
    return (event.time, event.message) in _on_stderr


def in_this_run(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a thread's target: it logs for the run that the calling thread works for."""
    origin = current_origin.get()

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        current_origin.set(origin)
        return function(*args, **kwargs)

    return run


def show_problems(problems: Sequence[str], *, on_stderr: bool) -> None:
    """Show what is unhealthy about the run of this thread or task, at its end.

    Args:
        on_stderr: Whether it goes to stderr also where handlers of the host take warnings, unless one of them writes
            there.
    """
    origin = current_origin.get()
    where = _where(origin) if origin is not None else ""
    handled = has_handlers()
    if problems and handled:
        logger.warning(f"the run has ended with problems: {'; '.join(problems)}", published=True)
    for problem in problems:
        warned = Warned("warning", problem, None, 0, time.time(), where)
        if (on_stderr and not _is_handled_on_stderr()) or (not handled and _takes("warning")):
            stderr.put(warned.line)


# ------------------------------------------------------------------------------------------ the processors


def _add_origin(_: object, __: str, event_dict: EventDict) -> EventDict:
    origin = current_origin.get()
    if origin is not None:
        event_dict.setdefault("run_id", origin.run_id)
        event_dict.setdefault("rank", origin.rank)
        event_dict.setdefault("global_step", origin.global_step)
    return event_dict


def _report(_: object, method: str, event_dict: EventDict) -> EventDict:
    """Show warnings to people, and publish those of a run. Before the host's level is asked: events are not the host's.

    A caller passes ``published=True`` where an event of another type reports the same.
    """
    published = event_dict.pop("published", False)
    message = str(event_dict.get("event", ""))
    if positional := event_dict.pop("positional_args", None):
        try:
            message = message % positional
        except (TypeError, ValueError):
            message = f"{message} {positional!r}"
    event_dict["event"] = message = masked(message)
    number = logging.getLevelNamesMapping().get(method.upper(), logging.ERROR)  # "exception" is not a level
    if number < logging.WARNING:
        return event_dict
    level: Level = "error" if number > logging.WARNING else "warning"
    origin = current_origin.get()
    run = _runs.get(origin) if origin is not None else None
    if run is not None and not run.is_ours:
        run = None
    if run is None and (collected := _collected.get()) is not None:
        repeats = None if any(message == other.message for other in collected) else 0  # once for each run
    else:
        repeats = (run.repeats if run is not None else _repeats).take(message)
    if repeats is not None:
        exception = _exception_of(event_dict.get("exc_info"))
        text = None if exception is None else format_traceback(exception)
        if exception is not None and describe(exception).partition(": ")[2] not in message:
            message = f"{message} ({describe(exception)})"
        where = _in_words(event_dict.get("run_id"), event_dict.get("global_step"), event_dict.get("rank"))
        _show(Warned(level, message, text, repeats, time.time(), where), run, publish=not published)
    return event_dict


def _show(warned: Warned, run: RunLog | None, *, publish: bool) -> None:
    collected = _collected.get()
    if collected is not None and run is None:
        collected.append(warned)
    shown = run.take(warned, publish=publish) if run is not None else False
    for take in forward:
        take(warned)
    if not shown and _takes(warned.level) and not has_handlers():
        if run is not None:
            stderr.put(warned.line)  # this may be the thread that trains, or the host's event loop
        else:
            stderr.write(warned.line)


def _exception_of(exc_info: object) -> BaseException | None:
    if exc_info is True:
        return sys.exc_info()[1]
    if isinstance(exc_info, tuple):
        exc_info = exc_info[1]
    return exc_info if isinstance(exc_info, BaseException) else None


def _where(origin: Origin) -> str:
    return _in_words(origin.run_id, origin.global_step, origin.rank)


def _in_words(run_id: object, step: object, rank: object) -> str:
    if run_id is None:
        return ""
    return f" (run {run_id}, step {step}" + (f", rank {rank})" if rank else ")")


def _takes(level: Level) -> bool:
    """Whether the host's level lets it through. `dictConfig` disables existing loggers; that does not count."""
    number = _NUMBERS[level]
    return _stdlib_logger.getEffectiveLevel() <= number and _stdlib_logger.manager.disable < number


def has_handlers() -> bool:
    """Whether a handler of the host takes the records of this library."""
    return any(True for _ in _handlers())


def _is_handled_on_stderr() -> bool:
    return any(getattr(handler, "stream", None) is sys.stderr for handler in _handlers())


def _handlers() -> Iterator[logging.Handler]:
    current: logging.Logger | None = None if _stdlib_logger.disabled else _stdlib_logger
    while current is not None:
        yield from (handler for handler in current.handlers if handler is not _null)
        current = current.parent if current.propagate else None


def _rename_reserved(_: object, __: str, event_dict: EventDict) -> EventDict:
    """A host may have bound ``name``: the standard library refuses extra fields that a record has itself."""
    return {f"{key}_" if key in _RESERVED else key: value for key, value in event_dict.items()}


class PlainRecords(logging.Filter):
    """Makes the records of a logger harmless for whatever handlers and formatters the host has.

    Names, files, servers and exceptions bring texts of strangers. Each text of a record becomes one line without
    control characters, marks of text direction and secrets of URLs; tracebacks keep their line breaks.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; it always passes."""
        try:
            record.msg = record.getMessage()
        except (TypeError, ValueError):  # of a format that does not fit
            record.msg = f"{record.msg} {record.args!r}"
        record.args = ()
        if record.exc_info and (error := record.exc_info[1]) is not None:
            plain = without_controls(error)
            record.exc_info = (type(plain), plain, plain.__traceback__)
        for name, value in vars(record).items():
            if isinstance(value, str):
                lines = name in ("exc_text", "stack_info")
                setattr(record, name, (plain_lines if lines else one_line)(masked(value), _MOST_CHARS))
        return True


_stdlib_logger = logging.getLogger("stagecast")
_stdlib_logger.addFilter(PlainRecords())
_null = logging.NullHandler()  # or the standard library's last resort would print what is shown here
_stdlib_logger.addHandler(_null)

logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
    _stdlib_logger,
    processors=[
        structlog.contextvars.merge_contextvars,
        _add_origin,
        _report,
        structlog.stdlib.filter_by_level,
        _rename_reserved,
        structlog.stdlib.render_to_log_kwargs,
    ],
    wrapper_class=structlog.stdlib.BoundLogger,
    context_class=dict,
    cache_logger_on_first_use=True,
)
