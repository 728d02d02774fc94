"""The numbers in events, and their names: the same in every sink, chart and report."""

from __future__ import annotations

from events.messages import (
    Event,
    LedgerReported,
    MetricsLogged,
    SystemSampled,
    TestEpochEnded,
    TrainEpochEnded,
    TrainStepEnded,
    ValEpochEnded,
)

METRIC_TYPES: frozenset[type[Event]] = frozenset(
    {TrainStepEnded, TrainEpochEnded, ValEpochEnded, TestEpochEnded, MetricsLogged, SystemSampled, LedgerReported}
)
"""The types of events that have numbers."""

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


def metric_name(name: str, key: str | None) -> str:
    """The name of a metric of one evaluation dataloader: the default one's goes without its key."""
    return name if key is None or key == "default" else f"{name}/{key}"


def metrics_of(event: Event) -> list[tuple[str, float]]:
    """The numbers that an event carries, each with its name. They belong to ``event.global_step``.

    ``train_loss``, ``lr``, ``grad_norm``, ``step_s`` of each step; ``train_epoch_loss``; ``val_loss``, ``test_loss``;
    what user code logs, under its own names; ``system/...`` and ``ledger/...`` (seconds of the last interval). Those of
    an evaluation dataloader other than ``"default"`` end in its key: ``val_loss/KEY``. NaN and infinities are there.
    """
    match event:
        case TrainStepEnded():
            step = [("train_loss", event.loss), ("lr", event.lr), ("grad_norm", event.grad_norm)]
            return [(name, value) for name, value in step if value is not None] + [("step_s", event.step_s)]
        case MetricsLogged():
            return [(metric_name(name, event.key), value) for name, value in event.metrics.items()]
        case ValEpochEnded() | TestEpochEnded():
            name = "val_loss" if isinstance(event, ValEpochEnded) else "test_loss"
            return [] if event.loss is None else [(metric_name(name, event.key), event.loss)]
        case TrainEpochEnded():
            return [] if event.loss is None else [("train_epoch_loss", event.loss)]
        case SystemSampled():
            return _system(event)
        case LedgerReported() if event.scope == "interval":
            rows = ((name, getattr(event.ledger, name)) for name in event.ledger.__struct_fields__ if name != "steps")
            return [(f"ledger/{name}", value) for name, value in rows if value is not None]
    return []


def _system(event: SystemSampled) -> list[tuple[str, float]]:
    found = [(f"system/{name}", getattr(event, name)) for name in _SYSTEM]
    for gpu in event.gpus:
        found += [(f"system/gpu{gpu.index}/{name}", getattr(gpu, name)) for name in _GPU]
    return [(name, float(value)) for name, value in found if value is not None]
