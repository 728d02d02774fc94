"""What a type checker sees of the public interface. Checked by pyright, never run."""

from typing import Any, assert_type

from events.protocol import EventStream, RunResult
from events.run import Run
from trainer import ModuleInterface, Trainer, TrainerArguments


def train(module: ModuleInterface) -> None:
    trainer = Trainer(module, TrainerArguments(epochs=2))
    assert_type(trainer.train(), RunResult)
    assert_type(trainer.test(), dict[str, tuple[Any, ...]])


async def watch(module: ModuleInterface) -> None:
    async with Trainer(module).run() as run:
        assert_type(run, Run)
        assert_type(run.events(since=0), EventStream)
    assert_type(await run.result(), RunResult)
