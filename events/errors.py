"""Errors of the bus, the journal and the wire.

StagecastError
├── BusClosed                 publish or subscribe after the bus was closed
├── FenceBroken               the loop waited for a hook that can no longer run
├── WireError                 bytes that are not an event
├── CursorError               a cursor that this run's history does not reach
├── RunFolderError            a run folder that cannot be used
│   ├── RunFolderHeld         another process (or run) holds it
│   └── RunFolderMismatch     it belongs to another run
├── RunCancelled              the run was cancelled before it finished
└── TrainingThreadStuck       the loop did not reach a step boundary in time
"""

from __future__ import annotations


class StagecastError(Exception):
    """Base of every error that stagecast raises on its own account. A user's exception comes out as itself."""


class BusClosed(StagecastError):
    """The bus no longer takes subscriptions."""


class FenceBroken(StagecastError):
    """A hook that the loop had to wait for cannot run any more."""


class WireError(StagecastError, ValueError):
    """Bytes that are not an event of any version: names where and what."""


class CursorError(StagecastError, ValueError):
    """The history from this cursor on is not kept anywhere."""


class RunFolderError(StagecastError):
    """A run folder cannot be used."""


class RunFolderHeld(RunFolderError):
    """The run folder is in use; the message names its holder."""


class RunFolderMismatch(RunFolderError):
    """The run folder holds the journal of another run."""


class RunCancelled(StagecastError):
    """The run was cancelled before it finished, so it has no result."""


class TrainingThreadStuck(StagecastError):
    """The training thread did not reach a step boundary within the grace period; the message shows where it hangs."""
