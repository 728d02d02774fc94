"""The versions of the packages that compute a run."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def versions() -> dict[str, str]:
    """Return the versions of Python, torch and the packages that compute a run."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "stagecast": _own_version()}


def _own_version() -> str:
    try:
        return version("stagecast")
    except PackageNotFoundError:
        return "unknown"
