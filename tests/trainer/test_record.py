"""The record of a run's origin: hyperparameters, command line and git commit."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.training import Net, train

from events.log import Warned, collecting
from events.messages import RunStarted
from trainer.run import git
from trainer.run.git import GitLookup, GitState
from trainer.run.record import factory_config


def run_git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def make_repository(folder: Path) -> None:
    """Create a repository with a commit and a module of Python."""
    folder.mkdir()
    (folder / "code_of_a_run.py").write_text("class Here: ...\n")
    run_git(folder, "init", "-q")
    run_git(folder, "add", ".")
    run_git(folder, "commit", "-q", "-m", "first")


def head_of(folder: Path) -> str:
    return run_git(folder, "rev-parse", "HEAD")


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git, "LIMIT_S", 30.0)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository without changes; the working directory is elsewhere."""
    make_repository(tmp_path / "repository")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "repository"


def state_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> GitState:
    """Look up a class that a file of the folder defines."""
    monkeypatch.syspath_prepend(str(folder))
    kind = importlib.import_module("code_of_a_run").Here
    try:
        return GitLookup(kind).result()
    finally:
        del sys.modules["code_of_a_run"]


def test_the_commit_is_that_of_the_modules_source(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a worktree, in a submodule, and on no branch; only tracked files count as changes."""
    commit = head_of(repository)
    (repository / "untracked.txt").touch()
    assert state_of(repository, monkeypatch) == (commit, False)
    (repository / "code_of_a_run.py").write_text("class Here: pass\n")
    assert state_of(repository, monkeypatch) == (commit, True)

    run_git(repository, "commit", "-q", "-a", "-m", "second")
    run_git(repository, "worktree", "add", "-q", "--detach", str(repository.parent / "worktree"), commit)
    assert state_of(repository.parent / "worktree", monkeypatch) == (commit, False)

    outer = repository.parent / "outer"
    make_repository(outer)
    run_git(outer, "submodule", "add", "-q", str(repository), "inner")
    assert state_of(outer / "inner", monkeypatch) == (head_of(repository), False)
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))  # as a hook of another repository sets it
    monkeypatch.setenv("GIT_INDEX_FILE", "nowhere")
    state = state_of(outer, monkeypatch)
    monkeypatch.undo()
    assert state == (head_of(outer), True)


def test_the_working_directory_need_not_exist(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository.parent / "elsewhere").rmdir()
    assert state_of(repository, monkeypatch).commit is not None
    assert GitLookup(type("Here", (), {"__module__": "no_such_module"})).result() == (None, None)


def test_a_class_without_a_file_has_the_commit_of_the_working_directory(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as that of a notebook, or of a package that was installed elsewhere."""
    interactive = type("Here", (), {"__module__": "no_such_module"})
    assert GitLookup(interactive).result() == (None, None)
    monkeypatch.chdir(repository)
    assert GitLookup(interactive).result() == (head_of(repository), False)


@pytest.mark.parametrize("obstacle", ["no git", "no commit", "a broken git", "no repository", "a damaged one"])
def test_an_unknown_commit_is_no_error(obstacle: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if obstacle == "no git":
        monkeypatch.setenv("PATH", str(repository))
    elif obstacle == "no commit":
        run_git(repository, "update-ref", "-d", "HEAD")
    elif obstacle == "a broken git":
        (repository / "git").write_bytes(b"not a program")
        (repository / "git").chmod(0o755)
        monkeypatch.setenv("PATH", str(repository))
    elif obstacle == "no repository":
        shutil.rmtree(repository / ".git")
    else:
        (repository / ".git" / "index").write_bytes(b"no index")
    warned: list[Warned] = []
    with collecting(warned):
        assert state_of(repository, monkeypatch) == (None, None)
    told = ["the git commit is not recorded"] if obstacle == "a damaged one" else []
    assert [one.message.partition(":")[0] for one in warned] == told


def test_a_repository_of_another_user_is_a_warning(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Git refuses it, and explains the remedy."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    warned: list[Warned] = []
    with collecting(warned):
        assert state_of(repository, monkeypatch) == (None, None)
    (text,) = [one.message for one in warned]
    assert text.startswith("the git commit is not recorded: ")
    assert str(repository) in text
    assert text.endswith(f"; run git status in {repository}")


@pytest.mark.parametrize("slow", ["status", "all"])
def test_a_slow_git_is_not_waited_for(slow: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commit is known if only the search for changes is slow."""
    tools = repository.parent / "tools"
    tools.mkdir()
    real, sleep = shutil.which("git"), shutil.which("sleep")
    case = "*" if slow == "all" else "*status*"
    (tools / "git").write_text(f'#!/bin/sh\ncase "$*" in {case}) exec {sleep} 60;; esac\nexec {real} "$@"\n')
    (tools / "git").chmod(0o755)
    commit = head_of(repository)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(git, "LIMIT_S", 0.1)
    monkeypatch.setattr(git, "_COMMIT_LIMIT_S", 0.1 if slow == "all" else 30.0)
    began = time.monotonic()
    assert state_of(repository, monkeypatch) == (commit if slow == "status" else None, None)
    assert time.monotonic() - began < 20


def test_a_run_records_its_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "my.job", "--hf-token", "hidden", "--lr=1 e"])
    config = {"lr": 0.1, "logger": {"api_key": "hidden"}, "pad_token": "<pad>", "db": "pg://me:hidden@there/x"}
    (started,) = train(Net(), config=config).of(RunStarted)
    assert started.command_line == "python -m my.job --hf-token ... '--lr=1 e'"
    assert "hidden" not in repr(started)
    assert (started.config["lr"], started.config["pad_token"]) == (0.1, "<pad>")
    assert started.git_commit == GitLookup(Net).result().commit
    assert started.host
    assert started.versions.keys() == {"python", "torch", "stagecast"}

    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", "\udc80" + "x" * 10_000])
    (started,) = train(Net()).of(RunStarted)
    assert started.command_line is not None
    assert len(started.command_line) == 4_000
    assert started.command_line.startswith("python -c '\\udc80x")


def test_every_argument_of_a_factory_is_recorded_in_some_form() -> None:
    """Large ones by their size: a factory may be given data."""
    nested: list[Any] = []
    for _ in range(200):
        nested = [nested]
    arguments = {"width": 8, "rows": [0.5] * 10_000, "deep": nested, "big": 2**70, "password": "hidden", "raw": b"a"}
    assert factory_config(arguments) == {
        "width": 8,
        "rows": "list of 40,010 bytes",
        "deep": "list that cannot be recorded",
        "big": str(2**70),
        "password": "...",
        "raw": "YQ==",
    }
