"""A sink that writes TensorBoard's event files.

`tensorboardX` provides the messages and its `SummaryWriter`, but this module writes the file: tensorboardX's own writer
(a queue between processes, two threads, a checksum in plain Python) holds the interpreter lock for more than 100 us per
step. Here scalars are encoded by hand, a library in C computes the checksums, and a batch is one write.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, ClassVar, Protocol

import msgspec

from events.bounds import INT_MAX
from events.log import logger
from events.messages import (
    AudioLogged,
    Event,
    HistogramLogged,
    ImageLogged,
    RunEnded,
    RunResumed,
    RunStarted,
    TableLogged,
    TextLogged,
)
from events.metrics import METRIC_TYPES, hyperparameters, metric_name, metrics_of
from events.sink import Delivery, RunInfo, require
from events.strict import Strict
from sinks.files.appended import (
    AppendedFile,
    Media,
    check_path,
    make_folders,
    newer,
    open_file,
    path_in,
    position_of,
    read_media,
    read_text,
    warn_of_another,
)
from sinks.files.event_files import EVENT_FILE, Mark, continue_in, encode_scalars, event_records, mark_record
from sinks.files.tables import markdown_of, read_table

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter  # type: ignore[import-untyped]


class TensorBoard(Strict, frozen=True):
    """Writes numbers, histograms, images, audio, texts, and the arguments as hyperparameters for TensorBoard::

        Trainer(module, arguments, sinks=[TensorBoard()]).train()
        $ tensorboard --logdir runs

    Numbers have their names in `events.metrics.metrics_of`, their ``global_step`` and the time of their event;
    TensorBoard stores them in single precision. It has no tables: texts show their first 100 rows. The
    arguments, nested ones as ``outer/inner``, appear in the tab HPARAMS with all numbers of all runs below
    TensorBoard's folder. A resumed run writes a new file to the same folder, and makes TensorBoard hide the superseded
    steps. Each event is written once: a replay to the run's own folder only adds missing events at the end. Only one
    run at a time may write to a folder.

    For other data, use tensorboardX's own writer, which writes to the same file::

        class WithGraph(TensorBoard, frozen=True):
            def open(self, run):
                writer = super().open(run)
                writer.summary_writer.add_custom_scalars(...)
                return writer
    """

    dir: str | None = None
    """The folder, which is one run in TensorBoard. None: ``tensorboard`` in the run folder."""

    # Lossless, because gaps in a curve are invisible. A latency of one second makes thousands of events one write, and
    # does not show, because TensorBoard polls every few seconds.
    delivery: ClassVar[Delivery] = Delivery(
        types=METRIC_TYPES
        | {RunStarted, RunResumed, RunEnded, HistogramLogged, ImageLogged, AudioLogged, TableLogged, TextLogged},
        overflow="catch_up",
        latency_s=1.0,
        batch=8_192,
        timeout_s=30.0,
        retries=20,
    )

    def __post_init__(self) -> None:
        check_path(self.dir, "TensorBoard(dir")

    def check(self) -> None:
        """Raise `SinkMisconfigured` if the client is not installed."""
        for module in ("tensorboardX", "google_crc32c"):
            require(module, "tensorboard", "the sink TensorBoard")

    def open(self, run: RunInfo) -> TensorBoardWriter:
        """Start a file.

        Raises:
            SinkMisconfigured: No folder is given, and the run has none; or the client is not installed.
            OSError: The folder or file cannot be created, or another process writes the run there.
        """
        self.check()
        return TensorBoardWriter(path_in(run, self.dir, "tensorboard", "TensorBoard"), run.run_id, run.run_dir)


class TensorBoardWriter:
    """An open `TensorBoard`. Only waits for the disk.

    Args:
        folder: The folder of event files.
        run_id: The run.
        run_dir: The run folder, with the files of images and texts.
    """

    def __init__(self, folder: str, run_id: str, run_dir: str | None) -> None:
        self._folder = folder
        self._run_id = run_id
        self._run_dir = run_dir
        self._messages = _import_client()
        make_folders(folder, run_dir)
        self._reached = continue_in(folder, run_id, run_dir)
        self._is_continued = self._reached != Mark()  # until the first event
        # `summary_writer` may be used on any thread.
        self._lock = threading.Lock()
        self._file = AppendedFile(_new_file(folder, run_dir), run_dir)
        try:
            start = self._messages.event(wall_time=time.time(), file_version="brain.Event:2")
            self._append([start.SerializeToString()])
        except BaseException:  # close the file first
            self._file.close()
            raise

    @functools.cached_property
    def summary_writer(self) -> SummaryWriter:
        """A `tensorboardX.SummaryWriter` of this file, for data that this sink does not write.

        It writes at once, on any thread, in the order of the calls. Its ``add_scalars`` and ``add_hparams`` start files
        of their own in subfolders, as in tensorboardX. It is closed with the sink.
        """
        return _summary_writer(self._folder, lambda message: self._append([message.SerializeToString()]))

    def write(self, events: Sequence[Event]) -> None:
        """Append the records of events. Raises `OSError` if the disk fails; nothing is added then."""
        if events and self._is_continued:
            self._check_run(events[0])
        events = newer(events, self._reached.position)
        if not events:
            return
        records = [record for event in events if (record := self._record_of(event)) is not None]
        reached = self._reached.reached(position_of(events[-1]), max(event.time for event in events))
        if records:
            self._append(records, reached)
        else:
            self._reached = reached

    def close(self) -> None:
        """Flush to the disk and close the file."""
        try:
            if "summary_writer" in vars(self):
                self.summary_writer.close()  # files that it has started itself
        finally:
            self._file.close()

    def _check_run(self, first: Event) -> None:
        """Start from position 0 if the folder has another run of the same name, with the same numbers."""
        self._is_continued = False
        if position_of(first) <= self._reached.position and self._reached.is_before(first.time):
            warn_of_another("TensorBoard", self._folder, self._run_id)
            self._reached = Mark()

    def _append(self, records: list[bytes], reached: Mark | None = None) -> None:
        block = event_records(records)
        with self._lock:
            self._file.append(block + mark_record(self._run_id, reached or self._reached))
            if reached is not None:
                self._reached = reached

    def _record_of(self, event: Event) -> bytes | None:
        """The record of an event; None for other events, or if no message can represent it."""
        if metrics := metrics_of(event):
            return encode_scalars(event, metrics)
        try:
            message = self._message_of(event)
            if message is None:
                return None
            message.wall_time = event.time
            return message.SerializeToString()
        except (ValueError, TypeError, OverflowError) as error:  # invalid numbers, so a retry cannot help
            logger.warning(f"TensorBoard skips {type(event).__name__} (seq {event.seq}): {error}")
            return None

    def _message_of(self, event: Event) -> _Message | None:
        """The message of an event without metrics; None for other events."""
        messages = self._messages
        match event:
            case HistogramLogged():
                value = messages.histogram(event) if sum(event.counts) else None
            case ImageLogged():
                data = read_media(self._run_dir, event, "TensorBoard")
                value = None if data is None else messages.image(event, data)
            case AudioLogged():
                data = read_media(self._run_dir, event, "TensorBoard")
                value = None if data is None else messages.audio(event, data)
            case TableLogged():
                table = read_table(self._run_dir, event, "TensorBoard")
                value = None if table is None else messages.text(_tag(event), markdown_of(table))
            case TextLogged():
                value = messages.text(_tag(event), read_text(self._run_dir, event, "TensorBoard"))
            case RunStarted():
                value = messages.session_start(event)
            case RunEnded(status="finished"):
                # TensorBoard keeps the first end that it reads, and a run with another status may be resumed.
                value = messages.session_end(event)
            case RunResumed():
                # Hides all data in this folder from this step on, because it is superseded.
                return messages.event(step=min(event.global_step + 1, INT_MAX), session_log=messages.session_log_start)
            case _:
                return None
        return None if value is None else messages.event(step=event.global_step, summary={"value": [value]})


def _new_file(folder: str, run_dir: str | None) -> str:
    """Create the next event file of a folder.

    Its name sorts after all others, independent of the clock: TensorBoard reads the files in that order, and never
    returns to an earlier one.
    """
    stamps = [int(found[1]) for name in os.listdir(folder) if (found := EVENT_FILE.match(name))]
    for stamp in itertools.count(max([int(time.time()), *[one + 1 for one in stamps]])):
        path = os.path.join(folder, f"events.out.tfevents.{stamp}.{socket.gethostname()}.{os.getpid()}")
        try:
            os.close(open_file(path, run_dir, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable: there is always a next number")


class _Message(Protocol):
    """An ``Event`` of TensorBoard's protocol buffers."""

    wall_time: float

    def SerializeToString(self) -> bytes: ...  # noqa: N802  # the name of the protocol buffers' method


def _import_client() -> _Messages:
    """Import tensorboardX, without torch where torch is not loaded.

    tensorboardX imports torch only to recognise tensors. In a sink host there are none, and the import would take two
    seconds and 200 MB.
    """
    is_without_torch = "torch" not in sys.modules and "tensorboardX" not in sys.modules
    if is_without_torch:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes its import fail
    try:
        return _Messages()
    finally:
        if is_without_torch:
            sys.modules.pop("torch", None)


class _Messages:
    """Builds all messages but scalars, with protocol buffers."""

    def __init__(self) -> None:
        self._event = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summary = importlib.import_module("tensorboardX.proto.summary_pb2")
        self._hparams = importlib.import_module("tensorboardX.proto.plugin_hparams_pb2")
        self._api = importlib.import_module("tensorboardX.proto.api_pb2")
        self._summaries = importlib.import_module("tensorboardX.summary")
        self.session_log_start: object = self._event.SessionLog(status=self._event.SessionLog.START)

    def event(self, **fields: object) -> _Message:
        """An ``Event``, which is one record."""
        message: _Message = self._event.Event(**fields)
        return message

    def histogram(self, event: HistogramLogged) -> object:
        """The event's bins, at least one of which has an element."""
        bins, num = len(event.counts), sum(event.counts)
        # Divided before the subtraction, which may overflow.
        width = event.high / bins - event.low / bins
        edges = [event.low + width * index for index in range(1, bins)] + [event.high]
        # Each element counts as its bin's middle, with an error of at most half a bin. TensorBoard shows neither sum.
        middles = [edge - width / 2 for edge in edges]
        total = sum(count * middle for count, middle in zip(event.counts, middles, strict=True))
        squares = sum(count * middle * middle for count, middle in zip(event.counts, middles, strict=True))
        moments = (num, total, squares)
        return self._summaries.histogram_raw(_tag(event), event.low, event.high, *moments, edges, event.counts).value[0]

    def image(self, event: ImageLogged, data: bytes) -> object:
        """An encoded image."""
        height, width = (size if 0 <= size < 2**31 else 0 for size in (event.height, event.width))
        image = self._summary.Summary.Image(height=height, width=width, encoded_image_string=data)
        return self._summary.Summary.Value(tag=_tag(event), image=image)

    def audio(self, event: AudioLogged, data: bytes) -> object:
        """An encoded sound."""
        audio = self._summary.Summary.Audio(
            sample_rate=event.rate,
            num_channels=event.channels,
            length_frames=event.frames,
            encoded_audio_string=data,
            content_type="audio/wav",
        )
        return self._summary.Summary.Value(tag=_tag(event), audio=audio)

    def text(self, tag: str, text: bytes) -> object:
        """A text under exactly this tag, to which tensorboardX would append a suffix."""
        value = self._summaries.text(tag, text.decode("utf-8", "replace")).value[0]
        value.tag = tag
        return value

    def session_start(self, event: RunStarted) -> object:
        """The run's arguments. There is no summary of the experiment, so TensorBoard collects the names of arguments
        and metrics from all runs."""
        info = self._hparams.SessionStartInfo(start_time_secs=event.time)
        for name, value in _flat(hyperparameters(event), ""):
            kind = "bool" if isinstance(value, bool) else "string" if isinstance(value, str) else "number"
            setattr(info.hparams[name], f"{kind}_value", value)
        return self._hparams_value("_hparams_/session_start_info", session_start_info=info)

    def session_end(self, event: RunEnded) -> object:
        """The end of a finished run."""
        info = self._hparams.SessionEndInfo(status=self._api.Status.Value("STATUS_SUCCESS"), end_time_secs=event.time)
        return self._hparams_value("_hparams_/session_end_info", session_end_info=info)

    def _hparams_value(self, tag: str, **info: object) -> object:
        content = self._hparams.HParamsPluginData(version=0, **info).SerializeToString()
        metadata = self._summary.SummaryMetadata
        plugin = metadata.PluginData(plugin_name="hparams", content=content)
        return self._summary.Summary.Value(tag=tag, metadata=metadata(plugin_data=plugin))


def _summary_writer(folder: str, add_event: Callable[[_Message], None]) -> SummaryWriter:
    """A `tensorboardX.SummaryWriter` that passes each message to ``add_event``."""
    client = importlib.import_module("tensorboardX")

    class Writer(client.SummaryWriter):  # type: ignore[misc, name-defined]  # known at run time only
        file_writer: object

        # All its methods get their writer from this one.
        def _get_file_writer(self) -> object:
            if self.file_writer is None:
                # Without its constructor, which would start a file and threads.
                self.file_writer = file = client.FileWriter.__new__(client.FileWriter)
                file.event_writer = SimpleNamespace(
                    add_event=add_event, get_logdir=lambda: folder, flush=lambda: None, close=lambda: None
                )
                file._default_metadata = {}
                self.all_writers = {folder: file}
            return self.file_writer

    return Writer(folder)


def _flat(value: object, name: str) -> list[tuple[str, bool | float | str]]:
    """Nested arguments as names and values, without None."""
    if isinstance(value, dict):
        items = [_flat(item, f"{name}/{key}" if name else _unicode(str(key))) for key, item in value.items()]
        return [one for found in items for one in found]
    if value is None:
        return []
    if not isinstance(value, bool | int | float):
        value = _unicode(value if isinstance(value, str) else msgspec.json.encode(value).decode())
    return [(_unicode(name), value)]


def _tag(event: HistogramLogged | Media) -> str:
    return _unicode(metric_name(event.name, event.key))


def _unicode(text: str) -> str:
    """Escape lone surrogates, which messages cannot represent."""
    return text.encode("utf-8", "backslashreplace").decode()
