"""Brings the checkpoint that a run is to be resumed from out of a remote store, before the run begins."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from events.checkpoint.lineage import ranked, scores_of
from events.checkpoint.manifest import CheckpointName
from events.checkpoint.settings import Checkpoints
from events.checkpoint.store import CHECKPOINTS_DIR, RESUMED_DIR, CheckpointStore
from events.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound
from events.log import logger
from events.run.folder import RunFolder

KEYWORDS = ("auto", "best")
"""What ``resume`` may be beside a path or an address."""
_WORDS = frozenset({*KEYWORDS, "last", "latest", "newest"})

Fetch = Callable[[], Path | None]


def no_name(path: str) -> str | None:
    """The word at the end of a path or address that was meant for a checkpoint, and is not the name of one."""
    word = path.rstrip("/").rpartition("/")[2]
    return word if word in _WORDS else None


def fetch_for(
    argument: str,
    resume: str | os.PathLike[str] | None,
    settings: Checkpoints | None,
    run_id: str,
    run_dir: Path | None,
) -> Fetch | None:
    """What has to be fetched from the network before a run can start; None for nothing.

    Args:
        argument: The trainer's argument, for messages: ``resume`` or ``init_from``.
        resume: Its value.
        settings: None: the run takes no checkpoints.
        run_dir: The run's folder; None if it has none.

    Returns:
        A function that waits for the network, and returns the local path that the address came to: None, if ``resume``
        is to be followed as it is.
    """
    if isinstance(resume, str) and "://" in resume:
        address = resume
        return lambda: _fetch_address(argument, address, run_id, run_dir)
    if resume in KEYWORDS and settings is not None and settings.upload is not None and run_dir is not None:
        upload = settings.upload
        return lambda: _fetch_own(upload, run_id, run_dir, settings if resume == "best" else None)
    return None


def _fetch_address(argument: str, address: str, run_id: str, run_dir: Path | None) -> Path:
    """Fetch a checkpoint by its address, or the newest one of a run by that of the run.

    Raises:
        CheckpointNotFound: there is none.
        CheckpointDamaged: none of those that there are is whole.
        UploadError: the store cannot be reached.
    """
    objects: Any = importlib.import_module("events.checkpoint.objects")
    objects.parse_url(address)  # or what may be a secret would stand in a message
    if run_dir is None:
        raise CheckpointNotFound(f"{argument}={address!r} has to be kept somewhere; give the run a folder (run_dir)")
    base, _, last = address.rstrip("/").rpartition("/")
    name = CheckpointName.parse(last)
    remote = _remote(base if name is not None else address)
    names = [name] if name is not None else list(remote.candidates())
    if not names:
        word = no_name(address)
        why = f"{word!r} is not a checkpoint name (expected e.g. step-500.a1)" if word else "there is no checkpoint"
        raise CheckpointNotFound(f"{argument}={address!r}: {why}")
    with RunFolder.open(run_dir, run_id):
        # Weights are copied, whoever's they are: the history does not continue from them.
        return _download(remote, names, run_dir, None if argument == "init_from" else run_id)


def _fetch_own(upload: str, run_id: str, run_dir: Path, best: Checkpoints | None) -> None:
    """On a machine that has nothing of the run, fetch the newest checkpoint that it has uploaded, if there is one.

    Args:
        best: Fetch the one with the best metric by these settings instead.
    """
    folder = run_dir / CHECKPOINTS_DIR
    if CheckpointStore(folder).last_attempt:
        return
    objects: Any = importlib.import_module("events.checkpoint.objects")
    remote = _remote(objects.run_url(upload, run_id))
    if best is None:
        names = list(remote.candidates())
    else:
        scores = scores_of(remote.line(), remote.manifest, best.best, lambda name, error: logger.warning(str(error)))
        names = ranked(scores, best.best_mode if best.best is not None else None)
    if names:
        with RunFolder.open(run_dir, run_id):
            _download(remote, names, run_dir, run_id)


def _download(remote: Any, names: list[CheckpointName], run_dir: Path, run_id: str | None) -> Path:
    """Copy the first of these that is whole: to this run's checkpoints if it is one of them, else beside them."""
    problems: list[str] = []
    for name in names:
        try:
            own = remote.manifest(name).run_id == run_id
            folder = run_dir / (CHECKPOINTS_DIR if own else RESUMED_DIR)
            path: Path = remote.download(name, folder)
            if own:
                # Last: without a checkpoint they would say that this run has begun anew. With them, this attempt gets a
                # number of its own.
                remote.download_attempts(folder)
        except (CheckpointDamaged, CheckpointNotFound) as error:
            problems.append(str(error))
            logger.warning(f"{error}; another checkpoint is tried")
        except OSError as error:
            raise CheckpointError(
                f"{remote.url_of(name)} cannot be brought to {run_dir}: {error}; make room, or give the run"
                f" another folder"
            ) from error
        else:
            logger.info(f"{remote.url_of(name)} was copied to {path}")
            return path
    raise CheckpointDamaged(f"none of the checkpoints at {remote.url} is whole. The newest: {problems[0]}")


def _remote(url: str) -> Any:
    module: Any = importlib.import_module("events.checkpoint.remote")
    return module.RemoteStore(url)
