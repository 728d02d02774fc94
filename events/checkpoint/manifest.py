"""What makes a folder a checkpoint: its name, and the manifest that is written last.

A manifest lists every file of its checkpoint with size and hash, and carries a hash of itself. So whatever was cut,
lost or changed shows, in the manifest too::

    {"manifest":{"format":1,...,"files":{"tensors.safetensors":{"nbytes":4096,"xxh3_128":"..."}}},"xxh3_128":"..."}

The bytes are exactly those that `encode_manifest` makes: any other spelling of the same values is damage.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
import xxhash

from events.bounds import INT_MAX, Finite, Int64
from events.errors import CheckpointDamaged, CheckpointTooNew
from events.journal.lines import MAX_DECODED_BYTES, decoded_bytes
from events.wire import without_surrogates

FORMAT = 1
"""Format of the manifest and of all files that it lists. A reader refuses greater ones."""
MANIFEST_NAME = "manifest.json"
MANIFEST_BYTES = 16 * 2**20
"""Maximum bytes per manifest."""
TENSORS_NAME = "tensors.safetensors"
STATE_NAME = "state.msgpack"

_NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})\.a([1-9][0-9]{0,8})(?:\.([2-9]|[1-9][0-9]{1,17}))?", re.ASCII)
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", re.ASCII)


class CheckpointName(msgspec.Struct, frozen=True):
    """``step-N.aK``: taken after step N in attempt K, so that a step that is done again never collides.

    The second one at the same step of an attempt (after the step, and after the epoch that ended with it) is
    ``step-N.aK.2``. Names order as checkpoints came about.
    """

    step: int
    attempt: int
    revision: int = 1

    @classmethod
    def parse(cls, text: str) -> CheckpointName | None:
        """The name that a text is; None if it is none."""
        match = _NAME.fullmatch(text)
        return cls(int(match[1]), int(match[2]), int(match[3] or 1)) if match else None

    def __str__(self) -> str:
        return f"step-{self.step}.a{self.attempt}" + (f".{self.revision}" if self.revision > 1 else "")

    # Both, because a Struct has methods for all comparisons already: `functools.total_ordering` would add none.
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
    """What a checkpoint is and what it consists of."""

    format: Int64 = FORMAT
    run_id: str
    attempt: Int64
    global_step: Int64
    revision: Int64 = 1
    epoch: Int64
    seq: Int64
    """``seq`` of the run's last event before the state was taken. What earlier attempts published after it is
    superseded when a run resumes from here."""
    time: Finite
    """Unix seconds at which the state was taken."""
    parent: str | None
    """Name of the checkpoint that its attempt was resumed from; None for one that began anew, or elsewhere."""
    reasons: list[str]
    """Why it was taken: ``steps``, ``minutes``, ``epochs``, ``best``, ``command``, ``stop``, ``end``."""
    metric: Metric | None = None
    module: str = ""
    """Qualified name of the module's class."""
    versions: dict[str, str] = {}
    missing: list[str] = []
    """Callbacks whose state is not in it, because they were given up before they came to its place in the run."""
    files: dict[str, FileEntry]

    @property
    def name(self) -> CheckpointName:
        """The name of the folder that this manifest belongs in."""
        return CheckpointName(self.global_step, self.attempt, self.revision)

    @property
    def nbytes(self) -> int:
        """Bytes of all files that it lists."""
        return sum(entry.nbytes for entry in self.files.values())


class _Signed(msgspec.Struct, forbid_unknown_fields=True):
    manifest: msgspec.Raw
    xxh3_128: str


class _Version(msgspec.Struct):
    format: Int64


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of ``manifest.json``."""
    try:
        return _sign(msgspec.json.encode(manifest))
    except UnicodeEncodeError:  # names are the user's: of the class, a callback, a metric
        return _sign(msgspec.json.encode(without_surrogates(msgspec.to_builtins(manifest))))


def _sign(body: bytes) -> bytes:
    return msgspec.json.encode(_Signed(msgspec.Raw(body), xxhash.xxh3_128_hexdigest(body))) + b"\n"


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest.

    Args:
        where: Its path or address, for the message.

    Raises:
        CheckpointDamaged: The bytes are not those that were written, it lists a file outside of its folder, or it may
            take more than `MAX_DECODED_BYTES` of memory.
        CheckpointTooNew: A later version wrote it.
    """
    if (size := decoded_bytes(data)) > MAX_DECODED_BYTES:
        raise CheckpointDamaged(
            f"{where} may take {size:,} bytes of memory, more than {MAX_DECODED_BYTES:,}; load another checkpoint"
        )
    try:
        signed = msgspec.json.decode(data, type=_Signed)
        body = bytes(signed.manifest)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{where} is no manifest ({error}): it was cut or changed") from error
    if _sign(body) != data:
        raise CheckpointDamaged(f"{where} does not match its own hash: it was cut or changed")
    try:
        version = msgspec.json.decode(body, type=_Version).format
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{where} is no manifest: {error}") from error
    if version > FORMAT:
        raise CheckpointTooNew(
            f"{where} has format {version}, of which this version of stagecast knows none beyond {FORMAT}: use the"
            f" version that wrote it, or a later one"
        )
    try:
        manifest = msgspec.json.decode(body, type=Manifest)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{where} is no manifest of format {FORMAT}: {error}") from error
    for name in manifest.files:
        if not is_file_name(name) or name == MANIFEST_NAME:
            raise CheckpointDamaged(
                f"{where} lists the file {name!r:.200}, which cannot be one of a checkpoint: it points outside of its"
                f" folder, or at itself"
            )
    return manifest


def is_file_name(name: Any) -> bool:
    """Whether this is the name of a file within a checkpoint's folder, and of nothing outside of it."""
    return isinstance(name, str) and _FILE_NAME.fullmatch(name) is not None
