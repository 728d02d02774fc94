"""How the model is distributed over the ranks of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from events.strict import Strict
from trainer.config import check_struct

StrategyName = Literal["auto", "single", "ddp", "fsdp"]


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


class Fsdp(Strict, frozen=True, kw_only=True, tag="fsdp"):
    """torch's fully_shard (FSDP2): each rank has a part of every parameter, of its gradient and its optimizer state.

    The parameters of a unit, such as a transformer block, are gathered right before its forward and its backward pass,
    and freed after each.
    """

    units: list[Annotated[str, Meta(min_length=1)]] | None = None
    """The classes of the submodules that are units, by name: ["Block"]. None: those that the module's
    ``fsdp_units()`` returns, else each member of a torch.nn.ModuleList. The rest of the module is one more unit."""
    reshard_after_forward: bool = True
    """Whether the parameters of a unit are freed after its forward pass, and gathered again for its backward pass."""
    replicate: Annotated[int, Meta(ge=1)] = 1
    """Copies of the model (HSDP): the ranks form this number of groups, and each group divides one copy among its
    ranks. Neighbouring ranks are in one group, so that each host can have a copy of its own."""
    activation_checkpointing: bool = False
    """Whether units compute their activations again in the backward pass, instead of keeping them: less memory for
    about a third more computation."""

    def __post_init__(self) -> None:
        check_struct(self)  # as above
