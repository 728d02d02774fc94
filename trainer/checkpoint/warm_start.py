"""Loads the weights that a new run starts from: of a state dict in files, or of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path

import msgspec
import torch
from torch.nn.parameter import is_lazy

from events.checkpoint.files import read_weights
from events.checkpoint.manifest import MANIFEST_NAME
from events.checkpoint.store import CHECKPOINTS_DIR, WEIGHTS_NAME, CheckpointStore
from events.checkpoint.weights import first_of, renamed
from events.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch
from events.log import logger
from events.masking import masked
from trainer.checkpoint.fit import check_fits, misshapen, own_loading_prefixes
from trainer.checkpoint.init_from import InitFrom
from trainer.data.tensor_state import tensors_in
from trainer.data.tensors import clone_tensors
from trainer.distributed.local import is_split
from trainer.module_interface import ModuleInterface

MODEL_NAME = "model.safetensors"
"""The file in a folder of Hugging Face..."""
_INDEX = ".safetensors.index.json"
"""...and the end of the name of the list of its parts, if there are several."""
_INDEX_BYTES = 64 * 2**20
_PICKLES = frozenset({".pt", ".pth", ".bin", ".ckpt"})
"""The usual ends of the names of files of ``torch.save``, which stagecast does not read: no pickle is safe to read."""
_EXTRA_STATE = "_extra_state"
"""The end of the names of state that is not a tensor, in torch's state dicts."""


class _Index(msgspec.Struct):
    """The list of a model's files (https://huggingface.co/docs/transformers/big_models#sharded-checkpoints)."""

    weight_map: dict[str, str]
    """The file of each tensor."""


def file_of_weights(place: Path) -> Path | None:
    """Return the file of weights that a path refers to; None if it may refer to a checkpoint."""
    if place.is_file():
        # A file of a checkpoint, which holds more than weights, refers to the checkpoint.
        return None if (place.parent / MANIFEST_NAME).is_file() else place
    if (place / MANIFEST_NAME).is_file() or any(
        CheckpointStore(folder).names() for folder in (place / CHECKPOINTS_DIR, place)
    ):
        return None
    names = (WEIGHTS_NAME, MODEL_NAME, f"model{_INDEX}")
    return next((place / name for name in names if (place / name).is_file()), None)


def read_state(file: Path, named: Path, *, maps: bool = False) -> dict[str, torch.Tensor]:
    """Read a state dict from a safetensors file, or from the files of an index. Waits for the disk.

    Args:
        named: The path that the user gave.
        maps: Whether to map the files, and thereby read only what is used of them.

    Raises:
        CheckpointError: A file is missing, damaged, or has another format.
    """
    try:
        if not file.name.endswith(_INDEX):
            # A cache of Hugging Face consists of links. Those of a run folder may be a stranger's.
            follow = file == named or file.name != WEIGHTS_NAME
            return tensors_in(read_weights(file, follow=follow, maps=maps), str(file))
        return _read_parts(file, maps)
    except OSError as error:
        raise CheckpointError(f"init_from={masked(str(file))!r} cannot be read: {masked(str(error))}") from error
    except CheckpointDamaged as error:
        pickled = "(torch.load(path, weights_only=True), ...)" if file.suffix in _PICKLES else ""
        raise CheckpointDamaged(
            f"init_from={masked(str(file))!r} cannot be used ({masked(str(error))}); write the weights with"
            f" safetensors.torch.save_file{pickled}"
        ) from error


def _read_parts(index: Path, maps: bool) -> dict[str, torch.Tensor]:
    with index.open("rb") as file:
        data = file.read(_INDEX_BYTES)
    try:
        files = msgspec.json.decode(data, type=_Index).weight_map
    except (msgspec.MsgspecError, RecursionError) as error:
        raise CheckpointDamaged(f"{index} is not an index of safetensors files: {error}") from error
    found: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(files.values()):
        if Path(name).name != name:
            raise CheckpointDamaged(f"{index} lists {name!r:.200}, which is not a file in its folder")
        found |= tensors_in(read_weights(index.parent / name, follow=True, maps=maps), str(index.parent / name))
    if missing := files.keys() - found:
        raise CheckpointDamaged(f"the files of {index} lack {', '.join(first_of(sorted(missing)))}")
    return found


def flattened(state: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the tensors of a module's state with their paths, and what belongs to a state dict beside tensors."""
    items: Iterator[tuple[object, object]] = iter(())
    if isinstance(state, torch.Tensor) or path.endswith(_EXTRA_STATE):
        yield path, state
    elif isinstance(state, Mapping):
        items = iter(state.items())
    elif isinstance(state, list | tuple):
        items = enumerate(state)
    for key, value in items:
        yield from flattened(value, f"{path}.{key}" if path else str(key))


def take(module: ModuleInterface, state: object, init: InitFrom, where: str) -> None:
    """Load a state dict into a module by its names, converted to the module's types. Waits for the device.

    Args:
        where: The source, for messages.

    Raises:
        CheckpointMismatch: The weights are of another model; names keys and shapes. The module is unchanged, unless a
            submodule with its own loading refused.
    """
    # With the parameters themselves, by which tied ones that are split are known.
    own, exempt = module.state_dict(keep_vars=True), own_loading_prefixes(module)
    if isinstance(state, Mapping):
        try:
            names = renamed(map(str, state), init.rename)
        except ValueError as error:
            raise CheckpointMismatch(f"InitFrom(rename={init.rename!r:.200}): {error}") from None
        state = _with_tied_names(own, {names[str(name)]: value for name, value in state.items()}, where)
    if not init.strict and isinstance(state, Mapping):
        state = _fitting(module, own, state, exempt, where)
    else:
        try:
            check_fits(module, state, where, exempt)
        except CheckpointMismatch as error:
            hint = _hint(own, state, "InitFrom(path, strict=False) skips these")
            raise CheckpointMismatch(f"{error}; {hint}") from None
    assert isinstance(state, dict)
    _report_casts(own, state, where)
    if exempt:
        state = clone_tensors(state)  # the module may keep them, and with them the memory of the whole file
    if any(map(is_split, module.parameters())):
        from trainer.checkpoint.sharded import split_as  # late, because most modules are not split

        state = dict(split_as(module, state))
    try:
        module.load_state_dict(state, strict=init.strict)  # copies them
    except RuntimeError as error:
        raise CheckpointMismatch(f"{where} does not fit {type(module).__name__}: {error}") from error


def _with_tied_names(own: Mapping[str, object], found: dict[str, object], where: str) -> dict[str, object]:
    """Add the further names of tied tensors: other writers store them once."""
    names: dict[object, str] = {}
    for key, value in own.items():
        if key in found:
            before, names[_memory_of(value)] = found[names.get(_memory_of(value), key)], key
            if isinstance(before, torch.Tensor) and not _equal(before, found[key]):
                logger.warning(f"{key} is tied to a tensor that differs from it in {where}; both become {key}")
    return found | {key: found[names[at]] for key, value in own.items() if (at := _memory_of(value)) in names}


def _memory_of(value: object) -> object:
    """Return a value that all names of one tensor share."""
    if not isinstance(value, torch.Tensor) or _is_lazy(value) or not value.numel():
        return object()
    if is_split(value):  # its part on this rank may be empty
        return id(value)
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _is_lazy(value: object) -> bool:
    return isinstance(value, torch.Tensor) and is_lazy(value)


def _equal(one: torch.Tensor, other: object) -> bool:
    return isinstance(other, torch.Tensor) and (one is other or (one.shape == other.shape and torch.equal(one, other)))


def _fitting(
    module: ModuleInterface,
    own: Mapping[str, object],
    state: Mapping[str, object],
    exempt: tuple[str, ...],
    where: str,
) -> dict[str, object]:
    """Return the entries that the module takes, and warn about all others by name.

    Raises:
        CheckpointMismatch: It takes none.
    """
    shapes = dict(misshapen({key: value for key, value in own.items() if not key.startswith(exempt)}, state))
    # torch cannot initialise a lazy module of which one parameter is.
    lazy = {key.rpartition(".")[0] for key, value in own.items() if _is_lazy(value) and key not in state}
    fits = {key: key in state and not (_is_lazy(own[key]) and key.rpartition(".")[0] in lazy) for key in own}
    left = [key for key in own if not fits[key]]
    taken = {key: state[key] for key in own if fits[key] and key not in shapes}
    unused = [key for key in state if key not in own]
    kind = type(module).__name__
    if not taken:
        raise CheckpointMismatch(
            f"no tensor of {where} fits {kind}: it has {', '.join(first_of(state)) or 'none'}, and {kind} has"
            f" {', '.join(first_of(own)) or 'none'}; {_hint(own, state, 'give InitFrom(path, rename={...})')}"
        )
    parts = [f"init_from took {len(taken)} of {len(own)} tensors from {where}: {', '.join(first_of(taken))}"]
    parts += [f"left as they were: {', '.join(first_of(left))}"] * bool(left)
    parts += [f"left because of their shapes: {', '.join(first_of(shapes.values()))}"] * bool(shapes)
    parts += [f"not used: {', '.join(first_of(unused))}"] * bool(unused)
    (logger.warning if len(parts) > 1 else logger.info)("; ".join(parts))
    return taken


def _report_casts(own: Mapping[str, object], state: Mapping[str, object], where: str) -> None:
    casts = [
        f"{key} from {there.dtype} to {here.dtype}"
        for key, there in state.items()
        if isinstance(here := own.get(key), torch.Tensor)
        and isinstance(there, torch.Tensor)
        and here.dtype != there.dtype
    ]
    if casts:
        logger.warning(f"tensors of {where} are converted to the module's types: {', '.join(first_of(casts))}")


def _hint(own: Mapping[str, object], state: object, otherwise: str) -> str:
    """Suggest the new prefix with which the most names fit; without one ``otherwise``."""
    names = list(state) if isinstance(state, Mapping) else []
    best, most = None, sum(name in own for name in names)
    found = (_prefixes(there, here) for there in map(str, names[:8]) for here in own)
    for old, new in dict.fromkeys(one for one in found if one is not None):
        try:
            fits = sum(name in own for name in renamed(names, {old: new}).values())
        except ValueError:
            continue
        if fits > most:
            best, most = {old: new}, fits
    return otherwise if best is None else f"InitFrom(path, rename={best!r:.200}) makes {most} names fit"


def _prefixes(there: str, here: str) -> tuple[str, str] | None:
    """Return the prefixes in which two names differ, if only a wrapper such as ``_orig_mod`` distinguishes them."""
    one, other = there.split("."), here.split(".")
    first, last = _count_alike(one, other), _count_alike(one[::-1], other[::-1])
    if not last or one == other or first + last < min(len(one), len(other)):
        return None
    old, new = ("".join(f"{part}." for part in parts[: len(parts) - last]) for parts in (one, other))
    return old, new


def _count_alike(one: list[str], other: list[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
