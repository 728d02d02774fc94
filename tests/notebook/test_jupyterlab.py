"""A run in JupyterLab, in a real browser: its page while it trains, its stop button, and what the notebook keeps."""

from __future__ import annotations

import json
from typing import Any

import pytest
from notebook.lab import Lab

pytestmark = pytest.mark.timeout(180)  # the first test starts JupyterLab, a browser and a kernel

_TRAIN = "result = Trainer(Net(act=hold_at(7)), long, run_id='labelled').train()\nresult"
_SMALL_BYTES = 500_000


@pytest.fixture(scope="module")
def stopped(lab: Lab) -> dict[str, Any]:
    """A notebook in which a run was watched and stopped; returns what its page showed meanwhile."""
    lab.write("run.ipynb", _TRAIN, "print('it was', result.status, result.reason)")
    lab.open("run.ipynb")
    lab.run_all()
    page = lab.run_page
    step = page.locator("#tiles > div", has_text="Step").locator("dd span").first
    page.locator("#tiles > div", has_text="Step").filter(has_text="6").first.wait_for()
    seen = {
        "step": step.inner_text(),
        "status": page.locator("#status .word").inner_text(),
        "charts": page.locator("#training .chart").count(),
        "progress": page.locator("#progress").is_visible(),
        "fallback": lab.page.locator("[data-stagecast]").is_visible(),
        "theme": page.locator("html").get_attribute("data-theme"),
    }
    page.locator("#stop").click()
    page.locator("#stop-reason").fill("seen enough")
    page.locator("#stop-form button[type=submit]").click()
    page.locator("#toast", has_text="Stop: sent").wait_for()
    (lab.folder / "go").touch()
    lab.page.get_by_text("it was stopped seen enough").wait_for()
    page.locator("#status .word", has_text="stopped").wait_for()
    seen["step at the end"] = step.inner_text()
    lab.save()
    return seen


def test_the_page_in_jupyterlab_is_live_and_its_button_stops_the_run(stopped: dict[str, Any]) -> None:
    """Its command reaches the kernel while the cell blocks it; the cell returns its result, and the next one runs."""
    assert stopped == {
        "step": "6",
        "status": "running",
        "charts": stopped["charts"],
        "progress": True,
        "fallback": False,
        "theme": "light",
        "step at the end": "7",
    }
    assert stopped["charts"] >= 2


def test_a_saved_notebook_shows_the_end_of_its_run_again(lab: Lab, stopped: dict[str, Any]) -> None:
    """With the page of the whole run and the card of its result, in the colours of the notebook, in a small file."""
    assert (lab.folder / "run.ipynb").stat().st_size < _SMALL_BYTES
    lab.set("themes", theme="JupyterLab Dark")
    lab.open("run.ipynb")
    page = lab.run_page
    page.locator("#status .word", has_text="stopped").wait_for()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert page.locator("#training .chart").count() == stopped["charts"]
    assert not page.locator("#commands").is_visible()
    lab.page.locator(".jp-OutputArea-output", has_text="seen enough").last.wait_for()
    assert not lab.page.locator("[data-stagecast]").is_visible()


def test_an_untrusted_notebook_shows_the_card_of_its_run(lab: Lab, stopped: dict[str, Any]) -> None:
    """As one that came by mail: JupyterLab runs none of its scripts."""
    text = json.loads((lab.folder / "run.ipynb").read_text())
    text["cells"][0]["source"] = "# changed elsewhere"
    (lab.folder / "mailed.ipynb").write_text(json.dumps(text))
    lab.open("mailed.ipynb")
    lab.page.locator(".jp-OutputArea-output", has_text="■ stopped").first.wait_for()
    assert lab.page.locator("iframe").count() == 0
