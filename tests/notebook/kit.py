"""A real kernel: it runs cells, and keeps their outputs as data."""

from __future__ import annotations

import base64
import gzip
import json
import os
import queue
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jupyter_client.manager import KernelManager
from support.nursery import ROOT
from support.threads import WAIT_S

SETUP = """
import threading
import torch
from pathlib import Path
from support.training import Net
from support.threads import wait_until
from trainer import Checkpoints, Trainer, TrainerArguments

torch.set_num_threads(1)
long = TrainerArguments(epochs=100_000, train_batch_size=4)
def hold_at(step, name="go"):
    def hold(now):
        while now == step and not Path(name).exists():
            threading.Event().wait(0.01)
    return hold
"""
"""The first cell."""
_STYLE = re.compile("\x1b\\[[0-9;]*m")

_LONG_S = 3 * WAIT_S
"""Seconds for a cell that imports torch on a busy machine."""


class Ran:
    """The outputs of one cell."""

    def __init__(self) -> None:
        self.displays: list[str] = []
        """The ids of its displays."""
        self.streams = ""
        self.result: dict[str, str] = {}
        self.error: dict[str, Any] | None = None

    @property
    def traceback(self) -> str:
        assert self.error is not None
        return _STYLE.sub("", "\n".join(self.error["traceback"]))


class Kernel:
    """A kernel in a folder, with the library and ``support``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.displays: dict[str, list[dict[str, str]]] = {}
        """All that was shown in each display, by its id."""
        paths = os.pathsep.join([str(ROOT), os.path.join(ROOT, "tests")])
        # Named as a Jupyter server names it: the page finds the kernel by this.
        self._manager = KernelManager(connection_file=str(folder / "kernel-of-the-test.json"))
        self._manager.start_kernel(cwd=str(folder), env=os.environ | {"PYTHONPATH": paths})
        self.client = self._manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=_LONG_S)

    def stop(self) -> None:
        self.client.stop_channels()
        self._manager.shutdown_kernel(now=True)

    def interrupt(self) -> None:
        self._manager.interrupt_kernel()

    def run(self, code: str, on_output: Callable[[Ran], object] = lambda ran: None, *, fails: bool = False) -> Ran:
        """Run a cell; ``on_output`` is called after each of its outputs."""
        sent = self.client.execute(code)
        ran = Ran()
        while True:
            message = self.client.get_iopub_msg(timeout=_LONG_S)
            kind, content = message["msg_type"], message["content"]
            self._keep(kind, content, ran)
            if message["parent_header"].get("msg_id") == sent and content.get("execution_state") == "idle":
                break
            on_output(ran)
        assert (ran.error is not None) == fails, ran.error and ran.traceback
        return ran

    def command(self, display: str, command: str) -> dict[str, str]:
        """Send a command as the page does; returns the kernel's answer."""
        told = {"display": display, "command": {"command": command, "id": "1"}}
        content = {"comm_id": command, "target_name": "stagecast", "data": told}
        self.client.shell_channel.send(self.client.session.msg("comm_open", content))
        while True:
            message = self.client.get_iopub_msg(timeout=_LONG_S)
            self._keep(message["msg_type"], message["content"], Ran())
            if message["msg_type"] == "comm_close":
                answer: dict[str, str] = message["content"]["data"]
                return answer

    def read_until(self, condition: Callable[[], object]) -> None:
        """Read outputs that come while no cell runs."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            try:
                message = self.client.get_iopub_msg(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError("the output has not come") from None
            self._keep(message["msg_type"], message["content"], Ran())

    def _keep(self, kind: str, content: dict[str, Any], ran: Ran) -> None:
        if kind in ("display_data", "update_display_data"):
            name = content["transient"]["display_id"]
            self.displays.setdefault(name, []).append(content["data"])
            if kind == "display_data":
                ran.displays.append(name)
        elif kind == "execute_result":
            ran.result = content["data"]
        elif kind == "stream":
            ran.streams += content["text"]
        elif kind == "error":
            ran.error = content


def unpacked(html: str) -> dict[str, Any]:
    """Return the data of the page in a display."""
    packed = re.search(r'data-packed="([^"]+)"', html)
    assert packed is not None
    page = gzip.decompress(base64.b64decode(packed[1])).decode()
    data = re.search(r'id="report">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    found: dict[str, Any] = json.loads(data[1])
    return found


class Shown:
    """The two displays of a run."""

    def __init__(self, kernel: Kernel, ran: Ran) -> None:
        self._kernel = kernel
        self._progress, self._charts = ran.displays[-2:]
        self.id = self._progress.removesuffix("-progress")

    @property
    def progress(self) -> list[dict[str, str]]:
        return [one for one in self._kernel.displays[self._progress] if one["text/html"]]

    @property
    def now(self) -> str:
        """The HTML of the progress."""
        return self._kernel.displays[self._progress][-1]["text/html"]

    @property
    def documents(self) -> list[dict[str, Any]]:
        """The data in each page that was shown."""
        return [unpacked(one["text/html"]) for one in self._kernel.displays[self._charts] if one["text/html"]]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What the page was sent after it was shown."""
        fed = [re.search(r"\.feed\(\{.*?\}, (\{.*\})\);</script>", one["text/html"]) for one in self.progress]
        return [json.loads(one[1]) for one in fed if one is not None]
