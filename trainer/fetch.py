"""Brings the checkpoint that a run is to be resumed from out of a remote store, before the run begins."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from events.checkpoint.lineage import best_first
from events.checkpoint.manifest import CheckpointName
from events.checkpoint.settings import Checkpoints
from events.checkpoint.store import CHECKPOINTS_DIR, CheckpointStore
from events.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound
from events.folder import RunFolder
from events.log import logger

RESUMED_DIR = "resumed"
"""Within a run's folder: the checkpoint of another run that it began with."""

Fetch = Callable[[], Path | None]


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
    if resume in ("auto", "best") and settings is not None and settings.upload is not None and run_dir is not None:
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
        raise CheckpointNotFound(f"{argument}={address!r}: there is no checkpoint")
    with RunFolder.open(run_dir, run_id):
        return _download(remote, names, run_dir, run_id)


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
    names = list(remote.candidates())
    if best is not None:
        names = _best_first(remote, names, best)
    if names:
        with RunFolder.open(run_dir, run_id):
            _download(remote, names, run_dir, run_id)


def _best_first(remote: Any, names: list[CheckpointName], settings: Checkpoints) -> list[CheckpointName]:
    scores: dict[CheckpointName, float] = {}
    for name in names:
        with contextlib.suppress(CheckpointDamaged, CheckpointNotFound):
            metric = remote.manifest(name).metric
            if metric is not None and settings.best in (None, metric.name):
                scores[name] = metric.value
    return best_first(scores, scores, settings.best_mode == "max")


def _download(remote: Any, names: list[CheckpointName], run_dir: Path, run_id: str) -> Path:
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
            logger.warning(f"{error}; an older checkpoint is tried")
        except OSError as error:
            raise CheckpointError(
                f"{remote.url_of(name)} cannot be brought to {run_dir}: {error}; make room, or give the run"
                f" another folder"
            ) from error
        else:
            logger.info(f"resuming from {remote.url_of(name)}, now in {path}")
            return path
    raise CheckpointDamaged(f"none of the checkpoints at {remote.url} is whole. The newest: {problems[0]}")


def _remote(url: str) -> Any:
    module: Any = importlib.import_module("events.checkpoint.remote")
    return module.RemoteStore(url)
