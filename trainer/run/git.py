"""The git commit of a run's source code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from events.log import logger

LIMIT_S = 1.0
"""Maximum seconds from the start of the lookup to `GitLookup.result`; git is killed after them."""
_COMMIT_LIMIT_S = 0.5
"""Maximum seconds for the commit alone, after the state of a large repository took too long."""
# A hook of git sets these for a repository that need not be that of the code.
_OF_ANOTHER = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR")


class GitState(NamedTuple):
    """The commit that is checked out, and whether tracked files differ from it; None: unknown."""

    commit: str | None = None
    is_dirty: bool | None = None


class GitLookup:
    """Asks git on a thread of its own, so that the start of a run does not wait for a slow disk.

    Args:
        kind: The class whose source is looked up. If it has no file in a repository, the working directory is.
    """

    def __init__(self, kind: type) -> None:
        self._began = time.monotonic()
        self._state = GitState()
        self._problem: str | None = None
        self._done = threading.Event()
        try:
            threading.Thread(target=self._run, args=(kind,), name="stagecast-git", daemon=True).start()
        except RuntimeError:  # the system has no more threads
            self._done.set()

    def result(self) -> GitState:
        """Return the state; waits for git until `LIMIT_S` after the start, and logs if git refused the repository."""
        self._done.wait(max(0.0, self._began + LIMIT_S + _COMMIT_LIMIT_S - time.monotonic()))
        if self._problem is not None:
            logger.warning(self._problem)
        return self._state

    def _run(self, kind: type) -> None:
        try:
            folder = _repository_of(kind)
            git = shutil.which("git")
            if folder is not None and git is not None:
                self._ask(os.path.abspath(git), folder)
        except (OSError, ValueError, subprocess.SubprocessError):
            pass  # the working directory is gone, or git cannot be started: the commit is unknown
        finally:
            self._done.set()

    def _ask(self, git: str, folder: str) -> None:
        # `core.fsmonitor`: git would start a daemon that outlives the run.
        asked = ["-c", "core.fsmonitor=false", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
        answer = _output([git, "-C", folder, *asked], self._began + LIMIT_S - time.monotonic())
        if answer is None:
            commit = _output([git, "-C", folder, "rev-parse", "--verify", "--quiet", "HEAD"], _COMMIT_LIMIT_S)
            self._state = GitState(commit[0].strip() or None if commit is not None else None)
            return
        lines, errors = answer[0].splitlines(), answer[1].splitlines()
        oids = [line.split()[-1] for line in lines if line.startswith("# branch.oid ")]
        if oids and oids[0] != "(initial)":
            self._state = GitState(oids[0], any(not line.startswith("#") for line in lines))
        elif not oids and errors:
            self._problem = (
                f"the git commit is not recorded: {errors[0].removeprefix('fatal: '):.200}; run git status in {folder}"
            )


def _repository_of(kind: type) -> str | None:
    """Return the folder of the class's file or the working directory: the first of them that is in a repository.

    Without a repository git is not started: on macOS a missing one opens a dialog.
    """
    return next(filter(_is_in_repository, _folders_of(kind)), None)


def _folders_of(kind: type) -> Iterator[str]:
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if isinstance(file, str):
        yield os.path.dirname(os.path.abspath(file))
    yield os.getcwd()


def _is_in_repository(folder: str) -> bool:
    return any((one / ".git").exists() for one in (Path(folder), *Path(folder).parents))


def _output(command: list[str], limit_s: float) -> tuple[str, str] | None:
    """Run a command; return its output and its errors, or None after the time limit."""
    own = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER}
    own |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C"}
    # Files and not pipes, and inherited descriptors: Python then spawns the process without a pipe of its own. A worker
    # that another thread forks meanwhile would keep the pipes open, and their end would never be read.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=own, close_fds=False
        )
        try:
            process.wait(max(0.0, limit_s))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()  # a disk that hangs keeps this thread, but nothing waits for it
            return None
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "backslashreplace"))
    return texts[0], texts[1]
