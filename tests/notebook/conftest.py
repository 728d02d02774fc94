"""One kernel for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
