"""The numbers in events, and their names: the same in every sink, chart and report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from events.messages import (
    Event,
    LedgerReported,
    MetricsLogged,
    RunStarted,
    SystemSampled,
    TestEpochEnded,
    TrainEpochEnded,
    TrainStepEnded,
    ValEpochEnded,
)

_SYSTEM = (
    "cpu_percent",
    "process_cpu_percent",
    "memory_used_bytes",
    "process_memory_bytes",
    "disk_used_percent",
    "disk_read_bytes_per_s",
    "disk_written_bytes_per_s",
    "network_received_bytes_per_s",
    "network_sent_bytes_per_s",
)
_GPU = ("utilization_percent", "memory_used_bytes", "power_w", "temperature_c")


TRAIN_EPOCH_LOSS = "train_epoch_loss"
_OWN = ("train_loss", TRAIN_EPOCH_LOSS, "val_loss", "test_loss", "lr", "grad_norm", "step_s")
_OWN_PREFIXES = ("val_loss/", "test_loss/", "system/", "ledger/")


def reserved(name: str) -> str | None:
    """The names of all built-in metrics if this name is one of them, for a message; else None."""
    if name not in _OWN and not name.startswith(_OWN_PREFIXES):
        return None
    return ", ".join([*_OWN, *(f"{prefix}..." for prefix in _OWN_PREFIXES)])


def metric_name(name: str, key: str | None) -> str:
    """The name of a metric of one evaluation dataloader; the key ``"default"`` is omitted."""
    return name if key is None or key == "default" else f"{name}/{key}"


def metrics_of(event: Event) -> list[tuple[str, float]]:
    """The numbers in an event, each with its name, at ``event.global_step``; NaN and infinities included.

    ``train_loss``, ``lr``, ``grad_norm``, ``step_s`` of each step; ``train_epoch_loss``, the weighted mean of an
    epoch's step losses; ``val_loss``, ``test_loss``; the names that user code logs; ``system/...`` and ``ledger/...``
    (seconds of the last interval). Names of an evaluation dataloader other than ``"default"`` end in its key:
    ``val_loss/KEY``.
    """
    read = _READERS.get(type(event))
    return read(event) if read is not None else []


def result_metrics(event: Event) -> list[tuple[str, float]]:
    """Return the numbers of an event that `events.RunResult.metrics` has: losses, and those that user code logs."""
    if isinstance(event, TrainStepEnded):
        return [("train_loss", event.loss)] if event.loss is not None else []
    return metrics_of(event) if type(event) in _RESULT_TYPES else []


def hyperparameters(event: RunStarted) -> dict[str, Any]:
    """Hyperparameters for loggers: the trainer's arguments and the user's own, still nested.

    A name of the user's that is also an argument becomes ``config/NAME``.
    """
    own = {name if name not in event.arguments else f"config/{name}": value for name, value in event.config.items()}
    return event.arguments | own


def _of_step(event: TrainStepEnded) -> list[tuple[str, float]]:
    found = [("step_s", event.step_s)]
    if event.loss is not None:
        found.append(("train_loss", event.loss))
    if event.lr is not None:
        found.append(("lr", event.lr))
    if event.grad_norm is not None:
        found.append(("grad_norm", event.grad_norm))
    return found


def _of_log(event: MetricsLogged) -> list[tuple[str, float]]:
    return [(metric_name(name, event.key), value) for name, value in event.metrics.items()]


def _of_validation(event: ValEpochEnded) -> list[tuple[str, float]]:
    return [] if event.loss is None else [(metric_name("val_loss", event.key), event.loss)]


def _of_test(event: TestEpochEnded) -> list[tuple[str, float]]:
    return [] if event.loss is None else [(metric_name("test_loss", event.key), event.loss)]


def _of_epoch(event: TrainEpochEnded) -> list[tuple[str, float]]:
    return [] if event.loss is None else [(TRAIN_EPOCH_LOSS, event.loss)]


def _of_ledger(event: LedgerReported) -> list[tuple[str, float]]:
    if event.scope != "interval":
        return []
    rows = ((name, getattr(event.ledger, name)) for name in event.ledger.__struct_fields__ if name != "steps")
    return [(f"ledger/{name}", value) for name, value in rows if value is not None]


def _of_system(event: SystemSampled) -> list[tuple[str, float]]:
    found = [(f"system/{name}", getattr(event, name)) for name in _SYSTEM]
    for gpu in event.gpus:
        found += [(f"system/gpu{gpu.index}/{name}", getattr(gpu, name)) for name in _GPU]
    return [(name, float(value)) for name, value in found if value is not None]


# By type, because this reads journals of a million steps.
_READERS: dict[type[Event], Callable[..., list[tuple[str, float]]]] = {
    TrainStepEnded: _of_step,
    MetricsLogged: _of_log,
    ValEpochEnded: _of_validation,
    TestEpochEnded: _of_test,
    TrainEpochEnded: _of_epoch,
    LedgerReported: _of_ledger,
    SystemSampled: _of_system,
}
_RESULT_TYPES = frozenset({MetricsLogged, ValEpochEnded, TestEpochEnded, TrainEpochEnded})
METRIC_TYPES: frozenset[type[Event]] = frozenset(_READERS)
"""The types of events with numbers."""
