"""Hooks that raise: the effect on the run, the callback and its other hooks, by lane."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.threads import WAIT_S
from support.training import LANES, Boom, Diary, Net, hooked, read_journal, train

from events.bus.pump import Pump
from events.bus.ring import Ring
from events.errors import CheckpointError
from events.messages import ObserverFailed, ObserverRecovered, TrainStepEnded
from events.origin import Origin
from trainer import CallbackInterface, Delivery, inline
from trainer.hooks.hooks import CallbackHooks
from trainer.hooks.recorder import MetricRecorder
from trainer.hooks.target import CallbackTarget
from trainer.media import MediaWriter


def policy(on_error: str, **options: Any) -> Delivery:
    return Delivery(overflow="block", on_error=on_error, backoff_s=0.001, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("lane", LANES)
def test_an_exception_of_a_hook_ends_the_run_with_the_hook_and_the_step_in_a_note(lane: str) -> None:
    boom = Boom("in a hook")

    def fail(self: Any, global_step: int, *outputs: Any) -> None:
        raise boom

    outcome = train(Net(), callbacks=[hooked("on_end_train_step", fail, lane)()], epochs=100_000)
    assert outcome.error is boom
    assert boom.__cause__ is None
    assert "raised by Probe.on_end_train_step at global_step 1" in boom.__notes__
    (failed,) = outcome.of(ObserverFailed)
    assert (failed.observer, failed.during, failed.action) == ("Probe", "on_end_train_step", "fatal")
    assert failed.error == "Boom: in a hook"


@pytest.mark.parametrize("lane", LANES)
def test_a_callback_with_the_policy_disable_fails_once_and_the_run_continues(lane: str) -> None:
    """Its hook is not called again on any lane, a fence does not wait for it, and other callbacks are not affected."""
    calls = []

    def fail(self: Any, global_step: int, *outputs: Any) -> None:
        calls.append(global_step)
        raise Boom

    class Probe(hooked("on_end_train_step", fail, lane)):  # type: ignore[misc]
        def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
            """Fenced: all hooks of the epoch before have run when the second one begins."""

    diary = Diary()
    outcome = train(Net(rows=64), callbacks=[(Probe(), policy("disable")), diary], epochs=2)
    assert outcome.result.status == "finished"
    assert calls == [1]
    assert [step for step, _ in diary.of("on_end_train_step")] == list(range(1, 17))
    assert [(e.observer, e.action, e.global_step > 0) for e in outcome.of(ObserverFailed)] == [
        ("Probe", "disabled", True)
    ]


@pytest.mark.parametrize("lane", ["observer", "fenced"])
def test_a_retried_callback_resumes_at_the_hook_that_failed(lane: str) -> None:
    calls: list[int] = []
    loop_is_ahead = threading.Event()

    def fail_twice(self: Any, global_step: int, *outputs: Any) -> None:
        if lane == "observer":
            assert loop_is_ahead.wait(WAIT_S)  # so that the steps after the first are one batch
        calls.append(global_step)
        if global_step == 4 and calls.count(4) < 3:
            raise Boom

    def act(step: int) -> None:
        if step == 8:
            loop_is_ahead.set()

    member = (hooked("on_end_train_step", fail_twice, lane)(), policy("retry"))
    outcome = train(Net(rows=64, act=act), callbacks=[member], journal=True)
    assert outcome.result.status == "finished"
    assert calls == [1, 2, 3, 4, 4, 4, 5, 6, 7, 8]
    events = read_journal(outcome.result.run_dir)  # it is drained last, so it has what happened in the drain
    assert [e.action for e in events if isinstance(e, ObserverFailed)] == ["retrying"]
    assert [e.failures for e in events if isinstance(e, ObserverRecovered)] == [2]


def test_an_inline_hook_cannot_be_retried() -> None:
    """The step continues, so the callback is disabled."""
    calls = []

    def fail(self: Any, global_step: int, loss: Any) -> None:
        calls.append(global_step)
        raise Boom

    outcome = train(Net(), callbacks=[(hooked("on_end_backward", fail)(), policy("retry"))])
    assert calls == [0]
    assert [(e.during, e.action) for e in outcome.of(ObserverFailed)] == [("on_end_backward", "disabled")]


def test_a_callback_that_failed_on_the_loops_thread_runs_no_hook_on_another() -> None:
    """Its queue is released, a fence does not wait for it, and the report has the error."""
    ran: list[str] = []

    class Several(CallbackInterface):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            raise Boom("inline")

        def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:  # fenced
            ran.append(f"epoch {epoch}")

        def on_end_backward(self, global_step: int, loss: Any) -> None:  # inline
            ran.append(f"backward {global_step}")

        def on_end_train(self, global_step: int) -> None:
            ran.append("end")

    outcome = train(Net(), callbacks=[(Several(), policy("disable"))], epochs=3)
    assert outcome.result.status == "finished"
    assert ran == ["epoch 0", "backward 0"]
    assert [(e.during, e.action) for e in outcome.of(ObserverFailed)] == [("on_end_train_step", "disabled")]
    (report,) = [one for one in outcome.result.observers if one.observer == "Several"]
    assert (report.state, report.error, report.left) == ("disabled", "Boom: inline", 0)


def test_a_callback_that_failed_off_the_loops_thread_runs_no_inline_hook() -> None:
    """It may depend on the failed hook."""
    ran: list[int] = []

    class Both(CallbackInterface):
        def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:  # fenced
            raise Boom

        def on_end_backward(self, global_step: int, loss: Any) -> None:  # inline
            ran.append(global_step)

    outcome = train(Net(), callbacks=[(Both(), policy("disable"))], epochs=3)
    assert outcome.result.status == "finished"
    assert ran == []
    assert [(e.during, e.action) for e in outcome.of(ObserverFailed)] == [("on_begin_train_epoch", "disabled")]


def test_callbacks_of_one_class_have_different_names() -> None:
    off_the_loop = hooked("on_end_train", lambda *_: 1 / 0)
    on_the_loop = hooked("on_end_backward", lambda *_: 1 / 0)
    off_the_loop.__name__, on_the_loop.__name__ = "Off", "On"
    members = [(kind(), policy("disable")) for kind in (off_the_loop, on_the_loop) * 2]
    outcome = train(Net(), callbacks=members, journal=True)
    events = read_journal(outcome.result.run_dir)
    assert {(e.observer, e.during) for e in events if isinstance(e, ObserverFailed)} == {
        ("Off", "on_end_train"),
        ("Off-2", "on_end_train"),
        ("On", "on_end_backward"),
        ("On-2", "on_end_backward"),
    }
    assert {report.observer for report in outcome.result.observers} >= {"Off", "Off-2"}


@pytest.mark.parametrize(
    "hook", ["on_begin_train_epoch", "on_end_train_step", "on_end_val_epoch", "on_end_train_epoch", "on_end_train"]
)
def test_the_model_does_not_change_while_a_fenced_hook_runs(hook: str) -> None:
    """An inline hook of the same event, of any callback, runs after the fenced ones have returned."""
    order: list[str] = []
    first = hooked(hook, lambda *_, **key: order.append("inline"), "inline")
    second = hooked(hook, lambda *_, **key: order.append("fenced"), "fenced")
    outcome = train(Net(rows=8), callbacks=[first(), second()])
    assert outcome.result.status == "finished"
    assert order == ["fenced", "inline"]


def test_a_failure_in_the_last_hook_reaches_the_sinks() -> None:
    """Callbacks are drained before sinks."""
    callback = hooked("on_end_train", lambda *_: 1 / 0)()
    outcome = train(Net(), callbacks=[(callback, policy("disable"))])
    assert outcome.result.status == "finished"
    assert [(e.during, e.action) for e in outcome.of(ObserverFailed)] == [("on_end_train", "disabled")]


def test_a_fenced_backward_hook_holds_the_loop() -> None:
    seen: list[tuple[int, bool]] = []

    def look(net: Net, global_step: int, loss: torch.Tensor) -> None:
        seen.append((global_step, net.linear.weight.grad is not None))

    result = train(hooked("on_end_backward", look, "fenced", Net)()).result
    assert seen == [(0, True), (1, True)]
    assert result.ledger.fence_s > 0


STEPS = [(TrainStepEnded("run", 1, step, 0.0, 0, step, 0, "train", 0.5, 1, 8, 0.1, 0.1), None) for step in (1, 2)]


def target_of(act: Callable[..., object]) -> CallbackTarget:
    """Return what runs the hooks of a callback with ``act`` as its step hook, without a run."""
    pump = Pump(Ring(Origin("run", 1)))
    pump.ring.close()
    recorder = MetricRecorder(pump, MediaWriter(None, pump.ring.publish, pump.ring.origin), torch.nn.Module())
    return CallbackTarget(CallbackHooks(hooked("on_end_train_step", act)(), None), torch.device("cpu"), recorder)


def test_an_abandoned_callback_runs_no_further_hook() -> None:
    """Neither hooks of the current batch, which are reported as not run, nor those of a later one."""
    ran: list[int] = []

    def act(self: Any, global_step: int, *outputs: Any) -> None:
        ran.append(global_step)
        target.abandon()

    target = target_of(act)
    target.deliver(STEPS)
    target.deliver(list(STEPS))
    assert ran == [1]
    assert target.progress == ("on_end_train_step", 0)


def test_an_essential_callback_that_failed_cannot_be_part_of_a_checkpoint() -> None:
    """A resumed run would lack its state."""
    target = target_of(lambda *_: 1 / 0)
    assert not target._callback.is_disabled()
    with pytest.raises(ZeroDivisionError):
        target.deliver(STEPS)
    with pytest.raises(CheckpointError, match="the callback Probe failed before the checkpoint's step"):
        target._callback.is_disabled()
