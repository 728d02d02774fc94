"""What the benchmarks share: the machine in words, and bounds."""

from __future__ import annotations

import os
import platform
import random
import statistics
from collections.abc import Sequence

import anyio
import msgspec
import torch


def header() -> str:
    """Versions and machine, for the top of a table."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, msgspec {msgspec.__version__},"
        f" anyio {_version(anyio)}; {os.cpu_count()} CPUs ({platform.machine()}), load {load}"
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` % of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def bounds(values: Sequence[float], *, rounds: int = 2_000) -> tuple[float, float]:
    """Both ends of the 95 % bootstrap interval of the median."""
    generator = random.Random(0)
    medians = [statistics.median(generator.choices(values, k=len(values))) for _ in range(rounds)]
    return percentile(medians, 2.5), percentile(medians, 97.5)


def _version(module: object) -> str:
    from importlib.metadata import version

    return version(getattr(module, "__name__", "anyio"))
