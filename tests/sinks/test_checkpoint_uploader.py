"""The uploader: the newest first, nothing for nothing, and whatever fails is taken up where it was.

Here against ``file://``; against real servers, with all kinds of faults, in `tests/faults`.
"""

from __future__ import annotations

import http.server
import logging
import random
import shutil
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from events.bus.pump import Pump
from events.bus.ring import Ring
from events.bus.supervisor import Supervisor
from events.checkpoint import disk
from events.checkpoint.files import verify
from events.checkpoint.lineage import AttemptNote
from events.checkpoint.manifest import CheckpointName, FileEntry, Manifest, Metric
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

    def save(
        self, step: int, metric: float | None = None, parent: str | None = None, nbytes: int = 100_000
    ) -> CheckpointName:
        name = CheckpointName(step, self.origin.attempt)
        folder = self.store.begin(name)
        data = random.Random(str(name)).randbytes(nbytes)
        manifest = Manifest(
            run_id="run",
            attempt=name.attempt,
            global_step=step,
            epoch=step // 10,
            seq=step,
            time=float(step),
            parent=parent,
            reasons=["steps"],
            metric=Metric("val_loss", metric) if metric is not None else None,
            files={"tensors.bin": FileEntry(*disk.write_parts(folder, "tensors.bin", [data]))},
        )
        self.store.commit(manifest)
        return name

    def uploader(self, **settings: Any) -> CheckpointUploader:
        plan = Checkpoints(**{"upload_part_bytes": PART, "upload": self.there.parent.as_uri()} | settings)

        def retain() -> None:
            self.retained.append(self.uploaded)

        return CheckpointUploader(self.store, self.remote.url, plan, self.events.append, self.origin.header, retain)

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
    """Do something once, right before the object after so many parts is put."""
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


def refuse() -> None:
    raise UploadError("the line is cut")


# ------------------------------------------------------------------------------------------------- what is due


def test_the_newest_goes_first_then_what_is_kept_anyway(rig: Rig) -> None:
    """A slow uplink is never behind by more than what would be kept: the others are not uploaded at all."""
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


def test_one_that_is_saved_during_an_upload_is_next(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before older ones that were due already."""
    uploader = rig.uploader(keep_last=2)
    uploader.open()
    rig.save(10)
    rig.save(20)
    after_parts(monkeypatch, 1, lambda: rig.save(30))
    uploader.deliver([])
    assert rig.uploaded == ["step-20.a1", "step-30.a1"]  # step 10 is not kept any more: it is left out


def test_largest_may_be_best_and_other_metrics_do_not_count(rig: Rig) -> None:
    """As the settings say, which may have changed since."""
    for step, metric in [(10, 0.9), (20, 0.1), (30, 0.5)]:
        rig.save(step, metric)
    rig.uploader(best="val_loss", best_mode="max", keep_last=1).open()
    assert rig.uploaded == ["step-30.a1", "step-10.a1"]
    rig.events.clear()
    rig.uploader(best="accuracy", keep_last=1).deliver([])  # of which there is none
    assert rig.uploaded == []


def test_what_an_earlier_process_had_not_uploaded_is_uploaded_on_opening(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only with the next one, which may be hours away. It resumes, and orphans of others are removed."""
    rig.save(10)
    first = rig.uploader()
    after_parts(monkeypatch, 1, first.abandon)
    first.open()
    assert rig.names == []
    shutil.copytree(rig.there / "step-10.a1", rig.there / "step-5.a1")  # of one that is not here any more
    rig.attempt(2, "step-10.a1")
    put: list[str] = []
    real = Objects.put
    monkeypatch.setattr(Objects, "put", lambda self, key, data: (put.append(key), real(self, key, data))[1])
    rig.uploader().open()
    assert rig.uploaded == rig.names == ["step-10.a1"]
    assert put == ["attempt-2.json", "step-10.a1/manifest.json"] or len(put) == 3  # a second part was under way
    assert not (rig.there / "step-5.a1").exists()
    upload = rig.store.upload_of(CheckpointName(10, 1))
    assert upload is not None
    assert upload.url == f"{rig.remote.url}/step-10.a1"


def test_orphans_are_removed_on_opening_though_nothing_is_due(rig: Rig) -> None:
    """They cost money, and the next upload may never come."""
    (rig.there / "step-5.a1").mkdir(parents=True)
    (rig.there / "step-5.a1" / "tensors.bin").write_bytes(b"left")
    rig.uploader().open()
    assert sorted(path.name for path in rig.there.iterdir()) == ["attempt-1.json"]


def test_another_place_gets_them_all_again(rig: Rig, tmp_path: Path) -> None:
    """What is marked as uploaded is so there, not elsewhere."""
    rig.save(10)
    rig.uploader().open()
    other = RemoteStore((tmp_path / "elsewhere").as_uri())
    rig.attempt(2, "step-10.a1")
    uploader = CheckpointUploader(
        rig.store, other.url, Checkpoints(), rig.events.append, rig.origin.header, lambda: None
    )
    uploader.open()
    assert other.names() == rig.remote.names()


def test_a_kill_between_manifest_and_mark_uploads_nothing_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there; only the mark is missing, and is made."""
    name = rig.save(10)
    rig.uploader().open()
    (rig.store.path(name) / "uploaded").unlink()
    rig.attempt(2, "step-10.a1")
    monkeypatch.setattr(Objects, "put", lambda self, key, data: refuse() if "step" in key else None)
    rig.uploader().open()
    assert rig.store.upload_of(name) is not None


# -------------------------------------------------------------------------------------------------- retention


def test_what_is_not_kept_is_removed_from_the_store_too(rig: Rig) -> None:
    """After a newer one is there; the best stay, and events say what went."""
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


def test_what_the_run_went_back_before_goes_first(rig: Rig) -> None:
    """The store follows the same line as the folder."""
    for step in (10, 20, 30):
        rig.save(step)
    rig.uploader(keep_last=3).open()
    assert len(rig.names) == 3
    rig.attempt(2, "step-10.a1")
    uploader = rig.uploader(keep_last=2)
    uploader.open()
    assert len(rig.names) == 3  # nothing goes before something newer is there
    rig.save(15, parent="step-10.a1")
    uploader.deliver([])
    assert rig.names == ["step-10.a1", "step-15.a2"]


def test_a_store_without_delete_permission_is_reported_and_used(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many credentials may write, not delete: uploads go on, the end of the run is not held up."""
    monkeypatch.setattr(Objects, "delete", lambda self, key: refuse())
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


def test_orphans_that_cannot_be_removed_do_not_keep_it_from_opening(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are tried again later."""
    rig.save(10)
    (rig.there / "step-5.a1").mkdir(parents=True)
    (rig.there / "step-5.a1" / "tensors.bin").write_bytes(b"left")
    with monkeypatch.context() as patch:
        patch.setattr(Objects, "delete", lambda self, key: refuse())
        uploader = rig.uploader()
        uploader.open()
    assert rig.uploaded == ["step-10.a1"]
    rig.save(20)
    uploader.deliver([])
    assert not (rig.there / "step-5.a1").exists()


# ---------------------------------------------------------------------------------------------------- failures


def test_a_failed_upload_is_published_raised_and_resumed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor delivers the same batch again, however often; the history of a long outage stays short."""
    uploader = rig.uploader()
    uploader.open()
    rig.save(10)
    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put", lambda self, key, data: refuse())
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
        patch.setattr(Objects, "put", lambda self, key, data: refuse())
        with pytest.raises(UploadError):
            uploader.deliver([])
    assert rig.of(CheckpointFailed)[-1].consecutive == 1


def test_a_damaged_checkpoint_is_reported_and_skipped(rig: Rig) -> None:
    """Trying again would find the same; the others are uploaded, and nothing of it stays in the store."""
    rig.save(10)
    bad = rig.save(20)
    path = rig.store.path(bad) / "tensors.bin"
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
    """Retention decides on another thread; what was uploaded of it is removed."""
    rig.save(10)
    name = rig.save(20, nbytes=10 * PART)
    after_parts(monkeypatch, 1, lambda: rig.store.remove(name))
    uploader = rig.uploader()
    uploader.open()
    # On POSIX an open file stays readable after its removal; then only the mark finds no folder.
    assert rig.of(CheckpointFailed) == []
    assert rig.uploaded == ["step-10.a1"]
    assert set(rig.names) - {"step-20.a1"} == {"step-10.a1"}


def test_a_disk_that_refuses_the_mark_is_a_failure_that_passes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is uploaded again for it, and it is announced once."""
    rig.save(10)
    uploader = rig.uploader()
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(CheckpointStore, "mark_uploaded", full)
        with pytest.raises(OSError, match="No space left"):
            uploader.open()
    assert rig.uploaded == []
    monkeypatch.setattr(Objects, "put", lambda self, key, data: refuse())
    uploader.open()
    assert rig.uploaded == ["step-10.a1"]


def test_another_run_of_this_name_is_not_overwritten(rig: Rig, tmp_path: Path) -> None:
    """Somebody deleted the run's folder and began again: what is in the store may be all that is left of it."""
    rig.save(10)
    rig.uploader().open()
    shutil.rmtree(rig.store.folder)
    rig.attempt(1)
    rig.save(20)
    uploader = rig.uploader()
    uploader.open()  # not a failure to be retried: it would hold up the end of the run
    (failed,) = rig.of(CheckpointFailed)
    assert "there holds attempt 1 of another run of this name" in failed.error
    uploader.deliver([])
    assert rig.names == ["step-10.a1"]


def test_opening_again_after_a_failed_upload_does_not_take_its_own_for_anothers(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor calls `open` until it succeeds, and it uploads."""
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
    """A thousand parts are not a thousand events; each belongs to the checkpoint's step, not to the loop's."""
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


def test_abandoned_it_stops_at_the_next_part(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """And begins nothing more: no other one, no removal, no event."""
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
    assert uploader.close() is None


def test_it_is_delivered_what_it_needs_and_gives_up_with_the_run_only() -> None:
    """It never holds the loop, and an outage may last for days."""
    assert UPLOADER_DELIVERY.types == {CheckpointSaved}
    assert UPLOADER_DELIVERY.overflow != "block"
    assert UPLOADER_DELIVERY.on_error == "retry"
    assert UPLOADER_DELIVERY.retries > 1e9
    assert UPLOADER_DELIVERY.timeout_s is None


def test_credentials_in_the_address_are_refused_at_once(rig: Rig) -> None:
    """Before the run begins, and without repeating them."""
    with pytest.raises(UploadError, match="a user, a password") as caught:
        CheckpointUploader(
            rig.store, "s3://key:SECRET@bucket", Checkpoints(), rig.events.append, rig.origin.header, lambda: None
        )
    assert "SECRET" not in "".join(traceback.format_exception_only(caught.value))


# -------------------------------------------------------------------------------------------------- supervised


class Quoting(http.server.BaseHTTPRequestHandler):
    """Refuses as S3 does, quoting the client."""

    def do_GET(self) -> None:
        body = f"<Error><Code>SignatureDoesNotMatch</Code><Key>{self.headers['Authorization']} {SECRETS}</Key></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.mark.anyio
@pytest.mark.parametrize("answered", [True, False])
async def test_no_secret_reaches_an_event_or_a_log(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answered: bool
) -> None:
    """Neither when the store refuses and quotes them, nor when it does not answer."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    rig.save(10)
    pump = Pump(Ring(rig.origin))
    limits = Limits(connect_s=1.0, request_s=5.0, retries=0)
    uploader = CheckpointUploader(
        rig.store, "s3://bucket/run", Checkpoints(), pump.ring.publish, rig.origin.header, lambda: None, limits
    )
    supervisor = Supervisor(pump, lambda error: None)
    listener = pump.subscribe("listener", Delivery(latency_s=1e-6))
    with http.server.HTTPServer(("127.0.0.1", 0), Quoting) as server, caplog.at_level(logging.DEBUG):
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        port = server.server_port if answered else 1
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pump.run)
            observer = supervisor.add("uploader", uploader, UPLOADER_DELIVERY)
            tasks.start_soon(observer.run)
            batch: list[Any] = []
            with anyio.fail_after(20):
                while not any(type(event) is ObserverFailed for event, _ in batch):
                    batch += await listener.receive()
            tasks.cancel_scope.cancel()
        server.shutdown()
        thread.join()
    (failed,) = [event for event, _ in batch if type(event) is ObserverFailed]
    expected = "access was denied (403 Forbidden, SignatureDoesNotMatch)" if answered else "the connection was refused"
    assert f"cannot list s3://bucket/run: {expected}" in failed.error
    shown = [str(batch), caplog.text, *(str(vars(record)) for record in caplog.records)]
    assert "cannot list s3://bucket/run" in caplog.text
    assert not [value for value in SECRETS.values() if value in "".join(shown)]


@pytest.mark.anyio
async def test_under_a_supervisor_an_outage_passes_and_the_end_waits_for_the_last(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop publishes that one was saved, and continues; the rest happens on the uploader's thread."""
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
    uploader = CheckpointUploader(
        rig.store, rig.remote.url, Checkpoints(), pump.ring.publish, rig.origin.header, lambda: None
    )
    supervisor = Supervisor(pump, lambda error: None)
    listener = pump.subscribe("listener", Delivery(latency_s=1e-6, capacity=100))

    def saved(step: int) -> None:
        name = rig.save(step)
        pump.ring.publish(CheckpointSaved(*rig.origin.header(), str(name), str(rig.store.path(name))))

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
            assert failed.during in ("upload", "open")  # where it may still have been busy with the first one
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
