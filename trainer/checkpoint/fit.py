"""Whether saved weights fit a module, and loading those of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from events.checkpoint.files import read_weights
from events.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch
from events.masking import masked
from trainer.data.tensor_state import tensors_in
from trainer.module_interface import ModuleInterface


def load_weights(module: ModuleInterface, path: Path, *, follow: bool) -> None:
    """Load all tensors of a safetensors file into a module. Waits for the disk. Raises `CheckpointError`.

    Args:
        follow: Whether the file may be a link, because the user named the file and not its folder.
    """
    try:
        found = tensors_in(read_weights(path, follow=follow), str(path))
    except OSError as error:
        raise CheckpointError(f"init_from={masked(str(path))!r} cannot be read: {masked(str(error))}") from error
    except CheckpointDamaged as error:
        raise CheckpointDamaged(
            f"init_from={masked(str(path))!r} cannot be used ({masked(str(error))}); write the weights with"
            f" safetensors.torch.save_file"
        ) from error
    own = module.state_dict()
    # Other writers store tied weights once.
    names = {_memory_of(own[key]): key for key in found if key in own}
    state = found | {key: found[names[at]] for key, value in own.items() if (at := _memory_of(value)) in names}
    exempt = own_loading_prefixes(module)
    check_fits(module, state, str(path), exempt)
    try:
        module.load_state_dict(state)  # copies them
    except RuntimeError as error:
        raise CheckpointMismatch(f"{path} does not fit {type(module).__name__}: {error}") from error


def _memory_of(value: object) -> object:
    """Return a value that all names of one tensor share."""
    if not isinstance(value, torch.Tensor) or is_lazy(value) or not value.numel():
        return object()
    return value.data_ptr(), value.dtype, value.shape, value.stride()


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
    for key in first_of(_misshapen({key: value for key, value in own.items() if not key.startswith(exempt)}, saved)):
        problems.append(key)
    if problems:
        changed = type(module).get_state is not ModuleInterface.get_state
        hint = "; get_state() is overridden, so override update_state(state) too" if changed else ""
        raise CheckpointMismatch(
            f"{where} does not fit {type(module).__name__}: {'; '.join(problems)}{hint}. Nothing was changed"
        )


def _misshapen(own: Mapping[str, object], saved: Mapping[str, object]) -> Iterator[str]:
    for key, tensor in own.items():
        there = saved.get(key)
        if not isinstance(tensor, torch.Tensor) or is_lazy(tensor) or key not in saved:
            continue
        if not isinstance(there, torch.Tensor):
            yield f"{key} is a {type(there).__name__} there and a tensor here"
        elif tensor.shape != there.shape:
            yield f"{key} has the shape {tuple(there.shape)} there and {tuple(tensor.shape)} here"


def first_of(texts: Iterable[str], limit: int = 8) -> list[str]:
    """Return the first texts, and the number of the others."""
    shown = list(texts)
    return shown if len(shown) <= limit else [*shown[:limit], f"{len(shown) - limit} more"]
