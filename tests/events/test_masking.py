"""No message, event, configuration or repr shows a password or a token of a URL, however malformed the URL is."""

from __future__ import annotations

import logging
import shlex

import pytest

from events.checkpoint.settings import Checkpoints
from events.log import logger
from events.masking import masked, masked_command, masked_url, masked_values
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


SECRET_OPTIONS = [
    ["--token=hidden"],
    ["--token", "hidden"],
    ["--hf-token", "-hidden"],
    ["--apiKey=hidden"],
    ["--wandb_api_key", "hidden"],
    ["tracker.api_key=hidden"],
    ["++tracker.password=hid=den"],
    ["HF_TOKEN=hidden"],
    ["--key=hidden"],
    ["--password=123456"],
    ['--sink={"secret": "hidden there", "lr": 1}'],
    ["Authorization: Bearer hidden"],
    ["X-Api-Key:hidden"],
    ["--set", "lr=1,db.password=hidden,x=2"],
    ["-c", "import job; token = 'hidden'"],
    ["--db", "pg://me:hidden@there/x"],
    ["hf_hiddenhiddenhiddenhidden"],
    ["--note=use sk-hiddenhiddenhiddenhidden"],
]


@pytest.mark.parametrize("arguments", SECRET_OPTIONS, ids=" ".join)
def test_a_command_line_shows_no_secret(arguments: list[str]) -> None:
    shown = masked_command(["train.py", *arguments, "--lr=0.1"])
    assert not [part for part in ("hidden", "hid=", "123456") if part in shown], shown
    assert "..." in shown
    assert shown.startswith("train.py ")
    assert shown.endswith(" --lr=0.1")


def test_the_rest_of_a_command_line_stays() -> None:
    plain = ["--encoder=resnet", "--tokenizer", "gpt2", "--author=me", "--max_token=512", "--sort_key=lr", "--sigma=1"]
    plain += ["--no-auth", "--lr=1", "--pad_token=<pad>", "--design", "x", "C:\\a", "a b", "--eos-token", "</s>"]
    assert masked_command(plain) == shlex.join(plain)


def test_hyperparameters_show_no_secret() -> None:
    """Wherever they are nested; a name that only resembles a secret's keeps its value, and so do most numbers."""
    secrets = {
        "api_key": "hidden",
        "credentials": {"user": "hidden", "n": 3},
        "token": ["hidden"],
        "deep": [{"accessToken": "hidden"}],
        "url": "s3://key:hidden@bucket/x",
    }
    assert "hidden" not in repr(masked_values(secrets))
    assert masked_values({"password": 123456}) == {"password": "..."}
    plain = {
        "encoder": "resnet",
        "key": {"init": "xavier"},
        "key_dim": 5,
        "max_token": 512,
        "eos_token": "</s>",
        "password_length": 8,
        "secret": None,
        "use_auth": True,
        "tokens": ["a"],
        "token": "",
    }
    assert masked_values(plain) == plain


def test_masking_a_command_takes_linear_time() -> None:
    for text in ("a", "a=", "token=", '"a":', "-", "a.b", " = "):
        masked_command([text * 10**5])
