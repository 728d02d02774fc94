"""How the model is distributed over the ranks of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from events.strict import Strict
from trainer.config import check_struct

StrategyName = Literal["auto", "single", "ddp"]


class Ddp(Strict, frozen=True, kw_only=True, tag="ddp"):
    """torch's DistributedDataParallel: each rank has the whole model, and gradients are averaged in each step."""

    find_unused_parameters: bool = False
    """Whether a step may leave parameters without a gradient: they then get a gradient of zero, which weight decay and
    momentum apply like any other. It costs a walk through the graph in each step."""
    sync_batch_norm: bool = False
    """Whether batch norms compute their statistics over the micro-batches of all ranks. Needs an accelerator."""
    bucket_cap_mb: Annotated[float, Meta(gt=0)] = 25.0
    """Maximum MiB of gradients per message between the ranks; a message is sent as soon as its gradients are there."""

    def __post_init__(self) -> None:
        check_struct(self)  # a Struct's constructor does not validate; only decoding does
