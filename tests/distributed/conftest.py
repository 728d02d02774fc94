"""Ranks of a program, as ``torchrun`` starts them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ranks import Ranks, StartRanks


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[StartRanks]:
    """Start a program on several ranks; they are killed when the test ends."""
    started: list[Ranks] = []

    def start(text: str, ranks: int = 2, *options: str, **more: Any) -> Ranks:
        started.append(Ranks(text, tmp_path, ranks, *options, **more))
        return started[-1]

    yield start
    for one in started:
        one.close()
