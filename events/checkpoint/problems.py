"""Explains errors of a remote store, without secrets.

Errors of obstore quote the request and the server's response: addresses with signatures, key ids, signed texts. So our
own text replaces known causes; an unknown error keeps its first line, without addresses, values of the environment, and
texts that look like a key.
"""

from __future__ import annotations

import http
import os
import re

from events.errors import UploadError
from events.safe_files import UnsafeFile

_VARIABLES = {
    "s3": {
        "credentials": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY",
        "endpoint": "AWS_ENDPOINT",
        "allow_http": "AWS_ALLOW_HTTP",
    },
    "gs": {
        "credentials": "GOOGLE_APPLICATION_CREDENTIALS",
        "endpoint": "GOOGLE_BASE_URL",
        "allow_http": "GOOGLE_ALLOW_HTTP",
    },
    "az": {
        "credentials": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY",
        "endpoint": "AZURE_STORAGE_ENDPOINT",
        "allow_http": "AZURE_ALLOW_HTTP",
    },
    "file": {},
}

_NO_CONTAINER = re.compile(
    r"NoSuchBucket|ContainerNotFound|specified (?:bucket|container) does not exist", re.ASCII | re.IGNORECASE
)
_STATUS = re.compile(r"status code: ([1-5][0-9]{2})\b", re.ASCII)
_CODE = re.compile(r"<Code>([A-Za-z]{3,50})</Code>", re.ASCII)

_CHECK_NETWORK = "is the network up, and {endpoint} right, if it is set?"
_CHECK_CREDENTIALS = "check the credentials in the environment ({credentials}), and what they are allowed to do there"
_KNOWN: tuple[tuple[str, str, str], ...] = (
    # Pattern of an error's text, cause, and fix; the first match counts.
    (r"BadScheme", "its endpoint is not encrypted", "use https, or allow that with {allow_http}=true"),
    (
        r"redirect without LOCATION|PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint",
        "the bucket is in another region",
        "set AWS_REGION",
    ),
    (r"MissingAccount|Account must be specified", "no account is named", "set AZURE_STORAGE_ACCOUNT_NAME"),
    (
        r"169\.254\.|metadata\.google|token request|TokenRequest|Missing(?:AccessKey|SecretAccessKey|Credential)",
        "no credentials were found",
        "set {credentials}",
    ),
    (r"status code: 40[13]|PermissionDenied|Unauthenticated", "access was denied", _CHECK_CREDENTIALS),
    (r"status code: 404", "there is nothing at that address", "check the URL, and {endpoint}"),
    (r"status code: 5", "the store failed", "this may pass"),
    (r"status code: ", "the store refused", "check the URL, and {endpoint}"),
    (r"ConnectionRefused", "the connection was refused", _CHECK_NETWORK),
    (r"dns error|failed to lookup", "its address is not known", _CHECK_NETWORK),
    (
        r"certificate|Certificate|UnknownIssuer",
        "its certificate is not trusted",
        "is it the right endpoint ({endpoint})?",
    ),
    (r"TimedOut|timed out|Timeout", "it did not answer in time", _CHECK_NETWORK),
    (
        r"ConnectionReset|BrokenPipe|ConnectionAborted|IncompleteMessage|UnexpectedEof|connection closed",
        "the connection broke",
        _CHECK_NETWORK,
    ),
)


def lacks_container(error: BaseException) -> bool:
    """Whether the bucket or container is missing."""
    return _NO_CONTAINER.search(str(error)) is not None


def explain(error: BaseException, action: str, url: str, scheme: str) -> UploadError:
    """Return the error to raise in place of one of obstore or the system.

    Args:
        action: The failed verb, as in "cannot write".
        url: Of the object, without secrets.
    """
    cause, advice = _cause(error, scheme)
    return UploadError(f"cannot {action} {url}: {cause}; {advice}")


def _cause(error: BaseException, scheme: str) -> tuple[str, str]:
    text = str(error)
    if isinstance(error, UnsafeFile):
        return str(error.strerror), f"remove {error.filename}"
    if scheme == "file":
        number = error.errno if isinstance(error, OSError) else None
        cause = os.strerror(number).lower() if number is not None else _scrubbed(error)
        return cause, "is the folder there, is it yours, and has it room?"
    if lacks_container(error):
        kind = "container" if scheme == "az" else "bucket"
        return f"the {kind} does not exist", "create it, or name another one"
    for pattern, cause, advice in _KNOWN:
        if re.search(pattern, text):
            return cause + _answer(text), advice.format(**_VARIABLES[scheme])
    return _scrubbed(error), "check the URL, and the environment"


def _answer(text: str) -> str:
    """Return status and code of a server's response."""
    status, code = _STATUS.search(text), _CODE.search(text)
    if status is None:
        return ""
    try:
        phrase = f" {http.HTTPStatus(int(status[1])).phrase}"
    except ValueError:
        phrase = ""
    return f" ({status[1]}{phrase}{f', {code[1]}' if code is not None else ''})"


def _scrubbed(error: BaseException) -> str:
    """Return the first line of an unknown error, without secrets."""
    text = next(iter(str(error).splitlines()), "")
    for name, value in os.environ.items():
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")) and len(value) >= 4:
            text = text.replace(value, "...")
    text = re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://\S+", "...", text)
    text = re.sub(r"[A-Za-z0-9+/=_%~-]{20,}", "...", text)
    return f"{type(error).__name__}: {text[:200]}"
