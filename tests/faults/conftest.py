"""Servers of objects, each in its own process."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
from faults import servers
from faults.injections import FULL
from support.faulty_proxy import FaultyProxy


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture
def proxy(s3: servers.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy in front of the S3 server, which new connections of the test use."""
    with FaultyProxy(s3.port) as proxy:
        for name, value in s3.environment(proxy.port).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture(scope="session")
def helpers() -> Callable[[str], ModuleType]:
    return lambda name: importlib.import_module(f"faults.{name}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "injection" in metafunc.fixturenames and hasattr(metafunc.module, "INJECTIONS"):
        quick, complete = metafunc.module.INJECTIONS[metafunc.function.__name__]
        metafunc.parametrize("injection", range(complete if FULL else quick))
