"""What cannot be resumed from, or stored, is refused before anything is computed, in words that help."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import xxhash
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
def old(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped after step 8, with checkpoints at 5 and 8."""
    folder = tmp_path_factory.mktemp("old")
    runs.attempt(runs.Case(), folder, at=runs.At(8), checkpoints=Checkpoints(every_steps=5))
    return folder


@pytest.fixture
def run_dir(old: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(old, tmp_path / "run")
    return tmp_path / "run"


def fingerprint(folder: Path) -> dict[str, str]:
    """Everything that is in a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def copied(module: ModuleInterface) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# ------------------------------------------------------------------------------------------------ another model


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
def test_the_checkpoint_of_another_model_is_refused_by_names_and_shapes(
    runs: Any, run_dir: Path, change: Callable[[Any], None], words: list[str]
) -> None:
    """The module is as it was, and so are the checkpoints: nothing was begun."""
    one = runs.prepare(runs.Case(), run_dir, resume="auto")
    change(one.net)
    before, stored = copied(one.net), fingerprint(run_dir / "checkpoints")
    with pytest.raises(CheckpointMismatch) as caught:
        one.trainer.train()
    for part in [*words, "step-8.a1", "Net", "Nothing was changed"]:
        assert part in str(caught.value)
    assert runs.differences(copied(one.net), before) == []
    assert fingerprint(run_dir / "checkpoints") == stored
    assert one.net.losses == []


@pytest.mark.parametrize("kind", ["optimizers", "schedulers", "groups"])
def test_other_optimizers_are_refused_with_the_way_out(runs: Any, run_dir: Path, kind: str) -> None:
    """It names how many there are on either side, and the argument that begins with new ones; which then works."""
    case = runs.Case(optimizers="two", scheduler="none") if kind == "optimizers" else runs.Case(scheduler="none")

    def prepare(**arguments: Any) -> Any:
        one = runs.prepare(case, run_dir, resume="step-8.a1", **arguments)
        if kind == "groups":
            adam = torch.optim.Adam(one.net.first.parameters())
            scheduler = torch.optim.lr_scheduler.StepLR(adam, 1)
            one.net.get_optimizers_schedulers = lambda steps, epochs: ([adam], [scheduler])
        return one

    words = {
        "optimizers": "has 1 optimizers, this module has 2",
        "schedulers": "has 1 schedulers, this module has 0",
        "groups": "optimizer 0 has groups of [6] parameters there, and of [2] here",
    }
    with pytest.raises(CheckpointMismatch, match=r"reset_optimizers_schedulers=True") as caught:
        prepare().trainer.train()
    assert words[kind] in str(caught.value)
    assert prepare(reset_optimizers_schedulers=True).trainer.train().status == "finished"


# -------------------------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize("resume", ["step-99.a1", "nowhere", "checkpoints", "/nonexistent/run", "step-1.a1/"])
def test_a_path_that_leads_to_no_checkpoint_is_named(runs: Any, tmp_path: Path, resume: str) -> None:
    """A name, a path, an empty folder: the message repeats it, and no step is taken."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    one = runs.prepare(runs.Case(), tmp_path / "run", resume=resume)
    with pytest.raises(CheckpointNotFound, match=re.escape(resume.rstrip("/").rpartition("/")[2])):
        one.trainer.train()
    assert one.net.losses == []


@pytest.mark.parametrize("resume", ["auto", "best"])
def test_a_run_that_looks_for_its_own_checkpoints_must_be_named(runs: Any, resume: str) -> None:
    """When the trainer is made."""
    with pytest.raises(ArgumentsError, match=rf"resume='{resume}' needs to know the run; give run_id or run_dir"):
        runs.Trainer(runs.Net(runs.Case()), runs.Case().arguments(), journal=False, sinks=[], resume=resume)


@pytest.mark.parametrize("resume", [3, "", b"step-8.a1", Ellipsis])
def test_what_is_no_path_is_refused_at_once(runs: Any, tmp_path: Path, resume: Any) -> None:
    """When the trainer is made, with all that it may be."""
    with pytest.raises(ArgumentsError, match=r"resume must be 'auto', 'best', a path, an address or None, not"):
        runs.prepare(runs.Case(), tmp_path, resume=resume)


def test_data_that_has_become_shorter_is_refused(runs: Any, run_dir: Path) -> None:
    """The place of the checkpoint is not in it: whether it is skipped or read."""
    for how in ("skip", "replay"):
        one = runs.prepare(runs.Case(), run_dir, resume="step-8.a1", resume_data=how)
        one.net.rows.x = one.net.rows.x[:8]
        with pytest.raises(DataLoaderError, match="gives 1 batches, but the checkpoint was taken after 2 of them"):
            one.trainer.train()


# -------------------------------------------------------------------------------------------------- the manifest


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest, and sign it again: its own hash is right."""
    manifest = msgspec.json.decode(path.read_bytes())["manifest"]
    change(manifest)
    body = msgspec.json.encode(manifest)
    digest = xxhash.xxh3_128_hexdigest(body)
    path.write_bytes(msgspec.json.encode({"manifest": msgspec.Raw(body), "xxh3_128": digest}) + b"\n")


@pytest.mark.parametrize("resume", ["auto", "step-8.a1"])
def test_a_checkpoint_of_a_later_version_is_not_passed_over(runs: Any, run_dir: Path, resume: str) -> None:
    """An older one is there and could be read, but going back to it in silence would lose what the later one did."""
    path = run_dir / "checkpoints" / "step-8.a1" / MANIFEST_NAME

    def later(manifest: dict[str, Any]) -> None:
        manifest["format"] = 2
        manifest["files"] = ["in", "another", "form"]

    rewrite(path, later)
    one = runs.prepare(runs.Case(), run_dir, resume=resume)
    with pytest.raises(CheckpointTooNew, match=rf"{path}.*has format 2.*reads formats up to 1.*a later one"):
        one.trainer.train()
    assert one.net.losses == []
    assert (
        runs.attempt(runs.Case(), run_dir, resume="step-5.a1").result.status == "finished"
    )  # who asks for it, gets it


opened: list[str] | None = None


def _audit(event: str, arguments: Any) -> None:
    if event == "open" and opened is not None:
        opened.append(str(arguments[0]))


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """Paths of all files that are opened from now on."""
    global opened
    if not hasattr(sys, "_stagecast_watches_open"):
        sys.addaudithook(_audit)
        sys._stagecast_watches_open = True  # type: ignore[attr-defined]  # a hook cannot be removed again
    opened = []
    yield opened
    opened = None


def test_a_manifest_that_points_outside_its_folder_is_damaged(runs: Any, run_dir: Path, watched: list[str]) -> None:
    """Its hash is right, and so is that of the file it points at: nothing outside is opened, an older one is taken."""
    folder = run_dir / "checkpoints" / "step-8.a1"
    shutil.copy(folder / "state.msgpack", run_dir / "secret")
    shutil.copy(folder / "state.msgpack", folder.parent / "secret")
    whole = (folder / MANIFEST_NAME).read_bytes()
    watched.clear()
    for outside in (
        "/etc/hostname",
        "a/../../secret",
        "..",
        "",
        ".",
        "x\0",
        MANIFEST_NAME,
        "..\\secret",
        "../../secret",
    ):

        def point(manifest: dict[str, Any], outside: str = outside) -> None:
            manifest["files"][outside] = manifest["files"].pop("state.msgpack")

        (folder / MANIFEST_NAME).write_bytes(whole)
        rewrite(folder / MANIFEST_NAME, point)
        with pytest.raises(CheckpointDamaged, match=r"lists the file .*, which cannot be one of a checkpoint"):
            find(folder, None, lambda name, error: None)
    one = runs.attempt(runs.Case(), run_dir, resume="auto")
    assert one.net.losses[0][0] == 6
    assert str(folder / MANIFEST_NAME) in watched
    assert not [path for path in watched if path.endswith(("secret", "hostname"))]
    runs.assert_continues(one, run_dir, runs.straight(runs.Case()))


# --------------------------------------------------------------------------------------------------- the folder


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_computed(runs: Any, tmp_path: Path) -> None:
    """A file is in its place (as the superuser, one may write everywhere)."""
    (tmp_path / "checkpoints").write_text("a file")
    one = runs.prepare(runs.Case(), tmp_path)
    with pytest.raises(CheckpointError, match=rf"no checkpoint can be written to {tmp_path}/checkpoints.*run_dir"):
        one.trainer.train()
    assert one.net.losses == []
    assert (tmp_path / "checkpoints").read_text() == "a file"
    assert runs.attempt(runs.Case(), tmp_path, checkpoints=False).result.status == "finished"
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunFolderError, match=f"{tmp_path}/run"):
        runs.prepare(runs.Case(), tmp_path / "run").trainer.train()


def test_a_folder_that_goes_away_ends_the_run_after_some_failures(runs: Any, tmp_path: Path) -> None:
    """Each is told; then the run ends rather than risk all that is computed, and names the folder."""
    sink = Memory()
    one = runs.prepare(runs.Case(), tmp_path, sinks=[sink], checkpoints=Checkpoints(every_steps=1, when_busy="wait"))

    class Vandal(CallbackInterface):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            if global_step == 4:
                CheckpointStore(tmp_path / "checkpoints").folder.rename(tmp_path / "elsewhere")

    one.trainer._callbacks += (Vandal(),)
    with pytest.raises(CheckpointsFailing, match=rf"3 checkpoints in a row .*{tmp_path}/checkpoints"):
        one.trainer.train()
    assert [event.consecutive for event in sink.of(CheckpointFailed) if event.during == "write"] == [1, 2, 3]


# ---------------------------------------------------------------------------------------- what cannot be stored


class Unstorable:
    """Something that only its own process can hold."""


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
def test_state_that_cannot_be_stored_is_named_by_its_path_at_the_start(
    runs: Any, tmp_path: Path, state: dict[str, Any], path: str
) -> None:
    """Before the first step, not when an hour of training is to be saved; a run without checkpoints may have it."""
    one = runs.prepare(runs.Case(), tmp_path)
    one.net.get_state = lambda: state
    with pytest.raises(UnstorableState, match=path):
        one.trainer.train()
    assert one.net.losses == []


class Keeper(CallbackInterface):
    """A callback with a state; which lane it is on says the subclass."""

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
def test_the_state_of_a_callback_that_cannot_be_stored_is_named_at_the_start(
    runs: Any, tmp_path: Path, lane: type[Keeper]
) -> None:
    """By the callback and the path within its state."""
    one = runs.prepare(runs.Case(), tmp_path, callbacks=[lane(lambda steps: {"where": {"it": Unstorable()}})])
    with pytest.raises(UnstorableState, match=rf"{lane.__name__}\.where\.it\b.*Unstorable"):
        one.trainer.train()
    assert one.net.losses == []


@pytest.mark.parametrize(("lane", "how"), [(Beside, "cannot be stored"), (Beside, "raises"), (Within, "raises")])
@pytest.mark.parametrize("policy", ["fatal", "disable"])
def test_the_state_of_a_callback_that_fails_later_is_a_failure_of_the_callback(
    runs: Any, tmp_path: Path, lane: type[Keeper], how: str, policy: Any
) -> None:
    """As of a hook: by its policy it ends the run, as itself, or it is disabled, and all else goes on."""

    def state(steps: int) -> Any:
        if steps >= 6:
            if how == "raises":
                return 1 / 0
            return {"it": Unstorable()}
        return {"steps": steps}

    sink = Memory()
    saves = Checkpoints(every_steps=3, keep_last=9, when_busy="wait", at_end=False)
    callback = (lane(state), Delivery(on_error=policy, overflow="block"))
    one = runs.prepare(runs.Case(), tmp_path, callbacks=[callback], checkpoints=saves, sinks=[sink])
    store = CheckpointStore(tmp_path / "checkpoints")
    if policy == "fatal":
        with pytest.raises(ZeroDivisionError if how == "raises" else UnstorableState):
            one.trainer.train()
        # What lacks something that must not be missed is none to go on from.
        assert [name.step for name in store.names()] == [3]
    else:
        assert one.trainer.train().status == "finished"
        assert [name.step for name in store.names()] == [3, 6, 9, 12, 15, 18]
        assert {event.observer: event.during for event in sink.of(ObserverFailed)} == {lane.__name__: "state_dict"}
        last = runs.attempt(runs.Case(), tmp_path, resume="auto")
        assert last.result.global_step == 18


def test_a_callback_that_fails_leaves_no_checkpoint_without_its_state(runs: Any, tmp_path: Path) -> None:
    """Its hook has raised, and the loop hears of it some checkpoints later: a resumed run goes on from one before."""
    case = runs.Case()
    one = runs.prepare(case, tmp_path, checkpoints=Checkpoints(every_steps=1, keep_last=9, when_busy="wait"))
    (observed,) = (callback for callback in one.callbacks if type(callback).__name__ == "Observed")
    hook = observed.on_end_train_step

    def fail(global_step: int, *outputs: Any) -> None:
        if global_step == 8:
            raise runs.Crash
        hook(global_step, *outputs)

    observed.on_end_train_step = fail
    with pytest.raises(runs.Crash):
        one.trainer.train()
    last = runs.attempt(case, tmp_path, resume="auto")
    assert last.net.losses[0][0] == 8
    runs.assert_continues(last, tmp_path, runs.straight(case))


def test_a_mistyped_path_leaves_a_run_that_is_over_as_it_is(runs: Any, tmp_path: Path) -> None:
    """No attempt begins only to say so: the run stays finished, and nothing in its folder changes."""
    folder = tmp_path / "run"
    assert runs.prepare(runs.Case(), folder).trainer.train().status == "finished"

    def contents() -> dict[Path, bytes]:
        """But for the lock, which says who had it last."""
        return {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file() and path.suffix != ".lock"}

    before = contents()
    for resume in ("nowhere/x", "step-99.a1"):
        with pytest.raises(CheckpointNotFound):
            runs.prepare(runs.Case(), folder, resume=resume).trainer.train()
        assert contents() == before
