"""The device of a run."""

from __future__ import annotations

import torch

from trainer.errors import ArgumentsError


def resolve_device(device: str | torch.device) -> torch.device:
    """Find the device to train on; ``"auto"`` is the current accelerator if there is one, else the CPU.

    An accelerator is returned with its index, so that it compares equal to the device of a tensor on it.

    Raises:
        ArgumentsError: The device does not exist, or this torch cannot use it.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or torch.device("cpu")
    try:
        # The one test that all kinds of device share: have it hold a tensor.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArgumentsError(
            f"device = {str(device)!r}: cannot be used: {reason}. Available here: {', '.join(_devices())}."
        ) from error


def _devices() -> list[str]:
    found = ["'auto'", "'cpu'"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        found += [f"'{kind.type}:{index}'" for index in range(torch.accelerator.device_count())] if kind else []
    return found
