"""The uploader: the newest checkpoint first, and a failed upload resumes.

Here against ``file://``; against real servers, with all kinds of faults, in `tests/faults`.
"""

from __future__ import annotations

import http.server
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.checkpoints import make

from events.bus.pump import Pump
from events.bus.ring import Ring
from events.bus.supervisor import Supervisor
from events.checkpoint.files import verify
from events.checkpoint.lineage import AttemptNote
from events.checkpoint.manifest import CheckpointName
from events.checkpoint.objects import Limits, Objects
from events.checkpoint.remote import RemoteStore
from events.checkpoint.settings import Checkpoints
from events.checkpoint.store import CheckpointStore
from events.errors import UploadError
from events.messages import (
    CheckpointDeleted,
    CheckpointFailed,
    CheckpointSaved,
    CheckpointUploaded,
    CheckpointUploading,
    Event,
    ObserverFailed,
    ObserverRecovered,
)
from events.origin import Origin
from events.sink import Delivery
from sinks.checkpoints import uploader as checkpoint_uploader
from sinks.checkpoints.uploader import UPLOADER_DELIVERY, CheckpointUploader

PART = 2**16
SECRETS = {"AWS_ACCESS_KEY_ID": "AKIASECRETSECRET0001", "AWS_SECRET_ACCESS_KEY": "s3cr3t/with+slashes/and=more01234"}


class Rig:
    """A run's folder, the folder behind its remote store, and uploaders between them."""

    def __init__(self, folder: Path) -> None:
        self.there = folder / "there"
        self.store = CheckpointStore(folder / "checkpoints")
        self.remote = RemoteStore(self.there.as_uri())
        self.origin = Origin("run")
        self.origin.global_step, self.origin.epoch, self.origin.stage = 999, 9, "train"
        self.events: list[Event] = []
        self.retained: list[list[str]] = []
        self.attempt(1)

    def attempt(self, number: int, parent: str | None = None) -> None:
        self.origin.attempt = number
        self.store.prepare(AttemptNote(number, parent))

    def save(self, step: int, metric: float | None = None, parent: str | None = None, nbytes: int = 100_000) -> str:
        manifest = make(self.store.folder, step, self.origin.attempt, parent=parent, metric=metric, tensors=nbytes)
        return str(manifest.name)

    def uploader(
        self, url: str = "", publish: Any = None, limits: Limits | None = None, **settings: Any
    ) -> CheckpointUploader:
        return CheckpointUploader(
            self.store,
            url or self.remote.url,
            Checkpoints(**{"upload_part_bytes": PART} | settings),
            publish or self.events.append,
            self.origin,
            lambda: self.retained.append(self.uploaded),
            limits,
        )

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if type(event) is kind]

    @property
    def uploaded(self) -> list[str]:
        """In order of their uploads."""
        return [event.checkpoint for event in self.of(CheckpointUploaded)]

    @property
    def names(self) -> list[str]:
        return [str(name) for name in self.remote.names()]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def after_parts(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[], object]) -> None:
    """Call a function once, right before the object after ``count`` parts is put."""
    real, lock, left = Objects.put, threading.Lock(), [count, 1]

    def put(self: Objects, key: str, data: bytes) -> None:
        with lock:
            left[0] -= "tensors" in key
            due = left[0] < 0 and left[1] > 0
            left[1] -= due
        if due:
            act()
        real(self, key, data)

    monkeypatch.setattr(Objects, "put", put)


def refuse(*_: object) -> None:
    raise UploadError("the line is cut")


# ------------------------------------------------------------------------------------------------- what is due


def test_the_newest_is_uploaded_first_then_others_that_retention_keeps(rig: Rig) -> None:
    uploader = rig.uploader(best="val_loss", keep_last=2, keep_best=1)
    uploader.open()
    assert rig.names == []
    for step, metric in [(10, 0.9), (20, 0.1), (30, 0.8), (40, 0.7), (50, 0.6)]:
        rig.save(step, metric)
    uploader.deliver([])
    assert rig.uploaded == ["step-50.a1", "step-40.a1", "step-20.a1"]
    assert rig.names == ["step-20.a1", "step-40.a1", "step-50.a1"]
    assert rig.retained == [rig.uploaded[:1], rig.uploaded[:2], rig.uploaded]
    uploader.deliver([])  # nothing is due
    assert len(rig.uploaded) == 3


def test_a_checkpoint_that_is_saved_during_an_upload_is_next(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    uploader = rig.uploader(keep_last=2)
    uploader.open()
    rig.save(10)
    rig.save(20)
    after_parts(monkeypatch, 1, lambda: rig.save(30))
    uploader.deliver([])
    assert rig.uploaded == ["step-20.a1", "step-30.a1"]  # step 10 is not kept


def test_the_best_are_those_by_the_present_settings(rig: Rig) -> None:
    for step, metric in [(10, 0.9), (20, 0.1), (30, 0.5)]:
        rig.save(step, metric)
    rig.uploader(best="val_loss", best_mode="max", keep_last=1).open()
    assert rig.uploaded == ["step-30.a1", "step-10.a1"]
    rig.events.clear()
    rig.uploader(best="accuracy", keep_last=1).deliver([])
    assert rig.uploaded == []


def test_opening_resumes_uploads_of_an_earlier_process_and_removes_orphans(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.save(10)
    first = rig.uploader()
    after_parts(monkeypatch, 1, first.abandon)
    first.open()
    assert rig.names == []
    shutil.copytree(rig.there / "step-10.a1", rig.there / "step-5.a1")  # of a checkpoint that does not exist here
    rig.attempt(2, "step-10.a1")
    put: list[str] = []
    real = Objects.put
    monkeypatch.setattr(Objects, "put", lambda self, key, data: (put.append(key), real(self, key, data))[1])
    rig.uploader().open()
    assert rig.uploaded == rig.names == ["step-10.a1"]
    assert put == ["attempt-2.json", "step-10.a1/manifest.json"] or len(put) == 3  # a second part was pending
    assert sorted(path.name for path in rig.there.iterdir()) == ["attempt-1.json", "attempt-2.json", "step-10.a1"]


def test_another_address_gets_all_checkpoints_again(rig: Rig, tmp_path: Path) -> None:
    rig.save(10)
    rig.uploader().open()
    other = RemoteStore((tmp_path / "elsewhere").as_uri())
    rig.attempt(2, "step-10.a1")
    rig.uploader(other.url).open()
    assert other.names() == rig.remote.names()


def test_after_a_kill_between_manifest_and_mark_only_the_mark_is_written(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = CheckpointName.parse(rig.save(10))
    assert name is not None
    rig.uploader().open()
    (rig.store.path(name) / "uploaded").unlink()
    rig.attempt(2, "step-10.a1")
    monkeypatch.setattr(Objects, "put", lambda self, key, data: refuse() if "step" in key else None)
    rig.uploader().open()
    upload = rig.store.upload_of(name)
    assert upload is not None
    assert upload.url == f"{rig.remote.url}/step-10.a1"


# -------------------------------------------------------------------------------------------------- retention


def test_expendable_checkpoints_are_removed_from_the_store_after_a_newer_upload(rig: Rig) -> None:
    uploader = rig.uploader(best="val_loss", keep_last=2, keep_best=1)
    uploader.open()
    for step, metric in [(10, 0.9), (20, 0.1), (30, 0.8), (40, 0.7), (50, 0.6)]:
        rig.save(step, metric)
        uploader.deliver([])
    assert rig.names == ["step-20.a1", "step-40.a1", "step-50.a1"]
    assert [(event.checkpoint, event.where) for event in rig.of(CheckpointDeleted)] == [
        ("step-10.a1", "remote"),
        ("step-30.a1", "remote"),
    ]
    assert [event.global_step for event in rig.of(CheckpointDeleted)] == [10, 30]
    assert sorted(path.name for path in rig.there.iterdir()) == ["attempt-1.json", *rig.names]


def test_superseded_checkpoints_are_removed_first(rig: Rig) -> None:
    for step in (10, 20, 30):
        rig.save(step)
    rig.uploader(keep_last=3).open()
    assert len(rig.names) == 3
    rig.attempt(2, "step-10.a1")
    uploader = rig.uploader(keep_last=2)
    uploader.open()
    assert len(rig.names) == 3  # until a newer one is uploaded
    rig.save(15, parent="step-10.a1")
    uploader.deliver([])
    assert rig.names == ["step-10.a1", "step-15.a2"]


def test_a_store_without_delete_permission_is_reported_and_used(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Objects, "delete", refuse)
    uploader = rig.uploader(keep_last=1)
    for step in (10, 20, 30, 40, 50):
        rig.save(step)
        uploader.deliver([])
    assert len(rig.names) == 5
    failed = rig.of(CheckpointFailed)
    assert [(event.checkpoint, event.during, event.consecutive) for event in failed] == [
        ("step-10.a1", "delete", 1),
        ("step-10.a1", "delete", 2),
        ("step-10.a1", "delete", 4),
    ]
    assert failed[0].error == "UploadError: the line is cut"


def test_orphans_that_cannot_be_removed_are_tried_again_after_the_next_upload(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.save(10)
    (rig.there / "step-5.a1").mkdir(parents=True)
    (rig.there / "step-5.a1" / "tensors.bin").write_bytes(b"left")
    with monkeypatch.context() as patch:
        patch.setattr(Objects, "delete", refuse)
        uploader = rig.uploader()
        uploader.open()
    assert rig.uploaded == ["step-10.a1"]
    rig.save(20)
    uploader.deliver([])
    assert not (rig.there / "step-5.a1").exists()


# ---------------------------------------------------------------------------------------------------- failures


def test_a_failed_upload_is_published_raised_and_resumed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long outage publishes few events."""
    uploader = rig.uploader()
    uploader.open()
    rig.save(10)
    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put", refuse)
        for _ in range(20):
            with pytest.raises(UploadError, match="the line is cut"):
                uploader.deliver([])
    failed = rig.of(CheckpointFailed)
    assert [event.consecutive for event in failed] == [1, 2, 4, 8, 16]
    assert {(event.checkpoint, event.during, event.error, event.global_step) for event in failed} == {
        ("step-10.a1", "upload", "UploadError: the line is cut", 10)
    }
    uploader.deliver([])
    assert rig.uploaded == ["step-10.a1"]
    rig.save(20)
    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put", refuse)
        with pytest.raises(UploadError):
            uploader.deliver([])
    assert rig.of(CheckpointFailed)[-1].consecutive == 1


def test_a_damaged_checkpoint_is_reported_and_skipped(rig: Rig) -> None:
    rig.save(10)
    path = rig.store.folder / rig.save(20) / "tensors.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    uploader = rig.uploader()
    uploader.open()
    uploader.deliver([])
    assert rig.uploaded == rig.names == ["step-10.a1"]
    (failed,) = rig.of(CheckpointFailed)
    assert (failed.checkpoint, failed.during) == ("step-20.a1", "upload")
    assert "CheckpointDamaged" in failed.error
    assert not (rig.there / "step-20.a1").exists()


def test_a_checkpoint_that_is_deleted_during_its_upload_is_not_a_failure(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.save(10)
    rig.save(20, nbytes=10 * PART)
    after_parts(monkeypatch, 1, lambda: rig.store.remove(CheckpointName(20, 1)))
    uploader = rig.uploader()
    uploader.open()
    # On POSIX an open file stays readable after its removal; then only the mark finds no folder.
    assert rig.of(CheckpointFailed) == []
    assert rig.uploaded == ["step-10.a1"]
    assert set(rig.names) - {"step-20.a1"} == {"step-10.a1"}


def test_a_mark_that_cannot_be_written_is_retried_without_an_upload(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.save(10)
    uploader = rig.uploader()
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(CheckpointStore, "mark_uploaded", full)
        with pytest.raises(OSError, match="No space left"):
            uploader.open()
    assert rig.uploaded == []
    monkeypatch.setattr(Objects, "put", refuse)
    uploader.open()
    assert rig.uploaded == ["step-10.a1"]


def test_another_run_of_this_name_is_not_overwritten(rig: Rig, tmp_path: Path) -> None:
    """The run folder was deleted, so the store may hold the only copy."""
    rig.save(10)
    rig.uploader().open()
    shutil.rmtree(rig.store.folder)
    rig.attempt(1)
    rig.save(20)
    uploader = rig.uploader()
    uploader.open()  # a retry would delay the end of the run
    (failed,) = rig.of(CheckpointFailed)
    assert "there holds attempt 1 of another run of this name" in failed.error
    uploader.deliver([])
    assert rig.names == ["step-10.a1"]


def test_an_attempt_that_starts_later_is_noted_before_its_first_upload_unless_another_run_was_faster(rig: Rig) -> None:
    uploader = rig.uploader()
    uploader.open()
    rig.attempt(2)
    rig.save(10)
    uploader.deliver([])
    assert rig.remote.attempts() == rig.store.attempts()
    rig.remote.note([*rig.store.attempts().values(), AttemptNote(3, None, id="another run")])
    rig.attempt(3, "step-10.a2")
    rig.save(20)
    uploader.deliver([])
    assert "attempt 3 of another run" in rig.of(CheckpointFailed)[0].error
    assert rig.names == ["step-10.a2"]


def test_opening_again_after_a_failed_upload_does_not_take_its_own_for_anothers(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.save(10)
    rig.save(20)
    uploader = rig.uploader()
    after_parts(monkeypatch, 2, refuse)  # in the second one
    with pytest.raises(UploadError, match="the line is cut"):
        uploader.open()
    assert rig.uploaded == ["step-20.a1"]
    uploader.open()
    assert rig.uploaded == ["step-20.a1", "step-10.a1"]


# ------------------------------------------------------------------------------------------ progress and the end


def test_progress_is_published_at_once_and_then_at_intervals(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the position of the checkpoint, not of the loop."""
    monkeypatch.setattr(checkpoint_uploader, "PROGRESS_S", 1e9)
    uploader = rig.uploader()
    uploader.open()
    rig.save(10, nbytes=20 * PART)
    uploader.deliver([])
    (event,) = rig.of(CheckpointUploading)
    assert (event.done_bytes, event.total_bytes) == (0, 20 * PART)
    monkeypatch.setattr(checkpoint_uploader, "PROGRESS_S", 0.0)
    rig.save(20, nbytes=20 * PART)
    uploader.deliver([])
    told = rig.of(CheckpointUploading)[1:]
    assert [event.done_bytes for event in told] == [part * PART for part in range(21)]
    uploaded = rig.of(CheckpointUploaded)[-1]
    assert uploaded.nbytes == 20 * PART
    assert uploaded.duration_s > 0
    for event in [*told, uploaded]:
        assert (event.checkpoint, event.url) == ("step-20.a1", f"{rig.remote.url}/step-20.a1")
        assert (event.run_id, event.attempt, event.global_step, event.epoch, event.stage) == ("run", 1, 20, 2, None)
        assert event.time > 1e9


def test_an_abandoned_upload_stops_at_the_next_part(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.save(10)
    rig.save(20, nbytes=50 * PART)
    uploader = rig.uploader()
    after_parts(monkeypatch, 5, uploader.abandon)
    uploader.open()
    assert rig.names == rig.uploaded == []
    parts = list((rig.there / "step-20.a1").glob("tensors*"))
    assert 5 <= len(parts) <= 5 + 2 * Limits().parallel
    uploader.deliver([])
    assert rig.uploaded == []
    uploader.close()


def test_the_uploader_never_blocks_the_loop_and_retries_until_the_run_ends() -> None:
    assert UPLOADER_DELIVERY.types == {CheckpointSaved}
    assert UPLOADER_DELIVERY.overflow != "block"
    assert UPLOADER_DELIVERY.on_error == "retry"
    assert UPLOADER_DELIVERY.retries > 1e9
    assert UPLOADER_DELIVERY.timeout_s is None


# -------------------------------------------------------------------------------------------------- supervised


class Quoting(http.server.BaseHTTPRequestHandler):
    """Refuses as S3 does, and quotes the client."""

    def do_GET(self) -> None:
        body = f"<Error><Code>SignatureDoesNotMatch</Code><Key>{self.headers['Authorization']} {SECRETS}</Key></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.mark.anyio
async def test_no_secret_reaches_an_event_or_a_log(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig.save(10)
    pump = Pump(Ring(rig.origin))
    uploader = rig.uploader("s3://bucket/run", pump.ring.publish, Limits(connect_s=1.0, request_s=5.0, retries=0))
    supervisor = Supervisor(pump, lambda error: None)
    listener = pump.subscribe("listener", Delivery(latency_s=1e-6))
    with http.server.HTTPServer(("127.0.0.1", 0), Quoting) as server, caplog.at_level(logging.DEBUG):
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        environment = SECRETS | {"AWS_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "AWS_ALLOW_HTTP": "true"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        batch: list[Any] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pump.run)
            tasks.start_soon(supervisor.add("uploader", uploader, UPLOADER_DELIVERY).run)
            with anyio.fail_after(20):
                while not any(type(event) is ObserverFailed for event, _ in batch):
                    batch += await listener.receive()
            tasks.cancel_scope.cancel()
        server.shutdown()
        thread.join()
    (failed,) = [event for event, _ in batch if type(event) is ObserverFailed]
    assert "cannot list s3://bucket/run: access was denied (403 Forbidden, SignatureDoesNotMatch)" in failed.error
    assert "cannot list s3://bucket/run" in caplog.text
    shown = "".join([str(batch), caplog.text, *(str(vars(record)) for record in caplog.records)])
    assert not [value for value in SECRETS.values() if value in shown]


@pytest.mark.anyio
async def test_under_a_supervisor_an_outage_passes_and_the_end_waits_for_the_last(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage, refused = threading.Event(), threading.Event()
    real = Objects.put

    def put(self: Objects, key: str, data: bytes) -> None:
        if outage.is_set():
            refused.set()
            refuse()
        real(self, key, data)

    monkeypatch.setattr(Objects, "put", put)
    pump = Pump(Ring(rig.origin))
    rig.events = told = []  # type: ignore[assignment]
    uploader = rig.uploader(publish=pump.ring.publish)
    supervisor = Supervisor(pump, lambda error: None)
    listener = pump.subscribe("listener", Delivery(latency_s=1e-6, capacity=100))

    def saved(step: int) -> None:
        name = rig.save(step)
        pump.ring.publish(CheckpointSaved(*rig.origin.header(), name, str(rig.store.folder / name)))

    async def until(kind: type[Event]) -> Any:
        while True:
            for event, _ in await listener.receive():
                told.append(event)
                if type(event) is kind:
                    return event

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pump.run)
            observer = supervisor.add("uploader", uploader, UPLOADER_DELIVERY)
            tasks.start_soon(observer.run)
            saved(10)
            assert (await until(CheckpointUploaded)).checkpoint == "step-10.a1"
            outage.set()
            saved(20)
            failed = await until(ObserverFailed)
            assert failed.during in ("upload", "open")
            assert failed.action == "retrying"
            assert failed.error == "UploadError: the line is cut"
            outage.clear()
            saved(30)
            (report,) = await supervisor.drain([observer], 20.0)
            await pump.drain()
            await until(ObserverRecovered)
            pump.close()
    assert (report.state, report.published, report.delivered, report.left) == ("closed", 3, 3, 0)
    assert rig.names == ["step-20.a1", "step-30.a1"]
    for name in rig.remote.names():
        verify(rig.store.path(name), rig.remote.manifest(name))
