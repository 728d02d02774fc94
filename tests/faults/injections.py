"""Which faults are injected: a quick selection, or with ``STAGECAST_FAULTS=full`` all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

FULL = os.environ.get("STAGECAST_FAULTS") == "full"


def injected(names: str, rows: Sequence[object], quick: int, *, indirect: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Parametrize a test with the first ``quick`` rows, or with all of them."""
    return pytest.mark.parametrize(names, rows if FULL else rows[:quick], indirect=indirect)
