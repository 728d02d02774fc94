"""What rank 0 publishes about all ranks."""

from __future__ import annotations

import socket
from pathlib import Path

from support.rank_runs import found_by
from support.ranks import StartRanks
from support.training import read_journal

from events.messages import RankReported

PROGRAM = """
import time
from support.rank_runs import RANK, Small, leave, trainer
from sinks import Console
from trainer.distributed import summary

summary._FIRST_S = summary._EVERY_S = 0.3

def fault(stage, step):
    if stage == "train" and RANK == 1:
        time.sleep(0.02)

class Logging(Small):
    def train_step(self, *args):
        self.log("rank", RANK)
        self.log("step", 1.0 if args[0] % 2 else float("nan"))
        return super().train_step(*args)

module = Logging(fault)
run = trainer(
    module, sinks=[Console()], run_dir="run", arguments={"epochs": 10_000, "max_time_s": 7}
)
result = run.train()
leave("found", {"problems": result.problems})
"""


def test_a_rank_that_holds_up_the_others_is_reported_and_named(ranks: StartRanks, tmp_path: Path) -> None:
    """All ranks take equally long for a step; the slow one is found by when it comes to the exchange of gradients."""
    ended = ranks(PROGRAM).end(100)
    assert ended.code == 0, ended.err
    of_0, of_1 = found_by(tmp_path, "found")
    reports = [event for event in read_journal(tmp_path / "run") if isinstance(event, RankReported)]
    newest = {one.reported_rank: one for one in reports if one.step_s is not None}
    assert newest.keys() == {0, 1}
    for one in newest.values():
        assert one.ranks == 2
        assert one.host == socket.gethostname()
        assert one.phase
        assert one.steps > 0
        assert one.ledger.wall_s > 0
        assert one.memory_bytes is not None
        assert one.memory_bytes > 2**20
        assert one.device_memory_bytes is None
        assert one.metrics == {"rank": one.reported_rank, "step": 1.0}  # each its own, without NaN
    slow, fast = newest[1], newest[0]
    assert slow.before_exchange_s is not None
    assert fast.before_exchange_s is not None
    assert slow.step_s is not None
    assert fast.step_s is not None
    assert slow.before_exchange_s > 0.02 > fast.before_exchange_s
    assert abs(slow.step_s - fast.step_s) < 0.5 * slow.step_s
    (problem,) = (one for one in of_0["problems"] if "holds up" in one)
    assert problem.startswith(f"rank 1 on {socket.gethostname()} holds up the others: it takes 0.0")
    assert "most ranks take 0.0" in problem
    assert ended.err[0].count("warning: rank 1 on ") == 1
    assert "problem: rank 1 on " in ended.err[0]
    assert of_1["problems"] == []
