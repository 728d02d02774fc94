"""SIGINT and SIGTERM on the main thread: the first stops the run in order, the second ends it at once."""

from __future__ import annotations

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


def interrupt(number: signal.Signals) -> None:
    """From any thread: signal the main one."""
    signal.pthread_kill(threading.main_thread().ident or 0, number)


class Second:
    """Sends a signal from a thread of its own once the main thread is known to hang."""

    def __init__(self, number: signal.Signals, wait_s: float) -> None:
        self._hanging = threading.Event()
        self._wait_s = wait_s
        self._thread = threading.Thread(target=self._send, args=(number,), daemon=True)
        self._thread.start()

    def _send(self, number: signal.Signals) -> None:
        if self._hanging.wait(self._wait_s):
            interrupt(number)

    def hang(self) -> None:
        """On the main thread, in Python code that never looks at anything."""
        self._hanging.set()
        until = time.monotonic() + self._wait_s
        while time.monotonic() < until:
            pass
        raise AssertionError("the second signal ended nothing")


def net_that(kit: Any, place: str, act: Callable[[], None], at: int = 2) -> Any:
    """A module that calls ``act`` on the loop's thread when it comes to a place for the ``at``-th time."""
    visits: dict[str, int] = {}

    def reach(here: str) -> None:
        visits[here] = visits.get(here, 0) + 1
        if here == place and visits[here] == at:
            act()

    class Net(kit.Net):
        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            reach("set-up")

            def stream() -> Iterator[Any]:
                for batch in self.batches(batch_size):
                    reach("waiting for data")
                    yield batch

            return stream()

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            reach("train_step")
            return self.forward_loss(batch)

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            reach("val_step")
            return self.forward_loss(batch)

        @inline
        def on_end_train(self, global_step: int) -> None:
            reach("on_end_train")

    return Net()


# ------------------------------------------------------------------------------------------------- the second


@pytest.mark.parametrize(
    ("first", "second", "raised"),
    [
        (signal.SIGINT, signal.SIGINT, KeyboardInterrupt),
        (signal.SIGINT, signal.SIGTERM, SystemExit),
        (signal.SIGTERM, signal.SIGTERM, SystemExit),
        (signal.SIGTERM, signal.SIGINT, KeyboardInterrupt),
    ],
)
def test_the_second_signal_ends_a_step_that_hangs(kit: Any, first: Any, second: Any, raised: type) -> None:
    """At once, as Python does; no hook of the end runs, and the journal ends in RunEnded all the same."""
    sender = Second(second, kit.WAIT_S)

    def act() -> None:
        signal.raise_signal(first)
        sender.hang()

    diary = kit.Diary()
    outcome = kit.train(net_that(kit, "train_step", act), callbacks=[diary], epochs=MANY, journal=True, run_id="r")
    assert type(outcome.error) is raised
    assert raised is KeyboardInterrupt or outcome.error.args == (143,)
    ended = kit.read_journal("runs/r")[-1]
    assert (type(ended), ended.status, ended.global_step) == (RunEnded, "cancelled", 1)
    assert "on_end_train" not in diary.names


@pytest.mark.parametrize(
    ("place", "at"), [("set-up", 1), ("waiting for data", 2), ("val_step", 2), ("on_end_train", 1)]
)
def test_the_second_signal_ends_a_run_wherever_it_hangs(kit: Any, place: str, at: int) -> None:
    """Also in the hook at the very end, when RunEnded is out already; nothing is left on any thread."""
    sender = Second(signal.SIGINT, kit.WAIT_S)

    def act() -> None:
        signal.raise_signal(signal.SIGINT)
        sender.hang()

    outcome = kit.train(net_that(kit, place, act, at), epochs=1)
    assert type(outcome.error) is KeyboardInterrupt
    ends = ["finished", "cancelled"] if place == "on_end_train" else ["cancelled"]  # the last one counts
    assert [e.status for e in outcome.of(RunEnded)] == ends
    kit.join_threads()


def test_the_second_signal_ends_a_wait_for_a_hook(kit: Any) -> None:
    """The loop waits at a fence, for a hook that hangs on another thread and cannot be interrupted there."""
    released = threading.Event()

    class Hanging(CallbackInterface):
        def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
            interrupt(signal.SIGINT)
            interrupt(signal.SIGTERM)  # not the same again: two of a kind may arrive as one
            assert released.wait(kit.WAIT_S)

    outcome = kit.train(kit.Net(), callbacks=[Hanging()], drain_timeout_s=0.05, journal=True, run_id="r")
    released.set()
    assert type(outcome.error) is SystemExit
    kit.join_threads()
    assert [e.status for e in kit.read_journal("runs/r") if type(e) is RunEnded] == ["cancelled"]


def test_the_second_signal_ends_the_wait_for_a_slow_observer(kit: Any) -> None:
    """While it drains: the run is over, its journal whole and folder and module free, though the hook goes on."""
    released = threading.Event()

    class Slow(CallbackInterface):
        def on_end_train(self, global_step: int) -> None:
            interrupt(signal.SIGINT)
            interrupt(signal.SIGTERM)
            assert released.wait(kit.WAIT_S)

    net = kit.Net()
    outcome = kit.train(net, callbacks=[Slow()], journal=True, run_id="r")
    assert type(outcome.error) is SystemExit
    for thread in threading.enumerate():
        if thread.name == "stagecast-events":  # no longer than a moment
            thread.join(kit.WAIT_S)
            assert not thread.is_alive()
    journal = kit.read_journal("runs/r")
    assert next(e for e in journal if type(e) is RunEnded).status == "finished"
    RunFolder.open("runs/r", "r").close()
    assert kit.train(net).result.status == "finished"
    released.set()
    kit.join_threads()


class ActsWhileSetUp:
    """A sink that is asked for its delivery while the run is being set up, on a thread that is not the main one."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    @property
    def delivery(self) -> Delivery:
        if threading.current_thread() is not threading.main_thread():  # the trainer's constructor looks, too
            self._act()
        return Delivery()

    def open(self, run: Any) -> Any:
        return self

    def write(self, events: Sequence[Event]) -> None: ...

    def close(self) -> None: ...


def test_the_second_signal_ends_a_set_up_that_hangs(kit: Any) -> None:
    """Nothing was begun: no step is taken, nothing is published, and the folder gets free."""
    released = threading.Event()

    def act() -> None:
        interrupt(signal.SIGINT)
        interrupt(signal.SIGTERM)
        assert released.wait(kit.WAIT_S)

    net = net_that(kit, "set-up", lambda: pytest.fail("must not be reached"), at=1)
    outcome = kit.train(net, sinks=[ActsWhileSetUp(act)], journal=True, run_id="r")
    released.set()
    kit.join_threads()
    assert type(outcome.error) is SystemExit
    assert outcome.events == []
    RunFolder.open("runs/r", "r").close()


@pytest.mark.parametrize("when", ["before it is set up", "when it is set up", "after its last step", "when it is over"])
def test_two_signals_in_a_moment_between_two_phases_end_the_run_at_once(
    kit: Any, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """No user code runs there: the observers are hurried and waited for, and nothing is left running."""

    def two() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    def with_signals(original: Callable[..., Any], *, first: bool) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            ours = not isinstance(self, threading.Thread) or self.name == "stagecast-events"
            if ours and first:
                two()
            result = original(self, *args)
            if ours and not first:
                two()
            return result

        return call

    owner, name, first = {
        "before it is set up": (threading.Thread, "start", False),
        "when it is set up": (LoopThread, "run", True),
        "after its last step": (LoopThread, "_finish", True),
        "when it is over": (LoopThread, "run", False),
    }[when]
    monkeypatch.setattr(owner, name, with_signals(getattr(owner, name), first=first))
    released = threading.Event()

    class Hanging(CallbackInterface):
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            assert released.wait(kit.WAIT_S)

    outcome = kit.train(kit.Net(), callbacks=[Hanging()], journal=True, run_id="r")
    assert type(outcome.error) is SystemExit
    for thread in threading.enumerate():
        if thread.name == "stagecast-events":
            thread.join(kit.WAIT_S / 4)
            assert not thread.is_alive()  # it did not wait for the observer until its drain timeout
    RunFolder.open("runs/r", "r").close()
    released.set()
    kit.join_threads()
    if when != "before it is set up":
        ends = [event for event in kit.read_journal("runs/r") if type(event) is RunEnded]
        assert [end.status for end in ends] == ["finished" if when == "when it is over" else "cancelled"]


# --------------------------------------------------------------------------------------------------- the first


@pytest.mark.parametrize("number", BOTH, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("place", "at", "steps"), [("set-up", 1, 0), ("waiting for data", 3, 2), ("train_step", 3, 3), ("val_step", 2, 2)]
)
def test_the_first_signal_stops_in_order(kit: Any, number: Any, place: str, at: int, steps: int) -> None:
    """At the next boundary, in every phase: the hooks of the end run, the journal is whole, and `train` raises."""
    diary = kit.Diary()
    net = net_that(kit, place, lambda: signal.raise_signal(number), at)
    outcome = kit.train(net, callbacks=[diary], epochs=MANY, journal=True, run_id="r")
    result = outcome.result
    assert (result.status, result.reason, result.global_step) == ("stopped", number.name, steps)
    assert type(outcome.error) is (RunInterrupted if number == signal.SIGINT else RunTerminated)
    assert f"{number.name} arrived: run r stopped after global_step {steps}" in str(outcome.error)
    assert getattr(outcome.error, "code", 143) == 143
    assert pickle.loads(pickle.dumps(outcome.error)).result == result
    assert diary.lines[-1] == ("on_end_train", steps, None)
    journal = kit.read_journal("runs/r")
    taken = [e for e in journal if type(e) is CommandTaken]
    assert [(e.command, e.reason) for e in taken] == [("stop", number.name)]
    assert (type(journal[-1]), journal[-1].status) == (RunEnded, "stopped")


@pytest.mark.parametrize("number", BOTH, ids=lambda number: number.name)
def test_a_signal_while_the_run_is_set_up_is_not_lost(kit: Any, number: Any) -> None:
    """A device or a folder is being opened on another thread: the run starts, and stops at its first boundary."""
    outcome = kit.train(kit.Net(), sinks=[ActsWhileSetUp(lambda: interrupt(number))], epochs=MANY)
    assert (outcome.result.status, outcome.result.reason) == ("stopped", number.name)
    assert outcome.of(TrainStepEnded) == []


def test_a_signal_while_observers_drain_lets_them_finish(kit: Any) -> None:
    """The loop is over, so there is nothing to stop: the run has finished, and `train` raises all the same."""
    diary = kit.Diary()

    class Slow(CallbackInterface):
        def on_end_train(self, global_step: int) -> None:
            interrupt(signal.SIGINT)
            diary.on_end_train(global_step)

    outcome = kit.train(kit.Net(), callbacks=[Slow()])
    assert (type(outcome.error), outcome.result.status) == (RunInterrupted, "finished")
    assert diary.names == ["on_end_train"]


def test_a_signal_ends_a_pause(kit: Any) -> None:
    """Somebody who waits at a paused run can stop it as any other."""

    class Watched(Trainer):
        def _session(self, *args: Any, **options: Any) -> Any:
            self.session = super()._session(*args, **options)
            return self.session

    class SignalsOncePaused:
        delivery = Delivery(latency_s=0.001)

        def open(self, run: Any) -> Any:
            return self

        def write(self, events: Sequence[Event]) -> None:
            if any(type(event) is CommandTaken and event.command == "pause" for event in events):
                interrupt(signal.SIGINT)

        def close(self) -> None: ...

    net = net_that(kit, "train_step", lambda: watched.session.control.send(Pause(id="p")))
    ready = kit.make_trainer(net, epochs=MANY)
    watched = Watched(net, ready.arguments, sinks=[SignalsOncePaused()], journal=False)
    with pytest.raises(RunInterrupted) as stop:
        watched.train()
    result = stop.value.result
    assert (result.status, result.reason, result.global_step) == ("stopped", "SIGINT", 2)


def test_every_run_counts_its_signals_anew(kit: Any) -> None:
    """The first signal of a second run is a first one again."""
    for _ in range(2):
        net = net_that(kit, "train_step", lambda: signal.raise_signal(signal.SIGINT))
        assert kit.train(net, epochs=MANY).result.status == "stopped"


def test_test_stops_too(kit: Any) -> None:
    """`Trainer.test` raises as `Trainer.train` does; it has no whole outputs."""
    net = net_that(kit, "val_step", lambda: signal.raise_signal(signal.SIGINT), at=1)
    net.get_test_dataloaders = net.get_val_dataloaders
    with pytest.raises(RunInterrupted) as stop:
        kit.make_trainer(net).test()
    assert (stop.value.result.status, stop.value.result.reason) == ("stopped", "SIGINT")


# ---------------------------------------------------------------------------------------- whose handlers they are


def handlers() -> set[Any]:
    return {signal.getsignal(number) for number in BOTH}


def test_handlers_are_ours_during_the_run_only(kit: Any, host_handler: Any) -> None:
    """Whatever was there before is there again, also what only the system knows."""
    seen: list[set[Any]] = []
    net = net_that(kit, "train_step", lambda: seen.append(handlers()))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    kit.train(net)
    assert not seen[0] & {host_handler, signal.SIG_IGN, signal.SIG_DFL}
    assert signal.getsignal(signal.SIGINT) is host_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, host_handler)


def test_a_signal_that_the_process_ignores_stays_ignored(kit: Any, host_handler: Any) -> None:
    """As of a job that a shell has put into the background: Ctrl-C is meant for another program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    net = net_that(kit, "train_step", lambda: signal.raise_signal(signal.SIGINT))
    assert kit.train(net).result.status == "finished"
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, host_handler)


def test_handlers_are_restored_however_the_run_ends(kit: Any, host_handler: Any) -> None:
    """Also when it cannot even begin."""
    net = net_that(kit, "train_step", lambda: 1 / 0)  # type: ignore[arg-type]
    assert type(kit.train(net).error) is ZeroDivisionError
    assert handlers() == {host_handler}
    with RunFolder.open("runs/r", "r"):
        assert kit.train(kit.Net(), journal=True, run_id="r").error is not None
    assert handlers() == {host_handler}
    with pytest.raises(Unhandled, match="SIGINT"):
        signal.raise_signal(signal.SIGINT)


def test_train_on_another_thread_touches_no_handlers(kit: Any, host_handler: Any) -> None:
    """Python allows that to the main thread alone."""
    seen: list[set[Any]] = []
    net = net_that(kit, "train_step", lambda: seen.append(handlers()))
    outcomes: list[Any] = []
    thread = threading.Thread(target=lambda: outcomes.append(kit.train(net)))
    thread.start()
    thread.join(kit.WAIT_S)
    assert outcomes[0].result.status == "finished"
    assert seen == [{host_handler}]


@pytest.mark.anyio
async def test_run_never_touches_handlers(kit: Any, host_handler: Any) -> None:
    """A signal is the host's: its own handler gets it."""
    host = handlers()  # under trio or asyncio one of them may be the event loop's
    seen: list[set[Any]] = []
    net = net_that(kit, "train_step", lambda: seen.append(handlers()))
    async with kit.make_trainer(net).run() as run:
        assert handlers() == host
        await run.result()
    assert seen == [host]


# ------------------------------------------------------------------------------------------ dataloaders' workers

WORKERS = """
import multiprocessing, os, signal, threading
import torch
from torch import nn
from trainer import ModuleInterface, RunInterrupted, Trainer, TrainerArguments

os.setpgrp()  # what a terminal sends goes to the group: the workers get it as well

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

class Net(ModuleInterface):
    def __init__(self, hangs):
        super().__init__()
        self.hangs = hangs
        self.linear = nn.Linear(4, 1)
    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.SGD(self.parameters(), lr=0.01)], []
    def get_train_dataloader(self, sampler, batch_size):
        rows = Rows(self.hangs)
        return self.stream(torch.utils.data.DataLoader(rows, batch_size, num_workers=2, worker_init_fn=began))
    def stream(self, loader):
        batches = iter(loader)
        for number in range(1_000):
            if self.hangs and number == 4:  # the loop takes no stop before it has got this one
                os.write(1, b"asking\\n")
            yield next(batches)
    def get_val_dataloaders(self, sampler, batch_size):
        return None
    def train_step(self, global_step, batch, device):
        if not self.hangs and global_step == 2:
            os.killpg(0, signal.SIGINT)
        return self.linear(batch).mean()
    def val_step(self, global_step, batch, device): ...

arguments = TrainerArguments(train_batch_size=8, device="cpu", max_steps=1_000)
try:
    Trainer(Net(False), arguments, sinks=[], journal=False).train()
except RunInterrupted as stop:
    result = stop.result
print(result.status, result.reason, result.global_step, multiprocessing.active_children())
Trainer(Net(True), arguments, sinks=[], run_dir="run", run_id="r").train()
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at processes in /proc")
def test_signals_to_the_whole_group_leave_no_workers_behind(kit: Any, script: Any, tmp_path: Path) -> None:
    """As a terminal sends them: a first one does not kill the workers of a run that is to stop in order.

    Whichever comes second ends a wait for data that never comes, and the workers with it.
    """
    program = script(WORKERS)
    program.wait_for("stopped SIGINT 2 []")
    said = [program.process.stdout.readline().strip() for _ in range(4)]
    os.killpg(program.process.pid, signal.SIGINT)
    program.signal(signal.SIGTERM)
    code, out, _ = program.end()  # multiprocessing may complain of a worker that died while they spoke
    assert code in (143, -signal.SIGINT)
    assert out == ""
    assert {"waiting", "asking"} <= set(said)
    assert not [pid for pid in said if pid.isdigit() and Path(f"/proc/{pid}").exists()]
    assert kit.read_journal(tmp_path / "run")[-1].status == "cancelled"


GROUP = """
import json, os, signal, sys, threading, time
import torch
from torch.utils.data import DataLoader, Dataset
from trainer import ModuleInterface, RunTerminated, Trainer, TrainerArguments

class Rows(Dataset):
    def __init__(self, hangs_at):
        self.hangs_at = hangs_at
    def __len__(self):
        return 160
    def __getitem__(self, index):
        if index == self.hangs_at:
            os.write(said, b"reached\\n")
            threading.Event().wait(60)  # for as long as the test lasts
        return torch.full((4,), index / 160)

class Net(ModuleInterface):
    def __init__(self, place, quiet):
        super().__init__()
        self.place, self.quiet, self.kept = place, quiet, None
        self.linear = torch.nn.Linear(4, 1)
        with torch.no_grad():
            self.linear.weight.fill_(0.5)
            self.linear.bias.zero_()
    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.Adam(self.parameters(), lr=0.01)], []
    def loader(self, place, batch_size, hangs_at):
        rows = Rows(hangs_at if self.place == place and not self.quiet else None)
        return DataLoader(rows, batch_size, num_workers=2, prefetch_factor=4, persistent_workers=place == "persistent")
    def get_train_dataloader(self, sampler, batch_size):
        if self.place == "generator":
            return (batch for batch in self.loader("generator", batch_size, 64))
        self.kept = self.kept or self.loader("persistent" if self.place == "persistent" else "data", batch_size, 64)
        return self.kept
    def get_val_dataloaders(self, sampler, batch_size):
        return self.loader("validation", batch_size, 64)
    def train_step(self, global_step, batch, device):
        if not self.quiet and global_step == 5 and self.place in ("step", "accumulated"):
            os.write(said, b"reached\\n")
            torch.ones(1).sum()
            os.read(go, 1)  # the signal has been sent
            for _ in range(20_000):  # where torch's handler would raise
                pass
        if not self.quiet and global_step == 5 and self.place == "own data":
            next(iter(self.loader("own data", batch.shape[0], 0)))
        return (self.linear(batch) - 1).pow(2).mean()
    def val_step(self, global_step, batch, device):
        return self.linear(batch).mean()

def train(place, quiet, folder, **options):
    net = Net(place, quiet)
    limit = 4 if place == "accumulated" else None
    arguments = TrainerArguments(
        train_batch_size=8, gpu_batch_size_limit=limit, val_interval_steps=6, epochs=2, device="cpu", seed=1
    )
    return net, Trainer(net, arguments, sinks=[], run_dir=folder, run_id="r", **options).train()

def child(place, folder):
    os.setpgrp()
    try:
        train(place, False, folder)
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

place, how = sys.stdin.readline().split(",")
how = how.strip()
torch.set_num_threads(1)
hears, said = os.pipe()
go, going = os.pipe()
pid = os.fork()
if not pid:
    try:
        child(place, "run")
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
if outcome[0] == "stopped":
    said = 1
    resumed, _ = train(place, True, "run", resume="auto")
    whole, _ = train(place, True, "whole")
    print([bool(torch.equal(a, b)) for a, b in zip(resumed.parameters(), whole.parameters())], flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", ["group", "workers first"])
@pytest.mark.parametrize(
    ("place", "steps"),
    [("step", 5), ("data", None), ("persistent", None), ("generator", None), ("accumulated", 5), ("validation", 6)],
)
def test_sigterm_that_also_ends_the_workers_stops_the_run_in_order(
    script: Any, place: str, steps: int | None, how: str
) -> None:
    """As systemd and Slurm send it: the run stops at a boundary, with a checkpoint from which it resumes exactly.

    A worker reads up to eight batches ahead, so it may block while the loop is at any of the steps before that one.
    """
    program = script(GROUP)
    program.process.stdin.write(f"{place},{how}\n")
    program.process.stdin.flush()
    outcome = json.loads(program.process.stdout.readline() or program.end()[2])
    at = outcome[2]
    assert outcome == ["stopped", "SIGTERM", at, f"step-{at}.a1"]
    assert at == steps if steps is not None else 0 < at <= 8
    _, out, errors = program.end()
    assert out.strip() == "[True, True]", errors


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at processes in /proc")
def test_sigterm_that_ends_the_workers_of_a_steps_own_data_stops_the_run_without_a_checkpoint(script: Any) -> None:
    program = script(GROUP)
    program.process.stdin.write("own data,group\n")
    program.process.stdin.flush()
    assert json.loads(program.process.stdout.readline()) == ["stopped", "SIGTERM", 4, "none"]
    assert "workers died in train_step after global_step 4" in program.end()[2]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at processes in /proc")
def test_a_worker_that_is_killed_fails_the_run(script: Any) -> None:
    """By the kernel, for want of memory, for example: no signal to the run explains it."""
    program = script(GROUP)
    program.process.stdin.write("data,kill\n")
    program.process.stdin.flush()
    kind, text = json.loads(program.process.stdout.readline())
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


@pytest.mark.parametrize(
    "host", [signal.SIG_DFL, signal.SIG_IGN, lambda number, frame: None], ids=["default", "ignored", "own"]
)
def test_the_handler_for_dead_workers_is_ours_during_the_run_only(kit: Any, host: Any) -> None:
    before, is_set = signal.signal(signal.SIGCHLD, host), signal_handling._SIGCHLD_handler_set
    try:
        kit.train(kit.Net())
        assert signal.getsignal(signal.SIGCHLD) is host
        assert signal_handling._SIGCHLD_handler_set is is_set
    finally:
        signal.signal(signal.SIGCHLD, before)
