"""TensorBoard's files, read by TensorBoard's library and server. `test_files` tests what all sinks of files share."""

from __future__ import annotations

import io
import json
import math
import os
import re
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import PIL.Image
import pytest
import torch
from support.threads import wait_until
from support.training import Net
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX.crc32c import _crc32c as plain_crc32c

from events.messages import (
    AudioLogged,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    RunEnded,
    RunResumed,
    StepSkipped,
    SystemSampled,
    TableLogged,
    TextLogged,
    TrainStepEnded,
    UnknownEvent,
    ValEpochEnded,
)
from events.metrics import metrics_of
from events.sink import RunInfo
from sinks import Memory, TensorBoard
from sinks.files.event_files import event_records
from sinks.files.tensorboard import TensorBoardWriter
from trainer import Histogram, Image, Trainer, TrainerArguments


class WithMore(TensorBoard, frozen=True):
    """Adds other data than events, as documented."""

    def open(self, run: RunInfo) -> TensorBoardWriter:
        writer = super().open(run)
        writer.summary_writer.add_pr_curve("curve", np.array([0, 1, 1]), np.array([0.1, 0.6, 0.9]), 3, walltime=5.0)
        return writer


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., TensorBoardWriter]]:
    """Opens the sink in a run's folder; what is still open at the end is closed."""
    writers: list[TensorBoardWriter] = []

    def open_one(sink: TensorBoard | None = None, **run: Any) -> TensorBoardWriter:
        one = (sink or TensorBoard()).open(RunInfo("demo", **({"run_dir": str(tmp_path)} | run)))
        writers.append(one)
        return one

    yield open_one
    for writer in writers:
        writer.close()


def shown(folder: Path) -> Any:
    """What TensorBoard reads from a folder, all of it."""
    everything = dict.fromkeys(["scalars", "images", "histograms", "tensors"], 0)
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def records_of(folder: Path) -> list[bytes]:
    """The messages in the folder's only file, without those that say how far it goes."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.iterdir()
    data, records = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        records.append(data[12 : 12 + length])
        data = data[16 + length :]
    return [record for record in records if not Event.FromString(record).HasField("log_message")]


def curve(board: Any, tag: str) -> list[tuple[int, float, float]]:
    return [(one.step, one.value, one.wall_time) for one in board.Scalars(tag)]


def single(value: float) -> float:
    """In single precision."""
    return float(np.float32(value))


PATHS = ["media/gone", "../secret", "media/../../secret", "{}/secret", "media/link", "away/secret", "fifo", "", "none"]


@pytest.mark.parametrize("path", PATHS)
def test_a_file_that_is_missing_or_outside_of_the_run_folder_is_skipped_with_a_warning(
    path: str, opened: Any, story: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever path an event of a foreign run names; nothing waits for a FIFO, and the rest is shown."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "run" / "media").mkdir(parents=True)
    (tmp_path / "run" / "media" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "run" / "away").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "run" / "fifo")
    name = path.format(tmp_path)
    run_dir = None if path == "none" else str(tmp_path / "run")
    opened(TensorBoard(dir=str(tmp_path / "board")), run_dir=run_dir).write([
        story(TextLogged, name="note", text="start", path=name),
        story(ImageLogged, name="picture", path=name),
        *story.steps(1),
    ])  # fmt: skip
    board = shown(tmp_path / "board")
    assert board.Tensors("note")[0].tensor_proto.string_val == [b"start"]
    assert board.Tags()["images"] == []
    assert len(board.Scalars("train_loss")) == 1
    assert [caplog.text.count(f"cannot show all of '{one}'") for one in ("note", "picture")] == [1, 1]


def test_events_of_other_types_are_ignored(opened: Any, story: Any, tmp_path: Path) -> None:
    """Those of a later version, too."""
    writer = opened()
    writer.write([story(UnknownEvent, unknown_type="Later", raw=b"{}"), story(StepSkipped, reason="non_finite_loss")])
    writer.write([])
    tags = shown(tmp_path / "tensorboard").Tags()
    assert not any(tags.values())


# ------------------------------------------------------------------------------------------------ the numbers


def test_numbers_are_shown_at_their_step_and_time(opened: Any, story: Any, tmp_path: Path) -> None:
    """Under the names that they have everywhere; NaN and infinities too, and what single precision cannot hold."""
    writer = opened()
    names = ["a/b c", "größe 📈", "n" * 3_000, "x,\n"]
    steps = story.steps(300, loss=0.1)
    events = [
        *steps,
        story(MetricsLogged, metrics=dict(zip(names, [math.nan, math.inf, -1e300, 7], strict=True))),
        story(ValEpochEnded, key="small", loss=math.nan),
        story(MetricsLogged, metrics={"a\udc80": 1.0}),
        story(SystemSampled, memory_used_bytes=2**34),
    ]
    writer.write(events)
    board = shown(tmp_path / "tensorboard")
    assert curve(board, "train_loss") == [(step.global_step, single(0.1), step.time) for step in steps]
    values = {tag: board.Scalars(tag)[0].value for tag in board.Tags()["scalars"]}
    assert [values[name] for name in names[1:]] == [math.inf, -math.inf, 7.0]
    assert math.isnan(values["a/b c"])
    assert math.isnan(values["val_loss/small"])
    assert values["a\\udc80"] == 1.0
    assert values["system/memory_used_bytes"] == 2**34


def test_a_step_of_any_size_is_shown(opened: Any, story: Any, tmp_path: Path) -> None:
    """However many bytes it takes."""
    steps = [0, 1, 127, 128, 16_383, 16_384, 2**31, 2**62]
    writer = opened()
    for story.global_step in steps:
        writer.write([story(MetricsLogged, metrics={"a": 0.5})])
    assert curve(shown(tmp_path / "tensorboard"), "a") == [(step, 0.5, story.time) for step in steps]


def test_what_is_written_by_hand_is_what_protocol_buffers_write(opened: Any, story: Any, tmp_path: Path) -> None:
    """Byte for byte: TensorBoard has more readers than those that are tried here."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    story.global_step = 300
    events = [story(MetricsLogged, metrics={"a": 0.5, "ü" * 200: -1.0}), *story.steps(1)]
    opened().write(events)
    for event, record in zip(events, records_of(tmp_path / "tensorboard")[1:], strict=True):
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics_of(event)]
        message = Event(wall_time=event.time, step=event.global_step, summary=Summary(value=values))
        assert record == message.SerializeToString()


def test_checksums_are_those_of_a_plain_implementation() -> None:
    """For records of all lengths, short of and beyond what is taken at a time, in any mixture."""
    generator = np.random.default_rng(0)
    lengths = [4, 5, 1_023, 1_024, 1_025, 1_026, 1_027, 1_028, 3_000, 100_001, *generator.integers(4, 60, 500)]
    records = [generator.bytes(int(length)) for length in lengths]
    data = event_records(records)

    def masked(crc: int) -> int:
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    for record in records:
        head = struct.pack("<Q", len(record))
        head += struct.pack("<I", masked(plain_crc32c(head)))
        expected = head + record + struct.pack("<I", masked(plain_crc32c(record)))
        assert data[: len(expected)] == expected
        data = data[len(expected) :]
    assert not data


# ------------------------------------------------------------------------------------------ what is not a number


def test_a_histogram_has_its_bins_and_nearly_the_moments_of_its_elements(
    opened: Any, story: Any, tmp_path: Path
) -> None:
    """As near as the bins tell."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 100_000)
    counts, edges = np.histogram(values, bins=64)
    opened().write(
        [
            story(HistogramLogged, name="w", low=edges[0], high=edges[-1], counts=[float(c) for c in counts], key="k"),
            story(HistogramLogged, name="same", low=7.0, high=7.0, counts=[5.0, 0.0]),
            story(HistogramLogged, name="nothing", counts=[0.0, 0.0], non_finite=9.0),
        ]
    )
    board = shown(tmp_path / "tensorboard")
    assert {*board.Tags()["histograms"]} == {"w/k", "same"}
    (found,) = board.Histograms("w/k")
    assert (found.step, found.wall_time) == (story.global_step, story.time)
    histogram = found.histogram_value
    assert (histogram.min, histogram.max, histogram.num) == (edges[0], edges[-1], 100_000)
    assert histogram.bucket == counts.tolist()
    assert histogram.bucket_limit == pytest.approx(edges[1:].tolist())
    assert histogram.sum == pytest.approx(values.sum(), rel=1e-3)
    assert histogram.sum_squares == pytest.approx((values * values).sum(), rel=1e-3)
    same = board.Histograms("same")[0].histogram_value
    assert (same.sum, same.sum_squares) == (35.0, 245.0)


def test_a_histogram_of_the_widest_range_has_its_edges(opened: Any, story: Any, tmp_path: Path) -> None:
    """The range is more than a number can hold. TensorBoard itself does not get far with it."""
    from tensorboardX.proto.event_pb2 import Event

    opened().write([story(HistogramLogged, name="w", low=-1.7e308, high=1.7e308, counts=[1.0, 2.0], non_finite=3.0)])
    _, record = records_of(tmp_path / "tensorboard")
    assert Event.FromString(record).summary.value[0].histo.bucket_limit == [0.0, 1.7e308]


def test_an_image_is_shown_as_the_bytes_of_its_file(opened: Any, story: Any, tmp_path: Path) -> None:
    """It is not decoded, nor compressed again."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)).save(buffer, "PNG")
    (tmp_path / "media").mkdir()
    (tmp_path / "media/größe.png").write_bytes(buffer.getvalue())
    opened().write([story(ImageLogged, name="größe/x", path="media/größe.png", width=30, height=40, key="default")])
    (found,) = shown(tmp_path / "tensorboard").Images("größe/x")
    assert found.encoded_image_string == buffer.getvalue()
    assert (found.width, found.height, found.step, found.wall_time) == (30, 40, story.global_step, story.time)


def test_a_sound_is_shown_and_a_table_is_a_text(opened: Any, story: Any, tmp_path: Path) -> None:
    """Of a long table the first rows, with the number of the others."""
    (tmp_path / "a.wav").write_bytes(b"a sound")
    rows = [["x\\|y", None], ["<b>\n\n", 0.5], *([["z", 1]] * 150)]
    (tmp_path / "a.json").write_bytes(msgspec.json.encode({"columns": ["a", "b"], "rows": rows, "cut": "a part"}))
    sound = story(AudioLogged, name="speech", path="a.wav", rate=8_000, channels=2, frames=5)
    opened().write([sound, story(TableLogged, name="rows", path="a.json", key="k")])
    board = shown(tmp_path / "tensorboard")
    (found,) = board.Audio("speech")
    assert (found.encoded_audio_string, found.content_type) == (b"a sound", "audio/wav")
    assert (found.sample_rate, found.length_frames, found.step) == (8_000.0, 5, story.global_step)
    text = board.Tensors("rows/k")[0].tensor_proto.string_val[0].decode()
    lines = text.splitlines()
    assert lines[:4] == ["| a | b |", "| --- | --- |", "| x\\&#124;y |  |", "| &lt;b&gt; | 0.5 |"]
    assert text.count("| z | 1 |") == 98
    assert lines[-3:] == ["52 further rows are in the run folder", "", "The table has a part"]


def test_texts_are_shown_whole(opened: Any, story: Any, tmp_path: Path) -> None:
    """Long ones from their file."""
    long = "größe\n" * 10_000
    (tmp_path / "long.txt").write_bytes(long.encode() + b"\xff")
    events = [
        story(TextLogged, name="short", text="**hi** \udc80"),
        story(TextLogged, name="long", text=long[:100], path="long.txt", key="k"),
    ]
    opened().write(events)
    board = shown(tmp_path / "tensorboard")
    assert board.Tensors("short")[0].tensor_proto.string_val == [rb"**hi** \udc80"]
    assert board.Tensors("long/k")[0].tensor_proto.string_val == [(long + "\ufffd").encode()]
    assert board.SummaryMetadata("short").plugin_data.plugin_name == "text"


def test_other_data_goes_through_tensorboardx_into_the_same_file(opened: Any, story: Any, tmp_path: Path) -> None:
    """In the order of the calls; and its own threads and files are not begun."""
    writer = opened(WithMore())
    writer.write(story.steps(1))
    writer.summary_writer.add_scalar("own", 0.25, 4, walltime=6.0)
    writer.summary_writer.add_text("own text", "hi", 4)
    writer.summary_writer.flush()
    assert len([*(tmp_path / "tensorboard").iterdir()]) == 1
    board = shown(tmp_path / "tensorboard")
    assert curve(board, "own") == [(4, 0.25, 6.0)]
    assert board.Tensors("curve")[0].step == 3
    writer.close()
    opened(attempt=2)  # such data has no position in the run's history, and is not delivered again
    assert curve(shown(tmp_path / "tensorboard"), "own") == [(4, 0.25, 6.0)]


def test_what_tensorboardx_has_begun_itself_ends_with_the_sink(opened: Any, tmp_path: Path) -> None:
    """Its files in folders below, and the threads that write them."""
    writer = opened()
    writer.summary_writer.add_scalars("group", {"a": 1.0, "b": 2.0}, 3)
    before = [thread for thread in threading.enumerate() if type(thread).__name__ == "_EventLoggerThread"]
    assert len(before) == 2
    writer.close()
    assert not any(thread.is_alive() for thread in before)
    assert [(one.step, one.value) for one in shown(tmp_path / "tensorboard/group/b").Scalars("group")] == [(3, 2.0)]


# ----------------------------------------------------------------------------------------- attempts and folders


def test_steps_that_are_done_again_are_hidden(opened: Any, story: Any, tmp_path: Path) -> None:
    """Steps after the resumed one; earlier data stays."""
    first = opened()
    first.write(story.steps(10, loss=1.0))
    first.close()
    story.attempt, story.global_step = 2, 6
    resumed = story(RunResumed, checkpoint="step-6.a1")
    second = opened(attempt=2)
    second.write([resumed, *story.steps(2, loss=2.0)])
    board = shown(tmp_path / "tensorboard")
    found = [(one.step, one.value) for one in board.Scalars("train_loss")]
    assert found == [*[(step, 1.0) for step in range(1, 7)], (7, 2.0), (8, 2.0)]


def test_what_others_have_in_the_folder_is_left_as_it_is(opened: Any, story: Any, tmp_path: Path) -> None:
    """Another run's files, and those of other programs; each run continues its own."""
    steps = story.steps(4)
    other = [msgspec.structs.replace(step, run_id="other") for step in steps]
    sink = TensorBoard(dir=str(tmp_path / "board"))
    for run_id, events in (("demo", steps[:2]), ("other", other)):
        writer = sink.open(RunInfo(run_id))
        writer.write(events)
        writer.close()
    (tmp_path / "board/events.out.tfevents.9999999990.elsewhere.1").write_bytes(b"x" * 100)
    before = {one: one.read_bytes() for one in (tmp_path / "board").iterdir()}
    opened(sink).write(steps)
    assert {one: one.read_bytes() for one in before} == before
    (added,) = {*(tmp_path / "board").iterdir()} - before.keys()
    assert added.read_bytes().count(b"train_loss") == 2


def test_an_event_that_no_message_can_hold_is_skipped(opened: Any, story: Any, tmp_path: Path, caplog: Any) -> None:
    """With one warning: numbers in a journal are untrusted."""
    writer = opened()
    huge = msgspec.structs.replace(story(HistogramLogged, name="h", low=0.0, high=1.0, counts=[1.0]), global_step=2**63)
    last = msgspec.structs.replace(story(RunResumed), global_step=2**63 - 1)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    image = story(ImageLogged, name="i", path="a.png", width=2**40, height=-1)
    writer.write([huge, last, image, *story.steps(1)])
    writer.close()
    assert caplog.text.count("TensorBoard skips HistogramLogged") == caplog.text.count("TensorBoard skips") == 1
    board = shown(tmp_path / "tensorboard")
    assert (len(board.Scalars("train_loss")), len(board.Images("i"))) == (1, 1)


def test_a_new_file_comes_behind_those_that_are_there(opened: Any, tmp_path: Path) -> None:
    """Whatever the clock says: TensorBoard reads them in the order of their names, and none twice."""
    folder = tmp_path / "tensorboard"
    folder.mkdir()
    (folder / "events.out.tfevents.9999999990.elsewhere.1").write_bytes(b"")
    (folder / "other.txt").write_bytes(b"")
    opened().close()
    opened()
    names = sorted(name for name in os.listdir(folder) if "tfevents" in name)
    assert [name.split(".")[3] for name in names] == ["9999999990", "9999999991", "9999999992"]


def test_it_loads_no_torch_where_there_is_none(run_python: Any, tmp_path: Path) -> None:
    """In a sink host it would take seconds and hundreds of megabytes; user code may still import it."""
    result = run_python(f"""
import sys
from events.messages import TrainStepEnded
from events.sink import RunInfo
from sinks import TensorBoard
assert "tensorboardX" not in sys.modules
writer = TensorBoard().open(RunInfo("demo", run_dir={str(tmp_path)!r}))
writer.write([TrainStepEnded("demo", 1, 1, 0.0, 0, 1, 0, "train")])
writer.summary_writer.add_scalar("own", 1.0, 1)
writer.close()
assert "tensorboardX" in sys.modules
assert not [name for name in sys.modules if name.split(".")[0] == "torch"]
import importlib.util
assert importlib.util.find_spec("torch")
""")
    assert result.returncode == 0, result.stderr


# --------------------------------------------------------------------------------------------------- with a run


def asked(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """TensorBoard itself, on a port of its own; its address. It has read the folder when it answers."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0", "--host", "127.0.0.1"]
    command += ["--load_fast", "false", "--reload_interval", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    yield found[0]
                    break
            else:
                raise AssertionError(f"TensorBoard did not start: {''.join(said)}")
        finally:
            process.terminate()


def test_a_resumed_run_is_one_run_in_tensorboard(tmp_path: Path) -> None:
    """Its numbers, media and arguments, as the server shows them, and the same as in the events."""

    def logs(net: Any, global_step: int, batch: Any) -> Any:
        if global_step == 2:
            net.log("weights", Histogram(net.linear.weight))
            net.log("picture", Image(torch.rand(3, 4, 5)))
            net.log("note", "hello")
        return net.forward_loss(batch)[0]

    memory = Memory()
    for epochs in (2, 3):
        arguments = TrainerArguments(epochs=epochs, train_batch_size=4, device="cpu", compile_options={"mode": "x"})
        own: Any = {"run_dir": tmp_path / "runs/one", "run_id": "one", "resume": "auto", "config": {"width": 8}}
        Trainer(Net(train_step=logs), arguments, sinks=[TensorBoard(), memory], **own).train()
    board = shown(tmp_path / "runs/one/tensorboard")
    steps = memory.of(TrainStepEnded)
    assert curve(board, "train_loss") == [(e.global_step, single(e.loss or 0.0), e.time) for e in steps]
    assert len(board.Scalars("val_loss")) == 3
    assert [ended.status for ended in memory.of(RunEnded)] == ["finished"] * 2
    assert board.Images("picture")[0].encoded_image_string.startswith(b"\x89PNG")
    with server(tmp_path / "runs") as url:
        wait_until(lambda: asked(f"{url}/data/runs") == ["one/tensorboard"], "TensorBoard does not show the run")
        scalars = asked(f"{url}/data/plugin/scalars/scalars?run=one/tensorboard&tag=train_loss")
        assert [step for _, step, _ in scalars] == [*range(1, 13)]
        for kind, tag in (("images", "picture"), ("histograms", "weights"), ("text", "note")):
            assert tag in asked(f"{url}/data/plugin/{kind}/tags")["one/tensorboard"]
        query = {"experimentName": "", "allowedStatuses": ["STATUS_SUCCESS"], "startIndex": 0, "sliceSize": 9}
        (group,) = asked(f"{url}/data/plugin/hparams/session_groups", query | {"colParams": []})["sessionGroups"]
    assert group["hparams"]["epochs"] == 2.0
    assert group["hparams"]["width"] == 8.0
    assert group["hparams"]["clip_grads"] is False
    assert group["hparams"]["device"] == "cpu"
    assert group["hparams"]["compile_options/mode"] == "x"
    assert "max_steps" not in group["hparams"]
    assert {"val_loss", "train_loss"} <= {metric["name"]["tag"] for metric in group["metricValues"]}
