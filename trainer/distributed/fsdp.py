"""torch's fully_shard (FSDP2) around a module."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint

from events.log import logger
from trainer.arguments import TrainerArguments
from trainer.distributed.buffers import broadcast, followed_buffers
from trainer.distributed.local import is_split, local
from trainer.distributed.options import Fsdp
from trainer.distributed.strategy import Share
from trainer.distributed.weighing import Weighing, mean_of
from trainer.distributed.world import World
from trainer.errors import ArgumentsError, StepOutputError, add_note
from trainer.module_interface import ModuleInterface

_prepared: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
"""The process group of each module that was prepared here: it stays divided when its run has ended."""


class _Divided:
    """See `Strategy`.

    Args:
        device: Of this rank.
    """

    always_together = True

    def __init__(
        self, module: ModuleInterface, options: Fsdp, world: World, arguments: TrainerArguments, device: torch.device
    ) -> None:
        self._module = module
        self._device = device
        self._weighing = Weighing()
        if module in _prepared or isinstance(module, FSDPModule):
            _check_group(module)
        else:
            _check(module, options)
            _divide(module, options, _mesh(options, world, arguments, device), arguments, device)
        self._units: list[Any] = [one for one in module.modules() if isinstance(one, FSDPModule)]
        if module not in _prepared:
            _prepared[module] = dist.group.WORLD
            if module.manual_optimization:
                for unit in self._units:
                    unit.register_forward_hook(_free)
            else:
                module.register_forward_hook(functools.partial(_release, units=self._units))
        self._followed = followed_buffers(module)

    @contextlib.contextmanager
    def _noting(self, part: float) -> Iterator[None]:
        """Multiply by a part the gradients of the units that run in this block."""

        def note(unit: nn.Module, args: object) -> None:
            self._weighing.add((one for one in unit.parameters() if not is_split(one)), part)

        hooks = [] if part == 1 else [unit.register_forward_pre_hook(note) for unit in self._units]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def sync_buffers(self) -> None:
        broadcast(self._module.buffers())

    def refresh(self) -> None:
        """A frozen parameter has no gradient; it stays divided."""


class FsdpStrategy(_Divided):
    """See `AutomaticStrategy`. A step sends the weight and the loss of the ranks in a message of its own."""

    def __init__(
        self, module: ModuleInterface, options: Fsdp, world: World, arguments: TrainerArguments, device: torch.device
    ) -> None:
        super().__init__(module, options, world, arguments, device)
        self._size = world.size
        self._batch_part = 1.0
        self._accumulates = False
        self._root: Any = module
        first = next(module.parameters())
        self._dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        exact = torch.float32 if device.type == "mps" else torch.float64
        self._tally = torch.zeros(2, dtype=exact, device=device)
        self._sent: Any = None

    def forward(self, *args: Any) -> Any:
        if not self._accumulates:
            broadcast(self._followed)  # WAIT: for rank 0, as the pass itself does
        with self._noting(1.0 if self._batch_part else 0.0):
            result = self._module(*args)
        if result is None:
            raise StepOutputError(
                f"{type(self._module).__name__}.train_step() returned None, but with strategy='fsdp' all ranks compute"
                f" gradients of each batch together; return the loss, and 0 from batch_weight() for this batch"
            )
        return result

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        self._root.set_requires_gradient_sync(False)
        self._accumulates = True
        try:
            yield
        finally:
            self._accumulates = False
            self._root.set_requires_gradient_sync(True)

    def expect(self, part: float, *, is_dummy: bool) -> None:
        self._batch_part = part

    def backward(self, scaled: torch.Tensor | None, loss: torch.Tensor | None, part: float, *, last: bool) -> None:
        assert scaled is not None  # `forward` refuses a batch without a loss
        if part and loss is not None:
            weighted = loss.reshape(()).to(self._tally) * part
            self._tally += torch.stack((torch.full_like(weighted, part), weighted))
        if last:  # under way during the backward pass
            self._sent = dist.all_reduce(self._tally, async_op=True)
        try:
            scaled.backward()  # type: ignore[no-untyped-call]
        finally:
            self._weighing.clear()

    def total(self) -> Share:
        self._sent.wait()  # WAIT: on the CPU for all ranks, whose backward passes are over, too
        weight, loss = (self._tally / self._size).unbind()
        self._tally, self._sent = torch.zeros_like(self._tally), None
        # On the CPU the numbers are there, so that reading one waits for nothing.
        return Share(float(weight) if weight.is_cpu else weight, loss.to(self._dtype))


class ManualFsdp(_Divided):
    """See `ManualStrategy`. Each backward pass averages gradients; an update divides them by the weight of the step."""

    part = 1.0

    @contextlib.contextmanager
    def weigh(self, part: float) -> Iterator[None]:
        self.part = part
        broadcast(self._followed)  # WAIT: for rank 0, as the passes do
        try:
            with self._noting(part):
                yield
        except RuntimeError as error:
            if "storage of size 0" in str(error):
                add_note(
                    error,
                    "stagecast: strategy='fsdp' frees the parameters of a network after each backward pass through it,"
                    " so that its gradients cannot be differentiated; set strategy='ddp'",
                )
            raise
        finally:
            self._weighing.clear()

    def average(self, parameters: list[nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        weight, mean = self.mean(loss)
        for one in parameters:
            if one.grad is not None:
                local(one.grad).div_(weight)
        return mean

    def mean(self, loss: torch.Tensor | None) -> Share:
        return mean_of(loss, self.part, self._device)


def _check(module: ModuleInterface, options: Fsdp) -> None:
    if module.manual_optimization and not options.reshard_after_forward:
        raise ArgumentsError(
            "Fsdp(reshard_after_forward=False) keeps gathered parameters, which an update within train_step does not"
            " change; leave it out with manual_optimization"
        )
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ArgumentsError(
                f"the parameter {name} is not initialised, so strategy='fsdp' cannot divide it; run the module once, or"
                f" give it its shapes"
            )
    if not any(one.requires_grad for one in module.parameters()):
        raise ArgumentsError(
            "strategy='fsdp' needs a module with a parameter that requires a gradient; set strategy='single'"
        )


def _check_group(module: ModuleInterface) -> None:
    if _prepared.get(module, dist.group.WORLD) is not dist.group.WORLD:
        raise ArgumentsError(
            f"this {type(module).__name__} is divided among the ranks of a run that has failed; construct it again"
        )


def _mesh(options: Fsdp, world: World, arguments: TrainerArguments, device: torch.device) -> DeviceMesh:
    """Arrange the ranks: those of one copy of the model are neighbours."""
    copies, size = options.replicate, world.size
    if size % copies:
        raise ArgumentsError(
            f"Fsdp(replicate={copies}) does not divide the {size} ranks; set it to one of"
            f" {', '.join(str(one) for one in range(1, size + 1) if size % one == 0)}"
        )
    if copies == 1:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    ranks = torch.arange(size, device="cpu").reshape(copies, -1)
    timeout = timedelta(seconds=arguments.collective_timeout_s)  # torch's own meshes have its default
    subgroups: Any = dist.new_subgroups_by_enumeration
    groups = [subgroups(each.tolist(), timeout=timeout)[0] for each in (ranks.T, ranks)]
    return DeviceMesh.from_group(
        groups,
        device.type,
        mesh=ranks,
        mesh_dim_names=("replicate", "shard"),
    )


# ------------------------------------------------------------------------------------------------- dividing a module


def _divide(
    module: ModuleInterface, options: Fsdp, mesh: DeviceMesh, arguments: TrainerArguments, device: torch.device
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
        _materialize(one, device)
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
        _materialize(module, device)  # its own buffers


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
    return sorted(own, key=lambda one: -order[one])


def _recompute(unit: nn.Module) -> None:
    """Compute the unit's activations again in the backward pass, instead of keeping them."""
    unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False)


def _materialize(unit: nn.Module, device: torch.device) -> None:
    """Bring a unit to the device, with rank 0's weights. WAIT: for all ranks.

    What is on the meta device gets memory, and is initialised by its module's ``reset_parameters``.
    """
    modules = _undivided(unit)
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by the one on the meta device; several modules may share
    owners: dict[nn.Module, None] = {}
    with torch.no_grad():
        for one in modules:
            for table in (one._parameters, one._buffers):
                tensors: dict[str, Any] = table
                for name, value in tensors.items():
                    if value is not None and value.is_meta:
                        if id(value) not in made:
                            made[id(value)] = value, _allocate(value, device)
                        tensors[name] = made[id(value)][1]
                        owners[one] = None
                    elif value is not None and value.device != device:
                        value.data = value.to(device)
        for one in reversed(owners):  # inner modules first
            _reset(one)
        broadcast(value for one in modules for value in (*one.parameters(False), *one.buffers(False)))


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


def _free(unit: Any, args: object, result: object) -> None:
    """Free the gathered parameters after any forward pass, where torch 2.6 keeps them: updates would not show."""
    if torch._C._current_graph_task_id() == -1:  # else a backward pass repeats it, and needs them
        unit.reshard()


def _release(module: nn.Module, args: object, result: object, *, units: list[Any]) -> None:
    """Free the gathered parameters after a pass without a backward pass: changed weights would not show in them."""
    if not torch.is_grad_enabled():
        for unit in units:
            unit.reshard()
