"""Python programs that start in milliseconds: forked from a process that has imported torch and the packages.

`Popen` replaces `subprocess.Popen` for commands such as ``[sys.executable, "-m", "trainer.cli.main"]``; any other
command, and an environment that an interpreter reads only at its start, begins cold. A forked program is a child of the
process that asked for it, with its own working directory, environment, arguments and ``__main__``.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import functools
import gc
import importlib
import io
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_COLD = subprocess.Popen
_ENVIRONMENT = {**os.environ, "PYTHONPATH": ""}
_AT_START = ("PYTHON", "LC_", "LANG", "LD_", "OMP_", "MKL_", "MALLOC_")
_ANY_TIME = {"PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONSAFEPATH", "PYTHONIOENCODING"}
_SUBREAPER = 36  # of prctl(2): orphans of this process's children become its own
_PRELOADED = """
    anyio._backends._asyncio anyio._backends._trio numpy.random obstore.store torch._dynamo torch.utils.data
    sinks.checkpoints.uploader sinks.checkpoints.writer
    trainer.trainer trainer.cli.main trainer.cli.train trainer.remote.child
"""
"""What programs would import on their way."""
_FDS = 200
"""Where a program's file descriptors are kept until its own numbers are free."""


class _Order(NamedTuple):
    argv: list[str]
    safe_path: bool
    cwd: str
    env: dict[str, str]
    numbers: list[int]
    new_session: bool


def _order(command: Any, env: Mapping[str, str] | None, cwd: Any, numbers: list[int], new_session: bool) -> Any:
    """What the nursery needs to know; None if it cannot start this."""
    if isinstance(command, (str, bytes, os.PathLike)) or os.fspath(command[0]) != sys.executable:
        return None
    words, safe = [os.fsdecode(word) for word in command[1:]], False
    env = {os.fsdecode(name): os.fsdecode(value) for name, value in (os.environ if env is None else env).items()}
    while words and words[0] in ("-P", "-u"):
        safe |= words.pop(0) == "-P"
    if not words or (words[0].startswith("-") and words[0] not in ("-c", "-m")):
        return None
    for name in env:
        if name.startswith(_AT_START) and name not in _ANY_TIME and env[name] != _ENVIRONMENT.get(name):
            return None
    return _Order(
        words,
        safe or bool(env.get("PYTHONSAFEPATH")),
        os.path.abspath(os.fsdecode(cwd or "")),
        env,
        numbers,
        new_session,
    )


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """A process that the nursery forks, if it can."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *rest: Any) -> None:
        _, pass_fds, cwd, env, _, _, shell, stdin, _, _, stdout, _, stderr, *_, new_session, group = rest
        plain = preexec_fn is None and executable is None and not shell and group == -1
        ends = [own if own != -1 else standard for standard, own in enumerate((stdin, stdout, stderr))]
        order = _order(args, env, cwd, [0, 1, 2, *pass_fds], new_session) if plain else None
        if order is None or (cwd is not None and not os.path.isdir(cwd)):
            super()._execute_child(args, executable, preexec_fn, *rest)  # type: ignore[misc]
            return
        self.pid = _nursery().fork(order, [*ends, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(*rest[7:13])  # type: ignore[attr-defined]


class _Nursery:
    """The process that forks. It starts beside the first tests, and ends with this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._libc = ctypes.CDLL(None)
        self._socket, theirs = socket.socketpair()
        self._is_ready = False
        with theirs:
            command = [sys.executable, "-P", __file__, str(theirs.fileno())]
            self._process = _COLD(command, cwd=ROOT, env=_ENVIRONMENT, pass_fds=[theirs.fileno()])
        atexit.register(self._end)

    def fork(self, order: _Order, fds: list[int]) -> int:
        """Start a program as a child of this process; return its process id."""
        data = json.dumps(order).encode()
        with self._lock:
            self._is_ready = self._is_ready or self._socket.recv(1) == b"r"
            self._libc.prctl(_SUBREAPER, 1)
            try:
                socket.send_fds(self._socket, [len(data).to_bytes(8, "little")], fds)
                self._socket.sendall(data)
                return int.from_bytes(self._socket.recv(8, socket.MSG_WAITALL), "little")
            finally:
                self._libc.prctl(_SUBREAPER, 0)

    def _end(self) -> None:
        self._socket.close()
        self._process.wait()


_nursery: Callable[[], _Nursery] = functools.cache(_Nursery)


def start() -> None:
    """Start the nursery, if that is still to be done; does not wait."""
    _nursery()


# ------------------------------------------------------------------------------------------- in the nursery's process


def _next_program(channel: socket.socket) -> _Order:
    """Fork for each order; return in the program that is to do it."""
    channel.sendall(b"r")
    while True:
        size, fds, _, _ = socket.recv_fds(channel, 8, 64)
        if not size:
            sys.exit()
        order = _Order(*json.loads(channel.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL)))
        told, tell = os.pipe()
        wait, go = os.pipe()
        if (between := os.fork()) == 0:  # ends at once, so that its child becomes one of the process that ordered it
            if (pid := os.fork()) != 0:
                os.write(tell, pid.to_bytes(8, "little"))
                os._exit(0)
            os.close(go)
            os.read(wait, 1)
            channel.detach()  # its number may be one of the program's
            _become(order, fds)
            return order
        os.waitpid(between, 0)
        channel.sendall(os.read(told, 8))
        for fd in (*fds, told, tell, wait, go):
            os.close(fd)


def _become(order: _Order, fds: list[int]) -> None:
    """Take on the program's file descriptors, session, directory, environment and arguments."""
    if order.new_session:
        os.setsid()
    kept = [fcntl.fcntl(fd, fcntl.F_DUPFD, _FDS) for fd in fds]
    os.closerange(3, _FDS)
    for fd, number in zip(kept, order.numbers, strict=True):
        os.dup2(fd, number)
    os.closerange(_FDS, _FDS + 2 * len(kept) + 64)
    os.chdir(order.cwd)
    os.environ.clear()
    os.environ.update(order.env)
    unbuffered = bool(order.env.get("PYTHONUNBUFFERED"))
    encoding, _, handler = order.env.get("PYTHONIOENCODING", "").partition(":")
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    for name, fd, errors in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
        raw = io.FileIO(fd, "w", closefd=False)
        buffer: Any = raw if unbuffered else io.BufferedWriter(raw)
        lines = fd == 2 or raw.isatty()
        errors = handler or errors if fd == 1 else errors
        setattr(sys, name, io.TextIOWrapper(buffer, encoding or None, errors, None, lines, unbuffered))
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.argv = order.argv
    given = order.env.get("PYTHONPATH")
    searched = [os.path.abspath(entry) for entry in given.split(os.pathsep)] if given else []
    script = order.argv[0]
    own = {"-c": "", "-m": os.getcwd()}.get(script, os.path.dirname(os.path.realpath(script)))
    sys.path[:0] = [*([] if order.safe_path else [own]), *searched]


def _run() -> None:
    """Run the program in the interpreter's ``__main__``; its exceptions and exit code are this process's."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if sys.argv[0] == "-m":
        module = sys.argv.pop(1)
        sys.modules.pop(module, None)
        runpy._run_module_as_main(module)  # type: ignore[attr-defined]
        return
    if sys.argv[0] == "-c":
        code = compile(sys.argv.pop(1), "<string>", "exec")
    else:
        main.__file__ = sys.argv[0]
        with open(sys.argv[0], "rb") as script:
            code = compile(script.read(), sys.argv[0], "exec")
    exec(code, main.__dict__)


if __name__ == "__main__":
    this = sys.modules["__main__"]  # keeps it while another is ``__main__``
    for preloaded in _PRELOADED.split():
        importlib.import_module(preloaded)
    gc.freeze()
    _next_program(socket.socket(fileno=int(sys.argv[1])))
    _run()
