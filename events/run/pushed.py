"""Whether a run is pushed here from elsewhere. Imports no logger, so that tables can be read without it."""

from __future__ import annotations

import contextlib
import os

import msgspec

from events.run.folder import LOCK_BYTES, LOCK_NAME, Holder
from events.safe_files import read_below


def is_pushed(path: str | os.PathLike[str]) -> bool:
    """Whether the newest holder of a run's folder was a server that the run is pushed to: see `Holder`."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return msgspec.json.decode(read_below(path, LOCK_NAME, LOCK_BYTES), type=Holder).is_pushed
    return False
