"""Kill ranks at random moments, again and again, under ``torchrun``; check how each life ends and the run continues.

    PYTHONPATH=.:tests python tests/distributed/kills.py [--kills 50] [--ranks 2] [--phases step save validation]

One job per phase, which torchrun restarts after each kill (SIGKILL of a random rank, up to some milliseconds after it
has entered a step, has staged a checkpoint or has begun a validation batch). Checks that

- the others end with an outcome that names the rank, its host, a phase and its death, and within seconds,
- there is one history, in which each attempt resumes from a checkpoint,
- the weights in the end are, bit by bit, those of a run of as many ranks that no one kills.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import tempfile
from pathlib import Path

import torch
from support.ranks import Ranks
from support.training import read_journal

from events.messages import RankEnded, RunEnded, RunResumed, RunStarted, TrainStepEnded

_APART = 8
"""Minimum steps between two kills."""
_CHECKPOINT, _VALIDATION = 5, 10

_PROGRAM = """
import json, os, threading, time
import torch
from support.rank_runs import LIFE, RANK, Small, trainer
from trainer import Checkpoints

kills, phase, steps, every, validation = json.loads(os.environ["KILLS"])

def die(delay_s):
    time.sleep(delay_s)
    with open(f"kill-{LIFE}.json", "w") as file:
        json.dump(time.time(), file)
    os.kill(os.getpid(), 9)

armed = False

def fault(stage, step):
    global armed
    if LIFE >= len(kills) or armed:
        return
    rank, least, delay_s = kills[LIFE]
    here = stage == ("val" if phase == "validation" else "train") and (phase != "save" or step % every == 0)
    if rank == RANK and step >= least and here:
        armed = True
        threading.Thread(target=die, args=(delay_s,), daemon=True).start()
    if phase == "validation" and stage == "val":
        time.sleep(0.001)

torch.manual_seed(0)
module = Small(fault)
module.register_buffer("more", torch.ones(250_000, dtype=torch.float64))  # a save takes some time

arguments = {"epochs": None, "max_steps": steps, "val_interval_steps": validation}
trainer(module, arguments=arguments, checkpoints=Checkpoints(every_steps=every), run_dir="run").train()
torch.save(module.state_dict(), f"weights-{RANK}.pt")
"""


def _run(folder: Path, ranks: int, kills: list[tuple[int, int, float]], phase: str, steps: int) -> None:
    folder.mkdir()
    plan = json.dumps([kills, phase, steps, _CHECKPOINT, _VALIDATION])
    options = [f"--max-restarts={len(kills)}", "--monitor-interval=0.1"]
    started = Ranks(_PROGRAM, folder, ranks, *options, environment={"KILLS": plan})
    try:
        ended = started.end(120 + 120.0 * len(kills))
        assert ended.code == 0, ended
        assert "Traceback" not in "".join(ended.err), ended.err
    finally:
        started.close()


def _check(folder: Path, kills: list[tuple[int, int, float]], whole: Path, ranks: int, steps: int) -> list[float]:
    """Return the seconds from each kill to the last outcome of the others."""
    events = read_journal(folder / "run")
    assert [event.attempt for event in events if isinstance(event, RunStarted)] == list(range(1, len(kills) + 2))
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    resumed = {event.attempt: event.checkpoint for event in events if isinstance(event, RunResumed)}
    seconds: list[float] = []
    for attempt, (rank, *_) in enumerate(kills, 1):
        found: list[RunEnded | RankEnded] = [one for one in events if isinstance(one, RunEnded | RankEnded)]
        if rank:
            found = [one for one in found if isinstance(one, RunEnded) and one.attempt == attempt]
        else:
            found = [one for one in found if isinstance(one, RankEnded) and one.ended_attempt == attempt]
        assert len(found) == (1 if rank else ranks - 1), (attempt, rank, found)
        for one in found:
            assert one.status == "failed", one
            assert (one.reason or "").startswith(f"rank {rank} on {socket.gethostname()}: its process "), one
            assert "has died" in (one.reason or ""), one
            assert one.phase, one
        assert resumed[attempt + 1], attempt
        ends = (folder / "run" / "ranks").glob(f"a{attempt}.r*.json")
        killed_at = json.loads((folder / f"kill-{attempt - 1}.json").read_text())
        seconds.append(max(path.stat().st_mtime for path in ends) - killed_at)
    last = [event.global_step for event in events if isinstance(event, TrainStepEnded)][-1]
    assert last == steps, last
    for number in range(ranks):
        state, other = (torch.load(one / f"weights-{number}.pt") for one in (folder, whole))
        assert state.keys() == other.keys()
        assert all(torch.equal(state[name], other[name]) for name in state), f"rank {number} has other weights"
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills per phase")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--phases", nargs="+", default=["step", "save", "validation"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where a run that fails a check stays")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    apart = max(_APART, _VALIDATION)
    steps = apart * (options.kills + 3)
    root = options.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    root.mkdir(exist_ok=True)
    _run(root / "whole", options.ranks, [], "none", steps)
    for phase in options.phases:
        delay_s = {"step": 0.01, "save": 0.05, "validation": 0.015}[phase]
        kills = [
            (chance.randrange(options.ranks), apart * number + chance.randrange(_APART), chance.random() * delay_s)
            for number in range(1, options.kills + 1)
        ]
        _run(root / phase, options.ranks, kills, phase, steps)
        seconds = _check(root / phase, kills, root / "whole", options.ranks, steps)
        median, maximum = statistics.median(seconds), max(seconds)
        print(f"{phase}: {len(kills)} kills; others ended after {median:.2f} s (median), {maximum:.2f} s (maximum)")


if __name__ == "__main__":
    main()
