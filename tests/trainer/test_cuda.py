"""CUDA: the loop waits for the device only where that is documented, and outputs arrive unchanged.

Work of a known length is queued on the device with ``torch.cuda._sleep``, so that it is certainly behind the host: what
then waits for it, or reads it too early, shows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import training
from support.training import make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from events.checkpoint.store import CheckpointStore
from events.messages import (
    LedgerReported,
    MetricsLogged,
    NonFiniteLoss,
    StepSkipped,
    TrainEpochEnded,
    TrainStepEnded,
    ValEpochEnded,
)
from sinks import Memory
from trainer import CallbackInterface, Checkpoints, ModuleInterface, inline, to_device
from trainer.checkpoint.loaded import Loaded
from trainer.checkpoint.slab import Slab
from trainer.checkpoint.staging import Stager
from trainer.data.tensor_state import Collected, tensors_in
from trainer.hooks.capture import Capture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

CYCLES = 200_000_000
"""About a tenth of a second of the device's time."""


class Net(ModuleInterface):
    """A small classifier whose data comes from a dataloader with pinned memory, where there is any."""

    def __init__(self, rows: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, 8, generator=generator)
        self.data = TensorDataset(x, (x.sum(1) > 0).long())
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 5)]

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        return DataLoader(self.data, batch_size=batch_size, sampler=sampler(self.data), pin_memory=True)

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
        loader = DataLoader(self.data, batch_size=batch_size, sampler=sampler(self.data), pin_memory=True)
        return {"default": loader, "again": loader}

    def forward_loss(self, batch: Any, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = to_device(batch, device)
        assert x.is_cuda
        logits = self.layers(x)
        return nn.functional.cross_entropy(logits, y), logits

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return self.forward_loss(batch, device)

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return self.forward_loss(batch, device)


class Keeps(CallbackInterface):
    """Keeps the outputs of steps and of validation, and the device that is current on its thread."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, ...]] = []
        self.validations: list[tuple[Any, ...]] = []
        self.devices: set[int] = set()

    def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        self.devices.add(torch.cuda.current_device())

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.devices.add(torch.cuda.current_device())
        self.steps.append(outputs)

    def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
        self.devices.add(torch.cuda.current_device())
        self.validations.append(outputs)


@pytest.fixture
def sync_is_an_error() -> Iterator[Callable[[], None]]:
    """Call it to have every synchronisation raise, on all threads; undone at the end."""
    before = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


def train(net: Any, **options: Any) -> Any:
    return training.train(net, **({"device": "cuda", "seed": 0, "train_batch_size": 16} | options))


def device_is_busy() -> bool:
    """Whether the work that this thread has queued is not done yet. Waits for nothing."""
    return not torch.cuda.current_stream().query()


# -------------------------------------------------------------------------------------------- nothing waits


def test_a_synchronisation_in_a_step_is_noticed(sync_is_an_error: Callable[[], None]) -> None:
    """Checks the fixture that the tests below rely on."""

    class Reads(Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            sync_is_an_error()
            loss, logits = super().train_step(global_step, batch, device)
            loss.item()
            return loss, logits

    assert isinstance(train(Reads()).error, RuntimeError)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gpu_batch_size_limit": 4},
        {"clip_grads": True, "journal": True, "ledger_interval_s": 1e-9},
        {"precision": "bfloat16"},
        {"non_finite": "stop", "val_interval_steps": 2},
    ],
    ids=["plain", "accumulating", "clipping", "bfloat16", "stop"],
)
def test_the_loop_synchronises_nowhere(sync_is_an_error: Callable[[], None], options: dict[str, Any]) -> None:
    class Logs(Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            built = super().get_optimizers_schedulers(steps, epochs)
            torch.cuda.synchronize()
            sync_is_an_error()  # setting up, the module was moved
            return built

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, logits = super().train_step(global_step, batch, device)
            self.log("largest", logits.max())
            self.log("number", 1.0)
            return loss, logits

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, logits = super().val_step(global_step, batch, device)
            self.log("val largest", logits.max())
            return loss, logits

        def on_end_backward(self, global_step: int, loss_tensor: torch.Tensor) -> None:
            self.log("backward", loss_tensor)

        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            assert outputs[1].is_cuda
            self.log("inline", outputs[1].mean())

    keeps = Keeps()
    outcome = train(Logs(), callbacks=[keeps], epochs=3, **options)
    assert outcome.result.global_step == 12
    assert len(keeps.steps) == 12
    assert all(math.isfinite(event.loss) for event in outcome.of(TrainStepEnded))
    assert {name for event in outcome.of(MetricsLogged) for name in event.metrics} == {
        *("largest", "number", "val largest", "backward", "inline")
    }


def test_a_step_ends_while_the_device_is_still_at_work_on_it() -> None:
    """Its loss is published, its outputs captured, its metrics logged before the device has computed them."""
    busy: list[bool] = []

    class Slow(Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, logits = super().train_step(global_step, batch, device)
            if global_step > 1:  # in the first, libraries are loaded and memory is allocated
                torch.cuda._sleep(CYCLES)
            self.log("after", logits.sum())
            return loss + 0, logits

    class Ahead(CallbackInterface):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            busy.append(device_is_busy())

    outcome = train(Slow(), callbacks=[Ahead(), Keeps()], val_interval_epochs=0)
    assert outcome.result.global_step == 4
    assert busy[-1]


# --------------------------------------------------------------------------------------- numbers and outputs


def test_numbers_that_are_late_arrive_as_they_were() -> None:
    """Although the device is behind and the step overwrites the tensors."""

    class Late(Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, _ = super().train_step(global_step, batch, device)
            counter = self.counter = getattr(self, "counter", torch.zeros((), device=device))
            torch.cuda._sleep(CYCLES // 50)
            counter.fill_(float(global_step))
            self.log("counter", counter)
            self.log("half", counter.half() / 2)
            self.log("integer", counter.long())
            return loss * 0 + counter

    outcome = train(Late(), epochs=4, val_interval_epochs=0)
    steps = list(range(1, 17))
    assert [event.loss for event in outcome.of(TrainStepEnded)] == steps
    logged = [event.metrics for event in outcome.of(MetricsLogged)]
    assert logged == [{"counter": n, "half": n / 2, "integer": n} for n in steps]
    assert outcome.result.metrics["counter"] == 16.0
    assert [event.loss for event in outcome.of(TrainEpochEnded)] == [2.5, 6.5, 10.5, 14.5]


def test_numbers_are_right_when_the_loop_computes_on_a_stream_of_its_own() -> None:
    """The readback waits for the loop thread's current stream."""

    class Late(Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            assert torch.cuda.current_stream() == own
            loss, logits = super().train_step(global_step, batch, device)
            torch.cuda._sleep(CYCLES // 10)
            return loss * 0 + global_step, logits * 0 + global_step

    own = torch.cuda.Stream()
    keeps = Keeps()
    with torch.cuda.stream(own):
        outcome = train(Late(), callbacks=[keeps], val_interval_epochs=0)
    assert [event.loss for event in outcome.of(TrainStepEnded)] == [1.0, 2.0, 3.0, 4.0]
    assert [outputs[1].unique().tolist() for outputs in keeps.steps] == [[1.0], [2.0], [3.0], [4.0]]


def test_a_capture_copies_on_a_stream_of_its_own_what_was_there() -> None:
    """Into pinned memory, without waiting; later writes of the compute stream do not show."""
    device = torch.device("cuda", torch.cuda.current_device())
    capture = Capture(device, print)
    rows = torch.zeros(1_000, device=device)
    capture.copy((rows,)).wait()  # memory is allocated
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    rows.fill_(1.0)
    taken = capture.copy((rows, [rows.long()], torch.ones(2), "text"))
    rows.fill_(2.0)
    assert device_is_busy()
    first, (second,), third, text = taken.wait()
    assert first.is_pinned()
    assert first.unique().tolist() == [1.0]
    assert second.unique().tolist() == [1]
    assert (third.tolist(), text) == ([1.0, 1.0], "text")
    assert taken.nbytes == 1_000 * (4 + 8) + 2 * 4


def test_memory_of_captured_outputs_is_not_reused_too_early() -> None:
    """Allocations right after a capture do not change the tensors that are still being copied."""
    device = torch.device("cuda", torch.cuda.current_device())
    capture = Capture(device, print)
    taken = []
    for step in range(50):
        taken.append(capture.copy((torch.full((1 << 18,), float(step), device=device),)))
        torch.full((1 << 18,), -1.0, device=device)
    for step, copy in enumerate(taken):
        assert copy.wait()[0].unique().tolist() == [float(step)]


# ------------------------------------------------------------------------------------------ threads and time


def test_the_runs_device_is_current_on_every_thread() -> None:
    """On the loop's thread and on those of callbacks; the last device of several."""
    index = torch.cuda.device_count() - 1
    before = torch.cuda.current_device()
    keeps = Keeps()
    seen: set[Any] = set()

    class Looks(Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            seen.add((torch.cuda.current_device(), device))
            return super().train_step(global_step, batch, device)

    try:
        outcome = train(Looks(), callbacks=[keeps], device=f"cuda:{index}")
    finally:
        torch.cuda.set_device(before)
    assert outcome.result.status == "finished"
    assert seen == {(index, torch.device("cuda", index))}
    assert keeps.devices == {index}


@pytest.mark.anyio
async def test_the_ledger_has_the_devices_idle_time() -> None:
    data_s = 0.02

    class Starved(Net):
        def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
            for batch in super().get_train_dataloader(sampler, batch_size):
                torch.cuda.synchronize()  # or the device would still be busy with the step before
                threading.Event().wait(data_s)
                yield batch
            torch.cuda.synchronize()

    memory = Memory()
    options = {"device": "cuda", "train_batch_size": 8, "val_interval_epochs": 0, "ledger_interval_s": 1e-9}
    trainer = make_trainer(Starved(), sinks=[memory], **options)
    async with trainer.run() as run:
        pass
    ledger = (await run.result()).ledger
    assert ledger.steps == 8
    # Seven gaps lie between eight steps.
    assert ledger.device_idle_s is not None
    assert ledger.device_idle_s >= 7 * data_s * 0.9
    intervals = [event.ledger.device_idle_s for event in memory.of(LedgerReported) if event.scope == "interval"]
    assert all(idle_s >= 0 for idle_s in intervals)
    assert math.fsum(intervals) <= ledger.device_idle_s + 1e-6


# ------------------------------------------------------------------------------------------------ end to end


def test_float16_trains_with_a_scaler() -> None:
    """A step whose gradients overflow is skipped; the one read per step is on the readback row."""
    scales: list[torch.Tensor] = []

    class Half(Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, logits = super().train_step(global_step, batch, device)
            assert logits.dtype is torch.float16
            scales.append(loss)
            return loss, logits

        def on_end_backward(self, global_step: int, loss_tensor: torch.Tensor) -> None:
            assert loss_tensor is scales[-1]

    outcome = train(Half(), precision="float16", epochs=10, clip_grads=True)
    ledger = outcome.result.ledger
    skipped = outcome.of(StepSkipped)
    assert ledger.steps == 40 == outcome.result.global_step + len(skipped)
    assert {event.reason for event in skipped} <= {"gradient_overflow"}
    assert outcome.result.global_step >= 20
    losses = [event.loss for event in outcome.of(TrainEpochEnded)]
    assert losses[-1] < losses[0]
    assert ledger.readback_s > 0


def test_an_overflowing_step_is_skipped_on_the_device() -> None:
    class Overflows(Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            loss, logits = super().train_step(global_step, batch, device)
            return loss * (1e38 if self.calls == 3 else 1.0), logits

    outcome = train(Overflows(), precision="float16", epochs=3)
    assert outcome.result.ledger.steps == 12
    assert len(outcome.of(StepSkipped)) >= 1
    assert outcome.result.global_step == 12 - len(outcome.of(StepSkipped))


def test_a_loss_that_is_not_finite_is_skipped_on_the_device() -> None:
    class Diverges(Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            loss, logits = super().train_step(global_step, batch, device)
            return loss * (math.nan if self.calls == 2 else 1.0), logits

    outcome = train(Diverges(), non_finite="skip")
    assert outcome.result.global_step == 3
    assert [math.isnan(event.loss) for event in outcome.of(NonFiniteLoss)] == [True]
    assert outcome.result.ledger.readback_s > 0


@pytest.mark.parametrize("pinned", [True, False])
def test_batches_are_moved_to_the_device_as_they_were(pinned: bool) -> None:
    source = torch.arange(1 << 16, dtype=torch.float32)
    batch = {"x": source.pin_memory() if pinned else source, "label": "text"}
    to_device(batch, "cuda")  # memory is allocated
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    moved = to_device(batch, "cuda")
    if pinned:
        assert device_is_busy()
    assert moved["label"] == "text"
    assert moved["x"].is_cuda
    assert torch.equal(moved["x"].cpu(), source)
    assert batch["x"].device.type == "cpu"


def test_two_epochs_with_validation_from_end_to_end() -> None:
    keeps, host = Keeps(), Keeps()
    net, reference = Net(), HostNet()
    reference.load_state_dict(net.state_dict())
    outcome = train(net, callbacks=[keeps], epochs=2)
    expected = train(reference, callbacks=[host], epochs=2, train_batch_size=16, seed=0, device="cpu")
    assert outcome.result.status == "finished"
    assert outcome.result.global_step == 8
    for kind in (TrainStepEnded, ValEpochEnded, TrainEpochEnded):
        losses = [event.loss for event in expected.of(kind)]
        assert [event.loss for event in outcome.of(kind)] == pytest.approx(losses, rel=1e-3, abs=1e-4)
    assert [event.key for event in outcome.of(ValEpochEnded)] == ["default", "again"] * 2
    for mine, theirs in ((keeps.steps, host.steps), (keeps.validations, host.validations)):
        assert len(mine) == len(theirs)
        for outputs, others in zip(mine, theirs, strict=True):
            for one, other in zip(outputs, others, strict=True):
                assert one.device.type == "cpu"
                assert torch.allclose(one, other, rtol=1e-2, atol=1e-3)
    assert next(net.parameters()).is_cuda
    assert all(type(value) is float for value in outcome.result.metrics.values())


class HostNet(Net):
    """The same on the CPU."""

    def forward_loss(self, batch: Any, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = batch
        logits = self.layers(x)
        return nn.functional.cross_entropy(logits, y), logits


# ------------------------------------------------------------------------------------------------- checkpoints


def staged_on(device: torch.device) -> tuple[Stager, Slab]:
    return Stager(device), Slab(device)


def test_the_memory_for_a_checkpoint_is_pinned() -> None:
    """Otherwise the copy would wait for the device."""
    _, slab = staged_on(torch.device("cuda:0"))
    slab.reserve(2**20)
    assert slab.bytes[: 2**20].is_pinned()
    slab.close()


def test_a_snapshot_is_consistent_while_the_device_and_the_optimizers_continue() -> None:
    """Late tensors are copied beside the next step, until the gate; others at once."""
    device = torch.device("cuda:0")
    stager, slab = staged_on(device)
    weight, buffer = torch.ones(2**22, device=device), torch.ones(2**10, device=device)
    torch.cuda._sleep(CYCLES)
    weight.add_(1.0)
    collected = Collected({"weight": weight, "buffer": buffer})
    staged = stager.copy(collected, slab, {weight.data_ptr()})
    buffer.add_(5.0)  # a forward may change it before the gate
    torch.cuda._sleep(CYCLES)
    assert stager.pending is not None
    stager.gate()
    weight.add_(7.0)
    staged.wait()
    stored = tensors_in(staged.image, "memory")
    assert stored["weight"].unique().tolist() == [2.0]
    assert stored["buffer"].unique().tolist() == [1.0]
    assert weight.unique().tolist() == [9.0]


def test_the_host_does_not_wait_for_a_snapshot(tmp_path: Any, sync_is_an_error: Callable[[], None]) -> None:
    """Neither at the snapshot nor at the gate; each checkpoint has the weights of its step."""
    weights: dict[int, torch.Tensor] = {}

    class Watching(CallbackInterface):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            weights[global_step] = net.layers[0].weight.detach().clone()
            sync_is_an_error()

    net = Net()
    checkpoints = Checkpoints(every_steps=1, every_minutes=None, at_end=False, keep_last=99, when_busy="wait")
    outcome = train(
        net, callbacks=[Watching()], device="cuda", checkpoints=checkpoints, run_dir=tmp_path / "run", epochs=2
    )
    assert outcome.error is None
    store = CheckpointStore(tmp_path / "run/checkpoints")
    assert len(store.names()) == outcome.result.global_step
    for name in store.names():
        state = Loaded(store.path(name)).state["module"]
        assert torch.equal(state["layers.0.weight"], weights[name.step].cpu())


def test_a_resumed_run_continues_from_the_devices_state(tmp_path: Any) -> None:
    class Dropping(Net):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers.insert(1, nn.Dropout(0.5))
            self.losses: list[float] = []

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            values = super().train_step(global_step, batch, device)
            self.losses.append(values[0].item())
            return values

    run = {"device": "cuda", "seed": 3, "epochs": 2, "run_id": "r", "run_dir": tmp_path / "run"}
    checkpoints = Checkpoints(every_steps=5, every_minutes=None, keep_last=99, when_busy="wait")
    whole, rest = Dropping(), Dropping()
    train(whole, checkpoints=checkpoints, **run)
    train(rest, checkpoints=checkpoints, resume=tmp_path / "run/checkpoints/step-5.a1", **run)
    assert rest.losses == pytest.approx(whole.losses[5:], rel=1e-4)
