"""``stagecast report``: one file that shows runs without a server, and sends no request."""

from __future__ import annotations

import base64
import gzip
import json
import math
import os
import re
import shutil
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from live.kit import Told

from events.journal.writer import Journal
from events.messages import (
    AudioLogged,
    CheckpointUploaded,
    Event,
    ImageLogged,
    MetricsLogged,
    NonFiniteLoss,
    RunEnded,
    RunStarted,
    TableLogged,
    TrainStepEnded,
)
from events.sink import RunInfo
from sinks.live import report as reports
from sinks.live import report_file
from sinks.live.report import write_report
from sinks.live.series import thinned
from sinks.live.stored import read_view
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
        RunStarted(*header[0], EVIL, 3, device="cpu", command_line=f"python {EVIL}", git_commit="0123456789abcdef"),
        *(TrainStepEnded(*header[i], 1.0 / i, i, 8, 0.01, 0.1, None) for i in range(1, steps + 1)),
        MetricsLogged(*header[steps + 1], {EVIL: 1.0, "nan": float("nan")}),
        ImageLogged(*header[steps + 2], "picture", "media/picture/a.png", 1, 1, len(PIXEL)),
        ImageLogged(*header[steps + 3], "elsewhere", "../secret.png", 1, 1, 3),
        AudioLogged(*header[steps + 4], "speech", "media/picture/a.wav", 8_000, 1, 4, 52),
        TableLogged(*header[steps + 5], "scores", "media/picture/a.json", ["a"], 1),
        RunEnded(*header[steps + 6], "finished", EVIL),
    ]
    writer = Journal().open(RunInfo(run_id, run_dir=str(run_dir)))
    writer.write(events)
    writer.close()
    (run_dir / "media/picture").mkdir(parents=True)
    (run_dir / "media/picture/a.png").write_bytes(PIXEL)
    with wave.open(str(run_dir / "media/picture/a.wav"), "wb") as file:
        file.setparams((1, 2, 8_000, 0, "NONE", ""))
        file.writeframes(bytes(8))
    (run_dir / "media/picture/a.json").write_text('{"columns":["a"],"rows":[["</script>"]],"cut":null}')
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
    """Without a run, or without one readable event; with notes from a missing file; no file is left."""
    a_run(tmp_path, "one")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken/journal").mkdir(parents=True)
    (tmp_path / "broken/journal/00000000000000000001.jsonl").write_bytes(b"#" * 20 + b"\n")
    before = sorted(os.listdir(tmp_path))
    for arguments, message in (
        (("nowhere",), "nowhere is not a folder; name a run folder, or a folder of run folders"),
        (("empty",), "empty has no runs; name a run folder, or a folder of run folders"),
        (("broken",), "damaged: journal/00000000000000000001.jsonl, line 1: not an event"),
        (("one", "--notes", "none.md"), "--notes none.md is not a file; give an existing file, or the text itself"),
        (("one", "--notes", "x" * 100_001), "--notes has 100,001 characters; the maximum is 100,000"),
    ):
        code, errors = report(*arguments)
        assert (code, message in errors) == (2 if "--notes" in arguments else 1, True), errors
    assert sorted(os.listdir(tmp_path)) == before


def test_a_value_that_is_too_far_from_the_others_for_its_rounding_has_the_farthest_step() -> None:
    """A run whose means differ by a denormal number, between values that cancel each other out, has a report."""
    rounding = report_file.Rounding.of([0.0] * 9 + [5e-324], 1_000)
    assert rounding is not None
    low, middle, high = rounding.steps_of([-1e10, 0.0, 1e10])
    assert (low, middle) == (-high, 0)
    assert high == round(1_000 * math.asinh(sys.float_info.max))


def test_a_report_has_all_runs_of_a_folder_each_once(report: Report, tmp_path: Path, visit: Any) -> None:
    """At any depth, without the damaged ones; of two runs with one id, the second is named after its folder."""
    for folder, steps in (("runs", 20), ("runs/sweep/a", 10)):  # the newer one keeps the name
        a_run(tmp_path / folder, "one", steps)
    (tmp_path / "runs/broken/journal").mkdir(parents=True)
    (tmp_path / "runs/broken/journal/00000000000000000001.jsonl").write_bytes(b"#" * 20 + b"\n")
    code, errors = report("runs", "runs/one", "runs/sweep", "--out", "out.html")
    assert (code, errors.count("broken is damaged")) == (1, 1)
    page = visit((tmp_path / "out.html").as_uri())
    assert page.evaluate("stagecast.chosen") == ["one", "one (sweep:a)"]
    names = page.evaluate("stagecastReport.table.map(({ name, status }) => `${name} ${status}`)")
    assert sorted(names) == ["broken damaged", "one (sweep:a) finished", "one finished"]
    shutil.copytree(tmp_path / "runs/one", tmp_path / "copy")
    assert report("runs/one", "copy", "--out", "out.html", "--force") == (0, "")
    assert "one (copy)" in visit((tmp_path / "out.html").as_uri()).evaluate("stagecast.chosen")


def test_a_report_has_a_title_notes_commits_and_commands(report: Report, tmp_path: Path, visit: Any) -> None:
    """The notes are those of the command, and of each run; they are text, whatever it looks like."""
    expect = pytest.importorskip("playwright.sync_api").expect
    for name in ("one", "two"):
        a_run(tmp_path, name)
    noted = {"name": "first try", "tags": ["baseline", EVIL], "note": f"A line\n{EVIL}"}
    (tmp_path / "one/notes.json").write_text(json.dumps(noted))
    (tmp_path / "notes.md").write_text(f"# Which is better?\n{EVIL}")
    assert report("one", "two", "--title", EVIL, "--notes", "notes.md", "--out", "out.html") == (0, "")
    page = visit((tmp_path / "out.html").as_uri())
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    expect(page.locator("h1")).to_have_text(EVIL)
    assert page.title() == f"{EVIL} \N{EN DASH} stagecast"
    expect(page.locator("#notes > .text")).to_have_text(f"# Which is better?\n{EVIL}")
    expect(page.locator("#notes dt")).to_have_text(f"first try one baseline {EVIL}")
    expect(page.locator("#notes dd")).to_have_text(f"A line\n{EVIL}")
    expect(page.locator("#origins td.commit code")).to_have_text(["0123456789abcdef"] * 2)
    expect(page.locator("#origins tbody th")).to_have_text(["first try one", "two"])
    page.get_by_role("button", name="Copy: command of two").click()
    expect(page.locator("#toast")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == f"python {EVIL}"


def test_a_large_report_has_fewer_points(tmp_path: Path, visit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit, rounded to less than a pixel; the best and the last values are exact."""
    assert report_file.MOST_BYTES == 1_000_000
    monkeypatch.setattr(report_file, "MOST_BYTES", 400_000)
    random = Random(0)
    paths = [tmp_path / f"run{number}" for number in range(3)]
    for number, path in enumerate(paths):
        told = Told(path, f"run{number}", steps=1)
        told.story.time = 1.7e9
        events = []
        for step in range(1_500):
            values = {f"m/{at}": random.gauss(at, 1.0 + at) for at in range(12)}
            values |= {"odd": math.nan if step % 700 == 5 else 1e-3 * step, "wild": 1e300 * (step % 3), "tiny": 5e-324}
            events += [told.story.step(10.0 / (step + 1)), told.story.metrics(**values)]
        told.write(*events)
        told.let_go()
    written = write_report(paths, tmp_path / "out.html")
    assert (tmp_path / "out.html").stat().st_size == written.nbytes
    assert 200_000 < written.nbytes <= 400_000
    assert len(written.notices) == 1
    points = int(re.findall(r"at most ([\d,]+) points each", written.notices[0])[0].replace(",", ""))
    assert points >= 250
    full = write_report(paths, tmp_path / "full.html", full=True)
    assert full.notices == []
    assert full.nbytes > 700_000
    read = (
        "JSON.stringify([...stagecast.open].map(([id, { store }]) => [id, [...store.series].map(([name, one]) => [name,"
    )
    read += " [...['step', 'time', 'mean', 'low', 'high'].map(c => Array.from(one[c].slice(0, one.length))),"
    read += " [...one.odd.keys()], one.last, one.lowest, one.highest]])]))"
    for name, is_full in (("out.html", False), ("full.html", True)):
        page = visit((tmp_path / name).as_uri())
        found = {run: dict(series) for run, series in json.loads(page.evaluate(read))}
        for path in paths:
            for metric, series in read_view(path)[0].curves.series.items():
                thin = series if is_full else thinned(series, points)
                step, clock, *values, odd, last, lowest, highest = found[path.name][metric]
                assert step == thin.step
                assert odd == [index for index, _ in thin.odd]
                assert last == series.last
                if metric != "rows_per_s":
                    assert lowest["value"] == min(one for one in series.low if one == one)
                    assert highest["value"] == max(one for one in series.high if one == one)
                means = sorted(one for one in thin.mean if one == one)
                first, middle, third = (means[len(means) * share // 4] for share in (1, 2, 3))
                size = third - first
                near = 0.0 if is_full else 1e-3
                exact_columns = ([round(time, 3) for time in thin.time], thin.mean, thin.low, thin.high)
                for column, exact in zip((clock, *values), exact_columns, strict=True):
                    wrong = [
                        (one, right)
                        for one, right in zip(column, exact, strict=True)
                        if one is not None or right == right  # NaN is null
                        if not abs(one - right) <= near * math.hypot(size, right - middle)
                    ]
                    assert wrong == []
        page.close()


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
    unpacked = "".join(
        gzip.decompress(base64.b64decode(part)).decode("latin-1")
        for part in re.findall('<script type="text/plain"[^>]*>([^<]*)<', text)
    )
    assert "document.title='owned'" in unpacked
    assert "document.title='owned'" not in text
    assert "c2VjcmV0" not in text + unpacked  # the image outside the run's folder
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


def test_media_without_room_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest ones that fit are in the file."""
    monkeypatch.setattr(reports, "MOST_MEDIA_BYTES", 60)
    made = write_report([a_run(tmp_path, "one")], tmp_path / "out.html")
    assert [one for one in made.notices if "media" in one or "images" in one] == [
        "2 images, sounds and tables are missing: a file has room for 60 B of them"
    ]


def test_the_report_shows_its_runs_in_a_browser(tmp_path: Path, visit: Any) -> None:
    """Together, with the image; a link to another run names those in the report; no error, no request."""
    expect = pytest.importorskip("playwright.sync_api").expect
    out = tmp_path / "out.html"
    write_report([a_run(tmp_path, "one"), a_run(tmp_path, "two")], out)
    page = visit(out.as_uri())
    expect(page.locator("#runs-list li")).to_have_count(2)
    page.locator("#media-section").scroll_into_view_if_needed()
    pictures = page.locator('#media img[alt^="picture"]')
    expect(pictures).to_have_count(2)
    expect(pictures.first).to_have_js_property("naturalWidth", 1)
    expect(page.locator("#media tbody td")).to_have_text(["</script>", "</script>"])
    page.wait_for_function("() => document.querySelector('#media audio').duration > 0")
    expect(page.locator("#media figure").filter(has_text="two").first).to_contain_text("step 22")
    assert page.title().endswith("stagecast")
    assert "owned" not in page.title()
    page = visit(out.as_uri(), "#run=nosuch", loaded=False)
    expect(page.locator("#waiting-title")).to_have_text("nosuch")
    expect(page.locator("#waiting-text")).to_have_text("there is no such run in this report; it holds one, two")
    page.evaluate("window.dispatchEvent(new Event('online'))")  # a report has no server to ask
    page.get_by_role("link", name="one").click()
    expect(page.locator("#content")).to_be_visible()
    assert {url.partition(":")[0] for url in visit.requests} <= {"file", "data", "blob"}
