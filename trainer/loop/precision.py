"""Automatic mixed precision: autocast for the forward pass, and for float16 a scaled loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from trainer.arguments import PrecisionName
from trainer.errors import PrecisionError

_DTYPES: dict[PrecisionName, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """Autocast, and the scaled loss of float16. Belongs to one loop, on one thread.

    With float32 `enabled` is False and the loop skips it all. float16 has few exponents, so its small gradients would
    vanish: the loss is scaled up before the backward pass, and the gradients down again before the optimizers see them.
    A scale that was too large shows as infinities in the gradients; then that step is skipped, for **all** optimizers,
    and the scale becomes smaller. The order in a step::

        with precision.autocast(): loss = train_step(...)
        precision.scale(loss).backward()                    # for each micro-batch
        precision.unscale_(optimizers)                      # then clip
        found = precision.found_inf(optimizers)             # None unless float16
        if found is None or not found.item():               # the host waits for the device here
            for optimizer in optimizers: optimizer.step()   # directly: the scaler does not decide
        precision.update()
    """

    def __init__(self, precision: PrecisionName, device_type: str) -> None:
        """Prepare a precision.

        Args:
            precision: What `TrainerArguments.precision` says.
            device_type: ``device.type`` of the run's device.

        Raises:
            PrecisionError: This torch or device lacks the autocast, or its scaler is unknown.
        """
        self.precision = precision
        self.enabled = precision != "float32"
        """Whether the precision is not ``float32``; if False, the loop calls no other method."""
        self.scaler: torch.amp.GradScaler | None = None
        """The scaler of float16, whose state belongs in a checkpoint; None in any other precision."""
        self._autocast: torch.autocast | None = None
        if not self.enabled:
            return
        try:
            self._autocast = torch.autocast(device_type, dtype=_DTYPES[precision])
        except RuntimeError as error:
            raise PrecisionError(f"precision={precision!r} does not work on {device_type!r}: {error}") from error
        if precision == "float16":
            self.scaler = _make_scaler(device_type)

    def check(self, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Check that the gradients of parameters can be unscaled.

        Raises:
            PrecisionError: torch's scaler takes neither float16 nor complex gradients.
        """
        if self.scaler is None:
            return
        for name, parameter in parameters:
            if parameter.requires_grad and parameter.dtype == torch.float16:
                raise PrecisionError(
                    f"the parameter {name} has the dtype float16, whose gradients precision='float16' cannot unscale;"
                    f" keep parameters in float32, which autocast converts"
                )
            if parameter.requires_grad and parameter.is_complex():
                raise PrecisionError(
                    f"the parameter {name} has the dtype {str(parameter.dtype).removeprefix('torch.')}, whose gradients"
                    f" precision='float16' cannot unscale; use precision='bfloat16' or 'float32'"
                )

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass: always the same object, which cannot be nested in itself.

        Raises:
            PrecisionError: float32 has none.
        """
        if self._autocast is None:
            raise PrecisionError("float32 has no autocast: ask `enabled` first")
        return self._autocast

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss for ``backward()``: scaled with float16, otherwise unchanged. Does not wait."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale_(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Unscale the gradients of all optimizers in place, once per step. Does not wait.

        After `scale` and all backward passes of the step; before gradients are clipped or looked at.
        """
        if self.scaler is not None:
            for optimizer in optimizers:
                self.scaler.unscale_(optimizer)

    def found_inf(self, optimizers: Iterable[torch.optim.Optimizer]) -> torch.Tensor | None:
        """Whether any gradient of any optimizer was not finite: a float32 scalar ``()``, positive if so.

        Returns:
            The tensor, on the scaler's device, without waiting; None unless float16.

        Reading the result is the one host-device synchronisation that float16 costs per step. Fused
        optimizers could skip their update on the device by themselves and never tell the host; but
        ``global_step`` and the schedulers must not count a skipped step, and the next ``train_step`` is told
        its number, so the host has to know by then: postponing the wait past `optimizer.step` would win only
        the time to launch that.
        """
        if self.scaler is None:
            return None
        scale = self.scaler._get_scale_async()
        if scale is None:
            raise PrecisionError("found_inf() was called before any loss was scaled")
        found = [one for optimizer in optimizers for one in self.scaler._found_inf_per_device(optimizer).values()]
        if not found:  # no optimizer has a gradient, so none overflowed
            return torch.zeros((), dtype=torch.float32, device=scale.device)
        total: torch.Tensor = found[0].to(scale.device, non_blocking=True)
        for one in found[1:]:
            total = total + one.to(scale.device, non_blocking=True)
        return total

    def update(self) -> None:
        """End the step: the scale shrinks after a skipped step, and grows after many others.

        Call it once a step after `unscale_`, whether or not the optimizers stepped. Does not wait.
        """
        if self.scaler is None:
            return
        states = self.scaler._per_optimizer_states.values()
        if any(state["found_inf_per_device"] for state in states):
            self.scaler.update()
        else:
            # Without any gradient `update` would raise: keep the scale, and reset the optimizers' stages only.
            self.scaler.update(self.scaler._get_scale_async())


def _make_scaler(device_type: str) -> torch.amp.GradScaler:
    # One decision for several optimizers is not in the scaler's public interface: `GradScaler.step` decides
    # for each of them alone. What we read instead has been there since torch 1.6; if it goes, say so at the
    # start.
    needed = ("_found_inf_per_device", "_get_scale_async")
    lacking = [name for name in needed if not hasattr(torch.amp.GradScaler, name)]
    scaler = torch.amp.GradScaler(device_type)
    lacking += [name for name in ("_per_optimizer_states",) if not hasattr(scaler, name)]
    if lacking:
        raise PrecisionError(
            f"precision='float16' needs {', '.join(lacking)} of torch.amp.GradScaler, which torch "
            f"{torch.__version__} does not have; use 'bfloat16' or another version of torch"
        )
    if not scaler.is_enabled():
        raise PrecisionError(f"precision='float16' cannot scale losses on {device_type!r}; use 'bfloat16'")
    return scaler
