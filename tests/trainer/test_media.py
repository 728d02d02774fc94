"""Histograms, images, figures and texts that a module logs, and their files."""

from __future__ import annotations

import io
import json
import logging
import math
import threading
import wave
from pathlib import Path
from typing import Any

import matplotlib.figure
import msgspec
import numpy as np
import pandas
import PIL.Image
import pytest
import torch
from support.training import LANES, Net, hooked, logging_net, train

from events.journal.history import read_history
from events.messages import (
    AudioLogged,
    Event,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    ObserverDropped,
    StepSkipped,
    TableContent,
    TableLogged,
    TextLogged,
)
from events.origin import Origin
from sinks.live.images import open_image
from trainer import Audio, CallbackInterface, Histogram, Image, Table
from trainer.media import INLINE_TEXT, Drawn, LoggedText, MediaWriter

# ------------------------------------------------------------------------------------------------ bad input


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


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
        (lambda: Audio(torch.zeros(2, 3, 4), 8_000), ValueError, "(2, 3, 4)"),
        (lambda: Audio(torch.zeros(0), 8_000), ValueError, "(time,) or (channels, time)"),
        (lambda: Audio(torch.zeros(400, 2), 8_000), ValueError, "not (time, channels)"),
        (lambda: Audio(torch.zeros(1).expand(2**24 + 1), 8_000), ValueError, "log an excerpt"),
        (lambda: Audio(torch.zeros(4, dtype=torch.int64), 8_000), TypeError, "int64"),
        (lambda: Audio("a.wav", 8_000), TypeError, "'a.wav'"),
        (lambda: Audio(torch.zeros(4), 0), ValueError, "rate=0"),
        (lambda: Audio(torch.zeros(4), 16_000.0), ValueError, "rate=16000.0"),  # type: ignore[arg-type]
        (lambda: Table(["a", "b"], [[1, 2], [3]]), ValueError, "1 cells in row 2 for 2 columns"),
        (lambda: Table(["a"], ["x"]), TypeError, "'x' as row 1"),
        (lambda: Table(["a"], 3), TypeError, "3 as rows"),  # type: ignore[arg-type]
        (lambda: Table(["a"]), TypeError, "column names and rows"),
        (lambda: Table({"a": [1], "b": [1, 2]}), ValueError, "different lengths (a 1, b 2)"),
        (lambda: Table({"loss": 1.0}), TypeError, "1.0 as column 'loss'"),
        (lambda: Table({}), ValueError, "no columns"),
        (lambda: Table(range(65), []), ValueError, "65 columns"),
        (lambda: Table(["a"], [[torch.zeros(2)]]), ValueError, "shape (2,) in row 1, column 'a'"),
        (lambda: Table(["a"], [[Unprintable()]]), TypeError, "cannot print Unprintable in row 1, column 'a'"),
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


# ---------------------------------------------------------------------------------------- sounds and tables


def read_wav(file: Any) -> tuple[np.ndarray, int]:
    """Samples ``(time, channels)`` and rate."""
    with wave.open(str(file) if isinstance(file, Path) else file) as reader:
        samples = np.frombuffer(reader.readframes(reader.getnframes()), "<i2")
        return samples.reshape(-1, reader.getnchannels()), reader.getframerate()


@pytest.mark.parametrize(
    "samples",
    [
        torch.linspace(-1, 1, 400),
        torch.rand(2, 50, dtype=torch.float64) * 2 - 1,
        np.array([[0, 32_767], [-32_768, 1], [5, 6]], dtype=np.int16),
        torch.tensor([-3.0, 0.5, math.nan, math.inf]),
    ],
)
def test_a_sound_comes_back_from_its_file(samples: Any) -> None:
    """As Python's own module reads it: 16 bits for each sample of each channel, in order."""
    wav = Audio(samples, 8_000).encode()
    found, rate = read_wav(io.BytesIO(wav.data))
    expected = np.atleast_2d(np.asarray(samples))
    if expected.dtype != np.int16:
        expected = np.round(np.clip(np.nan_to_num(expected), -1, 1) * 32_767)
    assert rate == 8_000
    assert (wav.channels, wav.frames) == expected.shape
    assert np.abs(found.T - expected).max() <= (0 if expected.dtype == np.int16 else 1)
    if np.isnan(np.asarray(samples)).any():
        assert wav.problem is not None
        assert "2 of 4 samples are outside of -1 to 1 and clipped, 1 are NaN" in wav.problem
    else:
        assert wav.problem is None


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        (
            lambda: Table(["a", 2], [[1, "x"], (math.nan, None), [np.float32(0.5), True], [2**60, -math.inf]]),
            [[1, "x"], ["NaN", None], [0.5, True], [str(2**60), "-Infinity"]],
        ),
        (lambda: Table({"a": torch.arange(2), "2": np.array([0.5, 1.5])}), [[0, 0.5], [1, 1.5]]),
        (lambda: Table(["a", "2"], [[torch.tensor([[7.0]]), Path("x\udc80")]]), [[7.0, "x\\udc80"]]),
        (lambda: Table(pandas.DataFrame({"a": [1.5, math.nan], 2: ["x", None]})), [[1.5, "x"], [None, None]]),
        (lambda: Table(["a", "2"], []), []),
        (lambda: Table({"a": torch.zeros(9), "2": None}, [[1, "x"]]), [[1, "x"]]),
    ],
)
def test_a_table_comes_back_from_its_file(table: Any, rows: list[list[Any]]) -> None:
    """With the values of the time of the call."""
    encoded = table().encode()
    assert json.loads(encoded.data) == {"columns": ["a", "2"], "rows": rows, "cut": None}


def test_a_table_is_bounded_and_says_what_is_cut() -> None:
    encoded = Table(["a"], [["x" * 2_000]] * 3 + [[1]] * 5_000).encode()
    content = msgspec.json.decode(encoded.data, type=TableContent)
    assert (len(content.rows), content.rows[2]) == (1_000, ["x" * 1_000])
    assert encoded.cut == content.cut == "the first 1,000 of 5,003 rows and the first 1,000 characters of 3 cells"


def test_sounds_and_tables_travel_by_reference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the step and the values of the call; clipped samples and cut rows are said once."""

    def log(net: Any, step: int, batch: Any) -> None:
        sound, score = torch.full((2, 50), float(step)), torch.tensor([float(step)])
        net.log("speech", Audio(sound, 16_000))
        net.log("scores", Table({"score": score, "n": [step]}))
        if step == 1:
            net.log("frame", pandas.DataFrame({"a": range(1_500)}))
        sound.zero_()
        score.zero_()

    run_dir = tmp_path / "run"
    outcome = train(logging_net(log), run_dir=run_dir, journal=True, val_interval_epochs=0)
    sounds, tables = outcome.of(AudioLogged), outcome.of(TableLogged)
    assert [event.global_step for event in sounds] == [*range(1, outcome.result.global_step + 1)]
    for event in sounds:
        found, rate = read_wav(run_dir / event.path)
        assert (rate, found.shape) == (event.rate, (event.frames, event.channels)) == (16_000, (50, 2))
        assert (found == 32_767).all()
        shown = open_image(run_dir, event.path)
        with shown.file:
            assert (shown.size, shown.media_type) == (event.nbytes, "audio/wav")
    for table in tables:
        shown = open_image(run_dir, table.path)
        with shown.file:
            assert (shown.size, shown.media_type) == (table.nbytes, "application/json")
        content = msgspec.json.decode((run_dir / table.path).read_bytes(), type=TableContent)
        assert (content.columns, len(content.rows), content.cut) == (table.columns, table.rows, table.cut)
        if table.name == "scores":
            assert content.rows == [[float(table.global_step), table.global_step]]
    assert [table.cut for table in tables if table.name == "frame"] == ["the first 1,000 of 1,500 rows"]
    assert (caplog.text.count("are outside of -1 to 1"), caplog.text.count("'frame' has the first")) == (1, 1)
    assert [*read_history(run_dir / "journal")].count(sounds[0]) == 1


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


def test_a_run_without_a_folder_warns_about_files(caplog: pytest.LogCaptureFixture) -> None:
    class Tone(Audio):
        pass

    def log(net: Any, step: int, batch: Any) -> None:
        net.log("a", Image(torch.zeros(2, 2)))
        net.log("b", "x" * 9_999)
        net.log("c", Tone(torch.zeros(2), 8_000))
        net.log("d", Table(["x"], [[1]]))

    with caplog.at_level(logging.WARNING, "stagecast"):
        outcome = train(logging_net(log))
    assert outcome.result.status == "finished"
    assert [caplog.text.count(f"{kind} needs a run folder") for kind in ("an image", "a sound", "a table")] == [1, 1, 1]
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
