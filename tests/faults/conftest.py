"""Fault injection: real servers and real processes, with faults put between them.

A quick selection runs with the other tests; everything with ``STAGECAST_FAULTS=full`` in the environment.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parent


def full() -> bool:
    """Whether all injections are made, and not just some."""
    return os.environ.get("STAGECAST_FAULTS") == "full"


def load(name: str) -> ModuleType:
    """A module of helpers in this folder, which is no package."""
    qualified = f"stagecast_faults_{name}"
    if qualified not in sys.modules:
        spec = importlib.util.spec_from_file_location(qualified, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[qualified] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[qualified]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``injection``: numbers from 0, as many as the module's ``INJECTIONS[test] = (quick, full)`` says."""
    if "injection" in metafunc.fixturenames:
        quick, complete = metafunc.module.INJECTIONS[metafunc.function.__name__]
        metafunc.parametrize("injection", range(complete if full() else quick))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real S3 server in a process of its own; see `servers.Server`."""
    with load("servers").moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real Azure server in a process of its own, where there is npm."""
    with load("servers").azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture(scope="session")
def helpers() -> Any:
    """`load`, for test modules, which cannot import this one."""
    return load


@pytest.fixture(scope="session", name="full")
def _full() -> bool:
    """`full`, for test modules."""
    return full()


@pytest.fixture(scope="session")
def disk() -> Any:
    """A run whose state is a function of the step, and faults at its border to the disk; see `disk_kit`."""
    return load("disk_kit")


@pytest.fixture(scope="session")
def nursery() -> Any:
    """Runs that may be killed; see `disk_nursery.run_child`."""
    return load("disk_nursery").run_child


@pytest.fixture(scope="session")
def runs() -> Any:
    """Runs that use everything that a resume must restore; see `resume_runs`."""
    return load("resume_runs")


@pytest.fixture(scope="session")
def child() -> Iterator[Any]:
    """A process that forks runs which get signals, or fork themselves; see `resume_child`."""
    with load("resume_child").children() as ready:
        yield ready
