"""What goes wrong in a run reaches people: warnings, failed observers, tracebacks, and an honest end."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from events.errors import TrainingThreadStuck, UnstorableState
from events.log import logger
from events.messages import ObserverFailed, RunEnded, RunStarted, WarningLogged
from sinks import CSV, Console
from trainer import CallbackInterface, Checkpoints, Delivery, fenced, inline, launch

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


# ------------------------------------------------------------------------------------------------- the end


def test_sinks_that_failed_are_named_on_stderr_at_the_end_with_reason_and_count(
    kit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever sinks there are: a path that cannot be written, and a sink that fails while it is closed."""
    gone = (CSV(path="/proc/none/metrics.csv"), Delivery(on_error="disable"))
    result = kit.train(kit.Net(), sinks=[gone, Sink(close=fail)], run_id="r").result
    where = " (run r, step 2)"
    shown = [line for line in capsys.readouterr().err.splitlines() if "ended with" not in line]
    assert shown == [f"stagecast: warning: {problem}{where}" for problem in result.problems]
    opened, closed = sorted(result.problems)  # either may be first
    assert re.match(r"csv failed in open and is disabled( \(\d+ events? not delivered\))?: FileNotFoundError", opened)
    assert closed == "sink failed in close and is disabled: Boom: no server"


def test_a_sink_that_hangs_at_the_end_is_a_problem_in_the_journal_too(kit: Any) -> None:
    """With what was left; a run that is well has none, and writes nothing more."""
    released = threading.Event()
    hanging = Sink(write=lambda events: released.wait(kit.WAIT_S))
    result = kit.train(kit.Net(), sinks=[hanging], drain_timeout_s=0.05, journal=True).result
    released.set()
    (problem,) = result.problems
    assert problem.startswith("sink failed in drain and is disabled (")
    assert problem.endswith("events not delivered): still in write at the end of the drain")
    (failed,) = [event for event in kit.read_journal(result.run_dir) if isinstance(event, ObserverFailed)]
    assert (failed.observer, failed.during) == ("sink", "drain")
    well = kit.train(kit.Net(), sinks=[Sink()], journal=True).result
    assert well.problems == []
    assert type(kit.read_journal(well.run_dir)[-1]) is RunEnded


def test_a_run_whose_loss_was_nan_does_not_end_with_a_tick(kit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The console counts the problems in its line of the end, and names each once; stderr repeats none of them."""

    class Net(kit.Net):
        def train_step(self, *args: Any) -> Any:
            loss, *rest = super().train_step(*args)
            return loss * math.nan, *rest

    result = kit.train(Net(), sinks=[Console()]).result
    shown = capsys.readouterr().err
    assert "! finished at step 2" in shown
    assert re.search(r", with \d problems?\n", shown)
    assert result.problems == [
        "the loss was NaN or infinite in at least 2 steps, first at step 1",
        "the validation loss was NaN or infinite once, first at step 2",
    ]
    assert [shown.count(problem) for problem in result.problems] == [1, 1]
    assert "stagecast:" not in shown


@pytest.mark.parametrize("what", ["loss", "metric"])
def test_a_problem_that_comes_after_the_end_of_the_run_has_the_last_word(
    kit: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, what: str
) -> None:
    """A number is read after its step, perhaps after the run has ended; and a metric that never came is a problem."""

    class Net(kit.Net):
        def train_step(self, *args: Any) -> Any:
            loss, *rest = super().train_step(*args)
            return loss * (math.nan if what == "loss" else 1.0), *rest

    own = {"val_interval_epochs": 0} if what == "loss" else {"checkpoints": Checkpoints(best="acuracy")}
    kit.train(Net(), sinks=[Console()], run_dir=tmp_path / "run", epochs=1, **own)
    ends = [line for line in capsys.readouterr().err.splitlines() if "finished at step" in line]
    assert re.search(r"! finished at step 2 .*, with 1 problem", ends[-1])


def test_the_console_that_failed_is_named_with_the_warnings_that_were_left_to_it(
    kit: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stream may be the only one that is broken."""
    monkeypatch.setattr(Console, "open", fail)
    result = kit.train(kit.Net(), sinks=[Console()]).result
    assert result.problems[0].startswith("console failed in open and is disabled")
    assert result.problems[0] in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ warnings


def test_warnings_appear_without_any_configuration_and_once(script: Any, kit: Any) -> None:
    """On stderr without a console, in the console where there is one; those from before the run, too."""
    program = script(
        "import sys\n"
        "from tests.trainer.conftest import Net, make_trainer\n"
        "from trainer.trainer import Trainer\n"
        "from trainer import TrainerArguments\n"
        "from events.log import collects, logger\n"
        "from sinks import Console\n"
        "class Net(Net):\n"
        "    def get_optimizers_schedulers(self, *args):\n"
        "        logger.warning('odd optimizer')\n"
        "        return super().get_optimizers_schedulers(*args)\n"
        "class Early(Trainer):\n"
        "    @collects\n"
        "    def __init__(self, *args, **named):\n"
        "        super().__init__(*args, **named)\n"
        "        logger.warning('odd argument')\n"
        "for name, sinks in ('a', []), ('b', [Console()]):\n"
        "    arguments = TrainerArguments(train_batch_size=8, device='cpu')\n"
        "    Early(Net(), arguments, sinks=sinks, checkpoints=False, run_id=name).train()\n"
        "    print('---', file=sys.stderr)\n"
    )
    code, _, shown = program.end()
    assert code == 0
    without, with_console, _ = shown.split("---\n")
    assert without == ("stagecast: warning: odd argument\nstagecast: warning: odd optimizer (run a, step 0)\n")
    assert [with_console.count(text) for text in ("odd argument", "odd optimizer", "stagecast:")] == [1, 1, 1]
    assert "! warning: odd optimizer\n" in with_console
    folder = Path(program.process.args[1]).parent  # type: ignore[index]
    for name in ("a", "b"):
        events = kit.read_journal(folder / "runs" / name)
        kinds = [type(event) for event in events if isinstance(event, RunStarted | WarningLogged)]
        assert kinds == [RunStarted, WarningLogged, WarningLogged]
        assert [event.message for event in events if isinstance(event, WarningLogged)] == [
            "odd argument",
            "odd optimizer",
        ]


def test_a_warning_of_a_sink_and_of_a_sink_host_is_an_event_of_the_run(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the thread of one, and from the process of the other, which has no handler of the host's."""
    monkeypatch.syspath_prepend(str(HOSTED))
    import hosted_sinks  # type: ignore[import-not-found]

    here = Sink(open=lambda run: logger.warning("by a thread") or Sink())
    there = (hosted_sinks.Witness(str(tmp_path / "out"), "warns"), Delivery(runs_in="process", latency_s=0.02))
    outcome = kit.train(kit.Net(), sinks=[here, there], journal=True, run_dir=tmp_path / "run")
    assert outcome.error is None
    logged = [event.message for event in kit.read_journal(tmp_path / "run") if isinstance(event, WarningLogged)]
    assert sorted(logged) == ["by a process", "by a thread"]
    assert sorted(set(caplog.messages)) == ["by a process", "by a thread"]


def test_a_sink_that_warns_of_each_event_does_not_feed_itself(kit: Any) -> None:
    """Its warnings are events, which it gets."""

    def write(events: Any) -> None:
        for event in events:
            logger.warning(f"cannot show event {event.seq}")

    result = kit.train(kit.Net(rows=64), sinks=[Sink(write=write)]).result
    assert result.status == "finished"


# ----------------------------------------------------------------------------------------------- tracebacks


def last_end(outcome: Any) -> RunEnded:
    ended: RunEnded = outcome.of(RunEnded)[-1]
    return ended


@pytest.mark.parametrize("method", ["train_step", "val_step", "get_optimizers_schedulers", "on_end_train"])
def test_a_run_that_failed_says_where_and_in_which_phase(
    kit: Any, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its last event, with the user's own frames first and the cause, and in the console's last line."""

    class Net(kit.Net):
        pass

    def broken(*_: Any, **__: Any) -> Any:
        try:
            math.sqrt(-1)
        except ValueError as error:
            raise Boom("broken") from error

    setattr(Net, method, broken)
    outcome = kit.train(Net(), sinks=[Console()])
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
def test_the_end_names_the_hook_or_call_that_failed_and_no_phase_before_it(
    kit: Any, phase: str, callback: CallbackInterface, options: dict[str, Any]
) -> None:
    """Whichever lane the hook runs on, and wherever the loop was."""
    outcome = kit.train(kit.Net(), callbacks=[callback], **options)
    assert isinstance(outcome.error, (Boom, UnstorableState))
    assert last_end(outcome).phase == phase
    assert "get_optimizers_schedulers" not in "".join(getattr(outcome.error, "__notes__", ()))


@pytest.mark.parametrize(("call", "phase"), [(1, "preparing checkpoints"), (2, "preparing checkpoints"), (3, "taking")])
def test_a_module_whose_state_fails_does_so_in_a_checkpoint(kit: Any, call: int, phase: str) -> None:
    """The dry run, the memory that is prepared after the first step, the first checkpoint: no phase before it."""

    class Net(kit.Net):
        asked = 0

        def get_state(self) -> Any:
            self.asked += 1
            if self.asked == call:
                raise Boom
            return super().get_state()

    outcome = kit.train(Net(), checkpoints=Checkpoints(every_steps=1), run_dir="run")
    assert isinstance(outcome.error, Boom)
    assert (last_end(outcome).phase or "").startswith(phase)


def test_an_observer_that_ends_the_run_while_it_is_drained_corrects_the_end(kit: Any) -> None:
    """The loop had published that it finished."""
    begun = threading.Event()

    class Late(CallbackInterface):
        def on_end_train(self, global_step: int) -> None:
            begun.set()
            raise Boom

    outcome = kit.train(kit.Net(), callbacks=[Late()], journal=True, run_dir="run")
    assert isinstance(outcome.error, Boom)
    ended = [event for event in kit.read_journal("run") if isinstance(event, RunEnded)]
    assert [event.status for event in ended] == ["finished", "failed"]
    assert "in on_end_train\n" in (ended[-1].traceback or "")


def test_a_test_that_failed_has_its_traceback(kit: Any) -> None:
    """`Trainer.test` ends as a training does."""

    class Net(kit.Net):
        def get_test_dataloaders(self, *_: Any) -> Any:
            raise Boom

    memory = kit.Memory()
    with pytest.raises(Boom):
        kit.make_trainer(Net(), sinks=[memory]).test()
    (ended,) = [event for event in memory.events if isinstance(event, RunEnded)]
    assert (ended.phase, ended.traceback is not None) == ("get_test_dataloaders", True)


@pytest.mark.anyio
async def test_a_thread_that_hangs_is_shown_where_it_hangs(kit: Any) -> None:
    """In the event of the end, and as a problem of the run."""
    inside, released = threading.Event(), threading.Event()

    class Net(kit.Net):
        def train_step(self, *args: Any) -> Any:
            inside.set()
            released.wait(kit.WAIT_S)
            return super().train_step(*args)

    memory = kit.Memory()
    with pytest.raises(TrainingThreadStuck):
        async with kit.make_trainer(Net(), sinks=[memory], stop_grace_s=0.05).run() as run:
            await anyio.to_thread.run_sync(inside.wait)
            session = run._connection._session
            raise Boom
    released.set()
    ended = next(event for event in memory.events if isinstance(event, RunEnded))
    assert ended.phase == "train_step"
    assert "in train_step\n" in (ended.traceback or "")
    assert session.result.problems == ["the run was cancelled in train_step after step 0: the training thread is stuck"]


@pytest.mark.anyio
async def test_problems_of_a_launched_run_reach_the_process_that_launched_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the run's process prints goes into its own log, which nobody may read."""
    (tmp_path / "broken_job.py").write_text(
        "from events.log import logger\n"
        "from sinks import CSV\n"
        "from events.sink import Delivery\n"
        "from tests.trainer.conftest import Net, make_trainer\n"
        "class Warns(Net):\n"
        "    def train_step(self, global_step, batch, device):\n"
        "        logger.warning('the batch is odd')\n"
        "        return super().train_step(global_step, batch, device)\n"
        "def build():\n"
        "    logger.warning('built without a seed')\n"
        "    gone = (CSV(path='/proc/none/metrics.csv'), Delivery(on_error='disable'))\n"
        "    return make_trainer(Warns(), sinks=[gone])\n"
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
    assert any(message.startswith("the batch is odd [") for message in caplog.messages)  # with how many came after it
