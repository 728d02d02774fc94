"""Factories that return no trainer, and need no torch."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def build_with(width: int) -> Any:
    raise AssertionError(width)


def build_slowly() -> Any:
    (Path.cwd() / f"building-{os.getpid()}").touch()
    time.sleep(100)
    raise AssertionError


def build_and_vanish() -> Any:
    print("no memory", flush=True)
    os._exit(9)


def build_nothing() -> Any:
    return 5
