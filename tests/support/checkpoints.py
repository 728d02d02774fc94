"""Checkpoints of random bytes, and their uploads."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from events.checkpoint import disk
from events.checkpoint.manifest import CheckpointName, Manifest, Metric
from events.checkpoint.remote import RemoteStore
from events.checkpoint.store import CheckpointStore

PART = 1_000
"""Bytes per uploaded object."""


def make(
    folder: Path, step: int, attempt: int = 1, *, parent: str | None = None, metric: float | None = 1.0, **files: int
) -> Manifest:
    """Commit a checkpoint to a folder of checkpoints; its files are given by their sizes."""
    store, name = CheckpointStore(folder), CheckpointName(step, attempt)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = store.begin(name)
    noise = random.Random(f"{name} {files}")
    entries = {}
    for stem, nbytes in (files or {"tensors": 5_500, "state": 300}).items():
        entries[f"{stem}.bin"] = disk.write_parts(temporary, f"{stem}.bin", [noise.randbytes(nbytes)])
    manifest = Manifest(
        run_id="run",
        attempt=attempt,
        global_step=step,
        epoch=step // 10,
        seq=step,
        time=float(step),
        parent=parent,
        reasons=["steps"],
        metric=Metric("val_loss", metric) if metric is not None else None,
        files=entries,
    )
    store.commit(manifest)
    return manifest


def put(
    remote: RemoteStore,
    folder: Path,
    manifest: Manifest,
    part_bytes: int = PART,
    progress: Callable[[int, int], object] = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> bool:
    """Upload a checkpoint from a folder of checkpoints."""
    return remote.upload(folder / str(manifest.name), manifest, part_bytes, progress, cancelled)
