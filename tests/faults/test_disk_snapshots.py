"""What is written is the state as it was at its step, however far the loop has gone on by the time it is written.

Parameters, momentum, buffers and the statistics of a batch norm change in place with every step. The writer is held
before it writes a tensor file until they have changed, and until the next state was copied beside the one in its hands.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from events.checkpoint.manifest import CheckpointName
from events.checkpoint.store import CheckpointStore
from events.messages import CheckpointSaved, CheckpointSkipped, CheckpointStaged
from trainer.checkpoint.loaded import Loaded


class Pace:
    """Where the loop is, and how far the writer: each waits for the other, so that they always overlap.

    The loop trains on the thread that makes this.

    Args:
        steps: Of the run.
        lag: Steps that the loop may take for each checkpoint that is announced.
        wait_s: How long anything may take.
    """

    def __init__(self, steps: int, lag: int, wait_s: float) -> None:
        self.overlaps = 0
        self._steps = steps
        self._lag = lag
        self._wait_s = wait_s
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
            assert self._changed.wait_for(lambda: self._announced >= enough, self._wait_s)
            self._held = False

    def before(self, call: Any) -> None:
        """On the writer's thread, before each call to the disk."""
        if call.name == "pwrite":
            name = CheckpointName.parse(".".join(Path(call.path).parent.name.split(".")[1:3]))
            assert name is not None
            beyond = min(name.step + 3, self._steps)
            deadline = time.monotonic() + self._wait_s
            with self._changed:
                while self._step < beyond and not self._held and not self._waits_for_memory():
                    assert time.monotonic() < deadline, "the loop does not go on"
                    self._changed.wait(0.001)
                self.overlaps += self._step > name.step

    def _waits_for_memory(self) -> bool:
        frame = sys._current_frames().get(self._loop)
        while frame is not None and frame.f_code.co_name != "_wait_for_slab":
            frame = frame.f_back
        return frame is not None

    def on_saved(self) -> None:
        """On the writer's thread, when a checkpoint is announced."""
        with self._changed:
            self._announced += 1
            self._changed.notify_all()


@pytest.fixture(scope="module")
def reference(disk: Any) -> Any:
    return disk.Reference()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("when_busy", "lag"), [("wait", 1), ("skip", 4)])
def test_every_checkpoint_holds_the_state_of_its_step_though_training_goes_on(
    when_busy: Literal["wait", "skip"], lag: int, full: bool, disk: Any, reference: Any, tmp_path: Path
) -> None:
    """One after every step, or of every step for which there is memory, against a writer that is always behind."""
    saves = 500 if full else 25
    steps = saves * lag + 8
    pace = Pace(steps, lag, disk.WAIT_S)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")

    class Changing(disk.Counting):  # type: ignore[misc, name-defined]
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss = super().train_step(global_step, batch, device)
            pace.on_step(global_step)
            return loss

    def on_saved(text: str) -> None:
        name = CheckpointName.parse(text)
        assert name is not None
        disk.check(Loaded(store.path(name)), reference)  # an error here ends the run, and is raised
        pace.on_saved()

    arrivals = disk.Arrivals()
    with disk.Calls(before=pace.before, on_saved=on_saved):
        disk.make_trainer(
            tmp_path / "run",
            module=Changing(steps),
            sinks=[arrivals],
            callbacks=[disk.Tally()],
            every_steps=1,
            when_busy=when_busy,
            keep_last=2,
        ).train()
    saved, skipped = arrivals.of(CheckpointSaved), arrivals.of(CheckpointSkipped)
    assert len(saved) >= saves
    assert len(saved) + len(skipped) == steps
    assert bool(skipped) == (when_busy == "skip")
    assert [event.checkpoint for event in saved] == [event.checkpoint for event in arrivals.of(CheckpointStaged)]
    assert pace.overlaps >= len(saved) - 1  # of the last step's, nothing is left to change the state


def test_the_statistics_of_a_batch_norm_are_those_of_the_step(disk: Any, tmp_path: Path) -> None:
    """Running mean and variance, which the next forward changes already, and how many batches they have seen."""
    steps, batches = 6, []
    module = disk.Counting(steps)
    module.norm.register_forward_pre_hook(lambda norm, inputs: batches.append(inputs[0].clone()))
    disk.make_trainer(tmp_path / "run", module=module, every_steps=1, keep_last=steps).train()
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    norm = torch.nn.BatchNorm1d(5)
    for step, batch in enumerate(batches, 1):
        norm(batch)
        state = Loaded(store.path(CheckpointName(step, 1))).state["module"]
        assert int(state["norm.num_batches_tracked"]) == step
        assert torch.equal(state["norm.running_mean"], norm.running_mean)
        assert torch.equal(state["norm.running_var"], norm.running_var)
