"""Files of sinks on a real disk that is full for a while: here, and in the sink host."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sinks
from events.journal.history import read_history
from events.wire import decode_json

ROOT = Path(sinks.__file__).parent.parent
TRAIN = """
import os, sys, threading
from pathlib import Path
import msgspec
from support.training import Net
from events.messages import ObserverFailed, ObserverRecovered
from sinks import CSV, JSONL
from trainer import Trainer, TrainerArguments

small, run_dir, where = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
failed, recovered = threading.Event(), threading.Event()


def act(global_step):
    if global_step == 200:
        assert failed.wait(20.0), "no one has noticed that the disk is full"
        (small / "filler").unlink()
        assert recovered.wait(20.0), "no one has noticed that there is room again"


class Watches:
    def open(self, run):
        return self

    def write(self, events):
        for event in events:
            if isinstance(event, ObserverFailed) and event.observer == "jsonl":
                print(event.error, flush=True)
                failed.set()
            if isinstance(event, ObserverRecovered) and event.observer == "jsonl":
                recovered.set()

    def close(self):
        pass


room = os.statvfs(small)
with open(small / "filler", "wb", buffering=0) as filler:
    filler.write(bytes(room.f_bavail * room.f_bsize - 8_192))  # enough for the beginning
jsonl = JSONL(str(small / "events.jsonl"))
often = msgspec.structs.replace(jsonl.delivery, latency_s=0.05, backoff_s=0.05, max_backoff_s=0.1, retries=1_000)
csv = CSV(str(small / "metrics.csv"))
often_csv = msgspec.structs.replace(csv.delivery, latency_s=0.05, backoff_s=0.05, max_backoff_s=0.1, retries=1_000)
arguments = TrainerArguments(train_batch_size=4, device="cpu")
sinks = [(jsonl, often), (csv, often_csv), (Watches(), msgspec.structs.replace(often, runs_in="thread"))]
own = {"run_dir": run_dir, "sinks": sinks, "sinks_in": where, "checkpoints": False}
result = Trainer(Net(1_600, act=act), arguments, **own).train()
assert result.status == "finished", result
for report in result.observers:
    assert (report.state, report.dropped) == ("closed", 0), report
"""


@pytest.mark.parametrize("where", ["thread", "process"])
def test_what_a_full_disk_refused_is_there_once_it_has_room(tmp_path: Path, where: str) -> None:
    """No event is lost, none is there twice, and no line is half one; the run is not held up by it."""
    small, run_dir, script = tmp_path / "small", tmp_path / "run", tmp_path / "train.py"
    small.mkdir()
    script.write_text(TRAIN)
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    # In a mount namespace of its own, which ends with it; what it wrote is copied out before that.
    command = 'mount -t tmpfs -o size=1m tmpfs "$1" || exit 77; shift; "$@" || exit 1; cp "$SMALL"/*.* "$KEPT"'
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "SMALL": str(small), "KEPT": str(tmp_path)}
    arguments = [str(small), sys.executable, str(script), str(small), str(run_dir), where]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, "sh", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
    )
    if done.returncode == 77 or "unshare failed" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No space left on device" in done.stdout
    written = [decode_json(line) for line in (tmp_path / "events.jsonl").read_bytes().splitlines()]
    history = {event.seq for event in read_history(run_dir / "journal")}
    seqs = [event.seq for event in written]
    assert seqs == sorted(set(seqs)), "something is there twice"
    assert {seq for seq in history if seq <= seqs[-1]} == set(seqs), "something is missing"
    assert len([event for event in written if type(event).__name__ == "TrainStepEnded"]) == 400
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    steps = [row for row in rows if ",train_loss," in row]
    assert len(steps) == 400
