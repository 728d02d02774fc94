"""Unusable checkpoints and states that cannot be stored are refused before the first step, with the cause and a fix."""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import xxhash
from faults.resume_runs import At, Case, Crash, Net, Trainer, assert_continues, attempt, differences, prepare, straight
from torch import nn

from events.checkpoint.manifest import MANIFEST_NAME
from events.checkpoint.store import CheckpointStore
from events.errors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
    CheckpointsFailing,
    CheckpointTooNew,
    RunFolderError,
    UnstorableState,
)
from events.messages import CheckpointFailed, ObserverFailed
from events.sink import Delivery
from sinks import Memory
from trainer import CallbackInterface, Checkpoints, ModuleInterface, inline
from trainer.checkpoint.resume import find
from trainer.errors import ArgumentsError, DataLoaderError


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped after step 8, with checkpoints at 5 and 8."""
    folder = tmp_path_factory.mktemp("old")
    attempt(Case(), folder, at=At(8), checkpoints=Checkpoints(every_steps=5))
    return folder


@pytest.fixture
def run_dir(old: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(old, tmp_path / "run"))


def fingerprint(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def copied(module: ModuleInterface) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def widen(net: Any) -> None:
    net.first = nn.Linear(6, 8)


def rename(net: Any) -> None:
    net.last = net.rest[3]
    del net.rest[3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (widen, ["first.weight has the shape (16, 6) there and (8, 6) here", "first.bias has the shape (16,) there"]),
        (rename, ["it lacks last.weight, last.bias", "it has rest.3.weight, rest.3.bias, which the module lacks"]),
    ],
    ids=["shapes", "keys"],
)
def test_the_checkpoint_of_another_model_is_refused_with_names_and_shapes(
    run_dir: Path, change: Callable[[Any], None], words: list[str]
) -> None:
    """Module and checkpoints stay unchanged."""
    one = prepare(Case(), run_dir, resume="auto")
    change(one.net)
    before, stored = copied(one.net), fingerprint(run_dir / "checkpoints")
    with pytest.raises(CheckpointMismatch) as caught:
        one.trainer.train()
    for part in [*words, "step-8.a1", "Net", "Nothing was changed"]:
        assert part in str(caught.value)
    assert differences(copied(one.net), before) == []
    assert fingerprint(run_dir / "checkpoints") == stored
    assert one.net.losses == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("optimizers", "has 1 optimizers, this module has 2"),
        ("schedulers", "has 1 schedulers, this module has 0"),
        ("groups", "optimizer 0 has groups of [6] parameters there, and of [2] here"),
    ],
)
def test_other_optimizers_are_refused_with_a_working_fix(run_dir: Path, kind: str, words: str) -> None:
    """The error has both counts, and names the argument that starts with new optimizers."""
    case = Case(optimizers="two", scheduler="none") if kind == "optimizers" else Case(scheduler="none")

    def build(**arguments: Any) -> Any:
        one = prepare(case, run_dir, resume="step-8.a1", **arguments)
        if kind == "groups":
            adam = torch.optim.Adam(one.net.first.parameters())
            scheduler = torch.optim.lr_scheduler.StepLR(adam, 1)
            one.net.get_optimizers_schedulers = lambda steps, epochs: ([adam], [scheduler])
        return one

    with pytest.raises(CheckpointMismatch, match=r"reset_optimizers_schedulers=True") as caught:
        build().trainer.train()
    assert words in str(caught.value)
    assert build(reset_optimizers_schedulers=True).trainer.train().status == "finished"


@pytest.mark.parametrize("resume", ["step-99.a1", "nowhere", "checkpoints", "/nonexistent/run", "step-1.a1/"])
def test_a_path_without_a_checkpoint_is_named(tmp_path: Path, resume: str) -> None:
    """A name, a path, an empty folder: no step is taken."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    one = prepare(Case(), tmp_path / "run", resume=resume)
    with pytest.raises(CheckpointNotFound, match=re.escape(resume.rstrip("/").rpartition("/")[2])):
        one.trainer.train()
    assert one.net.losses == []


@pytest.mark.parametrize("resume", ["auto", "best"])
def test_a_run_that_resumes_from_its_own_checkpoints_must_be_named(resume: str) -> None:
    with pytest.raises(ArgumentsError, match=rf"resume='{resume}' needs to know the run; give run_id or run_dir"):
        Trainer(Net(Case()), Case().arguments(), journal=False, sinks=[], resume=resume)


@pytest.mark.parametrize("resume", [3, "", b"step-8.a1", Ellipsis])
def test_a_value_that_is_not_a_path_is_refused_when_the_trainer_is_built(tmp_path: Path, resume: Any) -> None:
    with pytest.raises(ArgumentsError, match=r"resume must be 'auto', 'best', a path, an address or None, not"):
        prepare(Case(), tmp_path, resume=resume)


def test_data_that_ends_before_the_checkpoints_batch_is_refused(run_dir: Path) -> None:
    """Whether the batches before it are skipped or read."""
    for how in ("skip", "replay"):
        one = prepare(Case(), run_dir, resume="step-8.a1", resume_data=how)
        one.net.rows.x = one.net.rows.x[:8]
        with pytest.raises(DataLoaderError, match="gives 1 batches, but the checkpoint was taken after 2 of them"):
            one.trainer.train()


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest, with a valid hash."""
    manifest = msgspec.json.decode(path.read_bytes())["manifest"]
    change(manifest)
    body = msgspec.json.encode(manifest)
    digest = xxhash.xxh3_128_hexdigest(body)
    path.write_bytes(msgspec.json.encode({"manifest": msgspec.Raw(body), "xxh3_128": digest}) + b"\n")


@pytest.mark.parametrize("resume", ["auto", "step-8.a1"])
def test_a_checkpoint_of_a_later_version_is_not_skipped(run_dir: Path, resume: str) -> None:
    """Resuming from the older one without a word would lose the work of the later one; on request it works."""
    path = run_dir / "checkpoints" / "step-8.a1" / MANIFEST_NAME

    def later(manifest: dict[str, Any]) -> None:
        manifest["format"] = 3
        manifest["files"] = ["in", "another", "form"]

    rewrite(path, later)
    one = prepare(Case(), run_dir, resume=resume)
    with pytest.raises(CheckpointTooNew, match=rf"{path}.*has format 3.*reads formats up to 2.*a later one"):
        one.trainer.train()
    assert one.net.losses == []
    last = attempt(Case(), run_dir, resume="step-5.a1")
    assert last.result is not None
    assert last.result.status == "finished"


OUTSIDE = ["/etc/hostname", "a/../../secret", "..", "", ".", "x\0", MANIFEST_NAME, "..\\secret", "../../secret"]
opened: list[str] = []


@functools.cache
def watch_open() -> None:
    """From now on keep the paths of all files that are opened; an audit hook cannot be removed."""
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)


def test_a_manifest_that_names_a_file_outside_its_folder_is_damaged(run_dir: Path) -> None:
    """The hashes are valid: nothing outside is opened, and an older checkpoint is used."""
    folder = run_dir / "checkpoints" / "step-8.a1"
    for place in (run_dir, folder.parent):
        shutil.copy(folder / "state.msgpack", place / "secret")
    whole = (folder / MANIFEST_NAME).read_bytes()
    watch_open()
    opened.clear()
    for outside in OUTSIDE:

        def point(manifest: dict[str, Any], outside: str = outside) -> None:
            manifest["files"][outside] = manifest["files"].pop("state.msgpack")

        (folder / MANIFEST_NAME).write_bytes(whole)
        rewrite(folder / MANIFEST_NAME, point)
        with pytest.raises(CheckpointDamaged, match=r"lists the file .*, which cannot be one of a checkpoint"):
            find(folder, None, lambda name, error: None)
    one = attempt(Case(), run_dir, resume="auto")
    assert one.net.losses[0][0] == 6
    assert str(folder / MANIFEST_NAME) in opened
    assert not [path for path in opened if path.endswith(("secret", "hostname"))]
    assert_continues(one, run_dir, straight(Case()))


def test_a_folder_that_cannot_be_made_is_named_before_the_first_step(tmp_path: Path) -> None:
    """A file has its name (permissions do not stop the superuser)."""
    (tmp_path / "checkpoints").write_text("a file")
    one = prepare(Case(), tmp_path)
    with pytest.raises(CheckpointError, match=rf"no checkpoint can be written to {tmp_path}/checkpoints.*run_dir"):
        one.trainer.train()
    assert one.net.losses == []
    assert (tmp_path / "checkpoints").read_text() == "a file"
    assert prepare(Case(), tmp_path, checkpoints=False).trainer.train().status == "finished"
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunFolderError, match=f"{tmp_path}/run"):
        prepare(Case(), tmp_path / "run").trainer.train()


def test_a_folder_that_vanishes_ends_the_run_after_three_failures(tmp_path: Path) -> None:
    sink = Memory()
    one = prepare(Case(), tmp_path, sinks=[sink], checkpoints=Checkpoints(every_steps=1, when_busy="wait"))

    class Vandal(CallbackInterface):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            if global_step == 4:
                CheckpointStore(tmp_path / "checkpoints").folder.rename(tmp_path / "elsewhere")

    one.trainer._callbacks += (Vandal(),)
    with pytest.raises(CheckpointsFailing, match=rf"3 checkpoints in a row .*{tmp_path}/checkpoints"):
        one.trainer.train()
    assert [event.consecutive for event in sink.of(CheckpointFailed) if event.during == "write"] == [1, 2, 3]


class Unstorable:
    """A type that is not stored."""


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"lock": threading.Lock()}, "module.lock"),
        ({"a": [{"b": (1, Unstorable())}]}, r"module.a\S*0\S*b\S*1"),
        ({"function": len}, "module.function"),
        ({"sparse": torch.eye(2).to_sparse()}, "module.sparse"),
        ({"meta": torch.empty(2, device="meta")}, "module.meta"),
        ({"lazy": nn.LazyLinear(2).weight}, "module.lazy"),
    ],
    ids=["lock", "nested", "function", "sparse", "meta", "lazy"],
)
def test_a_state_that_cannot_be_stored_is_named_by_its_path_before_the_first_step(
    tmp_path: Path, state: dict[str, Any], path: str
) -> None:
    one = prepare(Case(), tmp_path)
    one.net.get_state = lambda: state
    with pytest.raises(UnstorableState, match=path):
        one.trainer.train()
    assert one.net.losses == []


class Keeper(CallbackInterface):
    """A callback with a state; the subclasses are on two lanes."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.steps = 0

    def state_dict(self) -> Any:
        return self.state(self.steps)

    def load_state_dict(self, state: Any) -> None: ...


class Beside(Keeper):
    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.steps = global_step


class Within(Keeper):
    @inline
    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.steps = global_step


@pytest.mark.parametrize("lane", [Beside, Within])
def test_the_state_of_a_callback_that_cannot_be_stored_is_named_before_the_first_step(
    tmp_path: Path, lane: type[Keeper]
) -> None:
    one = prepare(Case(), tmp_path, callbacks=[lane(lambda steps: {"where": {"it": Unstorable()}})])
    with pytest.raises(UnstorableState, match=rf"{lane.__name__}\.where\.it\b.*Unstorable"):
        one.trainer.train()
    assert one.net.losses == []


@pytest.mark.parametrize(("lane", "how"), [(Beside, "cannot be stored"), (Beside, "raises"), (Within, "raises")])
@pytest.mark.parametrize("policy", ["fatal", "disable"])
def test_the_state_of_a_callback_that_fails_later_is_a_failure_of_the_callback(
    tmp_path: Path, lane: type[Keeper], how: str, policy: Any
) -> None:
    """By its policy the exception ends the run, unchanged, or the callback is disabled, and the run continues."""

    def state(steps: int) -> Any:
        if steps >= 6:
            return 1 / 0 if how == "raises" else {"it": Unstorable()}
        return {"steps": steps}

    sink = Memory()
    saves = Checkpoints(every_steps=3, keep_last=9, when_busy="wait", at_end=False)
    callback = (lane(state), Delivery(on_error=policy, overflow="block"))
    one = prepare(Case(), tmp_path, callbacks=[callback], checkpoints=saves, sinks=[sink])
    store = CheckpointStore(tmp_path / "checkpoints")
    if policy == "fatal":
        with pytest.raises(ZeroDivisionError if how == "raises" else UnstorableState):
            one.trainer.train()
        # A checkpoint without a part that must not be lost is not written.
        assert [name.step for name in store.names()] == [3]
    else:
        assert one.trainer.train().status == "finished"
        assert [name.step for name in store.names()] == [3, 6, 9, 12, 15, 18]
        assert {event.observer: event.during for event in sink.of(ObserverFailed)} == {lane.__name__: "state_dict"}
        assert prepare(Case(), tmp_path, resume="auto").trainer.train().global_step == 18


def test_a_callback_that_fails_leaves_no_checkpoint_without_its_state(tmp_path: Path) -> None:
    """Its hook has raised, and the loop notices some checkpoints later: a resumed run starts from one before."""
    case = Case()
    one = prepare(case, tmp_path, checkpoints=Checkpoints(every_steps=1, keep_last=9, when_busy="wait"))
    (observed,) = (callback for callback in one.callbacks if type(callback).__name__ == "Observed")
    hook = observed.on_end_train_step

    def fail(global_step: int, *outputs: Any) -> None:
        if global_step == 8:
            raise Crash
        hook(global_step, *outputs)

    observed.on_end_train_step = fail
    with pytest.raises(Crash):
        one.trainer.train()
    last = attempt(case, tmp_path, resume="auto")
    assert last.net.losses[0][0] == 8
    assert_continues(last, tmp_path, straight(case))


def test_a_mistyped_path_does_not_change_a_finished_run(tmp_path: Path) -> None:
    """No attempt starts: the run stays finished, and nothing in its folder changes."""
    folder = tmp_path / "run"
    assert prepare(Case(), folder).trainer.train().status == "finished"

    def contents() -> dict[Path, bytes]:
        """Of all files except the lock, which names its last holder."""
        return {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file() and path.suffix != ".lock"}

    before = contents()
    for resume in ("nowhere/x", "step-99.a1"):
        with pytest.raises(CheckpointNotFound):
            prepare(Case(), folder, resume=resume).trainer.train()
        assert contents() == before
