"""The numbers of a run, as sinks must show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from support.training import Net

from events.messages import Event
from events.metrics import metrics_of

Curves = dict[str, list[tuple[int, float]]]
"""The points of each metric, ``(global_step, value)``, in order."""


def curves(events: Sequence[Event]) -> Curves:
    """All numbers that were published."""
    found: Curves = {}
    for event in events:
        for name, value in metrics_of(event):
            found.setdefault(name, []).append((event.global_step, value))
    return found


class Logs(Net):
    """Logs a number of its own in each step."""

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        self.log("größe/π", 1.5)
        return super().train_step(global_step, batch, device)
