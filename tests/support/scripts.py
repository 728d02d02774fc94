"""Python programs in their own processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import trainer

ROOT = Path(trainer.__file__).parent.parent


class Script:
    """A Python program in its own process, which reports line by line; it can import `support`."""

    def __init__(self, text: str, folder: Path) -> None:
        path = folder / "script.py"
        path.write_text(text)
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(path)],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,  # open until the end: a program may wait for it
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, line: str) -> None:
        """Read until the program has printed this line."""
        assert self.process.stdout is not None
        for printed in self.process.stdout:
            if printed.strip() == line:
                return
        raise AssertionError(f"the program ended without printing {line!r}:\n{self.process.communicate()[1]}")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Exit code, the rest of its output, its errors."""
        out, err = self.process.communicate(timeout=40)
        return self.process.returncode, out, err


Start = Callable[[str], Script]
"""Starts a program with this text: the fixture ``script``."""
