"""Problems of a run reach people: warnings, failed observers, tracebacks, and the status at the end."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import anyio
import pytest
from support.scripts import Start
from support.threads import WAIT_S
from support.training import Net, Outcome, make_trainer, read_journal, train

from events.errors import TrainingThreadStuck, UnstorableState
from events.log import logger
from events.messages import Event, ObserverFailed, RunEnded, RunStarted, WarningLogged
from sinks import CSV, Console, Memory
from trainer import CallbackInterface, Checkpoints, Delivery, fenced, inline, launch

EventT = TypeVar("EventT", bound=Event)
GONE = (CSV(path="/proc/none/metrics.csv"), Delivery(on_error="disable"))
HOSTED = Path(__file__).parent / "hosted"


class Boom(Exception):
    """What the user's code raises."""


class Sink:
    """A sink that works, unless a method of it is replaced."""

    def __init__(self, **methods: Callable[..., Any]) -> None:
        vars(self).update(methods)

    def open(self, run: Any) -> Any:
        return self

    def write(self, events: Any) -> None: ...

    def close(self) -> None: ...


def fail(*_: Any) -> Any:
    raise Boom("no server")


def journalled(kind: type[EventT], folder: Any = "run") -> list[EventT]:
    return [event for event in read_journal(folder) if isinstance(event, kind)]


def nan_loss(net: Net, global_step: int, batch: Any) -> Any:
    loss, predicted = net.forward_loss(batch)
    return loss * math.nan, predicted


# ------------------------------------------------------------------------------------------------- the end


def test_failed_sinks_are_named_on_stderr_at_the_end_with_reason_and_count(capsys: pytest.CaptureFixture[str]) -> None:
    """A path that cannot be written, and a sink that fails while it is closed."""
    result = train(Net(), sinks=[GONE, Sink(close=fail)], run_id="r").result
    shown = [line for line in capsys.readouterr().err.splitlines() if "ended with" not in line]
    assert shown == [f"stagecast: warning: {problem} (run r, step 2)" for problem in result.problems]
    opened, closed = sorted(result.problems)  # either may be first
    assert re.match(r"csv failed in open and is disabled( \(\d+ events? not delivered\))?: FileNotFoundError", opened)
    assert closed == "sink failed in close and is disabled: Boom: no server"


def test_a_sink_that_hangs_at_the_end_is_a_problem_in_the_journal_too() -> None:
    """With the number of its events; a run without problems writes nothing more."""
    released = threading.Event()
    hanging = Sink(write=lambda events: released.wait(WAIT_S))
    result = train(Net(), sinks=[hanging], drain_timeout_s=0.05, journal=True, run_dir="run").result
    released.set()
    (problem,) = result.problems
    assert problem.startswith("sink failed in drain and is disabled (")
    assert problem.endswith("events not delivered): still in write at the end of the drain")
    assert [(event.observer, event.during) for event in journalled(ObserverFailed)] == [("sink", "drain")]
    well = train(Net(), sinks=[Sink()], journal=True, run_dir="well").result
    assert well.problems == []
    assert type(read_journal("well")[-1]) is RunEnded


def test_the_console_counts_the_problems_in_its_last_line_and_names_each_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """stderr repeats none of them."""
    result = train(Net(train_step=nan_loss), sinks=[Console()]).result
    shown = capsys.readouterr().err
    assert "! finished at step 2" in shown
    assert re.search(r", with \d problems?\n", shown)
    assert result.problems == [
        "the loss was NaN or infinite in at least 2 steps, first at step 1",
        "the validation loss was NaN or infinite once, first at step 2",
    ]
    assert [shown.count(problem) for problem in result.problems] == [1, 1]
    assert "stagecast:" not in shown


@pytest.mark.parametrize(
    "options",
    [
        {"train_step": nan_loss, "val_interval_epochs": 0},
        {"train_step": None, "checkpoints": Checkpoints(best="acuracy")},
    ],
    ids=["loss", "metric"],
)
def test_a_problem_found_after_the_end_of_the_run_is_in_the_last_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: dict[str, Any]
) -> None:
    """A number is read after its step, perhaps after the end; and a metric that was never logged is a problem."""
    net = Net(train_step=options["train_step"])
    own = {name: value for name, value in options.items() if name != "train_step"}
    train(net, sinks=[Console()], run_dir=tmp_path / "run", epochs=1, **own)
    ends = [line for line in capsys.readouterr().err.splitlines() if "finished at step" in line]
    assert re.search(r"! finished at step 2 .*, with 1 problem", ends[-1])


def test_a_failed_console_is_named_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the warnings that it did not show: its stream may be the only broken one."""
    monkeypatch.setattr(Console, "open", fail)
    result = train(Net(), sinks=[Console()]).result
    assert result.problems[0].startswith("console failed in open and is disabled")
    assert result.problems[0] in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ warnings


def test_warnings_appear_once_without_any_configuration(script: Start, tmp_path: Path) -> None:
    """On stderr, or in the console if there is one; those from before the run, too."""
    code, _, shown = script(
        "import sys\n"
        "from support.training import Net\n"
        "from trainer import TrainerArguments\n"
        "from trainer.trainer import Trainer\n"
        "from events.log import collects, logger\n"
        "from sinks import Console\n"
        "class Early(Trainer):\n"
        "    @collects\n"
        "    def __init__(self, *args, **named):\n"
        "        super().__init__(*args, **named)\n"
        "        logger.warning('odd argument')\n"
        "def data(net, size):\n"
        "    logger.warning('odd data')\n"
        "    return net.batches(size)\n"
        "for name, sinks in ('a', []), ('b', [Console()]):\n"
        "    arguments = TrainerArguments(train_batch_size=8, device='cpu')\n"
        "    Early(Net(train_data=data), arguments, sinks=sinks, checkpoints=False, run_id=name).train()\n"
        "    print('---', file=sys.stderr)\n"
    ).end()
    assert code == 0
    without, with_console, _ = shown.split("---\n")
    assert without == "stagecast: warning: odd argument\nstagecast: warning: odd data (run a, step 0)\n"
    assert [with_console.count(text) for text in ("odd argument", "odd data", "stagecast:")] == [1, 1, 1]
    assert "! warning: odd data\n" in with_console
    for name in ("a", "b"):
        folder = tmp_path / "runs" / name
        kinds = [type(event) for event in read_journal(folder) if isinstance(event, RunStarted | WarningLogged)]
        assert kinds == [RunStarted, WarningLogged, WarningLogged]
        assert [event.message for event in journalled(WarningLogged, folder)] == ["odd argument", "odd data"]


def test_a_warning_of_a_sink_and_of_a_sink_host_is_an_event_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From a thread, and from a process that has none of the host's log handlers."""
    monkeypatch.syspath_prepend(str(HOSTED))
    import hosted_sinks  # type: ignore[import-not-found]

    here = Sink(open=lambda run: logger.warning("by a thread") or Sink())
    there = (hosted_sinks.Witness(str(tmp_path / "out"), "warns"), Delivery(runs_in="process", latency_s=0.02))
    assert train(Net(), sinks=[here, there], journal=True, run_dir="run").error is None
    assert sorted(event.message for event in journalled(WarningLogged)) == ["by a process", "by a thread"]
    assert sorted(set(caplog.messages)) == ["by a process", "by a thread"]


def test_a_sink_that_warns_of_each_event_does_not_receive_ever_more() -> None:
    """Its warnings are events, which it receives."""

    def write(events: Any) -> None:
        for event in events:
            logger.warning(f"cannot show event {event.seq}")

    assert train(Net(rows=64), sinks=[Sink(write=write)]).result.status == "finished"


# ----------------------------------------------------------------------------------------------- tracebacks


def last_end(outcome: Outcome) -> RunEnded:
    return outcome.of(RunEnded)[-1]


@pytest.mark.parametrize("method", ["train_step", "val_step", "get_optimizers_schedulers", "on_end_train"])
def test_a_failed_run_names_the_place_and_the_phase(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In its last event, with the user's own frames first and the cause, and in the console's last line."""

    def broken(*_: Any, **__: Any) -> Any:
        try:
            math.sqrt(-1)
        except ValueError as error:
            raise Boom("broken") from error

    outcome = train(type("Broken", (Net,), {method: broken})(), sinks=[Console()])
    assert isinstance(outcome.error, Boom)
    ended = last_end(outcome)
    assert (ended.status, ended.phase, ended.reason) == ("failed", method, "Boom: broken")
    lines = (ended.traceback or "").splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].startswith(f'  File "{__file__}"')
    assert "direct cause" in (ended.traceback or "")
    assert any(line.endswith("Boom: broken") for line in lines)
    assert f" ✗ failed in {method} at step " in capsys.readouterr().err.splitlines()[-1]


class Unstorable(CallbackInterface):
    def state_dict(self) -> dict[str, Any]:
        return {"a lock": threading.Lock()}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StopsBadly(CallbackInterface):
    def should_stop(self, global_step: int, metrics: Any) -> str | None:
        raise Boom


def failing(hook: str, mark: Any = lambda hook: hook) -> CallbackInterface:
    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise Boom

    made: CallbackInterface = type("Fails", (CallbackInterface,), {hook: mark(fail)})()
    return made


@pytest.mark.parametrize(
    ("phase", "callback", "options"),
    [
        ("state_dict", Unstorable(), {"checkpoints": True, "run_dir": "run"}),
        ("should_stop", StopsBadly(), {}),
        ("on_end_train_step", failing("on_end_train_step", inline), {}),
        ("on_end_backward", failing("on_end_backward"), {}),
        ("on_end_train_step", failing("on_end_train_step"), {}),
        ("on_begin_train_epoch", failing("on_begin_train_epoch"), {}),
        ("on_end_train_epoch", failing("on_end_train_epoch", fenced), {}),
    ],
)
def test_the_end_names_the_failed_hook_or_call_and_no_earlier_phase(
    phase: str, callback: CallbackInterface, options: dict[str, Any]
) -> None:
    """On every lane, and wherever the loop was."""
    outcome = train(Net(), callbacks=[callback], **options)
    assert isinstance(outcome.error, (Boom, UnstorableState))
    assert last_end(outcome).phase == phase
    assert "get_optimizers_schedulers" not in "".join(getattr(outcome.error, "__notes__", ()))


@pytest.mark.parametrize(("call", "phase"), [(1, "preparing checkpoints"), (2, "preparing checkpoints"), (3, "taking")])
def test_a_module_whose_state_fails_does_so_in_a_checkpoint(call: int, phase: str) -> None:
    """The dry run, the memory that is prepared after the first step, the first checkpoint: no earlier phase."""

    class Stateful(Net):
        asked = 0

        def get_state(self) -> Any:
            self.asked += 1
            if self.asked == call:
                raise Boom
            return super().get_state()

    outcome = train(Stateful(), checkpoints=Checkpoints(every_steps=1), run_dir="run")
    assert isinstance(outcome.error, Boom)
    assert (last_end(outcome).phase or "").startswith(phase)


def test_an_observer_that_fails_the_run_while_it_is_drained_corrects_the_end() -> None:
    """The loop had published that it finished."""
    outcome = train(Net(), callbacks=[failing("on_end_train")], journal=True, run_dir="run")
    assert isinstance(outcome.error, Boom)
    ended = journalled(RunEnded)
    assert [event.status for event in ended] == ["finished", "failed"]
    assert "in fail\n" in (ended[-1].traceback or "")


def test_a_failed_test_has_its_traceback() -> None:
    memory = Memory()
    with pytest.raises(Boom):
        make_trainer(Net(test_data=fail), sinks=[memory]).test()
    (ended,) = memory.of(RunEnded)
    assert (ended.phase, ended.traceback is not None) == ("get_test_dataloaders", True)


@pytest.mark.anyio
async def test_a_thread_that_hangs_is_shown_with_its_place() -> None:
    """In the event of the end, and as a problem of the run."""
    inside, released = threading.Event(), threading.Event()
    memory = Memory()
    net = Net(act=lambda step: (inside.set(), released.wait(WAIT_S)))
    with pytest.raises(TrainingThreadStuck):
        async with make_trainer(net, sinks=[memory], stop_grace_s=0.05).run() as run:
            await anyio.to_thread.run_sync(inside.wait)
            session = run._connection._session  # type: ignore[attr-defined]
            raise Boom
    released.set()
    ended = memory.of(RunEnded)[0]
    assert ended.phase == "train_step"
    assert "in train_step\n" in (ended.traceback or "")
    assert session.result.problems == ["the run was cancelled in train_step after step 0: the training thread is stuck"]


@pytest.mark.anyio
async def test_problems_of_a_launched_run_reach_the_process_that_launched_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The output of the run's process is in its own log, which nobody may read."""
    (tmp_path / "broken_job.py").write_text(
        "from events.log import logger\n"
        "from events.sink import Delivery\n"
        "from sinks import CSV\n"
        "from support.training import Net, make_trainer\n"
        "def build():\n"
        "    logger.warning('built without a seed')\n"
        "    gone = (CSV(path='/proc/none/metrics.csv'), Delivery(on_error='disable'))\n"
        "    return make_trainer(Net(act=lambda step: logger.warning('the batch is odd')), sinks=[gone])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    async with launch("broken_job:build") as run:
        result = await run.result()
    (problem,) = result.problems
    assert problem.startswith("csv failed in open and is disabled")
    assert caplog.messages.count(problem) == 1
    assert caplog.messages.count("built without a seed") == 1
    (odd,) = (record for record in caplog.records if record.message == "the batch is odd")
    assert (odd.run_id, odd.global_step) == (result.run_id, 0)  # type: ignore[attr-defined]
    assert any(message.startswith("the batch is odd [") for message in caplog.messages)  # with the number of repeats
