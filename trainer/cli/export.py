"""``stagecast checkpoints export``: the module's tensors, as a state dict in a safetensors file, without torch."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from events.checkpoint import disk
from events.checkpoint.manifest import MANIFEST_NAME, STATE_NAME, TENSORS_NAME, CheckpointName
from events.checkpoint.tensor_file import TensorInfo, lay_out, read_layout
from events.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound
from events.msgpack_keys import check_keys
from trainer.cli.sources import Source, chosen, note, open_source, plain, problem
from trainer.cli.text import say

# Marks in the state, of the table in `events.checkpoint.packing`: of what holds further values, and of a tensor.
_TUPLE, _PAIRS, _ORDERED_PAIRS, _TENSOR = 1, 10, 11, 60
_MOST_TIMES = 32
"""Maximum size of an export in sizes of the checkpoint's tensor file. Tied tensors are written under each name, such as
those of layers that share their weights."""


def export(path: str, out: Path, name: CheckpointName | None, *, force: bool) -> int:
    """Write the module's tensors to a safetensors file; returns the exit code. What is left out is told on stderr.

    Args:
        name: Which; None for the newest whole one of the line.
        force: Replace the file if it is there.

    Raises:
        CheckpointError: There is no whole checkpoint, or it holds what such a file cannot.
        OSError: The disk refuses. There is no file then, or still the earlier one.
    """
    from sinks.format import format_bytes

    source = open_source(path)
    _check_out(out, force)
    wanted = name or source.only
    for one in chosen(source, [wanted]) if wanted is not None else source.line:
        try:
            module = _Module(source, one)
            break
        except (CheckpointDamaged, CheckpointNotFound) as error:
            if wanted is not None:
                raise
            note(f"{one} is damaged and passed over: {problem(source, one, error)}")
    else:
        raise CheckpointNotFound(f"{path} has no whole checkpoint that its run would go on from: name one with --name")
    if module.left_out:
        note(f"left out, being no tensors: {plain(', '.join(module.left_out))}")
    nbytes = _write(out, module, force)
    count = len(module.tensors)
    say(f"{plain(out)}  {count} tensor{'s' * (count != 1)} of {one}  {format_bytes(nbytes)}")
    return 0


class _Module:
    """What a checkpoint holds of the module, read and verified.

    Not by `events.checkpoint.packing.decode`: that needs the types in the state of callbacks and of all else, too.

    Raises:
        CheckpointDamaged: It is not whole.
        CheckpointError: There are no tensors, or two of one name.
    """

    def __init__(self, source: Source, name: CheckpointName) -> None:
        self.where, self.manifest = source.path(name), source.manifest(name)
        source.check(self.manifest)
        self.tensors: dict[str, tuple[TensorInfo, memoryview]] = {}
        """By their names in the state dict; those that are tied, under each of theirs."""
        self.left_out: list[str] = []
        try:
            packed = source.read(self.manifest, STATE_NAME)
            check_keys(packed)
            _, state = msgspec.msgpack.decode(packed)
            self.data = source.read(self.manifest, TENSORS_NAME)
            self._file = read_layout(self.data, f"{self.where}/{TENSORS_NAME}")
            self._sort("", state["module"])
        except CheckpointError:
            raise
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointDamaged(f"{self.where} holds no state of a module: {error!r:.300}") from error
        if not self.tensors:
            raise CheckpointError(f"{self.where} holds no tensors of the module")

    def _sort(self, path: str, raw: Any) -> bool:
        """Find the tensors in a value, and what is none; returns whether it holds any."""
        marked = isinstance(raw, list) and bool(raw) and isinstance(raw[0], msgspec.msgpack.Ext)
        code = raw[0].code if marked else 0
        if code == _TENSOR:
            self._add(path, raw[1])
            return True
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(raw, dict):
            items = raw.items()
        elif code in (_PAIRS, _ORDERED_PAIRS):
            items = zip(raw[1::2], raw[2::2], strict=True)
        elif code == _TUPLE or (isinstance(raw, list) and not marked):
            items = enumerate(raw[1:] if marked else raw)
        before = len(self.left_out)
        found = [self._sort(f"{path}.{key}" if path else str(key), item) for key, item in items]
        if not any(found):
            self.left_out[before:] = [path]  # as a whole
        return any(found)

    def _add(self, name: str, stored: str) -> None:
        info, offset = self._file.tensors[self._file.aliases.get(stored, stored)]
        if name in self.tensors:
            raise CheckpointError(f"two tensors of the module in {self.where} would be called {name!r}")
        self.tensors[name] = info, self.data[offset : offset + info.nbytes]


def _check_out(out: Path, force: bool) -> None:
    """See whether the file may be written. Raises `CheckpointError`."""
    if out.exists() and not out.is_file():
        raise CheckpointError(f"{out} is there, and is no plain file")
    if os.path.lexists(out) and not force:
        raise CheckpointError(f"{out} is there already: give another name, or --force to replace it")
    if not out.parent.is_dir():
        raise CheckpointError(f"{out.parent}, where the file is to be, is no folder")
    if all((out.parent / name).is_file() for name in (MANIFEST_NAME, STATE_NAME)):
        raise CheckpointError(f"{out.parent} is a checkpoint, which an export would damage: write elsewhere")


def _write(out: Path, module: _Module, force: bool) -> int:
    """Write the file as a whole, or not at all; returns its size."""
    from sinks.format import format_bytes

    infos = [TensorInfo(name, info.dtype, info.shape, info.view) for name, (info, _) in module.tensors.items()]
    strange = [f"{one.name} ({one.view})" for one in infos if one.view]
    strange += [f"{one.name} (a reserved name)" for one in infos if one.name == "__metadata__"]
    if strange:
        raise CheckpointError(f"a safetensors file cannot hold {', '.join(strange)}: convert that in get_state()")
    layout = lay_out(infos, {})
    stored, free = len(module.data), shutil.disk_usage(out.parent).free
    if layout.nbytes > _MOST_TIMES * stored:
        raise CheckpointError(
            f"{module.where} holds {format_bytes(stored)} under so many names that an export takes"
            f" {format_bytes(layout.nbytes)}; return each tensor once from get_state()"
        )
    if layout.nbytes > free:
        raise CheckpointError(
            f"the export takes {format_bytes(layout.nbytes)}, and {out.parent} has {format_bytes(free)} free; write"
            f" elsewhere"
        )
    # "format" is what loaders of Hugging Face's ask for.
    notes = {"format": "pt", "checkpoint": f"{module.manifest.run_id}/{module.manifest.name}"}
    text = msgspec.json.encode({"__metadata__": notes} | msgspec.json.decode(layout.header[8:]))
    length = -(-(8 + len(text)) // disk.PAGE) * disk.PAGE
    header = (length - 8).to_bytes(8, "little") + text.ljust(length - 8)
    in_place = sorted(zip(layout.offsets, module.tensors.values(), strict=True), key=lambda pair: pair[0])
    temporary = f".{out.name}.{secrets.token_hex(4)}.tmp"
    with disk.Folder.open(out.parent) as folder:
        try:
            nbytes, _ = disk.write_parts(folder, temporary, [header, *(data for _, (_, data) in in_place)])
            _check_out(out, force)  # again, for the writing took its time
            folder.rename(temporary, out.name)
        except BaseException:
            with contextlib.suppress(OSError):
                folder.remove(temporary)
            raise
        folder.sync()
    return nbytes
