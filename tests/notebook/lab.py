"""A real JupyterLab, offline, with settings and signatures of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
from notebook.kit import SETUP
from support.nursery import ROOT

_TOKEN = "of-the-test"
_PLUGIN = "@jupyterlab/apputils-extension"
WAIT_MS = 60_000
"""Milliseconds that an expected change of the page may take on a busy machine."""


class Lab:
    """A server of JupyterLab on a free port, and a page in a browser."""

    def __init__(self, folder: Path, browser: Any) -> None:
        self.folder = folder / "notebooks"
        self.folder.mkdir()
        self._settings = folder / "settings"
        self.set("notification", fetchNews="false")
        places = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
        places |= {"JUPYTERLAB_SETTINGS_DIR": str(self._settings), "IPYTHONDIR": str(folder / "ipython")}
        paths = os.pathsep.join([str(ROOT), os.path.join(ROOT, "tests")])
        options = ["--no-browser", "--allow-root", "--port=0", f"--ServerApp.root_dir={self.folder}"]
        options += [f"--IdentityProvider.token={_TOKEN}", "--LabApp.extension_manager=readonly"]
        self._log = folder / "log.txt"
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jupyterlab", *options],
                env=os.environ | places | {"PYTHONPATH": paths},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.page = browser.new_page(viewport={"width": 1200, "height": 900})
        self.page.set_default_timeout(WAIT_MS)

    def stop(self) -> None:
        self.page.close()
        self._process.kill()  # its kernels end when it is gone; asked to, it would wait for them
        self._process.wait()

    def wait(self) -> None:
        """Wait until the server answers."""
        deadline = time.monotonic() + WAIT_MS / 1000
        while not (found := re.findall(r"http://127\.0\.0\.1:\d+/lab", self._log.read_text())):
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            threading.Event().wait(0.05)
        self._url = found[0]

    def set(self, plugin: str, **settings: str) -> None:
        """Write settings of a plugin of JupyterLab, as a reader's choice is kept."""
        folder = self._settings / _PLUGIN
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{plugin}.jupyterlab-settings").write_text(json.dumps(settings))

    def write(self, name: str, *cells: str) -> None:
        """Write a notebook whose first cell is `kit.SETUP`."""
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (SETUP, *cells)])
        made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(made, self.folder / name)

    def open(self, name: str) -> None:
        """Open a notebook alone."""
        self.page.goto(f"{self._url}/tree/{name}?reset&token={_TOKEN}")
        self.page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()

    def run_all(self) -> None:
        first = self.page.locator(".jp-Notebook .jp-CodeCell").first
        # Before the kernel is connected, which nothing in the page shows, JupyterLab ignores the key.
        ran = first.locator(".jp-InputPrompt", has_text=re.compile(r"\[(\*|1)\]"))
        for _ in range(WAIT_MS // 500):
            first.click()
            self.page.keyboard.press("Shift+Enter")
            self.page.wait_for_timeout(500)
            if ran.count():
                break
        for _ in self.page.locator(".jp-Notebook .jp-CodeCell").all()[1:]:
            self.page.keyboard.press("Shift+Enter")

    def save(self) -> None:
        with self.page.expect_response(lambda one: "/api/contents/" in one.url and one.request.method == "PUT"):
            self.page.keyboard.press("Control+s")

    @property
    def run_page(self) -> Any:
        """The page of a run in the output of a cell."""
        return self.page.frame_locator(".jp-OutputArea iframe")
