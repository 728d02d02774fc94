"""Objects in a remote store, with obstore. No secret leaves this module.

Credentials and endpoints come from the environment, as obstore reads it:

======= ==============================================================================================================
s3://   ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``; without keys, those of
        the machine or the container. For servers other than Amazon's: ``AWS_ENDPOINT`` (or ``AWS_ENDPOINT_URL``).
gs://   ``GOOGLE_APPLICATION_CREDENTIALS``, ``GOOGLE_SERVICE_ACCOUNT`` (paths of files), or those of the machine.
az://   ``AZURE_STORAGE_ACCOUNT_NAME`` with ``AZURE_STORAGE_ACCOUNT_KEY``, ``AZURE_STORAGE_SAS_TOKEN`` or
        ``AZURE_STORAGE_CLIENT_ID``, ``..._CLIENT_SECRET``, ``..._TENANT_ID``; ``AZURE_STORAGE_ENDPOINT``.
======= ==============================================================================================================

and for each of them the connection options in `_CLIENT_OPTIONS`, with the prefix ``AWS_``, ``GOOGLE_`` or ``AZURE_``
(``AWS_ALLOW_HTTP=true``). Files such as ``~/.aws`` are not read.

Only obstore's synchronous calls are used, on threads of our own, because its asynchronous ones need asyncio. They
release the interpreter lock.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from events.checkpoint import disk
from events.checkpoint.problems import explain, lacks_container
from events.errors import CheckpointDamaged, UploadError
from events.safe_files import (
    UnsafeFile,
    list_below,
    make_folder_below,
    open_below,
    read_below,
    replace_below,
    unlink_below,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")

SCHEMES = ("s3", "gs", "az", "file")
_PREFIXES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_CLIENT_OPTIONS = (
    "allow_http",
    "allow_invalid_certificates",
    "proxy_url",
    "proxy_ca_certificate",
    "proxy_excludes",
    "connect_timeout",
    "timeout",
)
_BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._-]{0,254}", re.ASCII)
# A temporary file of a killed process (`events.safe_files.replace_below`).
_STAGED = re.compile(r"\..+\.[0-9a-f]{16}\.tmp", re.ASCII | re.DOTALL)
_OURS = re.compile(r"step-[0-9]|attempt-[0-9]", re.ASCII)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Timeouts of a remote store. An unreachable store raises `UploadError` after ``connect_s``, or after ``retry_s``
    and one more request."""

    connect_s: float = 5.0
    request_s: float = 30.0
    """Maximum seconds per request, plus..."""
    slowest_bytes_per_s: float = 64 * 2**10
    """...the time of its bytes at this speed; a slower connection needs smaller parts."""
    retries: int = 3
    """Maximum immediate retries per request, after a transient failure..."""
    retry_s: float = 20.0
    """...and seconds after which none is started."""
    parallel: int = 4
    """Maximum requests at a time, and parts in memory."""


class Address(msgspec.Struct, frozen=True):
    """A parsed URL of a store."""

    url: str
    scheme: str
    bucket: str
    """Empty for ``file``."""
    prefix: str
    """Without slashes around it; of ``file``, the folder's path."""


def run_url(base: str, run_id: str) -> str:
    """Return the URL of a run's checkpoints, below that of `Checkpoints.upload`."""
    return f"{base.rstrip('/')}/{urllib.parse.quote(run_id, safe='')}"


def parse_url(url: str) -> Address:
    """Parse a URL of a store.

    Raises:
        UploadError: The URL is not of a store, or may hold a secret; the message contains no part of it.
    """
    scheme, separator, rest = url.partition("://")
    known = "give s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file:///folder"
    if not separator or scheme not in SCHEMES:
        shown = f"{scheme}://" if separator and re.fullmatch(r"[a-z0-9+.-]{1,20}", scheme) else "this text"
        raise UploadError(f"{shown} is not a URL for checkpoints; {known}")
    bucket, _, path = rest.partition("/")
    if "?" in rest or "#" in rest:
        raise UploadError(
            f"the {scheme}:// URL for checkpoints has a query or a fragment, which may be a signature; set credentials"
            f" in the environment, and {known}"
        )
    if "@" in bucket or ":" in bucket:
        raise UploadError(
            f"the {scheme}:// URL for checkpoints contains a user, a password or a port; set credentials and endpoints"
            f" in the environment, and {known}"
        )
    if (bucket not in ("", "localhost") or not path) if scheme == "file" else not _BUCKET.fullmatch(bucket):
        raise UploadError(f"the {scheme}:// URL for checkpoints has no {_container(scheme)}; {known}")
    if scheme == "file":
        return Address(url.rstrip("/"), scheme, "", urllib.request.url2pathname(f"/{path}"))
    prefix = urllib.parse.unquote(path).strip("/")
    if any(segment in ("", ".", "..") or not segment.isprintable() for segment in prefix.split("/") if prefix):
        raise UploadError(f"the {scheme}:// URL for checkpoints has a path with empty or special segments; {known}")
    return Address(url.rstrip("/"), scheme, bucket, prefix)


def _container(scheme: str) -> str:
    return {"az": "container", "file": "absolute folder"}.get(scheme, "bucket")


class Objects:
    """The objects below one URL. Any thread; every method waits for the store.

    Every method may raise `UploadError`: the store cannot be reached, or refuses. Its message contains no secret of the
    store or the environment.
    """

    def __init__(self, url: str, limits: Limits) -> None:
        self.address = parse_url(url)
        self.url = self.address.url
        is_file = self.address.scheme == "file"
        self.folder = Path(self.address.prefix) if is_file else None
        """The folder whose files are the objects; None for a remote store."""
        self._backend = _Files(Path(self.address.prefix)) if is_file else _Bucket(self.address, limits)

    def check(self) -> None:
        """Check that the store can be reached and listed."""
        self._call("use", "", self._backend.make)
        self._call("list", "", self._backend.probe)

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write an object atomically; a file is durable when this returns."""
        self._call("write", key, lambda: self._backend.put(key, data))

    def get(self, key: str, limit_bytes: int) -> bytes | None:
        """Read an object; None if it does not exist.

        Raises:
            CheckpointDamaged: The object has more than ``limit_bytes``, or is not a regular file.
        """
        data = self._call("read", key, lambda: self._backend.get(key, limit_bytes), may_lack=True)
        if isinstance(data, int):
            raise CheckpointDamaged(f"{self.url}/{key} has {data:,} bytes, more than {limit_bytes:,}")
        return data

    def get_range(self, key: str, begin: int, nbytes: int) -> bytes | None:
        """Read at least one byte of an object; None if it does not exist. Raises as `get` does."""
        return self._call("read", key, lambda: self._backend.get_range(key, begin, nbytes), may_lack=True)

    def sizes(self, below: str = "") -> dict[str, int]:
        """Return the bytes of all objects, or of those below a prefix that ends with a slash, by key."""
        return self._call("list", below, lambda: self._backend.sizes(below.rstrip("/")), may_lack=True) or {}

    def delete(self, key: str) -> None:
        """Delete an object; a missing one is not an error."""
        self._call("delete", key, lambda: self._backend.delete(key), may_lack=True)

    def clear_staged(self) -> None:
        """Remove temporary files of killed processes. Not during a write."""
        self._call("clean", "", self._backend.clear_staged)

    def _call(self, action: str, key: str, function: Callable[[], T], *, may_lack: bool = False) -> T | None:
        """Make a call; None without the object, if ``may_lack``."""
        problem: CheckpointDamaged | UploadError
        try:
            return function()
        except self._backend.errors() as error:
            if may_lack and isinstance(error, FileNotFoundError) and not lacks_container(error):
                return None
            where = f"{self.url}/{key}".rstrip("/")
            if action == "read" and isinstance(error, UnsafeFile):
                problem = CheckpointDamaged(f"{where} cannot be read: {error.strerror}")
            else:
                problem = explain(error, action, where, self.address.scheme)
        # Outside the handler: obstore's error would become its context, with the secrets that it quotes.
        raise problem


class _Files:
    """Objects that are the files of a folder. No link below it is followed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def errors(self) -> tuple[type[BaseException], ...]:
        return OSError, ValueError

    def make(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)

    def probe(self) -> None:
        list_below(self._folder, ".")

    def put(self, key: str, data: bytes | memoryview) -> None:
        self.make()
        if above := os.path.dirname(key):
            make_folder_below(self._folder, above)
        replace_below(self._folder, key, [data])
        for folder in (self._folder, self._folder.parent):
            disk.sync_folder(folder)

    def get(self, key: str, limit_bytes: int) -> bytes:
        return read_below(self._folder, key, limit_bytes)

    def get_range(self, key: str, begin: int, nbytes: int) -> bytes:
        with open(open_below(self._folder, key), "rb") as file:
            file.seek(begin)
            return file.read(nbytes)

    def sizes(self, below: str) -> dict[str, int]:
        """Return the sizes of our files; other files may be beside them."""
        found: dict[str, int] = {}
        for entry in list_below(self._folder, below or "."):
            key, status = f"{below}/{entry.name}" if below else entry.name, entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                if not _STAGED.fullmatch(entry.name):
                    found[key] = status.st_size
            elif stat.S_ISDIR(status.st_mode) and not below and _OURS.match(key):
                with contextlib.suppress(FileNotFoundError):  # removed
                    found |= self.sizes(key)
        return found

    def delete(self, key: str) -> None:
        unlink_below(self._folder, key)
        self._remove_empty(os.path.dirname(key))

    def clear_staged(self) -> None:
        for entry in list_below(self._folder, "."):
            if not entry.is_dir(follow_symlinks=False):
                if _STAGED.fullmatch(entry.name) and _OURS.match(entry.name[1:]):
                    unlink_below(self._folder, entry.name)
            elif _OURS.match(entry.name):
                with contextlib.suppress(FileNotFoundError):  # removed
                    for inside in list_below(self._folder, entry.name):
                        if _STAGED.fullmatch(inside.name):
                            unlink_below(self._folder, f"{entry.name}/{inside.name}")
                self._remove_empty(entry.name)

    def _remove_empty(self, name: str) -> None:
        if name:
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(self._folder / name)


class _Bucket:
    """Objects in a bucket or container, through obstore."""

    def __init__(self, address: Address, limits: Limits) -> None:
        self._address = address
        self._limits = limits
        self._clients: dict[int, ObjectStore] = {}
        self._lock = threading.Lock()

    def errors(self) -> tuple[type[BaseException], ...]:
        try:
            from obstore.exceptions import BaseError
        except ImportError as error:
            raise UploadError("uploading checkpoints needs obstore: pip install 'stagecast[upload]'") from error
        return OSError, ValueError, RuntimeError, BaseError

    def make(self) -> None:
        """Do nothing: buckets are created by their owner."""

    def probe(self) -> None:
        import obstore

        next(iter(obstore.list(self._client(), chunk_size=1)), None)

    def put(self, key: str, data: bytes | memoryview) -> None:
        import obstore

        # One plain request: a killed process would leave a multipart upload behind, invisible and paid for, which
        # obstore can neither list nor abort.
        obstore.put(self._client(len(data)), key, data, use_multipart=False)

    def get(self, key: str, limit_bytes: int) -> bytes | int:
        """Read an object; only its size if that is above the limit."""
        import obstore

        found = obstore.get(self._client(), key)
        size = found.meta["size"]
        return size if size > limit_bytes else bytes(found.bytes())

    def get_range(self, key: str, begin: int, nbytes: int) -> bytes:
        import obstore

        return bytes(obstore.get_range(self._client(nbytes), key, start=begin, length=nbytes))

    def sizes(self, below: str) -> dict[str, int]:
        import obstore

        pages = obstore.list(self._client(), below or None, chunk_size=1000)
        return {one["path"]: one["size"] for page in pages for one in page}

    def delete(self, key: str) -> None:
        import obstore

        obstore.delete(self._client(), key)

    def clear_staged(self) -> None:
        """Do nothing: an object is written by one request."""

    def _client(self, nbytes: int = 0) -> ObjectStore:
        """Return a client whose timeout suits requests of ``nbytes``."""
        size = 0 if nbytes <= 2**20 else 1 << (nbytes - 1).bit_length()
        with self._lock:
            if size not in self._clients:
                self._clients[size] = self._connect(size)
            return self._clients[size]

    def _connect(self, nbytes: int) -> ObjectStore:
        from obstore.store import AzureStore, GCSStore, S3Store

        address, limits = self._address, self._limits
        kinds: dict[str, Callable[..., ObjectStore]] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
        # With options of ours, obstore reads none from the environment.
        variables = {option: _PREFIXES[address.scheme] + option.upper() for option in _CLIENT_OPTIONS}
        options = {
            "connect_timeout": timedelta(seconds=limits.connect_s),
            "timeout": timedelta(seconds=limits.request_s + nbytes / limits.slowest_bytes_per_s),
        } | {option: os.environ[name] for option, name in variables.items() if name in os.environ}
        retries = {"max_retries": limits.retries, "retry_timeout": timedelta(seconds=limits.retry_s)}
        return kinds[address.scheme](
            address.bucket, prefix=address.prefix or None, client_options=options, retry_config=retries
        )
