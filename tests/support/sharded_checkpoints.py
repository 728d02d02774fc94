"""Runs that save and load sharded checkpoints: programs for several ranks, and the same in one process."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.shared_runs import Boom, Case, Classifier
from torch import nn

from events.messages import Event
from sinks import Memory
from trainer import Checkpoints, Trainer
from trainer.callbacks import EMA, SWA
from trainer.distributed import Fsdp
from trainer.distributed.local import whole
from trainer.errors import PeerFailed

CASE = Case(rows=77)
SETTINGS = Checkpoints(every_steps=3, every_minutes=None, keep_last=None, end_timeout_s=30)


class Odd(Classifier):
    """Has tied parameters, one with fewer rows than ranks, one that is frozen, and a buffer."""

    def __init__(self, case: Case = CASE) -> None:
        super().__init__(case)
        self.odd = nn.Parameter(torch.arange(15, dtype=torch.float64).reshape(3, 5) / 100)
        self.again = nn.Linear(12, 32).double()
        self.again.weight = self.first.weight
        nn.init.constant_(self.again.bias, 0.5)
        self.frozen = nn.Parameter(torch.full((7,), 0.1, dtype=torch.float64), requires_grad=False)
        self.register_buffer("scale", torch.full((1,), 2.0, dtype=torch.float64))

    def losses(self, batch: Any) -> torch.Tensor:
        hidden = torch.tanh(self.first(batch[0]) + self.again(batch[0]) * self.scale)
        losses = nn.functional.cross_entropy(self.second(hidden), batch[1], reduction="none")
        return losses + self.odd.sum() ** 2 + self.frozen.sum()


class Even(Classifier):
    """Has an optimizer whose state is one tensor for all parameters. Torch flattens only parts of the same size."""

    def __init__(self) -> None:
        super().__init__(dataclasses.replace(CASE, closure=True))


class Averaged(Odd):
    """Is averaged at each step but the first, and validated with the average."""


class Factored(Odd):
    """Has an optimizer that torch does not run on divided parameters."""

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        return [torch.optim.Adafactor(self.parameters(), lr=1e-2)], []


KINDS: dict[str, Callable[[], Classifier]] = {"four": Odd, "Even": Even, "Averaged": Averaged}


def begin(
    folder: Path, strategy: str | Fsdp, settings: Checkpoints = SETTINGS, make: Callable[[], Classifier] = Odd
) -> list[Event]:
    """Train up to an error in step 8, with checkpoints after steps 3 and 6; return the events."""
    module, sink = make(), Memory()
    module.fails_at = 8
    with contextlib.suppress(Boom, PeerFailed, RuntimeError):
        _trainer(module, folder, strategy, sink, settings).train()
    return sink.events


def go_on(
    folder: Path | None,
    strategy: str | Fsdp,
    resume: str | None = "auto",
    make: Callable[[], Classifier] = Odd,
    **more: Any,
) -> dict[str, Any]:
    """Resume, or train from the start without a folder of checkpoints; return all that must be the same."""
    module, sink = make(), Memory()
    settings = SETTINGS if resume is not None else None
    result = _trainer(module, folder, strategy, sink, settings, resume=resume, **more).train()
    return {
        "weights": {name: whole(value) for name, value in module.state_dict().items()},
        "metrics": result.metrics,
        "steps": result.global_step,
        "trained": module.trained[-1] if module.trained else None,
        "events": sink.events,
        "file": result.weights,
    }


def _trainer(
    module: Classifier,
    folder: Path | None,
    strategy: str | Fsdp,
    sink: Memory,
    settings: Checkpoints | None,
    **more: Any,
) -> Trainer:
    return Trainer(
        module,
        CASE.arguments(strategy=strategy),
        callbacks=[SWA(module, start_step=2, every_n_steps=1) if isinstance(module, Averaged) else EMA(module, 0.5)],
        sinks=[sink],
        checkpoints=settings if settings is not None else False,
        run_dir=folder,
        run_id="run",
        **more,
    )


def check_continued(alone: dict[str, Any], found: dict[str, Any], what: object) -> None:
    """Check that a resumed run has left what an uninterrupted one of a single process has."""
    assert found["steps"] == alone["steps"], what
    assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-12, abs=1e-12), what
    for name, value in alone["weights"].items():
        assert (found["weights"][name] - value).abs().max() < 1e-12, (what, name)
    assert torch.equal(found["trained"], alone["trained"]), what  # of the steps before the checkpoint, too


def checkpoints_in(folder: Path) -> list[str]:
    """Return the names in a run's folder of checkpoints, of unfinished ones, too."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


def calls_first(module: Any, name: str, before: Callable[[int, tuple[Any, ...]], object]) -> None:
    """Call ``before`` with the number of the call, from 1, and its arguments, before each call of a function."""
    real, lock, calls = getattr(module, name), threading.Lock(), [0]

    def called(*args: Any) -> Any:
        with lock:
            calls[0] += 1
            number = calls[0]
        before(number, args)
        return real(*args)

    setattr(module, name, called)
