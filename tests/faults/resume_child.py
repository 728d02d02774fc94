"""A process that has imported everything, and forks runs that get signals, or fork themselves; see `Children`.

Each line of its input is a job, as JSON: the name of a function below and its arguments. The child does the job on its
main thread and ends as any program does, with the interpreter's finalisation. The answer is one line: what the child
reported, its exit code, and whether anything that it has started outlived it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:1] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

Report = Callable[..., None]
WAIT_S = 30.0


# ------------------------------------------------------------------------------------------------ the other end


class Children:
    """The other end: starts this file, and gives it jobs. One at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, job: str, **arguments: Any) -> tuple[dict[str, list[Any]], int, str]:
        """Have a child do a job. Returns what it reported, by its first word; its exit code; its errors."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"job": job, "arguments": arguments}, default=os.fspath) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        said: dict[str, list[Any]] = {}
        for word, *rest in answer["said"]:
            said.setdefault(word, []).append(rest[0] if len(rest) == 1 else rest)
        assert not answer["left"], "something that the child has started is still there"
        return said, answer["status"], answer["errors"]


@contextlib.contextmanager
def children() -> Iterator[Children]:
    """Some that are ready; their processes have ended afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, folder]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield Children(process)
        finally:
            process.kill()
            process.communicate()


# ------------------------------------------------------------------------------------------------------ the jobs


def sigterm(
    report: Report,
    run_dir: str,
    case: dict[str, Any],
    places: list[str],
    step: int = 7,
    every_steps: int = 3,
    url: str | None = None,
) -> None:
    """Train, and send a SIGTERM to this process when it comes to each of these places, in turn.

    Places: ``train`` and ``val`` (the second batch), ``first batch`` (where a row is read, by whomever); ``save`` and
    ``upload``, and ``last save`` and ``last upload``, which are those after the stop: on the thread that does it, which
    goes on when the signal was handled.
    """
    import resume_runs as runs

    from events.checkpoint import disk
    from events.checkpoint.remote import RemoteStore
    from sinks.checkpoints.writer import CheckpointWriter
    from trainer import Checkpoints, RunTerminated

    left = list(places)
    handled: queue.SimpleQueue[int] = queue.SimpleQueue()  # an event cannot be set by a signal's handler
    last = False  # whether the checkpoint of the stop is being written, or is written
    pid = os.getpid()
    once = Path(f"{run_dir}.signalled")
    at = {"train": runs.At(step, "train"), "val": runs.At(step, "val", batch=1), "first batch": runs.At(1, "data")}
    saves = Checkpoints(every_steps=every_steps, upload=url, when_busy="wait")
    one = runs.prepare(runs.Case(**case), run_dir, at=at.get(places[0]), checkpoints=saves)

    def terminate(*here: str) -> None:
        while left and left[0] in here:
            report("at", left.pop(0))
            while not handled.empty():
                handled.get()
            os.kill(pid, signal.SIGTERM)
            handled.get(timeout=WAIT_S)

    def in_worker() -> None:
        if places[0] == "first batch":
            with contextlib.suppress(FileExistsError):
                os.close(os.open(once, os.O_CREAT | os.O_EXCL))
                report("at", "first batch")
                os.kill(pid, signal.SIGTERM)

    def with_signals(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if last:  # the thread that trains has to do no more but wait
                until(lambda: not is_in(threading.main_thread(), "loop_thread.py"))
            terminate(f"last {name}" if last else name)
            return original(*args, **options)

        return call

    def write(self: CheckpointWriter, event: Any, snapshot: Any) -> Any:
        nonlocal last
        last = "stop" in event.reasons
        return writes(self, event, snapshot)

    def install(number: int, handler: Any) -> Any:
        def handle(number: int, frame: Any) -> None:
            if once.exists() and left[:1] == ["first batch"]:  # a worker has sent it
                left.pop(0)
            try:
                handler(number, frame)
            finally:
                handled.put(number)

        return installs(number, handle if number == signal.SIGTERM and callable(handler) else handler)

    installs, signal.signal = signal.signal, install  # type: ignore[assignment]
    writes, CheckpointWriter._write = CheckpointWriter._write, write  # type: ignore[method-assign]
    one.net.act = lambda what: terminate("train", "val", "first batch")
    one.net.rows.in_worker = in_worker
    disk.write_image = with_signals(disk.write_image, "save")
    RemoteStore.upload = with_signals(RemoteStore.upload, "upload")  # type: ignore[method-assign]
    try:
        one.trainer.train()
    except RunTerminated as stop:
        result = stop.result
        report("result", result.status, result.reason, result.global_step, Path(result.checkpoint or "").name)
        raise


def dies_after_commit(report: Report, run_dir: str, saves: int) -> None:
    """Train, and die in the moment in which so many checkpoints have their name."""
    import resume_runs as runs

    from events.checkpoint.store import CheckpointStore
    from trainer import Checkpoints

    commits = CheckpointStore.commit
    left = saves

    def commit(self: CheckpointStore, manifest: Any) -> Any:
        nonlocal left
        left -= 1
        commits(self, manifest)
        if not left:
            report("committed", str(manifest.name))
            os._exit(9)

    CheckpointStore.commit = commit  # type: ignore[method-assign]
    runs.prepare(runs.Case(), run_dir, checkpoints=Checkpoints(every_steps=3, when_busy="wait")).trainer.train()


def fork(report: Report, run_dir: str, how: str, door: str) -> None:
    """Train, and fork while the first checkpoint is being written.

    Args:
        how: ``sys.exit``: the main thread does, and its child ends as any program does. ``os._exit``: it ends at once.
            ``hook``: the thread that trains does, in a hook. ``process``: so it does with multiprocessing.
        door: ``train`` (on a thread), or ``run``, under asyncio or trio.
    """
    import multiprocessing

    import anyio
    import resume_runs as runs

    from events.checkpoint import disk
    from trainer import CallbackInterface, Checkpoints, inline

    saving, forked = threading.Event(), threading.Event()
    writes = disk.write_image

    def write(*args: Any) -> Any:
        saving.set()
        assert forked.wait(WAIT_S)
        return writes(*args)

    class Forks(CallbackInterface):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            if global_step != 4:
                return
            assert saving.wait(WAIT_S)
            if how == "hook":
                pid = os.fork()
                if pid == 0:
                    os._exit(0)
                report("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            elif how == "process":
                process = multiprocessing.get_context("fork").Process(target=int)
                process.start()
                process.join()
                report("ended", process.exitcode)
            else:
                assert forked.wait(WAIT_S)
            forked.set()

    disk.write_image = write
    saves = Checkpoints(every_steps=3, keep_last=9, when_busy="wait")
    one = runs.prepare(runs.Case(), run_dir, callbacks=[Forks()], checkpoints=saves)

    async def serve() -> None:
        async with one.trainer.run() as run:
            one.result = await run.result()

    def train() -> None:
        if door == "train":
            one.result = one.trainer.train()
        else:
            anyio.run(serve, backend=door)

    thread = threading.Thread(target=train)
    thread.start()
    if how in ("sys.exit", "os._exit"):
        assert saving.wait(WAIT_S)
        pid = os.fork()
        if pid == 0:
            if how == "os._exit":
                os._exit(0)
            sys.exit(0)
        report("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        forked.set()
    thread.join()
    assert one.result is not None
    report("result", one.result.status, one.result.global_step)
    os._exit(0)  # in less time: it is the other one's end that counts


def slab(report: Report) -> None:
    """Fork with a slab; its child has other memory where the slab was, and lets the slab go."""
    import mmap

    import torch

    from trainer.checkpoint.slab import Slab

    one = Slab(torch.device("cpu"))
    one.reserve(4 * 2**20)
    one.bytes.fill_(7)
    address, nbytes = one.bytes.data_ptr(), one.nbytes
    pid = os.fork()
    if pid == 0:
        mapped = ctypes.CDLL(None).mmap
        mapped.restype, mapped.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 4)
        fixed = 0x100000  # MAP_FIXED_NOREPLACE: fails where the child has got the slab
        found = mapped(
            address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANON | fixed, -1, 0
        )
        if found != address:
            os._exit(1)
        ctypes.memset(address, 3, nbytes)
        one.close()
        del one
        gc.collect()
        os._exit(0 if ctypes.string_at(address, nbytes) == b"\3" * nbytes else 2)
    report("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    report("kept", bool((one.bytes == 7).all()))
    os._exit(0)  # in less time


def until(there: Callable[[], bool]) -> None:
    """Wait for what another thread does, without a word from it."""
    deadline = time.monotonic() + WAIT_S
    while not there():
        assert time.monotonic() < deadline, "it did not happen"
        threading.Event().wait(0.001)


def is_in(thread: threading.Thread, file: str) -> bool:
    """Whether a thread is in a function of this file."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and not frame.f_code.co_filename.endswith(f"/{file}"):
        frame = frame.f_back
    return frame is not None


# ---------------------------------------------------------------------------------------------------- the nursery


def serve(job: dict[str, Any], errors: Path) -> dict[str, Any]:
    """Fork a child, and wait for its end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _live(job, writing, errors)
    os.close(writing)
    end = os.pidfd_open(pid)
    data = b""
    deadline = time.monotonic() + WAIT_S
    while True:
        ready = select.select([reading, end], [], [], max(0.0, deadline - time.monotonic()))[0]
        if reading in ready and (some := os.read(reading, 2**16)):
            data += some
        elif end in ready or not ready:
            break
    os.close(end)
    left = _kill_group(pid)  # the child is a zombie by now, which is no member that could be counted
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(reading)
    answer = {"said": [json.loads(line) for line in data.splitlines()], "status": status, "left": left}
    return {**answer, "errors": errors.read_text()}


def _kill_group(leader: int) -> list[int]:
    """Whatever of a process group is alive is ended. Returns what that was."""
    alive = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                state, _, group = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:3]
                if int(group) == leader and state != "Z":
                    alive.append(int(entry))
    if alive:
        os.killpg(leader, signal.SIGKILL)
    return alive


def _live(job: dict[str, Any], writing: int, errors: Path) -> None:
    """Become a program that does the job: it ends with the exception that this raises."""

    def report(*words: Any) -> None:
        os.write(writing, json.dumps(words).encode() + b"\n")

    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # dies with its parent
    fd = os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(fd, 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    try:
        globals()[job["job"]](report, **job["arguments"])
    except Exception:
        report("error", traceback.format_exc()[-4000:])
        raise
    raise SystemExit(0)


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for lazily in (
        "anyio._backends._asyncio",
        "numpy.random",
        "torch._dynamo",
        "resume_runs",
        "events.checkpoint.remote",
        "sinks.checkpoints.writer",
        "sinks.checkpoints.uploader",
    ):  # what a run imports on its way
        importlib.import_module(lazily)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line), Path(sys.argv[1], "errors"))), flush=True)


if __name__ == "__main__":
    main()
