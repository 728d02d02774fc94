"""The module's weights as a safetensors file of their own, for any reader; without torch.

Tensors that share memory are stored once, under the first of their names, as `safetensors.torch.save_model` stores
them: ``safetensors.torch.load_model`` and ``from_pretrained`` of transformers accept no others. The metadata names the
other ones (https://huggingface.co/docs/safetensors/torch_shared_tensors).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from events.checkpoint.manifest import Metric
from events.checkpoint.shards import StoredTensors
from events.checkpoint.snapshot import Part
from events.checkpoint.tensor_file import TensorInfo, lay_out
from events.errors import CheckpointDamaged, CheckpointError
from events.msgpack_keys import check_keys

# Codes of containers and tensors, from the table in `events.checkpoint.packing`.
_TUPLE, _PAIRS, _ORDERED_PAIRS, _TENSOR = 1, 10, 11, 60


class Weights(msgspec.Struct, frozen=True):
    """Tensors by their names in a state dict."""

    names: dict[str, str]
    """The stored tensor of each name, in the order of the state dict; tied names have the same one."""
    stored: dict[str, tuple[TensorInfo, memoryview]]
    """Each with its elements."""
    skipped: list[str] = []
    """Paths of values that are not tensors."""
    averaged_by: str | None = None
    """The callback that averaged them; None for trained weights."""
    problem: str | None = None
    """Why they may not be the wanted ones."""

    @classmethod
    def of(cls, part: Part) -> Weights:
        """Return the tensors of a part."""
        stored = {info.name: (info, data) for info, data in part.tensors}
        return cls({name: name for name in stored} | part.aliases, stored)

    def select(self, names: Mapping[str, str]) -> Weights:
        """Return some tensors under new names.

        Args:
            names: The new names by the present ones.
        """
        chosen = {names[name]: key for name, key in self.names.items() if name in names}
        return msgspec.structs.replace(self, names=chosen)

    def items(self) -> Iterator[tuple[str, tuple[TensorInfo, memoryview]]]:
        """Each name with its tensor."""
        return ((name, self.stored[key]) for name, key in self.names.items())

    def of_module(self, wanted: Collection[str]) -> Weights | None:
        """Return the tensors of a state dict that the module's state holds, perhaps within other state.

        Args:
            wanted: The names in the state dict.

        Returns:
            None if it does not hold all of them, or holds them in several places.
        """
        first = next(iter(wanted), "")
        prefixes = [name.removesuffix(first) for name in self.names if name.endswith(first)]
        places = [prefix for prefix in prefixes if all(prefix + name in self.names for name in wanted)]
        if "" not in places and len(places) != 1:
            return None
        prefix = "" if "" in places else places[0]
        return self.select({prefix + name: name for name in wanted})

    @property
    def tied(self) -> dict[str, str]:
        """Further names of tensors, with the first name of each."""
        first: dict[str, str] = {}
        for name, key in self.names.items():
            first.setdefault(key, name)
        return {name: first[key] for name, key in self.names.items() if first[key] != name}

    def file(self, metadata: Mapping[str, str], *, every_name: bool = False) -> tuple[list[bytes | memoryview], int]:
        """Return the parts of the file in order, without copies, and its size in bytes.

        Args:
            metadata: Texts for its header.
            every_name: Store tied tensors under each of their names, for `load_state_dict`.

        Raises:
            CheckpointError: A name is reserved in the format.
        """
        if "__metadata__" in self.names:
            raise CheckpointError("a safetensors file cannot hold __metadata__ (a reserved name); rename it")
        tied = {} if every_name else self.tied
        tensors = [(name, *self.stored[key]) for name, key in self.names.items() if name not in tied]
        infos = [msgspec.structs.replace(info, name=name) for name, info, _ in tensors]
        # Hugging Face's loaders require "format".
        layout = lay_out(infos, {}, {**tied, **metadata, "format": "pt"})
        in_order = sorted(zip(layout.offsets, (data for *_, data in tensors), strict=True), key=lambda pair: pair[0])
        return [layout.header, *(data for _, data in in_order)], layout.nbytes


def metadata_of(run_id: str, step: int, checkpoint: str | None, metric: Metric | None) -> dict[str, str]:
    """Return the texts in the header of the weights of a run: equal weights of a run's last step are equal files."""
    notes = {"global_step": str(step)}
    if checkpoint is not None:
        notes["checkpoint"] = f"{run_id}/{checkpoint}"
    if metric is not None:
        notes["metric"] = f"{metric.name}={metric.value!r}"
    return notes


def weights_in(state: memoryview, tensors: StoredTensors, where: str, *, averaged: bool | None = None) -> Weights:
    """Return the module's tensors in a checkpoint.

    Not with `events.checkpoint.packing.decode`, which needs the types of all other state, such as that of callbacks.

    Args:
        state: `events.checkpoint.manifest.STATE_NAME`, verified.
        tensors: All of the checkpoint's.
        where: The checkpoint's folder, for messages.
        averaged: The averaged weights, not the trained ones; None: if the run has validated those.

    Raises:
        CheckpointDamaged: The bytes are not the state of a module.
        CheckpointError: There are no tensors, no averaged ones, or two have the same name.
    """
    by = problem = None
    try:
        check_keys(state)
        _, decoded = msgspec.msgpack.decode(state)
        reader = _StateReader(tensors, where)
        module, average = decoded["module"], decoded.get("averaged")
        if average is None and averaged:
            raise CheckpointError(f"{where} holds no averaged weights; train with EMA or SWA of trainer.callbacks")
        if average is not None and (average["validated"] if averaged is None else averaged):
            module, by = average["module"], str(average["key"])
            problem = "its batch norm statistics are those of an earlier average" if average["stale"] else None
        elif average is not None and averaged is None:
            problem = f"it also holds the weights averaged by {average['key']}: --averaged exports those"
        reader.sort("", module)
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{where} holds no state of a module: {error!r:.300}") from error
    if not reader.names:
        raise CheckpointError(f"{where} holds no tensors of the module")
    return Weights(reader.names, reader.stored, reader.skipped, by, problem)


class _StateReader:
    """Collects the tensors in the encoded state of a module."""

    def __init__(self, tensors: StoredTensors, where: str) -> None:
        self.names: dict[str, str] = {}
        self.stored: dict[str, tuple[TensorInfo, memoryview]] = {}
        self.skipped: list[str] = []
        self._tensors, self._where = tensors, where

    def sort(self, path: str, raw: Any) -> bool:
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
        found = [self.sort(f"{path}.{key}" if path else str(key), item) for key, item in items]
        if not any(found):
            self.skipped[before:] = [path]  # one path for the whole container
        return any(found)

    def _add(self, name: str, key: str) -> None:
        if name in self.names:
            raise CheckpointError(f"two tensors of the module in {self._where} have the name {name!r}")
        self.names[name] = key = self._tensors.key_of(key)
        if key not in self.stored:
            self.stored[key] = self._tensors.get(key)


def renamed(names: Iterable[str], rename: Mapping[str, str]) -> dict[str, str]:
    """Return each name with its prefix replaced; the longest of the matching prefixes counts.

    Args:
        rename: New prefixes by present ones.

    Raises:
        ValueError: A prefix matches no name, or two names become one, or none at all; names them.
    """
    result: dict[str, str] = {}
    owners: dict[str, str] = {}
    unused = set(rename)
    for name in names:
        matching = [one for one in rename if name.startswith(one)]
        unused.difference_update(matching)
        prefix = max(matching, key=len, default=None)
        new = name if prefix is None else rename[prefix] + name[len(prefix) :]
        if prefix is not None and (not new or new.startswith(".")):
            raise ValueError(f"the prefix {prefix!r} leaves {new!r} of {name}; end the prefix with a dot")
        if new in owners:
            raise ValueError(f"{owners[new]} and {name} would both become {new}; choose another prefix")
        result[name], owners[new] = new, name
    if unused:
        raise ValueError(
            f"no tensor has the prefix {', '.join(map(repr, sorted(unused)))}; the names are"
            f" {', '.join(first_of(result))}"
        )
    return result


def first_of(texts: Iterable[str], limit: int = 8) -> list[str]:
    """Return the first texts, and the number of the others."""
    shown = list(texts)
    return shown if len(shown) <= limit else [*shown[:limit], f"{len(shown) - limit} more"]
