"""A real S3 server: errors name the cause and a fix, and a passing fault is not noticed.

`tests/faults/test_stores.py` has the contract of all stores.
"""

from __future__ import annotations

import time
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.servers import Server
from support.checkpoints import make, put
from support.faulty_proxy import Fault, FaultyProxy

from events.checkpoint.files import verify
from events.checkpoint.manifest import Manifest
from events.checkpoint.objects import Limits, run_url
from events.checkpoint.remote import RemoteStore
from events.errors import UploadError

IMPATIENT = Limits(connect_s=2.0, request_s=2.0, retries=0)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "local"


@pytest.fixture
def manifest(local: Path) -> Manifest:
    """That of a checkpoint in the local folder."""
    return make(local, 5, tensors=3_001)


@pytest.fixture
def store(s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteStore:
    """A place of the test's own in the bucket."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    return RemoteStore(run_url(f"{s3.url}/a prefix", f"{tmp_path.name} #1"), IMPATIENT)


def test_a_checkpoint_consists_of_objects_of_plain_requests(
    s3: Server, store: RemoteStore, local: Path, manifest: Manifest, tmp_path: Path
) -> None:
    """A killed process could leave an upload in parts behind."""
    assert put(store, local, manifest)
    keys = [one["Key"] for one in s3.boto.list_objects_v2(Bucket="checkpoints", Prefix="a prefix/")["Contents"]]
    mine = [key.split("/", 2) for key in keys if f"/{tmp_path.name} #1/" in key]
    assert [rest for _, _, rest in mine] == [
        "step-5.a1/manifest.json",
        "step-5.a1/parts.json",
        *(f"step-5.a1/tensors.bin.{part:05}-of-00004" for part in range(4)),
    ]
    assert s3.multipart_uploads() == []


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
