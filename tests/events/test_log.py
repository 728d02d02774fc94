"""The library's logger: silent where nobody listens, and saying whose record it is where somebody does."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

import events
from events.log import current_origin, logger
from events.origin import Origin

ROOT = Path(events.__file__).parent.parent


@pytest.fixture
def origin() -> Iterator[Origin]:
    """A run that the current context works for."""
    origin = Origin("run-7", rank=3)
    token = current_origin.set(origin)
    yield origin
    current_origin.reset(token)


def test_it_is_silent_in_a_host_that_configured_nothing(tmp_path: Path) -> None:
    """Not even the standard library's last resort prints it, and nothing of the host is configured by the import."""
    script = (
        "import logging, structlog\n"
        "from events.log import logger\n"
        "logger.warning('heard', exc_info=ValueError('seen'))\n"
        "logger.error('heard')\n"
        "print(logging.getLogger().handlers, logging.getLogger('stagecast').level, structlog.is_configured())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.stdout, result.stderr, result.returncode) == ("[] 0 False\n", "", 0)


def test_a_record_below_the_hosts_level_is_not_made(caplog: pytest.LogCaptureFixture) -> None:
    """The standard library's levels rule."""
    with caplog.at_level(logging.ERROR, logger="stagecast"):
        logger.warning("too low")
        logger.error("high enough")
    assert caplog.messages == ["high enough"]


def test_a_record_says_which_run_and_step_it_belongs_to(origin: Origin, caplog: pytest.LogCaptureFixture) -> None:
    """As extra fields, with the step of the moment; the standard library's own fields are untouched."""
    for origin.global_step in (4, 5):
        logger.warning("100% slow", wait_s=1.5)
    first, second = caplog.records
    assert (first.name, first.levelname, first.getMessage()) == ("stagecast", "WARNING", "100% slow")
    fields = ("run_id", "rank", "global_step", "wait_s")
    assert [first.__dict__[name] for name in fields] == ["run-7", 3, 4, 1.5]
    assert [second.__dict__[name] for name in fields] == ["run-7", 3, 5, 1.5]


def test_a_record_outside_of_any_run_has_no_run(caplog: pytest.LogCaptureFixture) -> None:
    """It does not claim to belong to one."""
    logger.warning("before")
    assert not hasattr(caplog.records[0], "run_id")


def test_a_field_that_is_given_wins_over_that_of_the_run(origin: Origin, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever writes about another step says so."""
    logger.warning("late", global_step=2)
    assert caplog.records[0].__dict__["global_step"] == 2
    assert caplog.records[0].__dict__["run_id"] == "run-7"


def test_names_that_a_record_has_itself_are_changed(origin: Origin, caplog: pytest.LogCaptureFixture) -> None:
    """A host may have bound any name in its context; the standard library would raise for these."""
    with structlog.contextvars.bound_contextvars(name="host", message="m", args="a", asctime="t", request="r"):
        logger.warning("bound", thread="main")
    record = caplog.records[0].__dict__
    names = ("name_", "message_", "args_", "asctime_", "request", "thread_")
    assert [record[name] for name in names] == ["host", "m", "a", "t", "r", "main"]
    assert record["name"] == "stagecast"


def test_an_exception_is_handed_to_the_standard_library(caplog: pytest.LogCaptureFixture) -> None:
    """So that the host's handlers show, or send, its traceback."""
    error = ValueError("cause")
    logger.warning("failed", exc_info=error)
    information = caplog.records[0].exc_info
    assert information is not None
    assert information[1] is error


def test_the_hosts_structlog_configuration_does_not_apply(caplog: pytest.LogCaptureFixture) -> None:
    """It may print, drop or render as it likes: our records go to the standard library."""
    try:
        structlog.configure(processors=[], logger_factory=structlog.ReturnLoggerFactory())
        logger.warning("through")
    finally:
        structlog.reset_defaults()
    assert caplog.messages == ["through"]
