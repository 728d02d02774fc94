"""What a type checker sees of the public interface. Checked by pyright, never run."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import Any, assert_type

import torch

from events.protocol import EventStream, RunResult
from events.run.run import Run
from sinks import CSV
from trainer import Checkpoints, ModuleInterface, Trainer, TrainerArguments, to_device


class Own(TrainerArguments, frozen=True, kw_only=True):
    lr: float = 0.1


def configure() -> None:
    assert_type(TrainerArguments(epochs=2), TrainerArguments)
    assert_type(Own(lr=0.2, epochs=2).lr, float)
    TrainerArguments(max_epochs=2)  # pyright: ignore[reportCallIssue]
    Checkpoints(monitor="val_loss")  # pyright: ignore[reportCallIssue]
    CSV(pth="metrics.csv")  # pyright: ignore[reportCallIssue]


def train(module: ModuleInterface) -> None:
    trainer = Trainer(module, TrainerArguments(epochs=2))
    assert_type(trainer.train(), RunResult)
    assert_type(trainer.test(), dict[str, tuple[Any, ...]])
    trainer.fit(module)  # pyright: ignore[reportAttributeAccessIssue]
    Trainer(module, max_epochs=2)  # pyright: ignore[reportCallIssue]
    module.log_metrics({})  # pyright: ignore[reportCallIssue]


def move(images: torch.Tensor, labels: list[torch.Tensor]) -> None:
    assert_type(to_device((images, {"labels": labels}), "cpu"), tuple[torch.Tensor, dict[str, list[torch.Tensor]]])


async def watch(module: ModuleInterface) -> None:
    async with Trainer(module).run() as run:
        assert_type(run, Run)
        assert_type(run.events(since=0), EventStream)
    assert_type(await run.result(), RunResult)
