"""Child processes that hang, die, fork, close their channel and outlive their parents."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from events import process
from events.process import Child, Program, exit_in_words, signal_name

LIMIT_S = 30.0
TEXTS = msgspec.msgpack.Decoder(str)
BARE = """import os, sys, time
def send(text):
    os.write(int(sys.argv[1]), (len(text) + 1).to_bytes(4, 'little') + bytes([160 + len(text)]) + text)
"""
FORK = "if os.fork() == 0: time.sleep({})\n"


def encoded(text: str) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(text))


def bare(text: str) -> Program:
    """A program without stagecast: it can ``send(b"a short text")``."""
    return Program([sys.executable, "-S", "-c", BARE + text], os.environ)


class Started:
    """A child on a thread of its own, with what it has sent and printed, and how it has ended."""

    def __init__(self, program: Program) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # until the child has died
        self.child = Child(program, self._output, TEXTS, encoded("first"))
        assert self.child.pid is not None
        self.pid = self.child.pid
        self.received: list[str] = []
        self.printed = ""
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._output as output:
            self.code = self.child.run(self.received.append)
            self.printed = os.pread(output.fileno(), 10_000, 0).decode()

    def wait(self) -> int | None:
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        return self.code

    @property
    def group(self) -> list[int]:
        return [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if group_of(pid) == self.pid]


def group_of(pid: int) -> int:
    """The process group of a process that is alive."""
    try:
        state, _, leader, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state == "Z" else int(leader)


def until(happens: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not happens():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_a_child_has_died_although_a_process_that_it_forked_holds_the_channel_open(tmp_path: Path) -> None:
    """That process is killed with it, or left alone if the child has ended cleanly. No descriptor stays open."""
    before = len(os.listdir("/proc/self/fd"))
    died = Started(bare(FORK.format(100) + "send(b'last words')"))
    assert died.wait() == 0
    assert died.received == ["last words"]
    until(lambda: died.group == [], "a process is left")
    survivor = (
        "parent = os.getpid()\nif os.fork() == 0:\n"
        "    while os.getppid() == parent: time.sleep(0.01)\n"
        "    time.sleep(0.2)\n    open({!r}, 'w').close()"
    )
    ended = Started(bare(survivor.format(str(tmp_path / "alive"))))
    ended.child.spares_group = True
    assert ended.wait() == 0
    assert ended.child.pid is None
    until((tmp_path / "alive").exists, "the process was killed")
    with tempfile.TemporaryFile() as output, pytest.raises(FileNotFoundError, match="no-such-program"):
        Child(Program(["no-such-program"], {}), output, TEXTS, encoded("first"))
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_process_that_is_forked_meanwhile_does_not_hold_up_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataloader's worker, for example, which inherits all pipes that are open at that moment."""
    fork_exec = subprocess._fork_exec  # type: ignore[attr-defined]
    workers: list[int] = []

    def fork() -> None:
        if (pid := os.fork()) == 0:
            try:
                time.sleep(LIMIT_S)
            finally:
                os._exit(0)
        workers.append(pid)

    forking = threading.Thread(target=fork)

    def meanwhile(*args: Any) -> int:
        forking.start()
        forking.join(0.5)  # in vain, if forks wait for the start
        pid: int = fork_exec(*args)
        return pid

    monkeypatch.setattr(subprocess, "_fork_exec", meanwhile)
    started: list[Started] = []
    starting = threading.Thread(target=lambda: started.append(Started(bare("send(b'ready')"))), daemon=True)
    starting.start()
    starting.join(LIMIT_S / 3)
    waits = starting.is_alive()
    forking.join()
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not waits, "the start waited for the process that was forked"
    assert started[0].wait() == 0


def test_a_child_that_closes_the_channel_is_waited_for() -> None:
    """The end of the channel is not its death."""
    child = Started(bare("os.close(int(sys.argv[1])); time.sleep(0.3); os._exit(5)"))
    assert child.wait() == 5


def test_messages_to_a_child_that_reads_nothing_wait_for_it(tmp_path: Path) -> None:
    """Several megabytes of them; all arrive, whole and in order, once the child reads."""
    text = (
        "send(b'deaf')\nimport socket\n"
        f"while not os.path.exists({str(tmp_path / 'go')!r}) and os.getppid() > 1: time.sleep(0.01)\n"
        "channel = socket.socket(fileno=int(sys.argv[1])).makefile('rb')\n"
        "channel.read(int.from_bytes(channel.read(4), 'little'))\n"
        "for number in range(20):\n"
        "    frame = channel.read(int.from_bytes(channel.read(4), 'little'))\n"
        "    assert frame.endswith(b'%05d' % number + b'x' * 300_000), frame[:20]\n"
    )
    child = Started(bare(text))
    until(lambda: child.received, "it does not start")
    for number in range(20):
        child.child.send(encoded(f"{number:05}" + "x" * 300_000))
    (tmp_path / "go").touch()
    assert child.wait() == 0, child.printed
    child.child.send(msgspec.Raw(b""))  # too late, and harmless


def test_a_message_that_cannot_be_decoded_is_logged_and_skipped(caplog: pytest.LogCaptureFixture) -> None:
    """The messages around it arrive, also in pieces."""
    text = "send(b'one')\nfor part in (b'\\2\\0', b'\\0\\0\\xc1'): os.write(int(sys.argv[1]), part); time.sleep(0.05)\n"
    child = Started(bare(text + "os.write(int(sys.argv[1]), b'!')\nsend(b'two')"))
    assert child.wait() == 0
    assert child.received == ["one", "two"]
    assert "a message from another process cannot be decoded" in caplog.text


def test_a_child_is_terminated_at_its_deadline_and_killed_two_seconds_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning names one that ignores SIGTERM."""
    monkeypatch.setattr(process, "_TERM_S", 0.2)
    obedient = Started(bare("send(b'ready')\ntime.sleep(100)"))
    stubborn = Started(bare("import signal\nsignal.signal(15, signal.SIG_IGN)\nsend(b'ready')\ntime.sleep(100)"))
    for child in (obedient, stubborn):
        until(lambda child=child: child.received, "it does not start")
        child.child.end_within(0.0)
    assert (obedient.wait(), stubborn.wait()) == (-signal.SIGTERM, -signal.SIGKILL)
    err = caplog.text
    assert f"process {stubborn.pid} did not end in time and is killed" in err
    assert str(obedient.pid) not in err


def test_killing_a_child_kills_its_group_at_once() -> None:
    """From any thread, and again when it is dead."""
    child = Started(bare(FORK.format(100) + "send(b'ready')\ntime.sleep(100)"))
    until(lambda: child.received, "it does not start")
    child.child.kill()
    assert child.wait() == -signal.SIGKILL
    child.child.kill()
    until(lambda: child.group == [], "a process is left")


def test_an_exception_of_the_receiver_leaves_no_child() -> None:
    """It is raised when the child is dead."""

    def refuse(message: str) -> None:
        raise LookupError(message)

    with tempfile.TemporaryFile() as output:
        child = Child(bare("send(b'ready')\ntime.sleep(100)"), output, TEXTS, encoded("first"))
        pid = child.pid
        with pytest.raises(LookupError, match="ready"):
            child.run(refuse)
    assert pid is not None
    assert group_of(pid) == 0


def test_the_exit_code_of_a_child_that_somebody_else_has_reaped_is_lost() -> None:
    """As in a host that ignores SIGCHLD, or waits for every child."""
    with tempfile.TemporaryFile() as output:
        child = Child(bare("time.sleep(100)"), output, TEXTS, encoded("first"))
        assert child.pid is not None
        child.kill()
        os.waitpid(child.pid, 0)
        assert child.run(print) is None


CHILD = """
import threading
import msgspec
from events.process import Parent
parent, texts, orphaned = Parent(), msgspec.msgpack.Decoder(str), threading.Event()
def take(text):
    parent.send(msgspec.Raw(msgspec.msgpack.encode(f"got {text}")))  # returns, though it is not read, without a parent
    if text is None:
        orphaned.set()
print("first", parent.receive(texts), flush=True)
parent.serve(texts, take)
orphaned.wait()
print("orphaned", flush=True)
"""
PARENT = """
import os, sys, time
import msgspec
from events.process import Child, Program
one, two = (msgspec.Raw(msgspec.msgpack.encode(text)) for text in ("one", "two"))
with open("output", "wb") as output:
    child = Child(Program.of_module("orphan", None, {}, None), output, msgspec.msgpack.Decoder(str), one)
child.send(two)
holder = os.fork()
if holder == 0:
    time.sleep(100)  # holds our end of the channel, and reads nothing
def take(text):
    print(holder, text, flush=True)
    os.kill(os.getpid(), 9)
child.run(take)
"""


def test_a_child_sees_the_death_of_its_parent_though_the_channel_stays_open(tmp_path: Path) -> None:
    """It has received before what its parent sent, and ends."""
    (tmp_path / "orphan.py").write_text(CHILD)
    (tmp_path / "parent.py").write_text(PARENT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path, env=env, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        holder, text = parent.stdout.readline().decode().split(maxsplit=1)
        try:
            until(lambda: (tmp_path / "output").read_text() == "first one\norphaned\n", "the child does not notice")
        finally:
            os.kill(int(holder), signal.SIGKILL)
    assert (text, parent.returncode) == ("got two\n", -signal.SIGKILL)


def test_a_program_of_this_interpreter_finds_the_modules_that_are_found_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless another path is chosen; and never those that lie in the working directory by accident."""
    monkeypatch.setattr(sys, "path", [*sys.path, "relative", Path("odd")])
    program = Program.of_module("m", None, {"A": "b"}, "/")
    assert program.command == [sys.executable, "-P", "-m", "m"]
    assert program.env["PYTHONPATH"].endswith(f"{os.pathsep}{os.path.abspath('relative')}")
    assert (program.env["A"], program.cwd) == ("b", "/")
    assert Program.of_module("m", None, {"PYTHONPATH": "x"}, None).env["PYTHONPATH"] == "x"
    other = Program.of_module("m", "/other/python", {}, None)
    assert (other.command, other.env.get("PYTHONPATH")) == (["/other/python", "-m", "m"], os.environ.get("PYTHONPATH"))


@pytest.mark.parametrize(
    ("code", "name", "words"),
    [
        (0, None, "ended with exit code 0"),
        (-11, "SIGSEGV", "was killed by SIGSEGV"),
        (-9, "SIGKILL", "was killed by SIGKILL (by a person, or by the kernel because memory ran out)"),
        (-60, "signal 60", "was killed by signal 60"),
        (None, None, "ended (its exit code was lost)"),
    ],
)
def test_an_exit_code_is_described_in_words(code: int | None, name: str | None, words: str) -> None:
    assert (signal_name(code), exit_in_words(code)) == (name, words)
