from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from events.messages import (
    BackwardEnded,
    CheckpointFailed,
    CheckpointRejected,
    CheckpointSaved,
    CheckpointSkipped,
    CheckpointUploaded,
    OperatorTime,
    RankEnded,
    RankReported,
    RunEnded,
    RunResumed,
    StallLedger,
    TraceSaved,
    TrainEpochEnded,
    TrainEpochStarted,
    TrainStepEnded,
    ValStepEnded,
    WeightsSaved,
)
from events.run.state import RunState
from events.sink import RunInfo, delivery_of
from sinks.console.bars import bar_rows
from sinks.console.console import Console


class Tty(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Callable[..., io.StringIO]:
    """Replaces stderr and the environment that a terminal is judged by."""

    def replace(stream: io.StringIO, **env: str) -> io.StringIO:
        for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.stderr", stream)
        return stream

    return replace


def told(console: Console, *events: Any) -> None:
    """Open, write, close: the last event alone, so that bars are drawn before the end takes them away."""
    writer = console.open(RunInfo("demo", run_dir="runs/demo"))
    writer.write(events[:-1])
    writer.write(events[-1:])
    writer.close()


class WriteOnly:
    """A stream of a host's, which has no more than it needs."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


def closed() -> io.StringIO:
    """A stream that nothing can be written to."""
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize(
    "make", [WriteOnly, closed, lambda: None, object], ids=["no flush", "closed", "None", "object"]
)
def test_whatever_stderr_is_the_console_does_not_fail(
    story: Any, stderr: Callable[..., Any], make: Callable[[], Any]
) -> None:
    """A stream without ``flush`` is written to; one that cannot be written to is left alone."""
    stream = stderr(make(), TERM="xterm-256color")
    told(Console(), story.started(), *story.steps(3), story(RunEnded, status="finished"))
    assert not isinstance(stream, WriteOnly) or "finished" in stream.text


@pytest.mark.parametrize(
    ("stream", "env"),
    [
        (io.StringIO, {"TERM": "xterm-256color"}),
        (io.StringIO, {"TERM": "xterm-256color", "FORCE_COLOR": "1"}),
        (io.StringIO, {"TERM": "xterm-256color", "TTY_COMPATIBLE": "1"}),
        (Tty, {"TERM": "dumb"}),
        (Tty, {"TERM": "unknown"}),
    ],
)
def test_without_a_capable_terminal_there_is_no_control_character(
    stderr: Any, story: Any, stream: Any, env: dict[str, str]
) -> None:
    """A pipe, a log file, a dumb terminal, a CI job that forces colours: plain lines, whatever the names."""
    output = stderr(stream(), **env)
    evil = "\x1b[31m\r\n\x07[bold]"
    told(
        Console(),
        story.started(module=evil, config={evil: evil, "width": 8}, git_commit="0123456789abc", git_dirty=True),
        *story.steps(50),
        story(TrainEpochEnded, loss=1.0),
        story(RunEnded, status="failed", reason=evil),
    )
    text = output.getvalue()
    assert all(char.isprintable() or char == "\n" for char in text)
    assert len(text.splitlines()) == 4 + (story.time - 1_700_000_000 >= 10)
    assert "commit 012345678 with changes" in text
    assert ", width=8" in text


@pytest.mark.parametrize(
    ("force", "stream", "bars"), [(None, Tty, True), (True, io.StringIO, True), (False, Tty, False)]
)
def test_a_capable_terminal_gets_bars_unless_the_choice_is_forced(
    stderr: Any, story: Any, force: bool | None, stream: Any, bars: bool
) -> None:
    output = stderr(stream(), TERM="xterm-256color")
    told(Console(force_terminal=force, refresh_per_s=60), story.started(), *story.steps(5))
    assert ("\x1b[J" in output.getvalue()) is bars


def test_checkpoints_are_told_of(stderr: Any, story: Any) -> None:
    """What is durable, what was left out, what failed and what was not whole; at most one in ten seconds of a kind."""
    stream = stderr(io.StringIO())
    saved = {"path": "runs/demo", "nbytes": 1_540_000_000, "durable_s": 1.5}
    told(
        Console(),
        story.started(),
        story(RunResumed, checkpoint="step-40.a1"),
        story(CheckpointRejected, checkpoint="step-50.a1", error="CheckpointDamaged: cut"),
        story(RankEnded, ended_attempt=1, ended_rank=1, host="b", status="failed", reason="rank 0 on a: gone"),
        *(story(CheckpointSaved, checkpoint=f"step-{step}.a2", reasons=["steps"], **saved) for step in (60, 70, 80)),
        story(CheckpointSkipped, reasons=["steps"], writing=["step-60.a2", "step-70.a2"]),
        story(CheckpointFailed, checkpoint="step-90.a2", error="OSError: disk full", consecutive=2),
        story(CheckpointUploaded, checkpoint="step-60.a2", url="s3://b/step-60.a2", nbytes=5_000, duration_s=2.0),
        story(CheckpointSaved, checkpoint="step-90.a2", reasons=["stop"], **saved),
        story(WeightsSaved, path="runs/demo/weights.safetensors", nbytes=42_000_000),
        story(
            TraceSaved,
            path="traces/h_1.2.pt.trace.json.gz",
            nbytes=7_600,
            first_step=4,
            last_step=6,
            operators=[OperatorTime("aten::mm", 300, 0.25), OperatorTime("gemm", 2, 0.5, True)],
        ),
    )
    text = stream.getvalue()
    for expected in (
        "resumed from step-40.a1 at step",
        "attempt 1, rank 1 on b failed: rank 0 on a: gone",
        "checkpoint step-50.a1 is incomplete, an older one is tried: CheckpointDamaged: cut",
        "checkpoint step-60.a2 (steps): 1.5 GB, durable after 1.5 s",
        "step-60.a2, step-70.a2 are still being written",
        "could not write checkpoint step-90.a2, 2 in a row: OSError: disk full",
        "uploaded to s3://b/step-60.a2: 5.0 kB in 2.0 s",
        "checkpoint step-90.a2 (stop): 1.5 GB, durable after 1.5 s [and 2 more before]",
        "weights in runs/demo/weights.safetensors (42 MB)",
        "trace of steps 4 to 6 in traces/h_1.2.pt.trace.json.gz (7.6 kB)",
        "  250 ms in 300 x aten::mm",
        "  500 ms in 2 x gemm (device)",
    ):
        assert expected in text
    assert "step-70.a2 (steps)" not in text


def test_ranks_that_hold_up_the_others_have_a_line_once_and_one_at_the_end(stderr: Any, story: Any) -> None:
    output = stderr(io.StringIO())
    fields = {"ranks": 16, "host": "h", "phase": "backward", "steps": 1, "step_s": 1.0, "memory_bytes": None}
    fields["device_memory_bytes"] = None
    slow = [0.1] * 10 + [0.9] * 6
    rounds = [
        story(RankReported, reported_rank=rank, before_exchange_s=seconds, ledger=StallLedger(), **fields)
        for _ in range(4)
        for rank, seconds in enumerate(slow)
    ]
    writer = Console().open(RunInfo("demo"))
    writer.write([story.started(), *rounds, story(RunEnded, status="finished")])
    writer.close()
    warnings = [line for line in output.getvalue().splitlines() if "warning: " in line]
    assert [" ".join(line.partition("warning: ")[2].split()[: 4 if "on h" in line else 3]) for line in warnings] == [
        "rank 10 on h",
        "rank 11 on h",
        "rank 12 on h",
        "rank 13 on h",
        "2 more ranks",
    ]
    assert output.getvalue().count("problem: rank") == 6
    assert "finished at step 0" in output.getvalue()
    assert "with 6 problems" in output.getvalue()


def test_progress_is_a_line_now_and_then_by_the_time_of_the_events(stderr: Any, story: Any) -> None:
    """One line every ten seconds of training, however the events were batched; a backlog is one line."""
    output = stderr(io.StringIO())
    writer = Console().open(RunInfo("demo"))
    writer.write([story.started(epochs=2, steps_per_epoch=1_000)])
    for step in story.steps(360, step_s=0.125):  # 45 seconds
        writer.write([step])
    writer.write(story.steps(300, step_s=0.125))
    lines = [line[9:] for line in output.getvalue().splitlines()]
    assert len(lines) == 1 + 4 + 1
    assert lines[1] == "· epoch 1/2  step 80/1,000 (8 %)  loss 2.0000  8.0 steps/s  4m 00s left"
    assert lines[-1].startswith("· epoch 1/2  step 660/1,000 (66 %)")


def test_a_long_validation_is_a_line_too(stderr: Any, story: Any) -> None:
    """Silence during validation would look like a hang."""
    output = stderr(io.StringIO())
    writer = Console(line_every_s=5).open(RunInfo("demo"))
    writer.write([story.started()])
    story.time += 6
    writer.write([story(ValStepEnded, key="big", step=1_200)])
    assert output.getvalue().splitlines()[-1].endswith("· epoch 1/3  val big 1,200")


def test_a_clock_that_was_set_back_does_not_silence_it(stderr: Any, story: Any) -> None:
    """Otherwise an hour would have to pass twice."""
    output = stderr(io.StringIO())
    writer = Console().open(RunInfo("demo"))
    writer.write([story.started(), *story.steps(1)])
    story.time -= 3_600
    writer.write(story.steps(1))
    writer.write(story.steps(50))
    assert output.getvalue().count("epoch 1/3") == 1


def test_a_reader_that_went_away_is_told_to_the_supervisor(stderr: Any, story: Any) -> None:
    """``train 2>&1 | head``: the console raises and is disabled, the run goes on."""
    reader, writer = os.pipe()
    os.close(reader)
    file = os.fdopen(writer, "w")
    stderr(file)
    console = Console().open(RunInfo("demo"))
    with pytest.raises(BrokenPipeError):
        console.write([story.started()])
    console.close()
    with pytest.raises(BrokenPipeError):
        file.close()


def test_two_consoles_write_side_by_side(stderr: Any, story: Any) -> None:
    """Without a terminal there is nothing to share: each run writes whole lines, from its own thread."""
    output = stderr(io.StringIO())
    writers = [Console(line_every_s=0.001).open(RunInfo("demo")) for _ in range(2)]
    steps = [story.started(), *story.steps(300)]
    threads = [threading.Thread(target=lambda w=w: [w.write([step]) for step in steps]) for w in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = output.getvalue().splitlines()
    assert len(lines) == 2 * 301
    assert all(line[2] == ":" and line[9] == "·" for line in lines)


@pytest.mark.parametrize(
    "fields", [{"refresh_per_s": 0.0}, {"refresh_per_s": -1.0}, {"refresh_per_s": 1e9}, {"line_every_s": 0.0}]
)
def test_a_useless_setting_is_refused_by_name(fields: dict[str, float]) -> None:
    """Structs check nothing by themselves."""
    name = next(iter(fields))
    with pytest.raises(ValueError, match=rf"Console\({name}="):
        Console(**fields)  # type: ignore[arg-type]


def test_it_asks_for_no_more_events_than_it_shows() -> None:
    delivery = delivery_of(Console())
    assert delivery.overflow == "latest"
    assert delivery.types is not None
    assert (TrainStepEnded in delivery.types, BackwardEnded in delivery.types) == (True, False)


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("loss", [0.5, 1.234e-7])
def test_the_time_left_is_shown_at_usual_widths(story: Any, width: int, loss: float) -> None:
    """Of the run at any of them; of the epoch too, where there is room for two columns of text."""
    state = RunState()
    plan = story.started(epochs=100, steps_per_epoch=500)
    state.add([plan, story(TrainEpochStarted, steps=500), *story.steps(199)])
    state.pace.loss = loss
    epoch, step = ("".join(span.text for span in row) for row in bar_rows(state, width - 1))
    assert epoch.endswith(" left")
    assert step.endswith(" left") or width == 40
    assert max(len(epoch), len(step)) < width
