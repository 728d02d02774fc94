"""What ranks exchange at the end of a dataloader or an epoch."""

from __future__ import annotations

from typing import NamedTuple

from trainer.distributed.world import World
from trainer.hooks.capture import EpochOutputs
from trainer.hooks.recorder import Entry
from trainer.hooks.reductions import Value, one_tensor

BatchNumbers = tuple[int, list[tuple[float, float]], list[Entry]]
"""Its number in the order of all ranks, its losses with their weights, and its logged numbers."""


class Numbers(NamedTuple):
    """One rank's part of an evaluation."""

    rows: int | None
    has_losses: bool
    keeps: bool
    """Whether it has kept outputs."""
    adopts: bool
    """Whether a hook of it takes the outputs of all ranks."""
    batches: list[BatchNumbers]


def exchange_outputs(world: World, outputs: EpochOutputs | None, everyone: list[Numbers]) -> None:
    """Put the outputs of all ranks into the store of each rank that has a use for them. WAIT: for all ranks.

    Args:
        outputs: Those of this rank; None if it has kept none.
        everyone: What each rank has said about its own.
    """
    if not any(one.keeps for one in everyone):
        return
    exchange = world.gather if any(one.adopts for one in everyone[1:]) else world.collect
    outputs = outputs if outputs is not None else EpochOutputs(0, "", None)
    outputs.exchange(exchange, adopts=everyone[world.rank].adopts)


def merge_judged(world: World, metrics: dict[str, Value]) -> None:
    """Let all ranks judge the same metrics: those that differ, because a hook has computed them from what its own rank
    has seen, become their mean. WAIT: for all ranks. SYNC: once per validation.
    """
    names = list(metrics)
    everyone = world.gather(dict(zip(names, host_numbers([metrics[name] for name in names]), strict=True)))
    for name in dict.fromkeys(name for one in everyone for name in one):
        values = [one[name] for one in everyone if name in one]
        if len(values) < len(everyone) or any(value != values[0] for value in values):
            metrics[name] = sum(values) / len(values)


def host_numbers(values: list[Value]) -> list[float]:
    """Read numbers and 0-dim tensors. SYNC: one copy for all of them."""
    together = one_tensor([(value, 1.0) for value in values])
    return [float(value) for value in values] if together is None else together.tolist()
