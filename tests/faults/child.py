"""Forked programs that do one job, the name of a function below, report in lines of JSON, and may be killed.

Each is the leader of its own session, and ends as every program does, with the interpreter's finalisation.
"""

from __future__ import annotations

import contextlib
import ctypes
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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from support.nursery import ROOT, Popen
from support.threads import WAIT_S, stack_of, wait_until

STUCK_S = 40.0
"""A program that has not ended by then is killed."""
_MS_PRIVATE, _MS_REC, _MS_REMOUNT, _MS_RDONLY, _CLONE_NEWNS, _CLONE_NEWUSER = 1 << 18, 1 << 14, 32, 1, 0x20000, 1 << 28
_PR_SET_PDEATHSIG, _PR_SET_PTRACER = 1, 0x59616D61


class Outcome(NamedTuple):
    """How a program ended."""

    reports: dict[str, list[Any]]
    """What it reported, by the first word."""
    status: int
    errors: str


@contextlib.contextmanager
def started(job: str, env: Mapping[str, str] | None = None, **arguments: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program; kill it, and assert that nothing that it started outlives it, when the block ends."""
    command = [sys.executable, "-m", "faults.child", job, json.dumps(arguments, default=os.fspath)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/tests{os.pathsep}{ROOT}", **(env or {})}
    with tempfile.TemporaryFile() as errors:
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
        with Popen(command, env=environment, start_new_session=True, **pipes) as process:
            process.errors = errors
            try:
                yield process
            finally:
                process.kill()
                process.wait()
                left = _members(process.pid)
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
    assert not left, "a process that the program started outlives it"


def run_job(job: str, *, kill_after: int | None = None, kill_s: float = 0.0, **arguments: Any) -> Outcome:
    """Run a program to its end.

    Args:
        kill_after: Kill it ``kill_s`` after it has announced this number of checkpoints; 0: after its start.
    """
    with started(job, **arguments) as process:
        assert process.stdout is not None
        lines, timed = b"", kill_after == 0
        deadline = time.monotonic() + (kill_s if timed else STUCK_S)
        while True:
            if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                process.kill()
            if not (data := os.read(process.stdout.fileno(), 2**16)):
                break
            lines += data
            if kill_after and not timed and lines.count(b'["saved"') >= kill_after:
                timed, deadline = True, time.monotonic() + kill_s
        status = process.wait()
        process.errors.seek(0)
        errors = process.errors.read().decode()
    reports: dict[str, list[Any]] = {}
    for word, *rest in map(json.loads, lines.splitlines()):
        reports.setdefault(word, []).append(rest[0] if len(rest) == 1 else rest)
    return Outcome(reports, status, errors)


def _members(session: int) -> list[int]:
    """Live processes of a session whose leader has ended."""
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(OSError):
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def report(*words: object) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


# ------------------------------------------------------------------------------------- runs on a disk that fails


def train(run_dir: str, *, epochs: int = 1, kill_at: int | None = None, **settings: Any) -> None:
    """Train, and report each checkpoint when it is announced; die at the call ``kill_at`` to the disk."""
    from faults import disk_kit as kit

    class Reporting(kit.Counting):
        reported = False

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if not self.reported:
                self.reported = True
                report("starts", global_step - 1, self.digest())
            return super().train_step(global_step, batch, device)

    fault = None if kill_at is None else kit.Fault(kill_at, None)
    module = Reporting(6 if epochs == 1 else 50)
    with kit.Calls(fault, syncs=fault is None, on_saved=lambda name: report("saved", name)):
        kit.make_trainer(Path(run_dir), module=module, epochs=epochs, callbacks=[kit.Tally()], **settings).train()


def traced(run_dir: str, trace: str) -> None:
    """Train under strace; report the calls that were recorded at the border."""
    from faults import disk_kit as kit

    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
    command = ["strace", "-ff", "-y", "-ttt", "-s", "0", "-e", "trace=%file,%desc,?io_uring_setup", "-o", trace]
    with subprocess.Popen([*command, "-p", str(os.getpid())], stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        answer = tracer.stderr.readline()
        if "attached" not in answer:
            report("skip", f"strace cannot be used here: {answer.strip()}")
            return
        with kit.Calls(syncs=True) as calls:
            kit.make_trainer(Path(run_dir), callbacks=[kit.Tally()], resume="auto").train()
        tracer.terminate()
    report("calls", [[call.name, call.path, call.to, call.flags] for call in calls.log])


def train_on_real_disk(run_dir: str, mount_at: str, kind: str, trouble: str, lasting: bool) -> None:
    """Train on a file system of this process, which fails after three checkpoints and, unless ``lasting``, recovers.

    Args:
        kind: ``tmpfs`` or ``ext4``.
        trouble: ``full``, ``almost full`` or ``read-only``.
    """
    from faults import disk_kit as kit

    from events.errors import CheckpointsFailing
    from events.messages import CheckpointDeleted, CheckpointFailed, CheckpointSaved

    if problem := _mount(mount_at, kind):
        report("skip", problem)
        return
    arrivals, path, disk = kit.Arrivals(), Path(run_dir), Path(mount_at)

    def repair() -> None:
        if trouble == "read-only":
            _remount(disk, 0)
        else:
            (disk / "filler").unlink(missing_ok=True)

    class Troubled(kit.Counting):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if global_step == 4:
                arrivals.wait_for(CheckpointDeleted, 2)  # the third checkpoint is saved by then
                if trouble == "read-only":
                    _remount(disk, _MS_RDONLY)
                else:
                    _fill(disk / "filler", leave=8192 if trouble == "almost full" else 0)
            elif global_step in (5, 6):
                arrivals.wait_for(CheckpointFailed, global_step - 4)
                if global_step == 6 and not lasting:
                    repair()
            return super().train_step(global_step, batch, device)

    module, options = Troubled(12), {"callbacks": [kit.Tally()], "journal": True}
    # At the end of the run, the journal waits for the disk until the drain times out.
    run = kit.make_trainer(path, module=module, sinks=[arrivals], every_steps=1, drain_timeout_s=1.0, **options)
    try:
        result = run.train()
    except CheckpointsFailing:
        assert lasting
        assert str(kit.look(path).name) == arrivals.of(CheckpointSaved)[-1].checkpoint == "step-3.a1"
    else:
        assert not lasting
        assert result.status == "finished"
        assert module.digest() == kit.reference[12]
        assert str(kit.look(path).name) == "step-12.a1"
    failed = arrivals.of(CheckpointFailed)
    assert [event.consecutive for event in failed] == ([1, 2, 3] if lasting else [1, 2])
    report("errors", [event.error for event in failed])
    repair()
    again = kit.make_trainer(path, module=kit.Counting(12), resume="auto", epochs=2, **options)
    assert again.train().status == "finished"
    assert str(kit.look(path).name) == "step-24.a2"
    assert not kit.leftovers(path)


def _fill(path: Path, leave: int) -> None:
    """Fill a disk, except for some bytes."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    os.truncate(path, max(0, path.stat().st_size - leave))


def _mount(folder: str, kind: str) -> str:
    """Mount a small file system that only this process sees; return the reason if that is not possible."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) and libc.unshare(_CLONE_NEWNS | _CLONE_NEWUSER):
        return f"a mount namespace cannot be made here: {os.strerror(ctypes.get_errno())}"
    if libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
        return f"the mount namespace cannot be made private: {os.strerror(ctypes.get_errno())}"
    if kind == "tmpfs":
        failed = libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, b"size=1m")
        return f"a file system cannot be mounted here: {os.strerror(ctypes.get_errno())}" if failed else ""
    image = f"{folder}.image"
    for command in (
        ["truncate", "-s", "4M", image],
        ["mkfs.ext4", "-q", "-F", "-m", "0", image],
        ["mount", "-o", "loop", image, folder],
    ):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            return f"ext4 cannot be mounted here: {error} {getattr(error, 'stderr', '')}"
    return ""


def _remount(folder: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(None, os.fsencode(folder), None, _MS_REMOUNT | flags, None):
        raise OSError(ctypes.get_errno(), "cannot remount")


# ---------------------------------------------------------------------------------- runs that get signals, or fork


def sigterm(run_dir: str, case: dict[str, Any], places: list[str], step: int, url: str | None) -> None:
    """Train, and send SIGTERM to this process at each of these places, in turn.

    Places: ``train`` and ``val`` (the second batch), ``first batch`` (where a row is read, here or in a worker);
    ``save`` and ``upload``, and ``last save`` and ``last upload`` of the checkpoint of the stop: on the thread that
    does it, which continues once the signal was handled.
    """
    from faults import resume_runs as runs

    from events.checkpoint import disk
    from events.checkpoint.remote import RemoteStore
    from sinks.checkpoints.writer import CheckpointWriter
    from trainer import Checkpoints, RunTerminated

    left = list(places)
    handled: queue.SimpleQueue[int] = queue.SimpleQueue()  # a signal handler cannot set an event
    last = False  # whether the writer has come to the checkpoint of the stop
    pid = os.getpid()
    once = Path(f"{run_dir}.signalled")
    at = {"train": runs.At(step, "train"), "val": runs.At(step, "val", batch=1), "first batch": runs.At(1, "data")}
    saves = Checkpoints(every_steps=3, upload=url, when_busy="wait")
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
            if last:  # the training thread only waits from now on
                wait_until(lambda: "loop_thread.py" not in stack_of(threading.main_thread().ident))
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


def fork(run_dir: str, how: str, door: str) -> None:
    """Train, and fork while the first checkpoint is written.

    Args:
        how: ``sys.exit``: the main thread forks, and its child ends as every program does. ``os._exit``: the child ends
            at once. ``hook``: the training thread forks, in a hook. ``process``: it does so with multiprocessing.
        door: ``train`` (on a thread), or ``run``, under asyncio or trio.
    """
    import multiprocessing

    import anyio
    from faults import resume_runs as runs

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
                _fork(lambda: os._exit(0))
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
        _fork(lambda: os._exit(0) if how == "os._exit" else sys.exit(0))
        forked.set()
    thread.join()
    assert one.result is not None
    report("result", one.result.status, one.result.global_step)


def _fork(in_child: Callable[[], object]) -> None:
    """Fork, and report how the child ended."""
    pid = os.fork()
    if pid == 0:
        in_child()
    report("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def slab() -> None:
    """Fork with a slab; the child has other memory at the slab's address, and closes the slab."""
    import gc
    import mmap

    import torch

    from trainer.checkpoint.slab import Slab

    one = Slab(torch.device("cpu"))
    one.reserve(4 * 2**20)
    one.bytes.fill_(7)
    address, nbytes = one.bytes.data_ptr(), one.nbytes

    def in_child() -> None:
        nonlocal one
        mapped = ctypes.CDLL(None).mmap
        mapped.restype, mapped.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 4)
        fixed = 0x100000  # MAP_FIXED_NOREPLACE: fails where the child has the slab
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANON | fixed
        if mapped(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != address:
            os._exit(1)
        ctypes.memset(address, 3, nbytes)
        one.close()
        del one
        gc.collect()
        os._exit(0 if ctypes.string_at(address, nbytes) == b"\3" * nbytes else 2)

    _fork(in_child)
    report("kept", bool((one.bytes == 7).all()))


# --------------------------------------------------------------------------------------------------------- uploads


def upload(folder: str, url: str, attempt: int, settings: dict[str, Any], limits: dict[str, Any]) -> None:
    """Upload what is due."""
    from events.checkpoint.objects import Limits
    from events.checkpoint.settings import Checkpoints
    from events.checkpoint.store import CheckpointStore
    from events.origin import Origin
    from sinks.checkpoints.uploader import CheckpointUploader

    store, origin = CheckpointStore(folder), Origin("run", attempt)
    CheckpointUploader(
        store, url, Checkpoints(**settings), lambda event: None, origin, lambda: None, Limits(**limits)
    ).open()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    globals()[sys.argv[1]](**json.loads(sys.argv[2]))
