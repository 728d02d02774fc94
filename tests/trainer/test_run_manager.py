"""Runs queued for a device: which of them are remembered."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from trainer.run_manager import MOST_JOBS, RunManager

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def failing() -> AsyncIterator[Any]:
    raise RuntimeError("at once")
    yield


async def test_runs_that_are_over_are_remembered_until_there_are_too_many() -> None:
    """The oldest of them goes first, and none before that."""
    async with RunManager.open(at_once=1, stop_s=1.0) as manager:
        for number in range(MOST_JOBS + 5):
            job = manager.start(f"run-{number}", failing)
            await job.over.wait()
            assert len(manager.jobs) == min(number + 1, MOST_JOBS)
        assert next(iter(manager.jobs)) == "run-5"
