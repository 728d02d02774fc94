"""A text that every machine has: the source of Python's standard library, as tokens."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
from torch.utils.data import Dataset

# Four spaces are one character, the tab: after a minute of training, a model cannot count deep indentation yet.
_INDENT = "    "
_CHARACTERS = "\n\t" + "".join(map(chr, range(32, 127)))  # and printable ASCII
UNKNOWN = 0
"""The token of every other byte."""
VOCABULARY = 1 + len(_CHARACTERS)
"""Number of tokens: 98."""

_TOKENS = bytes(1 + _CHARACTERS.index(chr(byte)) if chr(byte) in _CHARACTERS else UNKNOWN for byte in range(256))
_SKIPPED_FOLDERS = frozenset({
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test",
    "encodings", "pydoc_data",  # mostly tables
})  # fmt: skip
_VALIDATION_PERCENT = 10
_LARGEST_FILE = 512 * 2**10


class Text(msgspec.Struct, frozen=True):
    """A training and a validation text; no file is in both."""

    train: torch.Tensor
    """Tokens, ``(N,)`` uint8, in host memory."""
    val: torch.Tensor
    files: int
    """Files read, for both."""
    root: str


def encode(text: bytes) -> torch.Tensor:
    """Encode source text, in any encoding, as tokens ``(N,)`` uint8."""
    plain = text.replace(b"\r\n", b"\n").expandtabs().replace(_INDENT.encode(), b"\t")
    tokens = bytearray(plain.translate(_TOKENS))
    return torch.frombuffer(tokens, dtype=torch.uint8) if tokens else torch.empty(0, dtype=torch.uint8)


def decode(tokens: torch.Tensor) -> str:
    """Decode tokens ``(N,)`` as text; unknown ones become ``?``."""
    text = "".join("?" if token == UNKNOWN else _CHARACTERS[token - 1] for token in tokens.tolist())
    return text.replace("\t", _INDENT)


def load_text(root: str | os.PathLike[str] | None = None, *, limit_bytes: int = 4 * 2**20) -> Text:
    """Read the ``*.py`` files below a folder and split them by file.

    The selection of files, their order and the split (about a tenth is for validation) depend only on their names
    relative to the folder, so they are the same in each process and on each machine with the same Python. Unreadable
    files are skipped.

    Args:
        root: The folder; None for Python's standard library.
        limit_bytes: Maximum bytes per corpus, so that loading takes about a second.

    Raises:
        FileNotFoundError: There is too little text below the folder.
    """
    folder = Path(sysconfig.get_path("stdlib") if root is None else root)
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    size = 0
    for digest, path in sorted(_sources(folder)):
        if size >= limit_bytes:
            break
        try:
            if path.stat().st_size > _LARGEST_FILE:  # probably a generated table
                continue
            content = path.read_bytes()
        except OSError:  # unreadable or deleted
            continue
        parts[digest[-1] * 100 < _VALIDATION_PERCENT * 256].append(content)
        size += len(content)
    text = Text(
        encode(b"\n".join(parts[False])),
        encode(b"\n".join(parts[True])),
        len(parts[False]) + len(parts[True]),
        str(folder),
    )
    if min(len(text.train), len(text.val)) < 10_000:
        raise FileNotFoundError(
            f"{size:,} bytes of Python source in {text.files} files below {folder} are too few (minimum: 10,000"
            f" characters each for training and validation); use a Python with the sources of its standard library"
        )
    return text


def _sources(folder: Path) -> Iterator[tuple[bytes, Path]]:
    """Every source file with a digest of its relative name, which determines its order and its side of the split."""
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for name in names:
            if name.endswith(".py"):
                path = Path(where, name)
                key = path.relative_to(folder).as_posix().encode(errors="surrogateescape")
                yield hashlib.blake2b(key, digest_size=8).digest(), path


class Blocks(Dataset[torch.Tensor]):
    """A text cut into blocks of ``length`` inputs and as many targets: each item is ``(length + 1,)`` uint8.

    Args:
        most: Maximum blocks, spread evenly over the whole text; None for all.
    """

    def __init__(self, tokens: torch.Tensor, length: int, *, most: int | None = None) -> None:
        whole = (len(tokens) - 1) // length
        self._tokens = tokens
        self._length = length
        self._count = whole if most is None else min(most, whole)
        self._stride = whole // self._count * length if self._count else length

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self._stride
        return self._tokens[start : start + self._length + 1]
