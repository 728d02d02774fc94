"""Checkpoints in a remote store: visible only when complete, never mixed, and no secret in any message.

Only this store's own promises: `tests/faults/test_stores.py` has the contract of all stores.
"""

from __future__ import annotations

import http.server
import itertools
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from support.checkpoints import PART, make, put

from events.checkpoint import parallel
from events.checkpoint.files import verify
from events.checkpoint.lineage import AttemptNote
from events.checkpoint.manifest import CheckpointName, Manifest, encode_manifest
from events.checkpoint.objects import Limits, Objects, parse_url, run_url
from events.checkpoint.parallel import in_order
from events.checkpoint.problems import explain
from events.checkpoint.remote import RemoteStore
from events.checkpoint.remote_layout import PARTS_NAME, encode_parts, parts_for, parts_of
from events.checkpoint.store import CheckpointStore
from events.errors import CheckpointDamaged, CheckpointNotFound, CheckpointTooNew, UploadError
from trainer.cli.sources import RemoteSource

IMPATIENT = Limits(connect_s=2.0, request_s=2.0, retries=0)
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIASECRETSECRET0001",
    "AWS_SECRET_ACCESS_KEY": "s3cr3t/with+slashes/and=more0123456789ab",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzESESSIONSECRETabcdef0123456789",
    "AWS_REGION": "eu-central-1",
}
posix_only = pytest.mark.skipif(os.name == "nt", reason="links, FIFOs and SIGKILL are POSIX")


def keys(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def cancel_after(parts: int) -> Callable[[], bool]:
    count = itertools.count()
    return lambda: next(count) >= parts


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "local"


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "into" / "checkpoints"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The folder behind the remote store."""
    return tmp_path / "a #{store}%20"


@pytest.fixture
def remote(there: Path) -> RemoteStore:
    return RemoteStore(there.as_uri())


@pytest.fixture
def manifest(local: Path) -> Manifest:
    """That of a local checkpoint of six parts and a file."""
    return make(local, 5)


@pytest.fixture
def uploaded(remote: RemoteStore, local: Path, manifest: Manifest, there: Path) -> Path:
    """The folder of its objects."""
    put(remote, local, manifest)
    return there / "step-5.a1"


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of all objects that are written, in order."""
    written: list[str] = []
    real = Objects.put

    def spy(self: Objects, key: str, data: bytes) -> None:
        written.append(key)
        real(self, key, data)

    monkeypatch.setattr(Objects, "put", spy)
    return written


# ------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://key:SECRET@bucket/prefix", "a user, a password or a port"),
        ("s3://SECRET@bucket/prefix", "a user, a password or a port"),
        ("s3://key:SECRET/more@bucket/prefix", "a user, a password or a port"),
        ("gs://key:SECRET@bucket", "a user, a password or a port"),
        ("az://container@SECRET.blob.core.windows.net/x", "a user, a password or a port"),
        ("az://container/x?sv=2020&sig=SECRET", "a query or a fragment"),
        ("s3://bucket/x#SECRET", "a query or a fragment"),
        ("https://SECRET.blob.core.windows.net/c?sig=SECRET", "https:// is not a URL"),
        ("SECRET:xyz", "this text is not a URL"),
        ("SECRET/bucket", "this text is not a URL"),
        ("memory:///SECRET", "memory:// is not a URL"),
        ("s3:///SECRET", "has no bucket"),
        ("az:///SECRET", "has no container"),
        ("file://host/SECRET", "has no absolute folder"),
        ("file://", "has no absolute folder"),
        ("s3://bucket/SECRET//x", "empty or special segments"),
        ("s3://bucket/../SECRET", "empty or special segments"),
        ("s3://bucket/%2e%2e/SECRET", "empty or special segments"),
        ("s3://bucket/SECRET%0A", "empty or special segments"),
    ],
)
def test_an_invalid_address_is_refused_and_not_repeated(url: str, why: str) -> None:
    """It may hold a password, and messages are logged, published and sent."""
    with pytest.raises(UploadError, match=f"{why}.*give s3://bucket/prefix") as caught:
        RemoteStore(url)
    assert "SECRET" not in str(caught.value)


def test_the_name_of_a_run_is_one_segment_of_its_address() -> None:
    address = parse_url(run_url("s3://bucket/my%20prefix/", "a/b #1?%"))
    assert (address.scheme, address.bucket) == ("s3", "bucket")
    assert run_url("s3://bucket", "a/b").endswith("/a%2Fb")
    assert parse_url(run_url("s3://bucket/p", "20260131-235959-a1b2c3")).prefix == "p/20260131-235959-a1b2c3"


def test_a_bucket_without_obstore_names_the_extra_and_a_folder_needs_none(
    remote: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    with pytest.raises(UploadError, match=r"pip install 'stagecast\[upload\]'"):
        RemoteStore("s3://bucket/run").check()
    remote.check()


# ---------------------------------------------------------------------------------------- secrets and outages


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers every request with the same status and body."""

    answer: tuple[int, str] = (0, "")
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = self.answer[1].encode()
        self.send_response(self.answer[0])
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_DELETE = do_POST = do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Refusing]]:
    """The endpoint of S3, with `SECRETS` in the environment."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        monkeypatch.setenv("AWS_ENDPOINT", f"http://user:{SECRETS['AWS_SESSION_TOKEN']}@127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield Refusing
        server.shutdown()
        thread.join()


def errors_of(remote: RemoteStore, local: Path, manifest: Manifest) -> list[UploadError | CheckpointDamaged]:
    """Return what each method raises."""
    calls: list[Callable[[], object]] = [
        remote.check,
        remote.names,
        remote.line,
        remote.reap,
        lambda: remote.manifest(manifest.name),
        lambda: remote.remove(manifest.name),
        lambda: remote.note([AttemptNote(1, None)]),
        lambda: remote.download(manifest.name, local / "into"),
        lambda: put(remote, local, manifest),
        lambda: remote._objects.put("key", b"data"),
        lambda: remote._objects.delete("key"),
    ]
    errors = []
    for call in calls:
        try:
            call()
        except (UploadError, CheckpointDamaged) as error:
            errors.append(error)
    return errors


def text_of(error: BaseException) -> str:
    """All that a logger could make of an error: its traceback, and its contexts."""
    texts = ["".join(traceback.format_exception(error))]
    while error.__context__ is not None:
        error = error.__context__
        texts.append(repr(error))
    return "".join(texts)


SIGNATURE = (
    "<?xml version='1.0'?><Error><Code>SignatureDoesNotMatch</Code><Message>The request signature we calculated does"
    " not match</Message><AWSAccessKeyId>{AWS_ACCESS_KEY_ID}</AWSAccessKeyId><StringToSign>AWS4-HMAC-SHA256"
    " x-amz-security-token:{AWS_SESSION_TOKEN}</StringToSign><Key>{AWS_SECRET_ACCESS_KEY}</Key></Error>"
)


@pytest.mark.parametrize(
    ("status", "body", "cause"),
    [
        (403, SIGNATURE, "access was denied (403 Forbidden, SignatureDoesNotMatch); check the credentials"),
        (401, SIGNATURE, "access was denied (401 Unauthorized"),
        (500, SIGNATURE, "the store failed (500 Internal Server Error"),
        (400, SIGNATURE, "the store refused (400 Bad Request"),
        (404, "<Error><Code>NoSuchBucket</Code><Key>{AWS_ACCESS_KEY_ID}</Key></Error>", "the bucket does not exist"),
        (200, "{AWS_SECRET_ACCESS_KEY} {AWS_SESSION_TOKEN}", None),
    ],
)
def test_a_server_that_quotes_secrets_in_its_refusal_is_not_quoted(
    refusing: type[Refusing], local: Path, manifest: Manifest, status: int, body: str, cause: str | None
) -> None:
    refusing.answer = (status, body.format(**SECRETS))
    remote = RemoteStore("s3://bucket/prefix/run", IMPATIENT)
    errors = errors_of(remote, local, manifest)
    assert len(errors) > 3
    texts = "".join(map(text_of, errors))
    assert not [name for name, value in SECRETS.items() if name != "AWS_REGION" and value in texts]
    if cause is not None:
        assert all(isinstance(error, UploadError) and remote.url in str(error) for error in errors)
        assert cause in str(errors[0])


LOCAL = "http://127.0.0.1:1"  # nothing listens there
AZURE = {
    "AZURE_STORAGE_ACCOUNT_NAME": "account",
    "AZURE_STORAGE_ENDPOINT": LOCAL,
    "AZURE_ALLOW_HTTP": "true",
}
SAS = "sv=2022-11-02&sp=rwdl&sig=c2VjcmV0LXNlY3JldC1zZWNyZXQ%3D"
GOOGLE = {"GOOGLE_BASE_URL": LOCAL, "GOOGLE_BEARER_TOKEN": "c2VjcmV0LXNlY3JldC1zZWNyZXQ", "GOOGLE_ALLOW_HTTP": "true"}


@pytest.mark.parametrize(
    ("url", "environment", "cause"),
    [
        ("s3://b/run", {"AWS_ENDPOINT": LOCAL}, "refused; is the network up, and AWS_ENDPOINT right"),
        ("s3://b/run", {"AWS_ENDPOINT": "http://nobody.invalid"}, "its address is not known; is the network up"),
        ("s3://b/run", {"AWS_ENDPOINT": LOCAL, "AWS_ALLOW_HTTP": "false"}, "encrypted; .* AWS_ALLOW_HTTP=true"),
        (
            "az://c/run",
            AZURE | {"AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0LXNlY3JldA=="},
            "and AZURE_STORAGE_ENDPOINT right",
        ),
        ("az://c/run", AZURE | {"AZURE_STORAGE_SAS_TOKEN": SAS}, "and AZURE_STORAGE_ENDPOINT right"),
        ("az://c/run", {}, "no account is named; set AZURE_STORAGE_ACCOUNT_NAME"),
        ("gs://b/run", GOOGLE, "and GOOGLE_BASE_URL right"),
    ],
)
def test_an_unreachable_store_raises_in_time_and_names_the_variables_to_check(
    url: str,
    environment: dict[str, str],
    cause: str,
    local: Path,
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (SECRETS | {"AWS_ALLOW_HTTP": "true"} | environment).items():
        monkeypatch.setenv(name, value)
    errors = errors_of(RemoteStore(url, IMPATIENT), local, manifest)
    assert len(errors) == 11
    for error in errors:
        with pytest.raises(UploadError, match=f"{url}.*{cause}"):
            raise error
        text = text_of(error)
        assert not [secret for secret in ("c2VjcmV0", *SECRETS.values()) if secret in text]


def test_an_unknown_error_shows_its_first_line_without_anything_that_looks_like_a_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "hunter2!")
    text = "odd hunter2! at https://user:pw@host/x?sig=abc with AbCdEf0123456789+/AbCdEf==\n\nDebug source: hunter3"
    shown = str(explain(ValueError(text), "write", "az://c/x", "az"))
    assert shown == "cannot write az://c/x: ValueError: odd ... at ... with ...; check the URL, and the environment"


# -------------------------------------------------------------------------------------------------- uploading


def test_the_parts_of_a_file_join_with_cat_to_the_original(
    remote: RemoteStore, there: Path, local: Path, into: Path
) -> None:
    manifest = make(local, 5, tensors=5_500, state=300, empty=0, exact=2_000, single=PART)
    seen: list[tuple[int, int]] = []
    assert put(remote, local, manifest, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (manifest.nbytes, manifest.nbytes)
    assert seen == sorted(seen)
    parts = sorted((there / "step-5.a1").glob("tensors.bin.*-of-*"))
    assert [part.stat().st_size for part in parts] == [PART] * 5 + [500]
    assert b"".join(part.read_bytes() for part in parts) == (local / "step-5.a1/tensors.bin").read_bytes()
    path = remote.download(manifest.name, into)
    assert keys(path) == sorted([*keys(local / "step-5.a1"), "uploaded"])
    upload = CheckpointStore(into).upload_of(manifest.name)
    assert upload is not None
    assert upload.url == f"{remote.url}/step-5.a1"


def test_parts_sort_in_their_order() -> None:
    parts = parts_of("file", 100_001, 1)
    assert sorted(part.key for part in parts) == [part.key for part in parts]
    assert parts[-1].key == "file.100000-of-100001"
    assert parts_of("file", 0, 10) == [("file", 0)]
    assert parts_of("file", 10, 10) == [("file", 10)]
    assert parts_of("file", 11, 10) == [("file.00000-of-00002", 10), ("file.00001-of-00002", 1)]


def test_an_upload_resumes_at_its_first_missing_object(
    remote: RemoteStore, there: Path, local: Path, into: Path, manifest: Manifest, puts: list[str]
) -> None:
    assert not put(remote, local, manifest, cancelled=cancel_after(3))
    assert remote.names() == []
    first = puts[1:]  # after parts.json
    assert len(first) == 3
    puts.clear()
    (there / first[0]).write_bytes(b"half")  # a store may keep half of an object
    seen: list[int] = []
    assert put(remote, local, manifest, progress=lambda done, total: seen.append(done))
    assert seen[-1] == manifest.nbytes  # existing objects count
    assert puts[-1] == "step-5.a1/manifest.json"
    assert set(puts) & set(first) == {first[0]}
    assert len(puts) == 6 + 1 - 3 + 1 + 1
    puts.clear()
    assert put(remote, local, manifest)
    assert puts == []
    verify(remote.download(manifest.name, into), manifest)


@pytest.mark.parametrize("part_bytes", [PART, 700])
def test_an_upload_never_mixes_with_one_of_an_earlier_run_of_its_name(
    remote: RemoteStore, local: Path, tmp_path: Path, manifest: Manifest, part_bytes: int
) -> None:
    """A new run in a deleted folder makes checkpoints of the same names and sizes."""
    new = make(tmp_path / "new", 5, tensors=5_500, state=301)
    assert not put(remote, local, manifest, cancelled=cancel_after(4))
    assert put(remote, tmp_path / "new", new, part_bytes=part_bytes)
    sizes = remote._objects.sizes("step-5.a1/")
    expected = [part.key for file, entry in new.files.items() for part in parts_of(file, entry.nbytes, part_bytes)]
    assert set(sizes) == {f"step-5.a1/{key}" for key in [*expected, PARTS_NAME, "manifest.json"]}
    with pytest.raises(UploadError, match=r"step-5.a1 is another checkpoint than the local one"):
        put(remote, local, manifest)
    verify(remote.download(new.name, tmp_path / "again"), new)


def test_a_changed_local_file_never_becomes_visible(remote: RemoteStore, local: Path, manifest: Manifest) -> None:
    """Retention deletes older checkpoints because of an upload."""
    path = local / "step-5.a1/tensors.bin"
    for data in (path.read_bytes()[:-1], path.read_bytes() + b"x", b"x" + path.read_bytes()[1:]):
        path.write_bytes(data)
        with pytest.raises(CheckpointDamaged, match=r"tensors\.bin"):
            put(remote, local, manifest)
        assert remote.names() == []


def test_an_object_that_another_process_deletes_during_the_upload_keeps_the_checkpoint_invisible(
    remote: RemoteStore, there: Path, local: Path, manifest: Manifest
) -> None:
    def progress(done: int, total: int) -> None:
        if done == total:
            (there / "step-5.a1/state.bin").unlink()

    with pytest.raises(UploadError, match=r"state\.bin was deleted during the upload"):
        put(remote, local, manifest, progress=progress)
    assert remote.names() == []


def test_files_with_the_names_of_parts_are_refused(remote: RemoteStore, local: Path) -> None:
    manifest = make(local, 5, **{"a": 1_500, "a.bin.00000-of-00002": 5})
    renamed = {name.replace("02.bin", "02"): entry for name, entry in manifest.files.items()}
    with pytest.raises(UploadError, match="have the names of other files"):
        put(remote, local, msgspec.structs.replace(manifest, files=renamed))


def test_as_many_parts_as_limits_parallel_are_uploaded_at_a_time(
    there: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make(local, 5, tensors=20 * PART)
    lock, met = threading.Lock(), threading.Barrier(3)
    begun, flying, most = 0, 0, 0
    real = Objects.put

    def counted(self: Objects, key: str, data: bytes) -> None:
        nonlocal begun, flying, most
        with lock:
            begun, flying = begun + 1, flying + 1
            most = max(most, flying)
            first = 1 < begun <= 4  # after parts.json
        if first:
            met.wait(30)  # returns only when three are under way
        real(self, key, data)
        with lock:
            flying -= 1

    monkeypatch.setattr(Objects, "put", counted)
    assert put(RemoteStore(there.as_uri(), Limits(parallel=3)), local, manifest)
    assert (begun, flying, most) == (22, 0, 3)


# ------------------------------------------------------------------------------------------ readers and removal


def test_a_failed_removal_leaves_nothing_visible_and_is_reaped(
    remote: RemoteStore, there: Path, uploaded: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = Objects.delete, iter(range(2))

    def failing(self: Objects, key: str) -> None:
        if next(left, None) is None:
            raise UploadError("cut")
        real(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "delete", failing)
        with pytest.raises(UploadError, match="cut"):
            remote.remove(manifest.name)
    assert remote.names() == []
    assert remote.reap(keep={manifest.name}) == []  # it will be uploaded
    assert len(keys(there)) > 3
    assert remote.reap() == [manifest.name]
    uploaded.mkdir()
    (uploaded / "manifest.json").write_bytes(encode_manifest(manifest))  # a late request
    assert remote.names() == []
    assert remote.reap() == [manifest.name]
    assert list(there.iterdir()) == []


@pytest.mark.parametrize("lost", ["parts.json", "tensors.bin.00002-of-00006", "manifest.json", "other parts.json"])
def test_a_visible_incomplete_checkpoint_becomes_invisible_and_is_uploaded_again(
    remote: RemoteStore, uploaded: Path, local: Path, into: Path, manifest: Manifest, lost: str
) -> None:
    if lost == "manifest.json":
        (uploaded / lost).write_bytes(b"{}")
    elif lost == "other parts.json":
        other = msgspec.structs.replace(manifest, seq=7)
        (uploaded / "parts.json").write_bytes(encode_parts(parts_for(other, PART)))
    else:
        (uploaded / lost).unlink()
    seen: list[CheckpointName] = []
    assert put(remote, local, manifest, cancelled=lambda: bool(seen.extend(remote.names())))
    assert seen == []
    verify(remote.download(manifest.name, into), manifest)


def test_a_damaged_download_is_named_and_not_committed(
    remote: RemoteStore, uploaded: Path, local: Path, into: Path, manifest: Manifest
) -> None:
    part = uploaded / "tensors.bin.00002-of-00006"
    good = part.read_bytes()
    for file, data, problem in [
        (part.name, good[:-1], "999 bytes instead of 1,000"),
        (part.name, b"x" + good[1:], "holds other bytes"),
        (part.name, None, "00002-of-00006 is missing"),
        ("parts.json", b'{"part_bytes":0,"manifest_xxh3_128":""}', r"parts\.json was changed"),
        ("parts.json", b"{", r"parts\.json was changed"),
        ("parts.json", b'{"part_bytes":1000,"manifest_xxh3_128":""}', "is that of another checkpoint"),
        ("manifest.json", b"{}", r"manifest\.json"),
    ]:
        (uploaded / file).unlink() if data is None else (uploaded / file).write_bytes(data)
        with pytest.raises(CheckpointDamaged, match=problem):
            remote.download(manifest.name, into)
        assert keys(into) == []
    with pytest.raises(CheckpointNotFound, match=r"there is no checkpoint file://.*step-6\.a1"):
        remote.download(CheckpointName(6, 1), into)


def test_a_checkpoint_of_a_later_version_is_not_overwritten(
    remote: RemoteStore, uploaded: Path, local: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("events.checkpoint.manifest.FORMAT", 0)
    with pytest.raises(CheckpointTooNew):
        remote.manifest(manifest.name)
    with pytest.raises(UploadError, match="another checkpoint"):
        put(remote, local, manifest)


@posix_only
def test_temporary_files_of_a_killed_process_are_not_listed_and_reaped(remote: RemoteStore, there: Path) -> None:
    code = f"""
import os, signal
from events.safe_files import replace_below
def chunks():
    yield b"half"
    os.kill(os.getpid(), signal.SIGKILL)
replace_below({str(there)!r}, "step-5.a1/tensors.bin", chunks())
"""
    (there / "step-5.a1").mkdir(parents=True)
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=50, check=False)
    assert killed.returncode == -signal.SIGKILL
    (key,) = keys(there)
    assert key.startswith("step-5.a1/.tensors.bin.")
    assert key.endswith(".tmp")
    (there / ".attempt-1.json.0123456789abcdef.tmp").write_bytes(b"")
    (there / ".mine.0123456789abcdef.tmp").write_bytes(b"")  # another file of the user
    assert remote._objects.sizes() == {}
    remote.reap()
    assert keys(there) == [".mine.0123456789abcdef.tmp"]


@posix_only
@pytest.mark.parametrize("what", ["folder", "object"])
def test_an_object_is_not_written_through_a_link_that_appears_during_the_upload(
    remote: RemoteStore,
    there: Path,
    local: Path,
    tmp_path: Path,
    manifest: Manifest,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    private = tmp_path / "private"
    private.mkdir()
    (private / "file").write_bytes(b"private")
    real = Objects.put

    def put_after_link(self: Objects, key: str, data: bytes) -> None:
        if key.endswith("manifest.json"):
            if what == "folder":
                (there / "step-5.a1").rename(there / "away")
                (there / "step-5.a1").symlink_to(private)
            else:
                (there / key).symlink_to(private / "file")
        real(self, key, data)

    monkeypatch.setattr(Objects, "put", put_after_link)
    if what == "folder":
        with pytest.raises(UploadError, match="symbolic link"):
            put(remote, local, manifest)
    else:
        put(remote, local, manifest)
        assert remote.names() == [manifest.name]
    assert [(path.name, path.read_bytes()) for path in private.iterdir()] == [("file", b"private")]


def test_an_outage_is_not_taken_for_the_beginning_of_the_line(
    remote: RemoteStore, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(remote, local, make(local, 10))
    put(remote, local, make(local, 25, 2, parent="step-10.a1"))

    def outage(self: RemoteStore, name: CheckpointName) -> Manifest:
        raise UploadError("out")

    monkeypatch.setattr(RemoteStore, "manifest", outage)
    with pytest.raises(UploadError, match="out"):
        remote.line()


def test_later_notes_of_an_earlier_run_of_the_name_are_deleted(remote: RemoteStore, there: Path) -> None:
    remote.note([AttemptNote(number, None) for number in (1, 2, 3)])
    remote.note([AttemptNote(1, "step-5.a0")])
    assert keys(there) == ["attempt-1.json"]


def test_only_check_creates_the_folder_and_a_file_in_its_place_is_an_error(
    remote: RemoteStore, there: Path, tmp_path: Path, into: Path
) -> None:
    with pytest.raises(CheckpointNotFound):
        remote.download(CheckpointName(1, 1), into)
    assert not there.exists()
    remote.check()
    assert there.is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UploadError, match=r"cannot use file://.*(exists|not a directory)"):
        RemoteStore((tmp_path / "file").as_uri()).check()


# ------------------------------------------------------------------------------------------------ calls in order


def test_a_failing_call_ends_the_others_in_order() -> None:
    """No further call starts, and none is pending when the error arrives."""
    begun: list[int] = []
    finished: list[int] = []
    go = threading.Event()

    def call(number: int) -> int:
        begun.append(number)
        if number == 1:
            go.set()
            raise ValueError("one")
        go.wait(30)
        finished.append(number)
        return number

    results = []
    with pytest.raises(ValueError, match="one"):
        for result in in_order((lambda number=number: call(number) for number in range(100)), 3, "test"):
            results.append(result)
    assert results == [0]
    assert len(begun) <= 4
    assert sorted(finished) == sorted(set(begun) - {1})


def test_closing_the_results_early_leaves_no_thread() -> None:
    with closing(in_order((lambda: 1 for _ in range(100)), 3, "left-behind")) as results:
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name == "left-behind"]


def test_without_threads_the_caller_makes_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(parallel.threading.Thread, "start", no_more)
    assert list(in_order((lambda number=number: number for number in range(5)), 3, "test")) == list(range(5))


# ------------------------------------------------------------------------------------------- a stranger's objects


@pytest.mark.parametrize("part_bytes", [1, 2**20, 2**62])
def test_a_manifest_that_claims_more_than_exists_is_damage_before_memory_or_disk_is_taken(
    remote: RemoteStore, uploaded: Path, local: Path, into: Path, manifest: Manifest, part_bytes: int
) -> None:
    files = {name: msgspec.structs.replace(entry, nbytes=2**61) for name, entry in manifest.files.items()}
    huge = msgspec.structs.replace(manifest, files=files)
    with pytest.raises(CheckpointDamaged, match="would consist of"):
        put(RemoteStore(f"{remote.url}/other"), local, huge)
    (uploaded / "manifest.json").write_bytes(encode_manifest(huge))
    (uploaded / "parts.json").write_bytes(encode_parts(parts_for(huge, part_bytes)))
    with pytest.raises(CheckpointDamaged):
        remote.download(manifest.name, into)
    assert keys(into) == []
    source = RemoteSource(remote.url)
    for read in (source.check, source.verify, lambda one: source.read(one, next(iter(files)))):
        with pytest.raises(CheckpointDamaged):
            read(source.manifest(manifest.name))


@posix_only
@pytest.mark.parametrize("kind", ["link", "FIFO", "folder", "sparse"])
@pytest.mark.parametrize("file", ["manifest.json", "parts.json", "state.bin"])
def test_an_object_that_is_not_a_small_regular_file_is_damage(
    remote: RemoteStore, uploaded: Path, local: Path, into: Path, manifest: Manifest, file: str, kind: str
) -> None:
    """The reader neither waits for it, nor follows it, nor reads it into memory; the checkpoint beside it is whole."""
    older, path = make(local, 4), uploaded / file
    put(remote, local, older)
    path.rename(local / "secret")
    if kind == "link":
        path.symlink_to(local / "secret")
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with open(path, "wb") as sparse:
            sparse.truncate(40 * 2**30)
    with pytest.raises((CheckpointDamaged, CheckpointNotFound)):
        remote.download(manifest.name, into)
    verify(remote.download(older.name, into), older)


@posix_only
def test_a_folder_of_objects_that_is_a_link_is_neither_written_nor_emptied(
    remote: RemoteStore, there: Path, local: Path, tmp_path: Path, manifest: Manifest
) -> None:
    private = tmp_path / "private"
    private.mkdir()
    (private / "manifest.json").write_bytes(b"mine")
    there.mkdir()
    (there / str(manifest.name)).symlink_to(private)
    for act in (lambda: put(remote, local, manifest), lambda: remote.remove(manifest.name)):
        with pytest.raises((UploadError, CheckpointDamaged), match="symbolic link"):
            act()
    remote.reap()
    assert remote.names() == []
    assert {path.name: path.read_bytes() for path in private.iterdir()} == {"manifest.json": b"mine"}
