"""A program that does a job, the name of a function below, and reports in lines of JSON; see `disk_nursery`."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:1] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import disk_kit as kit  # noqa: E402
import torch  # noqa: E402

from events.errors import CheckpointsFailing  # noqa: E402
from events.messages import CheckpointDeleted, CheckpointFailed, CheckpointSaved  # noqa: E402

_MS_PRIVATE, _MS_REC, _MS_REMOUNT, _MS_RDONLY, _CLONE_NEWNS, _CLONE_NEWUSER = 1 << 18, 1 << 14, 32, 1, 0x20000, 1 << 28
_PR_SET_PDEATHSIG, _PR_SET_PTRACER = 1, 0x59616D61

Report = Callable[..., None]


class Telling(kit.Counting):
    """Tells what state it begins to train with."""

    def __init__(self, report: Report, epoch_steps: int) -> None:
        super().__init__(epoch_steps)
        self._report = report
        self._told = False

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        if not self._told:
            self._told = True
            self._report("begins", global_step - 1, kit.digest_of(self))
        return super().train_step(global_step, batch, device)


def train(report: Report, run_dir: str, *, epochs: int = 1, kill_at: int | None = None, **settings: Any) -> None:
    """Train, and report each checkpoint at the moment at which it is announced.

    Args:
        kill_at: Number of the call at the border to the disk at which the process dies.
    """
    fault = None if kill_at is None else kit.Fault(kill_at, None)
    module = Telling(report, 6 if epochs == 1 else 50)
    with kit.Calls(fault, syncs=fault is None, on_saved=lambda name: report("saved", name)):
        kit.make_trainer(Path(run_dir), module=module, epochs=epochs, callbacks=[kit.Tally()], **settings).train()


def traced(report: Report, run_dir: str, trace: str) -> None:
    """Train while strace writes down what the kernel sees; report what was noted at the border."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
    command = ["strace", "-ff", "-y", "-ttt", "-s", "0", "-e", "trace=%file,%desc,?io_uring_setup", "-o", trace]
    tracer = subprocess.Popen([*command, "-p", str(os.getpid())], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    if "attached" not in said:
        report("skip", f"strace cannot be used here: {said.strip()}")
        tracer.wait()
        return
    with kit.Calls(syncs=True) as calls:
        kit.make_trainer(Path(run_dir), callbacks=[kit.Tally()], resume="auto").train()
    tracer.terminate()
    tracer.communicate()
    report("calls", [[call.name, call.path, call.to, call.flags] for call in calls.log])


def on_real_disk(report: Report, run_dir: str, mount_at: str, kind: str, trouble: str, lasting: bool) -> None:
    """Train on a file system of this process's own, which fails after three checkpoints, and is mended or not.

    Args:
        kind: ``tmpfs`` or ``ext4``.
        trouble: ``full``, ``almost full`` or ``read-only``.
        lasting: It is not mended.
    """
    problem = _mount(mount_at, kind)
    if problem:
        report("skip", problem)
        return
    arrivals, reference = kit.Arrivals(), kit.Reference()
    module = _Troubled(Path(mount_at), trouble, lasting, arrivals)
    ready = kit.make_trainer(
        Path(run_dir),
        module=module,
        sinks=[arrivals],
        every_steps=1,
        callbacks=[kit.Tally()],
        journal=True,
        drain_timeout_s=1.0,  # the journal waits so long at the end for the disk
    )
    try:
        result = ready.train()
    except CheckpointsFailing:
        assert lasting
        assert [event.consecutive for event in arrivals.of(CheckpointFailed)] == [1, 2, 3]
        sight = kit.look(Path(run_dir), reference)
        assert str(sight.name) == arrivals.of(CheckpointSaved)[-1].checkpoint == "step-3.a1"
    else:
        assert not lasting
        assert result.status == "finished"
        assert kit.digest_of(module) == reference[12]
        assert [event.consecutive for event in arrivals.of(CheckpointFailed)] == [1, 2]
        assert str(kit.look(Path(run_dir), reference).name) == "step-12.a1"
    report("errors", [event.error for event in arrivals.of(CheckpointFailed)])
    module.mend()
    again = kit.make_trainer(
        Path(run_dir), module=kit.Counting(12), resume="auto", callbacks=[kit.Tally()], journal=True, epochs=2
    )
    assert again.train().status == "finished"
    assert str(kit.look(Path(run_dir), reference).name) == "step-24.a2"
    assert not kit.leftovers(Path(run_dir))


class _Troubled(kit.Counting):
    """Has its disk fail after three saves, when nothing is being written, and mended after two more."""

    def __init__(self, disk: Path, trouble: str, lasting: bool, arrivals: kit.Arrivals) -> None:
        super().__init__(12)
        self._disk = disk
        self._trouble = trouble
        self._lasting = lasting
        self._arrivals = arrivals

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        if global_step == 4:
            self._arrivals.wait_for(CheckpointDeleted, 2)  # by then the third is saved
            if self._trouble == "read-only":
                _remount(self._disk, _MS_RDONLY)
            else:
                fill(self._disk / "filler", leave=8192 if self._trouble == "almost full" else 0)
        elif global_step == 5:
            self._arrivals.wait_for(CheckpointFailed, 1)
        elif global_step == 6:
            self._arrivals.wait_for(CheckpointFailed, 2)
            if not self._lasting:
                self.mend()
        return super().train_step(global_step, batch, device)

    def mend(self) -> None:
        if self._trouble == "read-only":
            _remount(self._disk, 0)
        else:
            (self._disk / "filler").unlink(missing_ok=True)


def fill(path: Path, leave: int) -> None:
    """Fill a disk up to so many bytes."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    os.truncate(path, max(0, path.stat().st_size - leave))


def _mount(folder: str, kind: str) -> str:
    """Mount a small file system where only this process sees it; returns why that cannot be done."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) and libc.unshare(_CLONE_NEWNS | _CLONE_NEWUSER):
        return f"no mount namespace may be made here: {os.strerror(ctypes.get_errno())}"
    if libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
        return f"the mount namespace cannot be made private: {os.strerror(ctypes.get_errno())}"
    if kind == "tmpfs":
        if libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, b"size=1m"):
            return f"no file system may be mounted here: {os.strerror(ctypes.get_errno())}"
        return ""
    image = f"{folder}.image"
    for command in (
        ["truncate", "-s", "4M", image],
        ["mkfs.ext4", "-q", "-F", "-m", "0", image],
        ["mount", "-o", "loop", image, folder],
    ):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            return f"there is no {command[0]} here"
        except subprocess.CalledProcessError as error:
            return f"no ext4 may be mounted here: {error.stderr.strip()}"
    return ""


def _remount(folder: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(None, os.fsencode(folder), None, _MS_REMOUNT | flags, None):
        raise OSError(ctypes.get_errno(), "cannot remount")


# ------------------------------------------------------------------------------------------------------ the program


def report(*words: Any) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        globals()[sys.argv[1]](report, **json.loads(sys.argv[2]))
    except BaseException:
        report("error", traceback.format_exc()[-4000:])
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
