"""Optimizers one by one: the module's return value, closures, and a step without torch's own extras."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from events.log import logger
from trainer.errors import OptimizerError
from trainer.loop.precision import Precision
from trainer.loop.schedule import Schedule


def _closure_parameter(optimizer: torch.optim.Optimizer) -> inspect.Parameter | None:
    """The argument of ``step`` that takes a closure, if it has one."""
    try:
        parameters = inspect.signature(optimizer.step).parameters.values()
    except (TypeError, ValueError):
        return None
    named = [one for one in parameters if one.name == "closure"]
    required = [one for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    return next(iter(named + required), None)


def takes_closure(optimizer: torch.optim.Optimizer) -> bool:
    return _closure_parameter(optimizer) is not None


def begins_with_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``step`` computes the gradients before it uses any, as torch's own do.

    Where a closure is optional, an optimizer may begin with the gradients that are there: usual SAM code does.
    """
    return wants_closure(optimizer) or (takes_closure(optimizer) and type(optimizer).__module__.startswith("torch."))


def wants_closure(optimizer: torch.optim.Optimizer) -> bool:
    found = _closure_parameter(optimizer)
    return found is not None and found.default is found.empty


def refuse_scaler(optimizers: list[torch.optim.Optimizer], precision: Precision) -> None:
    if precision.scaler is not None:
        needing = [one for one in optimizers if wants_closure(one)]
        kinds = ", ".join(type(one).__name__ for one in needing or filter(takes_closure, optimizers))
        raise OptimizerError(
            f"{kinds} computes the loss several times per step, which float16's loss scale, judged once per step, does"
            f" not allow; use precision='bfloat16' or 'float32'"
        )


def take_step(optimizer: torch.optim.Optimizer, own_hooks: int) -> None:
    """Call ``optimizer.step()``, but skip torch's wrapper around it where nobody would notice.

    The wrapper (`torch.optim.Optimizer.profile_hook_step`) runs the hooks of a step, and opens a range for the
    profiler, which takes 35 us, a tenth of a step of a small model. It is skipped if no profiler runs on this thread,
    nobody else has a hook, and ``step`` is that of the class, or the one by which a scheduler notices steps.

    Args:
        own_hooks: Number of the trainer's own hooks before a step, which need not run.
    """
    stock = type(optimizer).step
    unwrapped = getattr(stock, "__wrapped__", None) if getattr(stock, "hooked", False) else None
    own: Any = vars(optimizer).get("step")
    follows = own is not None and getattr(own, "_wrapped_by_lr_sched", False) and own.__wrapped__ is stock
    if (
        unwrapped is None
        or (own is not None and not follows)
        or len(optimizer._optimizer_step_pre_hooks) > own_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    ):
        optimizer.step()
        return
    if follows:
        optimizer._opt_called = True  # type: ignore[attr-defined]  # as the scheduler's wrapper does
    unwrapped(optimizer)


def as_optimizers(returned: Any) -> tuple[list[torch.optim.Optimizer], list[Schedule]]:
    what = "get_optimizers_schedulers() must return two lists, of optimizers and of schedulers"
    if isinstance(returned, torch.optim.Optimizer):
        raise OptimizerError(f"{what}; it returned one {type(returned).__name__}: return [optimizer], []")
    if isinstance(returned, Mapping):
        raise OptimizerError(f"{what}; it returned {_shown(returned)}: return [optimizer], [scheduler]")
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        raise OptimizerError(f"{what}; it returned {_shown(returned)}: return [optimizer], []")
    for part, example in zip(returned, ("[optimizer]", "[scheduler]"), strict=True):
        if not isinstance(part, Iterable) or isinstance(part, Mapping):
            raise OptimizerError(f"{what}; it returned {_shown(part)} instead of a list: write {example}")
    optimizers, schedulers = list(returned[0]), list(returned[1])
    if not optimizers:
        raise OptimizerError(
            "get_optimizers_schedulers() returned no optimizer; return one, such as [torch.optim.Adam(...)], []"
        )
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise OptimizerError(
                f"{what}; the first list holds {_shown(optimizer)}, which is not an optimizer: write [optimizer],"
                f" [scheduler]"
            )
    if len(set(map(id, optimizers))) < len(optimizers):
        raise OptimizerError(
            "get_optimizers_schedulers() returned an optimizer twice, which would step it twice; list it once"
        )
    for scheduler in schedulers:
        if isinstance(scheduler, Mapping):
            raise OptimizerError(
                f"{what}; the second list holds {_shown(scheduler)}: write Schedule(scheduler, interval, monitor)"
            )
        if not isinstance(scheduler, Schedule) and not callable(getattr(scheduler, "step", None)):
            raise OptimizerError(f"{what}; the second list holds {_shown(scheduler)}, which has no step()")
    schedules = [one if isinstance(one, Schedule) else Schedule(one) for one in schedulers]
    _warn_of_strangers(optimizers, schedules)
    return optimizers, schedules


def _warn_of_strangers(optimizers: list[torch.optim.Optimizer], schedules: list[Schedule]) -> None:
    """Warn about a scheduler that changes the learning rate of an optimizer which the run does not step.

    A wrapper such as SAM has its optimizer as an attribute, or shares its parameter groups.
    """
    within = {id(one) for optimizer in optimizers for one in (optimizer, *vars(optimizer).values())}
    groups = {id(group) for optimizer in optimizers for group in optimizer.param_groups}
    for kind, optimizer in ((type(one.scheduler), getattr(one.scheduler, "optimizer", None)) for one in schedules):
        if not isinstance(optimizer, torch.optim.Optimizer) or id(optimizer) in within:
            continue
        if not any(id(group) in groups for group in optimizer.param_groups):
            logger.warning(
                f"{kind.__name__} changes the learning rate of a {type(optimizer).__name__} that"
                f" get_optimizers_schedulers() did not return; build it with one of the returned optimizers"
            )


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"a {type(value).__name__}: {text[:80]}" if len(text) > 80 else text
