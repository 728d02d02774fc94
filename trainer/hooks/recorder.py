"""Turn logged values into `MetricsLogged` and other events, without waiting for the device."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeGuard

import torch

from events.bus.ring import Ring
from events.log import logger
from events.messages import (
    Event,
    HistogramLogged,
    MetricsLogged,
    MonitorMissing,
    RunEnded,
    TextLogged,
    TraceSaved,
    TrainEpochEnded,
    ValEpochEnded,
)
from events.metrics import TRAIN_EPOCH_LOSS, metric_name, reserved
from events.origin import Header, header_of
from events.text import MOST_NAME, as_name, name_problem
from trainer.callback_interface import Reduction, checked_number
from trainer.distributed.local import is_split, whole
from trainer.errors import MetricNotFound
from trainer.hooks.metric_objects import MetricObject, MetricObjects, check_single
from trainer.hooks.reductions import Numbers, Value, reduced
from trainer.media import INLINE_TEXT, Histogram, Logged, LoggedText, MediaWriter, SavedTrace, kind_of

Entry = tuple[str, Value | Logged, float, Reduction]
"""A logged value: name, value, weight, reduction."""


def is_number(value: Value | Logged) -> TypeGuard[Value]:
    """Whether it is a number, perhaps on a device, rather than an image or the like."""
    return not isinstance(value, Logged)


class MetricRecorder:
    """Receives the values of `ModuleInterface.log` during a run.

    On the loop's thread values are collected and published once per optimizer step, or once per evaluation of a
    dataloader, reduced to one: by default to the mean weighted by rows. In a hook of the observer or fenced lane, each
    call publishes at once, with the header of the event that the hook handles.
    """

    def __init__(self, ring: Ring, media: MediaWriter, module: torch.nn.Module) -> None:
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
        self._followed_loss: tuple[torch.Tensor | None, float | torch.Tensor] = (None, 0.0)  # a sum, and its weight
        self.objects = MetricObjects(module)
        self._ring = ring
        self._media = media
        self._loop_thread = 0
        self.values: list[Entry] = []
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
            value = self._whole(name, value.detach()).reshape(()).clone()
        if threading.get_ident() == self._loop_thread:
            self.values.append((name, value, self.weight, reduce))
            return
        event: Event | None = getattr(self._hook, "event", None)
        header = self._ring.origin.header() if event is None else header_of(event)
        key = getattr(event, "key", None)
        of_seq = event.seq if event is not None else None
        if isinstance(value, Logged):
            self._publish_other(name, value, header, key, of_seq)
        else:
            self._publish(MetricsLogged(*header, metrics={}, key=key, of_seq=of_seq), {name: value})

    def _whole(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return all of a tensor that is divided among ranks. WAIT: for all ranks, which log it, too."""
        if not is_split(value):
            return value
        if threading.get_ident() != self._loop_thread and not getattr(self._hook, "fenced", False):
            raise TypeError(
                f"log({name!r}) got a tensor that is divided among ranks, in a hook that only observes; mark the hook"
                f" @inline"
            )
        return whole(value)

    def log_metric(self, name: str | None, metric: MetricObject, owner: object) -> None:
        """Record a metric object: its value at the end of the epoch or evaluation, or now in a hook of that end.

        Raises:
            TypeError: A hook off the loop's thread logs it at another place, or its value is not a number.
            ValueError: See `MetricObjects.add`.
        """
        event: Event | None = getattr(self._hook, "event", None)
        if threading.get_ident() == self._loop_thread:
            evaluates = self._ring.origin.stage in ("val", "test")
            self.objects.add(name, metric, owner, evaluates=evaluates)
        elif not isinstance(event, TrainEpochEnded | ValEpochEnded | RunEnded):
            raise TypeError(
                f"log({name!r}) got a {type(metric).__name__} off the loop's thread, where no epoch ends; log it in a"
                f" hook at the end of an epoch, or log its compute()"
            )
        else:
            check_single(name, metric)
            key = getattr(event, "key", None)
            self._publish_computed(self.objects.compute(name, metric), header_of(event), key, event.seq)
            if getattr(self._hook, "fenced", False):
                self.objects.reset_later(metric)
            else:
                metric.reset()

    @property
    def has_logged(self) -> bool:
        """Whether `end_evaluation` has anything to publish."""
        return bool(self.values or self.objects.evaluation)

    def end_evaluation(self, key: str) -> None:
        """Publish what was logged over a dataloader, on the loop's thread; metric objects are computed.

        The caller then runs the hooks, and resets the objects.
        """
        self.flush(key)
        for computed in self.objects.computed(self.objects.evaluation):
            self._publish_computed(computed, self._ring.origin.header(), key, None)

    def compute_epoch(self) -> None:
        """Compute and publish the metric objects of a training epoch, which ends, on the loop's thread."""
        for computed in self.objects.computed(self.objects.epoch):
            self._publish_computed(computed, self._ring.origin.header(), None, None)

    def _publish_computed(self, computed: dict[str, Any], header: Header, key: str | None, of_seq: int | None) -> None:
        values: dict[str, Value] = {}
        for name, value in computed.items():
            recorded, _ = self._names.get(name) or self._allow(name, "mean")
            number = checked_number(name, value)
            values[recorded] = number.detach().reshape(()).clone() if isinstance(number, torch.Tensor) else number
        if values:
            self._publish(MetricsLogged(*header, metrics={}, key=key, of_seq=of_seq), values, "a metric object")

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
        groups: dict[str, Numbers] = {}
        reductions: dict[str, Reduction] = {}
        for name, value, weight, reduce in values:
            if isinstance(value, Logged):
                self._publish_other(name, value, self._ring.origin.header(), key, None)
            else:
                groups.setdefault(name, []).append((value, weight))
                reductions[name] = reduce
        if groups and (found := reduced(groups, reductions)):
            self._publish(MetricsLogged(*self._ring.origin.header(), metrics={}, key=key), found)

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Drop the values that are logged within the block on the loop's thread, and the updates of metric objects."""
        values = list(self.values)
        with self.objects.unseen():
            yield
        self.values = values

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
        self._followed_loss = (None, 0.0)

    def add_loss(self, loss: torch.Tensor, weight: float | torch.Tensor) -> None:
        """Add a step's loss to the epoch's mean; called only if a monitor reads it."""
        # Apple's GPUs have no float64.
        loss = (loss if loss.device.type == "mps" else loss.double()).reshape(()) * weight
        total, weights = self._followed_loss
        self._followed_loss = (loss if total is None else total + loss, weights + weight)

    def end_epoch(self) -> None:
        """Compute the epoch's mean loss, if a monitor reads it; its hooks have run, so metric objects are reset."""
        total, weight = self._followed_loss
        if total is not None and weight:
            self.epoch[TRAIN_EPOCH_LOSS] = total / weight
        self.compute_epoch()  # those that an inline hook has logged at the end of the epoch
        self.objects.reset()

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
            "followed_loss": self._followed_loss,
            "objects": self.objects.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.validation.update(state["validation"])
        self.epoch.update(state["epoch"])
        self._validated_at = state["validated_at"]
        self._seen.update(state["seen"])
        total, weight = state["followed_loss"]
        self._followed_loss = total, weight
        self.objects.load_state_dict(state.get("objects", {}))

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

    def _publish(self, event: MetricsLogged, values: dict[str, Value], kind: str = "a number") -> None:
        fenced = threading.get_ident() == self._loop_thread or getattr(self._hook, "fenced", False)
        for name, value in values.items():
            full = metric_name(name, event.key)
            if self._places.get(full) != (event.stage, kind):
                self._place(full, event.stage, kind)
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
        if isinstance(value, SavedTrace):
            self._ring.publish(TraceSaved(*header, *value))
            return
        full, kind = metric_name(name, key), kind_of(value)
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
