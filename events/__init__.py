"""Host data and its transport: the events of a run, the bus, the journal, the run protocol. Never imports torch."""

__stagecast__ = True
"""Tells `trainer` and `sinks` that the package which they found under this generic name is ours."""

from events.packages import check_packages as _check_packages

_check_packages()

from events.bus.backlog import Payload as Payload
from events.bus.pump import Pump as Pump
from events.bus.pump import Readback as Readback
from events.bus.ring import Ring as Ring
from events.errors import ArgumentsError as ArgumentsError
from events.errors import BusClosed as BusClosed
from events.errors import CheckpointDamaged as CheckpointDamaged
from events.errors import CheckpointError as CheckpointError
from events.errors import CheckpointMismatch as CheckpointMismatch
from events.errors import CheckpointNotFound as CheckpointNotFound
from events.errors import CheckpointsFailing as CheckpointsFailing
from events.errors import CheckpointTooNew as CheckpointTooNew
from events.errors import CursorError as CursorError
from events.errors import FenceBroken as FenceBroken
from events.errors import RunCancelled as RunCancelled
from events.errors import RunFolderError as RunFolderError
from events.errors import RunFolderHeld as RunFolderHeld
from events.errors import RunFolderMismatch as RunFolderMismatch
from events.errors import SinkHostFailed as SinkHostFailed
from events.errors import SinkMisconfigured as SinkMisconfigured
from events.errors import StagecastError as StagecastError
from events.errors import TrainingThreadStuck as TrainingThreadStuck
from events.errors import UnstorableState as UnstorableState
from events.errors import UploadError as UploadError
from events.errors import WireError as WireError
from events.table.frame import frame as frame
from events.table.frame import runs as runs
