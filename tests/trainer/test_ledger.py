"""The stall ledger: each wait of the loop is on the row of its cause, and on no other."""

from __future__ import annotations

import math
import sys
import threading
import time
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.threads import WAIT_S, wait_until_in
from support.training import InlineDiary, Net, make_trainer, train
from torch.overrides import TorchFunctionMode

from events.messages import CommandTaken, LedgerReported, StallLedger
from events.sink import CALLBACK_DELIVERY
from trainer import CallbackInterface, fenced, inline
from trainer.loop.ledger import Ledger

ROWS = ("compute", "contention", "data", "readback", "publish", "inline", "fence", "backpressure", "paused", "other")
PAUSE_S = 0.01


class Clock:
    """Waits, and adds up the time."""

    def __init__(self) -> None:
        self.waited_s = 0.0

    def wait(self, *_: Any, **__: Any) -> None:
        begin = time.perf_counter()
        threading.Event().wait(PAUSE_S)
        self.waited_s += time.perf_counter() - begin


def rows_of(ledger: StallLedger) -> dict[str, float]:
    return {row: getattr(ledger, f"{row}_s") for row in ROWS}


def check(ledger: StallLedger, row: str, waited_s: float) -> None:
    """Check that the row has the wait, and that the rows add up to the wall time."""
    rows = rows_of(ledger)
    # A step that sleeps while observers compute looks just as if it waited for them.
    held_s = rows[row] + (rows["contention"] if row == "compute" else 0)
    assert held_s >= waited_s > 0
    assert sum(rows.values()) == pytest.approx(ledger.wall_s, abs=1e-6)
    assert min(rows.values()) >= 0


# ------------------------------------------------------------------------------------------------- each row


def test_waiting_for_data_is_on_the_data_row() -> None:
    clock = Clock()

    class Own(Net):
        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            if hasattr(self, "told"):  # that of the first epoch is made before the ledger begins
                clock.wait()
            return self.slow(batch_size)

        def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            clock.wait()
            return self.slow(batch_size)

        def slow(self, batch_size: int) -> Any:
            for batch in self.batches(batch_size):
                clock.wait()
                yield batch
            clock.wait()

    outcome = train(Own(rows=16), epochs=2, gpu_batch_size_limit=4)
    check(outcome.result.ledger, "data", clock.waited_s)
    assert outcome.result.ledger.steps == 4


def test_closing_a_dataloader_is_on_the_data_row() -> None:
    clock = Clock()

    class Loader:
        def __init__(self, batches: list[Any]) -> None:
            self.batches = batches

        def __iter__(self) -> Any:
            try:
                yield from self.batches
            finally:
                clock.wait()

    class Own(Net):
        def batches(self, batch_size: int) -> Any:
            return Loader(super().batches(batch_size))

    options = {"max_train_steps_per_epoch": 1, "max_val_steps_per_epoch": 1}
    ledger = train(Own(), epochs=2, **options).result.ledger
    check(ledger, "data", clock.waited_s)
    assert clock.waited_s >= 4 * PAUSE_S


def test_time_before_the_loop_is_not_in_the_ledger() -> None:
    """The first dataloader is built before the ledger starts."""
    clock = Clock()

    def train_data(net: Net, batch_size: int) -> Any:
        clock.wait()
        return net.batches(batch_size)

    ledger = train(Net(train_data=train_data)).result.ledger
    assert min(rows_of(ledger).values()) >= 0


@pytest.mark.parametrize("place", ["train_step", "val_step", "backward", "optimizer", "scheduler"])
def test_the_users_computation_is_on_the_compute_row(place: str) -> None:
    clock = Clock()

    def optimizers(net: Net) -> Any:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
        if place == "optimizer":
            optimizer.register_step_pre_hook(clock.wait)
        if place == "scheduler":
            scheduler.step = clock.wait  # type: ignore[method-assign]
        return [optimizer], [scheduler]

    def step(net: Net, global_step: int, batch: Any) -> Any:
        loss, _ = net.forward_loss(batch)
        if place == "backward" and net.training:
            loss.register_hook(clock.wait)
        elif place == ("train_step" if net.training else "val_step"):
            clock.wait()
        return loss

    outcome = train(Net(optimizers=optimizers, train_step=step, val_step=step))
    check(outcome.result.ledger, "compute", clock.waited_s)


INLINE = [
    ("on_begin_train_epoch", {}),
    ("on_end_backward", {"gpu_batch_size_limit": 4}),
    ("on_end_train_step", {}),
    ("on_end_val_epoch", {}),
    ("on_end_train_epoch", {}),
]


@pytest.mark.parametrize(("hook", "options"), INLINE, ids=[name for name, _ in INLINE])
def test_inline_hooks_are_on_their_row_wherever_they_run(hook: str, options: dict[str, Any]) -> None:
    clock = Clock()
    probe = type("Probe", (CallbackInterface,), {hook: inline(lambda self, *args, **key: clock.wait())})
    outcome = train(Net(), callbacks=[probe()], **options)
    check(outcome.result.ledger, "inline", clock.waited_s)
    computed_s = outcome.result.ledger.compute_s
    assert computed_s <= outcome.result.ledger.wall_s - clock.waited_s


@pytest.mark.parametrize("hook", ["on_begin_train_epoch", "on_end_train_step", "on_end_train_epoch"])
def test_waiting_for_fenced_hooks_is_on_the_fence_row(hook: str) -> None:
    clock = Clock()
    loop = threading.current_thread()

    def hold(self: Any, *args: Any) -> None:
        wait_until_in(loop, "wait_for_fence")
        clock.wait()

    probe = type("Probe", (CallbackInterface,), {hook: fenced(hold)})
    outcome = train(Net(), callbacks=[probe()])
    check(outcome.result.ledger, "fence", clock.waited_s)


class SlowDevice(TorchFunctionMode):
    """Each number that this thread reads from a tensor takes a while, as from a device that is busy."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.reads = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.item, torch.Tensor.__float__, torch.Tensor.tolist):
            self.reads += 1
            self.clock.wait()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"non_finite": "skip"}, {"precision": "float16"}], ids=["skip", "float16"])
def test_numbers_that_the_loop_reads_are_on_the_readback_row(options: dict[str, Any]) -> None:
    """One read per step, for the policy ``skip`` and for the scaler of float16; not on the compute row, too."""
    with SlowDevice() as device:
        outcome = train(Net(rows=24), val_interval_epochs=0, seed=0, **options)
    ledger = outcome.result.ledger
    assert device.reads == 3
    check(ledger, "readback", device.clock.waited_s)
    assert ledger.compute_s <= ledger.wall_s - device.clock.waited_s


def test_a_scheduler_that_follows_a_metric_reads_it_on_the_readback_row() -> None:
    def optimizers(net: Net) -> Any:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)]

    with SlowDevice() as device:
        outcome = train(Net(optimizers=optimizers), epochs=2, seed=0)
    assert device.reads == 2
    check(outcome.result.ledger, "readback", device.clock.waited_s)


@pytest.mark.anyio
async def test_waiting_for_an_observer_that_sees_everything_is_on_the_backpressure_row() -> None:
    clock = Clock()
    loops: list[threading.Thread] = []

    class Slow(CallbackInterface):
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            if not clock.waited_s:
                wait_until_in(loops[0], "_wait_for_room")
                clock.wait()

    delivery = replace(CALLBACK_DELIVERY, capacity=2, latency_s=0.001)
    net = Net(act=lambda step: loops.append(threading.current_thread()))
    trainer = make_trainer(net, callbacks=[(Slow(), delivery)], epochs=200, val_interval_epochs=0)
    async with trainer.run() as run:
        pass
    check((await run.result()).ledger, "backpressure", clock.waited_s)


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no thread can tell another one's time here")
def test_an_observer_that_keeps_the_interpreter_is_on_the_contention_row() -> None:
    """It never releases the interpreter lock itself, so the loop waits for a switch interval each time."""
    computing, over = threading.Event(), threading.Event()

    class Own(Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if global_step == 2:
                assert computing.wait(WAIT_S)
            values = super().train_step(global_step, batch, device)
            threading.Event().wait(1e-6)  # gives the interpreter up, as a kernel does
            if global_step == 10:
                over.set()
            return values

    class Greedy(CallbackInterface):
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            computing.set()
            while not over.is_set():
                pass

    delivery = replace(CALLBACK_DELIVERY, latency_s=0.001)
    ledger = train(Own(rows=80), callbacks=[(Greedy(), delivery)], val_interval_epochs=0).result.ledger
    assert ledger.steps == 10
    # Eight turns of 5 ms, on a machine that is idle: the time of other processes is not contention.
    assert ledger.contention_s > 2 * sys.getswitchinterval()
    assert min(rows_of(ledger).values()) >= 0


@pytest.mark.anyio
async def test_a_pause_is_on_its_row() -> None:
    clock = Clock()
    trainer = make_trainer(Net(), epochs=1_000_000, val_interval_epochs=0)
    async with trainer.run() as run:
        run.pause()
        async for event in run.events(since=0):
            if isinstance(event, CommandTaken):
                break
        (loop,) = [thread for thread in threading.enumerate() if thread.name.startswith("stagecast-loop-")]
        wait_until_in(loop, "wait")
        clock.wait()
        run.stop()
    check((await run.result()).ledger, "paused", clock.waited_s)


@pytest.mark.parametrize(
    ("stood", "others", "aside", "contention"),
    [(70, 1_000, 0, 70), (70, 30, 0, 30), (70, 0, 0, 0), (70, 1_000, 40, 30), (70, 1_000, 90, 0), (-5, 1_000, 0, 0)],
)
def test_contention_is_the_time_off_the_cpu_while_other_threads_ran(
    monkeypatch: pytest.MonkeyPatch, stood: int, others: int, aside: int, contention: int
) -> None:
    """The lesser of the two, within the compute row; time of another row is not counted again."""
    now, ran, other = 0, 0, 500
    monkeypatch.setattr("trainer.loop.ledger.clock", lambda: now)
    monkeypatch.setattr("trainer.loop.ledger.cpu_clock", lambda: ran)
    ledger = Ledger(torch.device("cpu"), lambda: other)
    ledger.start()
    for _ in range(2):  # with a gap between them in the row "other", in which another thread ran
        now += 1_000_000
        ledger.enter("compute")
        now, ran, other = now + 100, ran + 100 - (stood - aside), other + others
        ledger.enter("fence")
        now += aside
        ledger.enter("compute")
        now, ran = now + 100 - aside, ran + 100 - aside
        ledger.enter("other")
    total = ledger.total()
    assert total.contention_s == pytest.approx(2e-9 * contention)
    assert total.compute_s == pytest.approx(2e-9 * (200 - aside - contention))
    other += 60  # while the model does not compute: none of the next steps' contention
    assert ledger.interval().contention_s == total.contention_s
    ledger.enter("compute")
    now += 50
    ledger.enter("other")
    assert ledger.interval().contention_s == 0.0


# ---------------------------------------------------------------------------------------------- the reports


def everything_at_once() -> tuple[Any, dict[str, Any]]:
    """A run with something on nearly every row."""

    class Own(Net):
        def on_end_backward(self, global_step: int, loss: Any) -> None: ...

        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None: ...

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.log("loss", (pair := super().train_step(global_step, batch, device))[0])
            return pair

    options = {"epochs": 5, "gpu_batch_size_limit": 4, "non_finite": "skip", "clip_grads": True}
    return Own(rows=40), options | {"callbacks": [InlineDiary()]}


def test_the_runs_ledger_is_published_and_returned() -> None:
    net, options = everything_at_once()
    outcome = train(net, **options)
    (report,) = outcome.of(LedgerReported)
    assert report.scope == "run"
    assert report.ledger == outcome.result.ledger
    assert report.ledger.device_idle_s is None
    rows = rows_of(report.ledger)
    assert sum(rows.values()) == pytest.approx(report.ledger.wall_s, abs=1e-6)
    assert {row for row, value in rows.items() if not value} == {"backpressure", "paused"}
    assert min(rows.values()) >= 0


def test_the_reports_of_intervals_add_up_to_the_runs() -> None:
    net, options = everything_at_once()
    outcome = train(net, ledger_interval_s=1e-9, **options)
    *intervals, run = [report.ledger for report in outcome.of(LedgerReported)]
    assert {report.scope for report in outcome.of(LedgerReported)[:-1]} == {"interval"}
    assert len(intervals) >= 25
    assert sum(ledger.steps for ledger in intervals) == run.steps == 25
    for ledger in intervals:
        assert sum(rows_of(ledger).values()) == pytest.approx(ledger.wall_s, abs=1e-6)
    for row in (*ROWS, "wall"):
        added = math.fsum(getattr(ledger, f"{row}_s") for ledger in intervals)
        assert added <= getattr(run, f"{row}_s") + 1e-6


def test_an_interval_has_the_time_since_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each nanosecond is on the row that was entered last, and the total has all of them."""
    now = 0
    monkeypatch.setattr("trainer.loop.ledger.clock", lambda: now)
    ledger = Ledger(torch.device("cpu"), lambda: 0)
    entered = [row for row in ROWS if row != "contention"]
    seen = []
    for row in entered:
        before = ledger.enter(row)  # type: ignore[arg-type]
        now += 1_000
        ledger.enter(before)
        ledger.steps += 1
        seen.append(ledger.interval())
    for row, interval in zip(entered, seen, strict=True):
        assert rows_of(interval) == pytest.approx({name: 1e-6 if name == row else 0.0 for name in ROWS})
        assert interval.steps == 1
    total = ledger.total()
    assert rows_of(total) == pytest.approx({name: 1e-6 if name in entered else 0.0 for name in ROWS})
    assert total.steps == len(entered)
    assert total.wall_s == pytest.approx(math.fsum(interval.wall_s for interval in seen))
