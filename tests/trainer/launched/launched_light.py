"""Factories that come to no trainer, and need no torch for that."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def build_with(width: int) -> Any:
    """One that is called without it."""
    raise AssertionError(width)


def build_slowly() -> Any:
    """One that never comes."""
    (Path.cwd() / f"building-{os.getpid()}").touch()
    time.sleep(100)
    raise AssertionError


def build_and_vanish() -> Any:
    """None."""
    print("no memory", flush=True)
    os._exit(9)


def build_nothing() -> Any:
    """No trainer."""
    return 5
