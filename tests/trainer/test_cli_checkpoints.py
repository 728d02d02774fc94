"""``stagecast checkpoints``: it lists, verifies and exports the checkpoints of real runs."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from support.checkpoints import put
from support.command import Stagecast, run_process, started
from support.scripts import Start
from support.training import Batch, Net
from torch import nn

import events.checkpoint.files
from events.checkpoint import disk, packing, packing_types
from events.checkpoint.files import read_manifest
from events.checkpoint.lineage import AttemptNote
from events.checkpoint.manifest import CheckpointName, Metric, encode_manifest
from events.checkpoint.remote import RemoteStore
from events.checkpoint.store import CheckpointStore, Upload
from trainer import CallbackInterface, Checkpoints, Trainer, TrainerArguments


class Tied(Net):
    """A regression of which two layers share a weight; with an integer buffer, and one without elements.

    Args:
        more: Values in its state beside the state dict.
    """

    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("none", torch.empty(0, 3))
        self.extra = more

    def forward_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = batch
        return super().forward_loss((self.norm(self.second(self.first(x))), y))

    def get_state(self) -> dict[str, Any]:
        return {**self.state_dict(), **self.extra}

    def update_state(self, state: dict[str, Any]) -> None:
        self.load_state_dict({key: state[key] for key in self.state_dict()})


def train(folder: Path | str, module: Tied | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """Train for 8 steps of 2 epochs, with checkpoints after steps 3 and 6 and at the end; returns the state dict."""
    module = module or Tied()
    own = {"checkpoints": Checkpoints(every_steps=3, best="val_loss", keep_last=9, when_busy="wait")} | options
    arguments = TrainerArguments(epochs=2, train_batch_size=4, device="cpu")
    Trainer(module, arguments, sinks=[], run_id="the-run", run_dir=folder, **own).train()
    return module.state_dict()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of two attempts, of which the second one went back to step 3; and its final state dict."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder)
    return folder, train(folder, resume=folder / "checkpoints" / "step-3.a1")


@pytest.fixture
def run(original: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(original[0], tmp_path / "run"))


@pytest.fixture
def upload(run: Path, tmp_path: Path) -> str:
    """The address of two of its checkpoints, uploaded in parts of 4 kB."""
    url = f"file://{tmp_path}/store/the-run"
    store, remote = CheckpointStore(run / "checkpoints"), RemoteStore(url)
    remote.note(store.attempts().values())
    for name in (CheckpointName(3, 1), CheckpointName(8, 2)):
        assert put(remote, run / "checkpoints", store.manifest(name), 4_096)
        store.mark_uploaded(name, Upload(remote.url_of(name), 1.0))
    return url


@pytest.fixture
def checkpoints(stagecast: Stagecast) -> Stagecast:
    return functools.partial(stagecast, "checkpoints")


def change_byte(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def make_newer(folder: Path) -> None:
    """Give a checkpoint the manifest of a later version."""
    body = encode_manifest(msgspec.structs.replace(read_manifest(folder), format=99))
    (folder / "manifest.json").write_bytes(body)


def same(found: dict[str, torch.Tensor], state: dict[str, Any]) -> bool:
    return found.keys() == state.keys() and all(
        found[key].dtype == state[key].dtype and torch.equal(found[key], state[key]) for key in state
    )


TIED = (
    "stagecast checkpoints: tied tensors are written once, for safetensors.torch.load_model and from_pretrained:"
    " second.weight is first.weight; for load_state_dict use --every-name\n"
)


def words(text: str, at: int) -> list[str]:
    """One word of each line."""
    return [line.split()[at] for line in text.splitlines()]


# ------------------------------------------------------------------------------------------------------- listing

NAMES = ["step-8.a2", "step-6.a2", "step-4.a2", "step-3.a1", "step-8.a1", "step-6.a1", "step-4.a1"]
"""Those of the lineage, then the superseded ones, each from the newest."""


def test_the_list_has_the_lineage_first(checkpoints: Stagecast, run: Path) -> None:
    """Columns are aligned."""
    code, out, err = checkpoints("list", run)
    head, *lines = out.splitlines()
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in lines] == NAMES
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


def test_the_list_shows_what_was_uploaded_and_has_all_fields_as_json(
    checkpoints: Stagecast, run: Path, upload: str
) -> None:
    """The address is the last line of the table; JSON is one array of flat objects."""
    _, *lines, place = checkpoints("list", run).out.splitlines()
    uploaded = [True, False, False, True, False, False, False]
    assert [", uploaded" in line for line in lines] == uploaded
    assert place == f"uploaded to {upload}"
    code, out, _ = checkpoints("list", run, "--json")
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
    assert [row["name"] for row in rows] == NAMES
    assert [row["resumes"] for row in rows] == [True] + [False] * 6
    assert [row["in_line"] for row in rows] == [True] * 4 + [False] * 3
    assert [row["uploaded"] is not None for row in rows] == uploaded


def test_damaged_and_newer_checkpoints_are_listed_with_the_reason(checkpoints: Stagecast, run: Path) -> None:
    """Resuming falls back from damage."""
    folder = run / "checkpoints"
    os.truncate(folder / "step-8.a2" / "tensors.safetensors", 100)
    (folder / "step-6.a2" / "state.msgpack").unlink()
    change_byte(folder / "step-8.a1" / "manifest.json", 40)
    make_newer(folder / "step-6.a1")
    code, out, err = checkpoints("list", run)
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
    rows = {row["name"]: row for row in json.loads(checkpoints("list", run, "--json").out)}
    assert rows["step-8.a1"]["state"] == "damaged"
    assert rows["step-8.a1"]["time"] is rows["step-8.a1"]["nbytes"] is rows["step-8.a1"]["reasons"] is None
    assert rows["step-6.a1"]["state"] == "newer"
    assert "format 99" in rows["step-6.a1"]["problem"]


def test_a_run_resumes_from_none_before_a_newer_format_or_after_a_new_start(checkpoints: Stagecast, run: Path) -> None:
    """The trainer refuses to lose the work of a later version; a new attempt has no checkpoint yet."""
    make_newer(run / "checkpoints" / "step-8.a2")
    rows = json.loads(checkpoints("list", run, "--json").out)
    assert [row["resumes"] for row in rows] == [False] * 7
    CheckpointStore(run / "checkpoints").prepare(AttemptNote(3, None))
    rows = json.loads(checkpoints("list", run, "--json").out)
    assert [(row["resumes"], row["in_line"]) for row in rows] == [(False, False)] * 7


@pytest.mark.parametrize("path", ["run", "run/", "run/checkpoints"])
def test_a_run_is_found_by_its_folder_or_that_of_its_checkpoints(checkpoints: Stagecast, run: Path, path: str) -> None:
    """Relative to the working directory; also a copy of only the checkpoints."""
    (run / "run.lock").unlink()
    assert len(json.loads(checkpoints("list", path, "--json").out)) == 7


def test_columns_and_folders_may_be_empty(checkpoints: Stagecast, tmp_path: Path) -> None:
    """A run without a metric has no column for it; an empty folder and a run without checkpoints are no errors."""
    train("plain", checkpoints=Checkpoints())
    head = checkpoints("list", "plain").out.splitlines()[0].split()
    assert head == ["checkpoint", "step", "age", "size", "taken", "for", "state", "line"]
    (tmp_path / "empty").mkdir()
    train("bare", checkpoints=False)
    for path in ("empty", "bare", f"file://{tmp_path}/empty"):
        assert checkpoints("list", path) == (0, f"no checkpoints in {path}\n", "")
        assert checkpoints("list", path, "--json") == (0, "[]\n", "")
        assert checkpoints("verify", path) == (0, f"no checkpoints in {path}\n", "")


def test_a_missing_or_unrelated_folder_is_an_error(checkpoints: Stagecast, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    for path, why in {
        "absent": "does not exist",
        "file": "is not a folder",
        "other": "is not a run folder, and holds no checkpoints",
        "step-3.a1": "does not exist",
        f"file://{tmp_path}/absent": "does not exist",
        f"file://{tmp_path}/other/step-5.a1": "does not exist",
    }.items():
        for action in (["list"], ["verify"], ["export"]):
            ended = checkpoints(*action, path, *(["out"] if action == ["export"] else []))
            assert ended == (1, "", f"stagecast checkpoints: error: {path} {why}\n")


def test_an_invalid_address_is_an_error_without_its_secrets(checkpoints: Stagecast) -> None:
    code, out, err = checkpoints("list", "s3://key:secret@bucket/run")
    assert (code, out) == (1, "")
    assert err.startswith("stagecast checkpoints: error: the s3:// URL for checkpoints contains a user")
    assert "secret@" not in err
    assert "s3:/...@bucket/run does not exist" in checkpoints("list", "s3:/key:secret@bucket/run").err  # a path


# -------------------------------------------------------------------------------------------------- verification


def test_verify_reads_every_byte(checkpoints: Stagecast, run: Path) -> None:
    """A changed byte does not change the sizes: the list misses it; verify finds it and continues with the next."""
    code, out, _ = checkpoints("verify", run)
    nbytes = read_manifest(run / "checkpoints" / "step-8.a2").nbytes
    assert (code, words(out, 0)) == (0, NAMES)
    assert out.startswith(f"step-8.a2  whole  {nbytes / 1000:.0f} kB in ")
    change_byte(run / "checkpoints" / "step-6.a2" / "tensors.safetensors")
    assert "damaged" not in checkpoints("list", run).out
    code, out, err = checkpoints("verify", run)
    assert (code, err, words(out, 1)) == (1, "", ["whole", "damaged", *["whole"] * 5])
    assert "\nstep-6.a2  damaged  tensors.safetensors holds other bytes than were written" in out


def test_verify_takes_names(checkpoints: Stagecast, run: Path) -> None:
    """In their order, once each; a missing one is an error before anything is read; a newer format does not pass."""
    change_byte(run / "checkpoints" / "step-6.a2" / "tensors.safetensors")
    code, out, _ = checkpoints("verify", run, "step-3.a1", "step-8.a2", "step-3.a1")
    assert (code, words(out, 0)) == (0, ["step-3.a1", "step-8.a2"])
    missing = f"stagecast checkpoints: error: there is no checkpoint step-5.a1 in {run}\n"
    assert checkpoints("verify", run, "step-3.a1", "step-5.a1") == (1, "", missing)
    make_newer(run / "checkpoints" / "step-3.a1")
    code, out, _ = checkpoints("verify", run, "step-3.a1")
    assert code == 1
    assert out.startswith("step-3.a1  newer  manifest.json has format 99")


def test_a_path_may_be_one_checkpoint_even_under_another_name(
    checkpoints: Stagecast, run: Path, tmp_path: Path
) -> None:
    path = run / "checkpoints" / "step-3.a1"
    copy = shutil.copytree(path, tmp_path / "the-best")
    for one in (path, copy):
        code, out, _ = checkpoints("verify", one)
        assert (code, words(out, 0), words(out, 1)) == (0, ["step-3.a1"], ["whole"])
        rows = json.loads(checkpoints("list", one, "--json").out)
        assert [(row["name"], row["path"]) for row in rows] == [("step-3.a1", str(one))]
    change_byte(copy / "state.msgpack")
    code, out, _ = checkpoints("verify", copy)
    assert (code, words(out, 1)) == (1, ["damaged"])
    assert checkpoints("verify", path).code == 0
    assert "no checkpoint step-8.a2" in checkpoints("verify", path, "step-8.a2").err


def test_a_checkpoint_that_a_run_deletes_meanwhile_is_not_damaged(
    checkpoints: Stagecast, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, names = CheckpointStore(run / "checkpoints"), CheckpointStore(run / "checkpoints").names()
    real_open = events.checkpoint.files.open_below

    def open_below(root: Path, name: str) -> int:
        if "step-6.a2" in name:
            store.remove(CheckpointName(6, 2))
        return real_open(root, name)

    monkeypatch.setattr(events.checkpoint.files, "open_below", open_below)
    code, out, err = checkpoints("verify", run)
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == "step-6.a2  deleted meanwhile"
    monkeypatch.setattr(CheckpointStore, "names", lambda self: names)
    assert "step-6.a2" not in checkpoints("list", run).out


def test_uploaded_checkpoints_are_listed_and_verified_in_the_store(
    checkpoints: Stagecast, upload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is downloaded to the disk; parts are read piece by piece."""
    monkeypatch.setattr("events.checkpoint.remote._READ_BYTES", 1_000)
    monkeypatch.setattr(disk, "write_parts", None)
    rows = json.loads(checkpoints("list", upload, "--json").out)
    names = ["step-8.a2", "step-3.a1"]
    assert [(row["path"], row["state"]) for row in rows] == [(f"{upload}/{name}", "whole") for name in names]
    assert [(row["resumes"], row["in_line"]) for row in rows] == [(True, True), (False, True)]
    code, out, _ = checkpoints("verify", f"{upload}/")
    assert (code, words(out, 0), words(out, 1)) == (0, names, ["whole", "whole"])
    code, out, _ = checkpoints("verify", f"{upload}/step-3.a1")
    assert (code, words(out, 0)) == (0, ["step-3.a1"])
    parts = sorted((tmp_path / "store" / "the-run" / "step-3.a1").glob("tensors.safetensors.*"))
    assert len(parts) > 1
    change_byte(parts[0])
    assert checkpoints("list", f"{upload}/step-3.a1").out.count("whole") == 1
    code, out, _ = checkpoints("verify", upload)
    damage = "step-3.a1  damaged  tensors.safetensors holds other bytes than were written"
    assert (code, out.splitlines()[1]) == (1, damage)


def test_lost_and_cut_objects_are_damage(checkpoints: Stagecast, upload: str, tmp_path: Path) -> None:
    """The list finds it, by their sizes."""
    folder = tmp_path / "store" / "the-run"
    last = sorted((folder / "step-8.a2").glob("tensors.safetensors.*"))[-1]
    os.truncate(last, 10)
    for part in (folder / "step-3.a1").glob("state.msgpack*"):
        part.unlink()
    code, out, _ = checkpoints("list", upload)
    lines = out.splitlines()
    assert code == 0
    assert lines[2].startswith(f"    {last.name} has 10 bytes instead of ")
    assert lines[4].startswith("    state.msgpack.00000-of-")
    assert lines[4].endswith(" is missing")
    assert checkpoints("verify", upload).code == 1


# -------------------------------------------------------------------------------------------------------- export


def test_an_export_is_loaded_as_a_model(
    checkpoints: Stagecast, run: Path, upload: str, original: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    """The newest of the lineage, by the reader that safetensors has for tied tensors; they are named once."""
    manifest = read_manifest(run / "checkpoints" / "step-8.a2")
    assert manifest.metric is not None
    for path in (run, run / "checkpoints", run / "checkpoints" / "step-8.a2", upload):
        code, out, err = checkpoints("export", path, "weights.safetensors", "--force")
        nbytes = os.path.getsize("weights.safetensors")
        assert (code, err) == (0, TIED)
        assert out == f"weights.safetensors  11 tensors of step-8.a2  {nbytes / 1000:.1f} kB\n"
        module = Tied()
        assert load_model(module, "weights.safetensors") == (set(), [])
        assert same(module.state_dict(), original[1])
        with safe_open("weights.safetensors", "pt") as file:
            assert file.metadata() == {
                "format": "pt",
                "checkpoint": "the-run/step-8.a2",
                "global_step": "8",
                "metric": f"val_loss={manifest.metric.value!r}",
                "second.weight": "first.weight",
            }


def test_an_export_with_every_name_is_loaded_as_a_state_dict(
    checkpoints: Stagecast, run: Path, original: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    """Without a file's name it is that which other libraries look for, in the working directory."""
    code, out, err = checkpoints("export", run, "--every-name")
    assert (code, out.split("  ")[:2], err) == (0, ["model.safetensors", "12 tensors of step-8.a2"], "")
    assert same(load_file("model.safetensors"), original[1])
    Tied().load_state_dict(load_file("model.safetensors"))


def test_an_export_takes_the_best_checkpoint(checkpoints: Stagecast, run: Path, upload: str) -> None:
    """By the metric and its mode in the manifests of the lineage; a damaged one is skipped; also after an option."""
    folder = run / "checkpoints"
    values = {"step-8.a2": 3.0, "step-6.a2": 1.0, "step-4.a2": 2.0, "step-4.a1": 0.0}
    for name, value in values.items():
        manifest = read_manifest(folder / name)
        body = encode_manifest(msgspec.structs.replace(manifest, metric=Metric("score", value, "max")))
        (folder / name / "manifest.json").write_bytes(body)
    code, out, err = checkpoints("export", run, "--best", "best.safetensors")
    assert (code, " of step-8.a2 (score 3) " in out, err) == (0, True, TIED)
    with safe_open("best.safetensors", "pt") as file:
        assert file.metadata()["metric"] == "score=3.0"
    change_byte(folder / "step-8.a2" / "tensors.safetensors")
    code, out, err = checkpoints("export", run, "second.safetensors", "--best")
    assert (code, " of step-4.a2 (score 2) " in out) == (0, True)
    assert err.startswith("stagecast checkpoints: step-8.a2 is damaged and skipped: ")
    code, out, _ = checkpoints("export", upload, "there.safetensors", "--best")  # unchanged there, by val_loss
    assert (code, " of step-8.a2 (val_loss " in out) == (0, True)
    code, _, err = checkpoints("export", folder / "step-4.a2", "one.safetensors", "--best")
    assert (code, "is one checkpoint; --best needs the run" in err) == (1, True)
    assert "not allowed with argument" in checkpoints("export", run, "--best", "--name", "step-4.a2").err
    assert "'b' is one argument too many" in checkpoints("export", run, "a", "--best", "b").err
    train("plain", checkpoints=Checkpoints())
    code, _, err = checkpoints("export", "plain", "one.safetensors", "--best")
    assert (code, "plain has no valid checkpoint with a metric; use --name, or train with" in err) == (1, True)


def test_an_export_without_a_prefix_is_loaded_by_the_submodule(checkpoints: Stagecast) -> None:
    """Tensors outside are skipped and named; one that is tied to them is stored under its name inside."""

    class Outer(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.ModuleDict({"body": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
            self.net["body"].weight = self.first.weight  # pyright: ignore[reportArgumentType]

    module = Outer()
    train("run", module)
    code, out, err = checkpoints("export", "run", "--strip-prefix", "net.", "net.safetensors")
    assert (code, "net.safetensors  7 tensors of " in out) == (0, True)
    assert err.startswith("stagecast checkpoints: skipped tensors without the prefix 'net.': none, linear.weight, ")
    fresh = Outer().net
    fresh.load_state_dict(load_file("net.safetensors"))
    assert same(fresh.state_dict(), module.net.state_dict())
    for prefix, why in {
        "nett.": "--strip-prefix: no tensor has the prefix 'nett.'; the names are none, linear.weight, ",
        "net": "--strip-prefix: the prefix 'net' leaves '.body.weight' of net.body.weight; end the prefix with a dot",
    }.items():
        code, out, err = checkpoints("export", "run", "no.safetensors", "--strip-prefix", prefix)
        assert (code, out, why in err) == (1, "", True), err
    assert not os.path.exists("no.safetensors")


def test_an_export_takes_the_named_checkpoint(checkpoints: Stagecast, run: Path) -> None:
    """Also a superseded one."""
    for name in ("step-8.a1", "step-3.a1"):
        code, out, _ = checkpoints("export", run, f"{name}.safetensors", "--name", name)
        assert (code, f" of {name} " in out) == (0, True)
    at_8, at_3 = load_file("step-8.a1.safetensors"), load_file("step-3.a1.safetensors")
    assert int(at_8["norm.num_batches_tracked"]) > int(at_3["norm.num_batches_tracked"])
    assert not torch.equal(at_8["first.weight"], at_3["first.weight"])
    code, _, err = checkpoints("export", run, "x", "--name", "step-5.a1")
    assert (code, "no checkpoint step-5.a1" in err) == (1, True)


def test_an_export_falls_back_to_the_newest_valid_checkpoint(checkpoints: Stagecast, run: Path) -> None:
    """With the reason; but not from a named one, not to a superseded one, and not from a newer format."""
    folder = run / "checkpoints"
    change_byte(folder / "step-8.a2" / "tensors.safetensors")
    os.truncate(folder / "step-6.a2" / "state.msgpack", 10)
    code, out, err = checkpoints("export", run, "a.safetensors")
    assert code == 0
    assert " of step-4.a2 " in out
    first, second, _ = err.splitlines()
    assert first.startswith("stagecast checkpoints: step-8.a2 is damaged and skipped: tensors.safetensors holds")
    assert second.startswith("stagecast checkpoints: step-6.a2 is damaged and skipped: state.msgpack has 10 bytes")
    code, out, err = checkpoints("export", run, "b.safetensors", "--name", "step-8.a2")
    assert (code, out, "holds other bytes" in err, "skipped" in err) == (1, "", True, False)
    assert checkpoints("export", folder / "step-8.a2", "b.safetensors").code == 1
    for name in ("step-4.a2", "step-3.a1"):
        (folder / name / "manifest.json").unlink()
    code, out, err = checkpoints("export", run, "b.safetensors")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (
        f"stagecast checkpoints: error: {run} has no valid checkpoint from which its run would resume; use --name"
    )
    make_newer(folder / "step-8.a2")
    code, out, err = checkpoints("export", run, "b.safetensors")
    assert (code, out, "has format 99" in err) == (1, "", True)
    assert not Path("b.safetensors").exists()


def test_an_existing_file_is_replaced_only_by_force(
    checkpoints: Stagecast, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that another process creates while this one is written."""
    out, new = Path("weights.safetensors"), Path("new.safetensors")
    out.write_text("precious")
    exists = "exists; use another name, or --force to replace it"
    assert checkpoints("export", run, out) == (1, "", f"stagecast checkpoints: error: {out} {exists}\n")
    assert out.read_text() == "precious"
    assert checkpoints("export", run, out, "--force").code == 0
    assert len(load_file(out)) == 11
    real = disk.write_parts

    def write_parts(*args: Any) -> tuple[int, str]:
        new.write_text("precious")
        return real(*args)

    monkeypatch.setattr(disk, "write_parts", write_parts)
    assert checkpoints("export", run, new) == (1, "", f"{TIED}stagecast checkpoints: error: {new} {exists}\n")
    assert new.read_text() == "precious"
    assert sorted(os.listdir()) == ["new.safetensors", "run", "weights.safetensors"]


@pytest.mark.parametrize(("error", "expected"), [(OSError(28, "No space left on device"), 1), (KeyboardInterrupt, 130)])
def test_a_failed_export_changes_no_file(
    checkpoints: Stagecast, run: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: int
) -> None:
    Path("old.safetensors").write_text("precious")

    def fsync(fd: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("old.safetensors", "new.safetensors"):
        code, out, err = checkpoints("export", run, name, "--force", "--every-name")
        assert (code, out, len(err.splitlines())) == (expected, "", 1)
    assert sorted(os.listdir()) == ["old.safetensors", "run"]
    assert Path("old.safetensors").read_text() == "precious"


def test_an_unsuitable_place_for_an_export_is_named(checkpoints: Stagecast, run: Path) -> None:
    """No folder, a folder, a pipe, and a checkpoint: an export to it would replace its own tensor file."""
    inside = run / "checkpoints" / "step-8.a2"
    os.mkfifo("pipe")
    for path, why in {
        "absent/out": "absent is not a folder; create it, or use another name",
        "run": "run is a folder; name a file in it",
        "pipe": "pipe is not a plain file; use another path",
        inside / "tensors.safetensors": f"{inside} is a checkpoint, which an export would damage; use another folder",
    }.items():
        ended = checkpoints("export", run, path, "--force")
        assert ended == (1, "", f"stagecast checkpoints: error: {why}\n")
    assert checkpoints("verify", run).code == 0


def test_values_other_than_tensors_are_skipped_and_reported(checkpoints: Stagecast) -> None:
    """Containers are searched; one without any tensor is skipped as a whole."""
    more = {
        "vocabulary": {"a": 1, "b": [2, 3]},
        "seen": 5,
        "average": OrderedDict({"first.weight": torch.ones(2), "decay": 0.9}),
        "pair": (torch.zeros(1), torch.eye(2).to(torch.bfloat16), "x"),
        "a.b": torch.ones(3, dtype=torch.complex64),
        "list": [],
    }
    state = train("odd", Tied(**more))
    code, out, err = checkpoints("export", "odd", "odd.safetensors", "--every-name")
    assert (code, " 16 tensors of step-8.a1 " in out) == (0, True)
    assert err == (
        "stagecast checkpoints: skipped values that are not tensors: vocabulary, seen, average.decay, pair.2, list\n"
    )
    expected = state | {
        "average.first.weight": torch.ones(2),
        "pair.0": torch.zeros(1),
        "pair.1": torch.eye(2).to(torch.bfloat16),
        "a.b": torch.ones(3, dtype=torch.complex64),
    }
    assert same(load_file("odd.safetensors"), expected)


HALF = torch.ones(2, 2, dtype=torch.float16).view(torch.complex32)


class Wordless(Tied):
    """A module whose state has no tensors at all."""

    def get_state(self) -> dict[str, Any]:
        return {"seen": 1}


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (
            Tied(turns=torch.ones(2, dtype=torch.complex128), half=HALF),
            "a safetensors file cannot hold turns (complex128), half (complex32); convert them in get_state()",
        ),
        (Tied(__metadata__=torch.ones(1)), "cannot hold __metadata__ (a reserved name)"),
        (Tied(**{"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}), "two tensors of the module in "),
        (Wordless(), "holds no tensors of the module"),
    ],
    ids=["types", "reserved", "twice", "none"],
)
def test_an_impossible_export_is_an_error_and_writes_nothing(checkpoints: Stagecast, module: Tied, says: str) -> None:
    train("odd", module)
    code, out, err = checkpoints("export", "odd", "odd.safetensors", "--every-name")
    assert (code, out, says in err) == (1, "", True), err
    assert os.listdir() == ["odd"]


class Vocabulary:
    """A type that only the user's program knows."""


class Reader(CallbackInterface):
    """A callback that keeps one."""

    def state_dict(self) -> dict[str, Any]:
        return {"vocabulary": Vocabulary()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_types_that_only_the_users_program_knows_are_not_needed(
    checkpoints: Stagecast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those in the state of callbacks nor the module's own."""
    monkeypatch.setattr(packing_types, "registered", dict(packing_types.registered))
    monkeypatch.setattr(packing_types, "registered_names", dict(packing_types.registered_names))
    packing.register(Vocabulary, "tests.Vocabulary", lambda one: {"words": ["a"]}, lambda plain: Vocabulary())
    train(tmp_path / "own", Tied(words=Vocabulary()), callbacks=[Reader()])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="registered"):
        packing.decode((tmp_path / "own/checkpoints/step-8.a1/state.msgpack").read_bytes(), lambda name: name)
    code, _, err = checkpoints("export", "own", "own.safetensors", "--every-name")
    assert (code, err) == (0, "stagecast checkpoints: skipped values that are not tensors: words\n")
    assert len(load_file("own.safetensors")) == 12


@pytest.mark.parametrize("layers", [4, 60])
def test_tied_tensors_fill_no_disk(checkpoints: Stagecast, monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """Each of their names gets a copy on request, unless these are very many or the disk has no room for them."""
    tied = Tied()
    tied.more = nn.ModuleList([nn.Linear(100, 100)] * layers)
    train("tied", tied)
    code, _, err = checkpoints("export", "tied", "all.safetensors", "--every-name")
    assert (code, os.path.exists("all.safetensors")) == ((0, True) if layers < 32 else (1, False))
    assert ("so many names" in err) == (layers > 32)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 100_000))  # type: ignore[attr-defined]
    assert checkpoints("export", "tied", "more.safetensors", "--every-name").code == 1
    assert not os.path.exists("more.safetensors")


# ------------------------------------------------------------------------------------------------- the terminal


@pytest.mark.cold_start
def test_only_training_imports_torch(script: Start, run: Path, upload: str) -> None:
    """obstore is imported for an address only, and rich for the help of its sink."""
    program = """
        import sys
        from trainer.cli.main import main

        def call(*words):
            try:
                return main(words)
            except SystemExit as ended:
                return ended.code

        def loaded(*names):
            return sorted({*names} & {*sys.modules})

        print(call("--help"), call("demo", "--steps", "0"), loaded("events.checkpoint.remote", "argcomplete"))
        print(call("checkpoints", "list", "run"), call("checkpoints", "verify", "run"))
        print(call("checkpoints", "export", "run", "out.safetensors"), loaded("rich", "obstore"))
        print(call("train", "--help"), loaded("torch", "numpy"))
    """
    code, out, _ = script(textwrap.dedent(program)).end()
    assert code == 0
    lines = out.splitlines()
    assert {"0 2 []", "0 0", "0 []"} <= {*lines}
    assert lines[-1] == "0 []"


def test_a_terminal_shows_colours_unless_they_are_disabled(
    checkpoints: Stagecast, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words are the same: colours only help."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    (run / "checkpoints" / "step-6.a2" / "manifest.json").unlink()
    coloured = checkpoints("list", run).out.splitlines()
    assert coloured[0].startswith("\x1b[1mcheckpoint")
    assert coloured[1].startswith("\x1b[32mstep-8.a2")
    assert coloured[2].startswith("\x1b[31mstep-6.a2")
    assert coloured[3].startswith("\x1b[31m    manifest.json is missing")
    assert coloured[4].startswith("step-4.a2")
    assert coloured[6].startswith("\x1b[2mstep-8.a1")
    assert all(line.endswith("\x1b[m") for line in coloured if "\x1b" in line)
    for name, value in {"NO_COLOR": "1", "TERM": "dumb"}.items():
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert "\x1b" not in checkpoints("list", run).out


def test_names_in_any_script_are_shown_as_far_as_the_output_can(tmp_path: Path, run: Path) -> None:
    """An encoding that lacks them is not an error."""
    folder = run.rename(tmp_path / "läufe\x1b[31m\n\udcff")  # the last one is no Unicode, but the byte 0xff
    ascii_only = functools.partial(run_process, "checkpoints", PYTHONIOENCODING="ascii")
    code, out, err = ascii_only("list", folder, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)[0]["path"] == str(folder / "checkpoints" / "step-8.a2")
    code, out, err = ascii_only("export", folder, tmp_path / "ä\x1b.safetensors", "--every-name")
    assert (code, err, "\x1b" in out) == (0, "", False)
    assert "\\xe4\\x1b.safetensors  12 tensors" in out
    code, out, err = ascii_only("list", folder / "ä\n")
    assert (code, len(err.splitlines()), "\x1b" in err) == (1, 1, False)
    assert "\\xe4\\n does not exist" in err


def test_a_closed_pipe_causes_no_traceback(run: Path) -> None:
    """As `stagecast checkpoints list ... | head -0` does."""
    with started("checkpoints", "list", str(run)) as (process, out, err):
        out.close()
        assert (err.read(), process.wait(50)) == ("", 1)
