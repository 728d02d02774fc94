"""Errors of the bus, the journal, the wire and checkpoints.

StagecastError
├── ArgumentsError            invalid arguments or configuration file; also a ValueError
├── BusClosed                 publish or subscribe after the bus was closed
├── FenceBroken               the loop waited for a hook that can no longer run
├── WireError                 bytes that are not an event
├── CursorError               a cursor outside of the stored history
├── RunFolderError            a run folder is missing, unreadable or not writable
│   ├── RunFolderHeld         another process (or run) holds it
│   └── RunFolderMismatch     it belongs to another run
├── CheckpointError           a checkpoint cannot be written, read or used
│   ├── UnstorableState       the state holds a value that cannot be stored; also a TypeError
│   ├── CheckpointDamaged     its bytes differ from the written ones; also a ValueError
│   ├── CheckpointTooNew      a later version wrote it
│   ├── CheckpointMismatch    it belongs to another model or run
│   ├── CheckpointNotFound    there is no such checkpoint; also a LookupError
│   ├── CheckpointsFailing    several in a row could not be made durable
│   └── UploadError           a remote store is unreachable, or refuses access
├── SinkMisconfigured         a sink that no retry can open: its client is missing, its address is wrong
├── SinkHostFailed            a sink with the policy ``fatal`` failed in the sink host
├── RunCancelled              the run was cancelled before it finished
└── TrainingThreadStuck       the loop did not reach a step boundary in time
"""

from __future__ import annotations


class StagecastError(Exception):
    """Base of stagecast's own errors. Exceptions of the user's code propagate unchanged."""


class ArgumentsError(StagecastError, ValueError):
    """Invalid arguments: names each of them, its value and the allowed values."""


class BusClosed(StagecastError):
    """The bus was closed and accepts no subscriptions."""


class FenceBroken(StagecastError):
    """A hook that the loop waits for can no longer run."""


class WireError(StagecastError, ValueError):
    """Bytes that are not an event of any version; names the place and the problem."""


class CursorError(StagecastError, ValueError):
    """The history after this cursor is not stored."""


class RunFolderError(StagecastError):
    """A run folder is missing, unreadable or not writable."""


class RunFolderHeld(RunFolderError):
    """The run folder is in use; the message names its holder."""


class RunFolderMismatch(RunFolderError):
    """The run folder holds the journal of another run."""


class SinkMisconfigured(StagecastError):
    """A sink cannot be opened, and a retry cannot help; the message names a fix."""


class SinkHostFailed(StagecastError):
    """A sink with the policy ``fatal`` failed in the sink host."""


class CheckpointError(StagecastError):
    """A checkpoint cannot be written, read or used."""


class UnstorableState(CheckpointError, TypeError):
    """The state holds a value that cannot be stored; names its path, its type and a fix."""


class CheckpointDamaged(CheckpointError, ValueError):
    """A file of the checkpoint is missing, truncated, or has other bytes than the written ones."""


class CheckpointTooNew(CheckpointError):
    """A later version of stagecast wrote the checkpoint, in a format that this one cannot read."""


class CheckpointMismatch(CheckpointError):
    """The checkpoint belongs to another model or run; names the keys and shapes that differ."""


class CheckpointNotFound(CheckpointError, LookupError):
    """There is no such checkpoint."""


class CheckpointsFailing(CheckpointError):
    """Several checkpoints in a row could not be made durable, so further training would be at risk."""


class UploadError(CheckpointError):
    """A remote store of checkpoints is unreachable, or refuses access."""


class RunCancelled(StagecastError):
    """The run was cancelled before it finished, so it has no result."""


class TrainingThreadStuck(StagecastError):
    """The training thread did not reach a step boundary within the grace period; the message shows where it hangs."""
