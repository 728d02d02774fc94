"""Each checkpoint holds the state of its step, however many steps the loop is ahead when it is written.

The writer is held before it writes a tensor file until the state has changed, and until the next state was copied
beside the one that it writes.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from faults.disk_kit import Arrivals, Call, Calls, Counting, Tally, check, make_trainer
from faults.injections import FULL
from support.threads import WAIT_S, stack_of

from events.checkpoint.manifest import CheckpointName
from events.checkpoint.store import CheckpointStore
from events.messages import CheckpointSaved, CheckpointSkipped, CheckpointStaged
from trainer.checkpoint.loaded import Loaded


class Pace:
    """Keeps the loop, on the thread that makes this, and the writer apart: each waits for the other.

    Args:
        steps: Number of steps of the run.
        lag: Steps that the loop may take for each announced checkpoint.
    """

    def __init__(self, steps: int, lag: int) -> None:
        self.overlaps = 0
        self._steps = steps
        self._lag = lag
        self._step = 0
        self._announced = 0
        self._held = False
        self._loop = threading.get_ident()
        self._changed = threading.Condition()

    def on_step(self, global_step: int) -> None:
        """On the loop's thread, when a step has changed buffers."""
        with self._changed:
            self._step, self._held = global_step, True
            self._changed.notify_all()
            enough = global_step // self._lag - 4
            assert self._changed.wait_for(lambda: self._announced >= enough, WAIT_S)
            self._held = False

    def before(self, call: Call) -> None:
        """On the writer's thread, before each call to the disk."""
        if call.name == "pwrite":
            name = CheckpointName.parse(".".join(Path(call.path).parent.name.split(".")[1:3]))
            assert name is not None
            beyond = min(name.step + 3, self._steps)
            deadline = time.monotonic() + WAIT_S
            with self._changed:
                while self._step < beyond and not self._held and "_wait_for_slab" not in stack_of(self._loop):
                    assert time.monotonic() < deadline, "the loop does not continue"
                    self._changed.wait(0.001)
                self.overlaps += self._step > name.step

    def on_saved(self) -> None:
        """On the writer's thread, when a checkpoint is announced."""
        with self._changed:
            self._announced += 1
            self._changed.notify_all()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("when_busy", "lag"), [("wait", 1), ("skip", 4)])
def test_every_checkpoint_holds_the_state_of_its_step_while_training_continues(
    when_busy: Literal["wait", "skip"], lag: int, tmp_path: Path
) -> None:
    """One after every step, or of every step for which there is memory, against a writer that is always behind."""
    saves = 500 if FULL else 15
    steps = saves * lag + 8
    pace, arrivals = Pace(steps, lag), Arrivals()
    store = CheckpointStore(tmp_path / "run" / "checkpoints")

    class Changing(Counting):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss = super().train_step(global_step, batch, device)
            pace.on_step(global_step)
            return loss

    def on_saved(text: str) -> None:
        name = CheckpointName.parse(text)
        assert name is not None
        check(Loaded(store.path(name)))  # an error here ends the run, and is raised
        pace.on_saved()

    options = {"every_steps": 1, "when_busy": when_busy, "keep_last": 2}
    with Calls(before=pace.before, on_saved=on_saved):
        make_trainer(tmp_path / "run", module=Changing(steps), sinks=[arrivals], callbacks=[Tally()], **options).train()
    saved, skipped = arrivals.of(CheckpointSaved), arrivals.of(CheckpointSkipped)
    assert len(saved) >= saves
    assert len(saved) + len(skipped) == steps
    assert bool(skipped) == (when_busy == "skip")
    assert [event.checkpoint for event in saved] == [event.checkpoint for event in arrivals.of(CheckpointStaged)]
    assert pace.overlaps >= len(saved) - 1  # nothing changes the state of the last step


def test_the_statistics_of_a_batch_norm_are_those_of_the_step(tmp_path: Path) -> None:
    """Running mean and variance, and the number of batches, which the next forward pass changes."""
    steps, batches = 6, []
    module = Counting(steps)
    module.norm.register_forward_pre_hook(lambda norm, inputs: batches.append(inputs[0].clone()))
    make_trainer(tmp_path / "run", module=module, every_steps=1, keep_last=steps).train()
    store, norm = CheckpointStore(tmp_path / "run" / "checkpoints"), torch.nn.BatchNorm1d(5)
    for step, batch in enumerate(batches, 1):
        norm(batch)
        state = Loaded(store.path(CheckpointName(step, 1))).state["module"]
        assert int(state["norm.num_batches_tracked"]) == step
        assert torch.equal(state["norm.running_mean"], norm.running_mean)
        assert torch.equal(state["norm.running_var"], norm.running_var)
