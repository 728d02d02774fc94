"""Fixtures of every test: its event loop, one thread for torch, and programs that start in milliseconds."""

from __future__ import annotations

import gc
import os
import signal

# A shell's background job ignores Ctrl-C, and so would the programs that tests start and send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported anywhere: its thread pools would otherwise take every core, in child processes too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from support import nursery

if TYPE_CHECKING:
    from support.nats_server import NatsServer, StartNats

# The suite tries few inputs each time; `-m fuzz --hypothesis-profile=fuzz` tries many.
settings.register_profile("fuzz", max_examples=5_000, deadline=None)

FULL = os.environ.get("STAGECAST_FULL") == "1"
BACKENDS = ["asyncio", "trio"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of event-loop semantics, or with ``STAGECAST_FULL=1`` all of them, under both event loops."""
    names = metafunc.fixturenames
    given = [mark for mark in metafunc.definition.iter_markers("parametrize") if "anyio_backend" in mark.args[0]]
    both = FULL or metafunc.definition.get_closest_marker("both_event_loops")
    if "anyio_backend" in names and both and not given:
        metafunc.parametrize("anyio_backend", BACKENDS)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the whole suite on two processes, and what a command names in this one."""
    return 2 if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0


def pytest_collection_finish() -> None:
    """Keep what was imported out of garbage collections, of which each would take a fifth of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The event loop of a test that is marked ``anyio``, chosen by its name."""
    return BACKENDS[zlib.crc32(request.node.nodeid.encode()) % 2]


@pytest.fixture
def warm_starts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the Python programs of a test from one process, unless the test is marked ``cold_start``."""
    if not FULL and request.node.get_closest_marker("cold_start") is None:
        nursery.start()
        monkeypatch.setattr(subprocess, "Popen", nursery.Popen)


@pytest.fixture(scope="module")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A NATS server for tests that do nothing to it."""
    from support.nats_server import NatsServer  # needs nats

    one = NatsServer(tmp_path_factory.mktemp("nats")).start()
    yield one
    one.kill()


@pytest.fixture
def start_nats(tmp_path: Path) -> Iterator[StartNats]:
    """Start a NATS server of the test's own."""
    from support.nats_server import NatsServer

    started: list[NatsServer] = []

    def start(config: str = "", **options: Any) -> NatsServer:
        started.append(NatsServer(tmp_path / f"nats{len(started)}", config, **options))
        return started[-1].start()

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def no_nats_client_is_left(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """The clients of a test leave no thread, and print nothing."""
    from support.threads import trainer_threads, wait_until

    yield
    wait_until(lambda: "stagecast-nats" not in trainer_threads(), "the thread of a client has not ended")
    assert "nats:" not in capfd.readouterr().err
