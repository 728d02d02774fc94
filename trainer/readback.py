"""Turns the numbers of many events into host numbers at once, off the loop's thread."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from events.backlog import Published
from events.messages import Event, MetricsLogged, TestEpochEnded, TrainEpochEnded, TrainStepEnded, ValEpochEnded

_Place = tuple[Event, str]


def _done() -> bool:
    return True


class DeviceReadback:
    """The bus's `events.Readback`: one stack and one copy per kind of tensor and batch of events.

    Runs in the event loop's thread. On CUDA the copy goes to pinned memory on a stream of its own, and the returned
    function asks a CUDA event whether it has arrived: neither the loop nor the event loop waits for the device.

    It sees every number of the run in order, so it also keeps the last value of each metric and completes the
    mean loss of an epoch.

    Args:
        on_loss: Called for each step whose loss has been read and is not finite, or was preceded by such a one.
    """

    def __init__(self, on_loss: Callable[[TrainStepEnded, int], None]) -> None:
        self.summary: dict[str, float] = {}
        """Last value of each metric, ``train_loss`` and ``val_loss``."""
        self._on_loss = on_loss
        self._consecutive = 0
        self._loss_sum = 0.0
        self._loss_rows = 0
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self, batch: list[Published], /) -> Callable[[], bool]:
        places: dict[tuple[torch.device, torch.dtype], tuple[list[_Place], list[torch.Tensor]]] = {}
        for event, payload in batch:
            if payload is not None and payload.pending:
                for name, tensor in payload.pending.items():
                    key = (tensor.device, tensor.dtype)
                    where, tensors = places.setdefault(key, ([], []))
                    where.append((event, name))
                    tensors.append(tensor if tensor.dim() == 0 else tensor.reshape(()))
                payload.pending = None
        on_device = False
        copies: list[tuple[list[_Place], Callable[[], list[Any] | None]]] = []
        for (device, _), (where, tensors) in places.items():
            if device.type == "cuda":
                on_device = True
                copies.append((where, self._copy_from_cuda(device, tensors)))
            else:
                _fill(where, torch.stack(tensors).tolist())
        if not on_device:
            self._observe(batch)
            return _done

        def arrived() -> bool:
            while copies:
                where, read = copies[-1]
                values = read()
                if values is None:
                    return False
                _fill(where, values)
                copies.pop()
            self._observe(batch)
            return True

        return arrived

    def _copy_from_cuda(
        self, device: torch.device, tensors: list[torch.Tensor]
    ) -> Callable[[], list[Any] | None]:
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(device), torch.cuda.stream(stream):
            # All work that computes these tensors was queued before they were published, so waiting (on the device)
            # for what the compute stream holds now is enough.
            stream.wait_stream(torch.cuda.default_stream(device))
            stacked = torch.stack(tensors)
            host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            host.copy_(stacked, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(stream)
        # `tensors` and `stacked` are held until the copy has happened: the allocator must not hand their memory on.
        held = [tensors, [stacked]]

        def read() -> list[Any] | None:
            if not arrived.query():  # type: ignore[no-untyped-call]
                return None
            held.clear()
            values: list[Any] = host.tolist()
            return values

        return read

    def _observe(self, batch: list[Published]) -> None:
        for event, _ in batch:
            if type(event) is TrainStepEnded:
                if event.loss is not None:
                    self._step(event, event.loss)
            elif isinstance(event, MetricsLogged):
                suffix = "" if event.key in (None, "default") else f"/{event.key}"
                for name, value in event.metrics.items():
                    self.summary[name + suffix] = value
            elif isinstance(event, (ValEpochEnded, TestEpochEnded)):
                if event.loss is not None:
                    suffix = "" if event.key == "default" else f"/{event.key}"
                    self.summary[f"{event.stage}_loss{suffix}"] = event.loss
            elif isinstance(event, TrainEpochEnded):
                if self._loss_rows:
                    event.fill("loss", self._loss_sum / self._loss_rows)
                self._loss_sum, self._loss_rows = 0.0, 0

    def _step(self, event: TrainStepEnded, loss: float) -> None:
        rows = event.rows or 1
        self._loss_sum += loss * rows
        self._loss_rows += rows
        self.summary["train_loss"] = loss
        if not math.isfinite(loss):
            self._consecutive += 1
            self._on_loss(event, self._consecutive)
        elif self._consecutive:
            self._consecutive = 0


def _fill(places: list[_Place], values: list[Any]) -> None:
    for (event, name), value in zip(places, values, strict=True):
        event.fill(name, float(value))
