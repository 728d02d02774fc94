"""Observers of a run: plain descriptions that are opened when the run starts.

A sink's third-party client is imported when the sink is opened, so ``import sinks`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__stagecast__ = True
"""Tells the other packages that this one, under its generic name, is ours."""

import events as _events  # it looks at `trainer`, too

if TYPE_CHECKING:
    from sinks.alerts.alert import Alert as Alert
    from sinks.console.console import Console as Console
    from sinks.files.csv import CSV as CSV
    from sinks.files.jsonl import JSONL as JSONL
    from sinks.files.tensorboard import TensorBoard as TensorBoard
    from sinks.live.sink import Live as Live
    from sinks.memory import Memory as Memory
    from sinks.nats.sink import NATS as NATS
    from sinks.push.sink import Push as Push
    from sinks.trackers.mlflow import MLflow as MLflow
    from sinks.trackers.opentelemetry import OpenTelemetry as OpenTelemetry
    from sinks.trackers.prometheus import Prometheus as Prometheus
    from sinks.trackers.wandb import WandB as WandB

__all__ = [
    "CSV",
    "JSONL",
    "NATS",
    "Alert",
    "Console",
    "Live",
    "MLflow",
    "Memory",
    "OpenTelemetry",
    "Prometheus",
    "Push",
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


_HOMES = {
    "Alert": "sinks.alerts.alert",
    "CSV": "sinks.files.csv",
    "Console": "sinks.console.console",
    "JSONL": "sinks.files.jsonl",
    "Live": "sinks.live.sink",
    "MLflow": "sinks.trackers.mlflow",
    "Memory": "sinks.memory",
    "NATS": "sinks.nats.sink",
    "OpenTelemetry": "sinks.trackers.opentelemetry",
    "Prometheus": "sinks.trackers.prometheus",
    "Push": "sinks.push.sink",
    "TensorBoard": "sinks.files.tensorboard",
    "WandB": "sinks.trackers.wandb",
}


# Lazy, because a submodule imported at the top would meet a shadowing `events` before the check above.
def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'sinks' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
