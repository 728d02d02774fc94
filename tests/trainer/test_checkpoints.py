"""When checkpoints are taken, what they hold, and what is told of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from events.checkpoint.manifest import CheckpointName
from events.checkpoint.store import CheckpointStore
from events.errors import (
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
    CheckpointsFailing,
    UnstorableState,
)
from events.journal.history import read_history
from events.messages import (
    CheckpointDeleted,
    CheckpointFailed,
    CheckpointSaved,
    CheckpointSkipped,
    CheckpointStaged,
    CommandTaken,
    ObserverFailed,
    RunResumed,
    RunStarted,
    TrainStepEnded,
    WeightsSaved,
)
from events.protocol import Stop
from events.sink import CALLBACK_DELIVERY
from trainer import CallbackInterface, Checkpoints, inline
from trainer.checkpoint.loaded import Loaded
from trainer.errors import ArgumentsError

OFF = {"every_minutes": None, "at_end": False}
"""Nothing but what a test asks for."""


def store_of(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints")


def saved(outcome: Any) -> list[tuple[str, list[str]]]:
    return [(event.checkpoint, event.reasons) for event in outcome.of(CheckpointSaved)]


def net_that(kit: Any, act: Callable[[int], None]) -> Any:
    """A module that acts at the beginning of each training step, on the loop's thread."""

    class Acting(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            act(global_step)
            return super().train_step(global_step, batch, device)

    return Acting()


class At(CallbackInterface):
    """Does something right after a step, on the loop's thread."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    @inline
    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        if global_step == self.step:
            self.act()


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
        ({}, []),
    ],
    ids=str,
)
def test_a_checkpoint_is_taken_when_one_is_due(kit: Any, tmp_path: Path, settings: Any, expected: Any) -> None:
    """Once at a place, whatever is due there: at an epoch's end all that its last step would have had."""
    checkpoints = Checkpoints(**OFF | settings)
    outcome = kit.train(kit.Net(), epochs=2, checkpoints=checkpoints, run_dir=tmp_path / "run")
    assert saved(outcome) == expected
    names = [str(name) for name in store_of(tmp_path / "run").names()]
    assert names == [name for name, _ in expected][-2:]
    assert outcome.result.checkpoint == (str(tmp_path / "run/checkpoints" / names[-1]) if names else None)


def test_minutes_are_looked_at_after_each_step(kit: Any, tmp_path: Path) -> None:
    """With less than the time of a step, each has one; the next period begins with each."""
    checkpoints = Checkpoints(every_minutes=1e-9, at_end=False, when_busy="wait")
    outcome = kit.train(kit.Net(), epochs=2, checkpoints=checkpoints, run_dir=tmp_path / "run")
    assert [name for name, _ in saved(outcome)] == ["step-1.a1", "step-2.a1", "step-3.a1", "step-4.a1"]
    assert {tuple(reasons) for _, reasons in saved(outcome)} == {("minutes",)}


@pytest.mark.parametrize(
    ("mode", "keep_best", "expected"),
    [
        ("min", 1, [2, 6]),
        ("max", 1, [2, 4]),
        ("min", 2, [2, 4, 6, 8]),
        ("max", 2, [2, 4]),
        ("max", 3, [2, 4, 6, 8]),
        ("min", 0, []),
    ],
)
@pytest.mark.parametrize("interval", [None, 2], ids=["by epochs", "by steps"])
def test_one_is_taken_after_a_validation_that_is_among_the_best(
    kit: Any, tmp_path: Path, mode: Any, keep_best: int, expected: list[int], interval: int | None
) -> None:
    """By the metric that was asked for; its value is in the manifest, and the best one in the result."""
    scores = iter([0.5, 0.7, 0.3, 0.4])

    class Scored(kit.Net):
        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
            self.log("score", next(scores))

    checkpoints = Checkpoints(
        **OFF, best="score", best_mode=mode, keep_best=keep_best, keep_last=None, when_busy="wait"
    )
    outcome = kit.train(
        Scored(), epochs=4, checkpoints=checkpoints, run_dir=tmp_path / "run", val_interval_steps=interval
    )
    assert saved(outcome) == [(f"step-{step}.a1", ["best"]) for step in expected]
    metrics = {
        name.step: store_of(tmp_path / "run").manifest(name).metric for name in store_of(tmp_path / "run").names()
    }
    values = {2: 0.5, 4: 0.7, 6: 0.3, 8: 0.4}
    best = {"min": 6, "max": 4}[mode] if expected else None
    folder = best and str(tmp_path / f"run/checkpoints/step-{best}.a1")
    assert (outcome.result.best_checkpoint, outcome.result.best_metric) == (folder, best and values[best])
    assert {step: (metric.name, metric.value) for step, metric in metrics.items() if metric} == {
        step: ("score", values[step]) for step in expected
    }


def test_a_metric_that_nobody_logs_is_told_of_once(kit: Any, tmp_path: Path, caplog: Any) -> None:
    """With those that there are; nothing is taken for it."""
    outcome = kit.train(kit.Net(), epochs=2, checkpoints=Checkpoints(**OFF, best="acuracy"), run_dir=tmp_path / "run")
    assert saved(outcome) == []
    assert [r for r in caplog.messages if "'acuracy'" in r and "val_loss" in r] == [
        r for r in caplog.messages if "acuracy" in r
    ]
    assert len([r for r in caplog.messages if "follows 'acuracy'" in r]) == 1
    assert outcome.result.problems == [
        "Checkpoints(best=) did not find the metric 'acuracy' 2 times, first at step 2 (there: val_loss)"
    ]


@pytest.mark.anyio
async def test_whoever_asks_gets_the_path_of_a_durable_one(kit: Any, tmp_path: Path) -> None:
    """At the next step boundary, while the loop goes on; paused too; each asker their own."""
    gate = threading.Event()
    net = net_that(kit, lambda step: gate.wait(kit.WAIT_S) if step == 2 else None)
    trainer = kit.make_trainer(
        net,
        epochs=100_000,
        checkpoints=Checkpoints(**OFF, keep_last=9),
        run_dir=tmp_path / "run",
        run_id="r",
        journal=True,
    )
    async with trainer.run() as run:
        first: list[str] = []
        async with anyio.create_task_group() as tasks:

            async def ask() -> None:
                first.append(await run.checkpoint("before the holidays"))

            tasks.start_soon(ask)
            gate.set()
        run.pause()
        second, third = await run.checkpoint(), await run.checkpoint()
        run.resume()
        run.stop(checkpoint=False)
    loaded = [Loaded(Path(path)) for path in (*first, second, third)]
    assert loaded[1].manifest.name.step == loaded[2].manifest.name.step
    assert str(loaded[2].manifest.name) == f"{loaded[1].manifest.name}.2"
    assert {tuple(one.manifest.reasons) for one in loaded} == {("command",)}
    taken = [event for event in kit.read_journal(tmp_path / "run") if type(event) is CommandTaken]
    assert (taken[0].command, taken[0].reason) == ("checkpoint", "before the holidays")


@pytest.mark.anyio
@pytest.mark.parametrize("options", [{"checkpoints": False}, {"checkpoints": True, "journal": False}], ids=str)
async def test_whoever_asks_a_run_without_checkpoints_is_told(kit: Any, tmp_path: Path, options: Any) -> None:
    """The run goes on."""
    trainer = kit.make_trainer(kit.Net(), epochs=100_000, **options)
    async with trainer.run() as run:
        with pytest.raises(CheckpointError, match="takes no checkpoints"):
            await run.checkpoint()
        run.stop()
    assert (await run.result()).status == "stopped"


@pytest.mark.anyio
async def test_whoever_asks_too_late_is_told(kit: Any, tmp_path: Path) -> None:
    """The loop has ended by then, or the run."""
    trainer = kit.make_trainer(kit.Net(), checkpoints=Checkpoints(**OFF), run_dir=tmp_path / "run", run_id="r")
    async with trainer.run() as run:
        await run.result()
        with pytest.raises(CheckpointError, match="the run ended before"):
            await run.checkpoint()


@pytest.mark.parametrize(("checkpoint", "expected"), [(True, [("step-3.a1", ["stop"])]), (False, [])])
def test_a_stop_takes_one_unless_told_otherwise(kit: Any, tmp_path: Path, checkpoint: bool, expected: Any) -> None:
    """It is durable when `train` returns."""
    control: list[Any] = []
    at = At(3, lambda: control[0].send(Stop(id="1", checkpoint=checkpoint)))
    trainer = kit.make_trainer(
        kit.Net(), epochs=9, callbacks=[at], checkpoints=Checkpoints(**OFF), run_dir=tmp_path / "run", journal=True
    )
    session = trainer._session
    trainer._session = lambda task, inbox, *rest, **more: (control.append(inbox), session(task, inbox, *rest, **more))[
        1
    ]
    result = trainer.train()
    assert (result.status, result.global_step) == ("stopped", 3)
    found = [event for event in kit.read_journal(tmp_path / "run") if type(event) is CheckpointSaved]
    assert [(e.checkpoint, e.reasons) for e in found] == expected
    assert [str(name) for name in store_of(tmp_path / "run").names()] == [name for name, _ in expected]


# ---------------------------------------------------------------------------------------------- what is in it


def test_tensors_stand_in_a_file_that_any_reader_of_safetensors_opens(kit: Any, tmp_path: Path) -> None:
    """By their names in the module and the optimizers; the rest is msgpack, and there is no other file."""

    class Adam(kit.Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            return [torch.optim.Adam(self.parameters(), lr=self.lr)], []

    net = Adam()
    outcome = kit.train(net, checkpoints=Checkpoints(**OFF | {"at_end": True}), run_dir=tmp_path / "run")
    folder = Path(outcome.result.checkpoint)
    assert sorted(os.listdir(folder)) == ["manifest.json", "readings.msgpack", "state.msgpack", "tensors.safetensors"]
    with safe_open(folder / "tensors.safetensors", "pt") as file:
        names = set(file.keys())
        assert torch.equal(file.get_tensor("module.linear.weight"), net.linear.weight)
    assert {"module.linear.bias", "optimizers.0.state.0.exp_avg", "optimizers.0.state.1.step"} <= names
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"]
    assert set(manifest["files"]) == set(os.listdir(folder)) - {"manifest.json"}
    assert (manifest["global_step"], manifest["epoch"], manifest["reasons"]) == (2, 1, ["end"])


def test_all_kinds_of_tensors_survive(kit: Any, tmp_path: Path) -> None:
    """Tied and shared ones, views, empty ones and scalars, all types; and state that changes its size."""

    class Many(kit.Net):
        def __init__(self) -> None:
            super().__init__()
            self.tied = torch.nn.Linear(4, 1, bias=False)
            self.tied.weight = self.linear.weight
            self.history = torch.zeros(0)
            base = torch.arange(24.0).reshape(4, 6)
            self.others: dict[str, Any] = {
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

        def update_state(self, state: dict[str, Any]) -> None:
            self.got = state

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.history = torch.cat([self.history, torch.tensor([float(global_step)])])
            return super().train_step(global_step, batch, device)

    net = Many()
    kit.train(net, epochs=2, checkpoints=Checkpoints(**OFF, every_steps=1, keep_last=9), run_dir=tmp_path / "run")
    store = store_of(tmp_path / "run")
    for name in store.names():
        state = Loaded(store.path(name)).state["module"]
        assert state["history"].tolist() == [float(step) for step in range(1, name.step + 1)]
        assert state["weights"]["tied.weight"].data_ptr() == state["weights"]["linear.weight"].data_ptr()
        assert_same(state["others"], net.others)


def assert_same(left: Any, right: Any) -> None:
    """Type, shape, dtype and every bit; containers alike."""
    assert type(left) is type(right) or isinstance(right, torch.Tensor)
    if isinstance(right, torch.Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert left.resolve_conj().contiguous().view(-1).tolist() == right.resolve_conj().contiguous().view(-1).tolist()
    elif isinstance(right, dict):
        assert list(left) == list(right)
        for key in right:
            assert_same(left[key], right[key])
    elif isinstance(right, (list, tuple)):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def test_what_cannot_be_stored_is_named_before_anything_is_computed(kit: Any, tmp_path: Path) -> None:
    """By its path; no step is taken."""

    class Odd(kit.Net):
        def get_state(self) -> dict[str, Any]:
            return {"weights": self.state_dict(), "vocabulary": [{"index": object()}]}

    outcome = kit.train(Odd(), checkpoints=Checkpoints(**OFF), run_dir=tmp_path / "run")
    assert isinstance(outcome.error, UnstorableState)
    assert "module.vocabulary.0.index" in str(outcome.error)
    assert "TrainStepEnded" not in outcome.names()


def test_the_weights_alone_are_there_at_the_end(kit: Any, tmp_path: Path) -> None:
    """As a state dict; announced when they are on the disk; replaced by those of the next attempt."""
    net = kit.Net()
    run = {"run_dir": tmp_path / "run", "run_id": "r"}
    outcome = kit.train(net, checkpoints=Checkpoints(**OFF), **run)
    (event,) = outcome.of(WeightsSaved)
    assert event.path == str(tmp_path / "run/weights.safetensors")
    first = load_file(event.path)
    assert all(torch.equal(first[name], tensor) for name, tensor in net.state_dict().items())
    kit.train(net, checkpoints=Checkpoints(**OFF), **run)
    assert not torch.equal(load_file(event.path)["linear.weight"], first["linear.weight"])
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")] == []


def test_tied_weights_load_as_a_state_dict(kit: Any, tmp_path: Path) -> None:
    """By plain safetensors and torch, which know nothing of our aliases."""

    class Tied(kit.Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = torch.nn.Linear(4, 1)
            self.again.weight = self.linear.weight

    net, fresh = Tied(), Tied()
    kit.train(net, checkpoints=Checkpoints(**OFF), run_dir=tmp_path / "run")
    fresh.load_state_dict(load_file(tmp_path / "run/weights.safetensors"))
    assert torch.equal(fresh.again.weight, net.linear.weight)


def test_no_weights_where_nobody_wants_them(kit: Any, tmp_path: Path) -> None:
    """Nor from a run that failed."""
    kit.train(kit.Net(), checkpoints=Checkpoints(**OFF, weights=False), run_dir=tmp_path / "run")

    def fail(step: int) -> None:
        raise ValueError(step)

    kit.train(net_that(kit, fail), checkpoints=Checkpoints(**OFF), run_dir=tmp_path / "other")
    assert not list(tmp_path.glob("*/weights*"))


# ------------------------------------------------------------------------------------------------- the policies


class Gate:
    """Holds the writer at its first write until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        begin = CheckpointStore.begin

        def held(store: CheckpointStore, name: CheckpointName) -> Path:
            self.reached.set()
            assert self.open.wait(20)
            return begin(store, name)

        monkeypatch.setattr(CheckpointStore, "begin", held)


def test_one_that_is_due_while_both_copies_are_written_is_left_out(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And said so; memory holds no third copy. The first two become durable once the disk answers."""
    gate = Gate(monkeypatch)
    net = net_that(kit, lambda step: gate.open.set() if step == 6 else None)
    checkpoints = Checkpoints(**OFF, every_steps=1, keep_last=9)
    outcome = kit.train(net, epochs=3, checkpoints=checkpoints, run_dir=tmp_path / "run")
    skipped = outcome.of(CheckpointSkipped)
    assert [(e.global_step, e.reasons, e.writing) for e in skipped][:1] == [(3, ["steps"], ["step-1.a1", "step-2.a1"])]
    assert [name for name, _ in saved(outcome)][:2] == ["step-1.a1", "step-2.a1"]
    assert len(skipped) + len(outcome.of(CheckpointStaged)) == 6


def test_the_loop_waits_for_memory_where_that_is_the_policy(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Charged to the ledger; nothing is left out."""
    gate = Gate(monkeypatch)
    waited = threading.Event()
    take = kit.SlabPool.take

    def noticing(pool: Any, timeout_s: float) -> Any:
        slab = take(pool, timeout_s)
        if slab is None and timeout_s:
            waited.set()
            gate.open.set()
        return slab

    monkeypatch.setattr(kit.SlabPool, "take", noticing)
    checkpoints = Checkpoints(**OFF, every_steps=1, keep_last=9, when_busy="wait")
    outcome = kit.train(kit.Net(), epochs=3, checkpoints=checkpoints, run_dir=tmp_path / "run")
    assert waited.is_set()
    assert [name for name, _ in saved(outcome)] == [f"step-{step}.a1" for step in range(1, 7)]
    assert outcome.result.ledger.checkpoint_s > 0.05


def test_old_ones_are_deleted_once_a_newer_one_is_durable(kit: Any, tmp_path: Path) -> None:
    """The newest and the best stay."""
    scores = iter([3.0, 1.0, 2.0, 4.0, 5.0])

    class Scored(kit.Net):
        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
            self.log("score", next(scores))

    checkpoints = Checkpoints(**OFF, every_epochs=1, best="score", keep_last=1, keep_best=1, when_busy="wait")
    outcome = kit.train(Scored(), epochs=5, checkpoints=checkpoints, run_dir=tmp_path / "run")
    assert [str(name) for name in store_of(tmp_path / "run").names()] == ["step-4.a1", "step-10.a1"]
    assert [event.checkpoint for event in outcome.of(CheckpointDeleted)] == ["step-2.a1", "step-6.a1", "step-8.a1"]
    order = [event.checkpoint for event in outcome.events if type(event) in (CheckpointSaved, CheckpointDeleted)]
    assert order.index("step-4.a1") < order.index("step-2.a1", 1)


def scored(kit: Any, *scores: float) -> Any:
    """A module with this score in each of its validations."""
    left = iter(scores)

    class Scored(kit.Net):
        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
            self.log("score", next(left))

    return Scored()


def test_a_resumed_run_knows_the_scores_of_its_line(kit: Any, tmp_path: Path) -> None:
    """One that does not enter the best three is not taken, though it is the best of its own attempt."""
    own = {"run_dir": tmp_path / "run", "run_id": "r"}
    own["checkpoints"] = Checkpoints(**OFF, best="score", keep_best=3, keep_last=9, when_busy="wait")
    kit.train(scored(kit, 0.1, 0.3, 0.2), epochs=3, **own)
    outcome = kit.train(scored(kit, 0.4, 0.25, 0.25), epochs=6, resume="auto", **own)
    assert [name for name, _ in saved(outcome)] == ["step-10.a2"]
    assert outcome.result.best_checkpoint == str(tmp_path / "run/checkpoints/step-2.a1")


def test_resume_best_continues_from_the_best_whole_one(kit: Any, tmp_path: Path) -> None:
    """By the metric that the run monitors, also where `Trainer.test` names none; a damaged one is passed over."""
    own = {"run_dir": tmp_path / "run"}
    settings = Checkpoints(**OFF, best="score", best_mode="max", keep_best=9, keep_last=9, when_busy="wait")
    kit.train(scored(kit, 1.0, 3.0, 2.0), epochs=3, run_id="r", checkpoints=settings, **own)
    outcome = kit.train(scored(kit, 0.5), epochs=3, resume="best", checkpoints=settings, **own)
    assert (outcome.of(RunStarted)[0].run_id, outcome.of(RunResumed)[0].checkpoint) == ("r", "step-4.a1")
    (tmp_path / "run/checkpoints/step-4.a1/state.msgpack").write_bytes(b"")
    net = scored(kit)
    net.get_test_dataloaders = net.get_val_dataloaders
    kit.make_trainer(net, resume="best", **own).test()
    third = Loaded(tmp_path / "run/checkpoints/step-2.a1").state["module"]
    assert all(torch.equal(third[name], tensor) for name, tensor in net.state_dict().items())


def test_a_job_that_names_only_its_folder_resumes(kit: Any, tmp_path: Path) -> None:
    """The folder knows the run's name, by its journal or by its checkpoints; a new one does not know its uploads."""
    own = {"run_dir": tmp_path / "run", "resume": "auto", "checkpoints": Checkpoints(**OFF, every_epochs=1)}
    names = [kit.train(kit.Net(), epochs=epochs, journal=True, **own).result.run_id for epochs in (1, 2)]
    shutil.rmtree(tmp_path / "run/journal")
    last = kit.train(kit.Net(), epochs=3, journal=True, **own)
    assert {*names, last.result.run_id} == {names[0]}
    assert last.result.global_step == 6
    error = kit.train(
        kit.Net(), run_dir=tmp_path / "new", resume="auto", checkpoints=Checkpoints(upload=f"file://{tmp_path}/there")
    ).error
    assert isinstance(error, ArgumentsError)
    assert "give run_id" in str(error)


@pytest.mark.parametrize("source", ["checkpoint", "run", "weights", "address"])
def test_a_new_run_starts_from_weights(kit: Any, tmp_path: Path, source: str) -> None:
    """At step 0, with new optimizers and a history of its own; once it has a checkpoint, that is what it resumes."""
    remote = f"file://{tmp_path}/there" if source == "address" else None
    settings = Checkpoints(**OFF, every_epochs=1, upload=remote)
    old = kit.train(kit.Net(), epochs=2, run_id="old", run_dir=tmp_path / "old", checkpoints=settings).result
    path = {
        "checkpoint": old.checkpoint,
        "run": tmp_path / "old",
        "weights": tmp_path / "old/weights.safetensors",
        "address": f"{remote}/old",
    }[source]
    seen: list[dict[str, Any]] = []

    class Started(kit.Net):
        def get_train_dataloader(self, *given: Any) -> Any:
            seen.append({name: tensor.clone() for name, tensor in self.state_dict().items()})
            return super().get_train_dataloader(*given)

    own = {"run_dir": tmp_path / "new", "run_id": "new", "checkpoints": Checkpoints(**OFF, every_epochs=1)}
    result = kit.train(Started(), epochs=1, init_from=path, resume="auto", **own).result
    weights = load_file(tmp_path / "old/weights.safetensors")
    assert seen[0].keys() == weights.keys()
    assert all(torch.equal(seen[0][name], tensor) for name, tensor in weights.items())
    assert (result.global_step, result.run_id) == (2, "new")
    again = kit.train(Started(), epochs=2, init_from=path, resume="auto", **own)
    assert again.of(RunResumed)[0].checkpoint == "step-2.a1"


def test_weights_of_another_model_are_refused(kit: Any, tmp_path: Path) -> None:
    """By the keys and shapes that differ; the module is as it was. So is a path without any."""
    save_file({"linear.weight": torch.ones(2, 9), "other": torch.ones(1)}, tmp_path / "foreign.safetensors")
    net = kit.Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    error = kit.train(net, init_from=tmp_path / "foreign.safetensors").error
    assert isinstance(error, CheckpointMismatch)
    assert all(text in str(error) for text in ("linear.weight", "other", "linear.bias"))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    error = kit.train(net, init_from=tmp_path / "nothing").error
    assert isinstance(error, CheckpointNotFound)
    assert "init_from=" in str(error)


def test_three_failures_in_a_row_end_the_run(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is told of; two of them do not, and one that succeeds begins the count anew."""
    begin, broken = CheckpointStore.begin, {2, 3, 5, 6, 7}

    def failing(store: CheckpointStore, name: CheckpointName) -> Path:
        if name.step in broken:
            raise OSError(28, "No space left on device")
        return begin(store, name)

    monkeypatch.setattr(CheckpointStore, "begin", failing)
    checkpoints = Checkpoints(**OFF, every_steps=1, keep_last=9, when_busy="wait")
    outcome = kit.train(kit.Net(), epochs=50, checkpoints=checkpoints, run_dir=tmp_path / "run")
    assert isinstance(outcome.error, CheckpointsFailing)
    assert "No space left" in str(outcome.error)
    failed = [(event.checkpoint, event.consecutive) for event in outcome.of(CheckpointFailed)]
    assert failed == [(f"step-{s}.a1", n) for s, n in ((2, 1), (3, 2), (5, 1), (6, 2), (7, 3))]
    assert [name for name, _ in saved(outcome)][:2] == ["step-1.a1", "step-4.a1"]


@pytest.mark.anyio
async def test_whoever_asked_is_told_that_it_failed(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason, and training goes on."""

    def failing(store: CheckpointStore, name: CheckpointName) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CheckpointStore, "begin", failing)
    trainer = kit.make_trainer(kit.Net(), epochs=100_000, checkpoints=Checkpoints(**OFF), run_dir=tmp_path / "run")
    async with trainer.run() as run:
        with pytest.raises(CheckpointError, match="No space left"):
            await run.checkpoint()
        run.stop(checkpoint=False)
    assert (await run.result()).status == "stopped"


def test_the_journal_has_all_that_led_to_a_checkpoint_before_it_is_announced(kit: Any, tmp_path: Path) -> None:
    """On stable storage: a resumed run does not do these steps again, so nobody else would tell of them."""
    seen: list[tuple[int, int]] = []
    commit = CheckpointStore.commit

    def looking(store: CheckpointStore, manifest: Any) -> Path:
        journal = kit.read_journal(tmp_path / "run")
        seen.append((manifest.seq, max(event.seq for event in journal)))
        assert any(isinstance(e, CheckpointStaged) and e.seq == manifest.seq for e in journal)
        return commit(store, manifest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStore, "commit", looking)
        checkpoints = Checkpoints(**OFF, every_steps=1, when_busy="wait")
        outcome = kit.train(kit.Net(), epochs=3, checkpoints=checkpoints, run_dir=tmp_path / "run", journal=True)
    assert outcome.error is None
    assert len(seen) == 6
    assert all(written >= seq for seq, written in seen)


def test_an_attempt_that_begins_anew_supersedes_all_before_it(kit: Any, tmp_path: Path) -> None:
    """And "auto" goes on from what it does, not from what was there."""
    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": Checkpoints(**OFF | {"at_end": True})}
    kit.train(kit.Net(), epochs=3, **run)
    outcome = kit.train(kit.Net(), epochs=1, **run)
    (resumed,) = outcome.of(RunResumed)
    assert (resumed.global_step, resumed.checkpoint, resumed.after_seq) == (0, None, 0)
    assert [str(name) for name in store_of(tmp_path / "run").line()] == ["step-2.a2"]
    outcome = kit.train(kit.Net(), epochs=2, resume="auto", **run)
    (resumed,) = outcome.of(RunResumed)
    assert (resumed.global_step, resumed.checkpoint) == (2, "step-2.a2")
    assert outcome.result.global_step == 4


def test_a_test_of_a_trained_run_supersedes_nothing(kit: Any, tmp_path: Path) -> None:
    """It takes over the module's state alone, and the history of the training stays."""

    class Tested(kit.Net):
        def get_test_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
            return self.batches(batch_size)

    run = {"run_dir": tmp_path / "run", "run_id": "r", "journal": True}
    trained = Tested()
    kit.train(trained, checkpoints=Checkpoints(**OFF | {"at_end": True}), **run)
    before = [event for event in read_history(tmp_path / "run/journal") if type(event) is TrainStepEnded]
    fresh = Tested()
    with torch.no_grad():
        fresh.linear.weight.zero_()
    outputs = kit.make_trainer(fresh, resume="auto", **run).test()
    assert torch.equal(fresh.linear.weight, trained.linear.weight)
    assert outputs["default"][1].abs().sum() > 0
    after = [event for event in read_history(tmp_path / "run/journal") if type(event) is TrainStepEnded]
    assert after == before != []


# ----------------------------------------------------------------------------------------- attempts and their line


def test_an_attempt_that_fails_before_it_trains_changes_nothing(kit: Any, tmp_path: Path) -> None:
    """Neither what "auto" goes on from, nor the history."""
    run = {"run_dir": tmp_path / "run", "run_id": "r", "journal": True, "epochs": 3}
    checkpoints = Checkpoints(**OFF, every_epochs=1, keep_last=9, when_busy="wait")
    kit.train(kit.Net(), checkpoints=checkpoints, **run)

    class NoData(kit.Net):
        def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
            raise FileNotFoundError("/mnt/data is not mounted")

    for resume in (None, tmp_path / "run/checkpoints/step-2.a1"):
        failed = kit.train(NoData(), checkpoints=checkpoints, resume=resume, **run)
        assert isinstance(failed.error, FileNotFoundError)
    assert [str(name) for name in store_of(tmp_path / "run").line()] == ["step-6.a1", "step-4.a1", "step-2.a1"]
    history = [event.global_step for event in read_history(tmp_path / "run/journal") if type(event) is TrainStepEnded]
    assert history == [1, 2, 3, 4, 5, 6]
    resumed = kit.train(kit.Net(), checkpoints=checkpoints, resume="auto", **run | {"epochs": 4})
    assert resumed.of(RunResumed)[0].checkpoint == "step-6.a1"


def test_the_history_follows_the_line_back(kit: Any, tmp_path: Path) -> None:
    """Twice from one attempt: what the second resumption goes on from counts, though the first one superseded it."""
    run = {"run_dir": tmp_path / "run", "run_id": "r", "journal": True, "epochs": 4}
    checkpoints = Checkpoints(**OFF, every_steps=1, keep_last=99, when_busy="wait")
    kit.train(kit.Net(), checkpoints=checkpoints, **run)
    for step in (2, 6):
        kit.train(kit.Net(), checkpoints=checkpoints, resume=tmp_path / f"run/checkpoints/step-{step}.a1", **run)
    history = [
        (event.global_step, event.attempt)
        for event in read_history(tmp_path / "run/journal")
        if type(event) is TrainStepEnded
    ]
    assert history == [(step, 1) for step in range(1, 7)] + [(7, 3), (8, 3)]


def test_a_finished_run_that_is_started_again_says_so(kit: Any, tmp_path: Path, caplog: Any) -> None:
    """And its result names the checkpoint that there is."""
    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": Checkpoints(**OFF | {"at_end": True})}
    first = kit.train(kit.Net(), **run).result
    again = kit.train(kit.Net(), resume="auto", **run).result
    assert (again.status, again.global_step, again.checkpoint) == ("finished", 2, first.checkpoint)
    assert "nothing is left to train" in caplog.text


# ---------------------------------------------------------------------------------------- callbacks with a state


class Stateful(CallbackInterface):
    """Counts steps on its own thread, or inline; its state may be made to fail."""

    def __init__(self, act: Callable[[], None] = lambda: None) -> None:
        self.count, self.act = 0, act

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        self.act()
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class InlineStateful(Stateful):
    """The same on the loop's thread."""

    on_end_train_step = inline(lambda self, global_step, *outputs: setattr(self, "count", self.count + 1))


def boom() -> None:
    raise ValueError("boom")


@pytest.mark.parametrize("kind", [Stateful, InlineStateful])
@pytest.mark.parametrize("on_error", ["fatal", "disable"])
def test_a_state_dict_that_raises_is_answered_by_the_callbacks_policy(
    kit: Any, tmp_path: Path, kind: type[Stateful], on_error: Any
) -> None:
    """As a hook of it would be: the user's exception, or a run that goes on without it, with whole checkpoints."""
    callback = kind(boom)
    delivery = kit.replace(CALLBACK_DELIVERY, on_error=on_error)
    checkpoints = Checkpoints(**OFF, every_epochs=1, keep_last=9, when_busy="wait")
    outcome = kit.train(
        kit.Net(), callbacks=[(callback, delivery)], epochs=4, checkpoints=checkpoints, run_dir=tmp_path / "run"
    )
    if on_error == "fatal":
        assert isinstance(outcome.error, ValueError)
    else:
        assert outcome.result.status == "finished"
        assert [event.during for event in outcome.of(ObserverFailed)] == ["state_dict"]
        assert len(saved(outcome)) == 4


def test_a_state_that_is_refused_is_answered_by_the_callbacks_policy(kit: Any, tmp_path: Path) -> None:
    """It goes on without a callback that may be disabled."""

    class Refusing(Stateful):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("version")

    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": Checkpoints(**OFF, every_epochs=1)}
    kit.train(kit.Net(), callbacks=[Stateful()], **run)
    for on_error, status in (("fatal", "failed"), ("disable", "finished")):
        delivery = kit.replace(CALLBACK_DELIVERY, on_error=on_error)
        renamed = type("Stateful", (Refusing,), {})()
        outcome = kit.train(kit.Net(), callbacks=[(renamed, delivery)], epochs=2, resume="auto", **run)
        assert outcome.of(ObserverFailed)[0].during == "load_state_dict"
        assert (isinstance(outcome.error, KeyError), status) == (status == "failed", status)


def test_a_slow_callback_makes_no_checkpoint_fail(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that may be disabled is not waited for; what is announced without its state says so."""
    monkeypatch.setattr("sinks.checkpoints.writer._PART_TIMEOUT_S", 0.1)
    over = threading.Event()

    class Slow(Stateful):
        def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
            over.wait(kit.WAIT_S)

    delivery = kit.replace(CALLBACK_DELIVERY, on_error="disable")
    net = net_that(kit, lambda step: over.set() if step == 12 else None)
    checkpoints = Checkpoints(**OFF, every_epochs=1, when_busy="wait", keep_last=9)
    outcome = kit.train(
        net, callbacks=[(Slow(), delivery)], epochs=6, checkpoints=checkpoints, run_dir=tmp_path / "run"
    )
    assert outcome.of(CheckpointFailed) == []
    assert outcome.of(CheckpointSaved)[0].missing == ["Slow"]
    name = store_of(tmp_path / "run").names()[0]
    assert store_of(tmp_path / "run").manifest(name).missing == ["Slow"]


# ------------------------------------------------------------------------------------------------- what else went wrong


def test_weights_that_cannot_be_kept_do_not_cost_the_end_of_a_run(kit: Any, tmp_path: Path) -> None:
    """The module's own get_state leaves out what no file can hold, and the state dict has it."""

    class Sparse(kit.Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("graph", torch.eye(3).to_sparse())

        def get_state(self) -> dict[str, Any]:
            return {name: value for name, value in self.state_dict().items() if name != "graph"}

    diary = kit.Diary()
    outcome = kit.train(Sparse(), callbacks=[diary], checkpoints=Checkpoints(**OFF), run_dir=tmp_path / "run")
    assert outcome.result.status == "finished"
    assert diary.names[-1] == "on_end_train"
    (failed,) = outcome.of(CheckpointFailed)
    assert "graph" in failed.error


@pytest.mark.anyio
@pytest.mark.parametrize("policy", ["wait", "skip"])
async def test_a_stop_is_taken_while_the_disk_is_stuck(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Any
) -> None:
    """With both copies on their way; one that asks for no checkpoint has not to wait for one."""
    gate = Gate(monkeypatch)
    checkpoints = Checkpoints(**OFF, every_steps=1, when_busy=policy)
    trainer = kit.make_trainer(kit.Net(), epochs=1_000_000, checkpoints=checkpoints, run_dir=tmp_path / "run")
    async with trainer.run() as run:
        await anyio.to_thread.run_sync(gate.reached.wait)
        async with anyio.create_task_group() as tasks:

            async def ask() -> None:
                with contextlib.suppress(CheckpointError):  # if it was given up for the stop
                    await run.checkpoint()

            if policy == "skip":
                tasks.start_soon(ask)
            stream = run.events(types=[CommandTaken])
            run.stop(checkpoint=False)
            with anyio.fail_after(kit.WAIT_S):
                async for event in stream:
                    if event.command == "stop":
                        break
            gate.open.set()


def test_the_metric_of_a_checkpoint_is_that_of_its_own_validation(kit: Any, tmp_path: Path) -> None:
    """Not one that an earlier validation has logged: it would be taken for as good, and the good one deleted."""

    class Once(kit.Net):
        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
            if global_step == 2:
                self.log("score", 9.0)

    checkpoints = Checkpoints(**OFF, every_epochs=1, best="score", best_mode="max", keep_last=1, when_busy="wait")
    kit.train(Once(), epochs=4, checkpoints=checkpoints, run_dir=tmp_path / "run")
    store = store_of(tmp_path / "run")
    assert {str(name): store.manifest(name).metric is not None for name in store.names()} == {
        "step-2.a1": True,
        "step-8.a1": False,
    }


def test_a_best_one_that_could_not_be_written_is_not_to_be_beaten(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one that beats what there is, is the best."""
    scores = iter([1.0, 9.0, 5.0])
    begin = CheckpointStore.begin
    settled = threading.Event()

    def failing(store: CheckpointStore, name: CheckpointName) -> Path:
        if name.step == 4:
            raise OSError(28, "No space left on device")
        return begin(store, name)

    class Scored(kit.Net):
        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
            if global_step == 6:
                assert settled.wait(kit.WAIT_S)
            self.log("score", next(scores))

    abandon = CheckpointStore.abandon
    monkeypatch.setattr(CheckpointStore, "begin", failing)
    monkeypatch.setattr(CheckpointStore, "abandon", lambda store, name: (abandon(store, name), settled.set()))
    checkpoints = Checkpoints(**OFF, best="score", best_mode="max", keep_last=9)
    outcome = kit.train(Scored(), epochs=3, checkpoints=checkpoints, run_dir=tmp_path / "run")
    assert [name for name, _ in saved(outcome)] == ["step-2.a1", "step-6.a1"]


def test_other_optimizers_are_named(kit: Any, tmp_path: Path) -> None:
    """Before their state is mixed; with the way to begin with new ones."""

    class Adam(kit.Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            return [torch.optim.Adam(self.parameters(), lr=self.lr)], []

    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": Checkpoints(**OFF, every_epochs=1), "epochs": 2}
    kit.train(kit.Net(), **run | {"epochs": 1})
    outcome = kit.train(Adam(), resume="auto", **run)
    assert isinstance(outcome.error, CheckpointMismatch)
    assert all(text in str(outcome.error) for text in ("SGD", "Adam", "reset_optimizers_schedulers"))
    assert kit.train(Adam(), resume="auto", reset_optimizers_schedulers=True, **run).result.global_step == 4


def test_another_batch_size_within_an_epoch_is_refused(kit: Any, tmp_path: Path) -> None:
    """The place in the data is counted in batches; at the end of an epoch it is free."""
    run = {"run_dir": tmp_path / "run", "run_id": "r", "epochs": 2}
    checkpoints = Checkpoints(**OFF, every_steps=1, keep_last=9, when_busy="wait")
    kit.train(kit.Net(), checkpoints=checkpoints, **run | {"epochs": 1})
    first, second = (tmp_path / f"run/checkpoints/step-{step}.a1" for step in (1, 2))
    outcome = kit.train(kit.Net(), checkpoints=checkpoints, resume=first, train_batch_size=4, **run)
    assert isinstance(outcome.error, CheckpointMismatch)
    assert "1 micro-batches of 8 rows" in str(outcome.error)
    outcome = kit.train(kit.Net(), checkpoints=checkpoints, resume=second, train_batch_size=4, **run)
    assert outcome.result.global_step == 6
