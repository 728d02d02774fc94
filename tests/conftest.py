"""What every test has: the two event loops, and one thread for torch."""

from __future__ import annotations

import os
import signal

# A shell's background job ignores Ctrl-C, and so would the programs that tests start and send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported anywhere: its thread pools would otherwise take every core, in child processes too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# The suite tries few inputs each time; `-m fuzz --hypothesis-profile=fuzz` tries many.
settings.register_profile("fuzz", max_examples=5_000, deadline=None)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run each test that is marked ``anyio`` under asyncio and under trio."""
    return str(request.param)
