"""``stagecast checkpoints export``: the module's weights, in a safetensors file for any reader, without torch.

``--format dcp`` needs torch, which writes the folder.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import secrets
import shutil
from pathlib import Path
from typing import Any, Literal

from events.checkpoint import disk
from events.checkpoint.manifest import MANIFEST_NAME, STATE_NAME, CheckpointName, Manifest
from events.checkpoint.shards import StoredTensors
from events.checkpoint.weights import Weights, first_of, metadata_of, renamed, weights_in
from events.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound
from events.text import plain_text
from trainer.cli.sources import Source, chosen, open_source, problem
from trainer.cli.text import check_out, echo, echo_error

_MOST_TIMES = 32
"""Maximum size of an export with every name, in sizes of the checkpoint's tensor files."""
DEFAULT_OUT = {"safetensors": "model.safetensors", "dcp": "model-dcp"}
"""By format; transformers and other libraries look for the first name."""


def export(
    path: str,
    out: str | None,
    name: CheckpointName | None,
    *,
    best: bool,
    strip_prefix: str | None,
    every_name: bool,
    averaged: bool | None,
    format: Literal["safetensors", "dcp"],
    force: bool,
) -> int:
    """Write the module's weights to a file or folder; returns the exit code. Skipped values are listed on stderr.

    Args:
        out: None for `DEFAULT_OUT` in the working directory.
        name: None for the newest valid checkpoint of the lineage, or with ``best`` the one with the best metric.
        strip_prefix: Only the tensors whose names begin with it, without it.
        every_name: Write tied tensors under each of their names.
        averaged: The averaged weights, not the trained ones; None: if the run has validated those.
        format: ``dcp`` for a folder of torch.distributed.checkpoint.
        force: Replace an existing one.

    Raises:
        CheckpointError: There is no valid checkpoint, or a safetensors file cannot hold its tensors.
        OSError: The file cannot be written; an earlier one is unchanged.
    """
    from sinks.format import format_bytes

    source = open_source(path)
    dcp: Any = importlib.import_module("trainer.cli.dcp") if format == "dcp" else None
    file = Path(out or DEFAULT_OUT[format])
    if dcp is None:
        _check(file, force)
    else:
        every_name = True
        dcp.check_folder(file, force=force)
    manifest, weights = _read(source, path, name, best, averaged)
    if weights.problem is not None:
        _note(f"{manifest.name}: {weights.problem}")
    if weights.skipped:
        _note(f"skipped values that are not tensors: {', '.join(weights.skipped)}")
    if strip_prefix is not None:
        weights = _stripped(weights, strip_prefix)
    if (tied := weights.tied) and not every_name:
        pairs = ", ".join(first_of(f"{again} is {first}" for again, first in tied.items()))
        _note(
            f"tied tensors are written once, for safetensors.torch.load_model and from_pretrained: {pairs}; for"
            f" load_state_dict use --every-name"
        )
    if dcp is None:
        nbytes = _write(file, manifest, weights, source.path(manifest.name), every_name=every_name, force=force)
    else:
        nbytes = dcp.write_folder(file, weights, force=force)
    count = len(weights.names) - (0 if every_name else len(tied))
    metric = f" ({manifest.metric.name} {manifest.metric.value:.6g})" if best and manifest.metric is not None else ""
    by = f", averaged by {plain_text(weights.averaged_by)}" if weights.averaged_by is not None else ""
    echo(f"{file}  {count} tensor{'s' * (count != 1)} of {manifest.name}{by}{metric}  {format_bytes(nbytes)}")
    return 0


def _note(text: str) -> None:
    echo_error(f"stagecast checkpoints: {text}")


def _read(
    source: Source, path: str, name: CheckpointName | None, best: bool, averaged: bool | None
) -> tuple[Manifest, Weights]:
    """Read and verify the first valid one of the wanted checkpoints."""
    wanted = name or source.only
    if best and source.only is not None:
        raise CheckpointNotFound(f"{path} is one checkpoint; --best needs the run")
    if best:
        names = source.ranked(lambda one, error: _note(f"{one} is skipped: {error}"))
        missing = f"{path} has no valid checkpoint with a metric; use --name, or train with Checkpoints(best=...)"
    else:
        names = source.line if wanted is None else chosen(source, [wanted])
        missing = f"{path} has no valid checkpoint from which its run would resume; use --name"
    for one in names:
        try:
            manifest = source.manifest(one)
            source.check(manifest)
            where, read = source.path(one), functools.partial(source.read, manifest)
            tensors = StoredTensors(manifest.files, read, where)
            return manifest, weights_in(read(STATE_NAME), tensors, where, averaged=averaged)
        except KeyError as error:  # of the manifest's files
            raise CheckpointDamaged(f"{source.path(one)}/{MANIFEST_NAME} does not list {error}") from None
        except (CheckpointDamaged, CheckpointNotFound) as error:
            if wanted is not None:
                raise
            _note(f"{one} is damaged and skipped: {problem(source, one, error)}")
    raise CheckpointNotFound(missing)


def _stripped(weights: Weights, prefix: str) -> Weights:
    inside = [name for name in weights.names if name.startswith(prefix)]
    try:
        names = renamed(inside or weights.names, {prefix: ""})
    except ValueError as error:
        raise CheckpointError(f"--strip-prefix: {error}") from None
    if outside := [name for name in weights.names if name not in names]:
        _note(f"skipped tensors without the prefix {prefix!r}: {', '.join(first_of(outside))}")
    return weights.select(names)


def _check(out: Path, force: bool) -> None:
    check_out(out, force=force)
    if all((out.parent / name).is_file() for name in (MANIFEST_NAME, STATE_NAME)):
        raise CheckpointError(f"{out.parent} is a checkpoint, which an export would damage; use another folder")


def _tensor_bytes(manifest: Manifest) -> int:
    return sum(entry.nbytes for name, entry in manifest.files.items() if name.endswith(".safetensors"))


def _write(out: Path, manifest: Manifest, weights: Weights, where: str, *, every_name: bool, force: bool) -> int:
    """Write the file atomically; returns its size."""
    from sinks.format import format_bytes

    views = [(name, weights.stored[key][0].view) for name, key in weights.names.items()]
    if strange := ", ".join(f"{name} ({view})" for name, view in views if view):
        raise CheckpointError(f"a safetensors file cannot hold {strange}; convert them in get_state()")
    metadata = metadata_of(manifest.run_id, manifest.global_step, str(manifest.name), manifest.metric)
    parts, size = weights.file(metadata, every_name=every_name)
    stored, free = _tensor_bytes(manifest), shutil.disk_usage(out.parent).free
    if size > _MOST_TIMES * stored:
        raise CheckpointError(
            f"{where} holds {format_bytes(stored)} under so many names that an export needs {format_bytes(size)};"
            f" export without --every-name"
        )
    if size > free:
        raise CheckpointError(
            f"the export needs {format_bytes(size)}, but {out.parent} has {format_bytes(free)} free; use another disk"
        )
    temporary = f".{out.name}.{secrets.token_hex(4)}.tmp"
    with disk.Folder.open(out.parent) as folder:
        try:
            nbytes = disk.write_parts(folder, temporary, parts).nbytes
            _check(out, force)  # again, because the write took time
            folder.rename(temporary, out.name)
        except BaseException:
            with contextlib.suppress(OSError):
                folder.remove(temporary)
            raise
        folder.sync()
    return nbytes
