"""Sound that a module logs, stored as WAV."""

from __future__ import annotations

import io
import wave
from typing import NamedTuple

import torch

from trainer.data.tensor_state import bytes_of
from trainer.device_copy import DeviceCopy

MOST_SAMPLES = 2**24
"""Maximum samples per `Audio`, in all channels: 32 MiB of a file, or three minutes in stereo at 44.1 kHz."""
_MOST_CHANNELS = 16
_MOST_RATE = 768_000
_LOUDEST = 32_767


class Wav(NamedTuple):
    """An encoded `Audio`."""

    data: bytes
    channels: int
    frames: int
    """Samples per channel."""
    problem: str | None
    """Why it does not sound as its samples."""


class Audio:
    """Sound, for `ModuleInterface.log`; it is stored as WAV with 16 bits per sample::

        self.log("speech", Audio(waveform, 16_000))

    Args:
        samples: A tensor ``(time,)`` or ``(channels, time)`` on any device, or a NumPy array of this shape.
            Floating-point from -1 to 1, or int16. They are copied at once, without waiting for the device: the original
            may be changed afterwards. Values outside of the range are clipped and NaN becomes silence, with a warning
            once they are read.
        rate: Samples per second and channel.

    Raises:
        TypeError, ValueError: The type, shape or rate is not supported.
    """

    def __init__(self, samples: object, rate: int) -> None:
        if type(rate) is not int or not 1 <= rate <= _MOST_RATE:
            raise ValueError(f"Audio(rate={rate!r:.80}): rate must be an integer from 1 to {_MOST_RATE:,}")
        self.rate = rate
        tensor = samples if isinstance(samples, torch.Tensor) else _of_array(samples)
        shape = tuple(tensor.shape)
        if tensor.ndim not in (1, 2) or not tensor.numel():
            raise ValueError(f"Audio() got the shape {shape}; pass one sound, (time,) or (channels, time)")
        if tensor.ndim == 2 and shape[0] > _MOST_CHANNELS:
            raise ValueError(
                f"Audio() got {shape[0]:,} channels, of at most {_MOST_CHANNELS}; pass (channels, time), not (time,"
                f" channels)"
            )
        if tensor.numel() > MOST_SAMPLES:
            raise ValueError(f"Audio() got {tensor.numel():,} samples, of at most {MOST_SAMPLES:,}; log an excerpt")
        if not (tensor.dtype.is_floating_point or tensor.dtype is torch.int16) or tensor.layout is not torch.strided:
            raise TypeError(f"Audio() got {tensor.dtype}; pass floating-point from -1 to 1, or int16")
        self._samples = DeviceCopy(tensor)
        self.nbytes = self._samples.nbytes

    def encode(self) -> Wav:
        """The sound as WAV. Waits for the device of the samples, so it must not run on the loop's thread."""
        samples = self._samples.read()
        if samples.ndim == 1:
            samples = samples.unsqueeze(0)
        problem = None
        if samples.dtype is not torch.int16:
            samples = samples.float()
            outside, silent = int((samples.abs() > 1).sum()), int(samples.isnan().sum())
            if outside or silent:
                problem = (
                    f"{outside:,} of {samples.numel():,} samples are outside of -1 to 1 and clipped, {silent:,} are NaN"
                    f" and silent; divide them by their largest magnitude"
                )
            samples = samples.nan_to_num(0.0).clamp(-1, 1).mul(_LOUDEST).round().to(torch.int16)
        channels, frames = samples.shape
        file = io.BytesIO()
        with wave.open(file, "wb") as writer:
            writer.setnchannels(channels)
            writer.setsampwidth(2)
            writer.setframerate(self.rate)
            # One frame after the other; `wave` swaps the bytes where the machine's order is not that of WAV.
            writer.writeframes(bytes(bytes_of(samples.T.contiguous())))
        return Wav(file.getvalue(), channels, frames, problem)


def _of_array(samples: object) -> torch.Tensor:
    try:
        return torch.as_tensor(samples)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"Audio() takes a tensor or an array of samples, not {samples!r:.80}") from error
