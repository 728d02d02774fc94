from __future__ import annotations

import io
import math
import os
import re
import threading
from typing import Any

import pytest

from events.messages import (
    CommandTaken,
    Event,
    JournalGap,
    LedgerReported,
    LoopHeld,
    MetricsLogged,
    NonFiniteLoss,
    ObserverDropped,
    ObserverFailed,
    ObserverRecovered,
    ObserverSlow,
    RunEnded,
    RunResumed,
    StallLedger,
    TestEpochEnded,
    TestEpochStarted,
    TestStepEnded,
    TrainEpochEnded,
    TrainEpochStarted,
    ValEpochEnded,
    ValEpochStarted,
    ValStepEnded,
)
from sinks.testing import Story


def test_a_broken_pipe_is_raised_once_and_closing_stays_quiet(terminal: Any, story: Any) -> None:
    """The supervisor must hear of it; nobody must hear of it twice, and stdout must stay what it was."""
    reader, writer = os.pipe()
    os.close(reader)
    stdout = os.fstat(1)
    file = os.fdopen(writer, "w")
    broken = terminal(file=file)
    with pytest.raises(BrokenPipeError):
        broken.writer.write([story.started()])
    broken.writer.write(story.steps(3))
    broken.writer.close()
    assert os.fstat(1).st_ino == stdout.st_ino
    with pytest.raises(BrokenPipeError):
        file.close()


def test_a_closed_stream_is_raised_and_closing_stays_quiet(terminal: Any, story: Any) -> None:
    """A test runner that closes its captured stderr is a stream that went away too."""
    one = terminal()
    one.write(story.started())
    one.file.close()
    with pytest.raises(ValueError, match="closed file"):
        one.writer.write(story.steps(1))
    one.writer.close()


@pytest.mark.parametrize("name", ["\x1b[2Jgone", "[red]x[/red]", "two\nlines", "\u202eright to left", "\ud800", "[/]"])
def test_a_hostile_name_is_only_text(terminal: Any, story: Any, name: str) -> None:
    """Whatever a user calls things, it can neither move the cursor nor style or break a line."""
    one = terminal()
    story.stage = "val"
    screen = one.write(
        story.started(module=name, device=name),
        story(ValEpochStarted, key=name, steps=4),
        story(MetricsLogged, metrics={name: 1.0}, key=name),
        story(ValEpochEnded, key=name, loss=1.0),
        story(TrainEpochEnded, loss=1.0),
        story(ObserverFailed, observer=name, error=name, during=name, action="retrying"),
        story(ObserverDropped, observer=name, dropped=1),
        story(CommandTaken, command=name, command_id="1", reason=name),
        story(ValEpochStarted, key=name, steps=4),
    )
    shown = name if name.isprintable() else name.encode("unicode_escape").decode()
    assert shown in screen.text
    assert shown in screen.bars["val"]
    assert screen.text.count("epoch 1/3") == 1


def test_a_flood_of_failures_is_one_line_and_a_count(terminal: Any, story: Any) -> None:
    """A diverged run has a non-finite loss at each step; the screen stays readable, nothing uncounted."""
    one = terminal()
    for consecutive in range(1, 501):
        diverged = story(NonFiniteLoss, loss=math.nan, action="skipped", consecutive=consecutive)
        one.writer.write([*story.steps(1, step_s=0.001), diverged])
    screen = one.write(story(RunEnded, status="failed", reason="ValueError: diverged"))
    assert screen.text.count("is nan") == 1
    assert "not shown above:  non-finite losses: 499 more" in screen.text
    assert "✗ failed at step 500: ValueError: diverged" in screen.text


def test_repeats_are_shown_again_after_a_while_with_their_count(terminal: Any, story: Any) -> None:
    """Held-back lines are mentioned by the next line of their kind."""
    one = terminal()
    for _ in range(3):
        one.write(story(ObserverDropped, observer="web", dropped=10))
        story.time += 6
    screen = one.write(story(ObserverDropped, observer="web", dropped=7))
    assert screen.text.count("10 events did not reach web") == 2
    assert "10 events did not reach web [and 1 more before]" in screen.text


def test_an_observer_that_is_disabled_always_gets_its_line(terminal: Any, story: Any) -> None:
    """What ends an observer is never held back, however much it failed before."""
    one = terminal()
    what = {"observer": "db", "error": "OSError: gone", "during": "write"}
    for action in ("retrying", "retrying", "disabled", "fatal"):
        screen = one.write(story(ObserverFailed, action=action, **what))
    assert "! warning: db failed in write, retrying: OSError: gone" in screen.text
    assert "✗ error: db failed in write, disabled: OSError: gone" in screen.text
    assert "✗ error: db failed in write, the run ends: OSError: gone" in screen.text


def test_what_goes_wrong_is_said_in_words(terminal: Any, story: Any) -> None:
    """Each kind of trouble has its line: who, what, how much."""
    screen = terminal(140).write(
        story(ObserverRecovered, observer="db", failures=3, outage_s=4.2),
        story(ObserverSlow, observer="plots", during="on_end_train_step", running_s=12.0),
        story(LoopHeld, cause="fence", observers=["sampler"], wait_s=1.5),
        story(LoopHeld, cause="fence", observers=["sampler"], wait_s=2.5, released=True),
        story(LoopHeld, cause="backpressure", observers=["brief"], wait_s=0.01, released=True),
        story(JournalGap, first_seq=10, last_seq=19, lost=10, reason="OSError: disk full"),
    )
    assert "✓ db recovered after 4.2 s and 3 failures" in screen.text
    assert "! warning: plots has been in on_end_train_step for 12 s" in screen.text
    assert "! warning: the loop has been waiting 1.5 s for sampler (its hook to return)" in screen.text
    assert "! warning: the loop continues after waiting 2.5 s for sampler" in screen.text
    assert "brief" not in screen.text
    assert "✗ error: the journal lacks 10 events (seq 10 to 19): OSError: disk full" in screen.text


def test_replaced_events_are_not_called_lost_and_an_interval_ledger_has_no_line(terminal: Any, story: Any) -> None:
    """An observer that asked for the latest values got what it asked for."""
    interval = story(LedgerReported, scope="interval", ledger=StallLedger(wall_s=1.0, compute_s=1.0))
    ended = story(RunEnded, status="finished")
    screen = terminal().write(story(ObserverDropped, observer="console", conflated=900), interval, ended, interval)
    assert "did not reach" not in screen.text
    assert "loop time" not in screen.text


def joined_late(story: Story) -> list[Event]:
    story.epoch, story.global_step, story.step_in_epoch = 2, 250, 50
    return [*story.steps(10)]


@pytest.mark.parametrize(
    ("build", "shown", "hidden"),
    [
        (joined_late, {"epoch": ["epoch 3"], "step": ["step 60 ", "10.0 steps/s"]}, ["%", "left"]),
        (
            lambda story: [story.started(steps_per_epoch=None), story(TrainEpochStarted), *story.steps(7)],
            {"epoch": ["epoch 1/3"], "step": ["step 7 ", "10.0 steps/s"]},
            ["left"],
        ),
        (
            lambda story: [story.started(max_steps=40), story(TrainEpochStarted, steps=100), *story.steps(20)],
            {"step": ["step 20/40", "50%"], "epoch": ["50%", "2.0 s left"]},
            [],
        ),
        (
            lambda story: [story.started(max_steps=40), story(TrainEpochStarted, steps=100), *story.steps(40)],
            {"step": ["100%"]},
            [],
        ),
        (lambda story: [story.started(), *story.steps(5, loss=None)], {"step": ["5/100"]}, ["loss"]),
        (
            lambda story: [story.started(), *story.steps(50, step_s=4.0)],
            {"step": ["4.0 s/step", "3m 20s left"]},
            [],
        ),
        (lambda story: [story(ValStepEnded, key="a", step=3)], {"val": ["val 3 a"]}, ["%"]),
    ],
    ids=[
        "joined late",
        "no length",
        "max_steps",
        "max_steps reached",
        "no loss",
        "slow steps",
        "validation start missed",
    ],
)
def test_bars_show_what_the_events_tell(
    build: Any, shown: dict[str, list[str]], hidden: list[str], terminal: Any, story: Story
) -> None:
    """Rates come from the times of events, not from the clock; a value that is not known has no place."""
    rows = {label: " ".join(row.split()) for label, row in terminal().write(*build(story)).bars.items()}
    assert [part for label, parts in shown.items() for part in parts if part not in rows[label]] == []
    assert [part for part in hidden if part in "".join(rows.values())] == []


def test_a_loss_that_is_not_a_number_is_shown_at_once_and_not_kept(terminal: Any, story: Any) -> None:
    """A NaN must be seen, and must not poison the smoothed loss for ever."""
    one = terminal()
    assert "loss nan" in one.write(*story.steps(20, loss=2.0), *story.steps(1, loss=math.nan)).bars["step"]
    assert "loss 2.0000" in one.write(*story.steps(1, loss=2.0)).bars["step"]
    assert "loss inf" in one.write(*story.steps(1, loss=math.inf)).bars["step"]


def test_a_new_attempt_starts_over(terminal: Any, story: Any) -> None:
    """What the first attempt reached is not mixed into the second one's numbers."""
    one = terminal()
    one.write(story.started(), *story.steps(90))
    story.attempt, story.global_step, story.step_in_epoch, story.time = 2, 50, 50, story.time + 3600
    screen = one.write(story.started(), story(RunResumed), *story.steps(10, step_s=0.5))
    assert "attempt 2" in screen.text
    assert "resumed at step 50" in screen.text
    assert screen.bars["step"].split()[:2] == ["step", "60/100"]
    assert "2.0 steps/s" in screen.bars["step"]
    assert "5.0 s elapsed" in screen.bars["epoch"]


def test_validation_and_pauses_do_not_slow_the_rate(terminal: Any, story: Any) -> None:
    """The rate is that of training; the time left of the run includes validation but no pause."""
    one = terminal()
    one.write(story.started(epochs=1), *story.steps(50))
    assert "paused" in one.write(story(CommandTaken, command="pause", command_id="1")).bars["step"]
    story.time += 500
    one.write(story(CommandTaken, command="resume", command_id="2"), *story.steps(5))
    one.write(story(ValEpochStarted, steps=10))
    story.time += 4.9
    screen = one.write(story(ValEpochEnded, duration_s=4.9), *story.steps(1))
    assert "10.0 steps/s" in screen.bars["step"]
    assert "8.3 s left" in screen.bars["epoch"]
    assert "paused at step 50" in screen.text
    assert "resumed at step 50" in screen.text


def test_a_validation_row_is_there_while_validating(terminal: Any, story: Any) -> None:
    """It names its dataloader, and goes when validation is over."""
    one = terminal()
    one.write(story.started(), *story.steps(100))
    one.write(story(ValEpochStarted, key="shifted", steps=40))
    bars = one.write(story(ValStepEnded, key="shifted", step=10)).bars
    assert bars["val"].split()[:2] == ["val", "10/40"]
    assert "25%" in bars["val"]
    assert bars["val"].endswith("shifted")
    assert "val" not in one.write(story(ValEpochEnded, key="shifted")).bars


def test_an_epoch_line_has_the_losses_of_every_dataloader_and_the_metrics(terminal: Any, story: Any) -> None:
    """Losses first; the default dataloader's names go without a key."""
    story.stage = "val"
    screen = terminal(140).write(
        story.started(),
        story(MetricsLogged, metrics={"train_only": 5.0}),
        story(MetricsLogged, metrics={"accuracy": 0.5}, key="default"),
        story(ValEpochEnded, loss=1.25),
        story(MetricsLogged, metrics={"accuracy": 0.25}, key="shifted"),
        story(ValEpochEnded, key="shifted", loss=math.nan),
        story(TrainEpochEnded, loss=2.5, duration_s=62.0),
    )
    expected = (
        "• epoch 1/3  train_loss 2.5000  val_loss 1.2500  val_loss/shifted    nan"
        "  accuracy 0.5000  accuracy/shifted 0.2500  1m 02s"
    )
    assert expected in screen.lines


def test_results_from_the_middle_of_an_epoch_get_their_own_line(terminal: Any, story: Any) -> None:
    """With validation every n steps nobody wants to wait for the epoch."""
    one = terminal()
    one.write(story.started(), *story.steps(50), story(ValEpochEnded, loss=1.5, duration_s=2.0))
    assert "val_loss" not in one.screen.text
    screen = one.write(*story.steps(1))
    assert "• step 50  val_loss 1.5000  2.0 s" in screen.lines
    assert "val_loss" not in one.write(story(TrainEpochEnded, loss=2.0)).text.replace("val_loss 1.5000", "")


def test_a_stop_in_the_middle_of_an_epoch_still_shows_the_last_results(terminal: Any, story: Any) -> None:
    """Results that waited for their epoch's line are not lost with it."""
    screen = terminal().write(
        story.started(),
        *story.steps(50),
        story(ValEpochEnded, loss=1.5),
        story(CommandTaken, command="stop", command_id="1", reason="SIGINT"),
        story(RunEnded, status="stopped", reason="SIGINT"),
    )
    assert "• step 50  val_loss 1.5000" in screen.lines
    assert "· stopping at step 50: SIGINT" in screen.lines
    assert "! stopped at step 50 after 5.0 s: SIGINT" in screen.lines


def test_metrics_that_come_after_their_epoch_line_get_one_of_their_own(terminal: Any, story: Any) -> None:
    """A callback computes them behind the loop's back, and may be late."""
    one = terminal()
    one.write(story.started(), *story.steps(1), story(TrainEpochEnded, loss=2.0))
    story.stage = "val"
    screen = one.write(story(MetricsLogged, metrics={"f1": 0.75}, key="default"))
    assert "• epoch 1/3  f1 0.7500" in screen.lines


def test_testing_shows_its_own_row_and_line(terminal: Any, story: Any) -> None:
    """A test without training has neither epochs nor steps to show."""
    one, story.stage = terminal(), "test"
    one.write(story(TestEpochStarted, steps=4))
    assert list(one.write(story(TestStepEnded, step=2)).bars) == ["test"]
    logged = story(MetricsLogged, metrics={"accuracy": 0.9}, key="default")
    screen = one.write(logged, story(TestEpochEnded, loss=0.5, duration_s=3.0))
    assert "• test default  loss 0.5000  accuracy 0.9000  3.0 s" in screen.lines


@pytest.mark.parametrize("ledger_first", [True, False])
def test_the_end_takes_the_bars_away_and_says_where_the_time_went(
    terminal: Any, story: Any, ledger_first: bool
) -> None:
    """The ledger comes last, in whichever order the two events came."""
    one = terminal()
    one.write(story.started(), *story.steps(10))
    ledger = story(
        LedgerReported,
        scope="run",
        ledger=StallLedger(wall_s=10.0, compute_s=9.5, data_s=0.499, other_s=0.001, steps=10),
    )
    ended = story(RunEnded, status="finished")
    for event in (ledger, ended) if ledger_first else (ended, ledger):
        lines = one.write(event).lines
    assert lines[-3:] == [
        "✓ finished at step 10 after 1.0 s",
        "· loop time 10 s  compute 95.0 %  data 5.0 %",
        "",
    ]
    assert not any(line.startswith(("epoch", "step")) for line in lines)


def test_closing_without_an_end_leaves_the_last_state_above_the_cursor(terminal: Any, story: Any) -> None:
    """A console that was disabled leaves no bars below the next prompt; closing twice changes nothing."""
    one = terminal()
    one.write(story.started(), *story.steps(10))
    one.writer.close()
    one.writer.close()
    lines = one.screen.lines
    assert lines[-2].startswith("step")
    assert lines[-1] == ""
    assert one.screen.y == len(lines) - 1


@pytest.mark.parametrize("width", [1, 5, 12, 24, 40, 63, 64, 80, 140, 300])
@pytest.mark.parametrize("ascii_key", [True, False])
def test_no_row_reaches_the_last_column(terminal: Any, story: Any, width: int, ascii_key: bool) -> None:
    """A row that wraps would break the block's height; wide characters count twice."""
    one = terminal(width)
    key = "validation" if ascii_key else "検証データ"
    one.write(story.started(epochs=1_000, steps_per_epoch=1_000_000), *story.steps(10))
    screen = one.write(story(ValEpochStarted, key=key, steps=50_000), story(ValStepEnded, key=key, step=7))
    rows = screen.rows[screen.y :]
    assert all(len(row) <= max(1, width - 1) for row in rows)
    assert len(rows) == 4


def test_bars_stand_still_while_their_numbers_change(terminal: Any, story: Any) -> None:
    """A calm display: the same columns at step 1 and at step 99, at a loss of 12.3 and of 0.5."""
    one = terminal(100)
    early = one.write(story.started(), *story.steps(5, loss=12.345)).bars["step"]
    late = one.write(*story.steps(94, loss=0.5, step_s=0.001)).bars["step"]
    for part in ("━", "%", "loss"):
        assert early.index(part) == late.index(part)
    # The rate went from 10.0 to hundreds, the time left from seconds to milliseconds; neither has moved.
    assert early.index(" 10.0 steps/s") == re.search(r" [0-9.]+ steps/s", late).start()
    assert early.index("  9.5 s left") == re.search(r"  [0-9.]+ ms left", late).start()


def test_long_lines_break_between_words_and_are_indented(terminal: Any, story: Any) -> None:
    """In a narrow terminal a long error stays readable, a word without end included."""
    screen = terminal(40).write(
        story(ObserverFailed, observer="db", error=f"OSError: {'x' * 60} cannot be opened", during="open"),
        *story.steps(1),
    )
    error = screen.lines[: screen.y]
    assert error[0].startswith("✗ error: db failed in open, disabled:")
    assert all(line.startswith("  ") and len(line) < 40 for line in error[1:])
    assert "x" * 60 in "".join(line.strip() for line in error)


def test_a_terminal_of_two_lines_does_not_break(terminal: Any, story: Any) -> None:
    """Bars that are higher than the window could never be cleared."""
    for height in (1, 2, 3):
        one = terminal(80, height)
        one.write(story.started(), *story.steps(10))
        one.write(*story.steps(10))
        screen = one.write(*story.steps(10))
        assert len(screen.lines) - screen.y <= height
        assert screen.text.count("elapsed") <= 1


def test_what_others_print_between_two_frames_stays(terminal: Any, story: Any) -> None:
    """A print of the user's lands on the empty line above the bars and is not overwritten."""
    one = terminal()
    one.write(story.started(), *story.steps(10))
    one.file.write("hello from the user\n")
    screen = one.write(*story.steps(1))
    assert "hello from the user" in screen.lines
    assert screen.text.count("epoch") == 2  # the run's line and one bar: no ruins


def test_before_its_first_frame_it_erases_nothing(terminal: Any, story: Any) -> None:
    """The cursor may stand behind somebody else's unfinished line."""
    one = terminal()
    one.file.write("loading ... ")
    assert "loading ..." in one.write(story.started()).text


def test_a_second_console_on_the_same_terminal_prints_lines(terminal: Any, story: Any) -> None:
    """Two blocks of bars would erase each other; when the first is closed the terminal is free again."""
    file = io.StringIO()
    first = terminal(file=file)
    first.write(story.started(), *story.steps(10))
    second = terminal(file=file)
    second.write(story.started(), story(TrainEpochEnded, loss=2.0))
    screen = first.write(*story.steps(1))
    assert any("• demo  epoch 1/3  train_loss 2.0000" in line for line in screen.lines)
    assert screen.text.count("elapsed") == 1
    first.writer.close()
    assert "step" in terminal(file=file).write(*story.steps(1)).bars


def test_it_redraws_no_more_often_than_it_may(terminal: Any, story: Any) -> None:
    """Drawing takes the interpreter lock from the loop, so batches in between draw nothing."""
    one = terminal(refresh_per_s=1e-9)
    one.write(story.started(), *story.steps(1))
    drawn = one.output
    one.write(*story.steps(50))
    assert one.output == drawn
    # What is permanent does not wait, and brings the bars up to date with it.
    screen = one.write(*story.steps(1), story(ObserverDropped, observer="web", dropped=1))
    assert "1 event did not reach web" in screen.text
    assert "52/100" in screen.bars["step"]


def test_it_starts_no_thread(terminal: Any, story: Any) -> None:
    """A thread that draws by itself would steal the interpreter lock at moments of its own choosing."""
    before = threading.enumerate()
    terminal().write(story.started(), *story.steps(10))
    assert threading.enumerate() == before


def test_without_colour_signs_and_words_remain(terminal: Any, story: Any) -> None:
    """NO_COLOR keeps bold and dim, and no meaning is lost."""
    failed = story(ObserverFailed, observer="db", error="OSError: gone", during="open")
    one = terminal(no_color=True)
    screen = one.write(story.started(), failed, *story.steps(9))
    assert "✗ error: db failed in open, disabled: OSError: gone" in screen.text
    assert "\x1b[1m" in one.output
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", one.output)
    coloured = terminal()
    coloured.write(failed)
    assert "\x1b[1;31m" in coloured.output


def test_a_stream_that_cannot_encode_gets_ascii(terminal: Any, story: Any) -> None:
    """LANG=C must not end the console: other glyphs, and names in escapes."""
    raw = io.BytesIO()
    one = terminal(file=io.TextIOWrapper(raw, encoding="ascii"))
    one.writer.write([story.started(module="Nétz"), *story.steps(50), story(TrainEpochEnded, loss=1.0)])
    text = raw.getvalue().decode("ascii")
    assert "N\\xe9tz" in text
    assert "* " in text
    assert "####" in text
