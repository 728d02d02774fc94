"""Batch sizes and accumulation that change with the epoch or the step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.training import Boom, Net, train
from torch.utils.data import DataLoader, TensorDataset

from events.errors import CheckpointMismatch
from events.messages import RunStarted, TrainEpochStarted, TrainStepEnded
from events.run.state import RunState
from trainer import Checkpoints, TrainerArguments
from trainer.data.loaders import make_train_sampler
from trainer.errors import ArgumentsError
from trainer.loop.step_plan import StepPlan

EACH_STEP = Checkpoints(every_steps=1, every_minutes=None, keep_last=None, when_busy="wait", weights=False)


class Shuffled(Net):
    """Rows in the order of the given sampler, in batches of a size of its own, and a schedule of each step."""

    def __init__(self, own_size: Callable[[int, int], int] | None = None, rows: int = 22, **options: Any) -> None:
        super().__init__(rows, **options)
        self.own_size = own_size
        self.lrs: list[float] = []

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        self.told = steps, epochs
        self.total = self.total_steps or 1
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        total = self.total
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)]

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        data = TensorDataset(self.x, self.y)
        if self.own_size is not None:
            batch_size = self.own_size(batch_size, self.current_epoch)
        return DataLoader(data, batch_size, sampler=sampler(data))

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
        return None


def by_hand(net: Shuffled, sizes: list[list[int]], total: int) -> list[torch.Tensor]:
    """Train with steps of these rows, per epoch; each step is one batch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    step = 0
    for epoch, rows in enumerate(sizes):
        order = list(make_train_sampler(0, epoch)(net.x))
        assert sum(rows) == len(order)
        for count in rows:
            batch, order = order[:count], order[count:]
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / total)
            optimizer.zero_grad()
            net.forward_loss((net.x[batch], net.y[batch]))[0].backward()
            optimizer.step()
            step += 1
    return [parameter.detach() for parameter in net.parameters()]


CASES: list[tuple[dict[str, Any], list[list[int]]]] = [
    ({"batch_size_schedule": {1: 8, 2: 16}}, [[4] * 5 + [2], [8, 8, 6], [16, 6]]),
    ({"batch_size_schedule": {1: 8}, "gpu_batch_size_limit": 4}, [[4] * 5 + [2], [8, 8, 6], [8, 8, 6]]),
    ({"batch_size_schedule": {2: 12}, "gpu_batch_size_limit": 6}, [[4] * 5 + [2], [4] * 5 + [2], [12, 10]]),
    (
        {"batch_size_schedule": {3: 8, 8: 12}, "batch_size_interval": "step"},
        [[4, 4, 4, 8, 2], [8, 8, 6], [12, 10]],
    ),
]


@pytest.mark.parametrize(("options", "sizes"), CASES)
def test_a_run_whose_batches_grow_equals_a_loop_by_hand(
    tmp_path: Path, options: dict[str, Any], sizes: list[list[int]]
) -> None:
    """Also its planned length, its progress, and where it is resumed in the middle of an epoch."""
    options = {"train_batch_size": 4, "epochs": 3, "seed": 0, **options}
    total = sum(map(len, sizes))
    net = Shuffled()
    outcome = train(net, **options)
    assert [event.rows for event in outcome.of(TrainStepEnded)] == [rows for epoch in sizes for rows in epoch]
    assert net.total == total
    assert net.told == (-(-total // 3), 3)
    assert [event.steps for event in outcome.of(TrainEpochStarted)] == [len(rows) for rows in sizes]
    assert {event.total_steps for event in (*outcome.of(TrainEpochStarted), *outcome.of(RunStarted))} == {total}
    weights = [parameter.detach() for parameter in net.parameters()]
    torch.testing.assert_close(weights, by_hand(Shuffled(), sizes, total))

    own = {"run_id": "r", "run_dir": tmp_path / "r", "checkpoints": EACH_STEP}
    for crash in (2, len(sizes[0]) + 1, total - 1):  # in each epoch, in the middle or before its last step

        def act(step: int, crash: int = crash) -> None:
            if step == crash + 1:
                raise Boom

        again = train(Shuffled(act=act), resume="auto", **options, **own)
        assert isinstance(again.error, Boom), again.error
    net = Shuffled()
    last = train(net, resume="auto", **options, **own)
    assert last.result.global_step == total
    assert net.total == total
    assert last.of(RunStarted)[0].total_steps == total
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))


def doubling(given: int, epoch: int) -> int:
    return given * 2**epoch


def test_a_module_may_choose_the_batch_size_by_the_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It resumes within an epoch without reading again, and the schedulers' wrong number of steps is a warning."""
    options = {"train_batch_size": 4, "epochs": 3, "seed": 0}
    own = {"run_id": "r", "run_dir": tmp_path / "r", "checkpoints": EACH_STEP}
    net = Shuffled(doubling)
    with caplog.at_level(logging.WARNING, "stagecast"):
        whole = train(net, **options)
    assert [event.rows for event in whole.of(TrainStepEnded)] == [4] * 5 + [2, 8, 8, 6, 16, 6]
    assert "epoch 1 has 3 steps instead of 6, and schedulers were told 18 steps in all, not 12;" in caplog.text
    assert caplog.text.count("the length of the run has changed") == 1
    assert (net.total, net.current_epoch) == (18, 2)

    state, totals = RunState(), []
    for event in whole.events:
        state.add([event])
        if isinstance(event, TrainEpochStarted | TrainStepEnded):
            totals.append(state.total_steps)
    assert totals == [18] * 7 + [12] * 4 + [11] * 3
    caplog.clear()

    def act(step: int) -> None:
        if step == 9:
            raise Boom

    assert isinstance(train(Shuffled(doubling, act=act), **options, **own).error, Boom)
    again = Shuffled(doubling)
    with caplog.at_level(logging.WARNING, "stagecast"):
        resumed = train(again, resume="auto", **options, **own)
    assert "discarded" not in caplog.text
    assert [event.rows for event in resumed.of(TrainStepEnded)] == [6, 16, 6]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    checkpoint = tmp_path / "r/checkpoints/step-8.a1"
    error = train(Shuffled(lambda given, epoch: 5), resume=checkpoint, **options, **own).error
    assert isinstance(error, CheckpointMismatch)
    assert "a step had 1 micro-batches of 8 rows, and now it has 1 of 5: resume with those batch sizes" in str(error)


def test_no_warning_where_schedulers_need_no_number_of_steps(caplog: pytest.LogCaptureFixture) -> None:
    net = Shuffled(doubling)
    with caplog.at_level(logging.WARNING, "stagecast"):
        train(net, train_batch_size=4, max_steps=8)  # which ends the run where the schedulers were told
        train(net, train_batch_size=4, epochs=2, scheduler_interval="epoch")
    assert "the length of the run" not in caplog.text


def test_a_schedule_of_batch_sizes_is_read_from_files_and_the_command_line(tmp_path: Path) -> None:
    for name, text in {
        "a.yaml": "batch_size_schedule: {10: 64, 20: 128}",
        "a.json": '{"batch_size_schedule": {"10": 64, "20": 128}}',
        "a.toml": "[batch_size_schedule]\n10 = 64\n20 = 128",
    }.items():
        (tmp_path / name).write_text(text)
        read = TrainerArguments.from_file(tmp_path / name, ["batch_size_schedule.30=256"])
        assert read.batch_size_schedule == {10: 64, 20: 128, 30: 256}
        assert TrainerArguments.from_dict(read.to_dict()) == read
    for wrong in ({0: 8}, {1: 0}, {"x": 8}, {1.5: 8}, [8], 8):
        with pytest.raises(ArgumentsError, match="must be a mapping of an integer >= 1 to an integer >= 1"):
            TrainerArguments(batch_size_schedule=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"batch_size_schedule": {5: 33}, "batch_size_interval": "step"},
            "micro-batches of 1, the largest fitting common divisor of 32, 33",
        ),
        ({"batch_size_schedule": {5: 37}, "gpu_batch_size_limit": 32}, "batch_size_schedule.5=37 has no large divisor"),
        ({"batch_size_schedule": {5: 48}, "batch_size_interval": "step"}, None),
        ({"batch_size_schedule": {5: 33}}, None),
    ],
)
def test_sizes_without_a_large_divisor_are_a_warning(options: dict[str, Any], says: str | None) -> None:
    warning = TrainerArguments(**options).batch_size_warning()
    assert (warning is None) if says is None else says in (warning or "")


def test_manual_optimization_refuses_a_schedule_that_accumulates() -> None:
    net = Net()
    net.manual_optimization = True
    error = train(net, batch_size_schedule={3: 16}, batch_size_interval="step").error
    assert isinstance(error, ArgumentsError)
    assert "batch_size_schedule={3: 16} splits a step into several micro-batches" in str(error)


def simulated(arguments: TrainerArguments, rows: int, drop_last: bool) -> tuple[int, int]:
    """Count steps and epochs one by one."""
    step = epoch = 0
    most = arguments.max_steps or 10**9
    while step < most and epoch < (arguments.epoch_limit or 10**9):
        micro, first = arguments.micro_batch_of(epoch), step
        left = rows // micro if drop_last else -(-rows // micro)
        while left > 0 and step < most and step - first < (arguments.max_train_steps_per_epoch or 10**9):
            left -= arguments.accumulation_of(epoch, step)
            step += 1
        epoch += 1
        if step == first:
            break
    return step, epoch


@given(
    schedule=st.dictionaries(st.integers(1, 20), st.integers(1, 12), max_size=4),
    interval=st.sampled_from(["epoch", "step"]),
    limits=st.fixed_dictionaries(
        {},
        optional={
            "gpu_batch_size_limit": st.integers(1, 6),
            "max_steps": st.integers(1, 60),
            "epochs": st.integers(1, 9),
            "max_train_steps_per_epoch": st.integers(1, 6),
        },
    ),
    rows=st.integers(12, 50),
    drop_last=st.booleans(),
)
def test_the_planned_length_is_that_of_the_run(
    schedule: dict[int, int], interval: Any, limits: Mapping[str, Any], rows: int, drop_last: bool
) -> None:
    arguments = TrainerArguments(
        train_batch_size=6, batch_size_schedule=schedule, batch_size_interval=interval, **limits
    )
    data, plan = range(rows), StepPlan(arguments)
    loader: Any = DataLoader(
        data, arguments.micro_batch_of(0), sampler=make_train_sampler(0, 0)(data), drop_last=drop_last
    )  # type: ignore[arg-type]
    assert plan.run(plan.size_of(loader, 0), 0, 0) == simulated(arguments, rows, drop_last)
