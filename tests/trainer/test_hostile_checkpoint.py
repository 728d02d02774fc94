"""Checkpoints that a stranger crafted: they are refused before they harm the process, its memory or its disk."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from events.errors import CheckpointDamaged
from trainer.data.rng import capture_rng, restore_rng
from trainer.data.tensors import clone_tensors
from trainer.hooks.collate import OutputCollector

CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------------- random generators


def changed(state: Any, index: int, value: Any) -> Any:
    return (*state[:index], value, *state[index + 1 :])


@pytest.mark.parametrize(
    ("generator", "index", "value"),
    [
        ("numpy", 0, "PCG64"),
        ("numpy", 1, np.zeros(623, np.uint32)),
        ("numpy", 1, np.zeros(624, np.uint64)),
        ("numpy", 1, np.zeros((1, 624), np.uint32)),
        ("numpy", 1, [0] * 624),
        ("numpy", 2, 10**9),
        ("numpy", 2, -1),
        ("numpy", 2, 1.0),
        ("numpy", 3, 2),
        ("numpy", 4, float("nan")),
        ("numpy", 4, "0.5"),
        ("numpy", 2, 2**80),
        ("python", 0, 9),
        ("python", 1, (0,) * 624),
        ("python", 1, (*[0] * 624, 625)),
        ("python", 2, "0.5"),
        ("torch", slice(0), torch.zeros(16, dtype=torch.uint8)),
        ("torch", slice(0), torch.zeros(5_056, dtype=torch.uint8)),
        ("torch", slice(0), torch.zeros(5_056)),
    ],
)
def test_a_state_that_is_not_of_such_a_generator_is_refused_and_none_is_set(
    generator: str, index: Any, value: Any
) -> None:
    """NumPy's reads behind its state with a wrong position; the others would be set before it fails."""
    good = capture_rng(CPU)
    bad = good | {generator: value if generator == "torch" else changed(good[generator], index, value)}
    drawn = random.random(), np.random.rand(), torch.rand(1)
    before = capture_rng(CPU)
    with pytest.raises(CheckpointDamaged, match="random generators cannot be restored"):
        restore_rng(bad, CPU)
    after = capture_rng(CPU)
    assert before["python"] == after["python"]
    assert torch.equal(before["torch"], after["torch"])
    assert all(map(np.array_equal, before["numpy"], after["numpy"]))
    restore_rng(good, CPU)
    assert (random.random(), np.random.rand(), torch.rand(1)) == drawn


# ------------------------------------------------------------------------------------- tensors under many names


def test_a_tensor_that_occurs_often_is_copied_once() -> None:
    """Hundreds of references to one tensor would fill the memory."""
    tensor = torch.zeros(4)
    copy = clone_tensors({"a": [tensor] * 300, "b": {"c": tensor}, "d": torch.ones(1)})
    assert copy["b"]["c"] is not tensor
    assert {id(one) for one in copy["a"]} == {id(copy["b"]["c"])}


def test_outputs_that_share_a_tensor_are_restored_in_the_memory_of_one() -> None:
    """Columns of an epoch's outputs, each joined, stacked or apart."""
    rows = torch.zeros(6, 2)
    columns: list[dict[str, Any]] = [{"joined": rows, "rows": [3, 3]}, {"values": [rows, rows], "there": [True] * 2}]
    collector = OutputCollector(10**6, "a hook")
    collector.restore({"steps": 2, "nbytes": 1, "columns": columns * 50})
    memory = {part.untyped_storage().data_ptr() for column in collector._columns for part in column}
    assert len(memory) == 1
    assert rows.data_ptr() not in memory
