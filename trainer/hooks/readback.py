"""Read the tensors of many events as host numbers at once, off the loop's thread."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from operator import setitem
from typing import Any

import torch
from msgspec.structs import force_setattr

from events.bus.backlog import Payload, Published
from events.checkpoint import packing
from events.checkpoint.snapshot import READER, Part
from events.errors import CheckpointDamaged
from events.log import logger
from events.messages import (
    CheckpointStaged,
    Event,
    HistogramLogged,
    MetricsLogged,
    TrainEpochEnded,
    TrainStepEnded,
)
from events.metrics import result_metrics
from trainer.distributed.local import is_split

_Place = tuple[Callable[[Any, str, Any], None], object, str]
"""The target of a number: a setter, the event or dictionary, and the name."""

_READINGS = ("_consecutive", "_bad_gradients", "_loss_sum", "_loss_weight", "_steps")

_Read = Callable[[], bool]
"""Stores numbers at their targets and returns True, if they have arrived from the device."""


def _done() -> bool:
    return True


class DeviceReadback:
    """The bus's `events.Readback`: one stack and one copy per kind of tensor and batch of events.

    Runs in the event loop's thread. On CUDA the copy goes to pinned memory on a stream of its own, and the returned
    function queries a CUDA event: neither the loop nor the event loop waits for the device.

    It reads every number of the run in order, so it also keeps the last value of each metric and computes the mean
    loss of an epoch.

    Args:
        on_loss: Called for each step whose loss is not finite, with the number of such steps in a row.
        on_gradient: The same for each step with a finite loss and a gradient that is not finite.
    """

    def __init__(
        self, on_loss: Callable[[TrainStepEnded, int], None], on_gradient: Callable[[TrainStepEnded, int], None]
    ) -> None:
        self.summary: dict[str, float] = {}
        """Last value of each metric, ``train_loss``, ``train_epoch_loss`` and ``val_loss``."""
        self.compute_stream: torch.cuda.Stream | None = None
        """The loop's CUDA stream; set on its thread. None: the default stream."""
        self.on_metrics: Callable[[Mapping[str, float]], None] | None = None
        """Called with the numbers that user code has logged in training, if it is set."""
        self._on_loss = on_loss
        self._on_gradient = on_gradient
        self._consecutive = 0
        self._bad_gradients = 0
        self._loss_sum = 0.0
        self._loss_weight = 0.0
        self._steps = 0
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self, batch: list[Published], /) -> Callable[[], bool]:
        # This thread competes with the loop for the interpreter lock, and nearly all events are steps with one number:
        # these are stacked at once, and only grouped if that fails.
        places: list[_Place] = []
        tensors: list[Any] = []
        others: list[tuple[_Place, torch.Tensor]] = []
        for event, _ in batch:
            if type(event) is not TrainStepEnded:
                others += _deferred(event)
            elif event.grad_norm is None and type(event.lr) is float and not isinstance(event.weight, torch.Tensor):
                places.append((force_setattr, event, "loss"))
                tensors.append(event.loss)
                if event.non_finite_gradient is not None:
                    places.append((force_setattr, event, "non_finite_gradient"))
                    tensors.append(event.non_finite_gradient)
            else:
                others += _deferred(event)
        reads: list[_Read] = []
        if tensors:
            try:
                reads += self._read(places, tensors)
            except Exception:  # of several shapes, on several devices, or unreadable: the grouped read decides
                others += zip(places, tensors, strict=True)
        for group in _grouped(others):
            places = [place for place, _ in group]
            try:
                reads += self._read(places, [tensor for _, tensor in group])
            except Exception as error:  # the pump must not stop
                _drop_numbers(places, error)
        if not reads:
            self._observe(batch)
            return _done

        def arrived() -> bool:
            while reads:
                if not reads[-1]():
                    return False
                reads.pop()
            self._observe(batch)
            return True

        return arrived

    def _read(self, places: list[_Place], tensors: list[torch.Tensor]) -> list[_Read]:
        """Read tensors of one kind; return the reads that wait for a device."""
        if any(map(is_split, tensors)):  # reading it here would be an exchange of all ranks
            raise TypeError("a number is divided among ranks; log its full_tensor() on every rank")
        if tensors[0].is_cuda:
            return [self._read_from_cuda(places, tensors)]
        _put(places, torch.stack(tensors))
        return []

    def _read_from_cuda(self, places: list[_Place], tensors: list[torch.Tensor]) -> _Read:
        device = tensors[0].device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        with torch.cuda.device(device), torch.cuda.stream(stream):
            # All work that computes these tensors was queued before they were published, so waiting (on the device)
            # for what the compute stream holds now is enough.
            stream.wait_stream(self.compute_stream or torch.cuda.default_stream(device))
            stacked = torch.stack(tensors)
            host = torch.empty(stacked.shape, dtype=stacked.dtype, device="cpu", pin_memory=True)
            host.copy_(stacked, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(stream)
        # `tensors` and `stacked` are held until the copy is complete: the allocator must not reuse their memory.
        held = [*tensors, stacked]

        def read() -> bool:
            try:
                if not arrived.query():  # type: ignore[no-untyped-call]
                    return False
                _put(places, host)
            except Exception as error:  # of the device: the loop raises it, too, with the user's code in its traceback
                _drop_numbers(places, error)
            held.clear()
            return True

        return read

    def _observe(self, batch: list[Published]) -> None:
        for event, payload in batch:
            if type(event) is not TrainStepEnded:
                if type(event) is CheckpointStaged and payload is not None:
                    self._add_readings(payload)
                self._summarise(event)
                continue
            self._steps += 1
            if (loss := event.loss) is not None:
                weight = event.weight if event.weight is not None else event.rows or 1
                self._loss_sum += loss * weight
                self._loss_weight += weight
                self.summary["train_loss"] = loss
                if not math.isfinite(loss):
                    self._consecutive += 1
                    self._on_loss(event, self._consecutive)
                elif self._consecutive:
                    self._consecutive = 0
            if event.non_finite_gradient == 0:
                force_setattr(event, "non_finite_gradient", None)
            bad = event.non_finite_gradient is not None or not math.isfinite(event.grad_norm or 0.0)
            if bad and (loss is None or math.isfinite(loss)):
                self._bad_gradients += 1
                self._on_gradient(event, self._bad_gradients)
            elif self._bad_gradients:
                self._bad_gradients = 0

    def _add_readings(self, payload: Payload) -> None:
        """Contribute the readings before a checkpoint's snapshot."""
        readings = {name: getattr(self, name) for name in _READINGS} | {"summary": dict(self.summary)}
        part = payload.outputs.part_of(READER)
        if part is not None:
            part.set(Part(packing.encode(readings)))

    def restore(self, readings: Mapping[str, Any]) -> None:
        """Restore the readings from a checkpoint, before the first event. Raises `CheckpointDamaged`."""
        try:
            kept = {name: readings.get(name, 0) for name in _READINGS}  # an earlier version lacks the newest
            summary = dict(readings["summary"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointDamaged(f"the checkpoint's readings cannot be restored: {error!r:.300}") from error
        numbers = [*kept.values(), *summary.values()]
        if not all(isinstance(one, Real) for one in numbers) or not all(isinstance(name, str) for name in summary):
            raise CheckpointDamaged("the checkpoint's readings are not numbers by name; load an older checkpoint")
        for name, value in kept.items():
            setattr(self, name, value)
        self.summary = summary

    def _summarise(self, event: Event) -> None:
        if isinstance(event, TrainEpochEnded):
            if self._loss_weight and self._steps == event.steps:
                force_setattr(event, "loss", self._loss_sum / self._loss_weight)
            self._loss_sum, self._loss_weight, self._steps = 0.0, 0.0, 0
        if self.on_metrics is not None and isinstance(event, MetricsLogged) and event.stage == "train":
            self.on_metrics(event.metrics)
        self.summary.update(result_metrics(event))


def _put(places: list[_Place], stacked: torch.Tensor) -> None:
    """Store numbers, or lists of them for tensors of several elements. In the event loop's thread.

    ``stacked`` is in host memory, its copy from a device complete: nothing waits here.
    """
    if stacked.numel() == len(places):
        numbers: list[object] = [float(number) for number in stacked.flatten().tolist()]
    else:
        numbers = stacked.tolist()
    for (put, where, name), number in zip(places, numbers, strict=True):
        put(where, name, number)


def _drop_numbers(places: list[_Place], error: Exception) -> None:
    """Warn about numbers that cannot be read, and store None or NaN."""
    logger.warning(f"{len(places)} numbers could not be read from their tensors: {error}", exc_info=error)
    for put, where, name in places:
        if isinstance(where, HistogramLogged):
            put(where, name, [] if name == "counts" else math.nan)
        else:
            put(where, name, math.nan if put is setitem else None)


def _deferred(event: Event) -> Iterator[tuple[_Place, torch.Tensor]]:
    """Every number of an event that is still a tensor, with its target."""
    for name in event.deferred:
        value = getattr(event, name)
        if isinstance(value, torch.Tensor):
            yield (force_setattr, event, name), value if value.numel() > 1 else value.reshape(())
    if isinstance(event, MetricsLogged):
        metrics: dict[str, Any] = event.metrics  # declared as numbers, which all later readers receive
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor):
                yield (setitem, event.metrics, name), value.reshape(())


def _grouped(numbers: list[tuple[_Place, torch.Tensor]]) -> list[list[tuple[_Place, torch.Tensor]]]:
    """Group the tensors by device, dtype and shape, so that each group can be stacked."""
    groups: dict[object, list[tuple[_Place, torch.Tensor]]] = {}
    for place, tensor in numbers:
        groups.setdefault((tensor.device, tensor.dtype, tensor.shape, is_split(tensor)), []).append((place, tensor))
    return list(groups.values())
