"""One kernel, and one JupyterLab, for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from live.conftest import browser as browser
from live.conftest import chromium as chromium

pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A kernel in which `kit.SETUP` has run; see `kit.Kernel`."""
    from notebook.kit import SETUP, Kernel

    one = Kernel(tmp_path_factory.mktemp("notebook"))
    one.run(SETUP)
    yield one
    one.stop()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, browser: Any) -> Iterator[object]:
    """JupyterLab, open in a browser; see `lab.Lab`."""
    pytest.importorskip("jupyterlab")
    from notebook.lab import Lab

    one = Lab(tmp_path_factory.mktemp("lab"), browser)
    try:
        one.wait()
        yield one
    finally:
        one.stop()
