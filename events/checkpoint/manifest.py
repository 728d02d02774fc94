"""The name of a checkpoint, and its manifest, which is written last.

A manifest lists every file of its checkpoint with size and hash, and holds a hash of itself, which reveal any damage::

    {"manifest":{"format":1,...,"files":{"tensors.safetensors":{"nbytes":4096,"xxh3_128":"..."}}},"xxh3_128":"..."}

Any bytes but those of `encode_manifest` are damage, even with equal values.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
import xxhash

from events.bounds import INT_MAX, Finite, Int64
from events.errors import CheckpointDamaged, CheckpointTooNew
from events.journal.lines import MAX_DECODED_BYTES, decoded_bytes
from events.wire import without_surrogates

FORMAT = 2
"""The newest format of a manifest and of all files that it lists. Readers refuse greater ones."""
SHARDED_FORMAT = 2
"""The format of a checkpoint whose tensors are split over the files of several ranks (`events.checkpoint.shards`). All
others have format 1."""
MANIFEST_NAME = "manifest.json"
MANIFEST_BYTES = 16 * 2**20
"""Maximum bytes per manifest."""
TENSORS_NAME = "tensors.safetensors"
STATE_NAME = "state.msgpack"

_NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})\.a([1-9][0-9]{0,8})(?:\.([2-9]|[1-9][0-9]{1,17}))?", re.ASCII)
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", re.ASCII)


class CheckpointName(msgspec.Struct, frozen=True):
    """``step-N.aK``: taken after step N in attempt K, so that repeated steps never collide.

    The second one at the same step of an attempt (after the step, and after the epoch that ended with it) is
    ``step-N.aK.2``. Names sort by age.
    """

    step: int
    attempt: int
    revision: int = 1

    @classmethod
    def parse(cls, text: str) -> CheckpointName | None:
        """Parse a name; None for any other text."""
        match = _NAME.fullmatch(text)
        return cls(int(match[1]), int(match[2]), int(match[3] or 1)) if match else None

    def __str__(self) -> str:
        return f"step-{self.step}.a{self.attempt}" + (f".{self.revision}" if self.revision > 1 else "")

    # Both, because a Struct defines all comparisons: `functools.total_ordering` would add none.
    def __lt__(self, other: CheckpointName) -> bool:
        return self._age < other._age

    def __le__(self, other: CheckpointName) -> bool:
        return self._age <= other._age

    @property
    def _age(self) -> tuple[int, int, int]:
        return self.attempt, self.step, self.revision


class FileEntry(msgspec.Struct, frozen=True):
    """One file of a checkpoint."""

    nbytes: Annotated[int, msgspec.Meta(ge=0, le=INT_MAX)]
    xxh3_128: str
    """Hash of its bytes, 32 hexadecimal digits: XXH3 with 128 bits, https://xxhash.com."""


class Metric(msgspec.Struct, frozen=True):
    """The monitored metric of the weights in a checkpoint."""

    name: str
    value: float
    mode: Literal["min", "max"] = "min"
    """Whether the least or the greatest value is the best."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Description and files of a checkpoint."""

    format: Int64 = 1
    run_id: str
    attempt: Int64
    global_step: Int64
    revision: Int64 = 1
    epoch: Int64
    seq: Int64
    """``seq`` of the run's last event before the state was captured. A run that resumes from it supersedes later
    events."""
    time: Finite
    """Unix seconds at which the state was captured."""
    parent: str | None
    """Name of the checkpoint that its attempt resumed from; None for a new run, or a start from another run."""
    reasons: list[str]
    """Reasons for it: ``steps``, ``minutes``, ``epochs``, ``best``, ``command``, ``stop``, ``end``."""
    metric: Metric | None = None
    module: str = ""
    """Qualified name of the module's class."""
    versions: dict[str, str] = {}
    missing: list[str] = []
    """Callbacks without state in it, because they were disabled before they had processed its events."""
    files: dict[str, FileEntry]

    @property
    def name(self) -> CheckpointName:
        """Name of the checkpoint's folder."""
        return CheckpointName(self.global_step, self.attempt, self.revision)

    @property
    def nbytes(self) -> int:
        """Total bytes of its files."""
        return sum(entry.nbytes for entry in self.files.values())


class _Version(msgspec.Struct):
    format: Int64


def sign(kind: str, value: msgspec.Struct | bytes) -> bytes:
    """Return the bytes of a file that holds a value, or its JSON, and the hash of it."""
    body = value if isinstance(value, bytes) else msgspec.json.encode(value)
    signed = {kind: msgspec.Raw(body), "xxh3_128": xxhash.xxh3_128_hexdigest(body)}
    return msgspec.json.encode(signed) + b"\n"


def signed_in(kind: str, data: bytes) -> bytes:
    """Return the JSON that `sign` wrote. Raises `ValueError` or `RecursionError` for any other bytes."""
    body = bytes(msgspec.json.decode(data, type=dict[str, msgspec.Raw]).get(kind, b""))
    if sign(kind, body) != data:
        raise ValueError("it does not match its own hash")
    return body


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of ``manifest.json``."""
    try:
        return sign("manifest", manifest)
    except UnicodeEncodeError:  # names are the user's: of the class, a callback, a metric
        return sign("manifest", msgspec.json.encode(without_surrogates(msgspec.to_builtins(manifest))))


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest.

    Args:
        where: Its path or address, for the message.

    Raises:
        CheckpointDamaged: The bytes were changed, list a file outside of the folder, or may take more than
            `MAX_DECODED_BYTES` of memory.
        CheckpointTooNew: A later version wrote it.
    """
    if (size := decoded_bytes(data)) > MAX_DECODED_BYTES:
        raise CheckpointDamaged(
            f"{where} may take {size:,} bytes of memory, more than {MAX_DECODED_BYTES:,}; load another checkpoint"
        )
    try:
        body = signed_in("manifest", data)
        if (version := msgspec.json.decode(body, type=_Version).format) > FORMAT:
            raise CheckpointTooNew(
                f"{where} has format {version}, but this version of stagecast reads formats up to {FORMAT}; use the"
                f" version that wrote it, or a later one"
            )
        manifest = msgspec.json.decode(body, type=Manifest)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{where} is not a manifest: {error}; load another checkpoint") from error
    for name in manifest.files:
        if _FILE_NAME.fullmatch(name) is None or name == MANIFEST_NAME:
            raise CheckpointDamaged(
                f"{where} lists the file {name!r:.200}, which cannot be one of a checkpoint: it points outside of its"
                f" folder, or at itself"
            )
    return manifest
