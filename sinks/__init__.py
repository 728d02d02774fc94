"""Observers of a run: plain descriptions that are opened when the run starts.

A sink's third-party client is imported when the sink is opened, so ``import sinks`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__stagecast__ = True
"""Tells the other packages that this one, under its generic name, is ours."""

import events as _events  # it looks at `trainer`, too

if TYPE_CHECKING:
    from sinks.console import Console as Console
    from sinks.csv import CSV as CSV
    from sinks.jsonl import JSONL as JSONL
    from sinks.live.sink import Live as Live
    from sinks.memory import Memory as Memory
    from sinks.mlflow import MLflow as MLflow
    from sinks.opentelemetry import OpenTelemetry as OpenTelemetry
    from sinks.prometheus import Prometheus as Prometheus
    from sinks.tensorboard import TensorBoard as TensorBoard
    from sinks.wandb import WandB as WandB

__all__ = [
    "CSV",
    "JSONL",
    "Console",
    "Live",
    "MLflow",
    "Memory",
    "OpenTelemetry",
    "Prometheus",
    "TensorBoard",
    "WandB",
]


# Not in a module of its own: under a stranger's `events` nothing else may be imported.
if not getattr(_events, "__stagecast__", False):
    _shadow = getattr(_events, "__file__", None) or ", ".join(getattr(_events, "__path__", ())) or repr(_events)
    raise ImportError(
        f"stagecast needs its own package 'events', but {_shadow} shadows it: rename that file or folder, or take its"
        f" folder off the front of sys.path",
        name="events",
        path=_shadow,
    )


# Lazy, because a submodule imported at the top would meet a shadowing `events` before the check above.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sinks' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = "sinks.live.sink" if name == "Live" else f"sinks.{name.lower()}"
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
