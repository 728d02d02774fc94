"""Seed, save and restore the global random generators of Python, NumPy, torch and the run's device."""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import torch

from events.errors import CheckpointDamaged

RngState = dict[str, Any]


def capture_rng(device: torch.device) -> RngState:
    """Copy the current states: plain values and host tensors ``(bytes,)`` uint8. Does not wait."""
    state: RngState = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")  # a process without it has not drawn from it
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: RngState, device: torch.device) -> None:
    """Restore the generators; one without a state is unchanged.

    Raises:
        CheckpointDamaged: A state is invalid; no generator was changed.
    """
    _check(state, device)
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        try:
            import numpy as np
        except ImportError:  # resumed in an environment without it
            pass
        else:
            np.random.set_state(state["numpy"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _check(state: RngState, device: torch.device) -> None:
    try:
        _, _, gauss = state["python"]
        if gauss is not None and not (type(gauss) is float and math.isfinite(gauss)):
            raise ValueError(f"{gauss!r:.80} is not a state of Python's generator")
        random.Random().setstate(state["python"])
        torch.Generator().set_state(state["torch"])
        if "cuda" in state and device.type == "cuda":
            torch.Generator(device).set_state(state["cuda"])
        if "numpy" in state:
            _check_numpy(*state["numpy"])
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as error:
        raise CheckpointDamaged(
            f"the state of the random generators cannot be restored: {error!r:.300}; load an older checkpoint"
        ) from error


def _check_numpy(name: object, key: Any, position: object, has_gauss: object, gauss: object) -> None:
    # NumPy does not check the position: a wrong one reads out of bounds.
    if name != "MT19937" or not isinstance(position, int) or not 0 <= position <= 624:
        raise ValueError(f"{name!r:.80} at {position!r:.80} is not a position of NumPy's generator")
    if (str(key.dtype), key.shape) != ("uint32", (624,)):
        raise ValueError(f"the state of NumPy's generator has {key.shape} {key.dtype} numbers, not 624 of uint32")
    if has_gauss not in (0, 1) or not isinstance(gauss, float) or not math.isfinite(gauss):
        raise ValueError(f"{gauss!r:.80} is not a state of NumPy's generator")


def seeded_rng(seed: int, device: torch.device) -> RngState:
    """Return the states of generators with this seed; the generators themselves stay as they are."""
    before = capture_rng(device)
    try:
        seed_everything(seed)
        return capture_rng(device)
    finally:
        restore_rng(before, device)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy (where it is installed) and torch, on every device."""
    random.seed(seed)
    torch.manual_seed(seed)  # seeds all accelerators, too
    try:
        import numpy as np
    except ImportError:
        return
    np.random.seed(seed % 2**32)  # NumPy's seeds have 32 bits
