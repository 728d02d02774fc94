"""Log norms and distributions of weights and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch.nn.parameter import is_lazy

from trainer.callback_interface import CallbackInterface, inline
from trainer.callbacks.checks import Checks, must_be_trained
from trainer.distributed.local import add_up, is_split, local, whole
from trainer.hooks.hooks import without_outputs
from trainer.media import Histogram
from trainer.module_interface import ModuleInterface

Named = list[tuple[str, torch.Tensor]]


class ModelStatistics(CallbackInterface):
    """Logs norms and histograms of weights and gradients::

        from trainer import Trainer, TrainerArguments
        from trainer.callbacks import ModelStatistics

        module = MyModule()
        statistics = ModelStatistics(module, every_n_steps=50, histograms=True, exclude=["*.bias"])
        Trainer(
            module,
            TrainerArguments(epochs=3, clip_grads=True),
            callbacks=[statistics],
        ).train()

    Norms (of order 2) are the metrics ``weight_norm/NAME`` and ``grad_norm/NAME`` of each parameter, and
    ``weight_norm_total`` and ``grad_norm_total`` of all of them together. Histograms are ``weights/NAME`` and
    ``gradients/NAME``. NAME comes from ``module.named_parameters()``; a shared parameter has its first name.

    Weights are read after the step. Gradients are those of the optimizers: unscaled, and clipped if ``clip_grads`` is
    set (`TrainStepEnded.grad_norm` is the norm before clipping). Parameters without a gradient, and frozen ones, are
    skipped; sparse gradients are converted to dense ones.

    Everything is computed on the parameters' device, with a few kernels for all norms together, and the loop does not
    wait: the numbers are read later. At other steps the hook does nothing. Of parameters that are divided among ranks,
    norms are added up in one message, and a histogram gathers one parameter at a time.

    Args:
        module: The trained module.
        every_n_steps: Log when ``global_step`` is a multiple of this.
        norms: Whether to log norms.
        histograms: Whether to log histograms, about ten kernels for each.
        bins: Bins per histogram.
        exclude: `fnmatch` patterns of parameters without a norm or histogram of their own. They count in the totals:
            ``["*"]`` logs only the totals.

    Raises:
        ArgumentsError: An argument is invalid.
        ContractError: In a run that does not train this module.
    """

    def __init__(
        self,
        module: ModuleInterface,
        every_n_steps: int = 100,
        *,
        norms: bool = True,
        histograms: bool = False,
        bins: int = 64,
        exclude: Sequence[str] = (),
    ) -> None:
        checks = Checks("ModelStatistics")
        checks.module(module)
        checks.count("every_n_steps", every_n_steps)
        checks.flag("norms", norms)
        checks.flag("histograms", histograms)
        checks.that(bool(norms or histograms), "norms and histograms are both False; enable one of them")
        checks.that(type(bins) is int and bins >= 2, f"bins must be an integer >= 2, not {bins!r:.80}")
        listed = isinstance(exclude, Sequence) and not isinstance(exclude, str | bytes)
        checks.that(
            listed and all(isinstance(one, str) for one in exclude),
            f"exclude must be a list of patterns, such as ['*.bias'], not {exclude!r:.80}",
        )
        checks.done()
        self._module = module
        self._every_n_steps = every_n_steps
        self._norms = norms
        self._histograms = histograms
        self._bins = bins
        self._exclude = tuple(exclude)

    @inline
    @without_outputs
    def on_end_train_step(self, global_step: int, *train_step_collated_outputs: object) -> None:
        """Log the statistics, if they are due."""
        if global_step % self._every_n_steps == 0:
            must_be_trained(self, self._module)
            self._log_statistics()

    @torch.no_grad()
    def _log_statistics(self) -> None:
        trained = [(name, one) for name, one in self._module.named_parameters() if one.requires_grad]
        weights: Named = [(name, one.detach()) for name, one in trained if not is_lazy(one) and one.numel()]
        found = ((name, one.grad) for name, one in trained)
        gradients: Named = [(name, _dense(one)) for name, one in found if one is not None and one.numel()]
        if self._norms:
            self._log_norms("weight_norm", weights)
            self._log_norms("grad_norm", gradients)
        if self._histograms:
            self._log_histograms("weights", weights)
            self._log_histograms("gradients", gradients)

    def _log_norms(self, name: str, tensors: Named) -> None:
        groups: dict[object, Named] = {}
        for one in tensors:
            parts = (one[1].device_mesh, one[1].placements) if is_split(one[1]) else None
            groups.setdefault((one[1].device, one[1].dtype, parts), []).append(one)
        totals: list[torch.Tensor] = []
        for group in groups.values():
            norms = _norms([tensor for _, tensor in group])
            for (parameter, _), norm in zip(group, norms, strict=True):
                if not self._is_excluded(parameter):
                    self._module.log(f"{name}/{parameter}", norm)
            totals.append(_norm_of(norms))
        if totals:
            self._module.log(f"{name}_total", _together(totals))

    def _log_histograms(self, name: str, tensors: Named) -> None:
        for parameter, tensor in tensors:
            if not self._is_excluded(parameter):
                tensor = whole(tensor)  # WAIT: for all ranks, if it is divided among them
                real = tensor.abs() if tensor.is_complex() else tensor
                self._module.log(f"{name}/{parameter}", Histogram(real, self._bins))

    def _is_excluded(self, parameter: str) -> bool:
        return any(fnmatchcase(parameter, pattern) for pattern in self._exclude)


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.detach()
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def _norms(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return the norm of each tensor of one device, type and division. WAIT: for all ranks, if they are divided."""
    first, parts = tensors[0], [local(one) for one in tensors]
    # Half precision would overflow or underflow.
    wide = torch.float32 if first.dtype.is_floating_point and first.dtype.itemsize < 4 else None
    norms = torch._foreach_norm(parts, 2, dtype=wide)  # pyright: ignore[reportPrivateImportUsage]  # no public one
    if not is_split(first):
        return norms
    of_parts = torch.stack(list(norms))
    exact = of_parts if of_parts.device.type == "mps" else of_parts.double()  # a square could overflow
    return add_up(exact.square(), first).sqrt().to(of_parts.dtype).unbind()


def _together(norms: list[torch.Tensor]) -> torch.Tensor:
    """Combine norms of several tensors, on an accelerator if one of them is there: moving to the host would wait."""
    if len(norms) == 1:
        return norms[0]
    device = next((norm.device for norm in norms if norm.device.type != "cpu"), norms[0].device)
    dtype = max((norm.dtype for norm in norms), key=lambda one: one.itemsize)
    moved = [norm.to(device, dtype, non_blocking=True) for norm in norms]
    return _norm_of(moved)


def _norm_of(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    return total
