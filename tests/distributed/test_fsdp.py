"""Modules whose parameters are divided among ranks (FSDP2) train as in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.ranks import StartRanks
from support.sharded import SHARDED, Bare, Infinite, Masked, Spoiled, observed
from support.shared_runs import Case, Classifier, check_same, train
from support.training import read_journal

from events.messages import HistogramLogged, MetricsLogged, NonFiniteGradient, TrainStepEnded

PROGRAM = """
import os, torch
from pathlib import Path
from trainer.distributed import fsdp
from support.sharded import SHARDED, Masked
from support.shared_runs import Case, Classifier, train
from trainer.distributed import Fsdp

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
def strategy(case):
    return Fsdp(units=["Linear"], replicate=size // 2, reshard_after_forward=size == 2 or case.manual)

found = [train(case, Path(f"run-{n}"), strategy=strategy(case)) for n, case in enumerate(SHARDED) if n in NUMBERS]
torch.manual_seed(rank)  # each rank constructs other weights; those of rank 0 count
masked = Masked(Case(rows=60, micro=2))
if rank:
    torch.nn.init.normal_(masked.second.weight)
found.append(train(masked, Path("masked"), strategy=Fsdp(units=["Linear"], activation_checkpointing=True)))

class Late:  # a message that arrives when somebody waits for it, and no earlier
    def __init__(self, numbers):
        self.numbers = numbers

    def wait(self):
        reduce(self.numbers)

reduce = fsdp.dist.all_reduce
fsdp.dist.all_reduce = lambda numbers, async_op=False: Late(numbers) if async_op else reduce(numbers)
found.append(train(Classifier(Case(rows=60)), Path("late"), strategy=Fsdp(units=["Linear"])))
torch.save(found, f"found-{rank}.pt")
"""


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("world_size", "numbers"), [(2, range(len(SHARDED))), (4, (1, 2, 3, 6))])
def test_divided_modules_train_what_one_process_trains(
    ranks: StartRanks, tmp_path: Path, world_size: int, numbers: tuple[int, ...]
) -> None:
    """In float64; four ranks have two copies of the model."""
    numbers = tuple(numbers)
    started = ranks(PROGRAM.replace("NUMBERS", repr(numbers)), world_size)
    alone = [train(SHARDED[number], tmp_path / f"alone-{number}", strategy="single") for number in numbers]
    alone.append(train(Masked(Case(rows=60, micro=2)), tmp_path / "alone-masked", strategy="single"))
    alone.append(train(Classifier(Case(rows=60)), tmp_path / "alone-late", strategy="single"))
    started.end().check()
    for rank in range(world_size):
        everything = torch.load(tmp_path / f"found-{rank}.pt", weights_only=False)
        for number, one, other in zip((*numbers, "masked", "late"), alone, everything, strict=True):
            check_same(one, other, (rank, number))


OTHERS = """
import json, os, torch
from pathlib import Path
from support.sharded import Infinite, Penalized, Spoiled, Stacked, observed
from support.shared_runs import Case, Classifier, train
from trainer import Trainer
from trainer.distributed import Fsdp
from trainer.distributed.local import whole

rank = int(os.environ["RANK"])
strategy = Fsdp(units=["Linear"])
found = {
    "observed": observed(Classifier(Case(rows=60, clips=True)), Path("observed"), strategy=strategy),
    "skips": train(Infinite(Case(rows=60)), Path("skips"), strategy=strategy, non_finite="skip"),
}
train(Spoiled(Case(rows=60)), Path("spoiled"), strategy=strategy, max_steps=3)
with torch.device("meta"):
    made = Stacked(Case(rows=40, epochs=1))
blank = Classifier(Case(rows=40))
made.x, made.y = blank.x, blank.y
train(made, Path("meta"), strategy="fsdp", val_interval_epochs=0, max_steps=1)
found["meta"] = {name: whole(value) for name, value in made.state_dict().items()}
found["name"] = type(made).__qualname__, type(made).__module__
torch.save(found, f"others-{rank}.pt")
mistakes = {}

def attempt(name, module, strategy, **more):
    try:
        arguments = module.case.arguments(strategy=strategy, **more)
        folder = f"bad-{name}-{rank if strategy == 'single' else 0}"
        Trainer(module, arguments, sinks=[], checkpoints=False, run_dir=folder).train()
    except Exception as error:
        mistakes[name] = [type(error).__name__, " | ".join([str(error), *getattr(error, "__notes__", [])])]

shared = Classifier(Case(rows=16))
shared.third = torch.nn.Linear(12, 32)
shared.third.weight = shared.first.weight
attempt("shared", shared, strategy)
attempt("units", Classifier(Case(rows=16)), Fsdp(units=["Linear", "Block"]))
attempt("copies", Classifier(Case(rows=16)), Fsdp(replicate=3))
kept, loose, tied = (Classifier(Case(rows=16, manual=True, micro=16)) for _ in range(3))
loose.scale = torch.nn.Parameter(torch.ones(1))
tied.third = torch.nn.Linear(12, 32)
tied.third.weight = tied.first.weight
attempt("kept", kept, Fsdp(reshard_after_forward=False))
attempt("loose", loose, "fsdp")
attempt("tied", tied, "fsdp")
attempt("penalty", Penalized(Case(rows=16, manual=True, micro=16)), strategy)
attempt("twice", Penalized(Case(rows=16)), strategy)
attempt("other", made, "single")
attempt("none", Classifier(Case(rows=16, leaves=99)), strategy)
Path(f"mistakes-{rank}.json").write_text(json.dumps(mistakes))
"""


@pytest.mark.timeout(150)
def test_averages_statistics_and_skips_are_those_of_the_whole_model(ranks: StartRanks, tmp_path: Path) -> None:
    """Also a module on the meta device, an evaluation after training, and mistakes."""
    started = ranks(OTHERS)
    alone = observed(Classifier(Case(rows=60, clips=True)), tmp_path / "alone", strategy="single")
    skips = train(Infinite(Case(rows=60)), tmp_path / "alone-skips", strategy="single", non_finite="skip")
    train(Spoiled(Case(rows=60)), tmp_path / "alone-spoiled", strategy="single", max_steps=3)
    started.end().check("stagecast: ")
    for folder in (tmp_path / "alone-spoiled", tmp_path / "spoiled"):
        events = list(read_journal(folder))
        (found,) = (event.of_seq for event in events if isinstance(event, NonFiniteGradient))
        (step,) = (event for event in events if event.seq == found)
        assert isinstance(step, TrainStepEnded)
        assert step.global_step == 3
    statistics = [
        {
            name: value
            for event in read_journal(folder)
            if isinstance(event, MetricsLogged)
            for name, value in event.metrics.items()
            if "norm" in name
        }
        for folder in (tmp_path / "alone", tmp_path / "observed")
    ]
    assert statistics[0]["grad_norm_total"] > 0
    assert statistics[1] == pytest.approx(statistics[0], rel=1e-9)
    counts = [
        [event.counts for event in read_journal(folder) if isinstance(event, HistogramLogged)]
        for folder in (tmp_path / "alone", tmp_path / "observed")
    ]
    assert counts[0] == counts[1] != []
    both = [torch.load(tmp_path / f"others-{rank}.pt", weights_only=False) for rank in (0, 1)]
    for found in both:
        assert (found["observed"]["weights"] - alone["weights"]).abs().max() < 1e-12
        assert torch.allclose(found["observed"]["tested"], alone["tested"], rtol=1e-12)
        check_same(skips, found["skips"], "skips")
        assert found["name"] == ("Stacked", "support.sharded")
        for name, value in found["meta"].items():
            assert torch.equal(value, both[0]["meta"][name])
            assert value.isfinite().all()
        first, second = (found["meta"][f"blocks.{number}.weight"] for number in (0, 1))
        assert not torch.equal(first, second)
        assert not torch.equal(first[:6], first[6:])  # the parts of the ranks are not drawn alike
    assert skips["steps"] < 8
    for rank in (0, 1):
        mistakes = json.loads((tmp_path / f"mistakes-{rank}.json").read_text())
        for name, kind, says in (
            ("shared", "ArgumentsError", "the parameter third.weight is first.weight, too, which is in another unit"),
            ("units", "ArgumentsError", "names Block, which Classifier does not contain"),
            ("copies", "ArgumentsError", "Fsdp(replicate=3) does not divide the 2 ranks; set it to one of 1, 2"),
            ("kept", "ArgumentsError", "Fsdp(reshard_after_forward=False) keeps gathered parameters"),
            ("loose", "ArgumentsError", "the parameter scale is in no submodule with a forward()"),
            ("tied", "ArgumentsError", "the parameter first.weight is in two networks"),
            ("penalty", "RuntimeError", "its gradients cannot be differentiated; set strategy='ddp'"),
            ("twice", "RuntimeError", "its gradients cannot be differentiated; set strategy='ddp'"),
            ("none", "StepOutputError", "returned None, but with strategy='fsdp' all ranks compute gradients"),
        ):
            assert mistakes[name][0] in (kind, "PeerFailed"), mistakes
            assert says in mistakes[name][1]
        assert "is divided among ranks; set strategy='fsdp'" in mistakes["other"][1]


LOADED = """
import os, torch
from pathlib import Path
from support.sharded import Bare
from support.shared_runs import Case, found, train
from trainer import Trainer
from trainer.distributed import Fsdp

rank, case = int(os.environ["RANK"]), Case(rows=32, clips=True)
made = Bare.without_data(case)
with made.most:
    arguments = case.arguments(strategy="fsdp", val_interval_epochs=0)
    start = "start.safetensors"
    trainer = Trainer(made, arguments, init_from=start, checkpoints=False, sinks=[], run_dir="meta")
    results = {"meta": found(made, trainer.train())}
results["elements"] = made.elements
linears = 0

def backend(graph, inputs):
    global linears
    graphs = [one for one in graph.modules() if isinstance(one, torch.fx.GraphModule)]
    linears += sum("linear" in str(node.target) for one in graphs for node in one.graph.nodes)
    return graph

for name, strategy in {
    "ddp": "ddp",
    "fsdp": "fsdp",
    "recomputed": Fsdp(activation_checkpointing=True),
}.items():
    torch._dynamo.reset()
    linears, module = 0, Bare(case)
    torch.nn.Module.load_state_dict(module, torch.load("start.pt"))
    more = {"val_interval_epochs": 0, "compile": True, "compile_options": {"backend": backend}}
    results[name] = train(module, Path(name), strategy=strategy, **more)
    results[f"{name} compiles"] = linears
torch.save(results, f"loaded-{rank}.pt")
"""


@pytest.mark.timeout(150)
def test_loaded_and_compiled_modules_train_what_one_process_trains(ranks: StartRanks, tmp_path: Path) -> None:
    """Weights are read into the parts of a module on the meta device; no rank has a whole one."""
    alone = Bare(Case(rows=32, clips=True))
    torch.save(alone.state_dict(), tmp_path / "start.pt")
    save_file(alone.state_dict(), tmp_path / "start.safetensors")
    started = ranks(LOADED)
    trained = train(alone, tmp_path / "alone", strategy="single", val_interval_epochs=0)
    started.end().check()
    largest = max(one.numel() for one in alone.parameters())
    for rank in (0, 1):
        results = torch.load(tmp_path / f"loaded-{rank}.pt", weights_only=False)
        assert 0 < results["elements"] <= largest // 2
        for name in ("meta", "ddp", "fsdp", "recomputed"):
            check_same(trained, results[name], (rank, name))
        # The two blocks share a graph under FSDP, where each is compiled by itself.
        assert [results[f"{name} compiles"] for name in ("ddp", "fsdp", "recomputed")] == [4, 3, 3]
