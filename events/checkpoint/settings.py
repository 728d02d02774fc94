"""The settings of checkpoints: when to take, keep and upload them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from events.strict import Strict
from events.text import name_problem

_Count = Annotated[int, Meta(ge=1)]


class Checkpoints(Strict, frozen=True, kw_only=True):
    """The checkpoints of a run, in addition to those of `Run.checkpoint` and of a stop with a checkpoint.

    The loop waits only for the copy of its state to memory. At most two copies are in memory at a time.

    Raises:
        ValueError: A field has a wrong type or value.
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
        "load_best_model_at_end": "use best='val_loss' with weights='best', or resume='best'",
    }

    every_steps: _Count | None = None
    """Optimizer steps from one checkpoint to the next."""
    every_minutes: Annotated[float, Meta(gt=0)] | None = 10.0
    """Minutes from one checkpoint to the next, at the end of a step."""
    every_epochs: _Count | None = None
    """Epochs from one checkpoint to the next."""
    best: Annotated[str, Meta(min_length=1)] | None = None
    """Name of a metric in the result's ``metrics`` (``val_loss``): a checkpoint is taken after each validation in which
    it is among the best ``keep_best``."""
    best_mode: Literal["min", "max"] = "min"
    """Whether the least or the greatest value of ``best`` is the best."""
    at_end: bool = True
    """Whether to take a checkpoint when training has finished."""
    keep_last: _Count | None = 2
    """Number of newest checkpoints to keep; None keeps all..."""
    keep_best: Annotated[int, Meta(ge=0)] = 1
    """...and number of those with the best ``best``. All others are deleted once a newer one is durable (and uploaded).
    0 only records the metric."""
    when_busy: Literal["skip", "wait"] = "skip"
    """A checkpoint that is due while both copies in memory are being written is skipped (`CheckpointSkipped`), or the
    loop waits. A requested checkpoint always waits."""
    max_failures: _Count = 3
    """Consecutive failures after which the run ends with `CheckpointsFailing`."""
    weights: Literal["last", "best"] | bool = "last"
    """Weights to write, alone, to ``weights.safetensors`` in the run folder when a run ends: those of its last step, or
    those of the checkpoint with the best ``best``. False writes none. The file has the size of the weights: about a
    third of a checkpoint with Adam."""
    upload: Annotated[str, Meta(min_length=1)] | None = None
    """Upload URL, to which the run's name is added: ``s3://bucket/prefix``, ``gs://``, ``az://`` or ``file://``.
    Credentials come from the environment. All but ``file://`` need the extra ``stagecast[upload]``."""
    upload_part_bytes: Annotated[int, Meta(ge=2**16, le=2**31)] = 64 * 2**20
    """Maximum bytes per uploaded object; an interrupted upload resumes at its first missing object."""
    end_timeout_s: Annotated[float, Meta(ge=0)] = 600.0
    """Maximum seconds for the last write, and then for the last upload, after the end of the loop."""

    def __post_init__(self) -> None:
        # A Struct's constructor does not validate; only decoding does.
        for field in msgspec.structs.fields(type(self)):
            value = getattr(self, field.name)
            try:
                msgspec.convert(value, field.type)
            except msgspec.ValidationError as error:
                words = [f"{word!r}" for word in _words_of(field.type)]
                told = f"must be one of {', '.join(words)}" if words and isinstance(value, str) else str(error)
                raise ValueError(f"Checkpoints({field.name}={value!r:.80}): {told}") from None
        if self.best is not None and (problem := name_problem(self.best)) is not None:
            raise ValueError(f"Checkpoints(best={self.best!r:.80}): the name {problem}; log a short, printable one")
        if self.best is None and (self.best_mode != "min" or self.keep_best > 1):
            given = f"best_mode={self.best_mode!r}" if self.best_mode != "min" else f"keep_best={self.keep_best}"
            raise ValueError(f"Checkpoints({given}) has no metric; set best, such as best='val_loss'")
        if self.weights is True:
            raise ValueError("Checkpoints(weights=True) does not say which weights; use 'last' or 'best'")
        if self.weights == "best" and self.best is None:
            raise ValueError("Checkpoints(weights='best') has no metric; set best, such as best='val_loss'")
        if self.best == "train_loss":
            raise ValueError(
                "Checkpoints(best='train_loss') is the loss of a single step; use 'train_epoch_loss', the epoch's mean"
            )


def _words_of(kind: object) -> list[object]:
    """The words that a type allows, if it is a `Literal` or a union with one."""
    return [word for one in (kind, *get_args(kind)) if get_origin(one) is Literal for word in get_args(one)]
