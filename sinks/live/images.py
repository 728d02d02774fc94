"""Images of a run folder, sent from their open files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

from events.safe_files import open_below

MOST_FILE = 64 * 2**20
"""Maximum bytes of an image file."""
MOST_PIXELS = 2**27
"""Maximum pixels per image: a small file may expand to more than a browser's memory."""
_PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"


class OpenImage(NamedTuple):
    """An open image; the caller closes its file."""

    file: BinaryIO
    size: int
    """Bytes."""
    etag: str


def open_image(folder: Path, name: str) -> OpenImage:
    """Open an image below a folder, without following links.

    Raises:
        OSError: It is missing, is a link or a special file, has more than `MOST_FILE` bytes, or is not an image that
            the page shows.
        ValueError: ``name`` is not a path below a folder.
    """
    file = open(open_below(folder, name), "rb")  # noqa: SIM115  # the caller closes it
    try:
        state = os.fstat(file.fileno())
        if state.st_size > MOST_FILE or not _is_shown(file.read(24)):
            raise FileNotFoundError(name)
        file.seek(0)
    except BaseException:  # propagates unchanged, without the descriptor
        file.close()
        raise
    return OpenImage(file, state.st_size, f'"{state.st_mtime_ns:x}-{state.st_size:x}"')


def _is_shown(head: bytes) -> bool:
    """Whether a file that starts with these bytes is a PNG of a size that a browser can hold."""
    if not head.startswith(_PNG) or len(head) < 24:
        return False
    return 0 < int.from_bytes(head[16:20], "big") * int.from_bytes(head[20:24], "big") <= MOST_PIXELS
