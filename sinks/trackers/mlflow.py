"""A sink that logs a run to an MLflow tracking server."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import msgspec

from events.errors import SinkMisconfigured
from events.masking import masked_url
from events.messages import AudioLogged, Event, ImageLogged, RunEnded, RunStarted, TableLogged, TextLogged
from events.metrics import METRIC_TYPES, hyperparameters, metric_name, metrics_of
from events.sink import Delivery, RunInfo, require
from events.strict import Strict
from sinks.files.appended import Media, Position, newer, position_of, read_media, read_text
from sinks.files.tables import read_table
from sinks.trackers.address import is_http_address

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

RUN_ID_TAG = "stagecast.run_id"
"""The tag by which an attempt finds the MLflow run of earlier attempts."""
STATUS_TAG = "stagecast.status"
"""The tag with `RunEnded.status`, which has more values than MLflow's."""
REASON_TAG = "stagecast.reason"
COMMIT_TAG = "mlflow.source.git.commit"
"""The tag by which MLflow shows the version of a run's source."""

_KINDS = {ImageLogged: "images .png", AudioLogged: "audio .wav", TableLogged: "tables .json", TextLogged: "texts .txt"}
_METRICS = 1_000
"""Maximum metrics per request of a server."""
_REQUEST_BYTES = 900_000
"""Maximum bytes per request; a server accepts 1,000,000."""
_PARAMETERS = 100
_KEY_CHARS = 250
_VALUE_CHARS = 6_000
_TAG_CHARS = 5_000
_FOREIGN = re.compile(r"[^\w.\- /]")
_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "cancelled": "KILLED", "failed": "FAILED"}


class MLflow(Strict, frozen=True):
    """Logs a run to MLflow: numbers, arguments, media, and how it ended::

        Trainer(module, arguments, sinks=[MLflow("http://mlflow.example:5000", experiment="digits")]).train()

    Numbers have their names in `events.metrics.metrics_of`, their ``global_step`` and the time of their event.
    Arguments are parameters, nested ones as ``outer/inner``, and complete in ``arguments.json``. Images are in
    ``images/NAME/STEP.png``, sounds in ``audio/NAME/STEP.wav``, tables in ``tables/NAME/STEP.json`` (the format of
    ``mlflow.log_table``), texts in ``texts/NAME/STEP.txt``. A stopped run is ``FINISHED``, a cancelled one
    ``KILLED``; the tag ``stagecast.status`` has the exact status. The tags ``mlflow.source.git.commit``,
    ``stagecast.git_dirty`` and ``stagecast.command_line`` have the run's origin. Histograms are skipped, because MLflow
    has none.

    All attempts at a run are one MLflow run, found by the tag ``stagecast.run_id``; it also contains superseded steps.
    MLflow never changes a parameter: an argument that a later attempt changes keeps its first value there, and has the
    new one in ``arguments.json``.

    An existing MLflow run is joined instead: ``mlflow_run_id``, the run that ``mlflow.start_run()`` has made active on
    the thread that starts the training, or ``MLFLOW_RUN_ID``. Its creator ends it.

    Invalid names and values are changed: each character of a name other than letters, digits, spaces and ``_-./``
    becomes ``_``, and a changed name, or one longer than 250 characters, ends in ``-`` and eight digits of its hash, so
    that names stay distinct; values of parameters are cut at 6,000 characters. NaN is kept; a database stores the
    largest number for an infinity.

    A database ignores a point that is delivered again, with the same name, step, time and value.

    MLflow's client waits up to a quarter of an hour by default, and is only configured by the environment. Opening this
    sink sets, for the whole process and unless they are set, ``MLFLOW_HTTP_REQUEST_MAX_RETRIES`` (to 0),
    ``MLFLOW_HTTP_REQUEST_TIMEOUT`` and ``MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT`` (to ``timeout_s``), and
    ``MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT``. If your own code uses MLflow, too, run the sink in a sink host
    (``sinks_in="process"``), which has its own environment.
    """

    tracking_uri: str | None = None
    """Address of the server. None: ``MLFLOW_TRACKING_URI``, or MLflow's default."""
    experiment: str | None = None
    """Name of the experiment, created if it does not exist. None: ``MLFLOW_EXPERIMENT_NAME``, or ``Default``."""
    run_name: str | None = None
    """The run's name in MLflow. None: its ``run_id``."""
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    mlflow_run_id: str | None = None
    """The MLflow run to log to. None: the active one or that of the environment, or one for this ``run_id``."""
    timeout_s: int = 5
    """Whole seconds that the server may take to accept a connection, and again to answer. Only the sink's delivery
    policy retries a request."""

    # Lossless, with retries for half a day, because a restarted server must not miss data. Each batch is a request, so
    # few large batches are cheaper.
    delivery: ClassVar[Delivery] = Delivery(
        types=METRIC_TYPES | {RunStarted, RunEnded, ImageLogged, AudioLogged, TableLogged, TextLogged},
        overflow="catch_up",
        latency_s=1.0,
        batch=4_096,
        retries=1_440,
        timeout_s=30.0,
    )

    def __post_init__(self) -> None:
        if not isinstance(self.timeout_s, int) or self.timeout_s < 1:
            raise ValueError(f"MLflow(timeout_s={self.timeout_s!r:.80}): timeout_s must be an integer >= 1")

    def check(self) -> None:
        """Raise `SinkMisconfigured` if the client is not installed or a setting is invalid."""
        require("mlflow", "mlflow", "the sink MLflow")
        _check_address(self.tracking_uri)
        for name, value in self.tags.items():
            if not name or not isinstance(value, str):
                raise SinkMisconfigured(f"MLflow(tags=...): {name!r:.80}={value!r:.80} must be a text with a name")

    def bound(self) -> MLflow:
        """The same sink for the MLflow run that is active on this thread; active runs are thread-local."""
        mlflow = sys.modules.get("mlflow")  # imported if a run is active
        active = mlflow.active_run() if mlflow is not None and self.mlflow_run_id is None else None
        return self if active is None else msgspec.structs.replace(self, mlflow_run_id=active.info.run_id)

    def open(self, run: RunInfo) -> MLflowWriter:
        """Join the named MLflow run, find that of earlier attempts, or create one.

        Raises:
            SinkMisconfigured: As `check`; or the experiment was deleted, or the server has no run of that name.
            Exception: MLflow's client raises it when the server does not answer. A retry may help.
        """
        self.check()
        _set_environment(self.timeout_s)
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.tracking_uri)
        if joined := self.mlflow_run_id or os.environ.get("MLFLOW_RUN_ID"):
            run_of_caller = _joined_run(client, joined)
            client.set_tag(joined, RUN_ID_TAG, run.run_id)
            return MLflowWriter(client, run_of_caller, run.run_dir, run_of_caller.data.tags, owned=False)
        experiment = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
        experiment_id = _experiment_id(client, experiment)
        found = _find_run(client, experiment_id, run.run_id)
        if found is None:
            tags = self.tags | {RUN_ID_TAG: run.run_id}
            found = client.create_run(experiment_id, tags=tags, run_name=self.run_name or run.run_id)
        elif found.info.status != "RUNNING":
            client.update_run(found.info.run_id, status="RUNNING")
        return MLflowWriter(client, found, run.run_dir, self.tags, owned=True)


class MLflowWriter:
    """An open `MLflow`. When `write` returns, the server has accepted all events.

    Args:
        run: The MLflow run, with its existing parameters.
        run_dir: The run folder, with the files of images and texts.
        kept_tags: The names of tags that are not changed when a run starts.
        owned: Whether this sink ends the MLflow run.
    """

    def __init__(
        self, client: MlflowClient, run: Run, run_dir: str | None, kept_tags: Iterable[str] = (), *, owned: bool
    ) -> None:
        self._owned = owned
        self._kept_tags = frozenset(kept_tags)
        self.mlflow_run_id: str = run.info.run_id
        self._client = client
        self._run_dir = run_dir
        self._parameters = dict(run.data.params)
        self._last = (0, 0)

    def write(self, events: Sequence[Event]) -> None:
        """Log events in order; a retry does not send accepted events again.

        Raises:
            Exception: MLflow's client raises it when the server does not answer in time, or refuses.
        """
        waiting: list[Metric] = []
        nbytes, reached = 0, self._last
        for event in newer(events, self._last):
            metrics = _metrics_of(event)
            size = sum(map(_nbytes, metrics))
            # Whole events, if possible: those of a failed request are sent again.
            if waiting and (not metrics or nbytes + size > _REQUEST_BYTES):
                self._log(waiting, reached)
                waiting, nbytes = [], 0
            if metrics:
                waiting += metrics
                nbytes += size
            else:
                self._log_other(event)
                self._last = position_of(event)
            reached = position_of(event)
        if waiting:
            self._log(waiting, reached)

    def close(self) -> None:
        """Do nothing. MLflow shows the run of a disabled sink as running, because the sink did not receive its end."""

    def _log(self, metrics: list[Metric], reached: Position) -> None:
        """Send all metrics up to a position; those of one event may need several requests."""
        for chunk in _chunks(metrics):
            self._client.log_batch(self.mlflow_run_id, metrics=chunk)
        self._last = reached

    def _log_other(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._log_arguments(event)
            case ImageLogged() | AudioLogged() | TableLogged() | TextLogged():
                self._log_media(event)
            case RunEnded():
                self._end(event)
            case _:
                pass

    def _log_arguments(self, event: RunStarted) -> None:
        from mlflow.entities import Param, RunTag

        described = {"module": event.module, "device": event.device} | hyperparameters(event)
        wanted = {mlflow_name(name): text[:_VALUE_CHARS] for name, text in _flat(described, "")}
        new = [(name, text) for name, text in wanted.items() if name not in self._parameters]
        for start in range(0, len(new), _PARAMETERS):
            some = new[start : start + _PARAMETERS]
            self._client.log_batch(self.mlflow_run_id, params=[Param(*one) for one in some])
            self._parameters.update(some)
        origin = {COMMIT_TAG: event.git_commit, "stagecast.command_line": event.command_line}
        if event.git_dirty is not None:
            origin["stagecast.git_dirty"] = str(event.git_dirty).lower()
        tags = [RunTag(name, text) for name, text in origin.items() if text and name not in self._kept_tags]
        if tags:
            self._client.log_batch(self.mlflow_run_id, tags=tags)
        self._upload("", "arguments.json", msgspec.json.format(msgspec.json.encode(event.arguments), indent=2))
        if event.config:
            self._upload("", "config.json", msgspec.json.format(msgspec.json.encode(event.config), indent=2))

    def _log_media(self, event: Media) -> None:
        """Store a file; that of a table has the format of `mlflow.log_table`, which pandas calls ``split``."""
        kind, suffix = _KINDS[type(event)].split()
        if isinstance(event, TextLogged):
            data: bytes | None = read_text(self._run_dir, event, "MLflow")
        elif isinstance(event, TableLogged):
            table = read_table(self._run_dir, event, "MLflow")
            data = None if table is None else msgspec.json.encode({"columns": table.columns, "data": table.rows})
        else:
            data = read_media(self._run_dir, event, "MLflow")
        if data is not None:
            name = mlflow_name(metric_name(event.name, event.key))
            self._upload(f"{kind}/{name}", f"{event.global_step:08d}{suffix}", data)

    def _upload(self, folder: str, name: str, data: bytes) -> None:
        """Store an artifact. The client takes its name from that of a local file."""
        with tempfile.TemporaryDirectory(prefix="stagecast-mlflow-") as temporary:
            path = os.path.join(temporary, name)
            with open(path, "wb") as file:
                file.write(data)
            self._client.log_artifact(self.mlflow_run_id, path, folder or None)

    def _end(self, event: RunEnded) -> None:
        from mlflow.entities import RunTag

        tags = {STATUS_TAG: event.status} | ({REASON_TAG: event.reason[:_TAG_CHARS]} if event.reason else {})
        self._client.log_batch(self.mlflow_run_id, tags=[RunTag(*one) for one in tags.items()])
        if not self._owned:
            return
        # Not `log_batch`: only this sets the run's end, and it may be repeated.
        self._client.set_terminated(self.mlflow_run_id, _STATUS[event.status], round(event.time * 1_000))


@lru_cache(maxsize=8_192)
def mlflow_name(name: str) -> str:
    """Convert a name by the rules of `MLflow`; a valid name is returned unchanged."""
    clean = _FOREIGN.sub("_", name)
    if (clean and posixpath.normpath(clean) != clean) or clean in ("", ".") or clean.startswith(("..", "/")):
        # MLflow reads names as paths, and refuses paths that are not normalised.
        clean = "/".join(part.replace("..", "_") for part in clean.split("/") if part not in ("", ".", "..")) or "_"
    if clean == name and len(name) <= _KEY_CHARS:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{clean[: _KEY_CHARS - 9].rstrip('/')}-{digest}"


def _metrics_of(event: Event) -> list[Metric]:
    from mlflow.entities import Metric

    milliseconds = max(0, round(event.time * 1_000))
    return [
        Metric(mlflow_name(name), float(value), milliseconds, event.global_step) for name, value in metrics_of(event)
    ]


def _chunks(metrics: list[Metric]) -> Iterator[list[Metric]]:
    """Split metrics into as few requests as possible, in order."""
    chunk: list[Metric] = []
    nbytes = 0
    for metric in metrics:
        size = _nbytes(metric)
        if chunk and nbytes + size > _REQUEST_BYTES:
            yield chunk
            chunk, nbytes = [], 0
        chunk.append(metric)
        nbytes += size
    if chunk:
        yield chunk


def _nbytes(metric: Metric) -> int:
    """Upper bound of the bytes of a metric in a request, which also bounds the metrics per request."""
    return max(6 * len(metric.key) + 120, _REQUEST_BYTES // _METRICS)


def _flat(value: object, name: str) -> list[tuple[str, str]]:
    """Nested arguments as names and texts."""
    if isinstance(value, Mapping) and value:
        return [one for key, item in value.items() for one in _flat(item, f"{name}/{key}" if name else str(key))]
    if isinstance(value, str):
        return [(name, value)]
    if isinstance(value, list | tuple | Mapping):
        return [(name, json.dumps(value, ensure_ascii=False, default=str))]
    return [(name, str(value))]


def _set_environment(timeout_s: int) -> None:
    """Configure the client, which only reads the environment; the user's values are kept."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(timeout_s))
    os.environ.setdefault("MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT", str(timeout_s))
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


def _joined_run(client: MlflowClient, mlflow_run_id: str) -> Run:
    """The run with this id.

    Raises:
        SinkMisconfigured: There is no such run.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(mlflow_run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise SinkMisconfigured(
                f"MLflow has no run {mlflow_run_id!r:.80}; correct or remove mlflow_run_id or MLFLOW_RUN_ID"
            ) from None
        raise


def _experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment's id; it is created if there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another run has created it meanwhile
    if found is None or found.lifecycle_stage != "active":
        raise SinkMisconfigured(
            f"the MLflow experiment {name!r:.200} was deleted; restore it, or set experiment to another name"
        )
    return str(found.experiment_id)


def _find_run(client: MlflowClient, experiment_id: str, run_id: str) -> Run | None:
    """The MLflow run of earlier attempts; None if there is none."""
    quote = '"' if "'" in run_id else "'"
    # A filter cannot express a text with both kinds of quotes. A pattern can, with a wildcard for one of them.
    operator = "LIKE" if quote in run_id else "="
    wanted = f"tags.`{RUN_ID_TAG}` {operator} {quote}{run_id.replace(quote, '_')}{quote}"
    page = None
    while True:
        found = client.search_runs(
            [experiment_id], filter_string=wanted, order_by=["attributes.start_time ASC"], page_token=page
        )
        for run in found:
            if run.data.tags.get(RUN_ID_TAG) == run_id:  # the pattern may match others, too
                return run
        if not (page := found.token):
            return None


def _check_address(address: str | None) -> None:
    """Raise `SinkMisconfigured` for an invalid address; a path is valid."""
    if address is None or is_http_address(address) or (address and not re.match(r"\s*https?:", address, re.I)):
        return
    raise SinkMisconfigured(
        f"MLflow(tracking_uri={masked_url(address)!r:.200}) is not an address; give http://HOST:PORT, or another URI"
        f" that MLflow supports"
    )
