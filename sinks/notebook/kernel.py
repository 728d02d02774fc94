"""The kernel's side of a display: outputs that later messages replace, and commands from the page in them.

Both travel through the kernel's own channels, so a display works wherever the notebook does: behind JupyterHub, over
SSH, with no port of its own. Commands need a kernel with subshells (ipykernel 7, JEP 91), because a cell that trains
keeps the kernel's main thread busy.
"""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import msgspec

from events.errors import StagecastError
from events.run.inbox import commands_of
from events.wire import decode_command

_TARGET = "stagecast"
"""Name of the comm target."""
_takers: weakref.WeakValueDictionary[str, Cell] = weakref.WeakValueDictionary()
"""The cells whose run takes commands, by the id of their display."""


class Cell:
    """The output of one cell, with two displays: the progress of a run, and its charts below.

    Args:
        shell: IPython's, in a kernel.
        display_id: Unique.
    """

    def __init__(self, shell: Any, display_id: str) -> None:
        self._shell = shell
        self.display_id = display_id
        self.run_dir: Path | None = None

    def open(self) -> None:
        """Reserve the places of the displays, in the cell that runs now."""
        for part in ("progress", "charts"):
            self._publish(part, "", "", update=False)

    def show(self, part: str, html: str, text: str = "") -> None:
        """Replace a display. Any thread; waits for no one.

        Args:
            part: ``progress`` or ``charts``.
            text: Shown by a front end without HTML.
        """
        self._publish(part, html, text, update=True)

    def _publish(self, part: str, html: str, text: str, *, update: bool) -> None:
        transient = {"display_id": f"{self.display_id}-{part}"}
        data = {"text/html": html, "text/plain": text}
        self._shell.display_pub.publish(data, transient=transient, update=update)

    def take_commands(self, run_dir: Path | None) -> str | None:
        """Accept commands from the page; return the kernel's id at its Jupyter server, None where none can arrive."""
        kernel = self._shell.kernel
        features = getattr(kernel, "kernel_info", {}).get("supported_features", ())  # of ipykernel, not of xeus-python
        if run_dir is None or "kernel subshells" not in features:
            return None
        found = re.fullmatch(r"kernel-(.+)\.json", Path(getattr(kernel.parent, "connection_file", "")).name)
        if found is None:
            return None
        self.run_dir = run_dir
        _takers[self.display_id] = self
        kernel.comm_manager.register_target(_TARGET, _answer)
        return found[1]

    def close(self) -> None:
        """Refuse further commands."""
        self.run_dir = None


def _answer(comm: Any, message: dict[str, Any]) -> None:
    """Send the command of a message to its run, and answer. On the thread of a subshell."""
    data = message["content"]["data"]
    answer = {"type": "sent"}
    try:
        cell = _takers.get(data["display"])
        if cell is None or cell.run_dir is None:
            raise StagecastError("the run has ended")
        commands_of(cell.run_dir).send(decode_command(msgspec.json.encode(data["command"])))
    except (StagecastError, KeyError, TypeError) as error:
        answer = {"type": "refused", "reason": str(error)}
    comm.close(data=answer)
