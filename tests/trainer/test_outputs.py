"""Outputs of steps: kept only for hooks that read them, as copies, collated by the contract."""

from __future__ import annotations

import collections
import gc
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from support.threads import WAIT_S, wait_until_in
from support.training import Net, train
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from events.bus.backlog import Payload
from events.messages import ObserverFailed, TrainStepEnded
from events.sink import CALLBACK_DELIVERY
from trainer import CallbackInterface, Delivery, fenced, inline
from trainer.callback_interface import LANE_ATTRIBUTE, Lane
from trainer.errors import EpochOutputsTooLarge
from trainer.hooks.capture import Capture, Copy, EpochOutputs, collate_steps

Pair = collections.namedtuple("Pair", "rows label")
STEP, EPOCH, VAL = "on_end_train_step", "on_end_train_epoch", "on_end_val_epoch"
MAY_FAIL = Delivery(on_error="disable")


class Keeps(CallbackInterface):
    """Base of callbacks that keep what one hook receives."""

    seen: list[tuple[Any, ...]]


def keeping(hook: str, lane: Callable[[Any], Any] = lambda hook: hook, name: str = "Keeps") -> Keeps:
    def keep(self: Keeps, global_step: int, *outputs: Any, **key: Any) -> None:
        self.seen.append(outputs)

    made: Keeps = type(name, (Keeps,), {hook: lane(keep), "seen": []})()
    return made


class Clones(TorchDispatchMode):
    """Counts the copies that this thread makes of tensors with eight rows."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copying = func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.copy_)
        self.count += copying and args[0].numel() == 8
        return func(*args, **(kwargs or {}))


def returning(outputs: Callable[[Net, int, Any], tuple[Any, ...]], **options: Any) -> Net:
    """A module whose training step returns the loss and these outputs."""
    return Net(train_step=lambda net, step, batch: (net.forward_loss(batch)[0], *outputs(net, step, batch)), **options)


# -------------------------------------------------------------------------------------------------- too much


@pytest.mark.parametrize("may_fail", [False, True])
def test_an_epoch_that_exceeds_its_limit_fails_at_that_step_for_an_essential_callback(may_fail: bool) -> None:
    """The error names the hook and the argument, also if a callback that may fail reads the same outputs."""
    steps = keeping(STEP)
    members = [(keeping(EPOCH), MAY_FAIL), keeping(EPOCH)] if may_fail else [keeping(EPOCH)]
    outcome = train(Net(rows=800), callbacks=[*members, steps], epoch_outputs_limit_bytes=20_000)
    name = "Keeps-2" if may_fail else "Keeps"
    assert isinstance(outcome.error, EpochOutputsTooLarge)
    for part in (f"{name}.on_end_train_epoch", "20,000 bytes", "epoch_outputs_limit_bytes"):
        assert part in str(outcome.error)
    assert [(one.observer, one.action) for one in outcome.of(ObserverFailed)] == [(name, "fatal")]
    assert 10 < len(steps.seen) < 20


@pytest.mark.parametrize("hook", [EPOCH, VAL])
def test_callbacks_that_may_fail_are_disabled_when_their_outputs_are_too_large(hook: str) -> None:
    """The run continues, nothing is copied for them in later epochs, and callbacks without outputs keep their hooks."""
    wants, marked, steps = keeping(hook, name="Wants"), keeping(hook, inline, "Marked"), keeping(STEP)
    members = [(wants, MAY_FAIL), (marked, MAY_FAIL), steps]
    outcome = train(Net(rows=800), callbacks=members, epochs=2, epoch_outputs_limit_bytes=20_000)
    assert outcome.result.status == "finished"
    assert wants.seen == marked.seen == []
    assert len(steps.seen) == 200
    failed = outcome.of(ObserverFailed)
    expected = [("Wants", hook, "disabled"), ("Marked", hook, "disabled")]
    assert [(one.observer, one.during, one.action) for one in failed] == expected
    assert all("epoch_outputs_limit_bytes" in one.error for one in failed)
    assert [one.state for one in outcome.result.observers if one.observer == "Wants"] == ["disabled"]
    with Clones() as clones:
        member = (keeping(EPOCH), MAY_FAIL)
        train(Net(rows=800), callbacks=[member], epochs=3, epoch_outputs_limit_bytes=20_000)
    assert 0 < clones.count <= 100


def test_a_callback_that_has_failed_already_is_not_reported_again() -> None:
    class FailsFirst(CallbackInterface):
        def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None: ...

        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            raise ZeroDivisionError

    outcome = train(Net(rows=800), callbacks=[(FailsFirst(), MAY_FAIL)], epoch_outputs_limit_bytes=20_000)
    assert outcome.result.status == "finished"
    assert [one.during for one in outcome.of(ObserverFailed)] == [STEP]


def test_each_epoch_starts_with_empty_outputs() -> None:
    keeps = keeping(EPOCH)
    outcome = train(Net(), callbacks=[keeps], epochs=5, epoch_outputs_limit_bytes=3_000)
    assert outcome.result.status == "finished"
    assert [outputs[0].shape for outputs in keeps.seen] == [(2,)] * 5


# ------------------------------------------------------------------------------------------------ what fits


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "is kept as a list" in text]


def test_outputs_that_do_not_fit_together_become_a_list_with_one_notice(caplog: pytest.LogCaptureFixture) -> None:
    """One per position, for ragged tensors and other values, for any number of steps."""
    caplog.set_level(logging.WARNING, "stagecast")
    sizes: list[int] = []

    def outputs(net: Net, global_step: int, batch: Any) -> tuple[Any, ...]:
        sizes.append(3 - len(sizes) % 2)
        return torch.full((2, sizes[-1]), float(len(sizes))), f"step {global_step}"

    keeps = keeping(STEP)
    train(returning(outputs, rows=64), callbacks=[keeps], gpu_batch_size_limit=4)
    assert len(keeps.seen) == 8
    for step, (loss, ragged, text) in enumerate(keeps.seen, 1):
        assert loss.shape == (2,)
        assert [tuple(one.shape) for one in ragged] == [(2, 3), (2, 2)]
        assert ragged[0][0, 0] == 2 * step - 1
        assert text == [f"step {step}"] * 2
    assert ["output 1 " in notices(caplog)[0], "output 2 " in notices(caplog)[1], len(notices(caplog))] == [1, 1, 2]


def test_outputs_of_ever_different_lengths_give_one_notice(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "stagecast")
    lengths = iter(range(100))
    net = returning(lambda *_: (torch.zeros(2, next(lengths)),), rows=64)
    train(net, callbacks=[keeping(STEP)], gpu_batch_size_limit=4)
    assert len(notices(caplog)) == 1


def test_a_step_and_an_epoch_receive_the_outputs_of_all_micro_batches_in_order() -> None:
    """One loss per micro-batch and the rows one after the other, on the observer's and on the loop's thread."""
    net = returning(lambda net, step, batch: (batch[0], batch[1].sum()), rows=20)
    steps, inlined, epochs = keeping(STEP), keeping(STEP, inline), keeping(EPOCH)
    train(net, callbacks=[steps, inlined, epochs], epochs=2, gpu_batch_size_limit=2)
    assert len(steps.seen) == len(inlined.seen) == 6
    for start, one, other in zip((0, 8, 16) * 2, steps.seen, inlined.seen, strict=True):
        for losses, rows, sums in (one, other):
            assert torch.equal(rows, net.x[start : start + 8])
            assert torch.equal(sums, net.y[start : start + 8].reshape(-1, 2).sum(1))
            assert losses.shape == sums.shape == (len(rows) // 2,)
        assert torch.equal(one[0], other[0])
    assert len(epochs.seen) == 2
    for epoch, (losses, rows, _) in enumerate(epochs.seen):
        assert torch.equal(rows, net.x)
        assert torch.equal(losses, torch.cat([outputs[0] for outputs in steps.seen[3 * epoch : 3 * epoch + 3]]))


def test_a_skipped_step_leaves_no_outputs() -> None:
    """Neither a hook of its own, nor a part in the epoch's."""

    def step(net: Net, global_step: int, batch: Any) -> Any:
        factor = float("inf") if torch.equal(batch[0], net.x[8:16]) else 1.0
        return net.forward_loss(batch)[0] * factor, batch[0]

    epochs, steps, net = keeping(EPOCH), keeping(STEP), Net(rows=32, train_step=step)
    outcome = train(net, callbacks=[epochs, steps], non_finite="skip")
    assert outcome.result.global_step == len(steps.seen) == 3
    ((losses, rows),) = epochs.seen
    assert torch.equal(rows, torch.cat([net.x[:8], net.x[16:]]))
    assert torch.isfinite(losses).all()


def test_tensors_in_containers_are_copied_too() -> None:
    """The containers keep their types, and other values are the same objects."""
    label, kept = object(), torch.zeros(2, requires_grad=True)

    def outputs(net: Net, global_step: int, batch: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            kept.add_(1)
        return {"rows": kept * 1}, [kept], Pair(kept, label)

    keeps = keeping(EPOCH)
    train(returning(outputs), callbacks=[keeps])
    ((_, mappings, lists, pairs),) = keeps.seen
    for step in (0, 1):
        for rows in (mappings[step]["rows"], lists[step][0], pairs[step].rows):
            assert rows.tolist() == [step + 1.0] * 2
            assert not rows.requires_grad
        assert type(pairs[step]) is Pair
        assert pairs[step].label is label


# --------------------------------------------------------------------------------------- only where wanted


def test_outputs_are_copied_once_for_all_readers_of_a_stage() -> None:
    """A hook after validation does not make the training steps keep theirs, nor the reverse."""

    def clones(*hooks: str) -> int:
        with Clones() as clones:
            train(Net(rows=32), callbacks=[keeping(hook) for hook in hooks], max_val_steps_per_epoch=3)
        return clones.count

    assert [clones(), clones(VAL), clones(EPOCH), clones(STEP), clones(EPOCH, STEP, STEP)] == [0, 3, 4, 4, 4]


@pytest.mark.parametrize("hook", [EPOCH, VAL])
def test_epoch_outputs_count_in_the_queue_of_their_reader(hook: str) -> None:
    """A slow reader holds the loop, and memory holds the outputs of few epochs."""
    loop = threading.current_thread()
    held: list[bool] = []

    def hold(self: Any, *outputs: Any, **key: Any) -> None:
        if not held:
            wait_until_in(loop, "_wait_for_room")
            held.append(True)

    def step(net: Net, global_step: int, batch: Any) -> Any:
        return net.forward_loss(batch)[0], torch.zeros(8, 1_000)

    # Room for a hundred events, but not for two with their outputs.
    delivery = msgspec.structs.replace(CALLBACK_DELIVERY, capacity_bytes=400_000, latency_s=0.001)
    slow = type("Slow", (CallbackInterface,), {hook: hold})
    outcome = train(Net(rows=80, train_step=step, val_step=step), callbacks=[(slow(), delivery)], epochs=50)
    assert held == [True]
    assert outcome.result.ledger.backpressure_s > 0


def test_a_queue_limited_in_bytes_loses_no_outputs() -> None:
    delivery = msgspec.structs.replace(CALLBACK_DELIVERY, capacity_bytes=10_000)
    net = returning(lambda net, step, batch: (torch.full((1_000,), float(step)),), rows=240)
    keeps = keeping(STEP)
    outcome = train(net, callbacks=[(keeps, delivery)], val_interval_epochs=0)
    assert outcome.result.status == "finished"
    assert [outputs[1].unique().tolist() for outputs in keeps.seen] == [[float(step)] for step in range(1, 31)]


def test_each_callback_may_change_its_outputs() -> None:
    """Other callbacks have tensors of their own, in containers too, for a step and for an epoch."""
    seen: list[float] = []
    spoiled = threading.Semaphore(0)

    class Spoils(CallbackInterface):
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            _, ones, nested = outputs
            ones.zero_()
            nested[0]["ones"].zero_()
            spoiled.release()

        on_end_train_epoch = on_end_train_step

    class Sums(CallbackInterface):
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            _, ones, nested = outputs
            assert all(spoiled.acquire(timeout=WAIT_S) for _ in range(2))
            seen.append(float(ones.sum() + nested[0]["ones"].sum()))

        on_end_train_epoch = on_end_train_step

    net = returning(lambda net, step, batch: (torch.ones(8), {"ones": torch.ones(8)}))
    outcome = train(net, callbacks=[Spoils(), Sums(), Spoils()])
    assert outcome.result.status == "finished"
    assert seen == [16.0, 16.0, 24.0]


@pytest.mark.parametrize("with_epoch", [True, False])
def test_callbacks_may_change_a_loss_that_is_the_only_output(with_epoch: bool) -> None:
    """Neither other callbacks, nor the events, nor the epoch's outputs and mean see it."""

    class Zeroes(CallbackInterface):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            self.seen.append(float(outputs[0]))
            outputs[0].zero_()

    zeroes, epoch = [Zeroes(), Zeroes()] if with_epoch else [Zeroes()], keeping(EPOCH)
    net = Net(rows=400, train_step=lambda net, step, batch: net.forward_loss(batch)[0])
    outcome = train(net, callbacks=[*zeroes, *([epoch] if with_epoch else [])])
    losses = [event.loss for event in outcome.of(TrainStepEnded)]
    assert min(losses) > 0
    assert all(one.seen == losses for one in zeroes)
    assert not with_epoch or epoch.seen[0][0].tolist() == losses
    assert outcome.result.metrics["train_epoch_loss"] == pytest.approx(sum(losses) / len(losses))


def test_the_losses_of_many_steps_are_collated_in_one_call() -> None:
    """With the same values as one by one; the callback's thread releases the interpreter once, not per step."""
    capture = Capture(torch.device("cpu"), lambda text: None)
    made = [(torch.tensor(float(i)), torch.full((2, 3), float(i)), torch.tensor(i)) for i in range(6)]
    groups: list[list[Any]] = [[values] for values in made[:4]] + [[made[4], made[5]], [(torch.tensor(1.0), "text")]]
    payloads = [Payload(capture.of_step([capture.copy(values) for values in group], shared=True)) for group in groups]
    calls: list[str] = []

    class Counting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Counting():
        found = collate_steps([(None, payload) for payload in payloads])  # type: ignore[misc]
    assert calls.count("stack") == 2  # one per type
    assert list(found) == [0, 1, 2, 3]
    for index, outputs in found.items():
        long_way = payloads[index].outputs.collated()
        assert [(one.tolist(), one.shape) for one in outputs] == [(one.tolist(), one.shape) for one in long_way]
        for own in outputs:
            own.zero_()
        assert payloads[index].outputs.collated()[1].unique().tolist() == [float(index)]


def test_a_module_may_change_its_loss_after_the_step() -> None:
    """A running mean that starts as the first loss, for example: the event has the loss of the step."""
    losses: list[float] = []
    mean: list[torch.Tensor] = []

    def step(net: Net, global_step: int, batch: Any) -> Any:
        loss, _ = net.forward_loss(batch)
        losses.append(loss.item())
        if mean:
            mean[0].mul_(0.5).add_(loss.detach(), alpha=0.5)
        else:
            mean.append(loss.detach())
        return loss

    outcome = train(Net(rows=32, train_step=step))
    assert [event.loss for event in outcome.of(TrainStepEnded)] == pytest.approx(losses)


def test_outputs_are_released_when_their_hook_has_returned() -> None:
    alive: list[int] = []
    refs: list[weakref.ref[Any]] = []

    class Looks(CallbackInterface):
        @fenced
        def on_end_train_step(self, global_step: int, loss: Any, predicted: Any) -> None:
            gc.collect(0)
            alive.append(sum(ref() is not None for ref in refs))
            refs.append(weakref.ref(predicted))

    train(Net(rows=160), callbacks=[Looks()])
    assert len(alive) == 20
    assert max(alive) <= 2


# ------------------------------------------------------------------------------------------------- the parts


class Arrival:
    """A device's event: waiting for it fills the host tensor, as a pending copy does."""

    def __init__(self, host: torch.Tensor, value: float) -> None:
        self.host, self.value = host, value

    def synchronize(self) -> None:
        self.host.fill_(self.value)


def late(value: float) -> Copy:
    host = torch.zeros(2)
    return Copy((host,), 8, Arrival(host, value))  # type: ignore[arg-type]


def host_capture(notices: list[str]) -> Capture:
    return Capture(torch.device("cpu"), notices.append)


def test_the_reader_waits_for_pending_copies() -> None:
    """Of all micro-batches of a step; of an epoch too, although its last step has none."""
    (values,) = host_capture([]).of_step([late(1.0), late(2.0)]).collated()
    assert values.tolist() == [1.0, 1.0, 2.0, 2.0]
    outputs = EpochOutputs(10_000, "test", print)
    outputs.append(late(3.0))
    outputs.append(Copy((torch.ones(2),), 8))
    assert outputs.collated()[0].tolist() == [3.0, 3.0, 1.0, 1.0]


def test_outputs_beyond_the_limit_are_released_at_once() -> None:
    """Unless that is an error: then earlier outputs are kept for its handler."""
    reported: list[Exception] = []
    patient = EpochOutputs(3_000, "test", print, reported.append)
    strict = EpochOutputs(3_000, "test", print)
    for outputs in (patient, strict):
        outputs.append(Copy((torch.ones(400),), 1_600))
        assert outputs.nbytes > 1_600
    patient.append(Copy((torch.ones(400),), 1_600))
    with pytest.raises(EpochOutputsTooLarge):
        strict.append(Copy((torch.ones(400),), 1_600))
    patient.append(Copy((torch.ones(1),), 4))
    assert [type(error) for error in reported] == [EpochOutputsTooLarge]
    assert (patient.nbytes, patient.collated()) == (0, ())
    assert strict.collated()[0].shape == (400,)


def test_outputs_are_collated_once_for_all_threads_that_ask() -> None:
    said: list[str] = []
    capture = host_capture(said)
    outputs = capture.of_step([capture.copy((torch.ones(2), "a")), capture.copy((torch.ones(2), "b"))])
    start = threading.Barrier(4)
    results: list[Any] = []

    def ask() -> None:
        start.wait(20)
        results.append(outputs.collated())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(result is results[0] for result in results)
    assert len(said) == 1


def test_the_parts_of_a_step_are_released_once_they_are_collated() -> None:
    capture = host_capture([])
    outputs = capture.of_step([capture.copy((torch.ones(8), torch.ones(()))) for _ in range(2)])
    parts = [weakref.ref(tensor) for copy in outputs.copies for tensor in copy.values]
    assert outputs.collated()[0].shape == (16,)
    assert [ref() for ref in parts] == [None] * 4


@pytest.mark.parametrize("shape", [(), (8,)])
def test_a_capture_shares_no_memory_and_counts_the_bytes_it_copies(shape: tuple[int, ...]) -> None:
    """Of tensors, in containers too, or of a loss alone; other values are unchanged."""
    rows = torch.ones(shape, requires_grad=True)
    alone = host_capture([]).copy((rows,))
    several = host_capture([]).copy((rows, [rows.double()], "text", 3))
    assert (alone.nbytes, several.nbytes) == (rows.numel() * 4, rows.numel() * (4 + 8))
    for copied in (alone, several):
        assert copied.arrived is None
        assert copied.wait()[0].data_ptr() != rows.data_ptr()
        assert not copied.wait()[0].requires_grad
    assert several.wait()[2:] == ("text", 3)


@pytest.mark.parametrize("lane", ["observer", "fenced"])
def test_no_outputs_are_copied_for_a_hook_that_takes_none(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(CallbackInterface):
        steps = 0

        def on_end_train_step(self, global_step: int) -> None:
            self.steps += 1

    setattr(Counts.on_end_train_step, LANE_ATTRIBUTE, Lane(lane))
    copies: list[Any] = []
    monkeypatch.setattr(Capture, "copy", lambda self, values: copies.append(values))
    callback = Counts()
    outcome = train(Net(), callbacks=[callback], epochs=1)
    assert outcome.error is None
    assert (callback.steps, copies) == (2, [])


def test_a_hook_without_outputs_runs_beside_one_that_takes_them() -> None:
    class Counts(CallbackInterface):
        steps = 0

        def on_end_train_step(self, global_step: int) -> None:
            self.steps += 1

    class Takes(CallbackInterface):
        def __init__(self) -> None:
            self.rows: list[int] = []

        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            self.rows.append(len(outputs[1]))

    counts, takes = Counts(), Takes()
    outcome = train(Net(rows=80), callbacks=[counts, takes], epochs=2)
    assert outcome.error is None
    assert (counts.steps, takes.rows) == (20, [8] * 20)
