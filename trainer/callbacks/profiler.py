"""Profile windows of steps with `torch.profiler`, and write the traces off the loop."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerAction

from events.log import in_this_run, logger
from events.messages import OperatorTime
from events.safe_files import make_folder_below, replace_below
from events.sink import RunInfo
from trainer.callback_interface import CallbackInterface
from trainer.callbacks import trace_summary
from trainer.callbacks.checks import Checks
from trainer.errors import ArgumentsError
from trainer.media import SavedTrace
from trainer.module_interface import ModuleInterface, Stage

TRACES_DIR = "traces"
"""Within the run folder."""
_MOST_WRITING = 2
_WRITE_S = 120.0
_CHUNK = 2**20
_RECORDS = (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)


class Profiler(CallbackInterface):
    """Records windows of steps with `torch.profiler` and writes their traces to the run folder::

        from trainer import Trainer, TrainerArguments
        from trainer.callbacks import Profiler

        profiler = Profiler(wait=10, warmup=2, active=3, record_shapes=True)
        Trainer(MyModule(), TrainerArguments(epochs=1), callbacks=[profiler]).train()

    A trace is ``traces/HOST_PID.TIME.pt.trace.json.gz``, named as `torch.profiler.tensorboard_trace_handler` does: open
    it in https://ui.perfetto.dev, or start TensorBoard with torch's plugin on the run folder. `TraceSaved` names the
    file, the steps and the longest operators; the console and the page show it.

    The schedule counts the optimizer steps of this attempt from its first, or the batches in `Trainer.validate` and
    `Trainer.test`. ``ProfilerStep#N`` spans from the forward pass of a step to that of the next; ``train_step``,
    ``val_step`` and ``test_step`` are ranges within it. A run that ends within a window, also by an exception, writes
    what the window has.

    Between windows a step costs a call of ``torch.profiler.profile.step``. Torch holds the loop while it collects a
    window and while it saves the file, about 20 ms per megabyte of JSON; compression and the summary run in a process
    of their own. A trace is dropped, with a warning, while two others are being written. Not part of checkpoints.

    Args:
        wait: Steps before each window that are not profiled.
        warmup: Steps that are profiled and discarded, after ``wait``.
        active: Steps in a trace.
        repeat: Number of windows; 0: until the run ends.
        skip_first: Steps before the first ``wait``.
        dir: Folder of the traces; None: ``traces`` in the run folder.
        operators: Maximum operators, and kernels, in the summary.
        **options: Other arguments of `torch.profiler.profile`, such as ``with_stack=True`` or ``activities``.

    Raises:
        ArgumentsError: An argument is invalid; or, in a run, there is no folder for the traces.
    """

    def __init__(
        self,
        *,
        wait: int = 10,
        warmup: int = 2,
        active: int = 3,
        repeat: int = 1,
        skip_first: int = 0,
        dir: str | os.PathLike[str] | None = None,
        operators: int = 5,
        **options: Any,
    ) -> None:
        checks = Checks("Profiler")
        for name, value in {"wait": wait, "warmup": warmup, "repeat": repeat, "skip_first": skip_first}.items():
            checks.that(type(value) is int and value >= 0, f"{name} must be an integer >= 0, not {value!r:.80}")
        checks.count("active", active)
        checks.count("operators", operators)
        known = inspect.signature(torch.profiler.profile).parameters.keys() - {"schedule", "on_trace_ready"}
        for name in options.keys() - known:
            checks.that(False, f"torch.profiler.profile has no {name!r} to set here; it has {', '.join(sorted(known))}")
        checks.done()
        self._schedule = {"wait": wait, "warmup": warmup, "active": active, "repeat": repeat, "skip_first": skip_first}
        self._options = options
        self._dir = dir
        self._operators = operators
        self._profile: torch.profiler.profile | None = None
        self._range: Any = None
        self._trains = False
        self._step = 0  # the number of the current one
        self._steps: list[int] = []  # of the current window
        self._windows = 0
        self._writing: list[threading.Thread] = []

    def bind_optimizers(self, optimizers: object) -> None:
        """Note that this run trains; the loop calls it before the first step."""
        self._trains = True

    @contextlib.contextmanager
    def around_run(self, run: RunInfo, module: ModuleInterface) -> Iterator[None]:
        """Profile a run; on the loop's thread, which alone is profiled, with the threads of its backward passes."""
        folder = self._dir if self._dir is not None else run.run_dir
        if folder is None:
            raise ArgumentsError("Profiler has no folder for its traces; set run_dir of the Trainer, or dir")
        self._trains, self._step, self._steps, self._windows = False, 0, [], 0
        hooks = [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after, always_call=True),
        ]
        self._profile = torch.profiler.profile(
            schedule=torch.profiler.schedule(**self._schedule),
            on_trace_ready=lambda profile: self._save(profile, Path(folder)),
            **self._options,
        )
        self._profile.start()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._finish(self._profile)
            self._profile = None

    # ------------------------------------------------------------------------------------ on the loop's thread

    def _before(self, module: object, args: tuple[Any, ...]) -> None:
        """A step of the module begins."""
        stage, number = args[0], args[1]
        assert self._profile is not None
        if not self._trains:
            number = self._step + 1
        elif stage is not Stage.TRAIN:
            number = self._step
        if number != self._step:
            if self._step:
                self._profile.step()  # SYNC: at the end of a window, which the user asked for
            self._step = number
            if self._profile.current_action in _RECORDS:
                self._steps.append(number)
        if self._steps:
            self._range = torch.profiler.record_function(f"{stage.value}_step")
            self._range.__enter__()

    def _after(self, *_: object) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _save(self, profile: torch.profiler.profile, folder: Path) -> None:
        """A window is complete, or the run ends within it."""
        steps, self._steps = self._steps, []
        window = profile.profiler
        if not self._options.get("acc_events"):
            profile.profiler = None  # else torch warns that the next window does not hold the events of this one
        if not steps:  # the run has ended before its first step
            return
        self._windows += 1
        self._writing = [thread for thread in self._writing if thread.is_alive()]
        if len(self._writing) >= _MOST_WRITING:
            logger.warning(
                f"Profiler drops the trace of steps {steps[0]} to {steps[-1]}: {_MOST_WRITING} others are being"
                f" written; set wait higher, or active lower"
            )
            return
        write, before = in_this_run(self._write), self._writing[-1] if self._writing else None
        arguments = (window, folder, steps, before)
        thread = threading.Thread(target=write, args=arguments, name="stagecast-profiler", daemon=True)
        self._writing.append(thread)
        thread.start()

    def _finish(self, profile: torch.profiler.profile) -> None:
        active, recorded, before = self._schedule["active"], len(self._steps), self._windows
        profile.stop()
        if 0 < recorded < active and self._windows > before:
            logger.warning(f"the run ended within a window of Profiler: its trace has {recorded} of {active} steps")
        if not self._windows:
            first = sum(self._schedule[name] for name in ("skip_first", "wait", "warmup")) + 1
            logger.warning(
                f"Profiler recorded nothing: it records from step {first} of an attempt, and this one had"
                f" {profile.step_num + 1 if self._step else 0}; set wait or warmup lower"
            )
        ends = time.monotonic() + _WRITE_S
        for thread in self._writing:
            thread.join(max(0.0, ends - time.monotonic()))  # WAIT: the last traces, once the run is over
            if thread.is_alive():
                logger.warning(f"Profiler did not finish a trace within {_WRITE_S:g} s; it is lost")
        self._writing = []

    # ------------------------------------------------------------------------------------- on its own thread

    def _write(self, profile: Any, folder: Path, steps: list[int], before: threading.Thread | None) -> None:
        if before is not None:
            before.join()  # WAIT: one after the other, in their order
        try:
            with tempfile.TemporaryDirectory(prefix="stagecast-trace-") as temporary:
                path, nbytes, operators = self._stored(profile, folder, Path(temporary))
            self.log("trace", SavedTrace(path, nbytes, steps[0], steps[-1], operators))
        except Exception as error:  # the thread's border: reported
            logger.warning(f"Profiler could not write the trace of steps {steps[0]} to {steps[-1]}: {error}")

    def _stored(self, profile: Any, folder: Path, temporary: Path) -> tuple[str, int, list[OperatorTime]]:
        source, target = temporary / "trace.json", temporary / "trace.json.gz"
        profile.export_chrome_trace(str(source))
        command = [sys.executable, "-I", trace_summary.__file__, str(source), str(target), str(self._operators)]
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
            raise OSError(lines[-1])
        name = f"{socket.gethostname()}_{os.getpid()}.{time.time_ns()}.pt.trace.json.gz"
        if self._dir is None:
            make_folder_below(folder, TRACES_DIR)
            name = f"{TRACES_DIR}/{name}"
        else:
            folder.mkdir(parents=True, exist_ok=True)
        with open(target, "rb") as file:
            nbytes = replace_below(folder, name, iter(lambda: file.read(_CHUNK), b""), durable=False)
        path = name if self._dir is None else os.fspath(folder / name)
        return path, nbytes, [OperatorTime(*row) for row in json.loads(done.stdout)]
