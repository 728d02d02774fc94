"""No message, event, configuration or repr shows a password or a token of a URL, however malformed the URL is."""

from __future__ import annotations

import logging

import pytest

from events.checkpoint.settings import Checkpoints
from events.log import logger
from events.masking import masked, masked_url
from events.tracebacks import describe, format_traceback

LEAKING = [
    "https://me:hidden@there/",
    "https://hidden@there:80/x",
    "http://me:hid/den@there:0/",
    "http://me:hid'den\"<>@there",
    "http://me:hi/dd@en@there/path",
    "http:\\\\me:hidden@there",
    "s3:/key:hidden@bucket",
    "postgresql+psycopg://me:hid#den?@there/db",
    "http://there/#token=hidden&run=a",
    "http://there/?api_key=hidden",
    "http://there/?%74oken=hidden",
    "https://bucket/x?X-Amz-Signature=hidden&X-Amz-Credential=hidden",
    "wss://there:x/;access-token=hidden",
    "https://me:12/hidden@there/path",
    "https://me:8080?x=hidden@there/",
    "s3://1234:1/hidden@bucket",
    "https://there/?api_key%3Dhidden",
    "postgres://me:x hidden@there/db",
    "postgres://me:12 hidden@there/db",
    "postgres://me:12/x hidden@there/db",
    "postgres://me:x y hidden@z@there/db",
    "https://me:x\n  hidden@there",
    "https://me\n:hidden@there",
    "https://\nme:hidden@there",
    "https:/\n/me:hidden@there",
    "https://\n  me:hidden@there",
    "https://there/?token=x\nhidden",
]


@pytest.mark.parametrize("url", LEAKING)
def test_a_secret_of_a_url_is_in_no_text(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Neither alone, nor within a message, an exception, its traceback, a log record or a repr."""
    text = f"see {url!r}, or {url} (it fails)"
    error = ConnectionError(text)
    error.add_note(text)
    caplog.set_level(logging.DEBUG, "stagecast")
    logger.info(text)
    logger.warning(text)
    logger.warning("see %s", url)
    shown = [masked_url(url), masked(text), describe(error), format_traceback(error), repr(Checkpoints(upload=url))]
    shown += [record.getMessage() for record in caplog.records if record.args == ()]
    for one in shown:
        assert not [part for part in ("hidden", "hid/", "hid'", "hid#", "den@", "en@", "dd@") if part in one], one


@pytest.mark.parametrize(
    "url", ["me:hidden@there", "//me:hidden@there", "there/token=hidden", "http://there/#token=hid#den"]
)
def test_an_argument_that_is_meant_for_a_url_is_masked_without_its_scheme(url: str) -> None:
    """Within any other text it could be an address of mail."""
    assert "hid" not in masked_url(url)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b",
        "file:///home/me@there/x",
        "http://[::1]:80/a@b",
        "http://127.0.0.1:80/a@b and a@b",
        "see http://there:80, and mail me",
        "mail me@there",
        "x=1 http://there/?run=a#b=c",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    """A path may have an @."""
    assert masked(text) == text


def test_masking_takes_linear_time() -> None:
    """Texts of strangers can be long."""
    for text in (
        "a" * 10**6 + ":/",
        "://" * 10**5,
        "http://a" + "?a=" * 10**5,
        "http://" + "@" * 10**5 + "x",
        "ab:/\n" * 10**5,
    ):
        masked(text)
