"""``stagecast report``: one file that shows runs without a server, and sends no request."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live.kit import Told

from events.journal.writer import Journal
from events.messages import (
    CheckpointUploaded,
    Event,
    ImageLogged,
    MetricsLogged,
    NonFiniteLoss,
    RunEnded,
    RunStarted,
    TrainStepEnded,
)
from events.sink import RunInfo
from sinks.live.report import write_report
from trainer.cli.main import main

EVIL = "</script><script>document.title='owned'</script><!--"
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000 1f15c4890000000d49444154789c6360f8cf500f0003860180"
    "5a344b6f0000000049454e44ae426082".replace(" ", "")
)
Report = Callable[..., tuple[int, str]]


def a_run(folder: Path, run_id: str, steps: int = 20) -> Path:
    """A run's folder, with hostile text in its journal."""
    run_dir = folder / run_id
    header = [(run_id, 1, seq, 1e9 + seq, 0, max(0, seq - 1), 0, "train") for seq in range(1, steps + 10)]
    events: list[Event] = [
        RunStarted(*header[0], EVIL, 3, device="cpu"),
        *(TrainStepEnded(*header[i], 1.0 / i, i, 8, 0.01, 0.1, None) for i in range(1, steps + 1)),
        MetricsLogged(*header[steps + 1], {EVIL: 1.0, "nan": float("nan")}),
        ImageLogged(*header[steps + 2], "picture", "media/picture/a.png", 1, 1, len(PIXEL)),
        ImageLogged(*header[steps + 3], "elsewhere", "../secret.png", 1, 1, 3),
        RunEnded(*header[steps + 4], "finished", EVIL),
    ]
    writer = Journal().open(RunInfo(run_id, run_dir=str(run_dir)))
    writer.write(events)
    writer.close()
    (run_dir / "media/picture").mkdir(parents=True)
    (run_dir / "media/picture/a.png").write_bytes(PIXEL)
    (folder / "secret.png").write_bytes(b"secret")
    return run_dir


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Report:
    """Run the command in the test's folder; return its exit code and its errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        code = main(["report", *arguments])
        return code, capsys.readouterr().err

    return run


def test_folders_that_make_no_report_are_refused(report: Report, tmp_path: Path) -> None:
    """Without a run, with two copies of one run, or without one readable event; no file is left."""
    a_run(tmp_path, "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    (tmp_path / "broken/journal").mkdir(parents=True)
    (tmp_path / "broken/journal/00000000000000000001.jsonl").write_bytes(b"#" * 20 + b"\n")
    before = sorted(os.listdir(tmp_path))
    for arguments, *messages in (
        ((".",), "is not a folder of a run"),
        (
            ("one", "copy", "--out", "out.html"),
            "one and copy are both of the run 'one'",
            "leave one out, or write a report of each",
        ),
        (("broken",), "damaged: journal/00000000000000000001.jsonl, line 1: not an event"),
    ):
        code, errors = report(*arguments)
        assert (code, [text for text in messages if text not in errors]) == (1, []), errors
    assert sorted(os.listdir(tmp_path)) == before
    assert report("one", "./one", "--out", "out.html")[0] == 0  # named twice is not a second run


def test_an_existing_report_is_replaced_only_by_force(report: Report, tmp_path: Path) -> None:
    a_run(tmp_path, "one")
    assert report("one")[0] == 0
    first = (tmp_path / "one.html").read_bytes()
    code, errors = report("one")
    assert (code, "--force" in errors) == (1, True)
    assert (tmp_path / "one.html").read_bytes() == first
    assert report("one", "--force")[0] == 0


def test_a_file_that_cannot_be_written_is_named(report: Report, tmp_path: Path) -> None:
    a_run(tmp_path, "one")
    for options, message in (
        (("nowhere/one.html",), "nowhere is not a folder; create it"),
        (("one",), "one is a folder; name a file in it"),
        (("one", "--force"), "one is a folder; name a file in it"),
        (("/proc/one.html",), "/proc/one.html cannot be written"),
    ):
        code, errors = report("one", "--out", *options)
        assert (code, message in errors) == (1, True), errors


def test_foreign_text_ends_no_script_and_files_outside_the_run_stay_outside(tmp_path: Path) -> None:
    """The file has the run and the page, and only addresses within itself."""
    run_dir = a_run(tmp_path, "one")
    (run_dir / "media/picture/a.png").rename(tmp_path / "a.png")
    for link, target in (("picture/a.png", "../../../a.png"), ("picture", "../../away")):
        path = run_dir / "media" / link
        if path.is_dir():
            path.rename(tmp_path / "away")
        path.symlink_to(target)
        write_report([run_dir], tmp_path / "out.html")
        assert "data:image/png" not in (tmp_path / "out.html").read_text("utf-8")
    text = (tmp_path / "out.html").read_text("utf-8")
    assert "document.title='owned'" in text
    assert "</script><script>document.title" not in text
    assert "c2VjcmV0" not in text  # the image outside the run's folder
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text)


def test_the_last_value_is_shown_however_many_were_merged(told: Told, visit: Any, tmp_path: Path) -> None:
    """In tiles, legends, tables and aloud, not the mean of the last point or a NaN beside it."""
    expect = pytest.importorskip("playwright.sync_api").expect
    tell = told.story
    origin = {"command_line": "python job.py", "git_commit": "0123456", "git_dirty": True, "config": {"width": 8}}
    told.write(
        tell.started(**origin), *(event for _ in range(4_998) for event in (tell.step(), tell.metrics(val_worst=1.0)))
    )
    told.write(tell.step(), tell.metrics(val_worst=math.nan), tell.step(7.5), tell.metrics(val_worst=3.25))
    write_report([told.path], tmp_path / "out.html")
    page = visit((tmp_path / "out.html").as_uri())
    assert page.evaluate("stagecast.focus().store.get('train_loss').width") > 1
    expect(page.locator("#tiles")).to_contain_text("Train loss7.5")
    expect(page.locator("#training .chart").first.locator(".legend .value")).to_have_text("7.5")
    expect(page.get_by_role("img", name=re.compile("^Chart, Loss"))).to_have_attribute(
        "aria-label", re.compile(r"last 7\.5 at step 5,000")
    )
    expect(page.locator("#validation-table td").nth(1)).to_have_text("3.25")
    for text in ("python job.py", "0123456, with changes", "width8"):
        expect(page.locator("#about")).to_contain_text(text)


@pytest.mark.parametrize("status", ["finished", "failed", "lost", "running"])
def test_a_report_shows_the_length_and_the_problems_of_the_run(
    status: Any, told: Told, visit: Any, tmp_path: Path
) -> None:
    """However old it is: until the run's end, or its last sign of life; with a failed run's traceback."""
    expect = pytest.importorskip("playwright.sync_api").expect
    tell = told.story
    told.write(tell.started(), *tell.steps(3), tell(NonFiniteLoss, loss=math.nan, action="warned"))
    tell.time += 125
    told.write(tell.step())
    if status in ("finished", "failed"):
        failure = {"traceback": f"Trace {EVIL}", "phase": "train_step"} if status == "failed" else {}
        told.write(tell(RunEnded, status=status, reason=EVIL, **failure))
        tell.time += 5_000
        told.write(tell(CheckpointUploaded, checkpoint="step-3.a1", url="s3://b"))
    if status != "running":
        told.let_go()
    write_report([told.path], tmp_path / "out.html")
    page = visit((tmp_path / "out.html").as_uri())
    page.wait_for_timeout(1_100)  # the page's own clock ticks once
    expect(page.locator("#tiles > div").filter(has_text="Running for")).to_contain_text("2m 05s")
    expect(page.locator("#status")).to_contain_text({"lost": "?", "failed": "✕"}.get(status, "▲"))
    expect(page.locator("#status")).to_contain_text(status)
    expect(page.locator("#status")).to_contain_text("2 problems" if status == "failed" else "1 problem")
    expect(page.locator("#problems")).to_contain_text("the loss was NaN or infinite in 1 step, first at step 3")
    if status == "failed":
        expect(page.locator("#problems")).to_contain_text("the run failed in train_step after step 4")
        page.locator("#problems summary").click()
        expect(page.locator("#problems pre")).to_have_text(f"Trace {EVIL}")
    assert "owned" not in page.title()


def test_the_report_shows_its_runs_in_a_browser(tmp_path: Path, visit: Any) -> None:
    """Together, with the image; a link to another run names those in the report; no error, no request."""
    expect = pytest.importorskip("playwright.sync_api").expect
    out = tmp_path / "out.html"
    write_report([a_run(tmp_path, "one"), a_run(tmp_path, "two")], out)
    page = visit(out.as_uri())
    expect(page.locator("#runs-list li")).to_have_count(2)
    page.locator("#media-section").scroll_into_view_if_needed()
    expect(page.locator('#media img[alt^="picture"]')).to_have_js_property("naturalWidth", 1)
    assert page.title().endswith("stagecast")
    assert "owned" not in page.title()
    page = visit(out.as_uri(), "#run=nosuch", loaded=False)
    expect(page.locator("#waiting-title")).to_have_text("nosuch")
    expect(page.locator("#waiting-text")).to_have_text("there is no such run in this report; it holds one, two")
    page.evaluate("window.dispatchEvent(new Event('online'))")  # a report has no server to ask
    page.get_by_role("link", name="one").click()
    expect(page.locator("#content")).to_be_visible()
    assert {url.partition(":")[0] for url in visit.requests} <= {"file", "data", "blob"}
