"""Checks a module and its callbacks before a run: uncallable methods, and hooks that read state of other steps."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from events.log import logger
from trainer.callback_interface import LANE_ATTRIBUTE, CallbackInterface, Lane
from trainer.hooks.hooks import BEYOND_CONTRACT, lane_of, overridden_hooks
from trainer.hooks.signatures import signature_problem
from trainer.module_interface import ModuleInterface, contract_names
from trainer.unheard import in_words, unheard_methods

_MOST_LOOKED_AT = 500
"""Maximum objects per callback to inspect for a warning."""
_DEPTH = 4


class _OfCallbacks:
    """Methods of a callback other than hooks, with the trainer's signatures."""

    def should_stop(self, global_step: int, metrics: Any) -> Any: ...
    def bind_optimizers(self, optimizers: Any) -> Any: ...
    def around_run(self, run: Any, module: Any) -> Any: ...
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...
    def on_begin_val_epoch(self, global_step: int, *, key: str) -> Any: ...
    def on_before_optimizer_step(self, global_step: int) -> Any: ...
    def on_end_test_epoch(self, global_step: int, *test_step_collated_outputs: Any, key: str) -> Any: ...


_OPTIONAL_HOOKS = frozenset(BEYOND_CONTRACT)
"""Those that a module may have too."""


def check_contract(module: ModuleInterface, callbacks: list[CallbackInterface], problems: list[str]) -> None:
    """Check that the trainer can call every method; warn of methods that it never calls.

    Args:
        problems: Gets a sentence for each method that cannot be called.
    """
    _check_forward(module, problems)
    manual: Any = module.manual_optimization
    if not isinstance(manual, bool):
        problems.append(f"{type(module).__name__}.manual_optimization is {manual!r:.80}; set it to True or False")
    _check_methods(module, contract_names(ModuleInterface) | _OPTIONAL_HOOKS, problems)
    warnings: dict[str, None] = {}  # unique, in order: several callbacks may have one class
    optional = frozenset(name for name in vars(_OfCallbacks) if not name.startswith("_"))
    for callback in callbacks:
        names = contract_names(CallbackInterface)
        if isinstance(callback, ModuleInterface):  # a module that is not the trained one
            _check_methods(callback, names, problems)
        else:
            _check_methods(callback, names | optional, problems)
            warnings |= dict.fromkeys((*_unheard(callback, names | optional), *_live_state(callback, module)))
    for warning in (*_unheard(module, contract_names(ModuleInterface) | _OPTIONAL_HOOKS), *warnings):
        logger.warning(warning)


def _check_forward(module: ModuleInterface, problems: list[str]) -> None:
    kind = type(module)
    forward: Any = vars(module).get("forward") or getattr(kind, "forward", ModuleInterface.forward)  # a mock has none
    try:
        names = list(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        return
    if "stage" not in names[:2]:  # a forward with stage may pass it on
        problems.append(
            f"{kind.__name__}.forward replaces the method that calls train_step and val_step; rename it, or put the"
            f" network into a submodule"
        )


def _check_methods(target: CallbackInterface, names: frozenset[str], problems: list[str]) -> None:
    kind = type(target)
    for name in sorted(names):
        contract: Callable[..., Any] = (
            getattr(ModuleInterface, name, None) if isinstance(target, ModuleInterface) else None
        ) or (getattr(CallbackInterface, name, None) or getattr(_OfCallbacks, name))
        method = getattr(target, name, None)
        if getattr(method, "__func__", method) is contract or (method is None and hasattr(_OfCallbacks, name)):
            continue
        problem = signature_problem(kind.__name__, name, method, contract)
        if problem is not None:
            problems.append(problem)


def _unheard(target: CallbackInterface, names: frozenset[str]) -> Iterator[str]:
    unheard = unheard_methods(type(target), names, vars(target))
    if unheard:
        yield f"{type(target).__name__} has methods that the trainer never calls: {in_words(unheard)}"


# --------------------------------------------------------------------------------------------------- live state


def _live_state(callback: CallbackInterface, module: ModuleInterface) -> Iterator[str]:
    beside = {
        name: hook
        for name, hook in overridden_hooks(callback).items()
        if getattr(hook, LANE_ATTRIBUTE, None) is None and lane_of(callback, name, hook) is Lane.OBSERVER
    }
    beside.pop("on_end_train", None)  # training is over
    held = None
    with contextlib.suppress(Exception):  # of an unusual object: a guess must not prevent a run
        held = live_state(callback, list(beside.values()), module) if beside else None
    if held is not None:
        marks = " and ".join(f"{name} with {'@inline' if name.endswith('_step') else '@fenced'}" for name in beside)
        yield (
            f"{type(callback).__name__} holds {held}, and its hooks run while later steps change that; mark {marks}, or"
            f" with @observer to silence this"
        )


def live_state(callback: CallbackInterface, hooks: list[Any], module: ModuleInterface) -> str | None:
    """Describe a trained object that a callback holds in attributes, containers, closures or bound methods.

    Weights are looked for by identity: a copy of the module is not the module.
    """
    if callable(getattr(callback, "bind_optimizers", None)):
        return "the optimizers (bind_optimizers)"
    parts = {id(one) for one in module.modules()}
    tensors = {id(one) for one in (*module.parameters(), *module.buffers())}
    level = list(_attributes(callback))
    for hook in hooks:
        function = getattr(hook, "__func__", hook)
        level += [
            (getattr(function, "__name__", "a hook"), one) for one in (*_inside(function), *_globals_of(function))
        ]
    seen = {id(callback)}
    for _ in range(_DEPTH):
        below: list[tuple[str, Any]] = []
        for where, value in level:
            if id(value) in seen or len(seen) > _MOST_LOOKED_AT:
                continue
            seen.add(id(value))
            if id(value) in parts:
                return f"{'the module' if value is module else 'a part of the module'} ({where})"
            if id(value) in tensors:
                return f"a tensor of the module ({where})"
            if isinstance(value, torch.optim.Optimizer):
                return f"an optimizer ({where})"
            if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
                return f"a scheduler ({where})"
            below += [(where, one) for one in _inside(value)]
        level = below
    return None


def _globals_of(function: Any) -> list[Any]:
    """Return the global variables that a hook may read."""
    code = getattr(function, "__code__", None)
    found = [function.__globals__.get(name) for name in code.co_names] if code is not None else []
    kinds = torch.nn.Module, torch.Tensor, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler
    containers = [one for one in found if isinstance(one, dict | list | tuple | set)]
    return [one for one in (*found, *itertools.chain(*map(_inside, containers))) if isinstance(one, kinds)]


def _inside(value: Any) -> Iterator[Any]:
    """Yield the objects that an object refers to."""
    if isinstance(value, torch.Tensor | str | bytes | int | float | type | types.ModuleType):
        return
    if isinstance(value, dict):
        yield from itertools.islice(value.values(), _MOST_LOOKED_AT)
    elif isinstance(value, list | tuple | set | frozenset):
        yield from itertools.islice(value, _MOST_LOOKED_AT)
    elif isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, types.MethodType):
        yield value.__self__
        yield value.__func__
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # an empty cell
                continue
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
    else:
        yield from (part for _, part in _attributes(value))


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Return an object's attributes, with those in slots; calls no property."""
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        yield from list(attributes.items())
    for kind in type(value).__mro__:
        for name, slot in vars(kind).items():
            if isinstance(slot, types.MemberDescriptorType):
                with contextlib.suppress(AttributeError):  # not set
                    yield name, slot.__get__(value)
