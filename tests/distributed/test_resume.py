"""A run of several ranks resumes from its checkpoints, with any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import StartRanks
from support.shared_runs import Case, resume, start, train
from support.training import read_journal

from events.checkpoint.files import read_manifest
from events.errors import CheckpointMismatch
from events.messages import RunResumed
from trainer.checkpoint.loaded import Loaded
from trainer.distributed.sharding import seed_for

PROGRAM = """
import os, torch
from pathlib import Path
from support.shared_runs import Case, Classifier, found, resume, start, train
from trainer import Trainer

shuffled = Case(dropout=0.3)
whole = train(shuffled, Path("whole"))
start(shuffled, Path("begun"))
there = resume(shuffled, Path("begun"))
start(Case(), Path("of-two"))
from_one = resume(Case(), Path("of-one"))
start(Case(), Path("restarted"))
# As on two hosts, of which the first has only waited for the restart of the other; no resume is given.
os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_RESTART_COUNT": os.environ["RANK"]}
module = Classifier(Case())
restarted = found(module, Trainer(module, Case().arguments(), sinks=[], run_dir="restarted").train())
torch.save([whole, there, from_one, restarted], f"found-{os.environ['RANK']}.pt")
"""
MESSAGES = ("the run failed", "Boom", "outputs", "resum")


def check_weights(one: dict[str, Any], other: dict[str, Any], *, exactly: bool) -> None:
    assert one["steps"] == other["steps"]
    difference = (one["weights"] - other["weights"]).abs().max()
    assert difference == 0 if exactly else difference < 1e-12
    assert len(one["trained"]) == len(other["trained"])  # of the steps before the checkpoint, too
    assert all(map(torch.equal, one["trained"], other["trained"]))
    assert one["metrics"]["val_loss/a"] == pytest.approx(other["metrics"]["val_loss/a"], abs=1e-12)


@pytest.mark.timeout(300)
def test_ranks_resume_exactly_and_other_numbers_of_ranks_with_the_same_rows(ranks: StartRanks, tmp_path: Path) -> None:
    start(Case(), tmp_path / "of-one")
    started = ranks(PROGRAM)
    alone = train(Case(), tmp_path / "alone")
    ended = started.end(280)
    assert ended.code == 0, ended.err
    for rank in (0, 1):
        whole, there, from_one, restarted = torch.load(tmp_path / f"found-{rank}.pt", weights_only=False)
        check_weights(whole, there, exactly=True)  # with dropout: each rank has its own random generators back
        check_weights(alone, from_one, exactly=False)  # one rank, then two
        check_weights(alone, restarted, exactly=False)
        assert restarted["run_id"] == "run"
    checkpoints = tmp_path / "of-two" / "checkpoints"
    manifest = read_manifest(checkpoints / "step-6.a1")
    assert "rank-1.msgpack" in manifest.files
    assert sum(isinstance(event, RunResumed) for event in read_journal(tmp_path / "restarted")) == 1
    assert manifest.format == 1  # any version of this library reads it
    check_weights(alone, resume(Case(), tmp_path / "of-two"), exactly=False)  # two ranks, then one


def test_a_dataloaders_own_state_is_refused_by_another_number_of_ranks(tmp_path: Path) -> None:
    """Unlike the trainer's sampler, nothing is known of it."""
    loaded = Loaded.__new__(Loaded)
    loaded.folder, loaded.parts = tmp_path, {}
    position = {"world_size": 2, "loader_state": {"at": 3}, "sampler_seed": 0}
    loaded.state = {"position": position, "metrics": {}, "rng": {}, "global_step": 5}
    with pytest.raises(
        CheckpointMismatch, match="the dataloader's own state for 2 ranks, which does not fit 4; resume"
    ):
        loaded.become(0, 4, lambda seed: {})
    loaded.become(0, 2, lambda seed: {})
    position["loader_state"] = None
    loaded.become(1, 4, lambda seed: {"seed": seed})
    assert loaded.state["rng"]["seed"] == seed_for(0, 1, 5)  # of its own, and the same each time
