"""The states in which a crash may leave the disk after a sequence of calls: a small model of a file system.

The model guarantees what POSIX does. The bytes of a file are durable once the file was synced, and a folder's entries
once the folder was synced, whatever was synced below it. Each unsynced change may have happened or not, independently
of all others: an entry that was made, renamed or removed, a write or a truncation. A write may also be torn: only its
first half, only its second, or only the length that it gave to the file. A rename within a folder is atomic, as on
every file system with a journal.

The states are numbered: all of them can be counted, and each of them made.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from faults.disk_kit import Call

Tree = dict[str, Any]
"""A folder: by name the bytes of a file, or another folder."""
Write = tuple[int, bytes | None]
"""The offset and the bytes; None truncates the file to that length."""


class _File:
    def __init__(self) -> None:
        self._durable = b""
        self._pending: list[Write] = []

    def write(self, write: Write) -> None:
        self._pending.append(write)

    def sync(self) -> None:
        for write in self._pending:
            self._durable = _written(self._durable, write)
        self._pending = []

    def count(self) -> int:
        return math.prod(len(_outcomes(write)) for write in self._pending)

    def pick(self, number: int) -> bytes:
        content = self._durable
        for write in self._pending:
            outcomes = _outcomes(write)
            number, chosen = divmod(number, len(outcomes))
            for part in outcomes[chosen]:
                content = _written(content, part)
        return content


class _Folder:
    def __init__(self) -> None:
        self.entries: dict[str, _File | _Folder] = {}
        self._durable: dict[str, _File | _Folder] = {}
        self._pending: list[dict[str, _File | _Folder | None]] = []

    def change(self, names: dict[str, _File | _Folder | None]) -> None:
        self._pending.append(names)
        _change(self.entries, names)

    def sync(self) -> None:
        self._durable, self._pending = dict(self.entries), []

    def count(self) -> int:
        return sum(total for _, _, total in self._outcomes())

    def pick(self, number: int) -> Tree:
        for entries, counts, total in self._outcomes():
            if number < total:
                tree: Tree = {}
                for name, count in counts.items():
                    number, chosen = divmod(number, count)
                    tree[name] = entries[name].pick(chosen)
                return tree
            number -= total
        raise IndexError(f"{number} is not the number of a state")

    def _outcomes(self) -> Iterator[tuple[dict[str, _File | _Folder], dict[str, int], int]]:
        """Each possible set of entries, the number of states of each entry, and their product."""
        counts: dict[int, int] = {}
        for chosen in range(2 ** len(self._pending)):
            entries = dict(self._durable)
            for index, names in enumerate(self._pending):
                if chosen >> index & 1:
                    _change(entries, names)
            own: dict[str, int] = {}
            for name, entry in entries.items():
                if id(entry) not in counts:
                    counts[id(entry)] = entry.count()
                own[name] = counts[id(entry)]
            yield entries, own, math.prod(own.values())


class Machine:
    """A file system below one folder; it ignores calls elsewhere.

    Args:
        root: The folder, durable and empty except for
        unsynced: folders in it that were made and not synced.
    """

    def __init__(self, root: Path, unsynced: Iterable[str] = ()) -> None:
        self._root = _Folder()
        self._path = root
        for name in unsynced:
            self._root.change({name: _Folder()})

    def play(self, call: Call) -> None:
        if not PurePath(call.path).is_relative_to(self._path):
            return
        if call.path == str(self._path):
            if call.name == "fsync":
                self._root.sync()
            return
        folder, name = self._find(call.path)
        if call.name == "fsync":
            folder.entries[name].sync()
        elif call.name == "mkdir":
            folder.change({name: _Folder()})
        elif call.name == "open" and call.creates:
            assert name not in folder.entries
            folder.change({name: _File()})
        elif call.name in ("write", "pwrite", "ftruncate"):
            file = folder.entries[name]
            assert isinstance(file, _File)
            file.write((call.at, None if call.name == "ftruncate" else call.data))
        elif call.name == "rename":
            to, new_name = self._find(call.to)
            assert to is folder, "a rename from folder to folder is not atomic everywhere"
            folder.change({name: None, new_name: folder.entries[name]})
        elif call.name in ("unlink", "rmdir"):
            folder.change({name: None})

    def count(self) -> int:
        return self._root.count()

    def now(self) -> Tree:
        """The state that processes see while the machine runs."""
        return self._root.pick(self.count() - 1)

    def states(self, limit: int, chance: random.Random) -> Iterator[Tree]:
        """All states; if there are more than the limit, random ones, with the emptiest and the fullest."""
        total = self.count()
        numbers: Iterable[int] = range(total)
        if total > limit:
            numbers = {0, total - 1, *(chance.randrange(total) for _ in range(limit - 2))}
        for number in numbers:
            yield self._root.pick(number)

    def _find(self, path: str) -> tuple[_Folder, str]:
        *above, name = PurePath(path).relative_to(self._path).parts
        folder = self._root
        for part in above:
            entered = folder.entries[part]
            assert isinstance(entered, _Folder)
            folder = entered
        return folder, name


def make(tree: Tree, folder: Path) -> None:
    folder.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            make(content, folder / name)
        else:
            (folder / name).write_bytes(content)


def fingerprint(tree: Tree) -> int:
    entries = ((name, fingerprint(entry) if isinstance(entry, dict) else entry) for name, entry in tree.items())
    return hash(frozenset(entries))


def _change(entries: dict[str, _File | _Folder], names: dict[str, _File | _Folder | None]) -> None:
    for name, entry in names.items():
        if entry is None:
            entries.pop(name, None)
        else:
            entries[name] = entry


def _outcomes(write: Write) -> list[list[Write]]:
    """The parts of a write that may have happened, in each case; all of it comes last."""
    at, data = write
    if data is None:
        return [[], [write]]
    half = len(data) // 2
    torn: list[list[Write]] = [[(at, data[:half])], [(at + half, data[half:])], [(at, bytes(len(data)))]]
    return [[], *torn, [write]]


def _written(content: bytes, write: Write) -> bytes:
    at, data = write
    if data is None:
        return content[:at].ljust(at, b"\0")
    return content[:at].ljust(at, b"\0") + data + content[at + len(data) :]
