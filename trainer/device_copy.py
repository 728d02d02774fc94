"""Copies of tensors that the loop's thread makes without waiting, and another thread reads."""

from __future__ import annotations

import torch


class DeviceCopy:
    """A copy of a tensor on its own device, enqueued behind the work that computes it: the original may be changed."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach().clone()
        self._copied: torch.cuda.Event | None = None
        if self._tensor.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(self._tensor.device))

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return self._tensor.nbytes

    def read(self) -> torch.Tensor:
        """Return it on the CPU. Waits for the device, so it must not run on the loop's thread."""
        if self._copied is not None:
            self._copied.synchronize()  # WAIT: for the device, on the media thread
        return self._tensor.cpu()
