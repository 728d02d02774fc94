"""Reports and the live page on paper: A4, upright and across."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")
from live.kit import Told
from live.page_server import FakeRun, PageServer
from live.page_visits import Visits
from live.pdf import printed
from playwright.sync_api import Page, expect

from sinks.live.report import write_report

MARGIN = 12 / 25.4 * 72
A4 = (595, 842)
CUT = """() => {
  const right = document.body.getBoundingClientRect().right + 1;
  const isWithin = (one) => !one.checkVisibility() || one.getBoundingClientRect().right <= right
    || one.closest(".visually-hidden");
  const all = [...document.querySelectorAll("body *")];
  return all.filter((one) => !isWithin(one)).map((one) => one.outerHTML.slice(0, 200));
}"""


def check_paper(page: Page) -> None:
    """Each chart is whole on one page, within the margins, and nothing is wider than the paper."""
    expect(page.locator("figure.chart").first).to_be_visible()
    page.emulate_media(media="print")
    expect(page.locator("html")).to_have_class(re.compile("printing"))
    charts = page.locator("figure.chart:visible").count()
    assert charts > 8
    assert page.evaluate(CUT) == []
    page.emulate_media(media="null")
    for is_across in (False, True):
        pages = printed(page.pdf(format="A4", landscape=is_across))
        size = A4[::-1] if is_across else A4
        assert {(round(one.width), round(one.height)) for one in pages} <= {size, (size[0] + 1, size[1] + 1)}
        assert sum(len(one.charts) for one in pages) >= charts
        for sheet in pages:
            for box in sheet.charts:
                assert min(box.left, box.top) >= MARGIN - 1
                assert box.right <= sheet.width - MARGIN + 1
                assert box.bottom <= sheet.height - MARGIN + 1


def test_a_report_is_printed_without_a_cut(visit: Visits, tmp_path: Path) -> None:
    """With long names, commands and notes; from a dark page of a phone, too."""
    paths = []
    for number in range(3):
        one = Told(tmp_path / f"run-{number}", f"{number}-a-rather-long-name-" + "x" * 40)
        tell = one.story
        command = "python -m digits.train " + " ".join(f"--option-{at}={'y' * 30}" for at in range(20)) + "z" * 300
        one.write(
            tell.started(
                command_line=command, git_commit="0123456789" * 4, config={"width": number, "w" * 99: "v" * 300}
            )
        )
        for step in range(40):
            metrics = {f"layer{at}/{'norm' * 20}": float(step * at + number) for at in range(6)}
            one.write(tell.step(1.0 / (step + 1)), tell.metrics(val_accuracy=step / 40, **metrics))
        one.let_go()
        (one.path / "notes.json").write_text(json.dumps({"note": "n" * 500, "tags": ["t" * 200]}))
        paths.append(one.path)
    write_report(paths, tmp_path / "out.html", title="T" * 200, notes="N" * 500)
    options: dict[str, Any] = {"viewport": {"width": 390, "height": 800}, "color_scheme": "dark"}
    check_paper(visit((tmp_path / "out.html").as_uri(), **options))


def test_the_live_page_is_printed_without_a_cut(visit: Visits) -> None:
    """All of its sections, of two runs."""
    runs = [FakeRun(f"run-{index}", seed=index, extra=["m/a", "m/b"]) for index in range(2)]
    for run in runs:
        run.advance(260)
        run.furnish()
    server = PageServer(runs).start()
    try:
        check_paper(visit(server.url, "#run=run-0&run=run-1"))
    finally:
        server.stop()
