"""The global random generators: Python's, NumPy's, torch's, and that of the run's device; their seed and states."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

RngState = dict[str, Any]


def capture_rng(device: torch.device) -> RngState:
    """The states as they are now: plain values and host tensors ``(bytes,)`` uint8 of their own. Does not wait."""
    state: RngState = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")  # who has not imported it cannot have drawn from it
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: RngState, device: torch.device) -> None:
    """Set the generators to these states; one that the state does not tell of stays as it is."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        try:
            import numpy as np
        except ImportError:  # the run goes on where there is none
            pass
        else:
            np.random.set_state(state["numpy"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy (where it is installed) and torch, on every device."""
    random.seed(seed)
    torch.manual_seed(seed)  # seeds all accelerators, too
    try:
        import numpy as np
    except ImportError:
        return
    np.random.seed(seed % 2**32)  # NumPy takes 32 bits
