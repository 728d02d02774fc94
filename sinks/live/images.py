"""Images, sounds and tables of a run folder, sent from their open files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

from events.safe_files import open_below

MOST_FILE = 64 * 2**20
"""Maximum bytes per file."""
MOST_PIXELS = 2**27
"""Maximum pixels per image: a small file may expand to more than a browser's memory."""
_PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"


class OpenImage(NamedTuple):
    """An open image, sound or table; the caller closes its file."""

    file: BinaryIO
    size: int
    """Bytes."""
    etag: str
    media_type: str


def open_image(folder: Path, name: str) -> OpenImage:
    """Open an image, sound or table below a folder, without following links.

    Raises:
        OSError: It is missing, is a link or a special file, has more than `MOST_FILE` bytes, or is nothing that the
            page shows, by its content.
        ValueError: ``name`` is not a path below a folder.
    """
    file = open(open_below(folder, name), "rb")  # noqa: SIM115  # the caller closes it
    try:
        state = os.fstat(file.fileno())
        media_type = None if state.st_size > MOST_FILE else _type_of(file.read(24))
        if media_type is None:
            raise FileNotFoundError(name)
        file.seek(0)
    except BaseException:  # propagates unchanged, without the descriptor
        file.close()
        raise
    return OpenImage(file, state.st_size, f'"{state.st_mtime_ns:x}-{state.st_size:x}"', media_type)


def _type_of(head: bytes) -> str | None:
    """The type of a file that starts with these bytes; None unless it is a WAV file, a table as `trainer.Table` writes
    it, or a PNG of a size that a browser can hold."""
    if head.startswith(b"RIFF") and head[8:12] == b"WAVE":
        return "audio/wav"
    if head.startswith(b'{"columns":['):
        return "application/json"
    if not head.startswith(_PNG) or len(head) < 24:
        return None
    pixels = int.from_bytes(head[16:20], "big") * int.from_bytes(head[20:24], "big")
    return "image/png" if 0 < pixels <= MOST_PIXELS else None
