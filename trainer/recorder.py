"""Takes what user code logs and makes `MetricsLogged` of it, without asking the device for a number."""

from __future__ import annotations

import threading
from typing import Any

import torch

from events.bus import Bus
from events.messages import Event, HistogramLogged, MetricsLogged, TextLogged
from events.origin import Header, header_of
from trainer.media import INLINE_TEXT, Drawn, Histogram, Image, Logged, MediaWriter, Text

Value = float | torch.Tensor


class MetricRecorder:
    """What `ModuleInterface.log` writes to during a run.

    On the loop's thread values are gathered and published once per optimizer step, or once per evaluation of a
    dataloader, as the mean weighted by rows. In a hook of the observer or fenced lane, each call publishes at
    once, with the position in the run of the event that the hook handles.
    """

    def __init__(self, bus: Bus, media: MediaWriter) -> None:
        self.latest: dict[str, Value] = {}
        """Last value of each metric, as it was logged: tensors stay on their device."""
        self.logged_at: dict[str, int] = {}
        """``global_step`` at which that was."""
        self.weight = 1
        """Rows that the batch in hand stands for. Set by the loop."""
        self._bus = bus
        self._media = media
        self._loop_thread = 0
        self.values: list[tuple[str, Value | Logged, int]] = []
        """What the loop's thread has logged since the last `take`: name, value, weight."""
        self._hook = threading.local()

    def bind(self) -> None:
        """The calling thread is the loop's."""
        self._loop_thread = threading.get_ident()

    def log(self, name: str, value: Value | Logged) -> None:
        """Record one value. Any thread; tensors are copied on their device, so they may be changed afterwards."""
        if isinstance(value, torch.Tensor):
            value = value.detach().reshape(()).clone()
        if threading.get_ident() == self._loop_thread:
            self.values.append((name, value, self.weight))
            return
        event: Event | None = getattr(self._hook, "event", None)
        header = self._bus.origin.header() if event is None else header_of(event)
        key = getattr(event, "key", None)
        of_seq = event.seq if event is not None else None
        if isinstance(value, Histogram | Image | Drawn | Text):
            self._publish_other(name, value, header, key, of_seq)
        else:
            self._publish(MetricsLogged(*header, {}, key, of_seq), {name: value})

    def handling(self, event: Event | None) -> None:
        """The calling thread runs a hook for this event, or (None) no longer does."""
        self._hook.event = event

    def take(self, key: str | None = None) -> None:
        """Publish what the loop's thread has logged since the last call. ``key``: the evaluation dataloader's."""
        values, self.values = self.values, []
        numbers: list[tuple[str, Value, int]] = []
        for name, value, weight in values:
            if isinstance(value, Histogram | Image | Drawn | Text):
                self._publish_other(name, value, self._bus.origin.header(), key, None)
            else:
                numbers.append((name, value, weight))
        if numbers:
            self._publish(MetricsLogged(*self._bus.origin.header(), {}, key), _means(numbers))

    def keep(self, name: str, value: Value, global_step: int) -> None:
        """Note the last value of a metric."""
        self.latest[name] = value
        self.logged_at[name] = global_step

    def discard(self) -> None:
        """Forget what the loop's thread has logged since the last `take`: the step was skipped."""
        self.values = []

    def _publish(self, event: MetricsLogged, values: dict[str, Value]) -> None:
        suffix = "" if event.key in (None, "default") else f"/{event.key}"
        for name, value in values.items():
            self.keep(name + suffix, value, event.global_step)
            event.metrics[name] = value  # type: ignore[assignment]  # a tensor is deferred: see `Event.deferred`
        self._bus.publish(event)

    def _publish_other(self, name: str, value: Logged, header: Header, key: str | None, of_seq: int | None) -> None:
        if isinstance(value, Histogram):
            numbers: list[Any] = [value.low, value.high, value.counts, value.non_finite]  # deferred
            low, high, counts, non_finite = numbers
            self._bus.publish(HistogramLogged(*header, name, low, high, counts, non_finite, key, of_seq))
        elif isinstance(value, Text) and len(value.text) <= INLINE_TEXT:
            self._bus.publish(TextLogged(*header, name, value.text, None, key, of_seq))
        else:
            self._media.add(name, value, header, key, of_seq)


def _means(values: list[tuple[str, Value, int]]) -> dict[str, Value]:
    groups: dict[str, list[tuple[Value, int]]] = {}
    for name, value, weight in values:
        groups.setdefault(name, []).append((value, weight))
    return {name: group[0][0] if len(group) == 1 else weighted_mean(group) for name, group in groups.items()}


def weighted_mean(group: list[tuple[Value, int]]) -> Value:
    """The mean of numbers and 0-dim tensors; on the tensors' device if there is any, without waiting for it."""
    total = sum(weight for _, weight in group)
    tensors = [value for value, _ in group if isinstance(value, torch.Tensor)]
    if not tensors:
        return sum(float(value) * weight for value, weight in group) / total
    device = tensors[0].device
    # Apple's GPUs have no float64.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if len(tensors) == len(group) and len({(t.device, t.dtype) for t in tensors}) == 1:
        stacked = torch.stack(tensors).to(dtype)
    else:
        stacked = torch.stack(
            [v.to(device, dtype) if isinstance(v, torch.Tensor) else _constant(v, device, dtype) for v, _ in group]
        )
    weights = torch.tensor([weight for _, weight in group], dtype=dtype).to(device, non_blocking=True)
    return (stacked * weights).sum() / total


def _constant(value: float, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((), value, device=device, dtype=dtype)
