"""The callback `Profiler`: its windows, its traces, and runs that end before them."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import Boom, Net, Outcome, failing, make_trainer, read_journal, train
from torch import nn

from events.messages import TraceSaved, TrainStepEnded
from sinks import Memory
from trainer import Checkpoints
from trainer.callbacks import Profiler, profiler, trace_summary
from trainer.errors import ArgumentsError

FILE = re.compile(r"traces/[^/.]+_\d+\.\d+\.pt\.trace\.json\.gz")  # the pattern of TensorBoard's plugin
WINDOW: dict[str, Any] = {"wait": 2, "warmup": 1, "active": 2}


def ranges(folder: Path, event: TraceSaved) -> Counter[str]:
    """Count the ranges and operators of a trace by name."""
    with gzip.open(folder / event.path) as file:
        return Counter(one["name"] for one in json.load(file)["traceEvents"] if one.get("ph") == "X")


def profiled(folder: Path, module: Net | None = None, own: Profiler | None = None, **options: Any) -> Outcome:
    options = {"run_dir": folder, "run_id": "r", "journal": True} | options
    return train(module or Net(rows=64), callbacks=[own or Profiler(**WINDOW)], **options)


def test_each_window_is_a_trace_with_its_steps_and_operators(tmp_path: Path) -> None:
    module = Net(rows=64)
    outcome = profiled(tmp_path, module, Profiler(**WINDOW, repeat=2), epochs=2)
    assert outcome.error is None
    traces = outcome.of(TraceSaved)
    assert [(one.first_step, one.last_step) for one in traces] == [(4, 5), (9, 10)]
    for one in traces:
        assert FILE.fullmatch(one.path)
        assert one.nbytes == (tmp_path / one.path).stat().st_size
        names = ranges(tmp_path, one)
        assert {name: names[name] for name in ("train_step", "Optimizer.step#SGD.step", "aten::addmm")} == {
            "train_step": 2,
            "Optimizer.step#SGD.step": 2,
            "aten::addmm": 2,
        }
        assert {f"ProfilerStep#{one.first_step - 1}", f"ProfilerStep#{one.last_step - 1}"} <= names.keys()
        assert len(one.operators) == 5
        assert sum(row.calls for row in one.operators if row.name == "aten::addmm") in (0, 2)
    assert [event for event in read_journal(tmp_path) if isinstance(event, TraceSaved)] == traces
    plain = train(Net(rows=64), epochs=2)
    assert [one.loss for one in outcome.of(TrainStepEnded)] == [one.loss for one in plain.of(TrainStepEnded)]
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    assert not torch.autograd._profiler_enabled()  # type: ignore[attr-defined]


def test_the_summary_agrees_with_torchs_own(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            model(torch.randn(4, 16)).sum().backward()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ours = {name: (calls, seconds) for name, calls, seconds, _ in trace_summary.summarise(events, 1000)}
    theirs = {one.key: one for one in profile.key_averages() if one.key.startswith("aten::")}
    assert {name for name in ours if name.startswith("aten::")} == theirs.keys()
    for name, one in theirs.items():
        assert ours[name] == (one.count, pytest.approx(one.self_cpu_time_total / 1e6, rel=0.01, abs=2e-6))


def test_kernels_are_apart_from_operators() -> None:
    rows: list[dict[str, Any]] = [
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 5, "dur": 30, "tid": 7},
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 40, "dur": 30, "tid": 7},
        {"ph": "X", "cat": "cpu_op", "name": "aten::linear", "ts": 0, "dur": 10, "tid": 1},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 2, "dur": 6, "tid": 1},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 10, "dur": 6, "tid": 1},
        {"ph": "M", "name": "process_name"},
    ]
    assert trace_summary.summarise(rows, 2) == [
        ("aten::mm", 2, 12e-6, False),
        ("aten::linear", 1, 4e-6, False),
        ("gemm", 2, 60e-6, True),
    ]


def test_a_validation_within_a_window_is_labelled(tmp_path: Path) -> None:
    outcome = profiled(tmp_path, Net(rows=32), Profiler(wait=2, warmup=1, active=3), epochs=2)
    (one,) = outcome.of(TraceSaved)
    names = ranges(tmp_path, one)
    assert (one.first_step, one.last_step) == (4, 6)
    assert (names["train_step"], names["val_step"]) == (3, 4)


def test_the_batches_of_validate_and_test_are_its_steps(tmp_path: Path) -> None:
    for task in ("validate", "test"):
        memory, module = Memory(), Net(rows=64, test_data=lambda net, size: net.batches(size))
        options: dict[str, Any] = {"run_dir": tmp_path / task, "run_id": "r", "sinks": [memory]}
        getattr(make_trainer(module, callbacks=[Profiler(**WINDOW)], **options), task)()
        (one,) = [event for event in memory.events if isinstance(event, TraceSaved)]
        names = ranges(tmp_path / task, one)
        assert (one.first_step, one.last_step) == (4, 5)
        assert names["val_step" if task == "validate" else "test_step"] == 2


class ByHand(Net):
    manual_optimization = True

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        loss, _ = self.forward_loss(batch)
        self.optimize(loss)
        return loss.detach()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ByHand, {}),
        (Net, {"gpu_batch_size_limit": 4}),
        (Net, {"compile": True, "compile_options": {"backend": "eager"}}),
    ],
    ids=["manual optimization", "micro-batches", "compile"],
)
def test_every_kind_of_step_is_counted_once(kind: type[Net], options: dict[str, Any], tmp_path: Path) -> None:
    outcome = profiled(tmp_path, kind(rows=64), epochs=1, **options)
    assert outcome.error is None
    (one,) = outcome.of(TraceSaved)
    assert (one.first_step, one.last_step) == (4, 5)
    assert ranges(tmp_path, one)["Optimizer.step#SGD.step"] == 2


def test_a_resumed_run_counts_its_own_steps(tmp_path: Path) -> None:
    often = Checkpoints(every_steps=1, every_minutes=None, keep_last=None, when_busy="wait", weights=False)
    train(Net(rows=64), epochs=1, max_steps=3, run_dir=tmp_path, run_id="r", checkpoints=often)
    outcome = profiled(tmp_path, epochs=2, resume=tmp_path / "checkpoints/step-2.a1")
    (one,) = outcome.of(TraceSaved)
    assert (one.first_step, one.last_step) == (6, 7)


# ------------------------------------------------------------------------------------------- runs that end early


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
def test_an_exception_in_a_step_leaves_the_trace_so_far(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outcome = profiled(tmp_path, failing(Boom("boom"), at=4), Profiler(wait=2, active=3, warmup=0), epochs=3)
    assert isinstance(outcome.error, Boom)
    (one,) = outcome.of(TraceSaved)
    assert (one.first_step, one.last_step) == (3, 4)
    names = ranges(tmp_path, one)
    assert (names["train_step"], names["Optimizer.step#SGD.step"]) == (2, 1)
    assert "the run ended within a window of Profiler: its trace has 2 of 3 steps" in caplog.messages
    assert not torch.autograd._profiler_enabled()  # type: ignore[attr-defined]


@pytest.mark.parametrize("wait", [1, 50])
def test_a_run_that_ends_before_the_window_is_a_warning(
    wait: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = profiled(tmp_path, Net(rows=24), Profiler(wait=wait, warmup=2, active=2), epochs=1)
    assert outcome.error is None
    assert not outcome.of(TraceSaved)
    (text,) = [text for text in caplog.messages if "Profiler recorded nothing" in text]
    assert f"it records from step {wait + 3} of an attempt, and this one had 3; set wait or warmup lower" in text


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
def test_a_run_without_a_step_has_no_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def no_data(net: Any, size: int) -> Any:
        raise Boom("no data")

    outcome = profiled(tmp_path, Net(train_data=no_data), Profiler(wait=0, warmup=0))
    assert isinstance(outcome.error, Boom)
    assert not (tmp_path / "traces").exists()
    assert any("it records from step 1 of an attempt, and this one had 0" in text for text in caplog.messages)


def test_a_window_that_ends_with_the_run_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outcome = profiled(tmp_path, Net(rows=40), epochs=1)
    (one,) = outcome.of(TraceSaved)
    assert (one.first_step, one.last_step) == (4, 5)
    assert not [text for text in caplog.messages if "Profiler" in text]


# -------------------------------------------------------------------------------------------------- the files


def test_traces_go_to_a_folder_of_ones_own(tmp_path: Path) -> None:
    outcome = train(Net(rows=64), callbacks=[Profiler(**WINDOW, dir=tmp_path / "mine" / "here")], epochs=1)
    (one,) = outcome.of(TraceSaved)
    assert Path(one.path).parent == tmp_path / "mine" / "here"
    assert ranges(tmp_path, one)["train_step"] == 2


@pytest.mark.parametrize("cause", ["disk", "process", "busy"])
def test_a_trace_that_is_not_written_is_a_warning(
    cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    says = "Profiler could not write the trace of steps 4 to 5: "
    if cause == "disk":
        (tmp_path / "traces").write_text("a file")
    elif cause == "process":
        broken = tmp_path / "broken.py"
        broken.write_text("raise MemoryError('too large')")
        monkeypatch.setattr(trace_summary, "__file__", str(broken))
        says += "MemoryError: too large"
    else:
        monkeypatch.setattr(profiler, "_MOST_WRITING", 0)
        says = "Profiler drops the trace of steps 4 to 5: 0 others are being written; set wait higher, or active lower"
    outcome = profiled(tmp_path, epochs=1)
    assert outcome.error is None
    assert not outcome.of(TraceSaved)
    assert [text for text in caplog.messages if says in text]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"wait": -1}, "wait must be an integer >= 0, not -1"),
        ({"active": 0}, "active must be an integer >= 1, not 0"),
        ({"schedule": None}, "torch.profiler.profile has no 'schedule' to set here; it has acc_events, activities"),
        ({"with_stacks": True}, "torch.profiler.profile has no 'with_stacks' to set here"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentsError, match="Profiler: ") as raised:
        Profiler(**arguments)
    assert says in str(raised.value)


def test_a_run_without_a_folder_needs_one() -> None:
    error = train(Net(), callbacks=[Profiler()]).error
    assert isinstance(error, ArgumentsError)
    assert str(error) == "Profiler has no folder for its traces; set run_dir of the Trainer, or dir"
