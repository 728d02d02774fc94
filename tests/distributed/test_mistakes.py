"""Mistakes in what ranks are started with: a clear error on each, and no hang."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.ranks import StartRanks
from support.shared_runs import Case, Classifier

from trainer import Trainer, TrainerArguments
from trainer.distributed import Ddp, Fsdp
from trainer.distributed.world import opened
from trainer.errors import ArgumentsError

PROGRAM = """
import json, os, torch
from pathlib import Path
from torch.utils.data import DataLoader, Dataset, IterableDataset
from support.shared_runs import Case, Classifier
from trainer import Trainer, TrainerArguments

rank = int(os.environ["RANK"])
found = {}

def attempt(name, module=None, more={}, **arguments):
    module = module or Classifier(Case(rows=16))
    try:
        Trainer(
            module, TrainerArguments.from_dict({"train_batch_size": 4, **arguments}), sinks=[], checkpoints=False,
            **{"run_dir": "run-" + name, **more}
        ).train()
    except Exception as error:
        found[name] = [type(error).__name__, str(error)]
    else:
        found[name] = None

class Empty(Classifier):
    def get_train_dataloader(self, sampler, batch_size):
        class Rows(IterableDataset):
            def __len__(self): return 0 if rank else 4
            def __iter__(self): return iter([] if rank else [(self.x[i], self.y[i], i) for i in range(4)])
        return DataLoader(Rows(), batch_size=batch_size)

class Wider(Classifier):
    def __init__(self, case):
        super().__init__(case)
        self.first = torch.nn.Linear(12, 32 + rank).double()

Path("a-file").touch()
attempt("indivisible", train_batch_size=15)
attempt("arguments", clip_grads=bool(rank))
attempt("module", Wider(Case(rows=16)))
attempt("no-data", Empty(Case(rows=16)))
attempt("folder", more={"run_dir": "a-file/run"})
attempt("resume", more={"resume": "nowhere", "run_id": "x"})
attempt("norm", strategy={"type": "ddp", "sync_batch_norm": True})
attempt("good")
Path(f"place-{rank}").mkdir()
os.chdir(f"place-{rank}")
attempt("unshared", more={"run_dir": "/proc/self/cwd/run", "run_id": "x", "resume": "auto"})
Path(f"../found-{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.timeout(200)
def test_mistakes_are_explained_on_every_rank_and_the_next_run_works(ranks: StartRanks, tmp_path: Path) -> None:
    """The rank that can explain it raises the error; the others name that rank and repeat its text."""
    ended = ranks(PROGRAM).end(180)
    assert ended.code == 0, ended.err
    of_0, of_1 = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1))

    def check(name: str, kind: str, *parts: str, by: int = 0) -> None:
        own, other = (of_0, of_1) if by == 0 else (of_1, of_0)
        assert own[name][0] == kind, own[name]
        assert other[name][0] == "PeerFailed", other[name]
        assert other[name][1].startswith(f"rank {by} on ")
        for part in parts:
            assert part in own[name][1], own[name]
            assert part in other[name][1], other[name]

    check("indivisible", "ArgumentsError", "train_batch_size=15 cannot be divided among 2 ranks; set it to 14 or 16")
    check("arguments", "ArgumentsError", "clip_grads is True on rank 1", "and False on rank 0; start every rank with")
    check("module", "ArgumentsError", "the parameter first.weight is", "(33, 12)", "(32, 12)")
    check("folder", "RunFolderError", "a-file")
    check("resume", "CheckpointNotFound", "nowhere")
    check("norm", "ArgumentsError", "Ddp(sync_batch_norm=True) needs an accelerator")
    check("unshared", "RunFolderError", "is not visible to rank 1 on", "that all ranks share", by=1)
    for found in (of_0, of_1):
        assert found["no-data"][0] == "DataLoaderError"
        assert "gave rank 1 no batch; give each rank a part of the data" in found["no-data"][1]
        assert found["good"] is None


def test_ddp_without_the_environment_of_torchrun_names_the_command(tmp_path: Path) -> None:
    for strategy in ("ddp", Ddp(), "fsdp", Fsdp()):
        trainer = Trainer(Classifier(Case()), TrainerArguments(strategy=strategy), sinks=[], run_dir=tmp_path / "run")
        with pytest.raises(ArgumentsError, match="RANK and WORLD_SIZE in the environment; start the script with torch"):
            trainer.train()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "kind"),
    [
        ({}, {}, None),
        ({}, {"RANK": "0", "WORLD_SIZE": "1"}, None),  # one process needs no group
        ({"strategy": "single"}, {"RANK": "1", "WORLD_SIZE": "2"}, None),
    ],
)
def test_a_single_process_joins_no_group(arguments: dict[str, Any], environment: dict[str, str], kind: Any) -> None:
    with opened(TrainerArguments(**arguments), environment) as world:
        assert world.strategy is kind
        assert world.size == 1
        assert world.leads
        assert not world.is_distributed


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        ("tp", "strategy = 'tp': must be one of 'auto', 'ddp', 'fsdp', 'single' or a mapping of the fields of Ddp or"),
        ({"type": "tp"}, "strategy.type = 'tp': must be one of 'ddp'"),
        ({"type": ["ddp"]}, "strategy.type = ['ddp']: must be one of 'ddp'"),
        ({"type": "fsdp", "replicate": 0}, "strategy.replicate = 0: must be an integer >= 1"),
        ({"type": "ddp", "unused": True}, "strategy.unused: is not known"),
        ({"bucket_cap_mb": 0}, "strategy.bucket_cap_mb = 0: must be a number > 0"),
    ],
)
def test_a_wrong_strategy_is_named(strategy: object, says: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        TrainerArguments.from_dict({"strategy": strategy})
    assert says in str(caught.value)


def test_a_strategy_is_chosen_by_name_or_with_options() -> None:
    arguments = TrainerArguments.from_dict({}, ["strategy.find_unused_parameters=true"])
    assert arguments.strategy == Ddp(find_unused_parameters=True)
    assert TrainerArguments.from_dict(arguments.to_dict()) == arguments
    with pytest.raises(ArgumentsError, match="bucket_cap_mb = -1"):
        Ddp(bucket_cap_mb=-1)


@pytest.mark.timeout(120)
def test_the_command_train_reports_on_rank_0_alone(ranks: StartRanks, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "module: support.together:Tiny\narguments: {train_batch_size: 4, val_batch_size: 2}\nsinks: []\n"
    )
    program = "import sys\nfrom trainer.cli.main import main\nsys.exit(main(['train', 'run.yaml']))"
    ended = ranks(program).end(100).check()
    assert ended.out[0].count("finished after 3 steps") == 1
    assert not ended.out[1]
