"""torch's fully_shard (FSDP2) around a module."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parameter import is_lazy

from trainer.arguments import TrainerArguments
from trainer.distributed.buffers import broadcast, followed_buffers
from trainer.distributed.local import is_split, local
from trainer.distributed.options import Fsdp
from trainer.distributed.strategy import Share
from trainer.distributed.units import divide
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
        loads: See `prepare`.
    """

    always_together = True

    def __init__(
        self,
        module: ModuleInterface,
        options: Fsdp,
        world: World,
        arguments: TrainerArguments,
        device: torch.device,
        *,
        loads: bool,
    ) -> None:
        self._module = module
        self._device = device
        self._weighing = Weighing()
        if module in _prepared or isinstance(module, FSDPModule):
            _check_group(module)
        else:
            _check(module, options)
            divide(module, options, _mesh(options, world, arguments, device), arguments, device, loads)
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
    """See `AutomaticStrategy`. A step adds up its weight, its loss and the check of its gradients in one message."""

    def __init__(
        self,
        module: ModuleInterface,
        options: Fsdp,
        world: World,
        arguments: TrainerArguments,
        device: torch.device,
        *,
        loads: bool,
    ) -> None:
        super().__init__(module, options, world, arguments, device, loads=loads)
        self._size = world.size
        self._batch_part = 1.0
        self._accumulates = False
        self._root: Any = module
        dtype = next(module.parameters()).dtype
        self._zero = torch.zeros((), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
        self._weight = 0.0
        self._loss = self._zero
        self._sent: Any = None

    def forward(self, *args: Any) -> Any:
        if not self._accumulates:
            broadcast(self._followed)  # WAIT: for rank 0, as the pass itself does
        with self._noting(1.0 if self._batch_part else 0.0), _explaining():
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
            self._weight += part
            self._loss = loss.reshape(()).to(self._zero) * part + self._loss
        try:
            with _explaining():
                scaled.backward()  # type: ignore[no-untyped-call]
        finally:
            self._weighing.clear()

    def total(self, check: Callable[[], torch.Tensor | None], *, is_whole: bool) -> tuple[Share, torch.Tensor | None]:
        self.settle()
        found, zero = check(), self._zero
        own = torch.full_like(zero, self._weight), self._loss, zero if found is None else found.to(zero)
        self._weight, self._loss = 0.0, zero
        numbers = torch.stack(own).div_(self._size)
        self._sent = dist.all_reduce(numbers, async_op=True)
        weight, loss, others = numbers.unbind()
        found = None if found is None else others
        if is_whole:  # `forward` has refused batches without a loss; the optimizers step meanwhile
            return Share(1.0, loss), found
        self.settle()
        # On the CPU the numbers are there, so that reading one waits for nothing.
        return Share(float(weight) if weight.is_cpu else weight, loss), found

    def settle(self) -> None:
        if self._sent is not None:
            self._sent.wait()  # WAIT: on the CPU for all ranks, whose backward passes are over, too
            self._sent = None


class ManualFsdp(_Divided):
    """See `ManualStrategy`. Each backward pass averages gradients; an update divides them by the weight of the step."""

    part = 1.0

    @contextlib.contextmanager
    def weigh(self, part: float) -> Iterator[None]:
        self.part = part
        broadcast(self._followed)  # WAIT: for rank 0, as the passes do
        try:
            with self._noting(part), _explaining():
                yield
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


@contextlib.contextmanager
def _explaining() -> Iterator[None]:
    """Add a note to torch's error for a gradient that needs freed parameters."""
    try:
        yield
    except RuntimeError as error:
        if "storage of size 0" in str(error):
            add_note(
                error,
                "stagecast: strategy='fsdp' frees the parameters of a unit after each pass through it, so that its"
                " gradients cannot be differentiated; set strategy='ddp'",
            )
        raise


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
    ranks = torch.arange(size, device="cpu").reshape(copies, -1)  # on the host: reading it waits for nothing
    timeout = timedelta(seconds=arguments.collective_timeout_s)  # torch's own meshes have its default
    subgroups: Any = dist.new_subgroups_by_enumeration
    groups = [subgroups(each.tolist(), timeout=timeout)[0] for each in (ranks.T, ranks)]
    return DeviceMesh.from_group(
        groups,
        device.type,
        mesh=ranks,
        mesh_dim_names=("replicate", "shard"),
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
