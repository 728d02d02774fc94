"""Python programs on several ranks, as ``torchrun`` starts them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from support.scripts import ROOT

_EXIT = re.compile(r"rank +: (\d+) \(local_rank: \d+\)\n +exitcode +: (-?\d+)")


@dataclasses.dataclass
class Ended:
    """Ranks that have ended."""

    code: int
    """Of torchrun."""
    codes: list[int]
    """Of each rank; negative if a signal ended it."""
    out: list[str]
    """What each rank has printed."""
    err: list[str]
    """What each rank has printed on stderr."""
    report: str
    """What torchrun has printed."""

    def check(self, *expected: str) -> Ended:
        """Return this, if all ranks have ended well and quietly.

        Args:
            expected: What a line on stderr may contain.
        """
        assert self.code == 0, "\n".join([self.report[-2000:], *self.err])
        assert not any(self.codes)
        for lines in self.err:
            assert not [line for line in lines.splitlines() if not any(one in line for one in expected)], lines
        return self


class Ranks:
    """``torchrun`` with one program on several ranks, which can import `support`.

    Args:
        text: The program.
        options: Further options of torchrun.
        environment: Further variables.
    """

    def __init__(
        self, text: str, folder: Path, ranks: int = 2, *options: str, environment: dict[str, str] | None = None
    ) -> None:
        self.folder, self.ranks = folder, ranks
        path = folder / "ranks.py"
        path.write_text(text)
        self.log = folder / "log"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["--redirects=3", f"--log-dir={self.log}", *options, str(path)]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=clean
            | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
            | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to torchrun, which passes SIGTERM and SIGINT on."""
        self.process.send_signal(number)

    def end(self, timeout_s: float = 120.0) -> Ended:
        """Wait for all ranks."""
        try:
            report = self.process.communicate(timeout=timeout_s)[0]
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            report = self.process.communicate()[0]
            raise AssertionError(f"the ranks did not end: {report}\n{self._read('stderr')}") from None
        codes = [0] * self.ranks
        for rank, code in _EXIT.findall(report):
            codes[int(rank)] = int(code)
        return Ended(self.process.returncode, codes, self._read("stdout"), self._read("stderr"), report)

    def close(self) -> None:
        """Kill what still runs."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _read(self, stream: str) -> list[str]:
        """Read what each rank has printed, in all its lives."""
        return [
            "".join(path.read_text() for path in sorted(self.log.rglob(f"{rank}/{stream}.log")))
            for rank in range(self.ranks)
        ]


StartRanks = Callable[..., Ranks]
"""Starts a program on several ranks: the fixture ``ranks``. Its arguments are those of `Ranks`, without the folder."""
