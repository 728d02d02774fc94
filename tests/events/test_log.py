"""The library's logger: a host's handlers alone where there are some, else stderr; and the events of a run."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

import events
from events.log import RunLog, collecting, collects, current_origin, in_this_run, is_on_stderr, logger
from events.origin import Origin

ROOT = Path(events.__file__).parent.parent


@pytest.fixture
def origin() -> Iterator[Origin]:
    """A run that the current context works for."""
    origin = Origin("run-7", rank=3)
    token = current_origin.set(origin)
    yield origin
    current_origin.reset(token)


def run_script(script: str, folder: Path) -> tuple[str, str]:
    """What a program prints that has imported the logger: stdout and stderr."""
    lines = "import logging, logging.config, os, sys, structlog\nfrom events.log import *\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"{lines}from events.log import RunLog, current_origin, flush_stderr\n{script}"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_without_configuration_a_warning_is_one_line_on_stderr(tmp_path: Path) -> None:
    """Once, with run and step; less is not printed, and nothing of the host is configured by the import."""
    script = (
        "logger.info('quiet')\n"
        "logger.warning('two\\nlines\\x07', exc_info=ValueError('seen'))\n"
        "current_origin.set(Origin('run-7', rank=3))\n"
        "for _ in range(3): logger.error('bad')\n"
        "print(logging.getLogger().handlers, logging.getLogger('stagecast').level, structlog.is_configured())\n"
    )
    said, shown = run_script(script, tmp_path)
    assert said == "[] 0 False\n"
    assert shown == (
        "stagecast: warning: two lines\\x07 (ValueError: seen)\nstagecast: error: bad (run run-7, step 0, rank 3)\n"
    )


@pytest.mark.parametrize(
    ("configuration", "expected"),
    [
        ("logging.basicConfig(format='root %(message)s')", "root heard\n"),
        ("logging.getLogger('stagecast').addHandler(logging.StreamHandler())", "heard\n"),
        ("logging.getLogger('stagecast').addHandler(logging.NullHandler())", ""),
        ("logging.getLogger().addHandler(logging.FileHandler('log.txt'))", ""),
        ("logging.captureWarnings(True)", "stagecast: warning: heard\n"),
        ("logging.getLogger('stagecast').setLevel('ERROR')", ""),
        ("logging.disable(logging.WARNING)", ""),
        # Its default disables the loggers that exist, which nobody means by it.
        ("logging.config.dictConfig({'version': 1, 'root': {'level': 'INFO'}})", "stagecast: warning: heard\n"),
        ("structlog.configure(processors=[])", "stagecast: warning: heard\n"),
        ("logging.getLogger('stagecast').propagate = False; logging.basicConfig()", "stagecast: warning: heard\n"),
        ("sys.stderr = None", ""),
        ("sys.stderr.close()", ""),
        ("sys.stderr = type('W', (), {'write': lambda self, text: print(text, end='')})()", ""),
    ],
)
def test_the_hosts_own_configuration_decides(tmp_path: Path, configuration: str, expected: str) -> None:
    """Where a handler takes the records, or a level refuses them, nothing is added; no stream is too odd."""
    end = "sys.stderr = sys.__stderr__"  # Python itself stumbles over the odd ones when it ends
    said, shown = run_script(f"{configuration}\nlogger.warning('heard')\n{end}", tmp_path)
    assert shown == expected
    assert said == ("stagecast: warning: heard\n" if "'W'" in configuration else "")


class Told:
    """A run whose events are kept."""

    def __init__(self) -> None:
        self.origin = Origin("run-7")
        self.events: list[Any] = []
        self.log = RunLog(self.origin, self.events.append)
        self.log.begin(lambda: False)
        self.log.start()

    def texts(self) -> list[tuple[str, str, int]]:
        return [(event.level, event.message, event.repeats) for event in self.events]


@pytest.fixture
def told() -> Iterator[Told]:
    """A run that the current context works for."""
    told = Told()
    token = current_origin.set(told.origin)
    yield told
    current_origin.reset(token)
    told.log.end()


def test_a_warning_of_a_run_is_an_event_of_its_step_with_the_traceback(told: Told) -> None:
    """Whatever the host's level; what is less than a warning, or what another event reports, is none."""
    told.origin.global_step = 5
    logging.getLogger("stagecast").setLevel(logging.CRITICAL)
    try:
        logger.info("usual")
        logger.warning("slow")
        logger.error("failed in open", published=True)
        try:
            raise ValueError("cause")
        except ValueError:
            logger.exception("failed")
    finally:
        logging.getLogger("stagecast").setLevel(logging.NOTSET)
    assert told.texts() == [("warning", "slow", 0), ("error", "failed (ValueError: cause)", 0)]
    assert (told.events[0].run_id, told.events[0].global_step) == ("run-7", 5)
    assert told.events[1].exception.endswith('raise ValueError("cause")\nValueError: cause')


def test_identical_warnings_are_counted_and_a_flood_is_not_published(told: Told) -> None:
    """A warning at each step must fill neither a journal nor a screen; what was held back is named at the end."""
    for number in range(1_000):
        logger.warning("again")
        logger.warning(f"step {number}")
    assert len(told.events) < 200
    told.log.publish_rest()
    assert told.texts()[-2] == ("warning", "again", 999)
    assert "more warnings came too fast" in told.texts()[-1][1]


def test_a_thread_that_the_run_starts_logs_for_it(told: Told) -> None:
    """A new thread has no context: another one's warnings are not taken for the run's."""
    for target, message in ((in_this_run(logger.warning), "ours"), (logger.warning, "another's")):
        thread = threading.Thread(target=target, args=(message,))
        thread.start()
        thread.join()
    assert [message for _, message, _ in told.texts()] == ["ours"]


def test_what_was_logged_before_a_run_began_is_published_by_it() -> None:
    """What its checks found is part of its history, and is not shown a second time."""

    class Job:
        @collects
        def __init__(self) -> None:
            logger.warning("odd")
            logger.warning("odd")

    job: Any = Job()
    with collecting(job._warned):
        told = Told()
    assert [(event.message, event.seq, is_on_stderr(event)) for event in told.events] == [("odd", 0, True)]
    told.log.end()


def test_a_console_shows_the_warnings_that_are_left_to_it(tmp_path: Path) -> None:
    """Not stderr besides; but it does once the console takes no more, also what a console that failed had held."""
    script = (
        "takes = [True]\n"
        "log = RunLog(Origin('r'), lambda event: None)\n"
        "current_origin.set(log._origin)\n"
        "log.begin(lambda: takes[0])\n"
        "logger.warning('left to it')\n"
        "takes[0] = False\n"
        "logger.warning('not left')\n"
        "log.leave_console(failed=FAILED)\n"
    )
    line = "stagecast: warning: {} (run r, step 0)\n".format
    for failed, expected in ((True, line("not left") + line("left to it")), (False, line("not left"))):
        assert run_script(script.replace("FAILED", str(failed)), tmp_path)[1] == expected


def test_a_forked_child_writes_its_own_warnings_and_publishes_none(tmp_path: Path) -> None:
    """A dataloader's worker has the parent's run in its memory, but neither its event loop nor its threads."""
    script = (
        "events = []\n"
        "log = RunLog(Origin('r'), events.append)\n"
        "current_origin.set(log._origin)\n"
        "log.start()\n"
        "logger.warning('here')\n"
        "flush_stderr()\n"
        "if os.fork() == 0:\n"
        "    logger.warning('there')\n"
        "    os._exit(len(events) - 1)\n"
        "print(os.wait()[1])\n"
    )
    said, shown = run_script(script, tmp_path)
    assert said == "0\n"
    assert [line.split()[2] for line in shown.splitlines()] == ["here", "there"]


def test_a_record_has_the_run_and_the_step_of_the_moment_unless_others_are_given(
    origin: Origin, caplog: pytest.LogCaptureFixture
) -> None:
    """As extra fields; the standard library's own fields are untouched."""
    for origin.global_step in (4, 5):
        logger.warning("100% slow", wait_s=1.5)
    logger.warning("late", global_step=2)
    token = current_origin.set(None)
    logger.warning("outside of any run")
    current_origin.reset(token)
    *records, outside = caplog.records
    assert (records[0].name, records[0].levelname, records[0].getMessage()) == ("stagecast", "WARNING", "100% slow")
    fields = ("run_id", "rank", "global_step", "wait_s")
    found = [[vars(record).get(name) for name in fields] for record in records]
    assert found == [["run-7", 3, 4, 1.5], ["run-7", 3, 5, 1.5], ["run-7", 3, 2, None]]
    assert not hasattr(outside, "run_id")


def test_names_that_a_record_has_itself_are_changed(origin: Origin, caplog: pytest.LogCaptureFixture) -> None:
    """A host may have bound any name in its context; the standard library would raise for these."""
    with structlog.contextvars.bound_contextvars(name="host", message="m", args="a", asctime="t", request="r"):
        logger.warning("bound", thread="main")
    record = caplog.records[0].__dict__
    names = ("name_", "message_", "args_", "asctime_", "request", "thread_")
    assert [record[name] for name in names] == ["host", "m", "a", "t", "r", "main"]
    assert record["name"] == "stagecast"


def test_the_standard_library_gets_exceptions_and_decides_on_levels_whatever_structlog_is_configured_to(
    caplog: pytest.LogCaptureFixture,
) -> None:
    error = ValueError("cause")
    try:
        structlog.configure(processors=[], logger_factory=structlog.ReturnLoggerFactory())
        with caplog.at_level(logging.ERROR, logger="stagecast"):
            logger.warning("too low")
            logger.error("high enough", exc_info=error)
    finally:
        structlog.reset_defaults()
    (record,) = caplog.records
    assert record.getMessage() == "high enough"
    assert record.exc_info is not None
    assert record.exc_info[1] is error


HOSTILE = "name\r\n2026-01-01 CRITICAL forged\x1b[2J\x9b1A\u2028\u202e\ud800 s3://user:pa/ss@host/x?token=abc"
HANDLERS = {
    "plain": logging.Formatter("%(levelname)s %(message)s %(path)s"),
    "json": structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
        foreign_pre_chain=[structlog.stdlib.ExtraAdder(), structlog.processors.add_log_level],
    ),
    "console": structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
        ],
        foreign_pre_chain=[structlog.stdlib.ExtraAdder(), structlog.processors.add_log_level],
    ),
}


@pytest.fixture(params=list(HANDLERS))
def host(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What a handler of the host writes, as lines."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(HANDLERS[request.param])
    log = logging.getLogger("stagecast")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lambda: stream.getvalue().split("\n")[:-1]
    log.setLevel(logging.NOTSET)
    log.removeHandler(handler)


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_a_text_of_a_stranger_is_one_harmless_line_of_a_hosts_handler(host: Any, level: str) -> None:
    """Message, arguments and fields: no line break, no escape, no text direction, no secret."""
    log = getattr(logger, level)
    log(HOSTILE, path=HOSTILE)
    log("%s of %d", HOSTILE, 3, path="p")
    log("%d", HOSTILE, path="p")  # a format that does not fit
    lines = host()
    assert len(lines) == 3
    for line in lines:
        assert line.isprintable()
        assert "CRITICAL forged" in line
        assert "pa/ss" not in line
        assert "abc" not in line


def raise_hostile() -> None:
    try:
        raise KeyError(HOSTILE)
    except KeyError as error:
        group = ExceptionGroup(HOSTILE, [ValueError(HOSTILE), OSError(2, HOSTILE, HOSTILE)])
        group.add_note(HOSTILE)
        error.__context__ = group  # a circle
        raise group from error


def test_a_traceback_of_a_stranger_keeps_its_lines_and_nothing_else(host: Any) -> None:
    """Causes, groups and notes; types keep their names, frames their lines."""
    try:
        raise_hostile()
    except ExceptionGroup as error:
        logger.warning("failed", exc_info=error, path="p")
    text = "\n".join(json.loads(line)["exception"] if line.startswith("{") else line for line in host())
    assert all(line.isprintable() for line in text.splitlines())
    for part in ("KeyError: ", "ExceptionGroup: name", "ValueError: name", "FileNotFoundError: ", "in raise_hostile"):
        assert part in text
    assert "pa/ss" not in text
    assert text.count("forged") >= 5


def test_an_exception_whose_text_cannot_be_had_is_logged(host: Any) -> None:
    """By its type."""

    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    logger.warning("failed", exc_info=Odd(), path="p")
    assert any("Odd" in line for line in host())
