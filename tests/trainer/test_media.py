"""Histograms, images, figures and texts that a module logs, and their files."""

from __future__ import annotations

import io
import logging
import math
import threading
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import PIL.Image
import pytest
import torch
from support.training import LANES, Net, hooked, logging_net, train

from events.journal.history import read_history
from events.messages import Event, HistogramLogged, ImageLogged, MetricsLogged, ObserverDropped, StepSkipped, TextLogged
from events.origin import Origin
from trainer import CallbackInterface, Histogram, Image
from trainer.media import INLINE_TEXT, Drawn, LoggedText, MediaWriter

# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Histogram([1.0, 2.0]), TypeError, "tensor of real numbers"),  # type: ignore[arg-type]
        (lambda: Histogram(torch.zeros(3, dtype=torch.complex64)), TypeError, "real numbers"),
        (lambda: Histogram(torch.zeros(0, 3)), ValueError, "empty tensor of shape (0, 3)"),
        (lambda: Histogram(torch.zeros(3), bins=1), ValueError, "integer >= 2"),
        (lambda: Image(torch.zeros(8, 3, 4, 4)), ValueError, "(8, 3, 4, 4)"),
        (lambda: Image(torch.zeros(2, 4, 4)), ValueError, "1, 3 or 4 channels"),
        (lambda: Image(torch.zeros(4, 4, dtype=torch.int64)), TypeError, "int64"),
        (lambda: Image("a.png"), TypeError, "'a.png'"),
    ],
)
def test_an_invalid_value_is_refused_by_its_constructor(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert says in str(caught.value)


def test_an_image_without_pillow_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'stagecast\[media\]'"):
        Image(torch.zeros(4, 4))


# ----------------------------------------------------------------------------------------------- histograms


def numbers_of(histogram: Histogram) -> tuple[float, float, list[float], float]:
    return (histogram.low.item(), histogram.high.item(), histogram.counts.tolist(), histogram.non_finite.item())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool]
)
def test_a_histogram_counts_as_numpy_does(dtype: torch.dtype) -> None:
    values = (torch.rand(1_000, generator=torch.Generator().manual_seed(0)) * 64).round().to(dtype)
    low, high, counts, non_finite = numbers_of(Histogram(values, bins=8))
    expected, edges = np.histogram(values.double().numpy(), bins=8)
    assert (low, high, non_finite) == (edges[0], edges[-1], 0)
    assert counts == expected.tolist()


def test_a_histogram_of_extreme_values_counts_each_element_once() -> None:
    """Except NaN and infinities, although the range overflows the type."""
    worst = torch.tensor([math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 0.0])
    low, high, counts, non_finite = numbers_of(Histogram(worst, bins=4))
    assert (low, high) == (pytest.approx(-3.4e38), pytest.approx(3.4e38))
    assert (sum(counts), counts[0], counts[-1], non_finite) == (3, 1, 1, 3)
    assert numbers_of(Histogram(torch.tensor([math.nan]), bins=2)) == (0, 0, [0, 0], 1)
    assert numbers_of(Histogram(torch.full((5,), 7), bins=2)) == (7, 7, [5, 0], 0)
    for smallest in (torch.tensor([0.0, 1e-45]), torch.tensor([0.0, 5e-324], dtype=torch.float64)):
        assert sum(numbers_of(Histogram(smallest, bins=2))[2]) == 2


def test_a_histogram_has_the_values_at_the_time_of_logging() -> None:
    def log(net: Any, step: int, batch: Any) -> None:
        tensor = torch.tensor([float(step), float(step) + 1])
        net.log("values", Histogram(tensor, bins=2))
        tensor.zero_()

    outcome = train(logging_net(log))
    found = outcome.of(HistogramLogged)
    assert [event.global_step for event in found] == [*range(1, len(found) + 1)]
    assert [(e.low, e.high, e.counts) for e in found[:2]] == [(1.0, 2.0, [1.0, 1.0]), (2.0, 3.0, [1.0, 1.0])]
    assert all(type(event.low) is float for event in found)


# ------------------------------------------------------------------------------------------ images and texts


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [
        (torch.linspace(-0.5, 1.5, 20).reshape(4, 5), "L"),
        (torch.tensor([[math.nan, 1.0]]), "L"),
        (torch.rand(3, 4, 5), "RGB"),
        (torch.randint(0, 256, (4, 4, 5), dtype=torch.uint8), "RGBA"),
        (np.zeros((4, 5, 3), dtype=np.uint8), "RGB"),
        (PIL.Image.new("RGB", (5, 4), "red"), "RGB"),
        (PIL.Image.new("CMYK", (5, 4)), "RGB"),
    ],
)
def test_an_image_comes_back_from_its_file(pixels: Any, mode: str) -> None:
    png = PIL.Image.open(io.BytesIO(Image(pixels).encode()))
    assert png.mode == mode
    if isinstance(pixels, torch.Tensor):
        expected = pixels if pixels.dtype is torch.uint8 else (pixels.nan_to_num(0).clamp(0, 1) * 255).round().byte()
        expected = expected.permute(1, 2, 0) if pixels.ndim == 3 else expected
        assert torch.equal(torch.from_numpy(np.array(png)), expected)


def test_media_travel_by_reference(tmp_path: Path) -> None:
    """The event is published once the file is complete, with the step of the call, and is in the journal."""
    figure = matplotlib.figure.Figure()
    figure.subplots().plot([1, 2])
    long = "ä" * (INLINE_TEXT + 1)

    def log(net: Any, step: int, batch: Any) -> None:
        if step == 1:
            net.log("pixels", Image(torch.zeros(3, 4, 5)))
            net.log("../etc/ü", Image(torch.zeros(2, 2)))
            net.log("figure", figure)
            net.log("short", "text")
            net.log("long", long)

    run_dir = tmp_path / "run"
    outcome = train(logging_net(log), run_dir=run_dir, journal=True)
    assert outcome.result.status == "finished"
    images = {event.name: event for event in outcome.of(ImageLogged)}
    assert set(images) == {"pixels", "../etc/ü", "figure"}
    for event in images.values():
        file = run_dir / event.path
        assert file.resolve().is_relative_to(run_dir.resolve() / "media")
        with PIL.Image.open(file) as picture:
            assert picture.size == (event.width, event.height)
        assert (file.stat().st_size, event.global_step) == (event.nbytes, 1)
    assert (images["pixels"].width, images["pixels"].height) == (5, 4)
    texts = {event.name: event for event in outcome.of(TextLogged)}
    assert (texts["short"].text, texts["short"].path) == ("text", None)
    assert texts["long"].text == long[:INLINE_TEXT]
    assert (run_dir / str(texts["long"].path)).read_text("utf-8") == long
    kept = [event for event in read_history(run_dir / "journal") if isinstance(event, ImageLogged | TextLogged)]
    assert {event.name for event in kept} == {*images, *texts}


def test_a_run_without_a_folder_warns_about_images(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "stagecast"):
        outcome = train(
            logging_net(lambda net, *_: (net.log("a", Image(torch.zeros(2, 2))), net.log("b", "x" * 9_999)))
        )
    assert outcome.result.status == "finished"
    assert caplog.text.count("needs a run folder") == 1
    assert {(len(event.text), event.path) for event in outcome.of(TextLogged)} == {(INLINE_TEXT, None)}


def test_media_of_the_last_hook_arrive_before_the_sinks_are_closed(tmp_path: Path) -> None:
    """The writing thread is drained between callbacks and sinks."""

    late = hooked("on_end_train", lambda net, step: net.log("last", Image(torch.zeros(256, 256))), kind=Net)

    outcome = train(late(), run_dir=tmp_path / "run")
    assert [event.name for event in outcome.of(ImageLogged)] == ["last"]


@pytest.mark.parametrize("lane", LANES)
def test_each_lane_logs_with_the_step_of_its_event(tmp_path: Path, lane: str) -> None:
    class Logs(CallbackInterface):
        @LANES[lane]
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            net.log("number", float(global_step))
            net.log("values", Histogram(torch.tensor([0.0, float(global_step)]), bins=2))
            net.log("pixels", Image(torch.zeros(2, 2)))
            net.log("words", str(global_step))

    net = Net(rows=32)
    outcome = train(net, callbacks=[Logs()], run_dir=tmp_path / "run", val_interval_epochs=0)
    assert outcome.result.global_step == 4
    numbers = [(event.global_step, event.metrics["number"]) for event in outcome.of(MetricsLogged)]
    assert numbers == [(step, float(step)) for step in (1, 2, 3, 4)]
    assert [(event.global_step, event.high) for event in outcome.of(HistogramLogged)] == numbers
    assert [(event.global_step, event.text) for event in outcome.of(TextLogged)] == [(n, str(n)) for n in (1, 2, 3, 4)]
    images = outcome.of(ImageLogged)
    assert [event.global_step for event in images] == [1, 2, 3, 4]
    assert all((tmp_path / "run" / event.path).is_file() for event in images)


def test_media_of_a_skipped_step_are_dropped(tmp_path: Path) -> None:
    calls: list[float] = []

    def log(net: Net, step: int, batch: Any) -> None:
        calls.append(len(calls) + 1.0)
        net.log("number", calls[-1])
        net.log("values", Histogram(torch.full((2,), calls[-1]), bins=2))
        net.log("pixels", Image(torch.full((2, 2), calls[-1] / 4)))

    options = {"non_finite": "skip", "val_interval_epochs": 0}
    outcome = train(logging_net(log, rows=32, scales={2: math.nan}), run_dir=tmp_path / "run", **options)
    assert [event.reason for event in outcome.of(StepSkipped)] == ["non_finite_loss"]
    kept = [(1, 1.0), (2, 3.0), (3, 4.0)]
    assert [(event.global_step, event.metrics["number"]) for event in outcome.of(MetricsLogged)] == kept
    assert [(event.global_step, event.high) for event in outcome.of(HistogramLogged)] == kept
    assert [event.global_step for event in outcome.of(ImageLogged)] == [1, 2, 3]
    assert len(list((tmp_path / "run" / "media").rglob("*.png"))) == 3


class Slow(Drawn):
    """A figure whose encoding waits until it is released."""

    def __init__(self, go: threading.Event) -> None:
        self.go = go
        self.nbytes = 10

    def encode(self) -> bytes:
        assert self.go.wait(20.0)
        raise OSError("the disk is full")


def test_more_than_can_be_written_is_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Memory is bounded; a file that fails is counted, too."""
    published: list[Event] = []
    origin = Origin("run")
    writer = MediaWriter(tmp_path, published.append, origin)
    go = threading.Event()
    for _ in range(100):
        writer.add("slow", Slow(go), origin.header(), None, None)
    go.set()
    writer.add("text", LoggedText("x"), origin.header(), None, None)
    writer.close(20.0)
    dropped = sum(event.dropped for event in published if isinstance(event, ObserverDropped))
    written = sum(isinstance(event, TextLogged) for event in published)
    assert dropped + written == 101
    assert written <= 1
    assert caplog.text.count("the disk is full") == 1


def test_an_encoder_that_hangs_does_not_hold_the_end(tmp_path: Path) -> None:
    published: list[Event] = []
    origin = Origin("run")
    writer = MediaWriter(tmp_path, published.append, origin)
    go = threading.Event()
    writer.add("slow", Slow(go), origin.header(), None, None)
    writer.close(0.01)
    assert [event.dropped for event in published if isinstance(event, ObserverDropped)] == [1]
    go.set()
