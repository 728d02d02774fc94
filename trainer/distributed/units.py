"""Divide a module among ranks: its units first, each with torch's fully_shard."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from events.log import logger
from trainer.arguments import TrainerArguments
from trainer.distributed.buffers import broadcast
from trainer.distributed.options import Fsdp
from trainer.errors import ArgumentsError
from trainer.module_interface import ModuleInterface


def divide(
    module: ModuleInterface,
    options: Fsdp,
    mesh: DeviceMesh,
    arguments: TrainerArguments,
    device: torch.device,
    loads: bool,
) -> None:
    """Wrap the units of a module, then the module: at any time one of them is whole on the device.

    With manual optimization, each network of the module instead of the module, whose own pass contains updates.
    """
    roots = _networks(module) if module.manual_optimization else [module]
    units = [one for one in _units(module, options) if one not in roots]
    if not units and len(roots) == 1:
        logger.warning(
            f"{type(module).__name__} has no units for strategy='fsdp', so that all its parameters are gathered at"
            f" once; name classes in Fsdp(units=...), or define fsdp_units()"
        )
    plain = MixedPrecisionPolicy()
    policy = plain
    if arguments.precision == "bfloat16":
        # The run's autocast converts the inputs.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        # Its kernels take no weights in bfloat16 beside statistics in float32.
        norms = [one for one in module.modules() if isinstance(one, _BatchNorm) and one.affine]
        units = [*norms, *(one for one in units if one not in norms)]
    for one in (*units, *roots):
        if options.activation_checkpointing and one not in roots:
            _recompute(one)
        _materialize(one, device, loads)
        try:
            fully_shard(
                one,
                mesh=mesh,
                mp_policy=plain if isinstance(one, _BatchNorm) else policy,
                # torch keeps those of the outermost module, which its backward pass needs first.
                reshard_after_forward=None
                if one is module and options.reshard_after_forward
                else options.reshard_after_forward,
            )
        except (ValueError, NotImplementedError) as error:
            raise ArgumentsError(f"strategy='fsdp' cannot divide a {type(one).__name__}: {error}") from error
        _keep_name(one)
    if module not in roots:
        _materialize(module, device, loads)  # its own buffers
    if any(one.is_meta for one in (*module.parameters(), *module.buffers())):
        with torch.no_grad():  # only this rank's parts, which the weights fill that are read next
            apply: Any = module._apply
            apply(lambda one: torch.empty_like(one, device=device) if one.is_meta else one)


def _networks(module: ModuleInterface) -> list[nn.Module]:
    """Return the children of a module, and the members of those that are lists or dicts: `train_step` calls them."""
    found: dict[nn.Module, None] = {}
    containers: list[nn.Module] = [module]
    for one in containers:
        for child in one.children():
            if type(child).forward is nn.Module.forward:
                containers.append(child)
            else:
                found[child] = None
    held = Counter(parameter for network in found for parameter in network.parameters())
    for name, parameter in module.named_parameters():
        if held[parameter] != 1:
            where = "two networks" if held[parameter] else "no submodule with a forward()"
            raise ArgumentsError(
                f"the parameter {name} is in {where}, so strategy='fsdp' cannot divide it with manual_optimization; put"
                f" it into one submodule"
            )
    return [one for one in found if any(True for _ in one.parameters())]


def _units(module: ModuleInterface, options: Fsdp) -> list[nn.Module]:
    """Return the submodules whose parameters are gathered together, each before those that contain it."""
    order = {one: number for number, one in enumerate(module.modules())}
    name = type(module).__name__
    if options.units is not None:
        units = [one for one in order if type(one).__name__ in options.units and one is not module]
        missing = [one for one in options.units if one not in {type(unit).__name__ for unit in units}]
        if missing:
            raise ArgumentsError(
                f"Fsdp(units={options.units}) names {', '.join(missing)}, which {name} does not contain; name classes"
                f" of its submodules"
            )
    else:
        units = list(module.fsdp_units())
    for one in units:
        if one not in order:
            raise ArgumentsError(f"{name}.fsdp_units() returned {one!r:.80}, which is not in {name}; return submodules")
        if type(one).forward is nn.Module.forward:
            raise ArgumentsError(
                f"the unit {type(one).__name__} for strategy='fsdp' has no forward(); choose the modules in it"
            )
    own = {one for one in units if one is not module and any(True for _ in one.parameters())}
    _check_ties(module, own)
    return sorted(own, key=lambda one: -order[one])


def _check_ties(module: ModuleInterface, units: set[nn.Module]) -> None:
    """Check that the names of each parameter are in one unit. Raises `ArgumentsError`."""
    places = {name: one for name, one in module.named_modules(remove_duplicate=False) if one in units}
    owners: dict[nn.Parameter, tuple[str, nn.Module | None]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        inside = name
        while inside and inside not in places:
            inside = inside.rpartition(".")[0]
        other, owner = owners.setdefault(parameter, (name, places.get(inside)))
        if owner is not places.get(inside):
            raise ArgumentsError(
                f"the parameter {name} is {other}, too, which is in another unit of strategy='fsdp'; choose units of"
                f" which one has both, or none has either"
            )


def _recompute(unit: nn.Module) -> None:
    """Compute the unit's activations again in the backward pass, instead of keeping them."""
    forward = unit.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:  # torch.compile compiles no forward of a `functools.partial`
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    unit.forward = recomputed


def _materialize(unit: nn.Module, device: torch.device, loads: bool) -> None:
    """Bring a unit to the device, with rank 0's weights. WAIT: for all ranks.

    What is on the meta device gets memory, and is initialised by its module's ``reset_parameters``; if weights are read
    next, it stays there, unless the module has buffers that no state dict has.
    """
    modules = _undivided(unit)
    stays = loads and not any(
        buffer is not None and buffer.is_meta and name in one._non_persistent_buffers_set
        for one in modules
        for name, buffer in one._buffers.items()
    )
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by the one on the meta device; several modules may share
    owners: dict[nn.Module, None] = {}
    with torch.no_grad():
        for one in modules:
            for table in (one._parameters, one._buffers):
                tensors: dict[str, Any] = table
                for name, value in tensors.items():
                    if value is not None and value.is_meta:
                        if stays:
                            continue
                        if id(value) not in made:
                            made[id(value)] = value, _allocate(value, device)
                        tensors[name] = made[id(value)][1]
                        owners[one] = None
                    elif value is not None and value.device != device:
                        value.data = value.to(device)
        for one in reversed(owners):  # inner modules first
            _reset(one)
        values = (value for one in modules for value in (*one.parameters(False), *one.buffers(False)))
        broadcast(value for value in values if not value.is_meta)


def _allocate(meta: torch.Tensor, device: torch.device) -> torch.Tensor:
    made = torch.empty_like(meta, device=device)
    return nn.Parameter(made, meta.requires_grad) if isinstance(meta, nn.Parameter) else made


def _undivided(unit: nn.Module) -> list[nn.Module]:
    """Return a module and those within it that are in no unit of their own."""
    found: dict[nn.Module, None] = {unit: None}
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            found |= dict.fromkeys(_undivided(child))
    return list(found)


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if not callable(reset):
        raise ArgumentsError(
            f"{type(module).__name__} has tensors on the meta device and no reset_parameters(); define it, or construct"
            f" the module on the CPU"
        )
    reset()


def _keep_name(module: nn.Module) -> None:
    """Give the class that `fully_shard` has made the name of the original one, for events and messages."""
    kind = type(module)
    original = kind.__mro__[2]
    kind.__name__, kind.__qualname__, kind.__module__ = (
        original.__name__,
        original.__qualname__,
        original.__module__,
    )
