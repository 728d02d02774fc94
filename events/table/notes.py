"""What people note about a run: another name, tags, a note and a colour, in one small file of the run folder."""

from __future__ import annotations

import os
from typing import Annotated

import msgspec

from events.bounds import MAX_NAME_CHARS
from events.safe_files import read_below

NOTES_NAME = "notes.json"
NOTES_INVALID = f"{NOTES_NAME} is not valid"
"""What `health` reports of a file that cannot be read."""
MAX_TAGS = 50
MAX_NOTE_CHARS = 4_000
_MOST_BYTES = 256 * 1_024

_Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)]


class Notes(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What people note about a run. Empty by default; people may edit the file by hand."""

    name: _Name = ""
    """Shown in place of the run's name, which stays its address."""
    tags: Annotated[tuple[_Name, ...], msgspec.Meta(max_length=MAX_TAGS)] = ()
    note: Annotated[str, msgspec.Meta(max_length=MAX_NOTE_CHARS)] = ""
    colour: Annotated[str, msgspec.Meta(pattern="^(#[0-9a-f]{6})?$")] = ""
    """``#rrggbb``, or empty for the page's own choice."""


def read_notes(run_dir: str | os.PathLike[str]) -> Notes | None:
    """Return the notes about a run, empty ones without a file; None if it cannot be read. Never raises."""
    try:
        return msgspec.json.decode(read_below(run_dir, NOTES_NAME, _MOST_BYTES), type=Notes)
    except FileNotFoundError:
        return Notes()
    except (OSError, ValueError, RecursionError):
        return None
