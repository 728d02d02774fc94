"""Whether a saved state fits a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from events.checkpoint.weights import first_of
from events.errors import CheckpointMismatch
from trainer.module_interface import ModuleInterface


def takes_state_by_default(module: ModuleInterface) -> bool:
    """Whether the module does not override ``update_state``."""
    return type(module).update_state is ModuleInterface.update_state


def own_loading_prefixes(module: nn.Module) -> tuple[str, ...]:
    """Return the key prefixes of submodules with their own loading, which may accept other shapes."""

    def is_own(one: nn.Module) -> bool:
        made_by = getattr(type(one)._load_from_state_dict, "__module__", "")
        return bool(one._load_state_dict_pre_hooks) or not made_by.startswith("torch.")

    if type(module).load_state_dict is not nn.Module.load_state_dict:
        return ("",)
    return tuple(f"{name}." if name else "" for name, one in module.named_modules() if is_own(one))


def check_fits(module: ModuleInterface, saved: object, where: str, exempt: tuple[str, ...]) -> None:
    """Raise `CheckpointMismatch` if a state dict does not fit, before any of it is loaded.

    Args:
        exempt: Prefixes of keys whose shapes the module checks itself.
    """
    if not isinstance(saved, dict):
        raise CheckpointMismatch(
            f"{where} holds a {type(saved).__name__} instead of a module's state dict; load another checkpoint"
        )
    own = module.state_dict()
    problems = [f"it lacks {', '.join(first_of(key for key in own if key not in saved))}"] if own.keys() - saved else []
    if saved.keys() - own.keys():
        problems.append(f"it has {', '.join(first_of(key for key in saved if key not in own))}, which the module lacks")
    checked = {key: value for key, value in own.items() if not key.startswith(exempt)}
    problems += first_of(problem for _, problem in misshapen(checked, saved))
    if problems:
        changed = type(module).get_state is not ModuleInterface.get_state
        hint = "; get_state() is overridden, so override update_state(state) too" if changed else ""
        raise CheckpointMismatch(
            f"{where} does not fit {type(module).__name__}: {'; '.join(problems)}{hint}. Nothing was changed"
        )


def misshapen(own: Mapping[str, object], saved: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield the names of tensors that are saved in another shape, each with a description."""
    for key, tensor in own.items():
        there = saved.get(key)
        if not isinstance(tensor, torch.Tensor) or is_lazy(tensor) or key not in saved:
            continue
        if not isinstance(there, torch.Tensor):
            yield key, f"{key} is a {type(there).__name__} there and a tensor here"
        elif tensor.shape != there.shape:
            yield key, f"{key} has the shape {tuple(there.shape)} there and {tuple(tensor.shape)} here"
