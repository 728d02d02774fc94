"""The arguments of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import gcd, isqrt
from os import PathLike
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from events.strict import Strict
from trainer.config import check_struct, decode, load_config
from trainer.distributed.options import Ddp, Fsdp, StrategyName
from trainer.errors import ArgumentsError
from trainer.peers import ARGUMENTS, TRAINER_ARGUMENTS

PrecisionName = Literal["float32", "bfloat16", "float16"]

_Count = Annotated[int, Meta(ge=1)]
_Seconds = Annotated[float, Meta(ge=0)]


class TrainerArguments(Strict, frozen=True, kw_only=True):
    """How to train: immutable, checked when built, and stored with the run.

    `msgspec.structs.replace` returns a changed copy, checked again.

    Raises:
        ArgumentsError: Names every field with a wrong type or value.
    """

    argument_aliases: ClassVar[Mapping[str, str]] = ARGUMENTS

    epochs: _Count | None = None
    """Epochs to train. None: as many as max_steps needs, or one without max_steps. With both, the first limit that is
    reached ends the run."""
    train_batch_size: _Count = 32
    """Rows of one optimizer step, over all its micro-batches and all devices."""
    batch_size_schedule: dict[_Count, _Count] = msgspec.field(default_factory=dict)
    """Rows of one optimizer step, by finished epochs, in place of train_batch_size: {10: 64, 20: 128}. The dataloader
    gets the new micro-batch; with gpu_batch_size_limit, the accumulation grows."""
    batch_size_interval: Literal["epoch", "step"] = "epoch"
    """Whether batch_size_schedule counts finished epochs or optimizer steps. By steps, the micro-batch is one for the
    whole run, the largest common divisor of all sizes within gpu_batch_size_limit, and the accumulation changes."""
    gpu_batch_size_limit: _Count | None = None
    """Maximum rows per forward pass on one device. The micro-batch is the largest divisor of train_batch_size within
    it; gradients are accumulated. None: no limit."""
    val_batch_size: _Count | None = None
    """Rows of a validation or test batch. None: those of a micro-batch."""
    max_steps: _Count | None = None
    """Maximum optimizer steps per run; reaching it also ends the epoch. A run that is resumed with a higher limit
    starts with the next epoch. None: no limit."""
    max_train_steps_per_epoch: _Count | None = None
    """Maximum optimizer steps per training epoch. None: an epoch ends with its data."""
    max_val_steps_per_epoch: _Count | None = None
    """Maximum batches per dataloader and validation. None: all."""
    clip_grads: bool = False
    """Whether to clip the total norm of the gradients."""
    max_grad_norm: Annotated[float, Meta(gt=0)] = 1.0
    """The norm that clip_grads clips to; infinity only measures the norm."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    """Seeds Python, NumPy, torch and the shuffling. None: nothing is seeded."""
    device: Annotated[str, Meta(min_length=1)] = "auto"
    """The device to train on. 'auto' selects an accelerator if there is one, else the CPU."""
    strategy: StrategyName | Ddp | Fsdp = "auto"
    """How the processes that torchrun starts train together: 'ddp' or 'fsdp', or Ddp(...) or Fsdp(...) with options.
    'single' trains in each process for itself. 'auto' is 'ddp' if there are several processes, else 'single'."""
    peer_timeout_s: Annotated[float, Meta(gt=0)] = 10.0
    """Seconds without a sign of life of any process of a host, after which it counts as lost, and ends the run. A
    process that dies beside others is missed at once."""
    collective_timeout_s: Annotated[float, Meta(gt=0)] = 600.0
    """Maximum seconds that a rank waits for the others, when they join and in each exchange with them."""
    precision: PrecisionName = "float32"
    """Automatic mixed precision; float32 disables it, float16 scales the loss."""
    compile: bool = False
    """Whether to compile the step methods with torch.compile."""
    compile_options: dict[str, Any] = msgspec.field(default_factory=dict)
    """Keyword arguments of torch.compile, for example {mode: max-autotune}."""
    scheduler_interval: Literal["step", "epoch"] = "step"
    """Whether schedulers step after each optimizer step or each epoch."""
    monitor: Annotated[str, Meta(min_length=1)] = "val_loss"
    """The metric for ReduceLROnPlateau: one of each validation, or train_epoch_loss."""
    max_time_s: Annotated[float, Meta(gt=0)] | None = None
    """Seconds of an attempt's loop after which it stops at the next boundary, with a checkpoint. None: no limit."""
    val_interval_epochs: Annotated[float, Meta(ge=0)] = 1
    """Epochs between validations: a whole number, or a fraction such as 0.25 for four times an epoch. 0 disables
    them."""
    val_interval_steps: _Count | None = None
    """Optimizer steps between validations, with one more at the end. None: validate after epochs."""
    validate_at_start: bool = False
    """Whether a new run validates before its first step."""
    non_finite: Literal["warn", "skip", "stop"] = "warn"
    """Action when a loss, a gradient or the gradient norm is NaN or infinite: warn and apply the step, skip the step
    (which waits for the device once per step), or stop the run. With float16, a step whose gradients overflow is always
    skipped, and counts once the loss scale is 1. To warn, a CPU checks 4 MiB of gradients per step in turn, so that one
    of a larger model may be reported some steps later, or as a loss."""
    max_skipped_steps: _Count = 100
    """Maximum consecutive skipped steps; reaching it fails the run."""
    epoch_outputs_limit_bytes: _Count = 4 * 2**30
    """Maximum bytes of host memory for the step outputs of the hooks at an epoch's end."""
    reset_optimizers_schedulers: bool = False
    """Whether a resumed run continues at its step with new optimizers and schedulers, which serve the rest of it.
    ``Trainer(init_from=...)`` starts at step 0 with weights alone."""
    resume_data: Literal["skip", "replay"] = "skip"
    """How a run that resumes within an epoch reaches its position in the data: 'skip' starts the sampler there without
    reading the earlier batches; 'replay' reads and discards them, which is exact for random augmentation in dataloader
    workers, too, unless they are persistent."""
    ledger_interval_s: Annotated[float, Meta(gt=0)] = 10.0
    """Seconds between reports of the stall ledger and of observers' health; infinity: the ledger only at the end."""
    system_interval_s: Annotated[float, Meta(ge=0.1)] | None = None
    """Seconds between samples of processor, memory, disk, network and GPU usage; infinity: only at the start and the
    end. None disables them. Needs the extra stagecast[system]."""
    drain_timeout_s: _Seconds = 30.0
    """Seconds that callbacks, then sinks, then the journal may each take to finish after the loop has ended."""
    stop_grace_s: _Seconds = 30.0
    """Seconds that a cancelled loop may take to reach a step boundary."""

    def __post_init__(self) -> None:
        check_struct(self)  # a Struct's constructor does not validate; only decoding does
        if self.monitor == "train_loss":
            raise ArgumentsError(
                "monitor: 'train_loss' is the loss of a single step; set it to 'train_epoch_loss', the epoch's mean"
            )
        if self.val_interval_steps is not None and self.val_interval_epochs not in (0, 1):
            raise ArgumentsError(
                f"val_interval_epochs = {self.val_interval_epochs}: val_interval_steps = {self.val_interval_steps} is"
                f" set, too; set one of them"
            )
        if self.val_interval_epochs > 1 and self.val_interval_epochs % 1:
            raise ArgumentsError(
                f"val_interval_epochs = {self.val_interval_epochs}: validations between whole epochs and parts of one"
                f" do not mix; set it to a whole number, or to a fraction below 1"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, object], overrides: Iterable[str] = ()) -> TrainerArguments:
        """Build the arguments from plain values, strictly.

        Args:
            values: By field name. Integers are accepted for floats; nothing else is coerced.
            overrides: ``"name=value"`` each, applied in order over ``values``; the value is read as YAML.

        Raises:
            ArgumentsError: Unknown names (with the nearest known one), wrong types or values.
        """
        return decode(cls, values, "the arguments", overrides)

    @classmethod
    def from_file(cls, path: str | PathLike[str], overrides: Iterable[str] = ()) -> TrainerArguments:
        """Build the arguments from a file with the suffix .yaml, .yml, .toml or .json; otherwise like `from_dict`.

        Raises:
            ArgumentsError: Also if the file cannot be read or parsed.
        """
        return decode(cls, load_config(path), str(path), overrides)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `from_dict`; an object, such as a function for torch.compile, becomes its text."""
        values: dict[str, Any] = msgspec.to_builtins(self, enc_hook=str, str_keys=True)
        return values

    @property
    def epoch_limit(self) -> int | None:
        """Epochs after which the run ends; None: ``max_steps`` alone ends it."""
        return 1 if self.epochs is None and self.max_steps is None else self.epochs

    def rows_of_step(self, epoch: int, step: int) -> int:
        """Rows of an optimizer step, by the number of finished epochs and steps."""
        done = epoch if self.batch_size_interval == "epoch" else step
        begun = max((start for start in self.batch_size_schedule if start <= done), default=None)
        return self.train_batch_size if begun is None else self.batch_size_schedule[begun]

    def micro_batch_of(self, epoch: int) -> int:
        """Rows of a forward pass in an epoch: the largest divisor of its steps' rows within the limit."""
        total = self.rows_of_step(epoch, 0)
        if self.batch_size_interval == "step":  # they share the epoch's dataloader
            total = gcd(self.train_batch_size, *self.batch_size_schedule.values())
        limit = self.gpu_batch_size_limit or total
        small = [divisor for divisor in range(1, isqrt(total) + 1) if total % divisor == 0]
        return max(divisor for one in small for divisor in (one, total // one) if divisor <= limit)

    def accumulation_of(self, epoch: int, step: int) -> int:
        """Micro-batches of an optimizer step, by the number of finished epochs and steps."""
        return self.rows_of_step(epoch, step) // self.micro_batch_of(epoch)

    def accumulation_in(self, epoch: int) -> int | None:
        """Micro-batches of each optimizer step of an epoch; None if they change with the step."""
        by_step = self.batch_size_schedule and self.batch_size_interval == "step"
        return None if by_step else self.accumulation_of(epoch, 0)

    def of_rank(self, world_size: int) -> TrainerArguments:
        """Return the arguments with the rows of one rank in each step.

        Raises:
            ArgumentsError: A batch cannot be divided among the ranks; names the nearest sizes that can.
        """
        if world_size == 1:
            return self
        for name, total in (
            ("train_batch_size", self.train_batch_size),
            *((f"batch_size_schedule.{start}", total) for start, total in self.batch_size_schedule.items()),
        ):
            if total % world_size:
                below = total - total % world_size
                near = " or ".join(str(one) for one in (below, below + world_size) if one)
                raise ArgumentsError(f"{name}={total} cannot be divided among {world_size} ranks; set it to {near}")
        return msgspec.structs.replace(
            self,
            train_batch_size=self.train_batch_size // world_size,
            batch_size_schedule={start: total // world_size for start, total in self.batch_size_schedule.items()},
        )

    @property
    def micro_batch_size(self) -> int:
        """Rows of a forward pass in the first epoch."""
        return self.micro_batch_of(0)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of the first optimizer step."""
        return self.accumulation_of(0, 0)

    @property
    def accumulates(self) -> bool:
        """Whether a step of the run has several micro-batches."""
        return any(self.accumulation_of(done, done) > 1 for done in (0, *self.batch_size_schedule))

    @property
    def evaluation_batch_size(self) -> int:
        """Rows of a validation or test batch."""
        return self.val_batch_size or self.micro_batch_size

    def batch_size_warning(self) -> str | None:
        """The warning for a micro-batch below half of what the limit allows; else None."""
        limit, sizes = self.gpu_batch_size_limit, [self.train_batch_size, *self.batch_size_schedule.values()]
        if self.batch_size_interval == "step":
            if 2 * self.micro_batch_size >= min(sizes if limit is None else [*sizes, limit]):
                return None
            return (
                f"batch_size_schedule by steps makes micro-batches of {self.micro_batch_size}, the largest fitting"
                f" common divisor of {', '.join(map(str, sizes))}; use multiples of one number"
            )
        for epoch in (0, *self.batch_size_schedule):
            rows, micro_batch = self.rows_of_step(epoch, 0), self.micro_batch_of(epoch)
            if limit is None or limit >= rows or 2 * micro_batch >= limit:
                continue
            name = f"batch_size_schedule.{epoch}" if epoch else "train_batch_size"
            better = max(1, round(rows / limit)) * limit
            return (
                f"{name}={rows} has no large divisor within gpu_batch_size_limit={limit}: each step takes"
                f" {rows // micro_batch} micro-batches of {micro_batch}; {name}={better} would take {better // limit}"
                f" of {limit}"
            )
        return None


def trainer_aliases(place: str) -> dict[str, str]:
    """Replacements for names that neither a trainer nor a run file accepts.

    Args:
        place: The way to set an argument, with ``{}`` for its name.
    """
    aliases = {field: place.format(field) for field in TrainerArguments.__struct_fields__}
    for name, served in ARGUMENTS.items():
        aliases[name] = place.format(served) if " " not in served else served
    return aliases | dict(TRAINER_ARGUMENTS)
