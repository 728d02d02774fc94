"""The process of a launched run, as the process that launched it has it: on one thread, from its start to its death.

The thread starts it, reads what it says, passes commands on, and holds it to its deadlines. Tasks only look: nothing
here waits for the process in an event loop, and no cancellation can leave one behind that nobody knows.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from typing import Any

import anyio
import msgspec

from events.errors import RunCancelled
from events.log import logger
from events.protocol import RunResult
from trainer.remote.child import (
    EXIT_S,
    Cancel,
    Cancelling,
    Ended,
    LaunchConfig,
    Logged,
    Message,
    Ready,
    take_messages,
)
from trainer.remote.launch_report import crash, error_of

_POLL_S = 0.02
"""How soon a task sees what the thread knows."""
_LOOK_S = 0.05
"""How soon the thread sees that the process has died, and that there is more to send."""
_TERM_S = 2.0
"""Between SIGTERM and SIGKILL."""


class _Flag:
    """Set by a thread, waited for by any number of tasks in any event loop."""

    def __init__(self) -> None:
        self._flag = threading.Event()
        self.set = self._flag.set
        self.is_set = self._flag.is_set

    async def wait(self) -> None:
        while not self._flag.is_set():  # noqa: ASYNC110  # it belongs to no event loop, so it can wake none
            await anyio.sleep(_POLL_S)


class LaunchedProcess:
    """The process of a launched run, from its start to its death, on a thread of its own.

    `send` and `cancel` may be called from any thread, and wait for nothing.
    """

    def __init__(self, config: LaunchConfig, command: list[str], cwd: str | None, env: dict[str, str]) -> None:
        self.ready: Ready | None = None
        self.started, self.decided, self.ended = _Flag(), _Flag(), _Flag()
        self._command, self._cwd, self._env = command, cwd, env
        self._factory = config.factory
        self._result: RunResult | None = None
        self._error: BaseException | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        self._stdin: int | None = None
        self._lines: deque[bytes] = deque([msgspec.json.encode(config) + b"\n"])
        self._rest = b""
        self._sending = threading.Lock()
        self._cancel_reason: str | None = None
        self._deadline: float | None = None
        """When it must have done what is asked of it next, or is signalled."""
        self._terminated = False
        self._taken_by_others = False
        self._log: Any = None
        self._thread = threading.Thread(target=self._run, name="stagecast-launched-run", daemon=True)

    def start(self) -> None:
        """Start the process; does not wait for it."""
        self._thread.start()

    def send(self, line: bytes) -> None:
        """Pass a line on. One that the pipe has no room for follows later."""
        self._lines.append(line + b"\n")
        self._flush()

    def cancel(self, reason: str) -> None:
        """Have the run end at its next step, and the process after it; kill what does not."""
        if self._cancel_reason is None:
            self._cancel_reason = reason
            self.send(msgspec.json.encode(Cancel(reason)))

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancel_reason is not None

    def outcome(self) -> RunResult:
        """How the run ended, once that is decided; raises what it raised."""
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    # ------------------------------------------------------------------------------------------ on its thread

    def _run(self) -> None:
        try:
            with tempfile.TemporaryFile() as self._log:
                self._live()
        except BaseException as error:  # the thread's border: raised where the run is waited for
            self._error = self._error or error
        finally:
            for flag in (self.decided, self.ended, self.started):
                flag.set()

    def _live(self) -> None:
        messages, theirs = os.pipe()
        try:
            try:
                self._popen = popen = subprocess.Popen(
                    [*self._command, str(theirs)],
                    stdin=subprocess.PIPE,
                    stdout=self._log,
                    stderr=self._log,
                    bufsize=0,
                    cwd=self._cwd,
                    env=self._env,
                    pass_fds=(theirs,),
                    start_new_session=True,  # Ctrl-C in the terminal is this process's; and all its workers are a group
                )
            finally:
                os.close(theirs)
            with popen:
                try:
                    assert popen.stdin is not None
                    os.set_blocking(popen.stdin.fileno(), False)
                    self._stdin = popen.stdin.fileno()
                    self._follow(messages)
                finally:
                    with self._sending:
                        self._stdin = None
                    self._bury()
        finally:
            os.close(messages)

    def _follow(self, messages: int) -> None:
        """Read and write until the process has died.

        That the pipe ends does not tell it, nor that it does not: dataloader workers hold it open, too.
        """
        poll = select.poll()
        poll.register(messages, select.POLLIN)
        data, is_open = b"", True
        while True:
            dead = self._has_died()
            if is_open and poll.poll(0 if dead else _LOOK_S * 1_000):
                received = os.read(messages, 2**16)
                is_open = bool(received)
                taken, data = take_messages(data + received)
                for message in taken:
                    self._take(message)
            elif dead:
                return
            elif not is_open:
                time.sleep(_LOOK_S)
            self._flush()
            self._press()

    def _has_died(self) -> bool:
        """Whether it has, leaving its exit code: as long as that is not taken, its group's number is not given anew."""
        assert self._popen is not None
        if not hasattr(os, "waitid"):  # macOS, before Python 3.13
            return self._popen.poll() is not None
        try:
            return os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # a host that waits for any child, or ignores SIGCHLD
            self._taken_by_others = True
            return True

    def _take(self, message: Message) -> None:
        now = time.monotonic()
        if isinstance(message, Ready):
            self.ready = message
            self.started.set()
            if self._cancel_reason is not None:  # which it may have been told too early
                self.send(msgspec.json.encode(Cancel(self._cancel_reason)))
                self._deadline = now + message.grace_s
        elif isinstance(message, Cancelling):
            self._deadline = now + (self.ready.cancel_s if self.ready is not None else 0.0)
        elif isinstance(message, Logged):
            _log(message)
        else:
            if isinstance(message, Ended):
                self._result = result = message.result
                for problem in result.problems:
                    logger.warning(problem, run_id=result.run_id, global_step=result.global_step)
            else:
                self._error = error_of(message)
            self._deadline = now + EXIT_S
            self.decided.set()

    def _press(self) -> None:
        """Hold the process to its deadlines."""
        now = time.monotonic()
        if self._cancel_reason is not None and self._deadline is None:
            self._deadline = now + (self.ready.grace_s if self.ready is not None else 0.0)
        if self._deadline is None or now < self._deadline:
            return
        if self._terminated:
            logger.warning("the process of a launched run did not end in time, and is killed")
            self._signal(signal.SIGKILL)
        else:
            self._signal(signal.SIGTERM)
        self._terminated = True
        self._deadline = now + _TERM_S

    def _signal(self, number: int) -> None:
        assert self._popen is not None
        with contextlib.suppress(OSError):
            os.killpg(self._popen.pid, number)

    def _flush(self) -> None:
        """Write what there is to send, as far as the pipe takes it. A signal handler may interrupt this, and call it.

        Who finds somebody else at it leaves: what was added is sent then, or when the thread looks next.
        """
        if not self._sending.acquire(blocking=False):
            return
        try:
            while self._stdin is not None and (self._rest or self._lines):
                self._rest = self._rest or self._lines.popleft()
                self._rest = self._rest[os.write(self._stdin, self._rest) :]
        except BlockingIOError:
            pass
        except OSError:  # it has died: the thread sees that
            self._stdin = None
        finally:
            self._sending.release()

    def _bury(self) -> None:
        """It has died: end what is left of its group, and find out how the run ended, if it did not say so."""
        assert self._popen is not None
        crashed = self._result is None and self._error is None
        if not self._has_died() or ((crashed or self._cancel_reason is not None) and not self._taken_by_others):
            self._signal(signal.SIGKILL)  # after an orderly end, what the user has left running is the user's
        code = self._popen.wait()
        if not crashed:
            return
        if self._cancel_reason is None:
            self._error = crash(self._factory, self.ready, None if self._taken_by_others else code, self._log)
        else:
            name = self.ready.run_id if self.ready is not None else self._factory
            self._error = RunCancelled(f"run {name} was cancelled: {self._cancel_reason}; its process was killed")


def _log(logged: Logged) -> None:
    """Log here what the process has logged: its own stderr is a file."""
    text = logged.message
    if logged.repeats:
        text += f" [{logged.repeats:,} more like this before]"
    origin = {} if logged.run_id is None else {"run_id": logged.run_id, "global_step": logged.global_step}
    (logger.error if logged.level == "error" else logger.warning)(text, **origin)
