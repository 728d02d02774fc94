"""A real S3 server: errors name the cause and a fix, and readers beside a writer see complete checkpoints only."""

from __future__ import annotations

import random
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.servers import Server
from support.faulty_proxy import Fault, FaultyProxy

from events.checkpoint import disk
from events.checkpoint.files import verify
from events.checkpoint.manifest import CheckpointName, FileEntry, Manifest
from events.checkpoint.objects import Limits, run_url
from events.checkpoint.remote import RemoteStore
from events.checkpoint.store import CheckpointStore
from events.errors import CheckpointNotFound, UploadError

PART = 10_000
IMPATIENT = Limits(connect_s=2.0, request_s=2.0, retries=0)


def make(folder: Path, step: int) -> Manifest:
    folder.mkdir(exist_ok=True)
    store = CheckpointStore(folder)
    data = random.Random(step).randbytes(3 * PART + 1)
    files = {"tensors.bin": FileEntry(*disk.write_parts(store.begin(CheckpointName(step, 1)), "tensors.bin", [data]))}
    place = {"run_id": "run", "attempt": 1, "global_step": step, "epoch": 0, "seq": step, "time": 0.0}
    manifest = Manifest(**place, parent=None, reasons=[], files=files)  # type: ignore[arg-type]
    store.commit(manifest)
    return manifest


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "local"


@pytest.fixture
def manifest(local: Path) -> Manifest:
    """That of a checkpoint in the local folder."""
    return make(local, 5)


def put(remote: RemoteStore, local: Path, manifest: Manifest) -> bool:
    folder = local / str(manifest.name)
    return remote.upload(folder, manifest, part_bytes=PART, progress=lambda done, total: None, cancelled=lambda: False)


@pytest.fixture
def store(s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteStore:
    """A place of the test's own in the bucket."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    return RemoteStore(run_url(f"{s3.url}/a prefix", f"{tmp_path.name} #1"), IMPATIENT)


def test_a_checkpoint_returns_from_s3_unchanged(
    s3: Server, store: RemoteStore, local: Path, manifest: Manifest, tmp_path: Path
) -> None:
    """By plain requests only: no upload in parts, which a killed process could leave behind."""
    store.check()
    assert store.names() == []
    assert put(store, local, manifest)
    assert store.names() == store.line() == [manifest.name]
    verify(store.download(manifest.name, tmp_path / "into"), manifest)
    keys = [one["Key"] for one in s3.boto.list_objects_v2(Bucket="checkpoints", Prefix="a prefix/")["Contents"]]
    mine = [key.split("/", 2) for key in keys if f"/{tmp_path.name} #1/" in key]
    assert [rest for _, _, rest in mine] == [
        "step-5.a1/manifest.json",
        "step-5.a1/parts.json",
        *(f"step-5.a1/tensors.bin.{part:05}-of-00004" for part in range(4)),
    ]
    assert s3.multipart_uploads() == []
    store.remove(manifest.name)
    assert store._objects.sizes() == {}


def test_an_object_is_put_by_one_request_however_large(store: RemoteStore, proxy: FaultyProxy) -> None:
    """obstore would send several from 5 MiB on, which a killed process leaves behind invisibly."""
    store._objects.put("large", bytes(6 * 2**20))
    assert [line.split(" ")[0] for line in proxy.requests] == ["PUT"]
    assert "?" not in proxy.requests[0]


def test_a_missing_bucket_is_named_by_every_call(store: RemoteStore, local: Path, manifest: Manifest) -> None:
    """With a fix, and not as a missing checkpoint."""
    missing = RemoteStore("s3://no-such-bucket/run", IMPATIENT)
    calls: list[Callable[[], object]] = [
        missing.check,
        missing.names,
        lambda: missing.manifest(manifest.name),
        lambda: missing.remove(manifest.name),
        lambda: put(missing, local, manifest),
        lambda: missing._objects.put("key", b"data"),
    ]
    for call in calls:
        with pytest.raises(UploadError, match=r"s3://no-such-bucket/run.*: the bucket does not exist; create it"):
            call()


def test_wrong_credentials_are_not_shown(
    s3: Server, store: RemoteStore, local: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the variables."""
    secrets = {"AWS_ACCESS_KEY_ID": "AKIAWRONGWRONG000001", "AWS_SECRET_ACCESS_KEY": "wr0ng/with+slashes/and=more0123"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)

    def check_keys(after_requests: bytes) -> None:
        """moto accepts every key until then."""
        url = f"http://127.0.0.1:{s3.port}/moto-api/reset-auth"
        request = urllib.request.Request(url, after_requests, {"Content-Type": "text/plain"})
        urllib.request.urlopen(request, timeout=20).close()

    check_keys(b"0")
    try:
        for call in (store.check, store.names, lambda: put(store, local, manifest)):
            with pytest.raises(UploadError, match=r"access was denied \(403 Forbidden, InvalidAccessKeyId\)") as caught:
                call()
            shown = "".join(traceback.format_exception(caught.value))
            assert "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" in shown
            assert not [value for value in secrets.values() if value in shown]
    finally:
        check_keys(b"inf")


def test_a_silent_server_is_an_error_after_a_bounded_time(store: RemoteStore, proxy: FaultyProxy) -> None:
    proxy.arm(*(Fault(number, False, 0.0, "stall") for number in range(10)))
    started = time.monotonic()
    with pytest.raises(UploadError, match="it did not answer in time; is the network up"):
        RemoteStore(store.url, Limits(request_s=0.2, retries=100, retry_s=0.5)).check()
    assert time.monotonic() - started < 20  # of 100 retries, those that begin within half a second
    assert 2 <= len(proxy.requests) <= 5
    proxy.arm(Fault(0, False, 0.0, "stall"))
    with pytest.raises(UploadError, match="it did not answer in time"):
        RemoteStore(store.url, Limits(request_s=0.2, retries=0)).check()
    assert len(proxy.requests) == 1


def test_a_passing_fault_is_retried(
    store: RemoteStore, proxy: FaultyProxy, local: Path, manifest: Manifest, tmp_path: Path
) -> None:
    """Of uploads and downloads."""
    for act in ("500", "reset"):
        patient = RemoteStore(f"{store.url}/{act}", Limits(retries=2))
        proxy.arm(*(Fault(number, number % 2 == 0, 0.0, act) for number in (0, 4, 8, 12)))
        assert put(patient, local, manifest)
        verify(patient.download(manifest.name, tmp_path / act), manifest)
        assert len(proxy.fired) == 4


def test_readers_beside_a_writer_see_complete_checkpoints_only(store: RemoteStore, local: Path, tmp_path: Path) -> None:
    """A listed checkpoint can be loaded, or `CheckpointNotFound` is raised because it was removed meanwhile."""
    manifests = [make(local, step) for step in (1, 2)]
    stop = threading.Event()
    errors: list[BaseException] = []
    loaded: list[CheckpointName] = []

    def read(number: int) -> None:
        reader, count = RemoteStore(store.url), 0
        while not stop.is_set() and not errors:
            for name in reader.names():
                count += 1
                try:
                    verify(reader.download(name, tmp_path / f"{number}-{count}"), manifests[name.step - 1])
                    loaded.append(name)
                except CheckpointNotFound:
                    pass
                except BaseException as error:
                    errors.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    patient, rounds = RemoteStore(store.url), 0
    while (rounds < 5 or len(loaded) < 5) and not errors:
        rounds += 1
        assert all(put(patient, local, manifest) for manifest in manifests)
        for manifest in manifests:
            patient.remove(manifest.name)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert patient._objects.sizes() == {}
