"""Histograms, images, figures, sounds, tables and texts that a module logs.

A histogram is computed on its tensor's device, and read later like any number. All others but short texts are encoded
and written to files in the run folder by a thread of their own; the event carries the path and is published when the
file is complete.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import queue
import re
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch

from events.log import in_this_run, logger
from events.messages import (
    AudioLogged,
    Event,
    ImageLogged,
    ObserverDropped,
    OperatorTime,
    TableLogged,
    TextLogged,
)
from events.origin import Header, Origin
from events.safe_files import make_folder_below, replace_below
from trainer.audio import Audio
from trainer.data.tensor_state import bytes_of
from trainer.device_copy import DeviceCopy
from trainer.tables import Table, is_frame

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MEDIA_DIR = "media"
"""Within the run folder."""
INLINE_TEXT = 4_096
"""Maximum characters per text in an event; a longer text is written to a file."""
_MOST_WAITING = 64
_MOST_BYTES = 256 * 2**20
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Histogram:
    """The distribution of a tensor's elements, for `ModuleInterface.log`::

        self.log("activations", Histogram(hidden))

    It is enqueued on the tensor's device without waiting for it: the tensor may be changed afterwards.

    Args:
        values: A real tensor of any shape, with at least one element.
        bins: The number of equal bins between the smallest and the largest finite element.

    Raises:
        TypeError: ``values`` is not a real tensor.
        ValueError: ``values`` is empty, or there are fewer than two bins.
    """

    def __init__(self, values: torch.Tensor, bins: int = 64) -> None:
        if not isinstance(values, torch.Tensor) or values.dtype.is_complex or values.layout is not torch.strided:
            raise TypeError(f"Histogram() takes a dense tensor of real numbers, not {values!r:.80}")
        if not values.numel():
            raise ValueError(f"Histogram() got an empty tensor of shape {tuple(values.shape)}")
        if type(bins) is not int or bins < 2:
            raise ValueError(f"Histogram(bins={bins!r:.80}): bins must be an integer >= 2")
        self.low: torch.Tensor
        self.high: torch.Tensor
        self.counts: torch.Tensor
        self.non_finite: torch.Tensor
        with torch.no_grad():
            self._count(values.detach().reshape(-1), bins)

    def _count(self, x: torch.Tensor, bins: int) -> None:
        if x.dtype is not torch.float64:
            x = x.to(torch.float32)
        finite = x.isfinite()
        low = torch.where(finite, x, math.inf).amin()
        high = torch.where(finite, x, -math.inf).amax()
        empty = low > high  # nothing is finite
        low, high = torch.where(empty, 0.0, low), torch.where(empty, 0.0, high)
        # Halves, because the difference of two large numbers may overflow.
        span = high * 0.5 - low * 0.5  # may be 0 for two different denormal numbers
        place = (x * 0.5 - low * 0.5) / span * bins
        index = torch.where(finite & (span > 0), place, 0.0).nan_to_num(0.0).clamp_(0, bins - 1).long()
        counts = torch.zeros(bins, dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, index, finite.long())
        dtype = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self.low, self.high, self.counts = low, high, counts.to(dtype)
        self.non_finite = (~finite).sum().to(dtype)


class Image:
    """A picture, for `ModuleInterface.log`; it is stored as PNG. Needs Pillow (``stagecast[media]``)::

        self.log("samples", Image(pixels))

    Args:
        pixels: A tensor ``(H, W)`` or ``(C, H, W)`` with 1, 3 or 4 channels, on any device; a NumPy array ``(H, W)`` or
            ``(H, W, C)``; or a Pillow image. uint8 from 0 to 255, or floating-point, clipped to 0 to 1. They are
            copied at once: the original may be changed afterwards.

    Raises:
        ImportError: Pillow is not installed.
        TypeError, ValueError: The type or shape is not supported.
    """

    def __init__(self, pixels: object) -> None:
        if importlib.util.find_spec("PIL") is None:
            raise ImportError("trainer.Image needs Pillow: pip install 'stagecast[media]'")
        self._content: DeviceCopy | Picture
        if _is_picture(pixels):
            self._content = pixels.copy()
            self.nbytes = pixels.width * pixels.height * 4
            return
        self._content = _copied_pixels(pixels if isinstance(pixels, torch.Tensor) else _of_array(pixels))
        self.nbytes = self._content.nbytes

    def encode(self) -> bytes:
        """The image as PNG. Waits for the device of the pixels, so it must not run on the loop's thread."""
        picture = self._content
        if isinstance(picture, DeviceCopy):
            picture = _picture_of(picture.read())
        elif picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
            picture = picture.convert("RGB")
        file = io.BytesIO()
        picture.save(file, format="PNG")
        return file.getvalue()


class Drawn:
    """A matplotlib figure, drawn as PNG on the calling thread: figures belong to the thread that created them."""

    def __init__(self, savefig: Callable[..., object]) -> None:
        file = io.BytesIO()
        savefig(file, format="png")
        self._png = file.getvalue()
        self.nbytes = len(self._png)

    def encode(self) -> bytes:
        """The PNG."""
        return self._png


class LoggedText(NamedTuple):
    """A text."""

    text: str


class SavedTrace(NamedTuple):
    """A trace that a profiler has written: the fields of `TraceSaved`."""

    path: str
    nbytes: int
    first_step: int
    last_step: int
    operators: list[OperatorTime]


Written = Image | Drawn | Audio | Table | LoggedText
"""Values that `MediaWriter` writes to files."""
Logged = Histogram | Written | SavedTrace
"""Values of `ModuleInterface.log` other than numbers, as they are recorded."""


def as_logged(value: object) -> Logged | None:
    """Convert a histogram, image, figure, sound, table or text on the calling thread; None for other values."""
    if isinstance(value, Histogram | Image | Audio | Table | SavedTrace):
        return value
    if isinstance(value, str):
        return LoggedText(value)
    if is_frame(value):
        return Table(value)
    savefig = getattr(value, "savefig", None)
    return Drawn(savefig) if callable(savefig) else None


def _is_picture(value: object) -> TypeGuard[Picture]:
    return callable(getattr(value, "save", None)) and hasattr(value, "mode")


def _of_array(pixels: object) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(pixels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"Image() takes a tensor, an array or a Pillow image, not {pixels!r:.80}") from error
    return tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor


def _copied_pixels(pixels: torch.Tensor) -> DeviceCopy:
    shape = tuple(pixels.shape)
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and shape[0] in _MODES)) or not pixels.numel():
        raise ValueError(
            f"Image() got the shape {shape}; pass one image (H, W) or (C, H, W) with 1, 3 or 4 channels, or a grid of"
            f" the batch"
        )
    if not (pixels.dtype.is_floating_point or pixels.dtype is torch.uint8):
        raise TypeError(f"Image() got {pixels.dtype}; pass uint8 from 0 to 255, or floating-point from 0 to 1")
    return DeviceCopy(pixels)


def _picture_of(pixels: torch.Tensor) -> Picture:
    from PIL.Image import frombytes

    if pixels.ndim == 2:
        pixels = pixels.unsqueeze(0)
    if pixels.dtype is not torch.uint8:
        pixels = pixels.float().nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    channels, height, width = pixels.shape
    data = bytes(bytes_of(pixels.permute(1, 2, 0).contiguous()))
    return frombytes(_MODES[channels], (width, height), data)


_KINDS: dict[type, str] = {
    Histogram: "a histogram",
    Image: "an image",
    Drawn: "an image",
    Audio: "a sound",
    Table: "a table",
    LoggedText: "a text",
}


def kind_of(value: Histogram | Written) -> str:
    """Return the kind of a logged value with its article, for messages; a subclass has that of its base."""
    return next(kind for base, kind in _KINDS.items() if isinstance(value, base))


class _Item(NamedTuple):
    name: str
    what: Written
    header: Header
    key: str | None
    of_seq: int | None
    nbytes: int


class MediaWriter:
    """Writes logged images, sounds, tables and texts to files and publishes their events; its queue is bounded.

    Args:
        folder: The run folder, or None.
        publish: `Ring.publish`.
        origin: Builds the headers of `ObserverDropped`.
    """

    OBSERVER = "media"
    """The observer of its `ObserverDropped` events."""

    def __init__(self, folder: Path | None, publish: Callable[[Event], None], origin: Origin) -> None:
        self._folder = folder
        self._publish = publish
        self._origin = origin
        self._waiting: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._count = self._nbytes = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._dropped = 0
        self._numbers = 0
        self._warned: set[str] = set()

    def add(self, name: str, what: Written, header: Header, key: str | None, of_seq: int | None) -> None:
        """Enqueue one value. Any thread; never waits: a value beyond the limits is dropped, and counted."""
        if self._folder is None and not isinstance(what, LoggedText):
            kind = kind_of(what)
            self._warn_once(f"{name!r} is not stored: {kind} needs a run folder; set run_dir or enable the journal")
            return
        nbytes = 4 * len(what.text) if isinstance(what, LoggedText) else what.nbytes
        with self._lock:
            if self._count >= _MOST_WAITING or (self._count and self._nbytes + nbytes > _MOST_BYTES):
                self._dropped += 1
                return
            self._count += 1
            self._nbytes += nbytes
            if self._thread is None:
                self._thread = threading.Thread(target=in_this_run(self._run), name="stagecast-media", daemon=True)
                self._thread.start()
        self._waiting.put(_Item(name, what, header, key, of_seq, nbytes))

    @property
    def used(self) -> bool:
        """Whether any value was added."""
        return self._thread is not None or self._dropped > 0

    def close(self, timeout_s: float) -> None:
        """Flush the queue within the timeout; unwritten values are counted as dropped. Waits for the disk."""
        thread = self._thread
        if thread is not None:
            self._waiting.put(None)
            thread.join(timeout_s)
            if thread.is_alive():
                with self._lock:
                    self._dropped += self._count
        self._publish_drops()

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                self._publish(self._written(item))
            except Exception as error:  # the thread's border: a broken image, a full disk
                self._warn_once(f"{item.name!r} could not be stored: {type(error).__name__}: {error}")
                with self._lock:
                    self._dropped += 1
            with self._lock:
                self._count -= 1
                self._nbytes -= item.nbytes
            self._publish_drops()
            del item

    def _written(self, item: _Item) -> Event:
        header, name, what, key, of_seq = item.header, item.name, item.what, item.key, item.of_seq
        if isinstance(what, LoggedText):
            path = self._write(name, header, what.text.encode("utf-8", "surrogatepass"), "txt")
            return TextLogged(*header, name=name, text=what.text[:INLINE_TEXT], path=path, key=key, of_seq=of_seq)
        if isinstance(what, Audio):
            wav = what.encode()
            if wav.problem:
                self._warn_once(f"{name!r}: {wav.problem}", name)
            return AudioLogged(
                *header,
                name=name,
                path=self._file(name, header, wav.data, "wav"),
                rate=what.rate,
                channels=wav.channels,
                frames=wav.frames,
                nbytes=len(wav.data),
                key=key,
                of_seq=of_seq,
            )
        if isinstance(what, Table):
            table = what.encode()
            if table.cut:
                self._warn_once(f"{name!r} has {table.cut}", name)
            return TableLogged(
                *header,
                name=name,
                path=self._file(name, header, table.data, "json"),
                columns=table.columns,
                rows=table.rows,
                cut=table.cut,
                nbytes=len(table.data),
                key=key,
                of_seq=of_seq,
            )
        png = what.encode()
        width, height = struct.unpack(">II", png[16:24])  # PNG, section 11.2.2: the header chunk comes first
        path = self._file(name, header, png, "png")
        return ImageLogged(
            *header, name=name, path=path, width=width, height=height, nbytes=len(png), key=key, of_seq=of_seq
        )

    def _file(self, name: str, header: Header, data: bytes, ending: str) -> str:
        path = self._write(name, header, data, ending)
        assert path is not None  # `add` takes only texts without a run folder
        return path

    def _write(self, name: str, header: Header, data: bytes, ending: str) -> str | None:
        if self._folder is None:
            return None
        self._numbers += 1
        _, attempt, _, _, _, global_step, *_ = header
        folder = f"{MEDIA_DIR}/{_folder_name(name)}"
        path = f"{folder}/step-{global_step}.a{attempt}.{self._numbers}.{ending}"
        make_folder_below(self._folder, MEDIA_DIR)
        make_folder_below(self._folder, folder)
        replace_below(self._folder, path, data, durable=False)
        return path

    def _warn_once(self, problem: str, about: str | None = None) -> None:
        """Warn once about each problem, or about each thing that problems are ``about``."""
        if (about or problem) not in self._warned and len(self._warned) < 100:
            self._warned.add(about or problem)
            logger.warning(problem)

    def _publish_drops(self) -> None:
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            self._publish(ObserverDropped(*self._origin.header(), observer=self.OBSERVER, dropped=dropped))


def _folder_name(name: str) -> str:
    """A folder name for a metric's name, which may be any text."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:64]
    if plain == name:
        return plain
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain}-{digest}"  # the digest keeps different names apart
