"""The state of a module, of what it holds and of the random generators, kept and restored bit for bit."""

from __future__ import annotations

import contextlib
import copy
import importlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, Sampler

from events.log import logger
from trainer.data.loaders import has_state
from trainer.data.rng import capture_rng, restore_rng
from trainer.errors import ContractError
from trainer.module_interface import ModuleInterface

_DEPTH = 6
_MOST_ITEMS = 10_000
"""Containers with more entries are restored, but not the entries' own state."""
_MOST_BYTES = 256 * 2**20
"""Bytes of tensors that are neither parameters nor buffers."""
_OPAQUE = FunctionType | BuiltinFunctionType | MethodType | ModuleType | type | str | bytes | int | float | None
_PLAIN = torch.Tensor, nn.Parameter, nn.Buffer


class ModuleSnapshot:
    """What a short training changes, so that `restore` undoes it; may be restored several times.

    It holds the parameters and buffers (their values on the host), gradients, ``requires_grad``, the attributes of the
    module and of the objects in them, their lists, dicts, sets and tensors, random generators, and the state of
    optimizers and dataloaders that the module keeps. An iterator that the module keeps cannot be restored.

    Args:
        device: Of the training; its random generator is kept, too.

    Raises:
        ContractError: A parameter has no shape yet.
    """

    def __init__(self, module: ModuleInterface, device: torch.device) -> None:
        for name, parameter in module.named_parameters():
            if is_lazy(parameter):
                raise ContractError(f"the parameter {name} is not initialised; run the module once before")
        with contextlib.suppress(ImportError):  # seeding imports it, and a generator must be known to be restored
            importlib.import_module("numpy")
        self._device, self._rng = device, capture_rng(device)
        self._undo: list[Callable[[], object]] = []  # in the order of the walk: outer objects first
        self._unsaved: list[tuple[torch.Tensor, int]] = []
        self._seen: dict[int, object] = {}
        self._left_bytes = _MOST_BYTES
        self._package = type(module).__module__.partition(".")[0]
        self._state = {id(one) for one in (*module.parameters(), *module.buffers())}
        self._walk(module, 0)

    def restore(self) -> None:
        """Undo all changes."""
        for undo in self._undo:
            undo()
        restore_rng(self._rng, self._device)
        changed = [tuple(tensor.shape) for tensor, version in self._unsaved if tensor._version != version]
        if changed:
            logger.warning(
                f"a large tensor {changed[0]} of the module was changed in place and is not restored; register it as a"
                f" buffer"
            )
            self._unsaved.clear()

    def _walk(self, value: Any, depth: int) -> None:
        if isinstance(value, _OPAQUE) or id(value) in self._seen or depth > _DEPTH:
            return
        self._seen[id(value)] = value  # kept, so that no other object gets its id
        if isinstance(value, torch.Tensor):
            self._keep_tensor(value)
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._undo.append(lambda: value.set_state(state))
        elif isinstance(value, random.Random):
            numbers = value.getstate()
            self._undo.append(lambda: value.setstate(numbers))
        elif type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator"):
            words = copy.deepcopy(value.bit_generator.state)
            self._undo.append(lambda: setattr(value.bit_generator, "state", words))
        elif isinstance(value, Iterator) and not has_state(value):
            logger.warning(
                f"the module keeps a {type(value).__name__}, an iterator, which cannot be set back after a trial has"
                f" read from it; make it in get_train_dataloader"
            )
        else:
            self._keep_container(value, depth)

    def _keep_container(self, value: Any, depth: int) -> None:
        items: list[Any] = []
        if isinstance(value, dict | list | set | deque):
            members = copy.copy(value)  # of its type and order
            items = list(value.values() if isinstance(value, dict) else value)
            self._undo.append(lambda: _refill(value, members))
        elif isinstance(value, tuple | frozenset):
            items = list(value)
        if len(items) <= _MOST_ITEMS:
            for item in items:
                self._walk(item, depth + 1)
        if isinstance(value, nn.Module):
            self._walk(vars(value), 0)
        elif self._keeps_state(value):
            return
        elif isinstance(value, Dataset | DataLoader | Sampler | SimpleNamespace) or self._is_users(value):
            self._walk(vars(value), depth + 1)

    def _keeps_state(self, value: Any) -> bool:
        """Keep the state of an optimizer or dataloader by its own methods, if it has them."""
        if not has_state(value):
            return False
        try:
            state = copy.deepcopy(value.state_dict())
        except Exception:  # what a stranger's object does: its attributes are kept instead
            return False
        self._undo.append(lambda: value.load_state_dict(copy.deepcopy(state)))
        return True

    def _is_users(self, value: Any) -> bool:
        """Whether an object's class is from the module's package; clients and loggers of others have own threads."""
        package = type(value).__module__.partition(".")[0]
        return package == self._package and hasattr(value, "__dict__")

    def _keep_tensor(self, tensor: torch.Tensor) -> None:
        data, grad, trains = tensor.detach(), tensor.grad if tensor.is_leaf else None, tensor.requires_grad
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_meta:
            return
        if id(tensor) not in self._state:
            if tensor.is_inference() or any(
                not step and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
            ):
                return
            self._left_bytes -= tensor.nbytes
            if self._left_bytes < 0:
                self._left_bytes += tensor.nbytes
                self._unsaved.append((tensor, tensor._version))
                return
        saved, version = data.to("cpu", copy=True), None if id(tensor) in self._state else tensor._version
        kept = grad.clone() if grad is not None else None

        def undo() -> None:
            if tensor._version == version and tensor.data_ptr() == data.data_ptr():
                return  # its memory may be read-only: a mapped file
            with torch.no_grad():
                data.copy_(saved)
                tensor.data = data  # `to` a device has replaced it
            if tensor.is_leaf:
                tensor.grad = kept.clone() if kept is not None else None
                if saved.is_floating_point() or saved.is_complex():
                    tensor.requires_grad_(trains)

        self._undo.append(undo)


def _refill(value: Any, members: Any) -> None:
    """Give a container the entries that it had, unless it has them: it may be one that cannot be changed."""
    if len(value) == len(members):
        pairs = zip(_entries(value), _entries(members), strict=True)
        if (value == members) if isinstance(value, set) else all(a is b for a, b in pairs):
            return
    value.clear()
    value.extend(members) if isinstance(value, list | deque) else value.update(members)


def _entries(value: Any) -> list[Any]:
    return [part for item in value.items() for part in item] if isinstance(value, dict) else list(value)
