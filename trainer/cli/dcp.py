"""``stagecast checkpoints export --format dcp``: the weights as a folder of ``torch.distributed.checkpoint``."""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from events.checkpoint.disk import sync_folder
from events.checkpoint.weights import Weights
from events.errors import CheckpointError
from trainer.data.tensor_state import tensor_of

_METADATA_NAME = ".metadata"
"""The file by which torch recognises such a folder."""


def check_folder(out: Path, *, force: bool) -> None:
    """Check that a folder can be written.

    Raises:
        CheckpointError: It exists, and is not an earlier export that ``force`` replaces.
    """
    if not out.parent.is_dir():
        raise CheckpointError(f"{out.parent} is not a folder; create it first")
    if out.exists() and not (out / _METADATA_NAME).is_file():
        raise CheckpointError(f"{out} exists, and is not a folder of torch.distributed.checkpoint; name a new one")
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists; name another folder, or replace it with --force")


def write_folder(out: Path, weights: Weights, *, force: bool) -> int:
    """Write a state dict; returns its size in bytes. `torch.distributed.checkpoint.load` reads it, on any ranks.

    Raises:
        CheckpointError: As `check_folder`.
        OSError: The folder cannot be written; an earlier one is unchanged.
    """
    state = {name: tensor_of(data, info) for name, (info, data) in weights.items()}
    temporary = out.parent / f".{out.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process writes it alone
            save(state, storage_writer=FileSystemWriter(temporary), no_dist=True)
        sync_folder(temporary)
        check_folder(out, force=force)  # again, because the write took time
        if out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(out.parent)
    return sum(tensor.nbytes for tensor in state.values())
