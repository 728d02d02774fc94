"""The state of a run between two steps, as a checkpoint holds it. On the loop's thread."""

from __future__ import annotations

import time
from typing import Any

import torch

from trainer.checkpoint.position import RANK_FIELDS, SAVED_FIELDS, Position
from trainer.data.loaders import has_state
from trainer.data.rng import capture_rng
from trainer.data.tensors import map_tensors
from trainer.distributed.local import local
from trainer.errors import add_note
from trainer.hooks.hooks import CallbackHooks
from trainer.loop.attempt import Attempt
from trainer.loop.optimization import Optimization


def run_state(attempt: Attempt, optimization: Optimization, position: Position, loader: Any) -> dict[str, Any]:
    """Return the state that must be captured between two steps; nothing is copied."""
    scaler = attempt.precision.scaler
    return {
        "global_step": attempt.origin.global_step,
        "epoch": attempt.origin.epoch,
        "position": _place(position, loader),
        # A current validation is repeated from its current dataloader.
        "rng": position.rng_at_validation or capture_rng(attempt.device),
        **attempt.averaging.saved(attempt.module.get_state()),
        "frozen": [name for name, one in attempt.module.named_parameters() if not one.requires_grad],
        **optimization.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "metrics": attempt.recorder.state_dict(),
        "callbacks": _inline_states(attempt),
    }


def rank_state(attempt: Attempt, position: Position, loader: Any) -> dict[str, Any]:
    """Return the state that each rank of a run has for itself."""
    place = _place(position, loader)
    return {
        "rng": position.rng_at_validation or capture_rng(attempt.device),
        "position": {name: place[name] for name in RANK_FIELDS},
        # SYNC: of the states of metric objects, if the module has any.
        "objects": map_tensors(torch.Tensor.cpu, attempt.recorder.objects.state_dict()),
    }


def stateful(attempt: Attempt) -> list[CallbackHooks]:
    """Return the callbacks with a state."""
    return [callback for callback in attempt.hooks.callbacks if callback.stateful and not callback.disabled]


def late_tensors(attempt: Attempt, optimization: Optimization) -> set[int]:
    """Return the device addresses of tensors that only the optimizers change."""
    if attempt.device.type != "cuda":
        return set()
    found = {local(parameter).data_ptr() for parameter in attempt.module.parameters()}
    for optimizer in optimization.optimizers:
        for state in optimizer.state.values():
            found.update(local(value).data_ptr() for value in state.values() if isinstance(value, torch.Tensor))
    return found


def _place(position: Position, loader: Any) -> dict[str, Any]:
    place = {name: getattr(position, name) for name in SAVED_FIELDS}
    if loader is not None and has_state(loader):
        place["loader_state"] = loader.state_dict()
    place["elapsed_s"] += time.monotonic() - position.began if position.phase != "begin" else 0.0
    return place


def _inline_states(attempt: Attempt) -> list[dict[str, Any]]:
    """Return the states of callbacks all of whose hooks run on this thread: on every rank the same callbacks."""
    states: list[dict[str, Any]] = []
    for callback in stateful(attempt):
        if not callback.has_observer_on_rank_0:
            try:
                states.append(callback.saved_state())
            except Exception as error:  # a supervisor's border: reported, and raised unless it only disables
                add_note(error, f"raised by {callback.name}.state_dict")
                attempt.fail_hook(callback, "state_dict", error)
    return states
