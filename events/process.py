"""A child process, and the channel of framed messages between it and the process that starts it.

`Child` is the parent's side, `Parent` the child's. The channel is a socket pair: each message is msgpack behind its
length, with lone surrogates escaped; nothing is unpickled. The end of the channel does not mean that the other side has
died, nor the reverse, because a process that either has forked may hold it open: the parent asks the system for the
child's exit code, the child compares its parent's process id. POSIX only.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Generic, NamedTuple, TypeVar

import msgspec

from events.log import logger
from events.wire import encode_escaped

_LOOK_S = 0.1
"""Maximum seconds until the parent sees that a deadline has passed, or that a child has died whose channel is open."""
_TERM_S = 2.0
"""Seconds between SIGTERM and SIGKILL."""
_ALIVE_S = 0.5
"""Maximum seconds until the child sees that its parent has died."""
_LENGTH = struct.Struct("<I")

T = TypeVar("T")


class Program(NamedTuple):
    """The command line, environment and working directory of a child."""

    command: list[str]
    env: Mapping[str, str]
    cwd: str | None = None

    @classmethod
    def of_module(cls, module: str, python: str | None, env: Mapping[str, str], cwd: str | None) -> Program:
        """Describe ``python -m module``. Without ``python``, the child finds the modules that this process finds.

        Args:
            env: Variables in addition to those of this process.
        """
        if python is not None and python != sys.executable:
            return cls([python, "-m", module], {**os.environ, **env}, cwd)
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if isinstance(entry, str))
        # -P: the working directory, where strangers may have put modules, is searched only if this process does so.
        return cls([sys.executable, "-P", "-m", module], {**os.environ, "PYTHONPATH": path, **env}, cwd)


_STARTING = threading.RLock()
"""Held while a child starts, and by any fork: `subprocess.Popen` waits until no process holds its pipe, and a
dataloader's worker that another thread forks meanwhile would hold it for its life."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_STARTING.acquire, after_in_parent=_STARTING.release, after_in_child=_STARTING.release)


class Child(Generic[T]):
    """A child process in a session of its own, from its start to its death.

    One thread calls `run`. The other methods may be called from any thread and do not wait.

    Args:
        output: Receives standard output and standard error.
        decoder: Of the messages that the child sends.
        first: The first message to the child.

    Raises:
        OSError: The child cannot be started.
    """

    def __init__(
        self, program: Program, output: IO[bytes], decoder: msgspec.msgpack.Decoder[T], first: msgspec.Struct
    ) -> None:
        self.spares_group = False
        """Whether the processes that the child leaves behind may run on: only if it has ended cleanly."""
        self._decoder = decoder
        self._queued = deque([_frame(first)])
        self._sending = threading.Lock()
        self._signalling = threading.Lock()  # held to reap, too: the process id of a reaped child may be reused
        self._deadline: float | None = None
        self._terminated = False
        self._exit_is_lost = False
        self._reaped = False
        self._channel, channel = socket.socketpair()
        self._channel.setblocking(False)
        with channel:
            try:
                with _STARTING:
                    self._popen = subprocess.Popen(
                        [*program.command, str(channel.fileno()), str(os.getpid())],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        env=program.env,
                        cwd=program.cwd,
                        pass_fds=(channel.fileno(),),
                        start_new_session=True,  # Ctrl-C in a terminal is for the parent; and the child leads a group
                    )
            except BaseException:  # propagates unchanged, without the channel
                self._channel.close()
                raise
        self._flush()  # now: this process may be killed before it calls `run`

    @property
    def pid(self) -> int | None:
        """The process id; None once the child has died and was reaped."""
        return None if self._reaped else self._popen.pid

    @property
    def is_overdue(self) -> bool:
        """Whether its deadline has passed, so that it was ended from here."""
        return self._terminated

    def send(self, message: msgspec.Struct) -> None:
        """Send a message; what the channel has no room for is sent later. Signal handlers may call this."""
        self._queued.append(_frame(message))
        self._flush()

    def end_within(self, timeout_s: float) -> None:
        """Replace the child's deadline: at it, its process group gets SIGTERM, and SIGKILL two seconds later."""
        self._deadline = time.monotonic() + timeout_s

    def kill(self) -> None:
        """Kill the child's process group."""
        self._signal(signal.SIGKILL)

    def run(self, take: Callable[[T], None]) -> int | None:
        """Call ``take`` with each message; return when the child has died. Its process group is killed then.

        Returns:
            The exit code; minus the number of the signal that killed the child; None if the exit code was lost, because
            the host program waits for every child or ignores SIGCHLD.
        """
        frames, poll = _Frames(self._channel), select.poll()
        poll.register(self._channel, select.POLLIN)
        try:
            while not (self._has_died() and (frames.ended or not poll.poll(0))):
                if frames.ended:
                    time.sleep(_LOOK_S)
                elif poll.poll(_LOOK_S * 1_000):
                    frames.receive()
                    for message in frames.decoded(self._decoder):
                        take(message)
                self._flush()
                self._hold_to_deadline()
        finally:
            with self._sending:
                self._channel.close()
            if not self.spares_group or not self._has_died():
                self.kill()
            while not self._has_died():
                time.sleep(_LOOK_S)
            with self._signalling:
                code = self._popen.wait()
                self._reaped = True
        return None if self._exit_is_lost else code

    def _has_died(self) -> bool:
        """Whether the child has died. Its exit code is not taken, so that no other process group gets its number."""
        with self._signalling:
            if not hasattr(os, "waitid"):  # macOS, before Python 3.13
                return self._popen.poll() is not None
            try:
                return os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            except ChildProcessError:
                self._exit_is_lost = True
                return True

    def _hold_to_deadline(self) -> None:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            if self._terminated:
                logger.warning(f"process {self.pid} did not end in time and is killed")
            self._signal(signal.SIGKILL if self._terminated else signal.SIGTERM)
            self._terminated = True
            self.end_within(_TERM_S)

    def _signal(self, number: int) -> None:
        with self._signalling, contextlib.suppress(OSError):
            if not self._reaped and not self._exit_is_lost:
                os.killpg(self._popen.pid, number)

    def _flush(self) -> None:
        # A signal handler must not wait for the thread that it interrupts. `run` sends what is left here.
        if self._sending.acquire(blocking=False):
            try:
                while self._queued:
                    frame = self._queued[0]
                    sent = self._channel.send(frame)
                    if sent == len(frame):
                        self._queued.popleft()
                    else:
                        self._queued[0] = frame[sent:]
            except OSError:  # the channel is full or closed
                pass
            finally:
                self._sending.release()


class Parent:
    """The process that started this one with `Child`, which has added the channel and its process id to ``argv``.

    From then on, all that this process has printed, and the Python stack of a fatal signal, survive its death.
    """

    def __init__(self) -> None:
        faulthandler.enable()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)
        self._channel = socket.socket(fileno=int(sys.argv[1]))
        self._channel.set_inheritable(False)
        self._pid = int(sys.argv[2])
        self._frames = _Frames(self._channel)
        self._sending = threading.Lock()

    @property
    def is_gone(self) -> bool:
        """Whether the parent has died, in whatever way."""
        return os.getppid() != self._pid

    def send(self, message: msgspec.Struct) -> None:
        """Send a message; wait until the parent reads it or is gone. Any thread."""
        frame, poll = _frame(message), select.poll()
        poll.register(self._channel, select.POLLOUT)
        with self._sending, contextlib.suppress(OSError):
            while frame and not self.is_gone:
                with contextlib.suppress(BlockingIOError):
                    if poll.poll(_ALIVE_S * 1_000):
                        frame = frame[self._channel.send(frame, socket.MSG_DONTWAIT) :]

    def receive(self, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
        """Wait for the next message; None at the end of the channel or of the parent. One thread at a time."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        while True:
            for message in self._frames.decoded(decoder):
                return message
            if self._frames.ended or self.is_gone:
                return None
            if poll.poll(_ALIVE_S * 1_000):
                self._frames.receive()

    def serve(
        self,
        decoder: msgspec.msgpack.Decoder[T],
        take: Callable[[T | None], None],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """On a new thread, call ``take`` with each message, and with None once the parent has died.

        Args:
            meanwhile: Called at least twice per second until then.
        """

        def serve() -> None:
            poll = select.poll()
            poll.register(self._channel, select.POLLIN)
            while not self.is_gone:
                for message in self._frames.decoded(decoder):
                    take(message)
                meanwhile()
                if self._frames.ended:
                    time.sleep(_ALIVE_S)
                elif poll.poll(_ALIVE_S * 1_000):
                    self._frames.receive()
            take(None)

        threading.Thread(target=serve, name="stagecast-parent", daemon=True).start()


class _Frames:
    """What a channel brings, cut into messages."""

    def __init__(self, channel: socket.socket) -> None:
        self.ended = False
        self._channel = channel
        self._data = bytearray()

    def receive(self) -> None:
        """Receive what there is."""
        try:
            data = self._channel.recv(2**16)
        except BlockingIOError:
            return
        except OSError:  # reset, or closed by the user's code
            data = b""
        self._data += data
        self.ended = not data

    def decoded(self, decoder: msgspec.msgpack.Decoder[T]) -> Iterator[T]:
        """Remove and yield the whole messages. One that cannot be decoded is logged and skipped."""
        while len(self._data) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._data)[0]
            if len(self._data) < end:
                return
            frame = bytes(self._data[_LENGTH.size : end])
            del self._data[:end]
            try:
                message = decoder.decode(frame)
            except (ValueError, RecursionError) as error:
                logger.warning(f"a message from another process cannot be decoded: {error}")
            else:
                yield message


def _frame(message: msgspec.Struct) -> bytes:
    data = encode_escaped(message, msgspec.msgpack.encode)
    return _LENGTH.pack(len(data)) + data


def signal_name(code: int | None) -> str | None:
    """The signal of an exit code, such as ``SIGKILL``; None if the process ended by itself."""
    if code is None or code >= 0:
        return None
    known = {number.value: number.name for number in signal.Signals}
    return known.get(-code, f"signal {-code}")


def exit_in_words(code: int | None) -> str:
    """How a process ended, as the rest of a sentence about it."""
    if (name := signal_name(code)) is not None:
        hint = " (by a person, or by the kernel because memory ran out)" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"
    return f"ended with exit code {code}" if code is not None else "ended (its exit code was lost)"
