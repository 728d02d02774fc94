"""When checkpoints are taken, what they hold, and which events report them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_file
from support.run_folder import RunFolder, saved
from support.threads import WAIT_S
from support.training import Diary, Net, Scored, make_trainer, read_journal, train

from events.checkpoint.manifest import CheckpointName, Manifest
from events.checkpoint.store import CheckpointStore
from events.errors import CheckpointError, CheckpointMismatch, CheckpointNotFound, CheckpointsFailing, UnstorableState
from events.journal.writer import JournalWriter
from events.messages import (
    CheckpointDeleted,
    CheckpointFailed,
    CheckpointSaved,
    CheckpointSkipped,
    CheckpointStaged,
    CommandTaken,
    Event,
    ObserverFailed,
    RunResumed,
    WeightsSaved,
)
from events.sink import CALLBACK_DELIVERY
from trainer import CallbackInterface, inline
from trainer.checkpoint.loaded import Loaded
from trainer.checkpoint.slab import Slab, SlabPool
from trainer.errors import ArgumentsError

FOREVER = 100_000  # epochs, until the test stops the run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def fail(*_: object) -> Any:
    raise ValueError("boom")


def adam(net: Net) -> Any:
    return [torch.optim.Adam(net.parameters(), lr=net.lr)], []


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The steps whose checkpoints find no room."""
    begin, steps = CheckpointStore.begin, set[int]()

    def failing(store: CheckpointStore, name: CheckpointName) -> Any:
        if name.step in steps or -1 in steps:
            raise OSError(28, "No space left on device")
        return begin(store, name)

    monkeypatch.setattr(CheckpointStore, "begin", failing)
    return steps


# ---------------------------------------------------------------------------------------------------------- when


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"every_steps": 3}, [("step-3.a1", ["steps"])]),
        ({"every_epochs": 1}, [("step-2.a1", ["epochs"]), ("step-4.a1", ["epochs"])]),
        ({"every_epochs": 2}, [("step-4.a1", ["epochs"])]),
        ({"every_steps": 2, "every_epochs": 2}, [("step-2.a1", ["steps"]), ("step-4.a1", ["steps", "epochs"])]),
        ({"at_end": True}, [("step-4.a1", ["end"])]),
        ({"every_epochs": 1, "at_end": True}, [("step-2.a1", ["epochs"]), ("step-4.a1", ["epochs"])]),
        ({"every_minutes": 1e-9}, [(f"step-{step}.a1", ["minutes"]) for step in (1, 2, 3, 4)]),
        ({}, []),
    ],
    ids=str,
)
def test_a_due_checkpoint_is_taken_once_per_place(run: RunFolder, settings: Any, expected: Any) -> None:
    outcome = run.train(epochs=2, **settings)
    assert [(event.checkpoint, event.reasons) for event in outcome.of(CheckpointSaved)] == expected
    assert run.names == [name for name, _ in expected][-2:]
    assert outcome.result.checkpoint == (str(run.folder(run.names[-1])) if expected else None)


@pytest.mark.parametrize(
    ("mode", "keep_best", "interval", "expected"),
    [("min", 1, None, [1, 3]), ("max", 2, 1, [1, 2]), ("max", 3, None, [1, 2, 3, 4]), ("min", 0, None, [])],
)
def test_a_checkpoint_is_taken_after_a_validation_that_is_among_the_best(
    run: RunFolder, mode: str, keep_best: int, interval: int | None, expected: list[int]
) -> None:
    values = {1: 0.5, 2: 0.7, 3: 0.3, 4: 0.4}
    net = Scored(*values.values())
    options = {"best": "score", "best_mode": mode, "keep_best": keep_best, "keep_last": None}
    outcome = run.train(net, epochs=4, val_interval_steps=interval, **options)
    assert [(event.global_step, event.reasons) for event in outcome.of(CheckpointSaved)] == [
        (step, ["best"]) for step in expected
    ]
    metrics = {name.step: run.store.manifest(name).metric for name in run.store.names()}
    assert {step: (metric.name, metric.value) for step, metric in metrics.items() if metric} == {
        step: ("score", values[step]) for step in expected
    }
    best = {"min": 3, "max": 2}[mode] if expected else None
    folder = best and str(run.folder(f"step-{best}.a1"))
    assert (outcome.result.best_checkpoint, outcome.result.best_metric) == (folder, best and values[best])


def test_a_metric_that_is_never_logged_is_one_warning_with_the_logged_ones(run: RunFolder, caplog: Any) -> None:
    outcome = run.train(epochs=2, best="acuracy")
    assert saved(outcome) == []
    assert all("val_loss" in text for text in caplog.messages if "acuracy" in text)
    assert len([text for text in caplog.messages if "follows 'acuracy'" in text]) == 1
    assert outcome.result.problems == [
        "Checkpoints(best=) did not find the metric 'acuracy' 2 times, first at step 2 (there: val_loss)"
    ]


@pytest.mark.anyio
async def test_a_request_returns_the_path_of_a_durable_checkpoint_also_while_paused(run: RunFolder) -> None:
    gate = threading.Event()
    net = Net(act=lambda step: gate.wait(WAIT_S) if step == 2 else None)
    async with run.trainer(net, epochs=FOREVER, keep_last=9, journal=True).run() as handle:
        paths: list[str] = []
        async with anyio.create_task_group() as tasks:

            async def ask() -> None:
                paths.append(await handle.checkpoint("before the holidays"))

            tasks.start_soon(ask)
            gate.set()
        handle.pause()
        paths += [await handle.checkpoint(), await handle.checkpoint()]
        handle.resume()
        handle.stop(checkpoint=False)
    manifests = [Loaded(Path(path)).manifest for path in paths]
    assert str(manifests[2].name) == f"{manifests[1].name}.2"
    assert {tuple(one.reasons) for one in manifests} == {("command",)}
    taken = next(event for event in read_journal(run.path) if type(event) is CommandTaken)
    assert (taken.command, taken.reason) == ("checkpoint", "before the holidays")


@pytest.mark.anyio
@pytest.mark.parametrize("options", [{"checkpoints": False}, {"checkpoints": True, "journal": False}], ids=str)
async def test_a_request_to_a_run_without_checkpoints_is_an_error_and_the_run_continues(options: Any) -> None:
    trainer = make_trainer(Net(), epochs=FOREVER, **options)
    async with trainer.run() as handle:
        with pytest.raises(CheckpointError, match="takes no checkpoints"):
            await handle.checkpoint()
        handle.stop()
    assert (await handle.result()).status == "stopped"


@pytest.mark.anyio
async def test_a_request_after_the_end_is_an_error(run: RunFolder) -> None:
    async with run.trainer().run() as handle:
        await handle.result()
        with pytest.raises(CheckpointError, match="the run ended before"):
            await handle.checkpoint()


@pytest.mark.anyio
@pytest.mark.parametrize(("checkpoint", "expected"), [(True, [("step-3.a1", ["stop"])]), (False, [])])
async def test_a_stop_takes_a_durable_checkpoint_unless_asked_not_to(
    run: RunFolder, checkpoint: bool, expected: Any
) -> None:
    started, handles = threading.Event(), []

    def act(step: int) -> None:
        if step == 3:
            assert started.wait(WAIT_S)
            handles[0].stop(checkpoint=checkpoint)

    async with run.trainer(Net(act=act), epochs=9, journal=True).run() as handle:
        handles.append(handle)
        started.set()
    result = await handle.result()
    assert (result.status, result.global_step) == ("stopped", 3)
    events = [event for event in read_journal(run.path) if isinstance(event, CheckpointSaved)]
    assert [(event.checkpoint, event.reasons) for event in events] == expected
    assert run.names == [name for name, _ in expected]


# -------------------------------------------------------------------------------------------------------- content


def test_any_reader_of_safetensors_finds_tensors_by_their_names(run: RunFolder) -> None:
    net = Net(optimizers=adam)
    folder = Path(run.train(net, at_end=True).result.checkpoint or "")
    assert sorted(os.listdir(folder)) == ["manifest.json", "readings.msgpack", "state.msgpack", "tensors.safetensors"]
    with safe_open(folder / "tensors.safetensors", "pt") as file:
        names = set(file.keys())
        assert torch.equal(file.get_tensor("module.linear.weight"), net.linear.weight)
    assert {"module.linear.bias", "optimizers.0.state.0.exp_avg", "optimizers.0.state.1.step"} <= names
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"]
    assert set(manifest["files"]) == set(os.listdir(folder)) - {"manifest.json"}
    assert (manifest["global_step"], manifest["epoch"], manifest["reasons"]) == (2, 1, ["end"])


class Many(Net):
    """Has tensors of all kinds, and state that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = torch.nn.Linear(4, 1, bias=False)
        self.tied.weight = self.linear.weight
        self.history = torch.zeros(0)
        base = torch.arange(24.0).reshape(4, 6)
        self.others: dict[Any, Any] = {
            "view": base[:, ::2],
            "overlapping": (base[:3], base[1:]),
            "transposed": base.t(),
            "empty": torch.zeros(0, 5),
            "scalar": torch.tensor(2.5),
            "bfloat16": torch.randn(3).bfloat16(),
            "float16": torch.randn(3).half(),
            "float8": torch.randn(4).to(torch.float8_e4m3fn),
            "float8_e8": torch.rand(4).to(torch.float8_e8m0fnu),
            "double": torch.randn(3, dtype=torch.float64),
            "complex64": torch.randn(2, dtype=torch.complex64).conj(),
            "complex128": torch.randn(2, 2, dtype=torch.complex128),
            "bool": torch.tensor([True, False]),
            "ints": [torch.tensor([1, -1], dtype=d) for d in (torch.int8, torch.int16, torch.int32, torch.int64)],
            "unsigned": [torch.tensor([200], dtype=d) for d in (torch.uint8, torch.uint16, torch.uint32)],
            3: (torch.ones(1), {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}}, None),
        }

    def get_state(self) -> dict[str, Any]:
        return {"weights": self.state_dict(), "history": self.history, "others": self.others}

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        self.history = torch.cat([self.history, torch.tensor([float(global_step)])])
        return super().train_step(global_step, batch, device)


def test_tensors_of_all_kinds_return(run: RunFolder) -> None:
    net = Many()
    run.train(net, epochs=2, every_steps=1, keep_last=9)
    for name in run.store.names():
        state = Loaded(run.store.path(name)).state["module"]
        assert state["history"].tolist() == [float(step) for step in range(1, name.step + 1)]
        assert state["weights"]["tied.weight"].data_ptr() == state["weights"]["linear.weight"].data_ptr()
        assert_same(state["others"], net.others)


def assert_same(left: Any, right: Any) -> None:
    """Compare type, shape, dtype and every bit; containers too."""
    assert type(left) is type(right)
    if isinstance(right, torch.Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert left.resolve_conj().contiguous().view(-1).tolist() == right.resolve_conj().contiguous().view(-1).tolist()
    elif isinstance(right, dict):
        assert_same([*left.items()], [*right.items()])
    elif isinstance(right, (list, tuple)):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def test_state_that_cannot_be_stored_is_named_by_its_path_before_the_first_step(run: RunFolder) -> None:
    net = Net()
    net.get_state = lambda: {"vocabulary": [{"index": object()}]}  # type: ignore[method-assign,assignment]
    outcome = run.train(net)
    assert isinstance(outcome.error, UnstorableState)
    assert "module.vocabulary.0.index" in str(outcome.error)
    assert "TrainStepEnded" not in outcome.names()


def test_the_weights_of_the_newest_attempt_are_written_at_the_end(run: RunFolder) -> None:
    """As a file that safetensors' own reader of tied weights loads, with their origin; the result has its path."""

    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = torch.nn.Linear(4, 1)
            self.again.weight = self.linear.weight

    run.train(Tied())
    net, fresh = Tied(), Tied()
    outcome = run.train(net, epochs=2, best="val_loss")
    (event,) = outcome.of(WeightsSaved)
    assert event.path == outcome.result.weights == str(run.path / "weights.safetensors")
    assert event.checkpoint is None
    assert load_model(fresh, event.path) == (set(), [])
    assert all(map(torch.equal, fresh.state_dict().values(), net.state_dict().values()))
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".")] == []
    with safe_open(event.path, "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("metric") == f"val_loss={outcome.result.metrics['val_loss']!r}"
    assert metadata == {
        "format": "pt",
        "global_step": str(outcome.result.global_step),
        "again.weight": "linear.weight",
    }


@pytest.mark.parametrize(("net", "options"), [(Net(), {"weights": False}), (Net(act=fail), {})], ids=["off", "failed"])
def test_no_weights_are_written_on_request_or_after_a_failure(run: RunFolder, net: Net, options: Any) -> None:
    run.train(net, **options)
    assert not list(run.path.glob("weights*"))


# ------------------------------------------------------------------------------------------------- the policies


class Gate:
    """Holds the writer at its first write until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        begin = CheckpointStore.begin

        def held(store: CheckpointStore, name: CheckpointName) -> Any:
            self.reached.set()
            assert self.open.wait(WAIT_S)
            return begin(store, name)

        monkeypatch.setattr(CheckpointStore, "begin", held)


def test_a_due_checkpoint_is_skipped_while_both_copies_are_written(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    net = Net(act=lambda step: gate.open.set() if step == 6 else None)
    outcome = run.train(net, epochs=3, every_steps=1, keep_last=9, when_busy="skip")
    skipped = outcome.of(CheckpointSkipped)
    assert [(e.global_step, e.reasons, e.writing) for e in skipped][:1] == [(3, ["steps"], ["step-1.a1", "step-2.a1"])]
    assert saved(outcome)[:2] == ["step-1.a1", "step-2.a1"]
    assert len(skipped) + len(outcome.of(CheckpointStaged)) == 6


def test_the_loop_waits_for_memory_and_charges_the_ledger_where_that_is_the_policy(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, take, waited = Gate(monkeypatch), SlabPool.take, threading.Event()

    def noticing(pool: SlabPool, timeout_s: float) -> Slab | None:
        slab = take(pool, timeout_s)
        if slab is None and timeout_s:
            waited.set()
            gate.open.set()
        return slab

    monkeypatch.setattr(SlabPool, "take", noticing)
    outcome = run.train(epochs=3, every_steps=1, keep_last=9)
    assert waited.is_set()
    assert saved(outcome) == [f"step-{step}.a1" for step in range(1, 7)]
    assert outcome.result.ledger.checkpoint_s > 0.05


def test_a_checkpoint_is_deleted_once_a_newer_one_is_durable(run: RunFolder) -> None:
    net = Scored(3.0, 1.0, 2.0, 4.0, 5.0)
    outcome = run.train(net, epochs=5, every_epochs=1, best="score", keep_last=1, keep_best=1)
    assert run.names == ["step-2.a1", "step-5.a1"]
    assert [event.checkpoint for event in outcome.of(CheckpointDeleted)] == ["step-1.a1", "step-3.a1", "step-4.a1"]
    order = [event.checkpoint for event in outcome.events if isinstance(event, CheckpointSaved | CheckpointDeleted)]
    assert order.index("step-2.a1") < order.index("step-1.a1", 1)


def test_resume_best_takes_the_next_best_of_the_runs_own_metric_where_the_best_is_damaged(run: RunFolder) -> None:
    """Also in `Trainer.test`, whose settings name no metric."""
    options: dict[str, Any] = {"best": "score", "best_mode": "max", "keep_best": 9, "keep_last": 9}
    run.train(Scored(1.0, 3.0, 2.0), epochs=3, **options)
    (run.folder("step-2.a1") / "state.msgpack").write_bytes(b"")
    net = Net(test_data=lambda net, batch_size: net.batches(batch_size))
    run.trainer(net, resume="best").test()
    third = Loaded(run.folder("step-3.a1")).state["module"]
    assert all(torch.equal(third[name], tensor) for name, tensor in net.state_dict().items())


def test_a_job_that_names_only_its_folder_resumes_its_run(run: RunFolder) -> None:
    """The journal or the checkpoints give the name; a new folder does not know the address of its uploads."""
    options: dict[str, Any] = {"run_id": None, "resume": "auto", "every_epochs": 1, "journal": True}
    first, second = (run.train(epochs=epochs, **options).result for epochs in (1, 2))
    shutil.rmtree(run.path / "journal")
    last = run.train(epochs=3, **options).result
    assert (second.run_id, last.run_id, last.global_step) == (first.run_id, first.run_id, 6)
    error = RunFolder(run.path / "new").train(run_id=None, resume="auto", upload=run.path.as_uri()).error
    assert isinstance(error, ArgumentsError)
    assert "give run_id" in str(error)


def test_weights_of_another_model_are_refused_by_keys_and_shapes_and_a_wrong_path_before_the_start(
    tmp_path: Path,
) -> None:
    save_file({"linear.weight": torch.ones(2, 9), "other": torch.ones(1)}, tmp_path / "foreign.safetensors")
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    error = train(net, init_from=tmp_path / "foreign.safetensors").error
    assert isinstance(error, CheckpointMismatch)
    assert all(text in str(error) for text in ("linear.weight", "other", "linear.bias"))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    outcome = train(net, init_from=tmp_path / "nothing", run_dir=tmp_path / "run", checkpoints=True)
    assert isinstance(outcome.error, CheckpointNotFound)
    assert "init_from=" in str(outcome.error)
    assert outcome.events == []  # no attempt starts, which would end a finished run as failed


def test_three_consecutive_failures_end_the_run_and_a_success_resets_the_count(
    run: RunFolder, full_disk: set[int]
) -> None:
    full_disk |= {2, 3, 5, 6, 7}
    outcome = run.train(epochs=50, every_steps=1, keep_last=9)
    assert isinstance(outcome.error, CheckpointsFailing)
    assert "No space left" in str(outcome.error)
    failed = [(event.checkpoint, event.consecutive) for event in outcome.of(CheckpointFailed)]
    assert failed == [(f"step-{s}.a1", n) for s, n in ((2, 1), (3, 2), (5, 1), (6, 2), (7, 3))]
    assert saved(outcome)[:2] == ["step-1.a1", "step-4.a1"]


@pytest.mark.anyio
async def test_a_request_whose_write_fails_raises_the_reason(run: RunFolder, full_disk: set[int]) -> None:
    full_disk.add(-1)
    async with run.trainer(epochs=FOREVER).run() as handle:
        with pytest.raises(CheckpointError, match="No space left"):
            await handle.checkpoint()
        handle.stop(checkpoint=False)
    assert (await handle.result()).status == "stopped"


def test_the_journal_holds_all_events_before_a_checkpoint_when_it_is_committed(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run does not repeat these steps. Here the journal writes them only when it is waited for."""
    commit, wait_for, write, seen = CheckpointStore.commit, JournalWriter.wait_for, JournalWriter.write, []
    wanted = threading.Event()

    def waiting(writer: JournalWriter, seq: int, timeout_s: float) -> bool:
        wanted.set()
        return wait_for(writer, seq, timeout_s)

    def writing(writer: JournalWriter, events: Sequence[Event]) -> None:
        if any(type(event) is CheckpointStaged for event in events):
            assert wanted.wait(WAIT_S)
        write(writer, events)

    def committing(store: CheckpointStore, manifest: Manifest) -> Path:
        seen.append(any(type(e) is CheckpointStaged and e.seq == manifest.seq for e in read_journal(run.path)))
        wanted.set()
        return commit(store, manifest)

    monkeypatch.setattr(JournalWriter, "wait_for", waiting)
    monkeypatch.setattr(JournalWriter, "write", writing)
    monkeypatch.setattr(CheckpointStore, "commit", committing)
    assert run.train(at_end=True, journal=True).error is None
    assert seen == [True]


# ----------------------------------------------------------------------------------------- attempts and their line


def test_an_attempt_without_resume_supersedes_all_checkpoints(run: RunFolder) -> None:
    run.train(epochs=3, at_end=True)
    (resumed,) = run.train(at_end=True).of(RunResumed)
    assert (resumed.global_step, resumed.checkpoint, resumed.after_seq) == (0, None, 0)
    assert run.line == ["step-2.a2"]
    outcome = run.train(epochs=2, resume="auto", at_end=True)
    (resumed,) = outcome.of(RunResumed)
    assert (resumed.global_step, resumed.checkpoint) == (2, "step-2.a2")
    assert outcome.result.global_step == 4


def test_a_test_of_a_trained_run_takes_its_state_and_supersedes_nothing(run: RunFolder) -> None:
    trained, fresh = Net(), Net(test_data=lambda net, batch_size: net.batches(batch_size))
    run.train(trained, at_end=True, journal=True)
    with torch.no_grad():
        fresh.linear.weight.zero_()
    outputs = run.trainer(fresh, resume="auto", journal=True).test()
    assert torch.equal(fresh.linear.weight, trained.linear.weight)
    assert outputs["default"][1].abs().sum() > 0
    assert run.steps == [(1, 1), (2, 1)]


def test_an_attempt_that_fails_before_it_trains_changes_neither_line_nor_history(run: RunFolder) -> None:
    options: dict[str, Any] = {"every_epochs": 1, "keep_last": 9, "journal": True}
    run.train(epochs=3, **options)
    for resume in (None, run.folder("step-2.a1")):
        assert isinstance(run.train(Net(train_data=fail), epochs=3, resume=resume, **options).error, ValueError)
    assert run.line == ["step-6.a1", "step-4.a1", "step-2.a1"]
    assert run.steps == [(step, 1) for step in range(1, 7)]
    assert run.train(epochs=4, resume="auto", **options).of(RunResumed)[0].checkpoint == "step-6.a1"


def test_the_history_follows_the_line_through_superseded_attempts(run: RunFolder) -> None:
    options: dict[str, Any] = {"epochs": 4, "every_steps": 1, "keep_last": 99, "journal": True}
    run.train(**options)
    for step in (2, 6):
        run.train(resume=run.folder(f"step-{step}.a1"), **options)
    assert run.steps == [(step, 1) for step in range(1, 7)] + [(7, 3), (8, 3)]


def test_a_finished_run_that_is_started_again_warns_and_names_its_checkpoint(run: RunFolder, caplog: Any) -> None:
    first = run.train(at_end=True).result
    again = run.train(resume="auto", at_end=True).result
    assert (again.status, again.global_step, again.checkpoint) == ("finished", 2, first.checkpoint)
    assert "nothing is left to train" in caplog.text


# ---------------------------------------------------------------------------------------- callbacks with a state


class Stateful(CallbackInterface):
    """Counts steps on its own thread; its methods of state may be replaced."""

    def __init__(self, get: Callable[..., Any] | None = None, load: Callable[..., Any] | None = None) -> None:
        self.count, self.get, self.load = 0, get, load

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return self.get() if self.get is not None else {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.load is not None:
            self.load()
        self.count = state["count"]


class InlineStateful(Stateful):
    """Counts on the loop's thread."""

    on_end_train_step = inline(lambda self, global_step, *outputs: setattr(self, "count", self.count + 1))


@pytest.mark.parametrize("during", ["state_dict", "load_state_dict"])
@pytest.mark.parametrize("kind", [Stateful, InlineStateful])
@pytest.mark.parametrize("on_error", ["fatal", "disable"])
def test_an_error_of_a_callbacks_state_has_the_effect_of_its_policy(
    run: RunFolder, kind: type[Stateful], on_error: Any, during: str
) -> None:
    """The exception ends the run, or the run continues without the callback and with complete checkpoints."""
    options: dict[str, Any] = {"every_epochs": 1, "keep_last": 9}
    if during == "load_state_dict":
        run.train(callbacks=[kind()], **options)
    callback = kind(get=fail) if during == "state_dict" else kind(load=fail)
    delivery = msgspec.structs.replace(CALLBACK_DELIVERY, on_error=on_error)
    outcome = run.train(callbacks=[(callback, delivery)], epochs=4, resume="auto", **options)
    if on_error == "fatal":
        assert isinstance(outcome.error, ValueError)
    else:
        assert [event.during for event in outcome.of(ObserverFailed)] == [during]
        assert run.names == [f"step-{step}.a{2 if outcome.of(RunResumed) and step > 2 else 1}" for step in (2, 4, 6, 8)]


def test_a_callback_that_may_be_disabled_is_missing_where_it_is_too_slow(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinks.checkpoints.writer._PART_TIMEOUT_S", 0.1)
    over = threading.Event()

    class Slow(Stateful):
        def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
            over.wait(WAIT_S)

    delivery = msgspec.structs.replace(CALLBACK_DELIVERY, on_error="disable")
    net = Net(act=lambda step: over.set() if step == 12 else None)
    outcome = run.train(net, callbacks=[(Slow(), delivery)], epochs=6, every_epochs=1, keep_last=9)
    assert outcome.of(CheckpointFailed) == []
    assert outcome.of(CheckpointSaved)[0].missing == ["Slow"]
    assert run.store.manifest(run.store.names()[0]).missing == ["Slow"]


# ------------------------------------------------------------------------------------------------- other failures


def test_weights_that_cannot_be_stored_are_reported_and_the_run_ends_as_usual(run: RunFolder) -> None:
    class Sparse(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("graph", torch.eye(3).to_sparse())

        def get_state(self) -> dict[str, Any]:
            return {name: value for name, value in self.state_dict().items() if name != "graph"}

    diary = Diary()
    outcome = run.train(Sparse(), callbacks=[diary])
    assert outcome.result.status == "finished"
    assert diary.names[-1] == "on_end_train"
    (failed,) = outcome.of(CheckpointFailed)
    assert "graph" in failed.error


@pytest.mark.anyio
@pytest.mark.parametrize("policy", ["wait", "skip"])
async def test_a_stop_without_a_checkpoint_does_not_wait_for_a_stuck_disk(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, policy: Any
) -> None:
    gate = Gate(monkeypatch)
    async with run.trainer(epochs=FOREVER, every_steps=1, when_busy=policy).run() as handle:
        await anyio.to_thread.run_sync(gate.reached.wait)
        async with anyio.create_task_group() as tasks:

            async def ask() -> None:
                with contextlib.suppress(CheckpointError):  # the stop may end it
                    await handle.checkpoint()

            if policy == "skip":
                tasks.start_soon(ask)
            stream = handle.events(types=[CommandTaken])
            handle.stop(checkpoint=False)
            with anyio.fail_after(WAIT_S):
                async for event in stream:
                    if event.command == "stop":
                        break
            gate.open.set()


def test_the_metric_of_a_checkpoint_is_that_of_its_own_validation(run: RunFolder) -> None:
    net = Scored(9.0, None, None, None)
    run.train(net, epochs=4, every_epochs=1, best="score", best_mode="max", keep_last=1)
    metrics = {str(name): run.store.manifest(name).metric is not None for name in run.store.names()}
    assert metrics == {"step-1.a1": True, "step-4.a1": False}


def test_other_optimizers_are_refused_unless_they_are_reset(run: RunFolder) -> None:
    run.train(every_epochs=1)
    options: dict[str, Any] = {"epochs": 2, "resume": "auto", "every_epochs": 1}
    error = run.train(Net(optimizers=adam), **options).error
    assert isinstance(error, CheckpointMismatch)
    assert all(text in str(error) for text in ("SGD", "Adam", "reset_optimizers_schedulers"))
    again = run.train(Net(optimizers=adam), reset_optimizers_schedulers=True, **options)
    assert again.result.global_step == 4


def test_another_batch_size_is_refused_within_an_epoch_and_accepted_between_two(run: RunFolder) -> None:
    options: dict[str, Any] = {"every_steps": 1, "keep_last": 9}
    run.train(**options)
    options |= {"epochs": 2, "train_batch_size": 4}
    error = run.train(resume=run.folder("step-1.a1"), **options).error
    assert isinstance(error, CheckpointMismatch)
    assert "1 micro-batches of 8 rows" in str(error)
    assert run.train(resume=run.folder("step-2.a1"), **options).result.global_step == 6
