"""SIGINT and SIGTERM on the main thread: the first stops the run at a boundary, the second ends it immediately."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.scripts import Start
from support.threads import WAIT_S, join_threads
from support.training import Diary, Net, make_trainer, read_journal, train
from torch.utils.data._utils import signal_handling

from events.messages import CommandTaken, Event, RunEnded, TrainStepEnded
from events.protocol import Pause
from events.run.folder import RunFolder
from events.sink import Delivery
from trainer import CallbackInterface, RunInterrupted, RunTerminated, Trainer, inline
from trainer.loop.control import Control
from trainer.run.calling_thread import heed_signals
from trainer.run.loop_thread import LoopThread

MANY = 100_000  # epochs: more than any test waits for
BOTH = [signal.SIGINT, signal.SIGTERM]
each_signal = pytest.mark.parametrize("number", BOTH, ids=lambda number: number.name)
needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at processes in /proc")


class Unhandled(Exception):
    """A signal reached the host's own handler."""


@pytest.fixture(autouse=True)
def host_handler() -> Iterator[Callable[..., None]]:
    """The handler of the host program, which every test must leave in place."""

    def handle(number: int, frame: Any) -> None:
        raise Unhandled(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in BOTH}
    yield handle
    after = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert set(after.values()) == {handle}


def interrupt(*numbers: signal.Signals) -> None:
    """Signal the main thread, from any thread."""
    for number in numbers:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


class Second:
    """Sends a signal from a thread of its own once the main thread is known to hang."""

    def __init__(self, number: signal.Signals) -> None:
        self._hanging = threading.Event()
        threading.Thread(target=self._send, args=(number,), daemon=True).start()

    def _send(self, number: signal.Signals) -> None:
        if self._hanging.wait(WAIT_S):
            interrupt(number)

    def hang_after(self, first: signal.Signals) -> None:
        """Receive the first signal on the main thread, then run Python code that checks nothing."""
        signal.raise_signal(first)
        self._hanging.set()
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            pass
        raise AssertionError("the second signal ended nothing")


def net_that(place: str, act: Callable[[], object], at: int = 2) -> Net:
    """A module that calls ``act`` on the loop's thread when the run reaches a place for the ``at``-th time."""
    visits = itertools.count(1)

    def reach(here: str) -> None:
        if here == place and next(visits) == at:
            act()

    def step(name: str) -> Any:
        return lambda net, global_step, batch: (reach(name), net.forward_loss(batch))[1]

    def data(net: Net, batch_size: int) -> Any:
        reach("set-up")
        return (reach("waiting for data") or batch for batch in net.batches(batch_size))

    class Ends(Net):
        @inline
        def on_end_train(self, global_step: int) -> None:
            reach("on_end_train")

    return Ends(train_data=data, train_step=step("train_step"), val_step=step("val_step"))


def ends_in_journal() -> list[str]:
    return [event.status for event in read_journal("runs/r") if type(event) is RunEnded]


def wait_for_events_thread(timeout_s: float = WAIT_S) -> None:
    for thread in threading.enumerate():
        if thread.name == "stagecast-events":
            thread.join(timeout_s)
            assert not thread.is_alive()


def hanging(hook: str, released: threading.Event, *signals: signal.Signals) -> CallbackInterface:
    """A callback whose hook sends signals to the main thread, then waits."""

    def hang(self: Any, *_: Any) -> None:
        interrupt(*signals)
        assert released.wait(WAIT_S)

    made: CallbackInterface = type("Hanging", (CallbackInterface,), {hook: hang})()
    return made


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Set at the end of the test at the latest; then no thread of a run may stay."""
    event = threading.Event()
    yield event
    event.set()
    join_threads()


# ------------------------------------------------------------------------------------------------- the second


@pytest.mark.parametrize("second", BOTH)
@pytest.mark.parametrize("first", BOTH)
def test_the_second_signal_ends_a_step_that_hangs(first: signal.Signals, second: signal.Signals) -> None:
    """Immediately, as Python does; no hook of the end runs, and the journal ends with RunEnded."""
    sender, diary = Second(second), Diary()
    net = net_that("train_step", lambda: sender.hang_after(first))
    error = train(net, callbacks=[diary], epochs=MANY, journal=True, run_id="r").error
    assert error is not None
    assert (type(error), error.args) == ((KeyboardInterrupt, ()) if second == signal.SIGINT else (SystemExit, (143,)))
    ended = read_journal("runs/r")[-1]
    assert isinstance(ended, RunEnded)
    assert (ended.status, ended.global_step) == ("cancelled", 1)
    assert "on_end_train" not in diary.names


@pytest.mark.parametrize(
    ("place", "at"), [("set-up", 1), ("waiting for data", 2), ("val_step", 2), ("on_end_train", 1)]
)
def test_the_second_signal_ends_a_run_wherever_it_hangs(place: str, at: int) -> None:
    """Also in the last hook, after RunEnded was published; no thread stays."""
    sender = Second(signal.SIGINT)
    outcome = train(net_that(place, lambda: sender.hang_after(signal.SIGINT), at), epochs=1)
    assert type(outcome.error) is KeyboardInterrupt
    ends = ["finished", "cancelled"] if place == "on_end_train" else ["cancelled"]  # the last one counts
    assert [e.status for e in outcome.of(RunEnded)] == ends
    join_threads()


def test_the_second_signal_ends_a_wait_for_a_fenced_hook_that_hangs(released: threading.Event) -> None:
    hook = hanging("on_begin_train_epoch", released, *BOTH)  # different ones: two of a kind may arrive as one
    outcome = train(Net(), callbacks=[hook], drain_timeout_s=0.05, journal=True, run_id="r")
    released.set()
    assert type(outcome.error) is SystemExit
    join_threads()
    assert ends_in_journal() == ["cancelled"]


def test_the_second_signal_ends_the_wait_for_a_slow_observer(released: threading.Event) -> None:
    """While it drains: the journal is complete and the folder and the module are free, though the hook still runs."""
    net = Net()
    outcome = train(net, callbacks=[hanging("on_end_train", released, *BOTH)], journal=True, run_id="r")
    assert type(outcome.error) is SystemExit
    wait_for_events_thread()
    assert ends_in_journal()[0] == "finished"
    RunFolder.open("runs/r", "r").close()
    assert train(net).result.status == "finished"


class ActsWhileSetUp:
    """A sink whose delivery is read while the run is set up, on a thread that is not the main one."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    @property
    def delivery(self) -> Delivery:
        if threading.current_thread() is not threading.main_thread():  # the trainer's constructor reads it, too
            self._act()
        return Delivery()

    def open(self, run: Any) -> Any:
        return self

    def write(self, events: Sequence[Event]) -> None: ...

    def close(self) -> None: ...


def test_the_second_signal_ends_a_set_up_that_hangs(released: threading.Event) -> None:
    """No step is taken, nothing is published, and the folder is released."""
    sink = ActsWhileSetUp(lambda: (interrupt(*BOTH), released.wait(WAIT_S)))
    net = net_that("set-up", lambda: pytest.fail("must not be reached"), at=1)
    outcome = train(net, sinks=[sink], journal=True, run_id="r")
    released.set()
    join_threads()
    assert type(outcome.error) is SystemExit
    assert outcome.events == []
    RunFolder.open("runs/r", "r").close()


@pytest.mark.parametrize(
    ("owner", "name", "first", "ends"),
    [
        (threading.Thread, "start", False, []),
        (LoopThread, "run", True, ["cancelled"]),
        (LoopThread, "_finish", True, ["cancelled"]),
        (LoopThread, "run", False, ["finished"]),
    ],
    ids=["before it is set up", "when it is set up", "after its last step", "when it is over"],
)
def test_two_signals_between_two_phases_end_the_run_immediately(
    monkeypatch: pytest.MonkeyPatch, released: threading.Event, owner: type, name: str, first: bool, ends: list[str]
) -> None:
    """No user code runs there: the observers are hurried and waited for, and nothing stays."""
    original = getattr(owner, name)

    def call(self: Any, *args: Any) -> Any:
        ours = not isinstance(self, threading.Thread) or self.name == "stagecast-events"
        for number in BOTH if ours and first else ():
            signal.raise_signal(number)
        result = original(self, *args)
        for number in BOTH if ours and not first else ():
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(owner, name, call)
    outcome = train(Net(), callbacks=[hanging("on_end_train_step", released)], journal=True, run_id="r")
    assert type(outcome.error) is SystemExit
    wait_for_events_thread(WAIT_S / 4)  # it does not wait for the observer until its drain timeout
    RunFolder.open("runs/r", "r").close()
    released.set()
    join_threads()
    assert not ends or ends_in_journal() == ends


# --------------------------------------------------------------------------------------------------- the first


@each_signal
@pytest.mark.parametrize(
    ("place", "at", "steps"), [("set-up", 1, 0), ("waiting for data", 3, 2), ("train_step", 3, 3), ("val_step", 2, 2)]
)
def test_the_first_signal_stops_at_the_next_boundary(number: signal.Signals, place: str, at: int, steps: int) -> None:
    """In every phase: the hooks of the end run, the journal is complete, and `train` raises."""
    diary = Diary()
    net = net_that(place, lambda: signal.raise_signal(number), at)
    outcome = train(net, callbacks=[diary], epochs=MANY, journal=True, run_id="r")
    result = outcome.result
    assert (result.status, result.reason, result.global_step) == ("stopped", number.name, steps)
    assert isinstance(outcome.error, RunInterrupted if number == signal.SIGINT else RunTerminated)
    assert f"{number.name} arrived: run r stopped after global_step {steps}" in str(outcome.error)
    assert getattr(outcome.error, "code", 143) == 143
    assert pickle.loads(pickle.dumps(outcome.error)).result == result
    assert diary.lines[-1] == ("on_end_train", steps, None)
    taken = [(e.command, e.reason) for e in read_journal("runs/r") if isinstance(e, CommandTaken)]
    assert taken == [("stop", number.name)]
    assert ends_in_journal() == ["stopped"]


@each_signal
def test_a_signal_while_the_run_is_set_up_stops_it_at_its_first_boundary(number: signal.Signals) -> None:
    outcome = train(Net(), sinks=[ActsWhileSetUp(lambda: interrupt(number))], epochs=MANY)
    assert (outcome.result.status, outcome.result.reason) == ("stopped", number.name)
    assert outcome.of(TrainStepEnded) == []


def test_a_signal_while_observers_drain_lets_them_finish(released: threading.Event) -> None:
    """The run has finished, and `train` raises all the same."""
    released.set()
    diary = Diary()
    outcome = train(Net(), callbacks=[hanging("on_end_train", released, signal.SIGINT), diary])
    assert (type(outcome.error), outcome.result.status) == (RunInterrupted, "finished")
    assert diary.names[-1] == "on_end_train"


def test_a_signal_ends_a_pause() -> None:
    class Watched(Trainer):
        def _session(self, *args: Any, **options: Any) -> Any:
            self.session = super()._session(*args, **options)
            return self.session

    class SignalsOncePaused(ActsWhileSetUp):
        delivery = Delivery(latency_s=0.001)  # type: ignore[assignment]

        def write(self, events: Sequence[Event]) -> None:
            if any(isinstance(event, CommandTaken) and event.command == "pause" for event in events):
                interrupt(signal.SIGINT)

    net = net_that("train_step", lambda: watched.session.control.send(Pause(id="p")))
    arguments = make_trainer(net, epochs=MANY).arguments
    watched = Watched(net, arguments, sinks=[SignalsOncePaused(lambda: None)], journal=False)
    with pytest.raises(RunInterrupted) as stop:
        watched.train()
    result = stop.value.result
    assert (result.status, result.reason, result.global_step) == ("stopped", "SIGINT", 2)


def test_every_run_counts_its_own_signals() -> None:
    """`Trainer.train` and `Trainer.test` stop at the first signal, also after a run that one has stopped."""
    for _ in range(2):
        net = net_that("train_step", lambda: signal.raise_signal(signal.SIGINT))
        assert train(net, epochs=MANY).result.status == "stopped"
    net = net_that("val_step", lambda: signal.raise_signal(signal.SIGINT), at=1)
    net.test_data = Net.batches
    with pytest.raises(RunInterrupted) as stop:
        make_trainer(net).test()
    assert (stop.value.result.status, stop.value.result.reason) == ("stopped", "SIGINT")


# ---------------------------------------------------------------------------------------- whose handlers they are


def handlers() -> set[Any]:
    return {signal.getsignal(number) for number in BOTH}


def test_the_previous_handlers_are_restored_however_the_run_ends(host_handler: Any) -> None:
    """Also a default of the system, and if the run cannot start."""
    seen: list[set[Any]] = []
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    train(Net(act=lambda step: seen.append(handlers())))
    assert not seen[0] & {host_handler, signal.SIG_IGN, signal.SIG_DFL}
    assert signal.getsignal(signal.SIGINT) is host_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, host_handler)
    assert type(train(Net(act=lambda step: 1 / 0)).error) is ZeroDivisionError
    assert handlers() == {host_handler}
    with RunFolder.open("runs/r", "r"):
        assert train(Net(), journal=True, run_id="r").error is not None
    assert handlers() == {host_handler}
    with pytest.raises(Unhandled, match="SIGINT"):
        signal.raise_signal(signal.SIGINT)


def test_a_signal_that_the_process_ignores_stays_ignored(host_handler: Any) -> None:
    """A shell starts background jobs like that: Ctrl-C is meant for another program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert train(Net(act=lambda step: signal.raise_signal(signal.SIGINT))).result.status == "finished"
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, host_handler)


def test_train_on_another_thread_touches_no_handlers(host_handler: Any) -> None:
    """Python allows that to the main thread alone."""
    seen: list[set[Any]] = []
    outcomes: list[Any] = []
    net = Net(act=lambda step: seen.append(handlers()))
    thread = threading.Thread(target=lambda: outcomes.append(train(net)))
    thread.start()
    thread.join(WAIT_S)
    assert outcomes[0].result.status == "finished"
    assert seen == [{host_handler}] * 2


@pytest.mark.anyio
async def test_run_never_touches_handlers() -> None:
    host = handlers()  # under trio or asyncio one of them may be the event loop's
    seen: list[set[Any]] = []
    async with make_trainer(Net(act=lambda step: seen.append(handlers()))).run() as run:
        assert handlers() == host
        await run.result()
    assert seen == [host] * 2


@pytest.mark.parametrize(
    "host", [signal.SIG_DFL, signal.SIG_IGN, lambda number, frame: None], ids=["default", "ignored", "own"]
)
def test_the_previous_handler_for_dead_workers_is_restored(host: Any) -> None:
    before, is_set = signal.signal(signal.SIGCHLD, host), signal_handling._SIGCHLD_handler_set
    try:
        train(Net())
        assert signal.getsignal(signal.SIGCHLD) is host
        assert signal_handling._SIGCHLD_handler_set is is_set
    finally:
        signal.signal(signal.SIGCHLD, before)


# ------------------------------------------------------------------------------------------ dataloaders' workers

WORKERS = """
import multiprocessing, os, signal, threading
import torch
from support.training import Net, make_trainer
from trainer import RunInterrupted

os.setpgrp()  # a terminal signals the whole group: the workers receive it as well

class Rows(torch.utils.data.Dataset):
    def __init__(self, hangs):
        self.hangs = hangs
    def __len__(self):
        return 100_000
    def __getitem__(self, index):
        if self.hangs and index == 32:
            os.write(1, b"waiting\\n")
            threading.Event().wait(30)  # for as long as the test lasts
        return torch.ones(4)

def began(number):
    os.write(1, f"{os.getpid()}\\n".encode())  # in one piece: the other worker writes, too

def net_that(hangs):
    def stream(net, batch_size):
        batches = iter(torch.utils.data.DataLoader(Rows(hangs), batch_size, num_workers=2, worker_init_fn=began))
        for number in range(1_000):
            if hangs and number == 4:  # the loop takes no stop before it has received this one
                os.write(1, b"asking\\n")
            yield next(batches)
    def step(net, global_step, batch):
        if not hangs and global_step == 2:
            os.killpg(0, signal.SIGINT)
        return net.linear(batch).mean()
    return Net(train_data=stream, train_step=step, val_data=lambda *_: None)

try:
    make_trainer(net_that(hangs=False), max_steps=1_000).train()
except RunInterrupted as stop:
    result = stop.result
print(result.status, result.reason, result.global_step, multiprocessing.active_children())
make_trainer(net_that(hangs=True), max_steps=1_000, run_dir="run", run_id="r", journal=True).train()
"""


@needs_proc
def test_signals_to_the_whole_group_leave_no_workers_behind(script: Start, tmp_path: Path) -> None:
    """The first one does not kill the workers of a run that stops; the second one ends a wait for data."""
    program = script(WORKERS)
    program.wait_for("stopped SIGINT 2 []")
    assert program.process.stdout is not None
    said = [program.process.stdout.readline().strip() for _ in range(4)]
    os.killpg(program.process.pid, signal.SIGINT)
    program.signal(signal.SIGTERM)
    code, out, _ = program.end()  # multiprocessing may report a worker that died meanwhile
    assert (code in (143, -signal.SIGINT), out) == (True, "")
    assert {"waiting", "asking"} <= set(said)
    assert not [pid for pid in said if pid.isdigit() and Path(f"/proc/{pid}").exists()]
    (end,) = [event for event in read_journal(tmp_path / "run") if isinstance(event, RunEnded)]
    assert end.status == "cancelled"


GROUP = """
import json, os, signal, sys, threading, time
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from support.training import Net, make_trainer
from trainer import RunTerminated

_MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.5,)  # seconds until a dead worker is noticed; 5 in torch

ROWS = 96

class Rows(Dataset):
    def __init__(self, hangs_at):
        self.hangs_at = hangs_at
    def __len__(self):
        return ROWS
    def __getitem__(self, index):
        if index == self.hangs_at:
            os.write(said, b"reached\\n")
            threading.Event().wait(60)  # for as long as the test lasts
        return torch.full((4,), index / ROWS)

def train(place, quiet, folder, workers=2, **options):
    def loader(where, batch_size, hangs_at=64):
        rows = Rows(hangs_at if where == place and not quiet else None)
        if not workers:
            return DataLoader(rows, batch_size)
        persistent = where == "persistent"
        return DataLoader(rows, batch_size, num_workers=workers, prefetch_factor=4, persistent_workers=persistent)

    def data(net, batch_size):
        if place == "generator":
            return (batch for batch in loader("generator", batch_size))
        return loader("persistent" if place == "persistent" else "data", batch_size)

    def step(net, global_step, batch):
        if not quiet and global_step == 5 and place in ("step", "accumulated"):
            os.write(said, b"reached\\n")
            torch.ones(1).sum()
            os.read(go, 1)  # the signal has been sent
            for _ in range(20_000):  # where torch's handler would raise
                pass
        if not quiet and global_step == 5 and place == "own data":
            next(iter(loader("own data", batch.shape[0], 0)))
        return (net.linear(batch) - 1).pow(2).mean()

    net = Net(
        optimizers=lambda net: ([torch.optim.Adam(net.parameters(), lr=0.01)], []),
        train_data=data,
        val_data=lambda net, batch_size: loader("validation", batch_size),
        train_step=step,
        val_step=lambda net, global_step, batch: net.linear(batch).mean(),
    )
    own = {"run_dir": folder, "run_id": "r", "journal": True, "checkpoints": True} | options
    limit = 4 if place == "accumulated" else None
    return net, make_trainer(net, gpu_batch_size_limit=limit, val_interval_steps=6, seed=1, **own).train()

def child(place):
    os.setpgrp()
    try:
        train(place, False, "run")
    except RunTerminated as stop:
        result = stop.result
        outcome = [result.status, result.reason, result.global_step, os.path.basename(result.checkpoint or "none")]
    except Exception as error:
        outcome = [type(error).__name__, str(error)]
    os.write(said, (json.dumps(outcome) + "\\n").encode())

def is_dead(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().split()[2] == "Z"
    except FileNotFoundError:  # its parent has noticed
        return True

place, how = sys.stdin.readline().strip().split(",")
torch.set_num_threads(1)
hears, said = os.pipe()
go, going = os.pipe()
pid = os.fork()
if not pid:
    try:
        child(place)
    finally:
        os._exit(0)
os.close(said)
lines = os.fdopen(hears)
assert lines.readline() == "reached\\n"
workers = [int(one) for one in open(f"/proc/{pid}/task/{pid}/children").read().split()]
if how == "group":
    os.killpg(pid, signal.SIGTERM)
elif how == "workers first":
    for one in workers:
        os.kill(one, signal.SIGTERM)
    while not all(is_dead(one) for one in workers):
        time.sleep(0.001)  # there is nothing to wait for: they are not this process's children
    os.kill(pid, signal.SIGTERM)
else:
    os.kill(workers[0], signal.SIGKILL)
os.write(going, b"gg")  # for each micro-batch
outcome = json.loads(next(line for line in lines if line.startswith("[")))
os.waitpid(pid, 0)
print(json.dumps(outcome), flush=True)
if "step-" in outcome[-1]:
    said = 1
    resumed, _ = train(place, True, "run", resume="auto")
    whole, _ = train(place, True, "whole", workers=0)
    print([bool(torch.equal(a, b)) for a, b in zip(resumed.parameters(), whole.parameters())], flush=True)
"""


def send_to_workers(script: Start, place: str, how: str) -> tuple[list[Any], str, str]:
    """Return how the run ended, then the rest of the program's output and its errors."""
    program = script(GROUP)
    assert program.process.stdin is not None
    assert program.process.stdout is not None
    program.process.stdin.write(f"{place},{how}\n")
    program.process.stdin.flush()
    outcome = program.process.stdout.readline()
    _, out, errors = program.end()
    assert outcome, errors
    return json.loads(outcome), out, errors


@needs_proc
@pytest.mark.parametrize("how", ["group", "workers first"])
@pytest.mark.parametrize(
    ("place", "steps"),
    [("step", 5), ("data", None), ("persistent", None), ("generator", None), ("accumulated", 5), ("validation", 6)],
)
def test_sigterm_that_also_ends_the_workers_stops_the_run_with_a_checkpoint(
    script: Start, place: str, steps: int | None, how: str
) -> None:
    """As systemd and Slurm send it: the run stops at a boundary and resumes exactly.

    A worker reads up to eight batches ahead, so it may block while the loop is at any of the steps before that one.
    """
    outcome, out, errors = send_to_workers(script, place, how)
    at = outcome[2]
    assert outcome == ["stopped", "SIGTERM", at, f"step-{at}.a1"]
    assert at == steps if steps is not None else 0 < at <= 8
    assert out.strip() == "[True, True]", errors


@needs_proc
def test_sigterm_that_ends_the_workers_of_a_steps_own_data_stops_the_run_without_a_checkpoint(script: Start) -> None:
    outcome, _, errors = send_to_workers(script, "own data", "group")
    assert outcome == ["stopped", "SIGTERM", 4, "none"]
    assert "workers died in train_step after global_step 4" in errors


@needs_proc
def test_a_worker_that_is_killed_fails_the_run(script: Start) -> None:
    """By the kernel when memory runs out, for example: no signal to the run explains it."""
    (kind, text), _, _ = send_to_workers(script, "data", "kill")
    assert kind == "RuntimeError"
    assert "DataLoader worker" in text


def test_a_signal_is_not_lost_when_a_worker_dies_while_it_is_handled() -> None:
    control = Control()
    control.reading, control.dead_worker = True, "DataLoader worker (pid 1) is killed by signal: Terminated. "
    send = control.send

    def send_later(command: Any) -> None:
        signal.raise_signal(signal.SIGCHLD)
        send(command)

    control.send = send_later  # type: ignore[method-assign]
    with heed_signals(control, lambda error: None), pytest.raises(RuntimeError, match="Terminated"):
        signal.raise_signal(signal.SIGTERM)
    assert control.ends_run
