"""What people note about a run: another name, tags, a note and a colour, in one small file of the run folder."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

from events.bounds import MAX_NAME_CHARS
from events.errors import ArgumentsError, RunFolderError
from events.safe_files import open_folder_below, read_below, replace_below

if sys.platform != "win32":
    import fcntl

NOTES_NAME = "notes.json"
NOTES_INVALID = f"{NOTES_NAME} is not valid"
"""What `health` reports of a file that cannot be read."""
MAX_TAGS = 50
MAX_NOTE_CHARS = 4_000
_MOST_BYTES = 256 * 1_024
_LOCK_S = 2.0
"""Maximum seconds to wait for another change of the same notes; whoever may read the folder could hold it up."""

_Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)]
_Tags = Annotated[tuple[_Name, ...], msgspec.Meta(max_length=MAX_TAGS)]
_Note = Annotated[str, msgspec.Meta(max_length=MAX_NOTE_CHARS)]
_Colour = Annotated[str, msgspec.Meta(pattern="^(#[0-9a-f]{6})?$")]


class Notes(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What people note about a run. Empty by default; people may edit the file by hand."""

    name: _Name = ""
    """Shown in place of the run's name, which stays its address."""
    tags: _Tags = ()
    note: _Note = ""
    colour: _Colour = ""
    """``#rrggbb``, or empty for the page's own choice."""


class NotesChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A change of notes, field by field, so that two people who change different ones at once lose nothing."""

    name: _Name | UnsetType = UNSET
    note: _Note | UnsetType = UNSET
    colour: _Colour | UnsetType = UNSET
    add_tags: _Tags = ()
    remove_tags: _Tags = ()

    def of(self, notes: Notes) -> Notes:
        """Return the changed notes. Raises `ArgumentsError` for too many tags."""
        added = [tag.strip() for tag in self.add_tags]
        tags = [tag for tag in dict.fromkeys([*notes.tags, *added]) if tag and tag not in self.remove_tags]
        if len(tags) > MAX_TAGS:
            raise ArgumentsError(f"{len(tags)} tags are more than {MAX_TAGS} per run; remove one first")
        return Notes(
            notes.name if self.name is UNSET else self.name.strip(),
            tuple(tags),
            notes.note if self.note is UNSET else self.note,
            notes.colour if self.colour is UNSET else self.colour,
        )


def read_notes(run_dir: str | os.PathLike[str]) -> Notes | None:
    """Return the notes about a run, empty ones without a file; None if it cannot be read. Never raises."""
    try:
        return msgspec.json.decode(read_below(run_dir, NOTES_NAME, _MOST_BYTES), type=Notes)
    except FileNotFoundError:
        return Notes()
    except (OSError, ValueError, RecursionError):
        return None


def write_notes(run_dir: str | os.PathLike[str], change: NotesChange) -> Notes:
    """Change the notes about a run, which may be running; return all of them.

    The file is replaced atomically. Changes of other threads and processes are kept: each waits for the one before.

    Raises:
        ArgumentsError: The run would have too many tags.
        RunFolderError: The present file is not valid, or another change takes more than two seconds.
        OSError: The folder cannot be written to.
    """
    with _alone(run_dir):
        notes = read_notes(run_dir)
        if notes is None:
            raise RunFolderError(f"{NOTES_NAME} in the run folder is not valid; repair or delete it")
        notes = change.of(notes)
        replace_below(run_dir, NOTES_NAME, msgspec.json.format(msgspec.json.encode(notes)) + b"\n")
    return notes


@contextlib.contextmanager
def _alone(run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a lock on the run folder itself, which leaves no file behind; without one where folders cannot be locked."""
    with open_folder_below(run_dir, ".") as (fd, _):
        deadline = time.monotonic() + _LOCK_S
        while fd is not None and sys.platform != "win32":
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break  # until it is closed
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunFolderError("the notes are being changed by another process; try again") from None
                time.sleep(0.01)
            except OSError:  # some network file systems lock no folders
                break
        yield
