"""Data: moving batches of any nesting, counting rows, the order of samples, devices and seeds."""

from __future__ import annotations

import builtins
import collections
import dataclasses
import random
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import attrs
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset

from trainer.data.loaders import (
    SequentialSampler,
    ShuffledSampler,
    as_val_loaders,
    loader_length,
    make_train_sampler,
    own_batches,
)
from trainer.data.rng import seed_everything
from trainer.data.rows import count_rows
from trainer.data.tensors import map_tensors, to_device
from trainer.errors import ArgumentsError, DataLoaderError
from trainer.run.device import resolve_device


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    inputs: Any
    label: str = "x"
    derived: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "derived", self.inputs)


@dataclasses.dataclass(slots=True)
class Slotted:
    inputs: Any


@attrs.frozen
class Attrs:
    inputs: Any
    count: int = attrs.field(default=1, converter=int)


class Packed(msgspec.Struct, frozen=True):
    inputs: Any


class Encoding(collections.UserDict[str, Any]):
    """Like a tokenizer's: a mapping that moves itself, in place, and takes only the device."""

    def to(self, device: Any) -> Encoding:
        self.moved_to = device
        return self


class Options(collections.OrderedDict[str, Any]):
    note = "kept"


# ----------------------------------------------------------------------------------------------- moving


def _meta() -> torch.Tensor:
    return torch.ones(2)


@pytest.mark.parametrize(
    ("batch", "tensors"),
    [
        (_meta(), lambda b: [b]),
        ([_meta(), "text", 3], lambda b: [b[0]]),
        ((_meta(), None), lambda b: [b[0]]),
        (Pair(_meta(), [_meta()]), lambda b: [b.left, b.right[0]]),
        ({"x": {"y": (_meta(),)}}, lambda b: [b["x"]["y"][0]]),
        (Options(x=_meta()), lambda b: [b["x"]]),
        (collections.UserDict(x=_meta()), lambda b: [b["x"]]),
        (types.MappingProxyType({"x": _meta()}), lambda b: [b["x"]]),
        (Frozen(_meta()), lambda b: [b.inputs, b.derived]),
        (Slotted(_meta()), lambda b: [b.inputs]),
        (Attrs(_meta()), lambda b: [b.inputs]),
        (Packed(_meta()), lambda b: [b.inputs]),
        (pack_sequence([torch.ones(3), torch.ones(2)]), lambda b: [b.data]),
    ],
    ids=lambda value: type(value).__name__ if not callable(value) else "",
)
def test_tensors_in_any_container_move_and_the_original_stays(batch: Any, tensors: Any) -> None:
    moved = to_device(batch, "meta")
    assert type(moved) is type(batch)
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}
    assert {tensor.device.type for tensor in tensors(batch)} == {"cpu"}


def test_mappings_keep_their_attributes() -> None:
    batch = collections.defaultdict(list, {"b": _meta(), "a": _meta()})
    moved = to_device(batch, "meta")
    assert moved["new"] == []
    assert list(moved) == ["b", "a", "new"]
    assert "new" not in batch


def test_an_object_with_a_to_method_moves_itself() -> None:
    encoding = Encoding(x=1)
    assert to_device([encoding], "meta")[0].moved_to == "meta"

    class Broken:
        def to(self, device: Any, non_blocking: bool = False) -> Any:
            raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        to_device({"x": Broken()}, "meta")


def test_a_batch_without_tensors_to_move_is_returned_unchanged() -> None:
    batch = {"x": [torch.ones(2), (1, "a")], "y": torch.Size([2]), "z": {1, 2}, "f": Frozen(torch.ones(1))}
    assert to_device(batch, "cpu") is batch
    assert to_device(Frozen, "meta") is Frozen
    mixed = {"stays": [1, 2], "moves": torch.ones(2)}
    assert to_device(mixed, "meta")["stays"] is mixed["stays"]


_leaves = st.one_of(
    st.none(), st.integers(), st.text(max_size=3), st.integers(0, 3).map(lambda n: torch.arange(n, dtype=torch.float32))
)
_batches = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.dictionaries(st.text(max_size=2), inner, max_size=3).map(collections.OrderedDict),
        st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
        inner.map(Frozen),
        inner.map(Packed),
        inner.map(Attrs),
    ),
    max_leaves=12,
)


def _shape(value: Any) -> Any:
    """The structure of a batch, with (shape, dtype) for each tensor."""
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return (type(value), [(key, _shape(inner)) for key, inner in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value), [_shape(inner) for inner in value])
    if isinstance(value, (Frozen, Packed, Attrs)):
        return (type(value), _shape(value.inputs))
    return value


@given(_batches)
def test_moving_keeps_the_structure_and_reaches_every_tensor(batch: Any) -> None:
    moved = to_device(batch, "meta")
    assert _shape(moved) == _shape(batch)
    devices: list[str] = []
    map_tensors(lambda tensor: devices.append(tensor.device.type) or tensor, moved)
    assert set(devices) <= {"meta"}
    there, back = [], []
    map_tensors(lambda tensor: there.append(tensor) or tensor, batch)
    map_tensors(lambda tensor: back.append(tensor) or tensor, map_tensors(torch.clone, batch))
    assert len(devices) == len(there)
    assert all(torch.equal(one, other) for one, other in zip(there, back, strict=True))


# ------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        (torch.ones(4, 2), 4),
        (torch.ones(()), None),
        ({"t": torch.ones(()), "x": [torch.ones(3, 1)], "y": torch.ones(9)}, 3),
        (("text", 5, None), None),
        (Frozen(torch.ones(6)), 6),
        (pack_sequence([torch.ones(3), torch.ones(2)]), 2),
        ([[], torch.ones(0, 2)], 0),
        (object(), None),
        (np.ones(3), 3),
        (torch.ones(5, device="meta"), 5),
    ],
)
def test_rows_are_the_first_dimension_of_the_first_tensor_that_has_one(batch: Any, rows: int | None) -> None:
    assert count_rows(batch, None).rows == rows


# --------------------------------------------------------------------------------------------- samplers


@given(st.integers(0, 2**63 - 1), st.integers(0, 1000), st.integers(0, 50))
def test_the_order_is_a_permutation_that_seed_and_epoch_determine(seed: int, epoch: int, size: int) -> None:
    data = range(size)
    sampler = make_train_sampler(seed, epoch)(data)
    first = list(sampler)
    torch.rand(3)
    assert sorted(first) == list(data)
    assert list(sampler) == first
    assert list(make_train_sampler(seed, epoch)(data)) == first
    assert len(sampler) == size


def test_shuffling_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(make_train_sampler(1, 0)(range(10)))
    assert torch.equal(torch.rand(3), expected)


def test_neighbouring_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = {tuple(make_train_sampler(seed, epoch)(range(50))) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_each_epochs_class_counts_its_own_instances() -> None:
    """The loop reads from it whether the module used the sampler class."""
    one, other = make_train_sampler(1, 0), make_train_sampler(1, 1)
    assert issubclass(one, ShuffledSampler)
    assert (one.instances, other.instances) == (0, 0)
    sampler = one(data_source=range(3))
    assert (one.instances, other.instances, ShuffledSampler.instances) == (1, 0, 0)
    assert isinstance(sampler, one)
    assert not isinstance(sampler, other)


# ---------------------------------------------------------------------------------------------- loaders


@given(st.integers(0, 40), st.integers(1, 9), st.booleans())
def test_the_rows_of_each_batch_are_known_without_reading_it(size: int, micro_batch: int, drop_last: bool) -> None:
    data = TensorDataset(torch.arange(size))
    sampler = make_train_sampler(0, 0)
    loader = DataLoader(data, batch_size=micro_batch, sampler=sampler(data), drop_last=drop_last)
    rows = own_batches(loader, sampler)
    assert rows is not None
    actual = [len(batch[0]) for batch in loader]
    assert [rows(index) for index in range(len(actual))] == actual
    assert rows(len(actual)) == 0


class OwnBatches(BatchSampler):
    """Batches in some other way."""

    def __iter__(self) -> Iterator[list[int]]:
        yield [0]
        yield [1, 2]


def test_rows_are_unknown_where_batching_is_not_ours() -> None:
    data = TensorDataset(torch.arange(10))
    kind = make_train_sampler(0, 0)
    assert own_batches([1, 2], kind) is None
    assert own_batches(DataLoader(data, batch_size=2, shuffle=True), kind) is None
    assert own_batches(DataLoader(data, batch_size=None, sampler=kind(data)), kind) is None
    assert own_batches(DataLoader(data, batch_sampler=OwnBatches(kind(data), 2, False)), kind) is None
    assert own_batches(DataLoader(data, batch_sampler=BatchSampler(kind(data), 2, False)), kind) is None
    # A loader that was given a batch sampler shows a sequential sampler that it does not use.
    other = DataLoader(data, batch_sampler=BatchSampler([0], 2, False))
    assert own_batches(other, SequentialSampler) is None
    assert own_batches(DataLoader(data, batch_size=2, sampler=SequentialSampler(data)), SequentialSampler)


def test_the_order_is_drawn_on_the_host_whatever_the_default_device_is() -> None:
    """The order is the same, and the loop does not wait for the device."""
    sampler = make_train_sampler(1, 2)
    order = list(sampler(range(20)))
    with torch.device("meta"):
        assert list(sampler(range(20))) == order


def test_rows_are_unknown_where_a_loader_iterates_otherwise() -> None:
    class Twice(DataLoader[Any]):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                yield batch
                yield batch

    class Named(DataLoader[Any]):
        """Only a name."""

    data = TensorDataset(torch.arange(10))
    assert own_batches(Twice(data, batch_size=2), SequentialSampler) is None
    assert own_batches(Named(data, batch_size=2), SequentialSampler) is not None


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(7))


class SizedStream(Stream):
    def __len__(self) -> int:
        return 7


class Unsized(Dataset[int]):
    def __len__(self) -> int:
        raise NotImplementedError


def test_the_length_of_a_loader_is_its_len_or_none() -> None:
    assert loader_length(DataLoader(TensorDataset(torch.arange(7)), batch_size=2)) == 4
    assert loader_length([1, 2, 3]) == 3
    assert loader_length(DataLoader(Stream(), batch_size=2)) is None
    assert loader_length(DataLoader(SizedStream(), batch_size=2)) == 4
    assert loader_length(DataLoader(Unsized(), batch_size=2, sampler=[0])) == 1
    assert loader_length(iter([1])) is None

    class Lazy:
        def __len__(self) -> int:
            raise NotImplementedError

        def __iter__(self) -> Iterator[int]:
            return iter(())

    assert loader_length(Lazy()) is None


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (3, r"get_val_dataloaders\(\) returned 3"),
        ("data", r"get_val_dataloaders\(\) returned 'data'"),
        ({"a": None}, r"get_val_dataloaders\(\)\['a'\] returned None"),
        ({1: []}, "the key 1"),
        ({"": []}, "the key ''"),
        ({"a\udc80": []}, r"the key 'a\\udc80', which holds characters that cannot be printed; use"),
        ({"a" * 251: []}, "which has 251 characters, more than 250; use"),
        ([DataLoader([1]), DataLoader([2])], "a list of dataloaders; return a dict"),
    ],
)
def test_an_invalid_dataloader_is_named_with_its_key(value: Any, says: str) -> None:
    with pytest.raises(DataLoaderError, match=says):
        as_val_loaders(value)


def test_dataloaders_come_in_one_form() -> None:
    loader = DataLoader([1, 2])
    assert as_val_loaders(loader) == {"default": loader}
    assert list(as_val_loaders({"b": [1], "a": iter([2])})) == ["b", "a"]
    assert as_val_loaders(None) == as_val_loaders({}) == {}
    with pytest.raises(DataLoaderError, match="get_test_dataloaders"):
        as_val_loaders(3, "get_test_dataloaders")


# --------------------------------------------------------------------------------------- device and seed


@pytest.mark.parametrize("device", ["nonsense", "", "cpu:x", "cuda:99"])
def test_a_device_that_cannot_be_used_is_named_with_those_that_can(device: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        resolve_device(device)
    assert f"device = {device!r}: cannot be used: " in str(caught.value)
    assert "Available here: 'auto', 'cpu'" in str(caught.value)


def test_auto_takes_an_accelerator_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    expected = "cpu"
    if torch.accelerator.is_available():
        expected = torch.accelerator.current_accelerator().type
    assert resolve_device("auto").type == expected
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


def test_a_seed_repeats_every_generator() -> None:
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        for seed in (0, 2**63 - 1):
            draws = []
            for _ in range(2):
                seed_everything(seed)
                draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
            assert draws[0] == draws[1]
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])


def test_seeding_works_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "numpy":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    saved = random.getstate(), torch.get_rng_state()
    monkeypatch.setattr(builtins, "__import__", without)
    seed_everything(3)
    assert torch.initial_seed() == 3
    random.setstate(saved[0])
    torch.set_rng_state(saved[1])
