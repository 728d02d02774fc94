"""Collation: concatenated tensors, lists of other outputs, and the limit in bytes."""

from __future__ import annotations

import gc
import re
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

import trainer.hooks.capture
from trainer.errors import EpochOutputsTooLarge, StepOutputError
from trainer.hooks.capture import Copy, EpochOutputs
from trainer.hooks.collate import TENSOR_BYTES, as_tuple, collate_outputs, detached, nbytes


def append(outputs: EpochOutputs, *values: object) -> None:
    """Keep the outputs of one step."""
    outputs.append(Copy(values, 0))


# ----------------------------------------------------------------------------------------------- limits


def test_outputs_beyond_the_limit_raise_an_error_with_a_fix() -> None:
    collector = EpochOutputs(3 * (400 + TENSOR_BYTES), "Classifier.on_end_val_epoch", None)
    for _ in range(3):
        append(collector, torch.ones(100))
    with pytest.raises(EpochOutputsTooLarge) as caught:
        append(collector, torch.ones(100))
    for part in (
        "Classifier.on_end_val_epoch",
        "exceed 2,928 bytes",
        "2,928 after 3 steps",
        "the next one adds 976",
        "epoch_outputs_limit_bytes",
    ):
        assert part in str(caught.value)
    assert collector.steps == 3
    assert collector.collated()[0].shape == (300,)


def test_a_single_step_can_be_too_much() -> None:
    collector = EpochOutputs(1000, "M.on_end_train_epoch", None)
    with pytest.raises(MemoryError):
        append(collector, torch.ones(1000))
    assert (collector.steps, collector.nbytes, collector.collated()) == (0, 0, ())


def test_pythons_share_of_many_small_tensors_counts() -> None:
    """The limit counts memory: a scalar loss takes far more than its four bytes."""
    collector = EpochOutputs(10 * TENSOR_BYTES, "M.on_end_train_epoch", None)
    for _ in range(9):
        append(collector, torch.ones(()))
    with pytest.raises(EpochOutputsTooLarge):
        append(collector, torch.ones(()))


# --------------------------------------------------------------------------------------------- collating


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([torch.ones(2, 3), torch.ones(2, 4)], r"shapes \(2, 3\) and \(2, 4\)"),
        ([torch.ones(2), torch.ones(2, 1)], r"shapes \(2,\) and \(2, 1\)"),
        ([torch.ones(()), torch.ones(1)], r"shapes \(\) and \(1,\)"),
        ([torch.ones(2), torch.ones(2).long()], "torch.float32 on cpu and torch.int64 on cpu"),
        ([torch.ones(2), torch.ones(2, device="meta")], "cpu and torch.float32 on meta"),
        ([torch.ones(2), torch.ones(2).to_sparse()], "sparse"),
        (["a", "b"], "a str, which is not a tensor"),
        ([torch.ones(2), None], "a NoneType"),
        ([1.5], "a float"),
    ],
)
def test_outputs_that_cannot_be_concatenated_are_a_list_with_one_notice(values: list[Any], says: str) -> None:
    notices: list[str] = []
    loss, collated = collate_outputs([(torch.ones(()), value) for value in values], notices.append)
    assert loss.shape == (len(values),)
    assert isinstance(collated, list)
    assert all(one is other for one, other in zip(collated, values, strict=True))
    assert len(notices) == 1
    assert "output 1" in notices[0]
    assert re.search(says, notices[0])


def test_steps_with_fewer_outputs_leave_gaps() -> None:
    one, two = torch.ones(2), torch.zeros(2)
    for collate in (collate_outputs, _through_collector):
        notices: list[str] = []
        loss, extra = collate([(one,), (two, one), (one,), (one, two)], notices.append)
        assert loss.shape == (8,)
        assert [value is None for value in extra] == [True, False, True, False]
        assert notices == ["output 1 of the step is kept as a list: 2 of the steps did not return it"]


def test_no_outputs_collate_to_an_empty_tuple() -> None:
    assert collate_outputs([]) == ()
    assert collate_outputs([(), ()]) == ()
    assert EpochOutputs(10, "x", None).collated() == ()


def test_a_single_step_is_not_copied() -> None:
    logits, loss = torch.ones(2, 3), torch.ones(())
    collated_loss, collated_logits = collate_outputs([(loss, logits)])
    assert collated_logits is logits
    assert collated_loss.shape == (1,)
    assert collated_loss.data_ptr() == loss.data_ptr()


def _through_collector(batches: list[tuple[Any, ...]], notice: Any = None) -> tuple[Any, ...]:
    collector = EpochOutputs(2**30, "test", notice)
    for batch in batches:
        append(collector, *batch)
    assert collector.steps == len(batches)
    collated = collector.collated()
    assert (collector.steps, collector.nbytes) == (0, 0)
    return collated


_trailing = st.lists(st.integers(0, 3), max_size=2)
_dtypes = st.sampled_from([torch.float32, torch.int64, torch.bool])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), _trailing, _dtypes)
def test_rows_come_out_in_order_and_none_is_lost(rows: list[int], trailing: list[int], dtype: torch.dtype) -> None:
    total = torch.arange(sum(rows) * max(1, int(np.prod(trailing))) * 2)[: sum(rows) * int(np.prod(trailing))]
    expected = total.reshape(sum(rows), *trailing).to(dtype)
    pieces = expected.split(rows)
    batches = [(torch.tensor(float(step)), piece) for step, piece in enumerate(pieces)]
    for collate in (collate_outputs, _through_collector):
        steps, collated = collate(batches)
        assert torch.equal(steps, torch.arange(len(rows), dtype=torch.float32))
        assert torch.equal(collated, expected)
        assert collated.dtype is dtype


@given(
    st.lists(
        st.lists(
            st.one_of(st.none(), st.integers(0, 2).map(torch.ones), st.just(torch.ones(())), st.text(max_size=1)),
            max_size=3,
        ).map(tuple),
        max_size=6,
    )
)
def test_any_outputs_collate_position_by_position(batches: list[tuple[Any, ...]]) -> None:
    notices: list[str] = []
    collated = collate_outputs(batches, notices.append)
    assert len(collated) == max(map(len, batches), default=0)
    lists = [value for value in collated if isinstance(value, list)]
    assert all(len(value) == len(batches) for value in lists)
    assert len(notices) == len(lists)
    again = _through_collector(batches)
    assert [type(value) for value in again] == [type(value) for value in collated]


def test_pieces_are_released_while_collating() -> None:
    """The pieces of one position are released before the next position is collated."""
    seen: list[bool] = []
    collector = EpochOutputs(2**20, "test", lambda text: seen.append(any(ref() is not None for ref in alive)))
    pieces = [torch.ones(4), torch.ones(4)]
    alive = [weakref.ref(piece) for piece in pieces]
    for piece in pieces:
        append(collector, piece, "text")
    del piece, pieces
    gc.collect()
    collector.collated()
    assert seen == [False]


def test_appending_costs_the_same_whatever_was_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Appending counts the bytes of the new outputs and copies nothing."""
    counted = []
    monkeypatch.setattr(trainer.hooks.capture, "nbytes", lambda outputs: counted.append(outputs) or nbytes(outputs))
    steps = [(torch.ones(2), torch.ones(())) for _ in range(50)]
    collector = EpochOutputs(2**30, "test", None)
    with TorchCalls() as calls:
        for outputs in steps:
            collector.append(Copy(outputs, 0))
    assert calls.names <= {"element_size", "numel"}
    whole = [outputs for outputs in counted if isinstance(outputs, tuple)]  # without the parts of each
    assert all(one is other for one, other in zip(whole, steps, strict=True))
    assert torch.equal(collector.collated()[0], torch.ones(100))


class TorchCalls(TorchFunctionMode):
    """Collects the names of the tensor functions that are called."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(func, "__name__", repr(func)))
        return func(*args, **(kwargs or {}))


# --------------------------------------------------------------------------------------------- as tuples


def test_a_mapping_is_refused_with_its_keys() -> None:
    with pytest.raises(StepOutputError, match="a dict with loss, logits; return the loss, or a tuple"):
        as_tuple({"loss": 1, "logits": 2})


def test_outputs_come_in_one_form() -> None:
    tensor, array = torch.ones(3), np.ones(3)
    assert as_tuple(tensor) == (tensor,)
    assert as_tuple(array)[0] is array
    assert as_tuple("text") == ("text",)
    assert as_tuple(1.5) == (1.5,)
    assert as_tuple(None) == ()
    assert as_tuple([1, 2]) == as_tuple((1, 2)) == as_tuple(one for one in (1, 2)) == (1, 2)
    pair = (tensor, 1)
    assert as_tuple(pair) is pair


# --------------------------------------------------------------------------------------- copies and sizes


def test_detached_outputs_share_memory_and_hold_no_graph() -> None:
    logits = torch.ones(2, requires_grad=True) * 2
    marker = object()
    first, (second,), third, text = detached((logits, [logits], {"x": logits}, marker))
    for one in (first, second, third["x"]):
        assert one.data_ptr() == logits.data_ptr()
        assert not one.requires_grad
    assert text is marker


def test_bytes_are_those_of_the_elements() -> None:
    assert nbytes(torch.ones(2, 3)) == 24
    assert nbytes((torch.ones(2), [torch.ones(1).double()], {"x": torch.ones(3).bool()})) == 8 + 8 + 3
    assert nbytes(torch.ones(100)[:2]) == 8
    assert nbytes(np.ones(3)) == 24
    assert nbytes(()) == 0
    assert nbytes("x" * 1000) > 1000
