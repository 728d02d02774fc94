"""``stagecast checkpoints export``: the module's tensors, as a state dict in a safetensors file, without torch."""

from __future__ import annotations

import contextlib
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
from trainer.cli.sources import Source, chosen, open_source, problem
from trainer.cli.text import check_out, echo, echo_error

# Codes of containers and tensors, from the table in `events.checkpoint.packing`.
_TUPLE, _PAIRS, _ORDERED_PAIRS, _TENSOR = 1, 10, 11, 60
_MOST_TIMES = 32
"""Maximum size of an export in sizes of the checkpoint's tensor file: tied tensors are written once per name."""


def export(path: str, out: str, name: CheckpointName | None, *, force: bool) -> int:
    """Write the module's tensors to a safetensors file; returns the exit code. Skipped values are listed on stderr.

    Args:
        name: None for the newest valid checkpoint of the lineage.
        force: Replace an existing file.

    Raises:
        CheckpointError: There is no valid checkpoint, or a safetensors file cannot hold its tensors.
        OSError: The file cannot be written; an earlier one is unchanged.
    """
    from sinks.format import format_bytes

    source = open_source(path)
    file = Path(out)
    _check(file, force)
    wanted = name or source.only
    for one in chosen(source, [wanted]) if wanted is not None else source.line:
        try:
            module = _Module(source, one)
            break
        except (CheckpointDamaged, CheckpointNotFound) as error:
            if wanted is not None:
                raise
            echo_error(f"stagecast checkpoints: {one} is damaged and skipped: {problem(source, one, error)}")
    else:
        raise CheckpointNotFound(f"{path} has no valid checkpoint from which its run would resume; use --name")
    if module.skipped:
        echo_error(f"stagecast checkpoints: skipped values that are not tensors: {', '.join(module.skipped)}")
    nbytes = _write(file, module, force)
    count = len(module.tensors)
    echo(f"{out}  {count} tensor{'s' * (count != 1)} of {one}  {format_bytes(nbytes)}")
    return 0


class _Module:
    """The module's tensors in a checkpoint, read and verified.

    Not with `events.checkpoint.packing.decode`, which needs the types of all other state, such as that of callbacks.

    Raises:
        CheckpointDamaged: A file is missing or damaged.
        CheckpointError: There are no tensors, or two have the same name.
    """

    def __init__(self, source: Source, name: CheckpointName) -> None:
        self.where, self.manifest = source.path(name), source.manifest(name)
        source.check(self.manifest)
        self.tensors: dict[str, tuple[TensorInfo, memoryview]] = {}
        """By names in the state dict; tied tensors under each of their names."""
        self.skipped: list[str] = []
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
        """Collect the tensors in a value, and the paths of other values; returns whether it holds any tensor."""
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
        before = len(self.skipped)
        found = [self._sort(f"{path}.{key}" if path else str(key), item) for key, item in items]
        if not any(found):
            self.skipped[before:] = [path]  # one path for the whole container
        return any(found)

    def _add(self, name: str, stored: str) -> None:
        info, offset = self._file.tensors[self._file.aliases.get(stored, stored)]
        if name in self.tensors:
            raise CheckpointError(f"two tensors of the module in {self.where} have the name {name!r}")
        self.tensors[name] = info, self.data[offset : offset + info.nbytes]


def _check(out: Path, force: bool) -> None:
    check_out(out, force=force)
    if all((out.parent / name).is_file() for name in (MANIFEST_NAME, STATE_NAME)):
        raise CheckpointError(f"{out.parent} is a checkpoint, which an export would damage; use another folder")


def _write(out: Path, module: _Module, force: bool) -> int:
    """Write the file atomically; returns its size."""
    from sinks.format import format_bytes

    infos = [TensorInfo(name, info.dtype, info.shape, info.view) for name, (info, _) in module.tensors.items()]
    strange = [f"{one.name} ({one.view})" for one in infos if one.view]
    strange += [f"{one.name} (a reserved name)" for one in infos if one.name == "__metadata__"]
    if strange:
        raise CheckpointError(f"a safetensors file cannot hold {', '.join(strange)}; convert them in get_state()")
    layout = lay_out(infos, {})
    stored, free = len(module.data), shutil.disk_usage(out.parent).free
    if layout.nbytes > _MOST_TIMES * stored:
        raise CheckpointError(
            f"{module.where} holds {format_bytes(stored)} under so many names that an export needs"
            f" {format_bytes(layout.nbytes)}; return each tensor once from get_state()"
        )
    if layout.nbytes > free:
        raise CheckpointError(
            f"the export needs {format_bytes(layout.nbytes)}, but {out.parent} has {format_bytes(free)} free; use"
            f" another disk"
        )
    # Hugging Face's loaders require "format".
    notes = {"format": "pt", "checkpoint": f"{module.manifest.run_id}/{module.manifest.name}"}
    text = msgspec.json.encode({"__metadata__": notes} | msgspec.json.decode(layout.header[8:]))
    length = -(-(8 + len(text)) // disk.PAGE) * disk.PAGE
    header = (length - 8).to_bytes(8, "little") + text.ljust(length - 8)
    in_place = sorted(zip(layout.offsets, module.tensors.values(), strict=True), key=lambda pair: pair[0])
    temporary = f".{out.name}.{secrets.token_hex(4)}.tmp"
    with disk.Folder.open(out.parent) as folder:
        try:
            nbytes = disk.write_parts(folder, temporary, [header, *(data for _, (_, data) in in_place)]).nbytes
            _check(out, force)  # again, because the write took time
            folder.rename(temporary, out.name)
        except BaseException:
            with contextlib.suppress(OSError):
                folder.remove(temporary)
            raise
        folder.sync()
    return nbytes
