"""When checkpoints are taken, how many are kept, and where they are uploaded to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from events.strict import Strict
from events.text import name_problem

_Count = Annotated[int, Meta(ge=1)]


class Checkpoints(Strict, frozen=True, kw_only=True):
    """The checkpoints of a run. They are always taken on `Run.checkpoint`, and on a stop that asks for one.

    The loop copies its state to memory and goes on; the rest happens in the background. Two copies at most are in
    memory at a time.

    Raises:
        ValueError: A field has a wrong type, or a value that is not allowed.
    """

    argument_aliases: ClassVar[Mapping[str, str]] = {
        "monitor": "best",
        "mode": "best_mode",
        "metric_for_best_model": "best",
        "greater_is_better": "use best_mode='min' or best_mode='max'",
        "save_top_k": "keep_best",
        "n_saved": "keep_last",
        "max_to_keep": "keep_last",
        "save_total_limit": "keep_last",
        "save_last": "at_end",
        "save_steps": "every_steps",
        "every_n_steps": "every_steps",
        "every_n_train_steps": "every_steps",
        "train_time_interval": "every_minutes",
        "every_n_epochs": "every_epochs",
        "period": "every_epochs",
        "dirpath": "give the Trainer run_dir",
        "folder": "give the Trainer run_dir",
        "filename": "the folder of a checkpoint is named after its step",
        "save_weights_only": "weights",
    }

    every_steps: _Count | None = None
    """After every so many optimizer steps."""
    every_minutes: Annotated[float, Meta(gt=0)] | None = 10.0
    """When so many minutes have passed since the last one, at the next step."""
    every_epochs: _Count | None = None
    """After every so many epochs."""
    best: Annotated[str, Meta(min_length=1)] | None = None
    """A metric, as it is called in the result's ``metrics`` (``val_loss``): a checkpoint is taken after each validation
    in which it is among the best ``keep_best`` so far."""
    best_mode: Literal["min", "max"] = "min"
    """Whether the least or the greatest value of ``best`` is the best."""
    at_end: bool = True
    """When training has finished."""
    keep_last: _Count | None = 2
    """How many of the newest are kept; None keeps all..."""
    keep_best: Annotated[int, Meta(ge=0)] = 1
    """...and how many of those with the best ``best``. All others are deleted once a newer one is durable (and
    uploaded). 0: none is taken or kept for its metric, which is only recorded."""
    when_busy: Literal["skip", "wait"] = "skip"
    """When one is due while both copies in memory are still being written: leave it out (`CheckpointSkipped`), or have
    the loop wait. One that somebody asked for always waits."""
    max_failures: _Count = 3
    """The run ends with `CheckpointsFailing` when so many in a row could not be made durable."""
    weights: bool = True
    """Whether the module's weights alone are written when the run ends, to ``weights.safetensors`` in its folder."""
    upload: Annotated[str, Meta(min_length=1)] | None = None
    """Where to upload to: ``s3://bucket/prefix``, ``gs://``, ``az://`` or ``file://``; the run's name is added.
    Credentials come from the environment. Needs the extra ``stagecast[upload]``."""
    upload_part_bytes: Annotated[int, Meta(ge=2**16, le=2**31)] = 64 * 2**20
    """Larger files are uploaded as several objects of so many bytes, so that an interrupted upload goes on where it
    was."""
    end_timeout_s: Annotated[float, Meta(ge=0)] = 600.0
    """How long the last write, and then the last upload, may each take after the loop has ended."""

    def __post_init__(self) -> None:
        # A Struct's constructor takes anything; only decoding would validate.
        for field in msgspec.structs.fields(type(self)):
            value = getattr(self, field.name)
            try:
                msgspec.convert(value, field.type)
            except msgspec.ValidationError as error:
                raise ValueError(f"Checkpoints({field.name}={value!r:.80}): {error}") from None
        if self.best is not None and (problem := name_problem(self.best)) is not None:
            raise ValueError(f"Checkpoints(best={self.best!r:.80}): the name {problem}; log a short, printable one")
        if self.best == "train_loss":
            raise ValueError(
                "Checkpoints(best='train_loss') is the loss of a single step; use 'train_epoch_loss', the epoch's mean"
            )
