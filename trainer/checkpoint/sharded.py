"""Sharded checkpoints: what one rank stores, and reading them on any number of ranks."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor, Replicate
from torch.futures import Future

from events.checkpoint import packing
from events.checkpoint.files import read_file, read_manifest
from events.checkpoint.manifest import TENSORS_NAME, Manifest
from events.checkpoint.shards import SHARDS_NAME, Chunk, decode_shards, tensors_name
from events.checkpoint.tensor_file import read_layout
from events.errors import CheckpointDamaged, UnstorableState
from trainer.data.tensor_state import DTYPES, STORED, Collected, tensors_in
from trainer.distributed.local import is_split
from trainer.module_interface import ModuleInterface

Layout = Callable[[str], torch.Tensor | None]
"""Returns the live tensor for the name of one in a checkpoint."""


class RankCollected(Collected):
    """What one rank stores of a state: its parts of the tensors that are split, and on rank 0 all others.

    Communicates with no rank.

    Args:
        tree: The state, which has the same paths on every rank.
        own: The state that the rank has for itself, which every rank but 0 stores in addition.

    Raises:
        UnstorableState: A value cannot be stored; names its path.
    """

    def __init__(self, tree: object, rank: int, own: object = None) -> None:
        self.chunks: list[Chunk] = []
        self._rank = rank
        self._offsets: dict[object, tuple[int, ...] | None] = {}
        super().__init__(tree)
        if rank:
            with torch.no_grad():
                self.state = packing.encode(own, self._store, at=f"rank-{rank}")

    def _place(self, path: str, value: object) -> str | None:
        if not isinstance(value, torch.Tensor):
            return None
        if not is_split(value):
            return self._store(path, value) if not self._rank else self._name(path)
        if any(placement.is_partial() for placement in value.placements):
            raise UnstorableState(
                f"the tensor {path} cannot be stored in a checkpoint: its ranks hold parts of a sum; add them up with"
                f" full_tensor() in get_state()"
            )
        if (offsets := self._offsets_of(value)) is None:
            return self._name(path)
        return self._store(path, value.to_local(), tuple(value.shape), offsets)

    def _offsets_of(self, value: DTensor) -> tuple[int, ...] | None:
        """Return the first element of this rank's part, per dimension; None if another rank writes it.

        Computed once for all tensors that are split alike, because torch takes longer for it than for a small copy.
        """
        layout = value.shape, value.device_mesh, value.placements
        if layout not in self._offsets:
            self._offsets[layout] = _offsets_of(value) if _stores(value) else None
        return self._offsets[layout]

    def _store(
        self, path: str, value: object, shape: tuple[int, ...] | None = None, offsets: tuple[int, ...] | None = None
    ) -> str | None:
        name = super()._place(path, value)
        if isinstance(value, torch.Tensor) and name is not None and name not in self.aliases:
            info, sizes = self.infos[-1], tuple(value.shape)
            shape, offsets = sizes if shape is None else shape, (0,) * len(sizes) if offsets is None else offsets
            self.chunks.append(Chunk(self._rank, name, shape, offsets, sizes, info.dtype, info.view))
        return name

    @property
    def metadata(self) -> dict[str, str]:
        """Entries of the tensor file by which torch's `HuggingFaceStorageReader` puts the parts together."""
        offsets = {
            one.name: {"saved_offsets": one.offsets + (0,) * (len(info.shape) - len(one.sizes))}
            for one, info in zip(self.chunks, self.infos, strict=True)
        }
        return {"DCP_SHARDING_INFO": json.dumps(offsets)}


class StagecastReader(StorageReader):
    """Reads checkpoints of this library, sharded or not, through `torch.distributed.checkpoint.load`.

    Each file that is needed is read and verified once. With ``no_dist=True`` no rank waits for another.

    Args:
        folder: Of one checkpoint.
        manifest: Its manifest, if that has been read.

    Raises:
        CheckpointDamaged: The checkpoint is incomplete or changed.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest | None = None) -> None:
        self.folder = Path(folder)
        self._manifest = manifest or read_manifest(self.folder)
        self._open: dict[int, dict[str, torch.Tensor]] = {}
        self.chunks, self.aliases = self._table()

    def _table(self) -> tuple[dict[str, list[Chunk]], dict[str, str]]:
        entry = self._manifest.files.get(SHARDS_NAME)
        if entry is not None:
            return decode_shards(bytes(read_file(self.folder, SHARDS_NAME, entry)), str(self.folder / SHARDS_NAME))
        if TENSORS_NAME not in self._manifest.files:
            return {}, {}
        tensors, aliases = self._tensors(0), self._aliases
        return {
            name: [Chunk(0, name, tuple(one.shape), (0,) * one.dim(), tuple(one.shape), *STORED[one.dtype])]
            for name, one in tensors.items()
            if name not in aliases
        }, aliases

    def _tensors(self, rank: int) -> dict[str, torch.Tensor]:
        if rank not in self._open:
            name = tensors_name(rank)
            try:
                data = read_file(self.folder, name, self._manifest.files[name])
            except KeyError:
                raise CheckpointDamaged(f"{self.folder} does not list {name}; load another checkpoint") from None
            self._open[rank] = tensors_in(data, str(self.folder / name))
            if not rank:
                self._aliases = read_layout(data, name).aliases
        return self._open[rank]

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader belongs to one folder."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether the folder has a manifest."""
        return (Path(checkpoint_id) / "manifest.json").is_file()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return shapes, types and parts of all tensors."""
        found: dict[str, Any] = {}
        where: dict[MetadataIndex, int] = {}
        for name, chunks in self.chunks.items():
            found[name] = TensorStorageMetadata(
                TensorProperties(dtype=_dtype(chunks[0])),
                torch.Size(chunks[0].shape),
                [ChunkStorageMetadata(torch.Size(one.offsets), torch.Size(one.sizes)) for one in chunks],
            )
            where |= {MetadataIndex(name, torch.Size(one.offsets)): one.rank for one in chunks}
        return Metadata(found, storage_data=where)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Remember which file holds which part."""
        self._where = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what a rank wants of the parts. Waits for the disk."""
        for item in plan.items:
            index = MetadataIndex(item.storage_index.fqn, item.storage_index.offset)
            part = self._tensors(self._where[index])[item.storage_index.fqn]
            for dimension, (begin, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dimension, begin, size)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def decode(self, state: memoryview, layout: Layout, wants: Callable[[str], bool] = lambda name: True) -> Any:
        """Join an encoded state with its tensors, each laid out as a live one. Waits for the disk.

        Args:
            layout: Returns the live tensor for a name in the checkpoint. If that is split, and has the stored shape,
                the copy is split likewise; if it has another shape, such as that of L-BFGS over all parameters, every
                rank has all of the copy, as a ``DTensor``. Any other is whole, in host memory.
            wants: Whether a tensor is read; others are on the meta device.

        Raises:
            CheckpointDamaged: A file is incomplete or changed, or lacks a tensor.
        """
        read: dict[str, torch.Tensor] = {}

        def place(name: str) -> torch.Tensor:
            key = self.aliases.get(name, name)
            if key not in read:
                first, live = self.chunks[key][0], layout(name)
                dtype = _dtype(first)
                if not wants(name):
                    return torch.empty(first.shape, dtype=dtype, device="meta")
                if is_split(live) and tuple(live.shape) == first.shape:
                    read[key] = torch.empty_like(live, dtype=dtype, requires_grad=False)
                else:
                    device = live.device if is_split(live) else "cpu"
                    read[key] = torch.empty(first.shape, dtype=dtype, device=device)
                    if is_split(live) and first.shape:  # torch computes with no plain tensor beside a split one
                        mesh = live.device_mesh
                        read[key] = DTensor.from_local(read[key], mesh, [Replicate()] * mesh.ndim, run_check=False)
            return read[key]

        tree = packing.decode(state, place)
        try:
            if read:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each rank reads alone
                    load(read, storage_reader=self, no_dist=True)  # fills them in place
        except CheckpointException as error:  # wraps those of `read_data`
            cause = next((one for one, _ in error.failures.values()), error)
            if isinstance(cause, CheckpointDamaged):
                raise cause from None
            raise CheckpointDamaged(f"{self.folder} cannot be read: {cause!r:.300}") from error
        return tree


def layout_of(module: ModuleInterface) -> Layout:
    """Return the layout of a module whose parameters may be divided among ranks."""
    found: dict[str, torch.Tensor] = {}

    def place(path: str, value: object) -> str | None:
        if isinstance(value, torch.Tensor):
            found[f"module.{path}"] = found[f"averaged.module.{path}"] = value
            return path
        return None

    if any(map(is_split, module.parameters())):
        packing.encode(module.get_state(), place)
    return found.get


def layout_of_optimizers(optimizers: Sequence[torch.optim.Optimizer], saved: Sequence[Any]) -> Layout:
    """Return the layout of optimizers, whose state is split as their parameters are.

    Args:
        saved: The states of these optimizers in the checkpoint.
    """
    found: dict[tuple[str, str], torch.Tensor] = {}
    for index, (optimizer, state) in enumerate(zip(optimizers, saved, strict=False)):
        live = (one for group in optimizer.param_groups for one in group["params"])
        numbers = (number for group in state["param_groups"] for number in group["params"])
        found |= {(f"{index}", f"{number}"): one for number, one in zip(numbers, live, strict=False)}

    def layout(name: str) -> torch.Tensor | None:
        _, index, *rest = name.split(".")
        return found.get((index, rest[1])) if len(rest) > 1 else None

    return layout


def split_as(module: ModuleInterface, state: Any) -> Any:
    """Split the whole tensors of a state dict whose live ones are split. Communicates with no rank."""
    if not isinstance(state, dict):
        return state
    own = module.state_dict()
    return {
        name: _like(value, live)
        if isinstance(value, torch.Tensor) and is_split(live := own.get(name)) and not is_split(value)
        else value
        for name, value in state.items()
    }


def _dtype(chunk: Chunk) -> torch.dtype:
    try:
        return DTYPES[chunk.dtype, chunk.view]
    except KeyError:
        raise CheckpointDamaged(
            f"the tensor {chunk.name!r} has the type {chunk.view or chunk.dtype!r}, which this torch does not have"
        ) from None


def _offsets_of(value: DTensor) -> tuple[int, ...]:
    """Return the first element of this rank's part, per dimension. Communicates with no rank."""
    # A private import: DTensor's public interface does not tell where the local part lies.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return tuple(offsets)


def _stores(value: DTensor) -> bool:
    """Whether this rank writes its part to checkpoints: it has elements, and is the first of the ranks that have them.

    Communicates with no rank.
    """
    coordinate = value.device_mesh.get_coordinate()
    if coordinate is None or (value.numel() and not value.to_local().numel()):
        return False
    if not value.numel():
        return not any(coordinate)
    return all(
        place == 0
        for place, placement in zip(coordinate, value.placements, strict=True)
        if isinstance(placement, Replicate)
    )


def _like(value: torch.Tensor, live: DTensor) -> DTensor:
    """Split a whole tensor, which every rank has, as a live one of its shape. Communicates with no rank."""
    local, offsets = live.to_local(), _offsets_of(live)
    part = value.detach()
    for dimension, (begin, size) in enumerate(zip(offsets, local.shape, strict=True)):
        part = part.narrow(dimension, begin if size else 0, size)
    return DTensor.from_local(
        part.to(local.device, copy=True),
        live.device_mesh,
        live.placements,
        run_check=False,
        shape=live.shape,
        stride=live.stride(),
    )
