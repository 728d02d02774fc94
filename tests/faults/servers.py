"""Real servers of objects, each in its own process, at a free port."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

BUCKET = "checkpoints"

_MOTO = """
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server
application = DomainDispatcherApplication(create_backend_app)
server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
print(f"listens on http://127.0.0.1:{server.port}", flush=True)
server.serve_forever()
"""
# The account that every emulator of Azure's storage has, with its well-known key.
_ACCOUNT = "devstoreaccount1"
_ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class Server:
    def __init__(self, scheme: str, port: int) -> None:
        self.scheme = scheme
        self.port = port
        self.url = f"{scheme}://{BUCKET}"

    def environment(self, port: int | None = None) -> dict[str, str]:
        """The environment with which obstore reaches it, directly or through a proxy's port."""
        endpoint = f"http://127.0.0.1:{port if port is not None else self.port}"
        if self.scheme == "s3":
            return {
                "AWS_ACCESS_KEY_ID": "tester",
                "AWS_SECRET_ACCESS_KEY": "not-very-secret",
                "AWS_REGION": "us-east-1",
                "AWS_ENDPOINT": endpoint,
                "AWS_ALLOW_HTTP": "true",
            }
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": _ACCOUNT_KEY,
            "AZURE_STORAGE_ENDPOINT": f"{endpoint}/{_ACCOUNT}",
            "AZURE_ALLOW_HTTP": "true",
        }

    def multipart_uploads(self) -> list[str]:
        """Keys of uploads in parts that were neither completed nor aborted."""
        assert self.scheme == "s3"
        return [one["Key"] for one in self.boto.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]

    @functools.cached_property
    def boto(self) -> Any:
        """Another client."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name="us-east-1",
            aws_access_key_id="tester",
            aws_secret_access_key="not-very-secret",
        )


@contextmanager
def moto(folder: Path) -> Iterator[Server]:
    """S3, by moto, with a bucket."""
    with _listening([sys.executable, "-c", _MOTO], folder) as port:
        server = Server("s3", port)
        server.boto.create_bucket(Bucket=BUCKET)
        yield server


@contextmanager
def azurite(folder: Path) -> Iterator[Server]:
    """Azure's blob storage, by azurite, with a container. Skips the test without npm."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("azurite needs node and npm; install them")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "stagecast-tests" / "azurite"
    program = cache / "node_modules" / ".bin" / "azurite-blob"
    if not program.exists():
        cache.mkdir(parents=True, exist_ok=True)
        npm = ["npm", "install", "--no-audit", "--no-fund", "azurite"]
        installed = subprocess.run(npm, cwd=cache, capture_output=True, text=True, check=False)
        if installed.returncode:
            pytest.skip(f"azurite could not be installed: {installed.stderr[-300:]}")
    command = [str(program), "--blobPort", "0", "--inMemoryPersistence", "--silent", "--disableTelemetry"]
    with _listening([*command, "--skipApiVersionCheck"], folder) as port:
        server = Server("az", port)
        _create_container(server)
        yield server


def _create_container(server: Server) -> None:
    """By a request that is signed here, because obstore cannot create one."""
    import base64
    import email.utils
    import hashlib
    import hmac
    import urllib.request

    path = f"/{_ACCOUNT}/{BUCKET}"
    headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    canonical = "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
    text = f"PUT{chr(10) * 12}{canonical}/{_ACCOUNT}{path}\nrestype:container"
    signature = base64.b64encode(hmac.digest(base64.b64decode(_ACCOUNT_KEY), text.encode(), hashlib.sha256)).decode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}?restype=container",
        method="PUT",
        headers={**headers, "Authorization": f"SharedKey {_ACCOUNT}:{signature}", "Content-Length": "0"},
    )
    urllib.request.urlopen(request, timeout=20).close()


@contextmanager
def _listening(command: list[str], folder: Path) -> Iterator[int]:
    """Run a server until the block ends; give the port that it prints, and at which it really listens."""
    log = folder / "stderr"
    with (
        open(log, "wb") as stderr,
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            port = None
            for line in process.stdout:
                if (match := re.search(r"listens on (http://\S+)", line)) is not None:
                    port = urllib.parse.urlsplit(match[1]).port
                    break
            assert port is not None, f"{command[0]} did not start: {log.read_text()[-2000:]}"
            ports = {one.laddr.port for one in psutil.Process(process.pid).net_connections() if one.status == "LISTEN"}
            assert port in ports, f"another process listens on {port}"
            yield port
        finally:
            process.kill()
