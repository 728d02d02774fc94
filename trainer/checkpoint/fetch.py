"""Downloads the checkpoint that a run resumes from, before the run starts."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from events.checkpoint.lineage import ranked
from events.checkpoint.manifest import CheckpointName
from events.checkpoint.settings import Checkpoints
from events.checkpoint.store import CHECKPOINTS_DIR, RESUMED_DIR, CheckpointStore
from events.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound
from events.log import logger
from events.masking import masked
from events.run.folder import RunFolder
from events.safe_files import make_folder_below, replace_below

if TYPE_CHECKING:
    from events.checkpoint.remote import RemoteStore

KEYWORDS = ("auto", "best")
"""Values of ``resume`` that are neither a path nor an address."""
_WORDS = frozenset({*KEYWORDS, "last", "latest", "newest"})

_PIECE_BYTES = 16 * 2**20
_HEADER_BYTES = 100_000_000  # readers of safetensors refuse longer headers
_HTTPS_TIMEOUT_S = 30.0

Fetch = Callable[[], Path | None]


def no_name(path: str) -> str | None:
    """Return the last word of a path or address if it is a likely mistake for a checkpoint name."""
    word = path.rstrip("/").rpartition("/")[2]
    return word if word in _WORDS else None


def fetch_for(
    argument: str,
    resume: str | os.PathLike[str] | None,
    settings: Checkpoints | None,
    run_id: str,
    run_dir: Path | None,
) -> Fetch | None:
    """Return a function that downloads the checkpoint that a run needs; None if it needs none.

    Args:
        argument: The trainer's argument, for messages: ``resume`` or ``init_from``.
        resume: Its value.
        settings: None disables checkpoints.
        run_dir: None without a run folder.

    Returns:
        A function that waits for the network. It returns the local path of an address; None for a keyword.
    """
    if isinstance(resume, str) and "://" in resume:
        address = resume
        return lambda: _fetch_address(argument, address, run_id, run_dir)
    if resume in KEYWORDS and settings is not None and settings.upload is not None and run_dir is not None:
        upload = settings.upload
        return lambda: _fetch_own(upload, run_id, run_dir, settings if resume == "best" else None)
    return None


def _fetch_address(argument: str, address: str, run_id: str, run_dir: Path | None) -> Path:
    """Download a checkpoint by its address, or the newest one by the address of its run.

    Raises:
        CheckpointNotFound: The address has no checkpoint.
        CheckpointDamaged: All checkpoints at the address are damaged.
        UploadError: The store cannot be reached.
    """
    from events.checkpoint.objects import parse_url
    from events.checkpoint.remote import RemoteStore

    is_file = argument == "init_from" and urllib.parse.urlsplit(address).path.endswith(".safetensors")
    if not (is_file and address.startswith("https://")):
        parse_url(address)  # raises without quoting the address, which may hold a secret
    if run_dir is None:
        raise CheckpointNotFound(f"{argument}={masked(address)!r} needs a run folder for the download; give run_dir")
    if is_file:
        return _fetch_file(address, run_id, run_dir)
    base, _, last = address.rstrip("/").rpartition("/")
    name = CheckpointName.parse(last)
    remote = RemoteStore(base if name is not None else address)
    names = [name] if name is not None else remote.candidates()
    if not names:
        word = no_name(address)
        why = f"{word!r} is not a checkpoint name (expected e.g. step-500.a1)" if word else "there is no checkpoint"
        raise CheckpointNotFound(f"{argument}={address!r}: {why}")
    with RunFolder.open(run_dir, run_id):
        # Weights of any run may be copied: the history does not continue from them.
        return _download(remote, names, run_dir, None if argument == "init_from" else run_id)


def _fetch_file(address: str, run_id: str, run_dir: Path) -> Path:
    """Download a safetensors file. Raises `CheckpointError`."""
    file = run_dir / RESUMED_DIR / "model.safetensors"
    pieces = _https_pieces(address) if address.startswith("https://") else _object_pieces(address)
    try:
        with RunFolder.open(run_dir, run_id):
            make_folder_below(run_dir, RESUMED_DIR)
            replace_below(run_dir, f"{RESUMED_DIR}/{file.name}", pieces, durable=False)
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(
            f"init_from={masked(address)!r} cannot be copied to {file}: {masked(str(error))}; check the address and the"
            f" disk"
        ) from error
    logger.info(f"{masked(address)} was copied to {file}")
    return file


def _https_pieces(address: str) -> Iterator[bytes]:
    try:
        opened = urllib.request.urlopen(address, timeout=_HTTPS_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise OSError(str(error)) from None
    with opened as answer:
        left = int(answer.headers.get("Content-Length") or 0)
        while piece := answer.read(_PIECE_BYTES):
            left -= len(piece)
            yield piece
        if left > 0:
            raise OSError(f"the connection was closed {left:,} bytes before the end")


def _object_pieces(address: str) -> Iterator[bytes]:
    """Yield the bytes of a safetensors file in a store: its header has its size, which only a list would have, too."""
    from events.checkpoint.objects import Limits, Objects

    base, _, key = address.rpartition("/")
    objects = Objects(base, Limits())

    def read(begin: int, nbytes: int) -> bytes:
        if (data := objects.get_range(urllib.parse.unquote(key), begin, nbytes)) is None:
            raise CheckpointNotFound(f"init_from={masked(address)!r} does not exist; check the address")
        if len(data) != nbytes:
            raise CheckpointDamaged(f"{masked(address)} is shorter than its header requires; write it again")
        return data

    begin = read(0, 8)
    size = 8 + int.from_bytes(begin, "little")
    if not 8 < size < _HEADER_BYTES:
        raise CheckpointDamaged(f"{masked(address)} is not a safetensors file; write it with safetensors' save_file")
    yield begin + (header := read(8, size - 8))
    try:
        entries = msgspec.json.decode(header, type=dict[str, dict[str, Any]])
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        end = size + max(ends, default=0)
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointDamaged(f"{masked(address)} is not a safetensors file: {error}") from error
    for at in range(size, end, _PIECE_BYTES):
        yield read(at, min(_PIECE_BYTES, end - at))


def _fetch_own(upload: str, run_id: str, run_dir: Path, best: Checkpoints | None) -> None:
    """Download the newest uploaded checkpoint of this run, if it has no local one.

    Args:
        best: Download the one with the best metric by these settings instead.
    """
    folder = run_dir / CHECKPOINTS_DIR
    if CheckpointStore(folder).last_attempt:
        return
    from events.checkpoint.objects import run_url
    from events.checkpoint.remote import RemoteStore

    remote = RemoteStore(run_url(upload, run_id))
    if best is None:
        names = remote.candidates()
    else:
        scores = remote.scores(best.best, lambda name, error: logger.warning(str(error)))
        names = ranked(scores, best.best_mode if best.best is not None else None)
    if names:
        with RunFolder.open(run_dir, run_id):
            _download(remote, names, run_dir, run_id)


def _download(remote: RemoteStore, names: list[CheckpointName], run_dir: Path, run_id: str | None) -> Path:
    """Copy the first valid checkpoint to this run's checkpoints, or to `RESUMED_DIR` if it is of another run."""
    problems: list[str] = []
    for name in names:
        try:
            own = remote.manifest(name).run_id == run_id
            folder = run_dir / (CHECKPOINTS_DIR if own else RESUMED_DIR)
            path = remote.download(name, folder)
            if own:
                # Last: without a checkpoint the notes would describe a new run. They give this attempt a new number.
                for note in remote.attempts().values():
                    CheckpointStore(folder).note(note)
        except (CheckpointDamaged, CheckpointNotFound) as error:
            problems.append(str(error))
            logger.warning(f"{error}; another checkpoint is tried")
        except OSError as error:
            raise CheckpointError(
                f"{remote.url_of(name)} cannot be copied to {run_dir}: {error}; make room, or set another run_dir"
            ) from error
        else:
            logger.info(f"{remote.url_of(name)} was copied to {path}")
            return path
    raise CheckpointDamaged(f"all checkpoints at {remote.url} are damaged; the newest: {problems[0]}")
