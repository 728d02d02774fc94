"""The events of a run: frozen structs of plain host values, named as past-tense facts.

Every event starts with the same header, so charts, journals and wires handle any of them without knowing its type.
Names contain units (``wait_s``, ``queued_bytes``). Tensors for callbacks travel in the bus's in-process
`events.Payload`: a delivered event never holds a tensor.

The bus completes an event before delivery: the pump assigns ``seq``, because it alone knows the order in which threads
published, and reads numbers that were still on the device (`Event.deferred`). Afterwards the event is immutable.

``run_id``, ``attempt`` and ``seq`` together are the identity of an event. Delivery is at least once; deduplicate by
this identity.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from events.bounds import AttemptNumber, Count, Int64, UnixTime

StageName = Literal["train", "val", "test"]
Status = Literal["finished", "stopped", "cancelled", "failed"]


class Event(msgspec.Struct, frozen=True, gc=False, tag=True, tag_field="type", omit_defaults=True):
    """The header that all events share.

    Attributes:
        run_id: The run's name; with ``attempt`` and ``seq`` the identity of the event.
        attempt: 1 for a run's first process, one more each time the run is resumed or started again.
        seq: Position in the run's history, from 1; it rises over all attempts. 0 until the pump has assigned it.
        time: Unix seconds of the event (not of its delivery).
        rank: Distributed rank that published it; 0 in a single process.
        global_step: Optimizer steps finished at that time.
        epoch: Training epoch, from 0.
        stage: ``"train"``, ``"val"``, ``"test"``, or None outside of any stage.
    """

    run_id: str
    attempt: AttemptNumber
    seq: Count
    time: UnixTime
    rank: Count
    global_step: Count
    epoch: Count
    stage: StageName | None

    __test__: ClassVar[bool] = False  # pytest must not collect `TestStepEnded`
    droppable: ClassVar[bool] = False
    """Whether the bus may drop it, oldest first and counted, when the host's event loop stays blocked."""
    journalled: ClassVar[bool] = True
    """Whether the journal stores it. Frequent events that are only published on demand are not stored."""
    deferred: ClassVar[tuple[str, ...]] = ()
    """Fields that may hold a tensor of one element until the bus's readback has replaced it by the number."""


# ------------------------------------------------------------------------------------------------ the run


class RunStarted(Event, frozen=True, gc=False, tag=True):
    """An attempt at a run started; the first event of each attempt."""

    module: str
    """Qualified name of the module's class."""
    epochs: Int64 | None
    """Epochs after which the run ends; None: ``max_steps`` alone ends it."""
    steps_per_epoch: Int64 | None = None
    """Estimated optimizer steps of an epoch; None when the data has no length."""
    max_steps: Int64 | None = None
    arguments: dict[str, Any] = {}
    """The run's `TrainerArguments` as plain values."""
    device: str = "cpu"
    versions: dict[str, str] = {}
    """Versions of python, torch and stagecast."""
    host: str = ""
    pid: Int64 = 0
    config: dict[str, Any] = {}
    """The user's own hyperparameters as plain values: ``Trainer(config=...)``, and the arguments that `trainer.launch`
    or ``stagecast train`` passed to a factory. Secrets are masked."""
    best: str | None = None
    """The metric by which the best checkpoints are kept (`Checkpoints.best`); None without one."""
    best_mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest value of ``best`` is the best."""
    total_steps: Int64 | None = None
    """Estimated optimizer steps of the whole run, by every limit; None when unknown."""
    command_line: str | None = None
    """The command line of the process, or of the one that launched it, quoted for a shell. Secrets are masked."""
    git_commit: str | None = None
    """The commit that was checked out where the module's class is defined, or else in the working directory. None:
    unknown."""
    git_dirty: bool | None = None
    """Whether tracked files differed from the commit; None: unknown."""


class RunResumed(Event, frozen=True, gc=False, tag=True):
    """An attempt continues from ``global_step``: it supersedes later steps of earlier attempts."""

    checkpoint: str | None = None
    """Name of the checkpoint whose state it restored; None if it started from the beginning."""
    after_seq: Int64 | None = None
    """Step-bound events of earlier attempts with a greater ``seq`` are superseded; None: those with a greater
    ``global_step``."""


class RunEnded(Event, frozen=True, gc=False, tag=True):
    """The loop has ended: no step follows. Observers may still be draining."""

    status: Status
    reason: str | None = None
    """The reason for an end before the last step: that of the stop, or the exception's type and text."""
    traceback: str | None = None
    """Traceback of the exception that ended the run, with its causes; a long one is cut in the middle."""
    phase: str | None = None
    """The phase of the loop that failed: the name of a method or hook, or a few words."""


class RankEnded(Event, frozen=True, gc=False, tag=True):
    """A rank of an earlier attempt has reported why it ended; published by the next attempt if rank 0 has died."""

    ended_attempt: Int64
    ended_rank: Int64
    host: str
    status: Status
    reason: str | None = None
    phase: str | None = None
    """The phase of the loop of the rank that failed: the name of a method or hook, or a few words."""


# --------------------------------------------------------------------------------------------- the stages


class TrainEpochStarted(Event, frozen=True, gc=False, tag=True):
    """A training epoch has started; published before its first forward."""

    steps: Int64 | None = None
    """Optimizer steps expected in this epoch; None when the data has no length."""
    total_steps: Int64 | None = None
    """Estimated optimizer steps of the whole run, as in `RunStarted`, now that this epoch's data is known."""


class TrainStepEnded(Event, frozen=True, gc=False, tag=True):
    """An optimizer step is finished."""

    loss: float | None = None
    """Mean loss over the step's rows; NaN and infinities are kept. None if it could not be read."""
    step_in_epoch: Int64 = 0
    """Optimizer steps finished in this epoch, including this one."""
    rows: Int64 | None = None
    """Rows trained in this step; None if they could not be counted."""
    step_s: float = 0.0
    """Host time since the previous step, including the wait for data, in seconds."""
    lr: float | None = None
    """Learning rate of the first optimizer's first parameter group in this step."""
    grad_norm: float | None = None
    """Total gradient norm before clipping; None when gradients are not clipped."""
    non_finite_gradient: float | None = None
    """Positive when a gradient was NaN or infinite; None otherwise, and when `grad_norm` shows it."""
    weight: float | None = None
    """The step's weight in means, if the module has a ``batch_weight``; None: its rows."""

    droppable: ClassVar[bool] = True
    deferred: ClassVar[tuple[str, ...]] = ("loss", "lr", "grad_norm", "non_finite_gradient", "weight")


class BackwardEnded(Event, frozen=True, gc=False, tag=True):
    """The backward pass of one micro-batch is finished. Built only while an observer subscribes to it."""

    loss: float | None = None
    micro_step: Int64 = 0
    """Index of the micro-batch within its optimizer step, from 0."""

    droppable: ClassVar[bool] = True
    deferred: ClassVar[tuple[str, ...]] = ("loss",)
    journalled: ClassVar[bool] = False


class ValEpochStarted(Event, frozen=True, gc=False, tag=True):
    """Validation over one dataloader has started."""

    key: str = "default"
    steps: Int64 | None = None


class ValStepEnded(Event, frozen=True, gc=False, tag=True):
    """One validation batch is done. Built only while an observer subscribes to it."""

    key: str = "default"
    step: Int64 = 0
    """Batches done, including this one."""

    droppable: ClassVar[bool] = True
    journalled: ClassVar[bool] = False


class ValEpochEnded(Event, frozen=True, gc=False, tag=True):
    """Validation over one dataloader is finished."""

    key: str = "default"
    steps: Int64 = 0
    rows: Int64 | None = None
    duration_s: float = 0.0
    loss: float | None = None
    """Mean of the first outputs of ``val_step``, weighted by ``batch_weight`` or rows; None if they are not losses."""

    deferred: ClassVar[tuple[str, ...]] = ("loss",)


class TestEpochStarted(Event, frozen=True, gc=False, tag=True):
    """Testing over one dataloader has started."""

    key: str = "default"
    steps: Int64 | None = None


class TestStepEnded(Event, frozen=True, gc=False, tag=True):
    """One test batch is done. Built only while an observer subscribes to it."""

    key: str = "default"
    step: Int64 = 0

    droppable: ClassVar[bool] = True
    journalled: ClassVar[bool] = False


class TestEpochEnded(Event, frozen=True, gc=False, tag=True):
    """Testing over one dataloader is finished."""

    key: str = "default"
    steps: Int64 = 0
    rows: Int64 | None = None
    duration_s: float = 0.0
    loss: float | None = None

    deferred: ClassVar[tuple[str, ...]] = ("loss",)


class TrainEpochEnded(Event, frozen=True, gc=False, tag=True):
    """A training epoch is finished, including its validation."""

    steps: Int64 = 0
    """Optimizer steps finished in this epoch."""
    duration_s: float = 0.0
    loss: float | None = None
    """Mean of the epoch's step losses, weighted by ``batch_weight`` or rows: ``train_epoch_loss``. None if steps were
    dropped because the event loop was blocked."""


# -------------------------------------------------------------------------------------- metrics and health


class MetricsLogged(Event, frozen=True, gc=False, tag=True):
    """Numbers that user code logged with `ModuleInterface.log`.

    With several ranks, those of training are of rank 0's part of the batch; `RankReported` has means of all ranks.
    Those of evaluations, and values of metric objects, are of all ranks.
    """

    metrics: dict[str, float]
    # In the order of logging. Values may be deferred, like fields (`Event.deferred`).
    key: str | None = None
    """Their evaluation dataloader; None for training."""
    of_seq: Int64 | None = None
    """``seq`` of the event whose hook logged them, perhaps much later; None outside of such hooks."""

    droppable: ClassVar[bool] = True


class HistogramLogged(Event, frozen=True, gc=False, tag=True):
    """The distribution of a tensor's elements, logged with `trainer.Histogram`: equal bins between its extremes."""

    name: str
    low: float = 0.0
    """The smallest finite element, the start of the first bin."""
    high: float = 0.0
    """The largest finite element, the end of the last bin. Equal to ``low`` if there is only one value."""
    counts: list[float] = []
    """Finite elements in each bin."""
    non_finite: float = 0.0
    """Elements that are NaN or infinite."""
    key: str | None = None
    """Its evaluation dataloader; None for training."""
    of_seq: Int64 | None = None
    """As in `MetricsLogged`."""

    droppable: ClassVar[bool] = True
    deferred: ClassVar[tuple[str, ...]] = ("low", "high", "counts", "non_finite")


class ImageLogged(Event, frozen=True, gc=False, tag=True):
    """An image, or a drawn figure, was written to a file in the run folder."""

    name: str
    path: str
    """Relative to the run folder, with slashes."""
    width: Int64 = 0
    height: Int64 = 0
    nbytes: Int64 = 0
    key: str | None = None
    of_seq: Int64 | None = None

    droppable: ClassVar[bool] = True


class AudioLogged(Event, frozen=True, gc=False, tag=True):
    """A sound was written to a WAV file in the run folder."""

    name: str
    path: str
    """Relative to the run folder, with slashes."""
    rate: Int64 = 0
    """Samples per second and channel."""
    channels: Int64 = 0
    frames: Int64 = 0
    """Samples per channel."""
    nbytes: Int64 = 0
    key: str | None = None
    of_seq: Int64 | None = None

    droppable: ClassVar[bool] = True


TableCell = bool | int | float | str | None
"""A cell of a logged table; numbers that are not finite are texts, such as ``NaN``."""


class TableContent(msgspec.Struct):
    """The content of the file of `TableLogged`, in JSON."""

    columns: list[str]
    rows: list[list[TableCell]]
    cut: str | None = None
    """As in `TableLogged`."""


class TableLogged(Event, frozen=True, gc=False, tag=True):
    """A table was written to a file in the run folder, as JSON of `TableContent`."""

    name: str
    path: str
    """Relative to the run folder, with slashes."""
    columns: list[str] = []
    rows: Int64 = 0
    """Rows in the file."""
    cut: str | None = None
    """The kept part if something was cut, in words: ``the first 1,000 of 5,000 rows``."""
    nbytes: Int64 = 0
    key: str | None = None
    of_seq: Int64 | None = None

    droppable: ClassVar[bool] = True


class TextLogged(Event, frozen=True, gc=False, tag=True):
    """A text, logged under a name."""

    name: str
    text: str
    """The whole text, or its beginning if ``path`` is given."""
    path: str | None = None
    """The file of a long text, in UTF-8; relative to the run folder, with slashes."""
    key: str | None = None
    of_seq: Int64 | None = None

    droppable: ClassVar[bool] = True


class OperatorTime(msgspec.Struct, frozen=True, gc=False):
    """An operator, or a kernel of the device, in a trace."""

    name: str
    calls: Int64 = 0
    self_s: float = 0.0
    """Seconds of all calls, without those of operators within."""
    on_device: bool = False
    """Whether it is a kernel or a copy, with its time on the device."""


class TraceSaved(Event, frozen=True, gc=False, tag=True):
    """`trainer.callbacks.Profiler` has written the trace of a window of steps."""

    path: str
    """Relative to the run folder, with slashes, or absolute if it is elsewhere."""
    nbytes: Int64 = 0
    first_step: Int64 = 0
    last_step: Int64 = 0
    operators: list[OperatorTime] = []
    """The longest operators, and the longest kernels."""


class GpuSample(msgspec.Struct, frozen=True, gc=False):
    """One GPU at one moment."""

    index: Int64
    name: str = ""
    utilization_percent: float | None = None
    memory_used_bytes: Int64 | None = None
    memory_total_bytes: Int64 | None = None
    power_w: float | None = None
    temperature_c: float | None = None


class SystemSampled(Event, frozen=True, gc=False, tag=True):
    """Usage of the machine and this process, at one moment or since the previous sample. None: unknown here."""

    cpu_percent: float | None = None
    """Of all cores of the machine, 0 to 100."""
    process_cpu_percent: float | None = None
    """Of this process and its children, in percent of one core: up to 100 times the cores."""
    memory_used_bytes: Int64 | None = None
    memory_total_bytes: Int64 | None = None
    process_memory_bytes: Int64 | None = None
    """Resident memory of this process and its children."""
    disk_used_percent: float | None = None
    """Of the run folder's file system."""
    disk_read_bytes_per_s: float | None = None
    disk_written_bytes_per_s: float | None = None
    network_received_bytes_per_s: float | None = None
    network_sent_bytes_per_s: float | None = None
    gpus: list[GpuSample] = []

    droppable: ClassVar[bool] = True


class NonFiniteLoss(Event, frozen=True, gc=False, tag=True):
    """A loss was NaN or infinite. ``global_step`` is its step."""

    loss: float
    action: Literal["warned", "skipped", "stopped"]
    consecutive: Int64 = 1
    """Number of such steps in a row, including this one."""
    of_seq: Int64 | None = None
    """``seq`` of the step's event, if the loss was read later."""

    droppable: ClassVar[bool] = True
    deferred: ClassVar[tuple[str, ...]] = ("loss",)


class MonitorMissing(Event, frozen=True, gc=False, tag=True):
    """A validation (or an epoch, in a run that does not validate) lacks a monitored metric; the monitor skipped it."""

    monitor: str
    """The metric's name."""
    wanted_by: str
    """The monitor: ``Checkpoints(best=)``, ``ReduceLROnPlateau``, or a callback."""
    known: list[str] = []
    """The available metrics."""


class NonFiniteGradient(Event, frozen=True, gc=False, tag=True):
    """A gradient was NaN or infinite while the loss was finite. ``global_step`` is its step."""

    action: Literal["warned", "skipped", "stopped"]
    consecutive: Int64 = 1
    """Number of such steps in a row, including this one."""
    of_seq: Int64 | None = None
    """``seq`` of the step's event, if the gradients were read later."""

    droppable: ClassVar[bool] = True


class StepSkipped(Event, frozen=True, gc=False, tag=True):
    """The optimizers skipped a step, so ``global_step`` and the schedulers did not advance.

    With manual optimization one optimizer skipped one update, and ``global_step`` advances.
    """

    reason: Literal["non_finite_loss", "gradient_overflow", "non_finite_gradient", "no_loss"]
    """``gradient_overflow``: float16's loss scale was too large and was reduced. Usual at the start. ``no_loss``:
    `train_step` returned None for every batch of the step."""

    droppable: ClassVar[bool] = True


class WarningLogged(Event, frozen=True, gc=False, tag=True):
    """The trainer, a sink or a callback logged a warning or an error.

    A warning that another event reports, such as `ObserverFailed`, is not published a second time.
    """

    level: Literal["warning", "error"]
    message: str
    exception: str | None = None
    """Traceback of its exception, with the causes; a long one is cut in the middle."""
    repeats: Int64 = 0
    """Identical messages since the last such event, which were not published."""


# ----------------------------------------------------------------------------------------------- observers


class ObserverFailed(Event, frozen=True, gc=False, tag=True):
    """An observer (a sink or a callback) raised, hung beyond its timeout, or could not be opened."""

    observer: str
    error: str
    """The exception's type and text."""
    during: str = ""
    """The failed call: a hook's name, ``open``, ``write`` or ``close``."""
    action: Literal["fatal", "disabled", "retrying"] = "disabled"
    failures: Int64 = 1
    """Failures in a row."""


class ObserverRecovered(Event, frozen=True, gc=False, tag=True):
    """An observer that had failed delivers again."""

    observer: str
    failures: Int64 = 0
    outage_s: float = 0.0


class ObserverDropped(Event, frozen=True, gc=False, tag=True):
    """An observer's overflow policy dropped events. Counts are since the last such event."""

    observer: str
    """The observer's name, or ``"bus"`` when the ring itself overflowed, for all observers."""
    dropped: Int64 = 0
    conflated: Int64 = 0
    """Replaced by a newer event of the same key."""


class ObserverSlow(Event, frozen=True, gc=False, tag=True):
    """One call of an observer has been running for a long time; it is still running."""

    observer: str
    during: str
    running_s: float


class ObserverHealth(msgspec.Struct, frozen=True, gc=False):
    """The health of one observer. Counts are since the attempt's start."""

    observer: str
    state: Literal["ok", "failing", "disabled"] = "ok"
    queued: Int64 = 0
    """Queued events, including those in the current delivery."""
    lag_s: float | None = None
    """Age of the oldest queued event, in seconds; None if the queue is empty."""
    delivered: Int64 = 0
    dropped: Int64 = 0
    conflated: Int64 = 0


class ObserversReported(Event, frozen=True, gc=False, tag=True):
    """The health of the observers in the run's process, or in its sink host; published with the ledger."""

    observers: list[ObserverHealth]

    droppable: ClassVar[bool] = True


class LoopHeld(Event, frozen=True, gc=False, tag=True):
    """The training loop waits, or has waited, for a fence, a full queue or a checkpoint."""

    cause: Literal["fence", "backpressure", "checkpoint"]
    observers: list[str]
    wait_s: float
    """The wait so far."""
    released: bool = False


class JournalGap(Event, frozen=True, gc=False, tag=True):
    """The journal lacks events, because it could not write them or was too slow. Its own ``seq`` follows the gap."""

    first_seq: Int64
    last_seq: Int64
    lost: Int64
    reason: str


# --------------------------------------------------------------------------------------------- checkpoints


class CheckpointStaged(Event, frozen=True, gc=False, tag=True):
    """The state was copied to memory: training continues while the checkpoint is written. It is **not** durable."""

    checkpoint: str
    """Its name, ``step-N.aK``."""
    reasons: list[str]
    """The reasons for it: ``steps``, ``minutes``, ``epochs``, ``best``, ``command``, ``stop``, ``end``."""
    nbytes: Int64 = 0
    blocked_s: float = 0.0
    """Time that the loop waited."""
    command_ids: list[str] = []
    """The commands that requested it."""
    metric: float | None = None
    """The monitored metric of these weights, if there is one."""
    prefault_s: float | None = None
    """Time to set up the memory, off the loop's thread; only with the first copy to it."""


class CheckpointSkipped(Event, frozen=True, gc=False, tag=True):
    """A due checkpoint was skipped, because both copies in memory were still being written."""

    reasons: list[str]
    writing: list[str]
    """Names of the checkpoints being written."""
    busy_rank: Int64 = 0
    """The rank whose copies were being written."""


class CheckpointSaved(Event, frozen=True, gc=False, tag=True):
    """A checkpoint is complete and durable on the local disk. ``global_step`` is that of the checkpoint."""

    checkpoint: str
    path: str
    """Its folder."""
    nbytes: Int64 = 0
    durable_s: float = 0.0
    """Time since the snapshot of its state."""
    write_s: float = 0.0
    """The part of ``durable_s`` that was spent writing."""
    reasons: list[str] = []
    command_ids: list[str] = []
    metric: float | None = None
    missing: list[str] = []
    """Callbacks without state in it, because they were disabled before its snapshot."""


class CheckpointFailed(Event, frozen=True, gc=False, tag=True):
    """A checkpoint could not be made durable or uploaded. Earlier checkpoints are not affected."""

    checkpoint: str
    error: str
    during: Literal["stage", "write", "upload", "delete"] = "write"
    consecutive: Int64 = 1
    """Number of failures in a row, including this one."""
    command_ids: list[str] = []


class CheckpointUploading(Event, frozen=True, gc=False, tag=True):
    """Progress of an upload."""

    checkpoint: str
    url: str
    done_bytes: Int64
    total_bytes: Int64

    droppable: ClassVar[bool] = True


class CheckpointUploaded(Event, frozen=True, gc=False, tag=True):
    """A checkpoint is complete in the remote store."""

    checkpoint: str
    url: str
    nbytes: Int64 = 0
    duration_s: float = 0.0


class CheckpointDeleted(Event, frozen=True, gc=False, tag=True):
    """A checkpoint was deleted, because newer or better ones are kept."""

    checkpoint: str
    where: Literal["local", "remote"] = "local"


class WeightsSaved(Event, frozen=True, gc=False, tag=True):
    """The module's weights are durable in a file of their own, at the end of a run."""

    path: str
    nbytes: Int64 = 0
    checkpoint: str | None = None
    """The checkpoint with these weights; None: they are those of the last step."""


class CheckpointRejected(Event, frozen=True, gc=False, tag=True):
    """A checkpoint is damaged and was skipped on resume; an older one is tried."""

    checkpoint: str
    error: str


# ---------------------------------------------------------------------------------------------- the ledger


class StallLedger(msgspec.Struct, frozen=True, gc=False):
    """The loop's time by phase, in seconds. All rows except ``device_idle_s`` add up to ``wall_s``."""

    wall_s: float = 0.0
    compute_s: float = 0.0
    """Forward, backward, optimizer, scheduler, evaluation steps: the user's model on the loop's thread."""
    contention_s: float = 0.0
    """Estimated as the time that the loop's thread was off the CPU while bus and observer threads ran: an upper bound
    of its wait for the interpreter lock."""
    data_s: float = 0.0
    """Waiting for the next batch."""
    readback_s: float = 0.0
    """Waiting for a number from the device that the loop needs."""
    publish_s: float = 0.0
    """Building and publishing events, capturing outputs for callbacks."""
    inline_s: float = 0.0
    """Hooks that run on the loop's thread."""
    fence_s: float = 0.0
    """Waiting for fenced hooks."""
    backpressure_s: float = 0.0
    """Waiting for room in the full queue of a ``block`` subscription."""
    checkpoint_s: float = 0.0
    """Copying the state for a checkpoint, and waiting for memory to copy it to."""
    paused_s: float = 0.0
    other_s: float = 0.0
    """All other time."""
    device_idle_s: float | None = None
    """Device time between the end of one step's work and the start of the next; None without CUDA events."""
    steps: Int64 = 0


class LedgerReported(Event, frozen=True, gc=False, tag=True):
    """The stall ledger of the last interval, or of the whole attempt."""

    scope: Literal["interval", "run"]
    ledger: StallLedger


class RankReported(Event, frozen=True, gc=False, tag=True):
    """The state of one rank, every few seconds. Means are over the steps since its report before.

    All ranks take equally long for a step, because each waits for the slowest when gradients are exchanged. The
    slowest is the one with the longest ``before_exchange_s``.
    """

    droppable: ClassVar[bool] = True

    reported_rank: Count
    ranks: Count
    """Number of ranks of the run."""
    host: str
    phase: str
    """What its loop was doing: the name of a method or hook, or a few words."""
    steps: Count
    """Optimizer steps since the report before."""
    step_s: float | None
    """Mean wall time per step; None without steps."""
    before_exchange_s: float | None
    """Mean seconds of the loop per step for data, hooks, forward passes and all backward passes but the last, in which
    the gradients are exchanged. None if no step was measured."""
    ledger: StallLedger
    """Since the report before; ``compute_s`` includes contention."""
    memory_bytes: Count | None
    """Resident memory of its process; None where the system does not show it."""
    device_memory_bytes: Count | None
    """Memory that its process has reserved on its device; None on the CPU."""
    metrics: dict[str, float] = {}
    """Means of the finite numbers that its own module and callbacks logged in training since the report before. Those
    of `MetricsLogged` are rank 0's. The first 64 names."""


# ------------------------------------------------------------------------------------------------ commands


class CommandTaken(Event, frozen=True, gc=False, tag=True):
    """The loop received a command at a step boundary."""

    command: str
    """``stop``, ``pause``, ``resume`` or ``checkpoint``."""
    command_id: str
    reason: str | None = None


class UnknownEvent(Event, frozen=True, gc=False, tag=True):
    """An event of a type that this version does not know. Missing header fields are zero."""

    unknown_type: str
    raw: bytes
    """The encoded event, unchanged."""
    encoding: Literal["json", "msgpack"] = "json"


EVENT_TYPES: tuple[type[Event], ...] = (
    RunStarted,
    RunResumed,
    RunEnded,
    RankEnded,
    TrainEpochStarted,
    TrainStepEnded,
    BackwardEnded,
    ValEpochStarted,
    ValStepEnded,
    ValEpochEnded,
    TestEpochStarted,
    TestStepEnded,
    TestEpochEnded,
    TrainEpochEnded,
    MetricsLogged,
    HistogramLogged,
    ImageLogged,
    AudioLogged,
    TableLogged,
    TextLogged,
    TraceSaved,
    SystemSampled,
    NonFiniteLoss,
    NonFiniteGradient,
    MonitorMissing,
    StepSkipped,
    WarningLogged,
    ObserverFailed,
    ObserverRecovered,
    ObserverDropped,
    ObserverSlow,
    ObserversReported,
    LoopHeld,
    JournalGap,
    CheckpointStaged,
    CheckpointSkipped,
    CheckpointSaved,
    CheckpointFailed,
    CheckpointUploading,
    CheckpointUploaded,
    CheckpointDeleted,
    WeightsSaved,
    CheckpointRejected,
    LedgerReported,
    RankReported,
    CommandTaken,
)
"""Every type that a run publishes. `UnknownEvent` is only decoded."""
