"""Turn logged values into `MetricsLogged` and other events, without waiting for the device."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import torch

from events.bus.ring import Ring
from events.log import logger
from events.messages import Event, HistogramLogged, MetricsLogged, MonitorMissing, TextLogged
from events.metrics import TRAIN_EPOCH_LOSS, metric_name, reserved
from events.origin import Header, header_of
from events.text import MOST_NAME, as_name, name_problem
from trainer.callback_interface import Reduction
from trainer.errors import MetricNotFound
from trainer.media import INLINE_TEXT, Drawn, Histogram, Image, Logged, LoggedText, MediaWriter

Value = float | torch.Tensor
_Numbers = list[tuple[Value, float]]
"""Values of one name, with their weights."""


class MetricRecorder:
    """Receives the values of `ModuleInterface.log` during a run.

    On the loop's thread values are collected and published once per optimizer step, or once per evaluation of a
    dataloader, reduced to one: by default to the mean weighted by rows. In a hook of the observer or fenced lane, each
    call publishes at once, with the header of the event that the hook handles.
    """

    def __init__(self, ring: Ring, media: MediaWriter) -> None:
        self.weight: float = 1
        """The weight of the current batch in means. Set by the loop."""
        self.validation: dict[str, Value] = {}
        """Metrics of the current or last validation; tensors stay on their device."""
        self.epoch: dict[str, Value] = {}
        """Metrics of training in the current epoch."""
        self.judged: dict[str, Value] = self.validation
        """One of the two: the metrics that monitors read."""
        self._validated_at = 0
        self._seen = {TRAIN_EPOCH_LOSS}  # metrics of any validation so far, or of any epoch without validation
        self._gaps: set[tuple[str, str]] = set()  # monitors that lacked their metric last time
        self._loss_sum: torch.Tensor | None = None
        self._loss_weight = 0.0
        self._ring = ring
        self._media = media
        self._loop_thread = 0
        self.values: list[tuple[str, Value | Logged, float, Reduction]] = []
        """Values logged on the loop's thread since the last `flush`: name, value, weight, reduction."""
        self._hook = threading.local()
        self._places: dict[str, tuple[str | None, str]] = {}  # the stage and the kind of value of each name
        self._names: dict[str, tuple[str, Reduction]] = {}  # by logged name: the recorded one, and its reduction

    def bind(self) -> None:
        """Declare the calling thread the loop's."""
        self._loop_thread = threading.get_ident()

    def log(self, name: str, value: Value | Logged, reduce: Reduction = "mean") -> None:
        """Record one value. Any thread; tensors are copied on their device, so they may be changed afterwards.

        Raises:
            ValueError: The name is reserved for a metric of the trainer, or has another ``reduce`` already.
        """
        name, before = self._names.get(name) or self._allow(name, reduce)
        if before != reduce:
            raise ValueError(f"log({name!r}) got reduce={reduce!r} here and {before!r} before; give it one of them")
        if isinstance(value, torch.Tensor):
            value = value.detach().reshape(()).clone()
        if threading.get_ident() == self._loop_thread:
            self.values.append((name, value, self.weight, reduce))
            return
        event: Event | None = getattr(self._hook, "event", None)
        header = self._ring.origin.header() if event is None else header_of(event)
        key = getattr(event, "key", None)
        of_seq = event.seq if event is not None else None
        if isinstance(value, Histogram | Image | Drawn | LoggedText):
            self._publish_other(name, value, header, key, of_seq)
        else:
            self._publish(MetricsLogged(*header, metrics={}, key=key, of_seq=of_seq), {name: value})

    def handling(self, event: Event | None, *, fenced: bool = False) -> None:
        """Declare that the calling thread runs a hook for this event, or (None) no longer does.

        Args:
            fenced: The loop waits for the hook, so monitors can read its metrics. Other hooks log at any time, so
                monitors ignore theirs.
        """
        self._hook.event, self._hook.fenced = event, fenced

    def flush(self, key: str | None = None) -> None:
        """Publish the values logged on the loop's thread since the last call. ``key``: the evaluation dataloader's."""
        values, self.values = self.values, []
        groups: dict[str, _Numbers] = {}
        reductions: dict[str, Reduction] = {}
        for name, value, weight, reduce in values:
            if isinstance(value, Histogram | Image | Drawn | LoggedText):
                self._publish_other(name, value, self._ring.origin.header(), key, None)
            else:
                groups.setdefault(name, []).append((value, weight))
                reductions[name] = reduce
        if groups and (reduced := _reduced(groups, reductions)):
            self._publish(MetricsLogged(*self._ring.origin.header(), metrics={}, key=key), reduced)

    def discard(self) -> None:
        """Drop the values logged on the loop's thread since the last `flush`: the step was skipped."""
        self.values = []

    # ------------------------------------------------------------------------------------------- monitors

    def begin_validation(self, global_step: int) -> None:
        """Start a validation: drop the metrics of the previous one."""
        self._validated_at = global_step
        self.validation.clear()

    def begin_epoch(self) -> None:
        """Start a training epoch: drop the metrics of the previous one."""
        self.epoch.clear()
        self._loss_sum, self._loss_weight = None, 0.0

    def add_loss(self, loss: torch.Tensor, weight: float) -> None:
        """Add a step's loss to the epoch's mean; called only if a monitor reads it."""
        # Apple's GPUs have no float64.
        loss = (loss if loss.device.type == "mps" else loss.double()).reshape(()) * weight
        self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss
        self._loss_weight += weight

    def end_epoch(self) -> None:
        """Compute the epoch's mean loss, if a monitor reads it."""
        if self._loss_sum is not None and self._loss_weight:
            self.epoch[TRAIN_EPOCH_LOSS] = self._loss_sum / self._loss_weight

    def keep(self, name: str, value: Value, stage: str | None, global_step: int) -> None:
        """Record a value for monitors."""
        if stage == "val":
            if global_step == self._validated_at:
                self.validation[name] = value
        elif stage == "train":
            self.epoch[name] = value

    def monitored(self, monitor: str, wanted_by: str, *, required: bool) -> Value | None:
        """The value of a metric of the last validation (or epoch); None if it is missing.

        `MonitorMissing` and a warning then name the existing metrics.

        Args:
            wanted_by: The callback or scheduler that reads it, for messages.
            required: Raise if no validation so far has logged it.

        Raises:
            MetricNotFound: The metric is required and was never logged.
        """
        judged, gap = self.judged, (wanted_by, monitor)
        value = judged.get(monitor)
        if value is not None:
            self._gaps.discard(gap)
            return value
        known = sorted(judged)
        self._ring.publish(
            MonitorMissing(*self._ring.origin.header(), monitor=monitor, wanted_by=wanted_by, known=known)
        )
        before, noticed = monitor in self._seen, gap in self._gaps
        self._gaps.add(gap)
        what = "validation" if judged is self.validation else "epoch"
        there = ", ".join(known) or "none"
        text = f"{wanted_by} follows {monitor!r}, which is not a metric of this {what} (available: {there})"
        if before:
            text += "; skipped this time"
        elif near := get_close_matches(monitor, known, 1, 0.5):
            text += f"; set it to {near[0]!r}, or log {monitor!r}"
        else:
            text += f"; log {monitor!r} in val_step or in the module's own on_end_val_epoch"
        if required and not before:
            raise MetricNotFound(text)
        if not noticed:
            logger.warning(text)
        return None

    def end_judging(self) -> None:
        """Record the names of the current metrics, after all monitors have read them."""
        self._seen.update(self.judged)

    def state_dict(self) -> dict[str, object]:
        """The state of monitors for a checkpoint; tensors are not copied."""
        return {
            "validation": dict(self.validation),
            "epoch": dict(self.epoch),
            "validated_at": self._validated_at,
            "seen": sorted(self._seen),
            "followed_loss": (self._loss_sum, self._loss_weight),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.validation.update(state["validation"])
        self.epoch.update(state["epoch"])
        self._validated_at = state["validated_at"]
        self._seen.update(state["seen"])
        self._loss_sum, self._loss_weight = state["followed_loss"]

    # -------------------------------------------------------------------------------------------- publishing

    def _allow(self, name: str, reduce: Reduction) -> tuple[str, Reduction]:
        if (names := reserved(name)) is not None:
            raise ValueError(
                f"log({name!r}): the name is reserved for a metric of the trainer ({names}); use another name, such as"
                f" {'my_' + name.replace('/', '_')!r}"
            )
        recorded = as_name(name)
        self._names[name] = recorded, reduce
        if recorded != name:
            logger.warning(
                f"log({name!r:.80}): the name {name_problem(name)}, and is recorded as {recorded!r}; use printable"
                f" names of up to {MOST_NAME} characters"
            )
        return recorded, reduce

    def _publish(self, event: MetricsLogged, values: dict[str, Value]) -> None:
        fenced = threading.get_ident() == self._loop_thread or getattr(self._hook, "fenced", False)
        for name, value in values.items():
            full = metric_name(name, event.key)
            if self._places.get(full) != (event.stage, "a number"):
                self._place(full, event.stage, "a number")
            if fenced:
                self.keep(full, value, event.stage, event.global_step)
            event.metrics[name] = value  # type: ignore[assignment]  # a tensor is deferred: see `Event.deferred`
        self._ring.publish(event)

    def _place(self, name: str, stage: str | None, what: str) -> None:
        """Warn once about a name that would mix two quantities in one series."""
        first = self._places.setdefault(name, (stage, what))
        if first == (stage, what) or first[1] == "":
            return
        self._places[name] = (stage, "")
        if first[1] != what:
            logger.warning(
                f"{name!r} is logged as {first[1]} and as {what}; use two names, because loggers may show only one"
            )
        else:
            here, there = _STAGES.get(first[0], "outside of a stage"), _STAGES.get(stage, "outside of a stage")
            logger.warning(
                f"{name!r} is logged {here} and {there}, which mixes both in one series; use two names, such as"
                f" 'train_{name}' and 'val_{name}'"
            )

    def _publish_other(self, name: str, value: Logged, header: Header, key: str | None, of_seq: int | None) -> None:
        full, kind = metric_name(name, key), _KINDS[type(value)]
        if self._places.get(full) != (header[-1], kind):
            self._place(full, header[-1], kind)
        if isinstance(value, Histogram):
            numbers: list[Any] = [value.low, value.high, value.counts, value.non_finite]  # deferred
            low, high, counts, non_finite = numbers
            self._ring.publish(
                HistogramLogged(
                    *header, name=name, low=low, high=high, counts=counts, non_finite=non_finite, key=key, of_seq=of_seq
                )
            )
        elif isinstance(value, LoggedText) and len(value.text) <= INLINE_TEXT:
            self._ring.publish(TextLogged(*header, name=name, text=value.text, path=None, key=key, of_seq=of_seq))
        else:
            self._media.add(name, value, header, key, of_seq)


_STAGES: dict[str | None, str] = {"train": "in training", "val": "in validation", "test": "in testing"}
_KINDS: dict[type, str] = {Histogram: "a histogram", Image: "an image", Drawn: "an image", LoggedText: "a text"}


def _reduced(groups: dict[str, _Numbers], reductions: dict[str, Reduction]) -> dict[str, Value]:
    reduced: dict[str, Value] = {}
    for name, group in groups.items():
        one = group[0][0] if len(group) == 1 else _REDUCE[reductions[name]](group)
        if one is not None:
            reduced[name] = one
    return reduced


def weighted_mean(group: _Numbers) -> Value | None:
    """The mean of numbers and 0-dim tensors; on the tensors' device if there is any, without waiting for it.

    Values of weight 0 are skipped, even NaN. None if all weights are 0.
    """
    group = _counted(group)
    total = sum(weight for _, weight in group)
    if not total:
        return None
    stacked = _stacked(group)
    if stacked is None:
        return sum(float(value) * weight for value, weight in group) / total
    weights = torch.tensor([weight for _, weight in group], dtype=stacked.dtype).to(stacked.device, non_blocking=True)
    return (stacked * weights).sum() / total


def _sum(group: _Numbers) -> Value | None:
    if not (group := _counted(group)):
        return None
    stacked = _stacked(group)
    return stacked.sum() if stacked is not None else math.fsum(float(value) for value, _ in group)


def _max(group: _Numbers) -> Value | None:
    """NaN if a value is NaN, as torch's."""
    if not (group := _counted(group)):
        return None
    stacked = _stacked(group)
    if stacked is not None:
        return stacked.max()
    numbers = [float(value) for value, _ in group]
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)


def _last(group: _Numbers) -> Value | None:
    return next((value for value, _ in reversed(_counted(group))), None)


_REDUCE: dict[Reduction, Callable[[_Numbers], Value | None]] = {
    "mean": weighted_mean,
    "sum": _sum,
    "max": _max,
    "last": _last,
}


def _counted(group: _Numbers) -> _Numbers:
    return [(value, weight) for value, weight in group if weight]


def _stacked(group: _Numbers) -> torch.Tensor | None:
    """The values as one tensor ``(values,)`` on the device of the tensors among them; None if there are none."""
    tensors = [value for value, _ in group if isinstance(value, torch.Tensor)]
    if not tensors:
        return None
    device = tensors[0].device
    # Apple's GPUs have no float64.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if len(tensors) == len(group) and len({(t.device, t.dtype) for t in tensors}) == 1:
        return torch.stack(tensors).to(dtype)
    return torch.stack(
        [v.to(device, dtype) if isinstance(v, torch.Tensor) else _constant(v, device, dtype) for v, _ in group]
    )


def _constant(value: float, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((), value, device=device, dtype=dtype)
