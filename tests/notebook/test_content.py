"""What the outputs of a notebook hold: bounded in size, true to the extremes, and harmless whatever a run is called."""

from __future__ import annotations

import json
import math
import random
import re
from types import SimpleNamespace
from typing import Any

import pytest
from live.kit import Story
from notebook.kit import unpacked
from support.threads import WAIT_S

from events.card import card
from events.messages import HistogramLogged, MetricsLogged, RunEnded, StallLedger, TextLogged, WarningLogged
from events.protocol import RunResult
from sinks.live.view import RunView
from sinks.notebook.content import (
    MOST_MESSAGE,
    MOST_OF_A_FRAME,
    MOST_PACKED,
    Options,
    charts_html,
    end_html,
    message_of,
    progress_html,
    reduced,
)
from sinks.notebook.hub import CellHub
from sinks.notebook.kernel import Cell
from sinks.notebook.sink import NotebookWriter

OPTIONS = Options("stagecast-1", None, live=True)


def view_of(story: Story, *events: Any) -> RunView:
    view = RunView()
    view.add([story.started(), *events])
    return view


def test_the_page_of_a_run_with_hundreds_of_noisy_metrics_has_a_bounded_size() -> None:
    """Its curves have fewer points, and the extremes of all values."""
    story, draw = Story(), random.Random(0)
    metrics = [{f"m{number}": draw.gauss(0, 1) for number in range(300)} for _ in range(300)]
    metrics[123]["m7"] = 99.0
    view = view_of(story, *(story(MetricsLogged, metrics=one, global_step=at) for at, one in enumerate(metrics)))
    html = charts_html(view, OPTIONS)
    assert len(html) < MOST_PACKED + 20_000
    curve = unpacked(html)["runs"][0]["series"]["m7"]
    assert max(curve["max"]) == 99.0
    assert curve["count"] == len(metrics)
    assert len(message_of(view)) < MOST_MESSAGE


def test_the_page_of_a_run_with_many_curves_has_its_histograms_and_texts() -> None:
    story = Story()
    numbers = story.metrics(**{f"m{number}": 1.0 for number in range(50)})
    histogram, text = story(HistogramLogged, name="h", counts=[1.0]), story(TextLogged, name="t", text="x")
    view = view_of(story, numbers, histogram, text)
    for shown in (unpacked(charts_html(view, OPTIONS))["runs"][0], json.loads(message_of(view))):
        assert (list(shown["histograms"]), [one["text"] for one in shown["media"]]) == (["h"], ["x"])


def test_a_snapshot_takes_the_place_of_a_frame_that_a_server_would_not_forward() -> None:
    story, hub = Story(), CellHub()
    hub.feed([story.started(), story.step()])
    hub.charts(OPTIONS)
    for count, kind in ((1, "frame"), (400, "snapshot"), (1, "frame")):
        hub.feed([story(TextLogged, name=str(number), text="x" * 4_000) for number in range(count)])
        html, _ = hub.progress(OPTIONS, has_page=True)
        assert f'"type":"{kind}"' in html
        assert len(html) < MOST_MESSAGE


def test_a_display_that_fails_raises_its_exception_at_the_next_event() -> None:
    """So the run reports it as the failure of an observer."""

    class Broken(Cell):
        def show(self, part: str, html: str, text: str = "") -> None:
            raise OSError("the kernel is gone")

    story, shell = Story(), SimpleNamespace(kernel=SimpleNamespace())  # not ipykernel's: it takes no commands
    writer = NotebookWriter(CellHub(), Broken(shell, "stagecast-1"))
    writer.write([story.started()])
    writer._thread.join(WAIT_S)
    with pytest.raises(OSError, match="the kernel is gone"):
        writer.write([story.step()])


def test_a_frame_of_many_steps_keeps_the_extremes_the_last_value_and_what_is_not_finite() -> None:
    count = 10 * MOST_OF_A_FRAME
    values: list[float | str] = [math.sin(step / 50) for step in range(count)]
    values[4_321], values[5_432], values[7_000] = 50.0, -50.0, "nan"
    steps, kept = reduced({"loss": (list(range(count)), values), "few": ([1], [2.0])})["loss"]
    assert len(steps) <= MOST_OF_A_FRAME
    assert steps == sorted(set(steps))
    odd = {(4_321, 50.0), (5_432, -50.0), (7_000, "nan"), (count - 1, values[-1])}
    assert odd <= set(zip(steps, kept, strict=True))
    assert reduced({"few": ([1], [2.0])}) == {"few": ([1], [2.0])}


@pytest.mark.parametrize("make", [progress_html, end_html, charts_html])
def test_names_and_texts_of_a_run_are_no_html(make: Any) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    story = Story(evil)
    view = view_of(
        story,
        story.metrics(**{evil: 1.0}),
        story(WarningLogged, level="warning", message=evil),
        story(RunEnded, status="failed", reason=evil),
    )
    html = make(view, OPTIONS, message_of(view)) if make is progress_html else make(view, OPTIONS)
    assert "<img" not in html
    assert len(re.findall("<script", html)) == len(re.findall("</script", html)) == 1


def test_a_result_is_a_card_with_what_one_looks_for() -> None:
    """State, steps, time, metrics with the losses first, the places of what was written, and problems."""
    result = RunResult(
        run_id="a<b",
        attempt=1,
        status="stopped",
        reason="enough",
        global_step=1_200,
        epochs=3,
        metrics={f"m{number}": 1.0 for number in range(20)} | {"val_loss": 0.123456789},
        ledger=StallLedger(wall_s=252.4),
        run_dir="/runs/a",
        checkpoint="/runs/a/checkpoints/step-1200.a1",
        best_checkpoint="/runs/a/checkpoints/step-800.a1",
        best_metric=0.1,
        best="val_loss",
        problems=["the sink csv has failed"],
    )
    text = re.sub(r"\s+", " ", re.sub("<[^>]+>|&nbsp;", " ", result._repr_html_()))
    assert text.startswith(
        " a&lt;b ■ stopped steps 1,200, 3 epochs training took 0:04:12 reason enough best val_loss 0.1"
    )
    assert " val_loss 0.12346 m0 1 m1 1 " in text
    best, newest = result.best_checkpoint, result.checkpoint
    assert f" and 9 more in result.metrics best checkpoint {best} checkpoint {newest} folder /runs/a " in text
    assert "! the sink csv has failed" in text
    assert "m3" not in repr(result)
    assert "val_loss=0.123456789" in repr(result)
    assert "problems=1" in repr(result)
    assert "✓" not in card("a", "finished", [], ["a problem"])
