"""Observers of a run: plain descriptions that are opened when the run starts.

A sink's third-party client is imported when the sink is opened, so ``import sinks`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import events

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


def _check_events() -> None:
    """Refuse a stranger's ``events``: the name is generic, and one earlier on the path would shadow ours."""
    if getattr(events, "__stagecast__", False) is True:
        return
    file = getattr(events, "__file__", None)
    where = file or ", ".join(getattr(events, "__path__", ())) or repr(events)
    raise ImportError(
        "stagecast's sinks need the package 'events' that is installed with them, but 'import events' found "
        f"{where}, which shadows it. Rename that file or folder, or take the folder it lies in off sys.path "
        "(a script's own folder comes first there).",
        name="events",
        path=file,
    )


_check_events()


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
