"""The state of optimizers, schedulers and the loss scale in a checkpoint: checked against the live ones, then restored.

A checkpoint may be a stranger's. Fused kernels take the sizes of moments from the parameter, and write beside memory
that is smaller; torch's schedulers take any attribute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from numbers import Real
from typing import Any, TypeGuard

import torch

from events.errors import CheckpointMismatch
from events.log import logger

INSTEAD = "; TrainerArguments(reset_optimizers_schedulers=True) begins with new ones"
"""The fix, for messages."""
_SWITCHES = frozenset({"fused", "foreach", "capturable", "differentiable"})
"""Settings of an optimizer's implementation, which a checkpoint does not change."""
_COUNTERS = frozenset({"step", "eta", "mu", "mu_product"})
"""State of torch's optimizers that has one element."""
_MOMENTS = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "sum", "square_avg", "acc_delta"}
    | {"grad_avg", "ax", "prev", "step_size"}
)
"""State of torch's optimizers that has the shape of its parameter, also in a subclass with more state."""
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class _Unlike(Exception):  # not an error: the caller adds the checkpoint and the fix
    """A saved value differs in kind from the live one."""


def like(own: Any, saved: Any) -> Any:
    """Return a saved value in the kind of the live one: a number for a number, a tensor of one shape for a tensor.

    A live None takes any plain value. Lists may have other lengths, and dicts other keys.

    Raises:
        _Unlike: It is of another kind.
    """
    if own is None or (saved is None and isinstance(own, str)):
        return _plain(saved)
    if _is_number(own) and (_is_number(saved) or _is_scalar(saved)):
        number = saved.item() if isinstance(saved, torch.Tensor) else saved  # on the host: nothing waits
        if isinstance(number, int) and not -(2**63) <= number < 2**63:
            raise _Unlike("has more than 64 bits")
        return number
    if isinstance(own, torch.Tensor) and _is_number(saved) and own.numel() == 1:
        return torch.full_like(own, float(saved))
    if isinstance(own, torch.Tensor) and isinstance(saved, torch.Tensor):
        if saved.shape != own.shape or saved.is_complex() != own.is_complex():
            raise _Unlike(f"is a tensor {tuple(saved.shape)} of {saved.dtype}, not {tuple(own.shape)} of {own.dtype}")
        return saved.to(own.device, own.dtype, copy=True)
    if isinstance(own, list | tuple) and isinstance(saved, list | tuple):
        if isinstance(own, tuple) and len(own) != len(saved):
            raise _Unlike(f"has {len(saved)} values, not {len(own)}")
        samples = [*own, *[own[-1] if own else None] * (len(saved) - len(own))]
        items = [like(sample, item) for sample, item in zip(samples, saved, strict=False)]
        return tuple(items) if isinstance(own, tuple) else items
    if isinstance(own, Mapping) and isinstance(saved, Mapping) and type(own) is type(saved):
        checked = {key: like(own.get(key), item) for key, item in saved.items()}
        return type(own)(checked)  # type: ignore[call-arg]
    if type(own) is not type(saved):
        raise _Unlike(f"is a {type(saved).__name__}, not a {type(own).__name__}")
    return saved


def _plain(value: Any) -> Any:
    for part in _leaves(value):
        if not (part is None or isinstance(part, str | bool) or _is_number(part) or _is_scalar(part)):
            raise _Unlike(f"has a {type(part).__name__}, not plain values")
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item)
    else:
        yield value


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex()


def checked_scaler(scaler: torch.amp.GradScaler, saved: Any, where: str) -> dict[str, Any]:
    """Return the state of a loss scale if it is one. Raises `CheckpointMismatch`."""
    own = scaler.state_dict()
    try:
        return own | {name: value for name, value in like(own, saved).items() if name in own}
    except _Unlike as error:
        raise CheckpointMismatch(f"{where}: the state of the loss scale {error}{INSTEAD}") from None


def kinds_of(optimizers: list[torch.optim.Optimizer], schedulers: list[Any]) -> list[list[str]]:
    """The classes of optimizers and of schedulers."""
    return [[type(one).__name__ for one in group] for group in (optimizers, schedulers)]


def check_kinds(
    optimizers: list[torch.optim.Optimizer], schedulers: list[Any], saved: dict[str, Any], where: str
) -> None:
    """Check that a saved state has the number and kinds of these optimizers and schedulers.

    Raises:
        CheckpointMismatch: It has others.
    """
    for what, own in (("optimizers", optimizers), ("schedulers", schedulers)):
        if len(own) != len(saved[what]):
            raise CheckpointMismatch(f"{where} has {len(saved[what])} {what}, this module has {len(own)}{INSTEAD}")
    there, here = saved.get("kinds"), kinds_of(optimizers, schedulers)
    if there is not None and there != here:
        was, now = (" and ".join(", ".join(part) or "no scheduler" for part in each) for each in (there, here))
        raise CheckpointMismatch(f"{where} has the state of {was}, and this module has {now}{INSTEAD}")


def checked_scheduler(scheduler: Any, saved: Any, where: str) -> Any:
    """Return the state of a scheduler if it is one.

    Raises:
        CheckpointMismatch: torch would set attributes that are not state, or are of other kinds.
    """
    load = getattr(type(scheduler), "load_state_dict", None)
    if saved is None or not getattr(load, "__module__", "").startswith("torch."):
        return saved  # it checks that itself
    own = scheduler.state_dict()
    name = "state"
    try:
        checked = {}
        for name, value in like(own, saved).items():
            if name not in own and hasattr(scheduler, str(name)):
                raise _Unlike("is not state")
            checked[name] = value
        return checked
    except _Unlike as error:
        raise CheckpointMismatch(f"{where}: {name!r:.80} of {type(scheduler).__name__} {error}{INSTEAD}") from None


def checked_optimizer(optimizer: torch.optim.Optimizer, saved: Any, where: str) -> dict[str, Any]:
    """Return a state that fits the optimizer: its own switches, hyperparameters of its kinds, tensors of its shapes.

    Args:
        where: Of what checkpoint, and of which optimizer in it, for messages.

    Raises:
        CheckpointMismatch: Something in it does not fit; names it.
    """
    at = "param_groups"
    try:
        own_sizes = [len(group["params"]) for group in optimizer.param_groups]
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        if own_sizes != sizes:
            raise CheckpointMismatch(
                f"{where} has groups of {sizes} parameters there, and of {own_sizes} here; a group that a hook adds"
                f" must be added by get_optimizers_schedulers() on resume, before which requires_grad is restored"
                f"{INSTEAD}"
            )
        numbers = list(chain.from_iterable(group["params"] for group in saved["param_groups"]))
        if len(set(numbers)) != len(numbers):
            raise _Unlike("has a parameter twice")
        groups, is_torchs = [], _kind_of(optimizer) is not torch.optim.Optimizer
        for index, (own, group) in enumerate(zip(optimizer.param_groups, saved["param_groups"], strict=True)):
            checked = {"params": group["params"]}
            for name in (own.keys() | (group.keys() - _SWITCHES)) - {"params"}:
                at = f"param_groups.{index}.{name}"
                if name in _SWITCHES or name not in group:
                    checked[name] = own[name]
                elif name in own and (is_torchs or isinstance(own[name], Real | tuple | torch.Tensor)):
                    checked[name] = like(own[name], group[name])
                else:
                    checked[name] = group[name]
            groups.append(checked)
        at = "state"
        _check_tensors(optimizer, dict(zip(numbers, _parameters(optimizer), strict=True)), saved["state"])
    except (_Unlike, TypeError, ValueError, OverflowError, LookupError, AttributeError) as error:
        raise CheckpointMismatch(f"{where}: {at} of {type(optimizer).__name__} {error}{INSTEAD}") from error
    return {**saved, "param_groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, checked: dict[str, Any]) -> None:
    """Load an optimizer's own state, or the result of `checked_optimizer`, with its types.

    Torch brings a state to its parameter's type: float32 moments of a bfloat16 weight are meant. And lay out in memory
    as the parameter is what belongs to its elements, such as one that is ``channels_last``.
    """
    optimizer.load_state_dict(checked)
    numbers = chain.from_iterable(group["params"] for group in checked["param_groups"])
    for parameter, number in zip(_parameters(optimizer), numbers, strict=True):
        for name, value in checked["state"].get(number, {}).items():
            own = optimizer.state[parameter].get(name)
            # Torch gives ``step`` the type that its kernels read.
            if name == "step" or not (isinstance(value, torch.Tensor) and isinstance(own, torch.Tensor)):
                continue
            # Fused kernels read both in memory order, which a file does not hold.
            if own.shape == parameter.shape and own.stride() != parameter.stride():
                optimizer.state[parameter][name] = own = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            if own.dtype != value.dtype:
                optimizer.state[parameter][name] = value.to(own.device, copy=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _kind_of(optimizer: torch.optim.Optimizer) -> type:
    """Return torch's class of an optimizer; `torch.optim.Optimizer` for one of another package."""
    return next(one for one in type(optimizer).__mro__ if one.__module__.startswith("torch.optim"))


def _check_tensors(optimizer: torch.optim.Optimizer, parameters: dict[Any, torch.Tensor], state: Any) -> None:
    """Check the state of each parameter: for torch's optimizers, that it has their shapes.

    For other optimizers, existing state shows its shapes; they check the rest themselves.
    """
    kind = _kind_of(optimizer)
    elements = sum(one.numel() * (1 + one.is_complex()) for one in parameters.values())
    strange: set[str] = set()
    for number in state.keys() & parameters.keys():  # the rest is kept, and reaches no kernel
        parameter = parameters[number]
        for name, value in state[number].items():
            made = getattr(optimizer, "state", {}).get(parameter, {}).get(name)
            try:
                if type(optimizer) is kind or (kind is not torch.optim.Optimizer and name in _MOMENTS | _COUNTERS):
                    _check_entry(kind, name, value, parameter, elements)
                elif isinstance(made, torch.Tensor):
                    like(made, value)
                elif any(
                    isinstance(one, torch.Tensor) and one.shape not in ((), parameter.shape) for one in _leaves(value)
                ):
                    strange.add(str(name))
            except _Unlike as error:
                raise _Unlike(f"has {name!r:.80} of parameter {number}, which {error}") from None
    if strange:
        logger.warning(
            f"{', '.join(sorted(strange)):.200} of {type(optimizer).__name__} has shapes that are not those of its"
            f" parameters, and is restored unchecked; resume only from checkpoints that you trust"
        )


def _check_entry(kind: type, name: Any, value: Any, parameter: torch.Tensor, elements: int) -> None:
    is_lbfgs = kind is torch.optim.LBFGS
    for one in value if is_lbfgs and isinstance(value, list) else [value]:
        if not isinstance(one, torch.Tensor):
            if not (one is None or isinstance(one, bool) or _is_number(one)):
                raise _Unlike(f"is a {type(one).__name__}, not a tensor")
            continue
        if name in _COUNTERS or (is_lbfgs and one.numel() == 1):
            if not _is_scalar(one):
                raise _Unlike(f"has the shape {tuple(one.shape)}, not that of a number")
            continue
        shape = tuple(parameter.shape)
        if is_lbfgs:
            shape = (elements,)
        elif name in ("row_var", "col_var"):  # of Adafactor: averages over the last dimension, and the one before it
            shape = (*shape[:-1], 1) if name == "row_var" else (*shape[:-2], 1, *shape[-1:])
        if tuple(one.shape) != shape:
            raise _Unlike(f"has the shape {tuple(one.shape)}, not {shape}")
        if one.is_complex() != (parameter.is_complex() and not is_lbfgs) or not (
            one.is_complex() or one.dtype in _FLOATS
        ):
            raise _Unlike(f"has the type {one.dtype}, for a parameter of {parameter.dtype}")
