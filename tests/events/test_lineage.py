"""The order of checkpoints, without files."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.checkpoint.lineage import ranked
from events.checkpoint.manifest import CheckpointName, Metric

NAMES = st.builds(CheckpointName, st.integers(0, 9), st.integers(1, 3))


@pytest.mark.parametrize("mode", ["min", "max"])
@given(values=st.dictionaries(NAMES, st.integers(-3, 3), min_size=1))
def test_the_best_checkpoint_is_the_first_and_of_equal_ones_the_newer(
    mode: Any, values: dict[CheckpointName, int]
) -> None:
    """Without a mode, that of the newest checkpoint counts, which is the first given."""
    other: Any = "max" if mode == "min" else "min"
    newest = next(iter(values))
    scores = {name: Metric("m", value, mode if name == newest else other) for name, value in values.items()}
    for order in (ranked(scores), ranked(scores, mode)):
        assert sorted(order) == sorted(values)
        for better, worse in pairwise(order):
            gain = values[better] - values[worse] if mode == "max" else values[worse] - values[better]
            assert gain > 0 or (gain == 0 and better > worse)
