"""Lanes: the thread, the arguments and the cost of each hook."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.scripts import ROOT
from support.threads import WAIT_S, trainer_threads
from support.training import LANES, Diary, Net, hooked, make_trainer, train
from torch.utils._python_dispatch import TorchDispatchMode

from events.messages import BackwardEnded, MetricsLogged
from events.sink import CALLBACK_DELIVERY
from sinks import Memory
from trainer import CallbackInterface, Delivery, ModuleInterface, inline, module_interface, observer
from trainer.callback_interface import HOOKS, LANE_ATTRIBUTE
from trainer.errors import SignatureError
from trainer.hooks.hooks import EVENT_OF_HOOK, CallbackHooks


def table_of(text: str) -> list[str]:
    """The rows of the table of lanes in a text."""
    lines = text.splitlines()
    begin = lines.index("| hook | owner | lane | thread | receives |") + 2
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[begin:])
    return [row.strip() for row in rows]


TABLE = table_of(inspect.getdoc(module_interface) or "")
TABLED = {
    (hook.strip("`"), owner): lane
    for hook, owners, lane in (row.strip("| ").split(" | ")[:3] for row in TABLE)
    for owner in owners.split(", ")
}
"""By hook and owner."""


# ----------------------------------------------------------------------------------------------- which lane


def test_one_table_of_lanes_is_in_the_contract_and_in_the_guide() -> None:
    assert table_of((ROOT / "trainer" / "README.md").read_text()) == TABLE
    assert sorted(TABLED) == sorted((name, owner) for name in HOOKS for owner in ("module", "callback"))


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("mark", [None, *LANES])
@pytest.mark.parametrize("owner", [CallbackInterface, ModuleInterface])
def test_the_lane_is_the_marked_one_or_the_contracts_default(name: str, mark: str | None, owner: type) -> None:
    kind = hooked(name, lambda *_: None, mark, owner)
    kind.__abstractmethods__ = frozenset()
    hooks = CallbackHooks(kind(), None)
    default = TABLED[name, "module" if owner is ModuleInterface else "callback"]
    event = EVENT_OF_HOOK[name]
    lane = "inline" if event in hooks.inline else "fenced" if event in hooks.fenced else "observer"
    assert lane == (mark or default)
    assert (event in hooks.observed) == (lane != "inline")
    assert {*hooks.inline, *hooks.observed} == {event}


def test_a_fenced_hook_returns_before_the_loop_continues() -> None:
    """A hook that the loop does not wait for would see the next forward pass."""
    forward = threading.Event()
    order: list[str] = []

    def hold(name: str) -> Callable[..., None]:
        def hook(self: Any, global_step: int, *outputs: Any, **key: Any) -> None:
            assert threading.current_thread() is not threading.main_thread()
            forward.clear()
            assert not forward.wait(0.05)
            order.append(name)

        return hook

    class Own(Net):
        on_begin_train_epoch = hold("module begin")
        on_end_val_epoch = hold("module val")
        on_end_train_epoch = hold("module epoch")
        on_end_train = hold("module end")

        def forward_loss(self, batch: Any) -> Any:
            forward.set()
            order.append("forward")
            return super().forward_loss(batch)

    probes = [hooked("on_begin_train_epoch", hold("begin"))(), hooked("on_end_train_step", hold("step"), "fenced")()]
    outcome = train(Own(rows=8), callbacks=probes, epochs=2)
    assert outcome.result.status == "finished"
    epoch = ["forward", "step", "forward", "module val", "module epoch"]
    begins = ["begin", "module begin"]
    assert sorted(order[:2]) == sorted(order[7:9]) == begins
    assert order[2:7] == order[9:14] == epoch
    assert order[14:] == ["module end"]


def test_the_loop_does_not_wait_for_a_hook_with_an_observer_mark() -> None:
    """Hooks that would be fenced see the loop's next step while they run."""
    waited: list[str] = []
    steps = [threading.Event() for _ in range(4)]

    class Own(Net):
        @observer
        def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
            assert steps[global_step].wait(WAIT_S)
            waited.append("begin")

        @observer
        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
            assert global_step == 4 or steps[global_step].wait(WAIT_S)
            waited.append("val")

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            steps[global_step - 1].set()
            return super().train_step(global_step, batch, device)

    assert train(Own(), epochs=2).result.status == "finished"
    assert waited == ["begin", "val"] * 2


# ----------------------------------------------------------------------------------------- the observer lane


def test_observers_run_in_order_each_on_a_thread_of_its_own() -> None:
    other_is_done = threading.Event()

    class Patient(Diary):
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            assert other_is_done.wait(WAIT_S)
            super().on_end_train_step(global_step, *outputs)

    class Quick(Diary):
        def on_end_train(self, global_step: int) -> None:
            super().on_end_train(global_step)
            other_is_done.set()

    one, other = Patient(), Quick()
    train(Net(rows=64), callbacks=[one, other])
    assert (one.threads, other.threads) == ({"stagecast-Patient"}, {"stagecast-Quick"})
    steps = ["on_end_train_step"] * 8
    ends = ["on_end_val_epoch", "on_end_train_epoch", "on_end_train"]
    assert one.names == other.names == ["on_begin_train_epoch", *steps, *ends]
    assert [step for step, _ in one.of("on_end_train_step")] == list(range(1, 9))


def test_observers_get_copies_that_the_next_step_does_not_change() -> None:
    """Detached, although the step overwrites the same memory."""
    returned: list[torch.Tensor] = []
    overwritten = threading.Event()
    seen: list[tuple[Any, ...]] = []

    def step(net: Net, global_step: int, batch: Any) -> Any:
        loss, predicted = net.forward_loss(batch)
        buffer = net.buffer = getattr(net, "buffer", torch.zeros_like(predicted))
        buffer.copy_(predicted.detach())
        returned.append(buffer.clone())
        if global_step == 4:
            overwritten.set()
        return loss, buffer, predicted

    def keep(self: Any, global_step: int, *outputs: Any) -> None:
        assert overwritten.wait(WAIT_S)
        seen.append(outputs)

    train(Net(rows=32, train_step=step), callbacks=[hooked("on_end_train_step", keep)()])
    assert len(seen) == 4
    for (loss, buffer, predicted), expected in zip(seen, returned, strict=True):
        assert [tensor.requires_grad for tensor in (loss, buffer, predicted)] == [False] * 3
        assert torch.equal(buffer, expected)
        assert torch.equal(predicted, expected)
        assert loss.shape == (1,)


@pytest.mark.anyio
async def test_a_callback_slower_than_the_loop_gets_every_hook_once() -> None:
    steps = []

    def crawl(self: Any, global_step: int, *outputs: Any) -> None:
        threading.Event().wait(0.001)
        steps.append((global_step, outputs[0].item()))

    delivery = replace(CALLBACK_DELIVERY, capacity=2)
    memory = Memory()
    member = (hooked("on_end_train_step", crawl)(), delivery)
    trainer = make_trainer(Net(rows=400), callbacks=[member], sinks=[memory], val_interval_epochs=0)
    async with trainer.run() as run:
        pass
    result = await run.result()
    assert [step for step, _ in steps] == list(range(1, 51))
    assert [loss for _, loss in steps] == [loss for _, loss in memory.metrics("train_loss")]
    report = next(report for report in result.observers if report.observer == "Probe")
    assert (report.delivered, report.dropped) == (50, 0)


def test_a_callback_with_a_delivery_of_its_own_may_miss_steps_but_never_holds_the_loop() -> None:
    loop_has_ended = threading.Event()
    steps = []

    class Ends(Net):
        @inline
        def on_end_train(self, global_step: int) -> None:
            loop_has_ended.set()

    def hang(self: Any, global_step: int, *outputs: Any) -> None:
        assert loop_has_ended.wait(WAIT_S)
        steps.append(global_step)

    member = (hooked("on_end_train_step", hang)(), Delivery(overflow="drop_oldest", capacity=2))
    outcome = train(Ends(rows=400), callbacks=[member])
    report = next(report for report in outcome.result.observers if report.observer == "Probe")
    assert report.published == 50 == report.delivered + report.dropped
    assert report.dropped >= 46
    assert steps == sorted(set(steps))
    assert steps[-1] == 50


# ------------------------------------------------------------------------------------------- the inline lane


def test_on_end_backward_gets_the_live_loss_and_the_gradients() -> None:
    returned: list[torch.Tensor] = []
    seen: list[tuple[int, Any, Any]] = []

    def step(net: Net, global_step: int, batch: Any) -> torch.Tensor:
        returned.append(net.forward_loss(batch)[0])
        return returned[-1]

    def look(self: Any, global_step: int, loss: Any) -> None:
        assert threading.current_thread() is threading.main_thread()
        seen.append((global_step, loss, net.linear.weight.grad.clone()))

    net = Net(train_step=step)
    train(net, callbacks=[hooked("on_end_backward", look)()], gpu_batch_size_limit=4, val_interval_epochs=0)
    assert [step for step, _, _ in seen] == [0, 0, 1, 1]
    for loss, (_, got, _) in zip(returned, seen, strict=True):
        assert got is loss
        assert got.requires_grad
    bare = Net()
    for batch, (_, _, gradient) in zip(bare.batches(4)[:2], seen, strict=False):
        (bare.forward_loss(batch)[0] / 2).backward()  # gradients of earlier micro-batches are in them
        assert torch.equal(bare.linear.weight.grad, gradient)


def test_an_observer_of_the_backward_gets_a_copy_of_the_loss() -> None:
    seen: list[tuple[int, float]] = []

    def look(self: Any, global_step: int, loss: torch.Tensor) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert loss.shape == ()
        assert not loss.requires_grad
        seen.append((global_step, loss.item()))

    train(Net(), callbacks=[hooked("on_end_backward", look, "observer")()], gpu_batch_size_limit=4)
    assert [step for step, _ in seen] == [0, 0, 1, 1]
    bare = Net()
    assert seen[0][1] == bare.forward_loss(bare.batches(4)[0])[0].item()


def test_an_inline_hook_after_the_step_sees_its_gradients_and_the_new_weights() -> None:
    """It receives the outputs without a copy; the gradients are cleared before the next step."""
    before: list[torch.Tensor] = []
    pointers: list[int] = []

    class Own(Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            assert self.linear.weight.grad is None
            before.append(self.linear.weight.detach().clone())
            loss, predicted = self.forward_loss(batch)
            pointers.append(predicted.data_ptr())
            return loss, predicted

        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            _, predicted = outputs
            gradient = self.linear.weight.grad
            assert torch.equal(self.linear.weight, torch.add(before[-1], gradient, alpha=-self.lr))
            assert predicted.data_ptr() == pointers[-1]
            assert [tensor.requires_grad for tensor in outputs] == [False] * 2
            assert threading.current_thread() is threading.main_thread()

    assert train(Own(rows=32)).result.global_step == 4


def test_the_modules_own_step_hook_reads_the_state_of_its_step() -> None:
    seen: list[Any] = []

    class Own(Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, float)
            return [optimizer], [self.scheduler]

        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            rate = self.scheduler.get_last_lr()[0]
            self.log("rate", rate)
            seen.append((rate, [one.requires_grad for one in outputs], threading.current_thread().name))

    outcome = train(Own(rows=800), val_interval_epochs=0)
    assert outcome.result.global_step == 100
    expected = [step * 1e-3 for step in range(1, 101)]
    assert [rate for rate, *_ in seen] == pytest.approx(expected)
    assert {(tuple(grad), thread) for _, grad, thread in seen} == {((False, False), "MainThread")}
    logged = [(event.global_step, event.metrics["rate"]) for event in outcome.of(MetricsLogged)]
    assert logged == [(step, pytest.approx(rate)) for step, rate in enumerate(expected, start=1)]


@pytest.mark.parametrize("lane", LANES)
def test_a_hook_that_takes_no_outputs_gets_none_and_none_are_kept_for_it(lane: str) -> None:
    seen: list[tuple[Any, ...]] = []

    class Own(Net):
        @LANES[lane]
        def on_end_train_step(self, global_step: int) -> None:
            seen.append(("step", global_step))

        @LANES[lane]
        def on_end_train_epoch(self, global_step: int) -> None:
            seen.append(("epoch", global_step))

        @LANES[lane]
        def on_end_val_epoch(self, global_step: int, key: str) -> None:
            seen.append(("val", global_step, key))

    assert train(Own(), epoch_outputs_limit_bytes=1).result.status == "finished"
    assert seen == [("step", 1), ("step", 2), ("val", 2, "default"), ("epoch", 2)]


@pytest.mark.parametrize("lane", LANES)
def test_a_hook_with_another_number_of_outputs_is_named_with_the_fix(lane: str) -> None:
    def two(self: Any, global_step: int, loss: Any) -> None: ...

    def raising(self: Any, global_step: int, *outputs: Any) -> None:
        raise TypeError("mine")

    for hook in (two, raising):
        LANES[lane](hook)
    outcome = train(type("Net", (Net,), {"on_end_train_step": two})())
    assert isinstance(outcome.error, SignatureError)
    assert isinstance(outcome.error, TypeError)
    assert str(outcome.error) == (
        "Net.on_end_train_step(self, global_step, loss) cannot take the 2 outputs of the step; let it take *outputs"
    )
    outcome = train(type("Net", (Net,), {"on_end_train_step": raising})())
    assert (type(outcome.error), str(outcome.error)) == (TypeError, "mine")


@pytest.mark.parametrize("lane", LANES)
def test_a_callback_logs_as_a_module_does(lane: str) -> None:
    def hook(self: Any, global_step: int, *outputs: Any) -> None:
        self.log("mine", float(global_step))

    callback = hooked("on_end_train_step", hook, lane)()
    callback.log("before", 1.0)
    outcome = train(Net(), callbacks=[callback])
    callback.log("after", 1.0)
    assert [(event.global_step, event.metrics) for event in outcome.of(MetricsLogged)] == [
        (1, {"mine": 1.0}),
        (2, {"mine": 2.0}),
    ]
    assert copy.deepcopy(callback).__dict__ == callback.__dict__ == {}
    with pytest.raises(ValueError, match="empty name"):
        train(Net(), callbacks=[hooked("on_end_train", lambda self, step: self.log("", 1.0))()]).result  # noqa: B018


def test_a_callback_of_another_run_is_refused() -> None:
    shared, outcomes = Diary(), []

    def nested(net: Net, step: int) -> None:
        outcomes.append(train(Net(), callbacks=[shared]))

    assert train(hooked("on_end_train", nested, "inline", Net)(), callbacks=[shared]).result.status == "finished"
    assert str(outcomes[0].error) == "this Diary is being used by another run; give each run its own callback"
    assert train(Net(), callbacks=[shared]).result.status == "finished"


def test_inline_hooks_run_in_order_the_modules_first() -> None:
    order: list[tuple[str, str]] = []

    def diary(label: str, kind: type) -> Any:
        def hook(name: str) -> Callable[..., None]:
            return inline(lambda self, *args, **key: order.append((name, label)))

        return type(label, (kind,), {name: hook(name) for name in HOOKS})()

    train(diary("module", Net), callbacks=[diary("a", CallbackInterface), diary("b", CallbackInterface)])
    names = [name for name, _ in order[::3]]
    assert [label for _, label in order] == ["module", "a", "b"] * len(names)
    step = ["on_end_backward", "on_end_train_step"]
    assert names == ["on_begin_train_epoch", *step, *step, "on_end_val_epoch", "on_end_train_epoch", "on_end_train"]


# ------------------------------------------------------------------------------------ hooks without an override


class Copies(TorchDispatchMode):
    """Counts the copies that this thread makes of outputs, eight rows each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copying = func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if copying and args[0].numel() == 8:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_hooks_without_an_override_cost_nothing() -> None:
    """No output is copied, no BackwardEnded published, no observer's thread started."""
    threads: set[str] = set()

    def published(*callbacks: Any) -> tuple[Any, int]:
        with Copies() as copies:
            outcome = train(Net(act=lambda step: threads.update(trainer_threads())), callbacks=callbacks, epochs=2)
        assert outcome.result.status == "finished"
        return outcome, copies.count

    outcome, copies = published(type("Nothing", (CallbackInterface,), {})(), hooked("on_end_train", print, "inline")())
    assert copies == 0
    # Warnings of an earlier test may still be on their way to stderr.
    assert threads <= {"stagecast-events", "stagecast-memory", "stagecast-stderr"}
    assert [e.seq for e in outcome.events] == list(range(1, len(outcome.events) + 1)), "something else was published"

    _, copies = published(Diary())
    assert copies > 0, "the test would not notice"
    outcome, _ = published(hooked("on_end_backward", lambda *_: None, "observer")())
    missing = outcome.events[-1].seq - len(outcome.events)
    assert missing == 4, "one BackwardEnded for each step"
    assert BackwardEnded not in map(type, outcome.events)


def test_hooks_are_found_wherever_they_are_defined() -> None:
    found: list[str] = []

    class Base(CallbackInterface):
        def on_end_train(self, global_step: int) -> None:
            found.append("base")

    class Mixin:
        def on_end_train(self, global_step: int) -> None:
            found.append("mixin")

    class Mixed(Mixin, CallbackInterface): ...

    class Calling(Base):
        def on_end_train(self, global_step: int) -> None:
            super().on_end_train(global_step)
            found.append("calling")

    attribute = CallbackInterface()
    attribute.on_end_train = lambda global_step: found.append("attribute")  # type: ignore[method-assign]
    partial = CallbackInterface()
    partial.on_end_train = functools.partial(lambda said, step: found.append(said), "partial")  # type: ignore
    for callback in (type("Derived", (Base,), {})(), Mixed(), Calling(), attribute, partial):
        train(Net(), callbacks=[callback])
    assert found == ["base", "mixin", "base", "calling", "attribute", "partial"]


def test_a_mark_is_inherited_with_its_hook_but_not_by_what_overrides_it() -> None:
    base = hooked("on_end_train", lambda *_: None, "inline")
    derived = type("Derived", (base,), {})
    overriding = type("Overriding", (base,), {"on_end_train": lambda self, step: None})
    assert hasattr(base.on_end_train, LANE_ATTRIBUTE)
    event = EVENT_OF_HOOK["on_end_train"]
    assert event in CallbackHooks(derived(), None).inline
    assert event in CallbackHooks(overriding(), None).observed
