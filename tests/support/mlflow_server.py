"""A real MLflow server over SQLite, in a process of its own, that can be killed and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil

START_S = 50.0


class MLflowServer:
    """Listens at one port for as long as it lives; what it has taken stays when it is killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        # Its jobs are eight processes more, which nobody asks for anything.
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        log = self._folder / "log"
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, f"the server did not start: {log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"the server does not answer: {log.read_text()[-2000:]}"
            threading.Event().wait(0.05)
        assert self.port in self._ports(), f"somebody else listens on {self.port}"

    def kill(self) -> None:
        """As a crash does: it and its children are gone at once."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _ports(self) -> set[int]:
        assert self._process is not None
        main = psutil.Process(self._process.pid)
        found = [one for process in (main, *main.children(recursive=True)) for one in process.net_connections()]
        return {one.laddr.port for one in found if one.status == "LISTEN"}
