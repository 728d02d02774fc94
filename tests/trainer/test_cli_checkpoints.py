"""``stagecast checkpoints``: what it lists, verifies and exports, of checkpoints that real runs have made."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import events.checkpoint.files
from events.checkpoint import disk, packing, packing_types
from events.checkpoint.files import read_manifest
from events.checkpoint.lineage import AttemptNote
from events.checkpoint.manifest import CheckpointName, encode_manifest
from events.checkpoint.remote import RemoteStore
from events.checkpoint.store import CheckpointStore, Upload
from trainer import CallbackInterface, Checkpoints, ModuleInterface, Trainer, TrainerArguments
from trainer.cli.main import main

ROOT = Path(__file__).parents[2]


class Tied(ModuleInterface):
    """A regression of which two layers share a weight; with an integer buffer, and one without elements."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(16, 4, generator=generator)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.body = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.register_buffer("none", torch.empty(0, 3))

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        return [torch.optim.Adam([one for one in self.parameters() if one.requires_grad], lr=0.01)], []

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        return self.rows.split(batch_size)

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
        return self.rows.split(batch_size)

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return (self.body(self.second(self.first(batch))) - batch.sum(1, keepdim=True)).square().mean()

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return self.train_step(global_step, batch, device)


def train(folder: Path, module: ModuleInterface | None = None, **options: Any) -> ModuleInterface:
    """Train for 8 steps of 2 epochs, with checkpoints after steps 3 and 6 and at the end; returns the module."""
    module = module if module is not None else Tied()
    own = {"checkpoints": Checkpoints(every_steps=3, best="val_loss", keep_last=9, when_busy="wait")} | options
    arguments = TrainerArguments(epochs=2, train_batch_size=4, device="cpu")
    result = Trainer(module, arguments, sinks=[], run_id="the-run", run_dir=folder, **own).train()
    assert result.status == "finished"
    return module


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two attempts: the second one went back to step 3."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder)
    train(folder, resume=folder / "checkpoints" / "step-3.a1")
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def upload(run: Path, tmp_path: Path) -> str:
    """Where two of its checkpoints were uploaded to, in parts of 8 kB."""
    url = f"file://{tmp_path}/store/the-run"
    store, remote = CheckpointStore(run / "checkpoints"), RemoteStore(url)
    remote.note(store.attempts().values())
    for name in (CheckpointName(3, 1), CheckpointName(8, 2)):
        assert remote.upload(store.path(name), store.manifest(name), 8_192, lambda *_: None, lambda: False)
        store.mark_uploaded(name, Upload(remote.url_of(name), 1.0))
    return url


Stagecast = Callable[..., tuple[int, str, str]]


@pytest.fixture
def stagecast(capsys: pytest.CaptureFixture[str]) -> Stagecast:
    """Run the command; returns its exit code and what it printed."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main(["checkpoints", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def change_byte(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def make_newer(folder: Path) -> None:
    """As a later version would write its manifest."""
    body = encode_manifest(msgspec.structs.replace(read_manifest(folder), format=99))
    (folder / "manifest.json").write_bytes(body)


def same(found: dict[str, torch.Tensor], state: dict[str, Any]) -> bool:
    return found.keys() == state.keys() and all(
        found[key].dtype == state[key].dtype and torch.equal(found[key], state[key]) for key in state
    )


# ------------------------------------------------------------------------------------------------------- listing


def test_the_list_has_the_line_first_and_says_what_each_is(stagecast: Stagecast, run: Path) -> None:
    """Newest first, then superseded ones. Columns are aligned."""
    code, out, err = stagecast("list", run)
    head, *lines = out.splitlines()
    assert (code, err) == (0, "")
    names = [line.split()[0] for line in lines]
    assert names == ["step-8.a2", "step-6.a2", "step-4.a2", "step-3.a1", "step-8.a1", "step-6.a1", "step-4.a1"]
    assert [line[head.index("state") :].split(maxsplit=1) for line in lines] == [
        ["whole", "resumes here"],
        *[["whole", "in line"]] * 3,
        *[["whole", "superseded"]] * 3,
    ]
    manifest = read_manifest(run / "checkpoints" / "step-4.a2")
    fourth = lines[2]
    assert manifest.metric is not None
    assert f"val_loss={manifest.metric.value:.4f}  best " in fourth
    assert f"{manifest.nbytes / 1000:.0f} kB  val_loss" in fourth
    assert fourth.index("val_loss") == head.index("metric")
    assert fourth.index("kB") + 2 == head.index("size") + 4
    assert "steps" in lines[3]


@pytest.mark.parametrize("path", ["run", "run/", "run/checkpoints"])
def test_a_run_is_found_by_its_folder_or_that_of_its_checkpoints(stagecast: Stagecast, run: Path, path: str) -> None:
    """Relative to the working directory; also a copy of only the checkpoints."""
    (run / "run.lock").unlink()
    code, out, _ = stagecast("list", path, "--json")
    assert (code, len(json.loads(out))) == (0, 7)


def test_json_has_all_fields_for_scripts(stagecast: Stagecast, run: Path, upload: str) -> None:
    """One array of flat objects, in the same order."""
    code, out, _ = stagecast("list", run, "--json")
    rows = json.loads(out)
    manifest = read_manifest(run / "checkpoints" / "step-8.a2")
    assert manifest.metric is not None
    assert code == 0
    assert rows[0] == {
        "name": "step-8.a2",
        "path": str(run / "checkpoints" / "step-8.a2"),
        "state": "whole",
        "problem": None,
        "in_line": True,
        "resumes": True,
        "uploaded": f"{upload}/step-8.a2",
        "step": 8,
        "attempt": 2,
        "epoch": manifest.epoch,
        "time": manifest.time,
        "nbytes": manifest.nbytes,
        "metric": {"name": "val_loss", "value": manifest.metric.value, "mode": "min"},
        "reasons": manifest.reasons,
        "run_id": "the-run",
        "module": manifest.module,
    }
    assert [(row["resumes"], row["in_line"]) for row in rows] == [(True, True), *[(False, True)] * 3] + [
        (False, False)
    ] * 3
    assert [row["uploaded"] is not None for row in rows] == [True, False, False, True, False, False, False]


def test_the_list_says_what_was_uploaded_and_where_to(stagecast: Stagecast, run: Path, upload: str) -> None:
    """The address appears once, below."""
    _, out, _ = stagecast("list", run)
    lines = out.splitlines()
    assert [", uploaded" in line for line in lines[1:-1]] == [True, False, False, True, False, False, False]
    assert lines[-1] == f"uploaded to {upload}"


def test_what_is_damaged_or_too_new_is_listed_with_the_reason(stagecast: Stagecast, run: Path) -> None:
    """Resuming falls back from damage."""
    folder = run / "checkpoints"
    os.truncate(folder / "step-8.a2" / "tensors.safetensors", 100)
    (folder / "step-6.a2" / "state.msgpack").unlink()
    change_byte(folder / "step-8.a1" / "manifest.json", 40)
    make_newer(folder / "step-6.a1")
    code, out, err = stagecast("list", run)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert " damaged  in line" in lines[1]
    assert lines[2].startswith("    tensors.safetensors has 100 bytes instead of ")
    assert lines[4] == "    state.msgpack cannot be read: No such file or directory"
    assert lines[5].startswith("step-4.a2 ")
    assert lines[5].endswith(" whole    resumes here")
    assert " damaged  superseded" in lines[7]
    assert "does not match its own hash" in lines[8]
    assert " newer    superseded" in lines[9]
    assert "has format 99" in lines[10]
    _, out, _ = stagecast("list", run, "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["step-8.a1"]["state"] == "damaged"
    assert rows["step-8.a1"]["time"] is rows["step-8.a1"]["nbytes"] is rows["step-8.a1"]["reasons"] is None
    assert rows["step-6.a1"]["state"] == "newer"
    assert "format 99" in rows["step-6.a1"]["problem"]


def test_nothing_resumes_past_a_newer_format(stagecast: Stagecast, run: Path) -> None:
    """As the trainer refuses it, rather than to lose what a later version did."""
    make_newer(run / "checkpoints" / "step-8.a2")
    _, out, _ = stagecast("list", run, "--json")
    assert [row["resumes"] for row in json.loads(out)] == [False] * 7


def test_a_run_that_began_anew_resumes_from_none(stagecast: Stagecast, run: Path) -> None:
    """Its newest attempt has no checkpoint yet, and none that it came from."""
    CheckpointStore(run / "checkpoints").prepare(AttemptNote(3, None))
    _, out, _ = stagecast("list", run, "--json")
    assert [(row["resumes"], row["in_line"]) for row in json.loads(out)] == [(False, False)] * 7


def test_the_list_has_a_metric_column_only_with_a_metric(stagecast: Stagecast, tmp_path: Path) -> None:
    """An empty column is not shown."""
    train(tmp_path / "plain", checkpoints=Checkpoints())
    _, out, _ = stagecast("list", tmp_path / "plain")
    assert out.splitlines()[0].split() == ["checkpoint", "step", "age", "size", "taken", "for", "state", "line"]


def test_a_folder_without_checkpoints_is_reported(stagecast: Stagecast, tmp_path: Path) -> None:
    """An empty one, and that of a run which took none."""
    (tmp_path / "empty").mkdir()
    train(tmp_path / "bare", checkpoints=False)
    for path in (tmp_path / "empty", tmp_path / "bare", f"file://{tmp_path}/empty"):
        assert stagecast("list", path) == (0, f"no checkpoints in {path}\n", "")
        assert stagecast("list", path, "--json") == (0, "[]\n", "")
        assert stagecast("verify", path) == (0, f"no checkpoints in {path}\n", "")


def test_a_missing_or_unrelated_folder_is_an_error(stagecast: Stagecast, tmp_path: Path) -> None:
    """One sentence, and exit code 1."""
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    for path, why in {
        tmp_path / "absent": "does not exist",
        tmp_path / "file": "is not a folder",
        tmp_path / "other": "is not a run folder, and holds no checkpoints",
        tmp_path / "step-3.a1": "does not exist",
        f"file://{tmp_path}/absent": "does not exist",
    }.items():
        for action in (["list"], ["verify"], ["export"]):
            code, out, err = stagecast(*action, path, *(["out"] if action == ["export"] else []))
            assert (code, out) == (1, "")
            assert err == f"stagecast checkpoints: error: {path} {why}\n"


def test_an_address_that_is_none_is_an_error(stagecast: Stagecast) -> None:
    """With the error of the address's parser, without possible secrets."""
    code, out, err = stagecast("list", "s3://key:secret@bucket/run")
    assert (code, out) == (1, "")
    assert err.startswith("stagecast checkpoints: error: the s3:// URL for checkpoints contains a user")
    assert "secret@" not in err
    for action in (["list"], ["verify"]):  # with one slash it is a path
        assert "s3:/...@bucket/run does not exist" in stagecast(*action, "s3:/key:secret@bucket/run")[2]


# -------------------------------------------------------------------------------------------------- verification


def test_verify_reads_every_byte(stagecast: Stagecast, run: Path) -> None:
    """A changed byte does not change the sizes: the list misses it, this finds it and continues with the next."""
    code, out, _ = stagecast("verify", run)
    assert code == 0
    lines = out.splitlines()
    nbytes = read_manifest(run / "checkpoints" / "step-8.a2").nbytes
    assert lines[0].startswith(f"step-8.a2  whole  {nbytes / 1000:.0f} kB in ")
    assert len(lines) == 7
    change_byte(run / "checkpoints" / "step-6.a2" / "tensors.safetensors")
    _, out, _ = stagecast("list", run)
    assert "damaged" not in out
    code, out, err = stagecast("verify", run)
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[1].startswith("step-6.a2  damaged  tensors.safetensors holds other bytes than were written")
    assert [line.split()[1] for line in lines] == ["whole", "damaged", *["whole"] * 5]


def test_verify_takes_names(stagecast: Stagecast, run: Path) -> None:
    """Those, in that order, once each; what is not there is an error before anything is read."""
    change_byte(run / "checkpoints" / "step-6.a2" / "tensors.safetensors")
    code, out, _ = stagecast("verify", run, "step-3.a1", "step-8.a2", "step-3.a1")
    assert (code, [line.split()[0] for line in out.splitlines()]) == (0, ["step-3.a1", "step-8.a2"])
    assert stagecast("verify", run, "step-3.a1", "step-5.a1") == (
        1,
        "",
        f"stagecast checkpoints: error: there is no checkpoint step-5.a1 in {run}\n",
    )


def test_a_newer_format_cannot_be_verified(stagecast: Stagecast, run: Path) -> None:
    """So it does not pass."""
    make_newer(run / "checkpoints" / "step-3.a1")
    code, out, _ = stagecast("verify", run, "step-3.a1")
    assert code == 1
    assert out.startswith("step-3.a1  newer  manifest.json has format 99")


def test_one_checkpoint_is_a_path_too_even_under_another_name(stagecast: Stagecast, run: Path, tmp_path: Path) -> None:
    """In the run folder, or copied elsewhere."""
    path = run / "checkpoints" / "step-3.a1"
    copy = shutil.copytree(path, tmp_path / "the-best")
    for one in (path, copy):
        code, out, _ = stagecast("verify", one)
        assert (code, len(out.splitlines())) == (0, 1)
        assert out.startswith("step-3.a1  whole  ")
        _, out, _ = stagecast("list", one, "--json")
        assert [(row["name"], row["path"]) for row in json.loads(out)] == [("step-3.a1", str(one))]
    change_byte(copy / "state.msgpack")
    code, out, _ = stagecast("verify", copy)
    assert (code, out.split()[1]) == (1, "damaged")
    assert stagecast("verify", path)[0] == 0
    code, _, err = stagecast("verify", path, "step-8.a2")
    assert (code, "no checkpoint step-8.a2" in err) == (1, True)


def test_what_is_deleted_meanwhile_is_not_damaged(
    stagecast: Stagecast, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running run deletes old ones."""
    store = CheckpointStore(run / "checkpoints")
    real_open = events.checkpoint.files.open_below

    def open_below(root: Path, name: str) -> int:
        if "step-6.a2" in name:
            store.remove(CheckpointName(6, 2))
        return real_open(root, name)

    monkeypatch.setattr(events.checkpoint.files, "open_below", open_below)
    code, out, err = stagecast("verify", run)
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == "step-6.a2  deleted meanwhile"


def test_a_deleted_one_is_not_listed(stagecast: Stagecast, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if its name was read just before."""
    names = CheckpointStore(run / "checkpoints").names()
    monkeypatch.setattr(CheckpointStore, "names", lambda self: names)
    shutil.rmtree(run / "checkpoints" / "step-6.a2")
    code, out, _ = stagecast("list", run)
    assert (code, "step-6.a2" in out) == (0, False)


def test_uploaded_checkpoints_are_listed_and_verified_where_they_are(
    stagecast: Stagecast, upload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is downloaded to the disk; parts are read piece by piece."""
    monkeypatch.setattr("events.checkpoint.remote._READ_BYTES", 1_000)
    monkeypatch.setattr(disk, "write_parts", None)
    _, out, _ = stagecast("list", upload, "--json")
    rows = json.loads(out)
    assert [(row["name"], row["state"], row["path"]) for row in rows] == [
        ("step-8.a2", "whole", f"{upload}/step-8.a2"),
        ("step-3.a1", "whole", f"{upload}/step-3.a1"),
    ]
    assert [(row["resumes"], row["in_line"]) for row in rows] == [(True, True), (False, True)]
    code, out, _ = stagecast("verify", f"{upload}/")
    assert (code, [line.split()[:2] for line in out.splitlines()]) == (
        0,
        [["step-8.a2", "whole"], ["step-3.a1", "whole"]],
    )
    folder = tmp_path / "store" / "the-run" / "step-3.a1"
    parts = sorted(folder.glob("tensors.safetensors.*"))
    assert len(parts) > 1
    change_byte(parts[0])
    assert stagecast("list", f"{upload}/step-3.a1")[1].count("whole") == 1
    code, out, _ = stagecast("verify", upload)
    assert (code, out.splitlines()[1]) == (
        1,
        "step-3.a1  damaged  tensors.safetensors holds other bytes than were written",
    )


def test_lost_and_cut_objects_are_damage(stagecast: Stagecast, upload: str, tmp_path: Path) -> None:
    """The list sees it, by their sizes."""
    folder = tmp_path / "store" / "the-run"
    last = sorted((folder / "step-8.a2").glob("tensors.safetensors.*"))[-1]
    os.truncate(last, 10)
    (folder / "step-3.a1" / "state.msgpack").unlink(missing_ok=True)
    for part in (folder / "step-3.a1").glob("state.msgpack.*"):
        part.unlink()
    code, out, _ = stagecast("list", upload)
    lines = out.splitlines()
    assert code == 0
    assert lines[2].startswith(f"    {last.name} has 10 bytes instead of ")
    assert lines[4].startswith("    state.msgpack")
    assert "state.msgpack.00000-of-00003 is missing" in lines[4]
    assert stagecast("verify", upload)[0] == 1


def test_one_uploaded_checkpoint_is_an_address_too(stagecast: Stagecast, upload: str, tmp_path: Path) -> None:
    """And one that is not there is an error."""
    code, out, _ = stagecast("verify", f"{upload}/step-3.a1")
    assert (code, out.split()[:2], len(out.splitlines())) == (0, ["step-3.a1", "whole"], 1)
    code, _, err = stagecast("verify", f"{upload}/step-5.a1")
    assert (code, err) == (1, f"stagecast checkpoints: error: {upload}/step-5.a1 does not exist\n")


# -------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("where", ["run", "run/checkpoints", "run/checkpoints/step-8.a2", "upload"])
def test_an_export_is_loaded_as_a_state_dict(
    stagecast: Stagecast, run: Path, upload: str, where: str, tmp_path: Path
) -> None:
    """The newest of the line, by the names of the state dict, tied tensors under both of theirs."""
    code, out, err = stagecast("export", upload if where == "upload" else where, "weights.safetensors")
    assert (code, err) == (0, "")
    path = tmp_path / "weights.safetensors"
    assert out == f"weights.safetensors  12 tensors of step-8.a2  {path.stat().st_size / 1000:.1f} kB\n"
    module = Tied()
    module.load_state_dict(load_file(path))
    expected = Tied()
    code, _, _ = stagecast("list", run)
    Trainer(
        expected,
        TrainerArguments(epochs=2, train_batch_size=4, device="cpu"),
        sinks=[],
        run_dir=tmp_path / "again",
        checkpoints=False,
        resume=run / "checkpoints" / "step-8.a2",
    ).train()
    assert same(load_file(path), expected.state_dict())
    assert same(module.state_dict(), expected.state_dict())
    assert module.first.weight is module.second.weight
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "checkpoint": "the-run/step-8.a2"}


def test_an_export_takes_the_one_that_is_named(stagecast: Stagecast, run: Path) -> None:
    """Also a superseded one."""
    first, third = CheckpointName(8, 1), CheckpointName(3, 1)
    for name in (first, third):
        code, out, _ = stagecast("export", run, f"{name}.safetensors", "--name", name)
        assert (code, f" of {name} " in out) == (0, True)
    at_8, at_3 = (load_file(f"{name}.safetensors") for name in (first, third))
    assert int(at_8["body.0.num_batches_tracked"]) > int(at_3["body.0.num_batches_tracked"])
    assert not torch.equal(at_8["first.weight"], at_3["first.weight"])
    code, _, err = stagecast("export", run, "x", "--name", "step-5.a1")
    assert (code, "no checkpoint step-5.a1" in err) == (1, True)


def test_an_export_falls_back_to_the_newest_whole_one(stagecast: Stagecast, run: Path) -> None:
    """With the reason; but not from a named one, nor to a superseded one."""
    folder = run / "checkpoints"
    change_byte(folder / "step-8.a2" / "tensors.safetensors")
    os.truncate(folder / "step-6.a2" / "state.msgpack", 10)
    code, out, err = stagecast("export", run, "a.safetensors")
    assert code == 0
    assert " of step-4.a2 " in out
    first, second = err.splitlines()
    assert first.startswith("stagecast checkpoints: step-8.a2 is damaged and skipped: tensors.safetensors holds")
    assert second.startswith("stagecast checkpoints: step-6.a2 is damaged and skipped: state.msgpack has 10 bytes")
    code, out, err = stagecast("export", run, "b.safetensors", "--name", "step-8.a2")
    assert (code, out, "holds other bytes" in err) == (1, "", True)
    assert stagecast("export", folder / "step-8.a2", "b.safetensors")[0] == 1
    for name in ("step-4.a2", "step-3.a1"):
        (folder / name / "manifest.json").unlink()
    code, out, err = stagecast("export", run, "b.safetensors")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (
        f"stagecast checkpoints: error: {run} has no valid checkpoint from which its run would resume; use --name"
    )
    assert not Path("b.safetensors").exists()


def test_an_export_does_not_fall_back_from_a_newer_format(stagecast: Stagecast, run: Path) -> None:
    """Old weights would be mistaken for the newest."""
    make_newer(run / "checkpoints" / "step-8.a2")
    code, out, err = stagecast("export", run, "a.safetensors")
    assert (code, out, "has format 99" in err) == (1, "", True)


def test_an_existing_file_is_replaced_only_by_force(stagecast: Stagecast, run: Path) -> None:
    """It is not even read for nothing."""
    out = Path("weights.safetensors")
    out.write_text("precious")
    code, said, err = stagecast("export", run, out)
    assert (code, said) == (1, "")
    assert err == (
        "stagecast checkpoints: error: weights.safetensors exists; use another name, or --force to replace it\n"
    )
    assert out.read_text() == "precious"
    assert stagecast("export", run, out, "--force")[0] == 0
    assert len(load_file(out)) == 12


def test_what_appears_while_the_file_is_written_is_not_replaced(
    stagecast: Stagecast, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has created the file meanwhile."""
    real = disk.write_parts

    def write_parts(*args: Any) -> tuple[int, str]:
        Path("weights.safetensors").write_text("precious")
        return real(*args)

    monkeypatch.setattr(disk, "write_parts", write_parts)
    code, _, err = stagecast("export", run, "weights.safetensors")
    assert (code, "exists; use another name" in err) == (1, True)
    assert Path("weights.safetensors").read_text() == "precious"
    assert sorted(os.listdir()) == ["run", "weights.safetensors"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_export_leaves_what_was_there(
    stagecast: Stagecast, run: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """A full disk, and Ctrl-C: nothing half-written, under no name."""
    Path("old.safetensors").write_text("precious")

    def fsync(fd: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fsync)
    expected = 130 if isinstance(error, KeyboardInterrupt) else 1
    for name in ("old.safetensors", "new.safetensors"):
        code, out, err = stagecast("export", run, name, "--force")
        assert (code, out, len(err.splitlines())) == (expected, "", 1)
    assert sorted(os.listdir()) == ["old.safetensors", "run"]
    assert Path("old.safetensors").read_text() == "precious"


def test_a_place_that_cannot_be_written_to_is_named(stagecast: Stagecast, run: Path) -> None:
    """No folder, a folder, and a checkpoint: its own tensor file would be replaced by an export to it."""
    inside = run / "checkpoints" / "step-8.a2"
    for path, why in {
        "absent/out": "absent is not a folder; create it, or use another name",
        "run": "run is a folder; name a file in it",
        inside / "tensors.safetensors": f"{inside} is a checkpoint, which an export would damage; use another folder",
    }.items():
        code, out, err = stagecast("export", run, path, "--force")
        assert (code, out, err) == (1, "", f"stagecast checkpoints: error: {why}\n")
    assert stagecast("verify", run)[0] == 0


class Odd(Tied):
    """One that has more to keep than its state dict."""

    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.more = more

    def get_state(self) -> dict[str, Any]:
        return {**self.state_dict(), **self.more}

    def update_state(self, state: dict[str, Any]) -> None:
        self.load_state_dict({key: state[key] for key in self.state_dict()})


def test_values_other_than_tensors_are_skipped_and_reported(stagecast: Stagecast, tmp_path: Path) -> None:
    """Containers are searched; one without any tensor is skipped as a whole."""
    more = {
        "vocabulary": {"a": 1, "b": [2, 3]},
        "seen": 5,
        "average": OrderedDict({"first.weight": torch.ones(2), "decay": 0.9}),
        "pair": (torch.zeros(1), torch.eye(2).to(torch.bfloat16), "x"),
        "a.b": torch.ones(3, dtype=torch.complex64),
        "list": [],
    }
    module = train(tmp_path / "odd", Odd(**more))
    code, out, err = stagecast("export", "odd", "odd.safetensors")
    assert (code, " 16 tensors of step-8.a1 " in out) == (0, True)
    assert err == (
        "stagecast checkpoints: skipped values that are not tensors: vocabulary, seen, average.decay, pair.2, list\n"
    )
    expected = module.state_dict() | {
        "average.first.weight": torch.ones(2),
        "pair.0": torch.zeros(1),
        "pair.1": torch.eye(2).to(torch.bfloat16),
        "a.b": torch.ones(3, dtype=torch.complex64),
    }
    assert same(load_file("odd.safetensors"), expected)


def test_what_safetensors_cannot_name_is_an_error_that_says_which(stagecast: Stagecast, tmp_path: Path) -> None:
    """All of them at once, and no file is written."""
    half = torch.ones(2, 2, dtype=torch.float16).view(torch.complex32)
    train(tmp_path / "odd", Odd(turns=torch.ones(2, dtype=torch.complex128), half=half))
    code, out, err = stagecast("export", "odd", "odd.safetensors")
    assert (code, out) == (1, "")
    assert "turns (complex128), half (complex32)" in err
    train(tmp_path / "reserved", Odd(__metadata__=torch.ones(1)))
    code, _, err = stagecast("export", "reserved", "odd.safetensors")
    assert (code, "__metadata__ (a reserved name)" in err) == (1, True)
    train(tmp_path / "twice", Odd(**{"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}))
    code, _, err = stagecast("export", "twice", "odd.safetensors")
    assert (code, "two tensors" in err, "'a.b'" in err) == (1, True, True)
    assert sorted(os.listdir()) == ["odd", "reserved", "twice"]


class Vocabulary:
    """A type that only the user's program knows."""


class Reader(CallbackInterface):
    """A callback that keeps one."""

    def state_dict(self) -> dict[str, Any]:
        return {"vocabulary": Vocabulary()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_types_that_only_the_users_program_knows_are_not_needed(
    stagecast: Stagecast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those in the state of callbacks nor the module's own."""
    monkeypatch.setattr(packing_types, "registered", dict(packing_types.registered))
    monkeypatch.setattr(packing_types, "registered_names", dict(packing_types.registered_names))
    packing.register(Vocabulary, "tests.Vocabulary", lambda one: {"words": ["a"]}, lambda plain: Vocabulary())
    train(tmp_path / "own", Odd(words=Vocabulary()), callbacks=[Reader()])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="registered"):
        packing.decode((tmp_path / "own/checkpoints/step-8.a1/state.msgpack").read_bytes(), lambda name: name)
    code, _, err = stagecast("export", "own", "own.safetensors")
    assert (code, err) == (0, "stagecast checkpoints: skipped values that are not tensors: words\n")
    assert len(load_file("own.safetensors")) == 12


class Wordless(Odd):
    """One whose state has no tensors at all."""

    def get_state(self) -> dict[str, Any]:
        return {"seen": 1}

    def update_state(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("layers", [4, 60])
def test_tied_tensors_fill_no_disk(
    stagecast: Stagecast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    """They are written under each of their names, unless these are very many or the disk has no room for them."""
    tied = Tied()
    tied.more = nn.ModuleList([nn.Linear(100, 100)] * layers)
    train(tmp_path / "tied", tied)
    code, _, err = stagecast("export", "tied", "all.safetensors")
    assert (code, (tmp_path / "all.safetensors").exists()) == ((0, True) if layers < 32 else (1, False))
    assert ("so many names" in err) == (layers > 32)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 100_000))  # type: ignore[attr-defined]
    code, _, err = stagecast("export", "tied", "more.safetensors")
    assert (code, (tmp_path / "more.safetensors").exists()) == (1, False)


def test_a_module_without_tensors_has_nothing_to_export(stagecast: Stagecast, tmp_path: Path) -> None:
    """Rather an error than an empty file."""
    train(tmp_path / "none", Wordless())
    code, out, err = stagecast("export", "none", "none.safetensors")
    assert (code, out, "holds no tensors of the module" in err) == (1, "", True)


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.cold_start
def test_nothing_but_training_waits_for_torch(script: Any, run: Path, upload: str) -> None:
    """Lists and exports come at once; obstore is imported for an address only."""
    code, out, err = script(
        f"import sys\n"
        f"from trainer.cli.main import main\n"
        f"try:\n"
        f"    main(['--help'])\n"
        f"except SystemExit:\n"
        f"    pass\n"
        f"assert 'events.checkpoint.remote' not in sys.modules\n"
        f"codes = [main(['checkpoints', *one]) for one in (['list', {str(run)!r}], ['verify', {str(run)!r}],\n"
        f"    ['export', {str(run)!r}, 'out.safetensors'])]\n"
        f"print(codes, 'torch' in sys.modules, 'rich' in sys.modules, 'obstore' in sys.modules)\n"
    ).end()
    assert (code, out.splitlines()[-1], err) == (0, "[0, 0, 0] False False False", "")


def _environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM", "PYTHONUNBUFFERED")}
    return kept | {"PYTHONPATH": str(ROOT)} | more


def _in_terminal(*arguments: str, **environment: str) -> str:
    """What the command prints to a terminal."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "trainer.cli.main", "checkpoints", *arguments]
    with subprocess.Popen(command, stdout=follower, stderr=follower, env=_environment(**environment)) as process:
        os.close(follower)
        text = b""
        while True:
            try:
                piece = os.read(leader, 65_536)
            except OSError:  # the other side is closed
                break
            if not piece:
                break
            text += piece
        assert process.wait(50) == 0
    os.close(leader)
    return text.decode()


def test_a_terminal_shows_colours_unless_they_are_disabled(run: Path) -> None:
    """The words are the same: colours only help."""
    (run / "checkpoints" / "step-6.a2" / "manifest.json").unlink()
    coloured = _in_terminal("list", str(run), TERM="xterm").splitlines()
    assert coloured[0].startswith("\x1b[1mcheckpoint")
    assert coloured[1].startswith("\x1b[32mstep-8.a2")
    assert coloured[2].startswith("\x1b[31mstep-6.a2")
    assert coloured[3].startswith("\x1b[31m    manifest.json is missing")
    assert coloured[4].startswith("step-4.a2")
    assert coloured[6].startswith("\x1b[2mstep-8.a1")
    assert all(line.endswith("\x1b[m") for line in coloured if "\x1b" in line)
    for environment in ({"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in _in_terminal("list", str(run), **environment)


def test_names_in_any_script_are_shown_as_far_as_the_output_can(tmp_path: Path, run: Path) -> None:
    """An encoding that lacks them is not an error."""
    folder = run.rename(tmp_path / "läufe\x1b[31m\n\udcff")  # the last one is no Unicode, but the byte 0xff
    command = [sys.executable, "-m", "trainer.cli.main", "checkpoints"]
    environment = _environment(PYTHONIOENCODING="ascii")
    done = subprocess.run([*command, "list", folder, "--json"], env=environment, capture_output=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["path"] == str(folder / "checkpoints" / "step-8.a2")
    out = tmp_path / "ä\x1b.safetensors"
    done = subprocess.run([*command, "export", folder, out], env=environment, capture_output=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\xe4\\x1b.safetensors  12 tensors" in done.stdout
    assert b"\x1b" not in done.stdout
    done = subprocess.run([*command, "list", folder / "ä\n"], env=environment, capture_output=True, timeout=50)
    assert (done.returncode, len(done.stderr.splitlines()), b"\x1b" in done.stderr) == (1, 1, False)
    assert b"\\xe4\\n does not exist" in done.stderr


def test_a_closed_pipe_causes_no_traceback(run: Path) -> None:
    """As `stagecast checkpoints list ... | head -0` does."""
    command = [sys.executable, "-m", "trainer.cli.main", "checkpoints", "list", str(run)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=_environment()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        assert (process.wait(50), errors) == (1, "")
