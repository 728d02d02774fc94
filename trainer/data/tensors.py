"""Tensors in nested values.

Values may nest in any way. `map_tensors` walks tensors, mappings, lists, tuples, named tuples, and the
fields of dataclasses, attrs classes and msgspec Structs; other objects are returned unchanged.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeVar

import msgspec
import torch

_T = TypeVar("_T")


def to_device(batch: _T, device: torch.device | str | int, non_blocking: bool = True) -> _T:
    """Return the batch with every tensor in it on ``device``; nothing is changed in place.

    Objects with a ``to`` method (a PackedSequence, a tokenizer's BatchEncoding) are moved by it. A container
    keeps its type if a copy of it can be filled; a container without a moved tensor is returned itself, not a copy.

    Args:
        batch: Any nesting; see the module's docstring.
        device: The target device.
        non_blocking: Do not wait for copies from pinned host memory to an accelerator
            (``DataLoader(pin_memory=True)``); the device orders them before the work that uses them. Copies from
            pageable memory always wait.
    """

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=non_blocking)
        try:
            return value.to(device, non_blocking=non_blocking)
        except TypeError:  # a `to` that only accepts the device
            return value.to(device)

    moved: _T = _map(batch, move, movable=True)
    return moved


def map_tensors(function: Callable[[torch.Tensor], object], value: object) -> Any:
    """Return ``value`` with ``function`` applied to each tensor; only containers it changes are rebuilt."""
    return _map(value, function, movable=False)


def clone_tensors(value: _T) -> _T:
    """Return ``value`` with each tensor cloned once: a tensor that occurs twice is one tensor in the result, too."""
    clones: dict[int, torch.Tensor] = {}

    def clone(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in clones:
            clones[id(tensor)] = tensor.clone()
        return clones[id(tensor)]

    cloned: _T = map_tensors(clone, value)
    return cloned


def _map(value: object, function: Callable[[Any], object], movable: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (str, bytes, int, float, type)) or value is None:
        return value
    if movable and callable(getattr(value, "to", None)):
        return function(value)
    parts = parts_of(value)
    if parts is None:
        return value
    mapped = [(key, part, _map(part, function, movable)) for key, part in parts]
    if all(after is before for _, before, after in mapped):
        return value
    return _rebuild(value, [(key, after) for key, _, after in mapped])


def parts_of(value: object) -> list[tuple[Any, object]] | None:
    """A container's values with their keys, indices or field names; None for other objects."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    names = _field_names(value)
    return None if names is None else [(name, getattr(value, name)) for name in names if hasattr(value, name)]


def _field_names(value: object) -> list[str] | None:
    if isinstance(value, msgspec.Struct):
        return list(value.__struct_fields__)
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    attributes = getattr(type(value), "__attrs_attrs__", None)  # attrs, without importing it
    return None if attributes is None else [attribute.name for attribute in attributes]


def _rebuild(value: object, parts: list[tuple[Any, object]]) -> object:
    if isinstance(value, Mapping):
        return _rebuild_mapping(value, dict(parts))
    if isinstance(value, tuple):
        items = [part for _, part in parts]
        # The constructor of a named tuple takes its fields one by one; `_make` takes an iterable.
        make = getattr(type(value), "_make", None)
        return make(items) if make is not None else tuple(items)
    result = copy.copy(value)
    if isinstance(result, list):
        result[:] = [part for _, part in parts]
    elif isinstance(result, msgspec.Struct):
        for name, part in parts:
            msgspec.structs.force_setattr(result, name, part)
    else:
        for name, part in parts:
            object.__setattr__(result, name, part)  # bypasses frozen classes and converting setters
    return result


def _rebuild_mapping(value: Mapping[object, object], items: dict[object, object]) -> object:
    if type(value) is dict:
        return items
    if isinstance(value, MutableMapping):
        result = copy.copy(value)  # keeps other attributes, such as a default factory
        for key, item in items.items():
            result[key] = item
        return result
    try:
        return type(value)(items)  # type: ignore[call-arg]
    except TypeError:  # a read-only mapping with another constructor
        return items
