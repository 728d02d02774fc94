"""A real S3 server: what goes wrong is said in words that help, and readers beside a writer see whole checkpoints."""

from __future__ import annotations

import random
import threading
import time
import traceback
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from events.checkpoint import disk
from events.checkpoint.files import verify
from events.checkpoint.manifest import CheckpointName, FileEntry, Manifest
from events.checkpoint.objects import Limits, run_url
from events.checkpoint.remote import RemoteStore
from events.checkpoint.store import CheckpointStore
from events.errors import CheckpointNotFound, UploadError

PART = 10_000
IMPATIENT = Limits(connect_s=2.0, request_s=2.0, retries=0)


def make(folder: Path, step: int, nbytes: int = 3 * PART + 1) -> Manifest:
    store = CheckpointStore(folder)
    name = CheckpointName(step, 1)
    folder.mkdir(exist_ok=True)
    temporary = store.begin(name)
    data = random.Random(step).randbytes(nbytes)
    files = {"tensors.bin": FileEntry(*disk.write_parts(temporary, "tensors.bin", [data]))}
    place = {"run_id": "run", "attempt": 1, "global_step": step, "epoch": 0, "seq": step, "time": 0.0}
    manifest = Manifest(**place, parent=None, reasons=[], files=files)  # type: ignore[arg-type]
    store.commit(manifest)
    return manifest


def put(remote: RemoteStore, folder: Path, manifest: Manifest, **options: Any) -> bool:
    call = {"part_bytes": PART, "progress": lambda done, total: None, "cancelled": lambda: False} | options
    return remote.upload(folder / str(manifest.name), manifest, **call)


@pytest.fixture
def store(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteStore:
    """A place of the test's own in the bucket."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    return RemoteStore(run_url(f"{s3.url}/a prefix", f"{tmp_path.name} #1"), IMPATIENT)


def test_a_checkpoint_comes_back_from_s3_as_it_was(s3: Any, store: RemoteStore, tmp_path: Path) -> None:
    """By plain requests only: nothing is uploaded in a way that could be left behind."""
    manifest = make(tmp_path / "local", 5)
    store.check()
    assert store.names() == []
    assert put(store, tmp_path / "local", manifest)
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


def test_an_object_is_put_by_one_request_however_large(
    s3: Any, store: RemoteStore, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """obstore would make several of it from 5 MiB on, which a killed process leaves behind where nobody sees them."""
    proxy = helpers("faulty_proxy").FaultyProxy(s3.port)
    try:
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{proxy.port}")
        store._objects.put("large", bytes(6 * 2**20))
        assert [line.split(" ")[0] for line in proxy.requests] == ["PUT"]
        assert "?" not in proxy.requests[0]
    finally:
        proxy.close()


def test_a_bucket_that_is_missing_is_named(store: RemoteStore, tmp_path: Path) -> None:
    """With what to do, for every call, not as a missing checkpoint."""
    manifest = make(tmp_path / "local", 5)
    missing = RemoteStore("s3://no-such-bucket/run", IMPATIENT)
    calls = [
        missing.check,
        missing.names,
        lambda: missing.manifest(manifest.name),
        lambda: missing.remove(manifest.name),
        lambda: put(missing, tmp_path / "local", manifest),
        lambda: missing._objects.put("key", b"data"),
    ]
    for call in calls:
        with pytest.raises(UploadError, match=r"s3://no-such-bucket/run.*: the bucket does not exist; create it"):
            call()


def test_credentials_that_are_wrong_are_not_shown(
    s3: Any, store: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server knows them not, and says so; we say which variables to look at."""
    secrets = {"AWS_ACCESS_KEY_ID": "AKIAWRONGWRONG000001", "AWS_SECRET_ACCESS_KEY": "wr0ng/with+slashes/and=more0123"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    manifest = make(tmp_path / "local", 5)
    _check_keys(s3, from_now=True)
    try:
        for call in (store.check, store.names, lambda: put(store, tmp_path / "local", manifest)):
            with pytest.raises(UploadError, match=r"access was denied \(403 Forbidden, InvalidAccessKeyId\)") as caught:
                call()
            told = "".join(traceback.format_exception(caught.value))
            assert "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" in told
            assert not [value for value in secrets.values() if value in told]
    finally:
        _check_keys(s3, from_now=False)


def _check_keys(s3: Any, *, from_now: bool) -> None:
    """moto lets everybody in, unless it is told not to."""
    url = f"http://127.0.0.1:{s3.port}/moto-api/reset-auth"
    request = urllib.request.Request(url, b"0" if from_now else b"inf", {"Content-Type": "text/plain"})
    urllib.request.urlopen(request, timeout=20).close()


def test_no_answer_is_an_error_after_a_bounded_time(
    s3: Any, store: RemoteStore, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that takes the connection and then says nothing is given up, and the call is not made for ever."""
    proxies = helpers("faulty_proxy")
    proxy = proxies.FaultyProxy(s3.port)
    try:
        proxy.arm(*(proxies.Fault(number, False, 0.0, "stall") for number in range(10)))
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{proxy.port}")
        began = time.monotonic()
        with pytest.raises(UploadError, match="it did not answer in time; is the network up"):
            RemoteStore(store.url, Limits(request_s=0.2, retries=100, retry_s=0.5)).check()
        assert time.monotonic() - began < 20  # of 100 retries, those that begin within half a second
        assert 2 <= len(proxy.requests) <= 5
        proxy.arm(proxies.Fault(0, False, 0.0, "stall"))
        with pytest.raises(UploadError, match="it did not answer in time"):
            RemoteStore(store.url, Limits(request_s=0.2, retries=0)).check()
        assert len(proxy.requests) == 1
    finally:
        proxy.close()


def test_one_passing_fault_is_not_even_noticed(
    s3: Any, store: RemoteStore, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails for a reason that passes is asked again at once, uploads and downloads alike."""
    proxies = helpers("faulty_proxy")
    proxy = proxies.FaultyProxy(s3.port)
    manifest = make(tmp_path / "local", 5)
    try:
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{proxy.port}")
        for act in ("500", "reset"):
            patient = RemoteStore(f"{store.url}/{act}", Limits(retries=2))
            proxy.arm(*(proxies.Fault(number, number % 2 == 0, 0.0, act) for number in (0, 4, 8, 12)))
            assert put(patient, tmp_path / "local", manifest)
            verify(patient.download(manifest.name, tmp_path / act), manifest)
            assert len(proxy.fired) == 4
    finally:
        proxy.close()


def test_readers_beside_a_writer_see_whole_checkpoints_only(store: RemoteStore, tmp_path: Path) -> None:
    """Whatever is listed can be loaded, or has been removed meanwhile, which the reader is told as such."""
    local = tmp_path / "local"
    manifests = [make(local, step) for step in (1, 2)]
    stop = threading.Event()
    errors: list[BaseException] = []
    loaded: list[CheckpointName] = []

    def read(number: int) -> None:
        reader = RemoteStore(store.url)
        count = 0
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
    patient = RemoteStore(store.url)
    rounds = 0
    while (rounds < 5 or len(loaded) < 5) and not errors:
        rounds += 1
        for manifest in manifests:
            assert put(patient, local, manifest)
        for manifest in manifests:
            patient.remove(manifest.name)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert patient._objects.sizes() == {}
