"""Validation and test: a stage over every dataloader, in eval mode and without gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from time import perf_counter_ns as clock
from typing import Any

import torch

from events.messages import (
    StageName,
    TestEpochEnded,
    TestEpochStarted,
    TestStepEnded,
    ValEpochEnded,
    ValEpochStarted,
    ValStepEnded,
)
from events.metrics import metric_name
from trainer.boundary import Boundary
from trainer.collate import as_tuple
from trainer.data import SequentialSampler, end_iteration, loader_length
from trainer.errors import EmptyDataLoader
from trainer.module_interface import ModuleInterface, Stage
from trainer.outputs import Capture, EpochOutputs
from trainer.precision import Precision
from trainer.recorder import MetricRecorder, Value, weighted_mean
from trainer.rows import row_counter, weight_of
from trainer.workers import Batches

END = object()

_EVENTS: dict[Stage, tuple[StageName, Any, Any, Any]] = {
    Stage.VAL: ("val", ValEpochStarted, ValStepEnded, ValEpochEnded),
    Stage.TEST: ("test", TestEpochStarted, TestStepEnded, TestEpochEnded),
}


class Evaluation:
    """Evaluates one module. All methods run on the loop's thread."""

    def __init__(
        self,
        module: ModuleInterface,
        device: torch.device,
        precision: Precision,
        boundary: Boundary,
        recorder: MetricRecorder,
        *,
        batch_size: int,
        outputs_limit_bytes: int,
    ) -> None:
        self._module = module
        self._device = device
        self._precision = precision
        self._boundary = boundary
        self._recorder = recorder
        self._weigh = weight_of(module)
        self._capture = Capture(device, boundary.notice)
        self._batch_size = batch_size
        self._outputs_limit_bytes = outputs_limit_bytes

    def run(
        self,
        stage: Stage,
        loaders: dict[str, Iterable[Any]],
        limit: int | None,
        *,
        keep: bool = False,
        under_way: bool = False,
        on_loader: Callable[[str], None] = lambda key: None,
        on_done: Callable[[str], None] = lambda key: None,
    ) -> dict[str, tuple[Any, ...]]:
        """Run a stage over every dataloader; afterwards every submodule is in the mode it was in before.

        Args:
            limit: Most batches of each dataloader.
            keep: Return the outputs, collated, per key; else they are kept only for hooks that want them.
            under_way: The first dataloader was begun by an earlier attempt, which has told so.
            on_loader: Called before each dataloader, with its key.
            on_done: Called after it, its hooks included.

        Raises:
            EmptyDataLoader: a dataloader yielded no batch.
            EpochOutputsTooLarge: the outputs to be kept exceed their limit.
            StopRequested: a stop was taken between two batches.
        """
        origin = self._boundary.origin
        before = origin.stage
        modes = [(module, module.training) for module in self._module.modules()]
        kept: dict[str, tuple[Any, ...]] = {}
        self._module.eval()
        try:
            with torch.no_grad():
                for key, loader in loaders.items():
                    on_loader(key)
                    outputs = self._run_loader(stage, key, loader, limit, keep, under_way)
                    under_way = False
                    on_done(key)
                    if keep and outputs is not None:
                        kept[key] = outputs.collated()
        except BaseException:
            self._recorder.discard()  # numbers of half a validation
            raise
        finally:
            for module, training in modes:
                module.training = training  # `train()` would also turn on what the user keeps in eval mode
            origin.stage = before
        return kept

    def _run_loader(
        self, stage: Stage, key: str, loader: Iterable[Any], limit: int | None, keep: bool, under_way: bool
    ) -> EpochOutputs | None:
        name, started, _, ended = _EVENTS[stage]
        boundary = self._boundary
        boundary.origin.stage = name
        method = f"get_{name}_dataloaders"
        length = loader_length(loader)
        steps = limit if length is None else length if limit is None else min(limit, length)
        if not under_way and stage is Stage.VAL and boundary.hooks.begin_val:
            boundary.run_inline(boundary.hooks.begin_val, boundary.origin.global_step, key=key)
        if not under_way:
            boundary.publish(started(*boundary.origin.header(), key, steps))
        outputs = self._outputs(stage, key, keep)
        began = time.monotonic()
        boundary.phase = f"the dataloader {key!r} of {method}"
        done, rows, losses = self._run_batches(stage, key, loader, limit, outputs)
        if done == 0:
            raise EmptyDataLoader(f"{method}() gave no batch for the key {key!r}: give it data, or leave the key out")
        if self._recorder.values:
            self._recorder.take(key)
        loss: Any = weighted_mean(losses)
        if loss is not None:
            self._recorder.keep(metric_name(f"{name}_loss", key), loss, name, boundary.origin.global_step)
        event = ended(*boundary.origin.header(), key, done, rows, time.monotonic() - began, loss)
        boundary.publish(event, outputs)
        return outputs

    def _run_batches(
        self, stage: Stage, key: str, loader: Iterable[Any], limit: int | None, outputs: EpochOutputs | None
    ) -> tuple[int, int | None, list[tuple[Value, float]]]:
        """Returns how many batches there were, how many rows (if that is known), and the losses of those that have one;
        none at all where a batch begins with something else."""
        name, _, step_ended, _ = _EVENTS[stage]
        boundary, ledger = self._boundary, self._boundary.ledger
        done = 0
        total: int | None = 0
        losses: list[tuple[Value, float]] = []
        all_losses = True
        weigh = self._weigh
        mark = clock()
        notice = boundary.notice if weigh is None else None  # nobody but `rows` in events depends on the count
        where = f"get_{name}_dataloaders"
        rows_of = row_counter(loader, self._batch_size, SequentialSampler, notice, where)
        batches = Batches(boundary, lambda: iter(loader))
        try:
            while limit is None or done < limit:
                boundary.phase = f"the dataloader {key!r} of get_{name}_dataloaders"
                batch = next(batches, END)  # WAIT: data
                now = clock()
                ledger.data += now - mark
                if batch is END:
                    break
                mark = boundary.cross(now)  # what came while the loop waited for data is taken before the batch
                ledger.begin_compute(mark)
                boundary.phase = f"{name}_step"
                rows = rows_of(batch, done)
                weight = weigh(batch) if weigh is not None else 1 if rows is None else rows
                self._recorder.weight = weight
                values = as_tuple(self._forward(stage, batch))
                now = clock()
                ledger.end_compute(mark, now, ledger.aside)
                done += 1
                total = None if rows is None or total is None else total + rows
                first = values[0] if values else None
                if first is not None:
                    loss = _loss(first, rows, weight)
                    if loss is not None:
                        counted = rows is None and weigh is None and _is_vector(first)
                        losses.append((loss, len(first) if counted else weight))
                    else:
                        all_losses = False
                        boundary.notice(
                            f"{name}_step() returns no loss first, so there is no {name}_loss: {_shown(first)} is not a"
                            f" floating-point number, nor a vector of one for each row"
                        )
                if outputs is not None and values:
                    outputs.append(self._capture.take(values))
                if step_ended in boundary.bus.wanted:
                    boundary.bus.publish(step_ended(*boundary.origin.header(), key, done))
                mark = clock()
                ledger.publish += mark - now
        finally:
            mark = clock()
            end_iteration(batches.source, loader)
            del batches  # ends those of a generator, too, also while an exception keeps this frame alive
            ledger.data += clock() - mark
        boundary.cross(clock())
        return done, total, losses if all_losses else []

    def _forward(self, stage: Stage, batch: Any) -> Any:
        step = self._boundary.origin.global_step
        if self._precision.enabled:
            with self._precision.autocast():
                return self._module(stage, step, batch, self._device)
        return self._module(stage, step, batch, self._device)

    def _outputs(self, stage: Stage, key: str, keep: bool) -> EpochOutputs | None:
        """Where the outputs of this dataloader are kept; None if nobody wants them."""
        if stage is Stage.VAL:
            return self._boundary.epoch_outputs(ValEpochEnded, "on_end_val_epoch", self._outputs_limit_bytes)
        if not keep:
            return None
        owner = f"Trainer.test() for the key {key!r}"
        return EpochOutputs(self._outputs_limit_bytes, owner, self._boundary.notice)


def _loss(first: Any, rows: int | None, weight: float) -> Value | None:
    """The loss of a batch, on its device, from the first output of its step; None if that is not a loss."""
    if isinstance(first, float):
        return first
    if not isinstance(first, torch.Tensor):
        is_numpy = getattr(first, "shape", None) == () and getattr(getattr(first, "dtype", None), "kind", "") == "f"
        return float(first) if is_numpy else None
    if not first.is_floating_point() or first.layout is not torch.strided:
        return None
    if _is_vector(first) and (rows is None or len(first) in (rows, weight)):
        return first.detach().mean()  # one for each row
    return first.detach().reshape(()).clone() if first.numel() == 1 else None


def _is_vector(first: Any) -> bool:
    return isinstance(first, torch.Tensor) and first.dim() == 1 and first.is_nested is False and len(first) > 0


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
