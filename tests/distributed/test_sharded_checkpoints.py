"""Checkpoints of modules that are divided among ranks: every rank writes its part, and any number of ranks reads it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, load_model
from support.ranks import StartRanks
from support.sharded_checkpoints import CASE, KINDS, Averaged, Even, Odd, begin, check_continued, checkpoints_in, go_on
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from events.checkpoint.files import read_manifest
from events.messages import CheckpointFailed, CheckpointRejected, CheckpointSaved, CheckpointSkipped, RunResumed
from trainer.checkpoint.sharded import StagecastReader
from trainer.cli.main import main

OF_TWO = """
import os, shutil, threading, torch
from pathlib import Path
import sinks.checkpoints.shards as shards, sinks.checkpoints.writer as writer
from support.sharded_checkpoints import *

rank = int(os.environ["RANK"])
found = {"saved": begin(Path("two"), "fsdp")}

def copied(name, source="two"):
    if rank == 0:  # the next run of the other rank waits for this one's
        shutil.copytree(source, name)
    return Path(name)

found["two"] = go_on(copied("again"), "fsdp")
damaged = copied("damaged")
if rank == 0:
    path = damaged / "checkpoints/step-6.a1/rank-1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
found["damaged"] = go_on(damaged, "fsdp")
found["as ddp"] = go_on(copied("as-ddp"), "ddp")
begin(Path("ddp"), "ddp")
found["of ddp"] = go_on(Path("ddp"), "fsdp")
found["of one"] = go_on(Path("one"), "fsdp")
for make in (Even, Averaged):
    begin(Path(make.__name__), "fsdp", make=make)
    found[make.__name__] = go_on(copied("two-" + make.__name__, make.__name__), "fsdp", make=make)
found["weights"] = go_on(None, "fsdp", None, init_from="again")

def fails(number, args):
    if number == 1:
        raise OSError(28, "No space left on device")

slow, waiting = threading.Event(), threading.Event()
if rank == 1:
    calls_first(shards.disk, "write_image", fails)
found["failing"] = begin(Path("failing"), "fsdp")
if rank == 1:
    calls_first(shards.disk, "write_image", lambda number, args: slow.wait(60))
    calls_first(Odd, "train_step", lambda number, args: slow.set() if args[1] == 7 else None)
else:
    calls_first(writer, "gather", lambda number, args: waiting.set())
    calls_first(Odd, "train_step", lambda number, args: waiting.wait(60) if args[1] == 3 else None)
found["slow"] = begin(Path("slow"), "fsdp", Checkpoints(every_steps=1, every_minutes=None, keep_last=None))
torch.save(found, f"two-{rank}.pt")
"""
OF_FOUR = """
import os, shutil, signal, torch
from pathlib import Path
import sinks.checkpoints.shards as shards
from support.sharded_checkpoints import *

rank = int(os.environ["RANK"])
copies = Fsdp(units=[], replicate=2)
runs = {name: go_on(Path(name), copies, make=make) for name, make in KINDS.items()}
torch.save(runs, f"four-{rank}.pt")
begin(Path("of-four"), copies)
try:
    go_on(None, "fsdp", None, make=Factored)
except Exception as error:
    Path(f"refused-{rank}").write_text(str(error))
torch.save(None, f"done-{rank}.pt")
if rank == 3:
    notes = []
    calls_first(shards.disk, "write_parts", lambda number, args: notes.append(number) if "note" in args[1] else None)
    calls_first(shards.disk, "write_parts", lambda number, args: os.kill(os.getpid(), 9) if len(notes) == 1 else None)
begin(Path("killed"), "fsdp", Checkpoints(every_steps=3, every_minutes=None, end_timeout_s=1))
"""


def of_type(events: list[Any], kind: type) -> list[Any]:
    return [one for one in events if isinstance(one, kind)]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # this process reads alone
@pytest.mark.timeout(300)
def test_sharded_checkpoints_are_whole_and_fit_any_number_of_ranks(
    ranks: StartRanks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path / "one", "single")
    started = ranks(OF_TWO)
    alone = go_on(None, "single", None)
    ended = started.end(250)
    assert ended.code == 0, (ended.report, ended.err)
    found = [torch.load(tmp_path / f"two-{rank}.pt", weights_only=False) for rank in (0, 1)]
    for one in found:
        for name in ("two", "damaged", "as ddp", "of ddp", "of one"):
            check_continued(alone, one[name], name)
    events = {name: one if isinstance(one, list) else one["events"] for name, one in found[0].items()}

    # Each rank writes its part; older versions refuse the format, which is only that of sharded checkpoints.
    assert [one.checkpoint for one in of_type(events["saved"], CheckpointSaved)] == ["step-3.a1", "step-6.a1"]
    manifest = read_manifest(tmp_path / "two/checkpoints/step-6.a1")
    assert manifest.format == 2
    assert {"shards.json", "rank-1.safetensors", "rank-1.msgpack"} < manifest.files.keys()
    assert read_manifest(tmp_path / "ddp/checkpoints/step-6.a1").format == 1

    # A part that one rank cannot read makes all go to the checkpoint before.
    (rejected,) = of_type(events["damaged"], CheckpointRejected)
    assert rejected.checkpoint == "step-6.a1"
    assert "rank-1.safetensors holds other bytes" in rejected.error
    assert of_type(events["damaged"], RunResumed)[0].checkpoint == "step-3.a1"

    # A rank that fails, or has no memory left, is named, and leaves nothing behind.
    assert of_type(events["failing"], CheckpointFailed)[0].error.startswith(
        "CheckpointError: rank 1 could not write its part: OSError: [Errno 28]"
    )
    assert checkpoints_in(tmp_path / "failing") == ["step-6.a1"]
    skipped = of_type(events["slow"], CheckpointSkipped)
    assert (3, 1) in [(one.global_step, one.busy_rank) for one in skipped]
    assert not [name for name in checkpoints_in(tmp_path / "slow") if "tmp" in name or name == "step-3.a1"]

    check_readers(tmp_path, found[0]["two"]["weights"], capsys)
    for make in (Even, Averaged):
        kind = go_on(None, "single", None, make=make)
        check_continued(kind, found[1][make.__name__], make.__name__)
        check_continued(kind, go_on(tmp_path / make.__name__, "single", make=make), f"{make.__name__}, by one process")
    shutil.copytree(tmp_path / "two", tmp_path / "alone")
    check_continued(alone, go_on(tmp_path / "alone", "single"), "read by one process")
    warm = go_on(None, "single", None, init_from=tmp_path / "again")
    check_continued(warm, found[1]["weights"], "init_from")


def check_readers(folder: Path, weights: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    """torch's own readers, and those of the command line, find the weights."""

    def check(state: dict[str, torch.Tensor], prefix: str = "") -> None:
        for name, value in weights.items():
            assert torch.equal(state[prefix + name], value), name

    (last,) = (folder / "again/checkpoints").glob("step-10.*")
    state = {f"module.{name}": torch.zeros_like(value) for name, value in weights.items() if name != "again.weight"}
    load(state, storage_reader=HuggingFaceStorageReader(str(last)), no_dist=True)
    check(state | {"module.again.weight": state["module.first.weight"]}, "module.")

    manifest = read_manifest(last)
    lacking = {name: entry for name, entry in manifest.files.items() if name != "rank-1.safetensors"}
    with pytest.raises(CheckpointException, match=r"does not list rank-1\.safetensors"):
        load(
            {"module.odd": torch.zeros(3, 5, dtype=torch.float64)},
            storage_reader=StagecastReader(last, msgspec.structs.replace(manifest, files=lacking)),
            no_dist=True,
        )

    run, out = str(folder / "again"), str(folder / "exported")
    assert main(["checkpoints", "verify", run]) == 0
    assert main(["checkpoints", "list", run]) == 0
    assert "damaged" not in capsys.readouterr().out
    assert main(["checkpoints", "export", run, out, "--format", "dcp", "--no-averaged"]) == 0
    loaded = {name: torch.zeros_like(value) for name, value in weights.items()}
    load(loaded, checkpoint_id=out, no_dist=True)
    check(loaded)
    assert main(["checkpoints", "export", run, out, "--format", "dcp"]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["checkpoints", "export", run, f"{out}.safetensors", "--every-name", "--no-averaged"]) == 0
    check(load_file(f"{out}.safetensors"))
    module = Odd(CASE)
    load_model(module, folder / "again/weights.safetensors")
    check(dict(module.state_dict()))


@pytest.mark.timeout(200)
def test_a_rank_that_is_killed_while_it_saves_leaves_only_whole_checkpoints(ranks: StartRanks, tmp_path: Path) -> None:
    for name, make in KINDS.items():
        begin(tmp_path / name, "single", make=make)
    started = ranks(OF_FOUR, 4)
    alone = go_on(None, "single", None)
    kinds = {name: go_on(None, "single", None, make=make) for name, make in KINDS.items()}
    ended = started.end(180)
    assert all((tmp_path / f"done-{rank}.pt").exists() for rank in range(4)), (ended.report, ended.err)
    for rank in range(4):
        for name, found in torch.load(tmp_path / f"four-{rank}.pt", weights_only=False).items():
            check_continued(kinds[name], found, f"one to four, {name}")
        assert "Adafactor cannot compute with divided parameters; set" in (tmp_path / f"refused-{rank}").read_text()
    check_continued(alone, go_on(tmp_path / "of-four", "single"), "four to one")
    assert [name for name in checkpoints_in(tmp_path / "killed") if "tmp" not in name] == ["step-3.a1"]
    assert main(["checkpoints", "verify", str(tmp_path / "killed")]) == 0
    check_continued(alone, go_on(tmp_path / "killed", "single"), "after the kill")
