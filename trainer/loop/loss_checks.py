"""Errors for a step whose loss cannot be trained."""

from __future__ import annotations

from typing import Any

import torch

from trainer.errors import StepOutputError
from trainer.module_interface import ModuleInterface


def bad_loss(module: ModuleInterface, loss: Any, values: tuple[Any, ...]) -> StepOutputError:
    where = f"{type(module).__name__}.train_step()"
    if not values:
        return StepOutputError(f"{where} returned nothing: return the loss tensor, or a tuple that begins with it")
    if not isinstance(loss, torch.Tensor):
        advice = "; return None alone to leave the batch out" if loss is None else ""
        return StepOutputError(
            f"{where} returned a {type(loss).__name__} ({loss!r:.80}) as its first value: that must be the loss"
            f" tensor{advice}"
        )
    if loss.numel() != 1:
        return StepOutputError(
            f"{where} returned a loss of shape {tuple(loss.shape)}: it must be one number; reduce it with .mean()"
        )
    if loss.is_complex():
        return StepOutputError(
            f"{where} returned a complex loss ({loss.dtype}): a loss must be real; return its .abs() or .real"
        )
    if any(parameter.grad is not None for parameter in module.parameters()) and loss.is_leaf:
        return own_backward(module)
    return StepOutputError(
        f"{where} returned a loss that needs no gradient: it does not depend on a parameter that is trained, or was"
        f" detached, or was computed under torch.no_grad()"
    )


def own_backward(module: ModuleInterface) -> StepOutputError:
    return StepOutputError(
        f"{type(module).__name__}.train_step() seems to have called backward() itself: return the loss and leave"
        f" backward() and the optimizers to the trainer, or set manual_optimization = True and call self.optimize(loss)"
    )
