"""The global random generators: Python's, NumPy's, torch's, and that of the run's device; their seed and states."""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import torch

from events.errors import CheckpointDamaged

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
    """Set the generators to these states; one that the state does not mention stays as it is.

    Raises:
        CheckpointDamaged: One of them is not the state of such a generator; none was set.
    """
    _check(state, device)
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


def _check(state: RngState, device: torch.device) -> None:
    try:
        _, _, gauss = state["python"]
        if gauss is not None and not (type(gauss) is float and math.isfinite(gauss)):
            raise ValueError(f"{gauss!r:.80} is not a number that Python's generator keeps")
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


def _check_numpy(name: Any, key: Any, position: Any, has_gauss: Any, gauss: Any) -> None:
    # NumPy does not check the position, and reads behind its state with a wrong one.
    if name != "MT19937" or not isinstance(position, int) or not 0 <= position <= 624:
        raise ValueError(f"{name!r:.80} at {position!r:.80} is not a place in the state of NumPy's generator")
    if (str(key.dtype), key.shape) != ("uint32", (624,)):
        raise ValueError(f"the state of NumPy's generator has {key.shape} {key.dtype} numbers, not 624 of uint32")
    if has_gauss not in (0, 1) or not isinstance(gauss, float) or not math.isfinite(gauss):
        raise ValueError(f"{gauss!r:.80} is not a number that NumPy's generator keeps")


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy (where it is installed) and torch, on every device."""
    random.seed(seed)
    torch.manual_seed(seed)  # seeds all accelerators, too
    try:
        import numpy as np
    except ImportError:
        return
    np.random.seed(seed % 2**32)  # NumPy takes 32 bits
