"""Validation and test: a stage over every dataloader, in eval mode and without gradients."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
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
from trainer.data.loaders import SequentialSampler, end_iteration, loader_length
from trainer.data.rows import CountRows, row_counter, weight_of
from trainer.errors import EmptyDataLoader
from trainer.hooks.capture import Capture, EpochOutputs
from trainer.hooks.collate import as_tuple
from trainer.hooks.reductions import Value, weighted_mean
from trainer.loop.boundary import Boundary
from trainer.loop.workers import Batches
from trainer.module_interface import Stage

END = object()
IDLE = object()
"""Stands for a batch that another rank evaluates."""

EVENTS: dict[Stage, tuple[StageName, Any, Any, Any]] = {
    Stage.VAL: ("val", ValEpochStarted, ValStepEnded, ValEpochEnded),
    Stage.TEST: ("test", TestEpochStarted, TestStepEnded, TestEpochEnded),
}


class Evaluation:
    """Evaluates one module. All methods run on the loop's thread."""

    def __init__(self, boundary: Boundary) -> None:
        self._boundary = boundary
        self._attempt = attempt = boundary.attempt
        self._weigh = weight_of(attempt.module)
        self._capture = Capture(attempt.device, attempt.notice)

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
            under_way: An earlier attempt started the first dataloader, and has published that.
            on_loader: Called before each dataloader, with its key.
            on_done: Called after it, its hooks included.

        Raises:
            EmptyDataLoader: a dataloader yielded no batch.
            EpochOutputsTooLarge: the outputs to be kept exceed their limit.
            StopRequested: a stop was taken between two batches.
        """
        origin = self._attempt.origin
        before = origin.stage
        modes = [(module, module.training) for module in self._attempt.module.modules()]
        kept: dict[str, tuple[Any, ...]] = {}
        self._attempt.module.eval()
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
            self._attempt.recorder.discard()  # numbers of half a validation
            self._attempt.recorder.objects.abandon()
            raise
        finally:
            for module, training in modes:
                module.training = training  # `train()` would also change submodules that the user keeps in eval mode
            origin.stage = before
        return kept

    def _run_loader(
        self, stage: Stage, key: str, loader: Iterable[Any], limit: int | None, keep: bool, under_way: bool
    ) -> EpochOutputs | None:
        name, started, _, ended = EVENTS[stage]
        attempt, boundary, recorder = self._attempt, self._boundary, self._attempt.recorder
        origin = attempt.origin
        origin.stage = name
        method = f"get_{name}_dataloaders"
        length = self._length_of(loader)
        steps = limit if length is None else length if limit is None else min(limit, length)
        if not under_way and stage is Stage.VAL and attempt.hooks.beyond["on_begin_val_epoch"]:
            boundary.run_inline(attempt.hooks.beyond["on_begin_val_epoch"], origin.global_step, key=key)
        if not under_way:
            boundary.publish(started(*origin.header(), key=key, steps=steps))
        outputs = self._outputs(stage, key, keep)
        began = time.monotonic()
        attempt.phase = f"the dataloader {key!r} of {method}"
        tally = self._run_batches(stage, key, loader, limit, outputs)
        taken = keep or (stage is Stage.VAL and bool(attempt.hooks.wanting_outputs(ValEpochEnded)))
        self._complete(tally, outputs, taken)
        if tally.batches == 0:
            raise EmptyDataLoader(f"{method}() gave no batch for the key {key!r}: give it data, or leave the key out")
        self._end_logging(key)
        loss: Any = weighted_mean(tally.losses)
        if loss is not None:
            recorder.keep(metric_name(f"{name}_loss", key), loss, name, origin.global_step)
        event = ended(
            *origin.header(),
            key=key,
            steps=tally.batches,
            rows=tally.rows,
            duration_s=time.monotonic() - began,
            loss=loss,
        )
        boundary.publish(event, outputs)
        if stage is Stage.TEST and attempt.hooks.beyond["on_end_test_epoch"]:
            values = outputs.collated() if outputs is not None else ()
            boundary.run_inline(attempt.hooks.beyond["on_end_test_epoch"], origin.global_step, *values, key=key)
        self._end_logging(key)
        recorder.objects.reset()
        return outputs

    def _end_logging(self, key: str) -> None:
        if self._attempt.recorder.has_logged:
            with self._attempt.ledger.within("readback"):
                self._attempt.recorder.end_evaluation(key)

    def _run_batches(
        self, stage: Stage, key: str, loader: Iterable[Any], limit: int | None, outputs: EpochOutputs | None
    ) -> Tally:
        ledger = self._attempt.ledger
        tally, rows_of = Tally(), self._row_counter(stage, loader)
        before = ledger.enter("data")
        batches = self._open(loader)
        try:
            for batch in self._turns(stage, key, batches, loader, limit):
                ledger.enter("compute")
                if batch is not IDLE:
                    self._run_batch(stage, key, batch, rows_of(batch, tally.batches), tally, outputs)
        finally:
            ledger.enter("data")
            end_iteration(batches.source, loader)
            del batches  # ends those of a generator, too, also while an exception keeps this frame alive
            ledger.enter(before)
        self._boundary.cross()
        return tally

    def _turns(
        self, stage: Stage, key: str, batches: Batches, loader: Iterable[Any], limit: int | None
    ) -> Iterator[Any]:
        """Yield the batches, and obey commands before each: those that arrived while the loop waited for data, too."""
        attempt, phase = self._attempt, f"the dataloader {key!r} of get_{EVENTS[stage][0]}_dataloaders"
        for _ in range(limit) if limit is not None else itertools.repeat(None):
            attempt.phase = phase
            attempt.ledger.enter("data")
            batch = next(batches, END)  # WAIT: data
            if batch is END:
                break
            attempt.ledger.enter("other")
            self._boundary.cross()
            yield batch

    def _run_batch(
        self, stage: Stage, key: str, batch: Any, rows: int | None, tally: Tally, outputs: EpochOutputs | None
    ) -> None:
        attempt, weigh, (name, _, step_ended, _) = self._attempt, self._weigh, EVENTS[stage]
        attempt.phase = f"{name}_step"
        weight = weigh(batch) if weigh is not None else 1 if rows is None else rows
        attempt.recorder.weight = weight
        values = as_tuple(self._forward(stage, batch))
        attempt.ledger.enter("publish")
        if not tally.add(values, rows, weight, counts_rows=rows is None and weigh is None):
            attempt.notice(
                f"{name}_step() returns no loss first, so there is no {name}_loss: {_shown(values[0])} is not a"
                f" floating-point number, nor a vector of one for each row"
            )
        if outputs is not None and values:
            outputs.append(self._capture.copy(values))
        if step_ended in attempt.ring.audience.wanted:  # built by position, because there is one per batch
            attempt.ring.publish(step_ended(*attempt.origin.header(), key, tally.batches))

    # ----------------------------------------------------------------------- what several ranks do otherwise

    def _length_of(self, loader: Iterable[Any]) -> int | None:
        return loader_length(loader)

    def _open(self, loader: Iterable[Any]) -> Batches:
        return Batches(self._boundary, lambda: iter(loader), loader)

    def _complete(self, tally: Tally, outputs: EpochOutputs | None, adopts: bool) -> None:
        """The last batch is done, and the hooks of the end have not run. ``adopts``: a hook here takes the outputs."""

    def _row_counter(self, stage: Stage, loader: Iterable[Any]) -> CountRows:
        notice = self._attempt.notice if self._weigh is None else None  # only `rows` in events depends on the count
        batch_size = self._attempt.batching.evaluation_batch_size
        return row_counter(loader, batch_size, SequentialSampler, notice, f"get_{EVENTS[stage][0]}_dataloaders")

    def _forward(self, stage: Stage, batch: Any) -> Any:
        step = self._attempt.origin.global_step
        if self._attempt.precision.enabled:
            with self._attempt.precision.autocast():
                return self._attempt.module(stage, step, batch, self._attempt.device)
        return self._attempt.module(stage, step, batch, self._attempt.device)

    def _outputs(self, stage: Stage, key: str, keep: bool) -> EpochOutputs | None:
        """Return the store for this dataloader's outputs; None if no hook receives them."""
        limit_bytes = self._attempt.arguments.epoch_outputs_limit_bytes
        if stage is Stage.VAL:
            return self._boundary.epoch_outputs(
                ValEpochEnded, "on_end_val_epoch", self._attempt.arguments.epoch_outputs_limit_bytes
            )
        if not keep:
            return None
        owner = f"Trainer.test() for the key {key!r}"
        return EpochOutputs(limit_bytes, owner, self._attempt.notice)


class Tally:
    """What the batches of one dataloader add up to."""

    def __init__(self) -> None:
        self.batches = 0
        self.rows: int | None = 0
        """None if the number is not known."""
        self.losses: list[tuple[Value, float]] = []
        """With the weight of each; empty once a step has returned something else first."""
        self.has_losses = True

    def add(self, values: tuple[Any, ...], rows: int | None, weight: float, *, counts_rows: bool) -> bool:
        """Add a batch; returns whether what its step returned first, if anything, is a loss.

        Args:
            counts_rows: A vector of losses is weighted by its length.
        """
        self.batches += 1
        self.rows = None if rows is None or self.rows is None else self.rows + rows
        if not values or values[0] is None:
            return True
        first = values[0]
        loss = _loss(first, rows, weight)
        if loss is None:
            self.has_losses = False
            self.losses.clear()
        elif self.has_losses:
            self.losses.append((loss, len(first) if counts_rows and _is_vector(first) else weight))
        return loss is not None


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
