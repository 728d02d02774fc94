"""All ranks read one checkpoint: rank 0 looks for it, and every rank confirms it."""

from __future__ import annotations

from pathlib import Path

from events.errors import CheckpointDamaged
from events.tracebacks import describe
from trainer.checkpoint.loaded import Loaded
from trainer.checkpoint.resume import Read, Search
from trainer.distributed.world import World


def read_together(world: World, read: Read, search: Search) -> Loaded | None:
    """Return the checkpoint that rank 0 has found and every rank has read; None if there is none. WAIT: for all ranks.

    Args:
        read: Reads what this rank needs of the checkpoint in a folder.
        search: Looks for a checkpoint, on rank 0; calls the function it gets for each candidate, and goes to the next
            after a `CheckpointDamaged`.

    Raises:
        CheckpointError: Of the search, on rank 0, and `PeerFailed` on the others.
    """
    if world.size == 1:
        return search(read)

    def lead() -> Loaded | None:
        try:
            return search(lambda folder: _read_on_all(world, read, folder))
        finally:
            _next(world, None)

    def follow() -> Loaded | None:
        found: Loaded | None = None
        while (folder := _next(world, None)) is not None:
            try:
                found = _read_on_all(world, read, folder)
            except Exception:  # a border: rank 0 reports it, and decides what comes next
                found = None
        return found

    return world.together(lead if world.leads else follow)


def _next(world: World, folder: Path | None) -> Path | None:
    """Return the folder that rank 0 looks at; None after the last one."""
    return world.share(folder)


def _read_on_all(world: World, read: Read, folder: Path) -> Loaded:
    """Read a checkpoint on every rank at the same time.

    Raises:
        CheckpointDamaged: Another rank cannot read it; names that rank.
        CheckpointError: This rank cannot read it.
    """
    if world.leads:
        _next(world, folder.absolute())
    error: Exception | None = None
    loaded: Loaded | None = None
    try:
        loaded = read(folder)
    except Exception as raised:  # a border: raised below, once all ranks have read it
        error = raised
    failures = world.gather(None if error is None else (world.host, describe(error)))
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise CheckpointDamaged(f"{folder} cannot be read by rank {rank} on {failure[0]}: {failure[1]}")
    assert loaded is not None
    return loaded
