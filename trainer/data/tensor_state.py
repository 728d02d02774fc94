"""Split state into tensors for a tensor file and an encoded rest, and join them again."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from events.checkpoint import packing
from events.checkpoint.snapshot import Part
from events.checkpoint.tensor_file import TensorInfo, read_layout
from events.errors import CheckpointDamaged, UnstorableState
from trainer.distributed.local import is_split

STORED: dict[torch.dtype, tuple[str, str]] = {
    torch.bool: ("BOOL", ""),
    torch.uint8: ("U8", ""),
    torch.int8: ("I8", ""),
    torch.float8_e4m3fn: ("F8_E4M3", ""),
    torch.float8_e4m3fnuz: ("F8_E4M3FNUZ", ""),
    torch.float8_e5m2: ("F8_E5M2", ""),
    torch.float8_e5m2fnuz: ("F8_E5M2FNUZ", ""),
    torch.uint16: ("U16", ""),
    torch.int16: ("I16", ""),
    torch.float16: ("F16", ""),
    torch.bfloat16: ("BF16", ""),
    torch.uint32: ("U32", ""),
    torch.int32: ("I32", ""),
    torch.float32: ("F32", ""),
    torch.uint64: ("U64", ""),
    torch.int64: ("I64", ""),
    torch.float64: ("F64", ""),
    torch.complex64: ("C64", ""),
    # The format has no name for these: they are stored as another type, with their own name in the metadata.
    torch.complex32: ("F16", "complex32"),
    torch.complex128: ("F64", "complex128"),
    **{
        getattr(torch, name): ("U8", name)
        for name in ("float8_e8m0fnu", "float4_e2m1fn_x2")
        if hasattr(torch, name)  # newer than the oldest supported torch
    },
}
"""The format's name of each type, and the type's own name if its elements are stored as another type."""
DTYPES = {stored: dtype for dtype, stored in STORED.items()}
"""The type of each pair in `STORED`."""
BASE_DTYPES = {name: dtype for dtype, (name, view) in STORED.items() if not view}
"""The type of each name of the format."""

packing.register(torch.Size, "torch.Size", list, torch.Size)
packing.register(torch.device, "torch.device", str, torch.device)
packing.register(
    torch.dtype,
    "torch.dtype",
    lambda dtype: str(dtype).removeprefix("torch."),
    lambda name: _dtype_named(name),
)


class Collected:
    """A state split into tensors and the rest, without copies.

    Raises:
        UnstorableState: A value cannot be stored; names its path.
    """

    def __init__(self, tree: object) -> None:
        self.infos: list[TensorInfo] = []
        self.tensors: list[torch.Tensor] = []
        """The tensors, viewed as the stored types."""
        self.aliases: dict[str, str] = {}
        """Names of tensors that share another's memory and are stored once."""
        self._names: set[str] = set()
        self._seen: dict[object, str] = {}
        with torch.no_grad():
            self.state = packing.encode(tree, self._place)

    @property
    def metadata(self) -> dict[str, str]:
        """Entries for the tensor file's metadata."""
        return {}

    def _name(self, path: str) -> str:
        """Return the name of the tensor at a path."""
        while path in self._names:  # a dot in a key can make two paths equal
            path += "'"
        self._names.add(path)
        return path

    def _place(self, path: str, value: object) -> str | None:
        if not isinstance(value, torch.Tensor):
            return None
        dtype, view = _stored_as(path, value)
        name = self._name(path)
        key = None
        if value.numel():
            key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.is_conj(), value.is_neg())
            if key in self._seen:
                self.aliases[name] = self._seen[key]
                return name
            self._seen[key] = name
        tensor = value.detach()
        if view:
            tensor = torch.view_as_real(tensor.resolve_conj()) if value.is_complex() else tensor.view(torch.uint8)
        self.infos.append(TensorInfo(name, dtype, tuple(tensor.shape), view))
        self.tensors.append(tensor)
        return name


def part_of(tree: object) -> Part:
    """Copy a state into a part of a checkpoint with its own files. Waits for the device of its tensors.

    Raises:
        UnstorableState: A value cannot be stored; names its path.
    """
    collected = Collected(tree)
    with torch.no_grad():
        copies = [tensor.to("cpu", copy=True, memory_format=torch.contiguous_format) for tensor in collected.tensors]
    tensors = [(info, bytes_of(copy)) for info, copy in zip(collected.infos, copies, strict=True)]
    return Part(collected.state, tensors, collected.aliases)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """View the elements of a contiguous host tensor; the view keeps the tensor alive. Does not need NumPy."""
    if not tensor.numel():
        return memoryview(b"")
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")


def put_together(state: memoryview, tensors: memoryview | None, where: str) -> Any:
    """Join a state that `Collected` split; its tensors share the memory of ``tensors``.

    Args:
        where: The path of the tensor file, for messages.

    Raises:
        CheckpointDamaged: The bytes are not such a state.
    """
    found = tensors_in(tensors, where) if tensors is not None else {}

    def tensor(name: str) -> torch.Tensor:
        try:
            return found[name]
        except KeyError:
            raise CheckpointDamaged(f"{where} lacks the tensor {name!r}") from None

    return packing.decode(state, tensor)


def tensors_in(data: memoryview, where: str) -> dict[str, torch.Tensor]:
    """All tensors of a tensor file, aliases too; they share its memory.

    Raises:
        CheckpointDamaged: The bytes are not a tensor file.
    """
    file = read_layout(data, where)
    try:
        found = {name: tensor_of(data, info, offset) for name, (info, offset) in file.tensors.items()}
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointDamaged(f"{where} holds an invalid tensor: {error}") from error
    return found | {alias: found[name] for alias, name in file.aliases.items()}


def tensor_of(data: memoryview, info: TensorInfo, offset: int = 0) -> torch.Tensor:
    """Return a tensor whose elements begin at an offset; it shares the memory.

    Raises:
        CheckpointDamaged: This torch does not have its type.
    """
    base = BASE_DTYPES[info.dtype]
    if not info.nbytes:
        tensor = torch.empty(info.shape, dtype=base, device="cpu")
    else:
        count = info.nbytes // base.itemsize
        tensor = torch.frombuffer(data, dtype=base, count=count, offset=offset).view(info.shape)
    if not info.view:
        return tensor
    dtype = DTYPES.get((info.dtype, info.view))
    if dtype is None:
        raise CheckpointDamaged(f"the tensor {info.name!r} has the type {info.view!r}, which this torch does not have")
    return torch.view_as_complex(tensor) if dtype.is_complex else tensor.view(dtype)


def _stored_as(path: str, tensor: torch.Tensor) -> tuple[str, str]:
    problem = None
    if is_lazy(tensor):
        problem = "is not initialised; run the module once, or give it its shapes, before training"
    elif tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized:
        problem = "is sparse, nested or quantized; return it from get_state() in parts, as plain tensors"
    elif is_split(tensor):
        problem = (
            "is divided among ranks; return it from get_state(), or its full_tensor() from an observer's state_dict()"
        )
    elif tensor.is_meta:
        problem = "is on the meta device and has no elements"
    elif tensor.dtype not in STORED:
        problem = f"has the type {tensor.dtype}, for which tensor files have no name; convert it in get_state()"
    if problem is not None:
        raise UnstorableState(f"the tensor {path} cannot be stored in a checkpoint: it {problem}")
    return STORED[tensor.dtype]


def _dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no type {name!r}")
    return dtype
