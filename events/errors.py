"""Errors of the bus, the journal, the wire and checkpoints.

StagecastError
├── ArgumentsError            arguments or a configuration file that cannot be used; also a ValueError
├── BusClosed                 publish or subscribe after the bus was closed
├── FenceBroken               the loop waited for a hook that can no longer run
├── WireError                 bytes that are not an event
├── CursorError               a cursor that this run's history does not reach
├── RunFolderError            a run folder that cannot be used
│   ├── RunFolderHeld         another process (or run) holds it
│   └── RunFolderMismatch     it belongs to another run
├── CheckpointError           a checkpoint cannot be written, read or used
│   ├── UnstorableState       the state holds what no checkpoint can keep; also a TypeError
│   ├── CheckpointDamaged     its bytes are not those that were written; also a ValueError
│   ├── CheckpointTooNew      a later version wrote it
│   ├── CheckpointMismatch    it is that of another model, or run
│   ├── CheckpointNotFound    there is none where one was asked for; also a LookupError
│   ├── CheckpointsFailing    several in a row could not be made durable
│   └── UploadError           a remote store cannot be used
├── SinkMisconfigured         a sink that no retry can open: its client is missing, its address is wrong
├── SinkHostFailed            a sink in a process of its own has failed, and was to end the run then
├── RunCancelled              the run was cancelled before it finished
└── TrainingThreadStuck       the loop did not reach a step boundary in time
"""

from __future__ import annotations


class StagecastError(Exception):
    """Base of every error that stagecast raises on its own account. A user's exception comes out as itself."""


class ArgumentsError(StagecastError, ValueError):
    """Arguments that cannot be used: names every wrong one, its value and what is allowed."""


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


class SinkMisconfigured(StagecastError):
    """A sink cannot be opened, and trying again will not help; the message says what to do."""


class SinkHostFailed(StagecastError):
    """A sink that runs in a process of its own, with the policy ``fatal``, has failed."""


class CheckpointError(StagecastError):
    """A checkpoint cannot be written, read or used."""


class UnstorableState(CheckpointError, TypeError):
    """The state holds a value that no checkpoint can keep: names its path, its type and what to do."""


class CheckpointDamaged(CheckpointError, ValueError):
    """A checkpoint is not whole: a file is missing, cut, or holds other bytes than were written."""


class CheckpointTooNew(CheckpointError):
    """A later version of stagecast wrote the checkpoint, in a format that this one cannot read."""


class CheckpointMismatch(CheckpointError):
    """The checkpoint does not fit: it is that of another model or run; names the keys and shapes that differ."""


class CheckpointNotFound(CheckpointError, LookupError):
    """There is no checkpoint where one was asked for."""


class CheckpointsFailing(CheckpointError):
    """Several checkpoints in a row could not be made durable, so going on would risk all that is computed."""


class UploadError(CheckpointError):
    """A remote store of checkpoints cannot be reached or used."""


class RunCancelled(StagecastError):
    """The run was cancelled before it finished, so it has no result."""


class TrainingThreadStuck(StagecastError):
    """The training thread did not reach a step boundary within the grace period; the message shows where it hangs."""
