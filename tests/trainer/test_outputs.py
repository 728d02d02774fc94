"""Outputs of steps: only kept for hooks that read them, as copies, collated by the contract."""

from __future__ import annotations

import collections
import gc
import logging
import threading
import weakref
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from events.bus.backlog import Payload
from events.messages import ObserverFailed, TrainStepEnded
from events.sink import CALLBACK_DELIVERY
from trainer import CallbackInterface, Delivery, fenced, inline
from trainer.errors import EpochOutputsTooLarge
from trainer.hooks.capture import Capture, Copy, EpochOutputs, collate_steps

Pair = collections.namedtuple("Pair", "rows label")


class Keeps(CallbackInterface):
    """Keeps what the hook of an epoch's end gets."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
        self.seen.append(outputs)


class KeepsSteps(CallbackInterface):
    """Keeps what the hook of a step's end gets."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.seen.append(outputs)


class Clones(TorchDispatchMode):
    """Counts the copies that this thread makes of tensors with eight rows."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copying = func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.copy_)
        self.count += copying and args[0].numel() == 8
        return func(*args, **(kwargs or {}))


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "is kept as a list" in record.getMessage()]


def returning(kit: Any, outputs: Any, **options: Any) -> Any:
    """A module whose training step returns the loss and what ``outputs(self, global_step, batch)`` gives."""

    class Net(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            return self.forward_loss(batch)[0], *outputs(self, global_step, batch)

    return Net(**options)


# -------------------------------------------------------------------------------------------------- too much


def test_an_epoch_that_outgrows_its_limit_ends_with_the_hook_and_the_ways_out_named(kit: Any) -> None:
    """At the step that would not fit, not at the end; the callback keeps its hooks until then."""
    steps = KeepsSteps()
    outcome = kit.train(kit.Net(rows=800), callbacks=[Keeps(), steps], epoch_outputs_limit_bytes=20_000)
    assert isinstance(outcome.error, EpochOutputsTooLarge)
    for part in ("Keeps.on_end_train_epoch", "20,000 bytes", "epoch_outputs_limit_bytes"):
        assert part in str(outcome.error)
    assert 10 < len(steps.seen) < 20


@pytest.mark.parametrize("hook", ["on_end_train_epoch", "on_end_val_epoch"])
def test_callbacks_that_may_fail_are_disabled_when_what_they_want_is_too_much(kit: Any, hook: str) -> None:
    """The run continues, and callbacks without outputs of an epoch keep their hooks."""
    seen: list[Any] = []
    wants = type("Wants", (CallbackInterface,), {hook: lambda self, *outputs, **key: seen.append(outputs)})
    marked = type("Marked", (CallbackInterface,), {hook: inline(lambda self, *outputs, **key: seen.append(outputs))})
    steps = KeepsSteps()
    may_fail = Delivery(on_error="disable")
    outcome = kit.train(
        kit.Net(rows=800),
        callbacks=[(wants(), may_fail), (marked(), may_fail), steps],
        epochs=2,
        epoch_outputs_limit_bytes=20_000,
    )
    assert outcome.result.status == "finished"
    assert seen == []
    assert len(steps.seen) == 200
    failed = outcome.of(ObserverFailed)
    assert [(one.observer, one.during, one.action) for one in failed] == [
        ("Wants", hook, "disabled"),
        ("Marked", hook, "disabled"),
    ]
    assert all("epoch_outputs_limit_bytes" in one.error for one in failed)
    assert [one.state for one in outcome.result.observers if one.observer == "Wants"] == ["disabled"]


def test_a_callback_that_has_failed_already_is_not_blamed_again(kit: Any) -> None:
    """What is kept in the same epoch is of no use to it any more."""

    class FailsFirst(Keeps):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            raise ZeroDivisionError

    member = (FailsFirst(), Delivery(on_error="disable"))
    outcome = kit.train(kit.Net(rows=800), callbacks=[member], epoch_outputs_limit_bytes=20_000)
    assert outcome.result.status == "finished"
    assert [one.during for one in outcome.of(ObserverFailed)] == ["on_end_train_step"]


def test_an_essential_callback_ends_the_run_even_if_others_read_the_outputs(kit: Any) -> None:
    """They are collected once for all."""
    members = [(Keeps(), Delivery(on_error="disable")), Keeps()]
    outcome = kit.train(kit.Net(rows=800), callbacks=members, epoch_outputs_limit_bytes=20_000)
    assert isinstance(outcome.error, EpochOutputsTooLarge)
    assert "Keeps-2.on_end_train_epoch" in str(outcome.error)
    assert [(one.observer, one.action) for one in outcome.of(ObserverFailed)] == [("Keeps-2", "fatal")]


def test_each_epoch_starts_with_empty_outputs(kit: Any) -> None:
    """The limit is one epoch's, and what was collected in the first is not in the second."""
    keeps = Keeps()
    outcome = kit.train(kit.Net(), callbacks=[keeps], epochs=5, epoch_outputs_limit_bytes=3_000)
    assert outcome.result.status == "finished"
    assert [outputs[0].shape for outputs in keeps.seen] == [(2,)] * 5


# ------------------------------------------------------------------------------------------------ what fits


def test_outputs_that_do_not_fit_together_become_a_list_with_exactly_one_notice(
    kit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Ragged tensors and other values, once for each position, for any number of steps."""
    caplog.set_level(logging.WARNING, "stagecast")
    sizes: list[int] = []

    def outputs(net: Any, global_step: int, batch: Any) -> tuple[Any, ...]:
        sizes.append(3 - len(sizes) % 2)
        return torch.full((2, sizes[-1]), float(len(sizes))), f"step {global_step}"

    keeps = KeepsSteps()
    kit.train(returning(kit, outputs, rows=64), callbacks=[keeps], gpu_batch_size_limit=4)
    assert len(keeps.seen) == 8
    for step, (loss, ragged, text) in enumerate(keeps.seen, 1):
        assert loss.shape == (2,)
        assert [tuple(one.shape) for one in ragged] == [(2, 3), (2, 2)]
        assert ragged[0][0, 0] == 2 * step - 1
        assert text == [f"step {step}"] * 2
    assert len(notices(caplog)) == 2
    assert "output 1 " in notices(caplog)[0]
    assert "output 2 " in notices(caplog)[1]


def test_outputs_that_are_ragged_in_many_ways_give_one_notice_too(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Sequences of ever different lengths must fill neither the log nor the memory of earlier warnings."""
    caplog.set_level(logging.WARNING, "stagecast")
    net = returning(kit, lambda net, *_: (torch.zeros(2, next(net.lengths)),), rows=64)
    net.lengths = iter(range(100))
    kit.train(net, callbacks=[KeepsSteps()], gpu_batch_size_limit=4)
    assert len(notices(caplog)) == 1


def test_a_step_gets_the_outputs_of_all_its_micro_batches(kit: Any) -> None:
    """Losses one per micro-batch, rows one after the other; on the observer's as on the loop's thread."""
    inlined: list[tuple[Any, ...]] = []
    net = returning(kit, lambda net, step, batch: (batch[0], batch[1].sum()), rows=20)

    class Inline(CallbackInterface):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            inlined.append(outputs)

    keeps = KeepsSteps()
    kit.train(net, callbacks=[keeps, Inline()], gpu_batch_size_limit=2)
    assert len(keeps.seen) == len(inlined) == 3
    for start, one, other in zip((0, 8, 16), keeps.seen, inlined, strict=True):
        for losses, rows, sums in (one, other):
            assert torch.equal(rows, net.x[start : start + 8])
            assert torch.equal(sums, net.y[start : start + 8].reshape(-1, 2).sum(1))
            assert losses.shape == sums.shape == (len(rows) // 2,)
        assert torch.equal(one[0], other[0])


def test_an_epoch_gets_all_its_steps_in_order(kit: Any) -> None:
    """Over all micro-batches, with the smaller last one; skipped steps leave nothing."""
    net = returning(kit, lambda net, step, batch: (batch[0],), rows=20)
    keeps, steps = Keeps(), KeepsSteps()
    outcome = kit.train(net, callbacks=[keeps, steps], epochs=2, gpu_batch_size_limit=4)
    assert outcome.result.status == "finished"
    for epoch, (losses, rows) in enumerate(keeps.seen):
        assert torch.equal(rows, net.x)
        expected = torch.cat([outputs[0] for outputs in steps.seen[3 * epoch : 3 * epoch + 3]])
        assert torch.equal(losses, expected)
        assert losses.shape == (5,)


def test_a_skipped_step_leaves_no_outputs(kit: Any) -> None:
    """Neither a hook of its own, nor a part in the epoch's."""

    class Diverges(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, _ = self.forward_loss(batch)
            return loss * (float("inf") if torch.equal(batch[0], self.x[8:16]) else 1.0), batch[0]

    keeps, steps, net = Keeps(), KeepsSteps(), Diverges(rows=32)
    outcome = kit.train(net, callbacks=[keeps, steps], non_finite="skip")
    assert outcome.result.global_step == 3
    assert len(steps.seen) == 3
    ((losses, rows),) = keeps.seen
    assert torch.equal(rows, torch.cat([net.x[:8], net.x[16:]]))
    assert torch.isfinite(losses).all()


def test_tensors_in_containers_are_copied_too(kit: Any) -> None:
    """Of any nesting; the containers keep their types, and other values are the same objects."""
    label = object()

    def outputs(net: Any, global_step: int, batch: Any) -> tuple[Any, ...]:
        net.rows = getattr(net, "rows", torch.zeros(2, requires_grad=True))
        with torch.no_grad():
            net.rows += 1
        return {"rows": net.rows * 1}, [net.rows], Pair(net.rows, label)

    keeps = Keeps()
    kit.train(returning(kit, outputs), callbacks=[keeps])
    ((_, mappings, lists, pairs),) = keeps.seen
    for step in (0, 1):
        for rows in (mappings[step]["rows"], lists[step][0], pairs[step].rows):
            assert rows.tolist() == [step + 1.0] * 2
            assert not rows.requires_grad
        assert type(pairs[step]) is Pair
        assert pairs[step].label is label


# --------------------------------------------------------------------------------------- only where wanted


def test_outputs_are_only_copied_for_stages_with_a_reader(kit: Any) -> None:
    """A hook after validation does not make the training steps keep theirs, nor the other way round."""

    class OnlyVal(CallbackInterface):
        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None: ...

    def clones(*callbacks: Any) -> int:
        with Clones() as count:
            kit.train(kit.Net(rows=32), callbacks=callbacks, max_val_steps_per_epoch=3)
        return count.count

    assert [clones(), clones(OnlyVal()), clones(Keeps()), clones(KeepsSteps())] == [0, 3, 4, 4]
    assert clones(Keeps(), KeepsSteps(), KeepsSteps()) == 4, "all share one copy"


def test_nothing_is_copied_for_a_callback_that_was_disabled(kit: Any) -> None:
    """In the epochs after that in which it failed."""
    with Clones() as count:
        member = (Keeps(), Delivery(on_error="disable"))
        outcome = kit.train(kit.Net(rows=800), callbacks=[member], epochs=3, epoch_outputs_limit_bytes=20_000)
    assert len(outcome.of(ObserverFailed)) == 1
    assert 0 < count.count <= 100


@pytest.mark.parametrize("hook", ["on_end_train_epoch", "on_end_val_epoch"])
def test_epochs_outputs_count_in_the_queue_of_whom_they_wait_for(kit: Any, hook: str) -> None:
    """One that is slow at the end of each epoch holds the loop, not the memory of all epochs."""
    loop = threading.current_thread()
    held: list[bool] = []

    def hold(self: Any, *outputs: Any, **key: Any) -> None:
        if not held:
            kit.wait_until_in(loop, "_wait_for_room")
            held.append(True)

    class Net(kit.Net):
        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            return self.forward_loss(batch)[0], torch.zeros(8, 1_000)

        train_step = val_step

    # Room for a hundred events, but not for two with their outputs.
    delivery = kit.replace(CALLBACK_DELIVERY, capacity_bytes=400_000, latency_s=0.001)
    slow = type("Slow", (CallbackInterface,), {hook: hold})
    outcome = kit.train(Net(rows=80), callbacks=[(slow(), delivery)], epochs=50)
    assert held == [True]
    assert outcome.result.ledger.backpressure_s > 0


def test_each_callback_may_change_what_it_gets(kit: Any) -> None:
    """At a step's end and at an epoch's, others have tensors of their own, inside of containers too."""
    seen: list[float] = []

    class Spoils(CallbackInterface):
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            _, ones, nested = outputs
            ones.zero_()
            nested[0]["ones"].zero_()

        on_end_train_epoch = on_end_train_step

    class Sums(CallbackInterface):
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            _, ones, nested = outputs
            seen.append(float(ones.sum() + nested[0]["ones"].sum()))

        on_end_train_epoch = on_end_train_step

    net = returning(kit, lambda self, step, batch: (torch.ones(8), {"ones": torch.ones(8)}), rows=16)
    outcome = kit.train(net, callbacks=[Spoils(), Sums(), Spoils()])
    assert outcome.result.status == "finished"
    assert seen == [16.0, 16.0, 24.0]


def test_callbacks_may_change_a_loss_that_is_the_only_output(kit: Any) -> None:
    """Neither the other callback, nor the events, nor the epoch's outputs and mean see it."""

    class Zeroes(CallbackInterface):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            self.seen.append(float(outputs[0]))
            outputs[0].zero_()

    class Epochs(CallbackInterface):
        def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
            self.seen = outputs[0].tolist()

    class Net(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            return super().train_step(global_step, batch, device)[0]

    members = [Zeroes(), Zeroes(), Epochs()]
    outcome = kit.train(Net(rows=400), callbacks=members, epochs=1)
    losses = [event.loss for event in outcome.of(TrainStepEnded)]
    assert min(losses) > 0
    assert members[0].seen == members[1].seen == members[2].seen == losses
    assert outcome.result.metrics["train_epoch_loss"] == pytest.approx(sum(losses) / len(losses))
    alone = [Zeroes()]
    assert [event.loss for event in kit.train(Net(rows=400), callbacks=alone).of(TrainStepEnded)] == alone[0].seen


def test_the_numbers_of_a_batch_are_collated_in_one_call(kit: Any) -> None:
    """As one by one, whatever is beside them; the callback's thread releases the interpreter once, not at each step."""
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
    assert calls.count("stack") == 2  # of each type one
    assert list(found) == [0, 1, 2, 3]
    for index, outputs in found.items():
        long_way = payloads[index].outputs.collated()
        assert [one.tolist() for one in outputs] == [one.tolist() for one in long_way]
        assert [one.shape for one in outputs] == [one.shape for one in long_way]
        for own in outputs:
            own.zero_()
        assert payloads[index].outputs.collated()[1].unique().tolist() == [float(index)]


def test_a_module_may_change_its_loss_when_the_step_is_over(kit: Any) -> None:
    """A running mean that begins as the first loss, say: the event still has the step's."""
    losses: list[float] = []

    class Net(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, _ = self.forward_loss(batch)
            losses.append(loss.item())
            if global_step == 1:
                self.mean = loss.detach()
            else:
                self.mean.mul_(0.5).add_(loss.detach(), alpha=0.5)
            return loss

    outcome = kit.train(Net(rows=32))
    assert [event.loss for event in outcome.of(TrainStepEnded)] == pytest.approx(losses)


def test_outputs_are_released_when_their_hook_has_returned(kit: Any) -> None:
    """A run of any length holds those of a few steps only."""
    alive: list[int] = []
    refs: list[weakref.ref[Any]] = []

    class Looks(CallbackInterface):
        @fenced
        def on_end_train_step(self, global_step: int, loss: Any, predicted: Any) -> None:
            gc.collect(0)
            alive.append(sum(ref() is not None for ref in refs))
            refs.append(weakref.ref(predicted))

    kit.train(kit.Net(rows=160), callbacks=[Looks()])
    assert len(alive) == 20
    assert max(alive) <= 2


def test_a_queue_limited_in_bytes_loses_no_outputs(kit: Any) -> None:
    """Outputs far beyond what may wait: the loop waits, and the hook gets every one of them."""
    delivery = kit.replace(CALLBACK_DELIVERY, capacity_bytes=10_000)
    net = returning(kit, lambda net, step, batch: (torch.full((1_000,), float(step)),), rows=240)
    keeps = KeepsSteps()
    outcome = kit.train(net, callbacks=[(keeps, delivery)], val_interval_epochs=0)
    assert outcome.result.status == "finished"
    assert [outputs[1].unique().tolist() for outputs in keeps.seen] == [[float(step)] for step in range(1, 31)]


# ------------------------------------------------------------------------------------------------- the parts


class Arrival:
    """Stands for a device's event: waiting for it fills the host tensor, as a copy that is under way does."""

    def __init__(self, host: torch.Tensor, value: float) -> None:
        self.host, self.value = host, value

    def synchronize(self) -> None:
        self.host.fill_(self.value)


def late(value: float) -> Copy:
    host = torch.zeros(2)
    return Copy((host,), 8, Arrival(host, value))  # type: ignore[arg-type]


def host_capture(told: list[str]) -> Capture:
    return Capture(torch.device("cpu"), told.append)


def test_copies_that_are_under_way_are_waited_for() -> None:
    """The reader waits: for all micro-batches of a step."""
    (values,) = host_capture([]).of_step([late(1.0), late(2.0)]).collated()
    assert values.tolist() == [1.0, 1.0, 2.0, 2.0]


def test_an_epoch_waits_for_its_copies_although_the_last_step_has_none() -> None:
    """Copies arrive in order, so the last of them is waited for, wherever it is."""
    outputs = EpochOutputs(10_000, "test", print)
    outputs.append(late(3.0))
    outputs.append(Copy((torch.ones(2),), 8))
    assert outputs.collated()[0].tolist() == [3.0, 3.0, 1.0, 1.0]


def test_outputs_beyond_the_limit_are_released_at_once() -> None:
    """Unless that is an error: then earlier outputs are kept for its handler."""
    told: list[Exception] = []
    patient = EpochOutputs(3_000, "test", print, told.append)
    strict = EpochOutputs(3_000, "test", print)
    for outputs in (patient, strict):
        outputs.append(Copy((torch.ones(400),), 1_600))
        assert outputs.nbytes > 1_600
    patient.append(Copy((torch.ones(400),), 1_600))
    with pytest.raises(EpochOutputsTooLarge):
        strict.append(Copy((torch.ones(400),), 1_600))
    patient.append(Copy((torch.ones(1),), 4))
    assert [type(error) for error in told] == [EpochOutputsTooLarge]
    assert (patient.nbytes, patient.collated()) == (0, ())
    assert strict.collated()[0].shape == (400,)


def test_outputs_are_collated_once_for_all_who_ask() -> None:
    """On several threads at the same time."""
    told: list[str] = []
    capture = host_capture(told)
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
    assert len(told) == 1


def test_the_pieces_of_a_step_are_released_once_they_are_collated() -> None:
    """Or its outputs would be held twice until the next step comes."""
    capture = host_capture([])
    outputs = capture.of_step([capture.copy((torch.ones(8), torch.ones(()))) for _ in range(2)])
    pieces = [weakref.ref(tensor) for copy in outputs.copies for tensor in copy.values]
    assert outputs.collated()[0].shape == (16,)
    assert [ref() for ref in pieces] == [None] * 4


@pytest.mark.parametrize("shape", [(), (8,)])
def test_a_capture_shares_no_memory_and_counts_the_bytes_it_copies(shape: tuple[int, ...]) -> None:
    """Of tensors, in containers too, or of a loss alone; other values are unchanged."""
    rows = torch.ones(shape, requires_grad=True)
    alone = host_capture([]).copy((rows,))
    several = host_capture([]).copy((rows, [rows.double()], "text", 3))
    assert alone.nbytes == rows.numel() * 4
    assert several.nbytes == rows.numel() * (4 + 8)
    for copied in (alone, several):
        assert copied.arrived is None
        assert copied.wait()[0].data_ptr() != rows.data_ptr()
        assert not copied.wait()[0].requires_grad
    assert several.wait()[2:] == ("text", 3)
