"""A sink that logs a run to Weights & Biases."""

from __future__ import annotations

import contextlib
import hashlib
import html
import io
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import urlsplit

import msgspec

from events.errors import SinkMisconfigured
from events.masking import masked_url
from events.messages import (
    AudioLogged,
    Event,
    HistogramLogged,
    ImageLogged,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
)
from events.metrics import METRIC_TYPES, hyperparameters, metric_name, metrics_of
from events.sink import Delivery, RunInfo, require
from events.strict import Strict
from sinks.files.appended import check_path, make_folders, newer, position_of, read_media, read_text
from sinks.files.tables import read_table
from sinks.trackers.address import is_http_address

if TYPE_CHECKING:
    from wandb import Audio, Histogram, Html, Image, Run, Settings, Table

_Row = dict[str, object]

Mode = Literal["online", "offline", "disabled"]

_EXIT_CODES = {"finished": 0, "stopped": 0, "cancelled": 255, "failed": 1}
"""W&B shows 0 as finished, 255 as killed, and 1 as failed."""
_OWN_NAMES = frozenset({"global_step", "_step", "_timestamp", "_runtime", "_wandb"})
_BINS = 512
"""Maximum bins per histogram in W&B."""
_lock = threading.Lock()  # the client has one background process, and `sys.exit`, for all of this process


class WandB(Strict, frozen=True):
    """Logs to Weights & Biases: numbers, histograms, media, the arguments as config, and the run's status::

        Trainer(module, arguments, sinks=[WandB(project="digits")]).train()

    Numbers have their names in `events.metrics.metrics_of` (a name of W&B's own, such as ``_step``, becomes
    ``logged/_step``) and the time of their event. Their axis is the logged ``global_step``: W&B's own step only counts
    rows, so it does not refuse late numbers. Texts are ``wandb.Html``. The summary contains the last values,
    ``stagecast/status`` and ``stagecast/reason``. W&B shows a stopped run as finished, a cancelled one as killed.

    All attempts at a run are one W&B run, which also contains superseded steps. Its config also has the command line,
    the git commit and the host of the run, because the sink may be in another process.

    An existing W&B run is joined instead: ``wandb.run`` if ``wandb.init()`` was called in this process (the caller
    ends it), ``id``, or ``WANDB_RUN_ID``, which the agent of a sweep sets, too (with ``WANDB_RESUME``).

    Online, W&B's own process writes the data to a file and uploads it in the background. If the server is unreachable,
    it retries until ``finish_timeout_s`` after the run's end; ``wandb sync`` uploads the rest from ``dir``. At the
    start of the run, the sink retries for half an hour. Offline, only ``wandb sync`` uploads.

    The console is not captured, and ``sys.exit`` and ``sys.excepthook`` are unchanged. W&B's error reporting is
    disabled unless ``WANDB_ERROR_REPORTING`` is set, because it delays the end of a process when the server hangs.
    """

    project: str | None = None
    """None: ``WANDB_PROJECT``, or W&B's default."""
    entity: str | None = None
    """User or team. None: ``WANDB_ENTITY``, or the user's default."""
    name: str | None = None
    """The run's name. None: its ``run_id``."""
    id: str | None = None
    """The W&B run to log to. None: the active one or that of the environment, or one for this ``run_id``."""
    mode: Mode | None = None
    """None: ``WANDB_MODE``, or ``online``. ``disabled``: nothing is logged."""
    dir: str | None = None
    """The parent of W&B's folder ``wandb``. None: the run folder, or the working directory."""
    tags: list[str] = msgspec.field(default_factory=list)
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    base_url: str | None = None
    """Address of a self-hosted server. None: ``WANDB_BASE_URL``, or W&B's."""
    init_timeout_s: float = 10.0
    """Seconds that the server may take to start the run."""
    finish_timeout_s: float = 10.0
    """Seconds to wait for pending uploads after the run's end."""

    # Lossless, because gaps in a curve are invisible. A row costs half a millisecond of Python.
    delivery: ClassVar[Delivery] = Delivery(
        types=METRIC_TYPES | {RunStarted, RunEnded, HistogramLogged, ImageLogged, AudioLogged, TableLogged, TextLogged},
        overflow="catch_up",
        latency_s=1.0,
        timeout_s=60.0,
        retries=60,
    )

    def __post_init__(self) -> None:
        check_path(self.dir, "WandB(dir")

    def check(self) -> None:
        """Raise `SinkMisconfigured` if the client is not installed or a setting is invalid."""
        if self.mode not in (None, "online", "offline", "disabled"):
            raise SinkMisconfigured(f"WandB(mode={self.mode!r:.80}): give 'online', 'offline' or 'disabled'")
        for name in ("init_timeout_s", "finish_timeout_s"):
            if not getattr(self, name) > 0:
                raise SinkMisconfigured(f"WandB({name}={getattr(self, name)!r:.80}): give seconds greater than zero")
        if self.base_url is not None and not is_http_address(self.base_url):
            raise SinkMisconfigured(
                f"WandB(base_url={masked_url(self.base_url)!r:.200}) is not the address of a server; give"
                f" http://HOST:PORT or https://HOST"
            )
        require("wandb", "wandb", "the sink WandB")

    def open(self, run: RunInfo) -> WandBWriter:
        """Start the W&B run, or resume that of earlier attempts.

        Raises:
            SinkMisconfigured: A setting is invalid, or there are no credentials.
            Exception: W&B's client raises it when the server does not answer in time. A retry may help.
        """
        self.check()
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb
        from wandb.errors import UsageError

        if self.id is None and wandb.run is not None:
            return WandBWriter(wandb.run, run.run_dir, owned=False)
        settings = self._settings(run)
        with _lock, _hooks_kept():
            try:
                wandb_run = wandb.init(settings=settings)
            except UsageError as error:
                raise SinkMisconfigured(f"W&B cannot start a run: {error}") from error
            except Exception:
                # Otherwise its process refuses every other attempt, because this run is in use.
                _end_process()
                raise
            wandb_run.define_metric("global_step", hidden=True)
            wandb_run.define_metric("*", step_metric="global_step")
        return WandBWriter(wandb_run, run.run_dir, owned=True)

    def _settings(self, run: RunInfo) -> Settings:
        from wandb import Settings

        base = Settings()
        base.update_from_env_vars(dict(os.environ))
        mode = self.mode or base.mode
        url = self.base_url or base.base_url
        if mode == "online" and sys.stdin is not None and sys.stdin.isatty() and not _has_credentials(url):
            # W&B would prompt for a key at the terminal, on a thread of its own.
            raise SinkMisconfigured(f"there are no credentials for {url}; run `wandb login`, or set WANDB_API_KEY")
        root = os.path.abspath(self.dir or run.run_dir or ".")
        make_folders(root, run.run_dir)
        if os.path.lexists(own := os.path.join(root, "wandb")):  # the client's own folder: not a link
            make_folders(own, run.run_dir)
        given: dict[str, object] = {
            "mode": mode,
            "project": self.project,
            "entity": self.entity,
            "base_url": self.base_url,
            "run_name": self.name or run.run_id,
            "run_tags": tuple(self.tags) or None,
            "run_group": self.group,
            "run_job_type": self.job_type,
            "run_notes": self.notes,
            "run_id": self.id or base.run_id or wandb_run_id(run.run_id),
            "resume": (None if self.id else base.resume) or "allow",
            "root_dir": root,
            "init_timeout": self.init_timeout_s,
            "finish_timeout": self.finish_timeout_s,
            "finish_timeout_raises": True,
            "reinit": "create_new",  # does not affect other code's run, or `wandb.run`
            "console": "off",
            "silent": True,
            "disable_git": True,
            "disable_code": True,
            "save_code": False,
            # `SystemSampled` has more values, of the right process.
            "x_disable_stats": True,
            "x_disable_meta": True,
            "x_save_requirements": False,
        }
        known = Settings.model_fields
        return Settings.model_validate({key: one for key, one in given.items() if one is not None and key in known})


class WandBWriter:
    """An open `WandB`. Its writes wait for W&B's process on this machine, never for the server.

    Args:
        wandb_run: A ``wandb.Run``; it may be used for other data.
        run_dir: The run folder, with the files of images and texts.
        owned: Whether this sink has started it, and ends it.
    """

    def __init__(self, wandb_run: Run, run_dir: str | None, *, owned: bool) -> None:
        self.wandb_run = wandb_run
        self._run_dir = run_dir
        self._owned = owned
        self._defined: set[str] = set()
        self._last = (0, 0)
        self._exit_code = 1  # a disabled sink does not receive the run's end

    def write(self, events: Sequence[Event]) -> None:
        """Log events, one row per step.

        Raises:
            Exception: W&B's client raises it when its process has died.
        """
        for row, last in _rows(newer(events, self._last), self._values_of):
            if row:
                if not self._owned:
                    self._define(row)
                self.wandb_run.log(row)
            self._last = position_of(last)

    def close(self) -> None:
        """End the W&B run, and wait for pending uploads, up to ``finish_timeout_s``.

        Raises:
            TimeoutError: Uploads are pending; `wandb sync` completes them later.
        """
        if not self._owned:
            return
        self.wandb_run.finish(exit_code=self._exit_code)
        with _lock:
            _end_process()

    def _define(self, row: _Row) -> None:
        """Set the axis of each metric to ``global_step``, because the caller's own metrics have another axis."""
        for name in row.keys() - self._defined:
            self.wandb_run.define_metric(name, step_metric=None if name == "global_step" else "global_step")
            self._defined.add(name)

    def _values_of(self, event: Event) -> _Row:
        """The values of an event in its step's row."""
        value: Audio | Histogram | Html | Image | Table | None
        match event:
            case HistogramLogged():
                value = _histogram(event)
            case ImageLogged():
                value = self._image(event)
            case AudioLogged():
                value = self._audio(event)
            case TableLogged():
                value = self._table(event)
            case TextLogged():
                value = self._text(event)
            case RunStarted():
                described: dict[str, object] = {
                    "module": event.module,
                    "device": event.device,
                    "versions": event.versions,
                }
                if self._owned:  # W&B records the caller's command and commit itself
                    described |= {"command_line": event.command_line, "host": event.host}
                    described |= {"git_commit": event.git_commit, "git_dirty": event.git_dirty}
                described |= hyperparameters(event)
                self.wandb_run.config.update(described, allow_val_change=True)  # type: ignore[no-untyped-call]
                return {}
            case RunEnded():
                self._exit_code = _EXIT_CODES[event.status]
                self.wandb_run.summary["stagecast/status"] = event.status
                self.wandb_run.summary["stagecast/reason"] = event.reason
                return {}
            case _:
                return {_shown(name): value for name, value in metrics_of(event)}
        return {} if value is None else {_shown(metric_name(event.name, event.key)): value}

    def _image(self, event: ImageLogged) -> Image | None:
        from PIL import Image as PilImage
        from wandb import Image

        data = read_media(self._run_dir, event, "W&B")
        return None if data is None else Image(PilImage.open(io.BytesIO(data), formats=("PNG",)))

    def _audio(self, event: AudioLogged) -> Audio | None:
        from wandb import Audio

        data = read_media(self._run_dir, event, "W&B")
        if data is None or self._run_dir is None:
            return None
        return Audio(os.path.join(self._run_dir, event.path))

    def _table(self, event: TableLogged) -> Table | None:
        from wandb import Table

        table = read_table(self._run_dir, event, "W&B")
        if table is None:
            return None
        rows: list[Any] = [*table.rows]
        return Table(columns=[*table.columns], data=rows, allow_mixed_types=True)

    def _text(self, event: TextLogged) -> Html:
        from wandb import Html

        text = read_text(self._run_dir, event, "W&B").decode("utf-8", "replace")
        return Html(f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>', inject=False)


def _end_process() -> None:
    """End W&B's own process if no other run uses it: only then its files are complete."""
    import wandb

    if getattr(wandb.setup(), "most_recent_active_run", None) is None and wandb.run is None:
        wandb.teardown()


def wandb_run_id(run_id: str) -> str:
    """A W&B run's id: the run's name if W&B accepts it, else its valid characters and eight digits of its hash."""
    clean = re.sub(r"[^A-Za-z0-9._-]", "_", run_id)
    if clean == run_id and len(run_id) <= 64:
        return run_id
    return f"{clean[:55]}-{hashlib.sha256(run_id.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _rows(events: Sequence[Event], values_of: Callable[[Event], _Row]) -> Iterator[tuple[_Row, Event]]:
    """Rows to log, each with its last event. A row merges consecutive events of one step, with each name once."""
    row: _Row = {}
    last: Event | None = None
    for event in events:
        values = values_of(event)
        if last is not None and (event.global_step != last.global_step or values.keys() & row.keys()):
            yield row, last
            row = {}
        if values:
            row |= values
            row |= {"global_step": event.global_step, "_timestamp": event.time}
        last = event
    if last is not None:
        yield row, last


def _shown(name: str) -> str:
    name = name.encode("utf-8", "backslashreplace").decode()
    # Reserved names, and one that is not shown.
    return f"logged/{name}" if name in _OWN_NAMES or not name else name


def _histogram(event: HistogramLogged) -> Histogram | None:
    """The event's bins; None if no element was finite."""
    from wandb import Histogram

    if not sum(event.counts):
        return None
    together = -(-len(event.counts) // _BINS)
    counts = [sum(event.counts[at : at + together]) for at in range(0, len(event.counts), together)]
    low, high = event.low, event.high
    if low == high:
        low, high = low - 0.5, high + 0.5  # a bin of width 0 is not drawn
    # Divided before the subtraction, which may overflow.
    width = high / len(event.counts) - low / len(event.counts)
    edges = [low + width * at for at in range(0, len(event.counts), together)] + [high]
    return Histogram(np_histogram=(counts, edges))  # type: ignore[arg-type]  # it accepts lists, too


@contextlib.contextmanager
def _hooks_kept() -> Iterator[None]:
    """Restore both hooks, which the client replaces to record an exit code; this sink ends the run itself."""
    kept = sys.exit, sys.excepthook
    try:
        yield
    finally:
        sys.exit, sys.excepthook = kept


def _has_credentials(url: str) -> bool:
    """Whether W&B finds a key without a prompt."""
    import netrc

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = os.environ.get("NETRC") or next(
        (known for known in map(os.path.expanduser, ("~/.netrc", "~/_netrc")) if os.path.exists(known)), None
    )
    host = (urlsplit(url).hostname or "").removeprefix("app.")
    try:
        known_hosts = netrc.netrc(path).hosts if path else {}
    except (OSError, netrc.NetrcParseError):
        return False
    return any(one.partition(":")[0] in (host, "api." + host) for one in known_hosts)
