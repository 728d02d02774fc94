"""What a program of several ranks sees of its runs: hooks, metrics, data of its own, batch norm. Plain values."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import anyio
import torch
import torch.distributed as dist
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from trainer import (
    CallbackInterface,
    Delivery,
    ModuleInterface,
    Trainer,
    TrainerArguments,
    fenced,
    find_learning_rate,
    inline,
)
from trainer.callbacks import EMA, EarlyStopping
from trainer.distributed import Ddp

RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


class Tiny(ModuleInterface):
    """A classifier of 10 rows; rank 1 of 2 is short of a block at the end of its data."""

    def __init__(self, net: nn.Module | None = None, rows: int = 10) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
        self.y = torch.randint(3, (rows,), generator=generator)
        self.net = (net or nn.Linear(4, 3)).double()
        for number, parameter in enumerate(self.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.train_accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.seen = 0

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        self.told = (steps, epochs)
        return [torch.optim.SGD(self.parameters(), lr=0.1)], []

    def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
        data = TensorDataset(self.x, self.y)
        return DataLoader(data, batch_size=batch_size, sampler=sampler(data))

    def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
        data = TensorDataset(self.x[:2], self.y[:2])  # one batch: rank 1 is idle
        return DataLoader(data, batch_size=batch_size, sampler=sampler(data))

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        logits = self.net(batch[0])
        self.train_accuracy.update(logits, batch[1])
        self.log("train_accuracy", self.train_accuracy)
        return nn.functional.cross_entropy(logits, batch[1])

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        logits = self.net(batch[0])
        self.accuracy.update(logits, batch[1])
        self.log("accuracy", self.accuracy)
        self.seen += len(batch[1])
        return nn.functional.cross_entropy(logits, batch[1]), logits

    def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
        self.log("seen_here", float(self.seen))  # differs: what a rank has seen itself


class Observing(CallbackInterface):
    """Notes which of its hooks run."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @inline
    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.calls.append("step")

    @fenced
    def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
        self.calls.append("epoch")

    def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
        self.calls.append(f"validation of {len(outputs[1])}")


class Judge(CallbackInterface):
    """Notes the metrics that it judges."""

    def __init__(self) -> None:
        self.judged: list[dict[str, float]] = []

    def should_stop(self, global_step: int, metrics: dict[str, Any]) -> str | None:
        self.judged.append({name: float(value) for name, value in metrics.items()})
        return None


def run(module: ModuleInterface, name: str, callbacks: Any = (), **arguments: Any) -> Any:
    """Train with few rows per step; returns the result."""
    given = {"epochs": 1, "train_batch_size": 4, "val_batch_size": 2, "seed": 0, **arguments}
    return Trainer(
        module, TrainerArguments(**given), callbacks=callbacks, sinks=[], checkpoints=False, run_dir=f"together-{name}"
    ).train()


def weights(module: nn.Module) -> list[float]:
    """The parameters, as numbers."""
    return [value for one in module.parameters() for value in one.detach().flatten().tolist()]


def hooks_and_metrics() -> dict[str, Any]:
    """Which hooks run where, and the metrics that they judge."""
    module, everywhere, here, judge = Tiny(), Observing(), Observing(), Judge()
    result = run(module, "hooks", [(everywhere, Delivery(ranks="all")), here, judge])
    return {
        "everywhere": everywhere.calls,
        "here": here.calls,
        "judged": judge.judged,
        "metrics": result.metrics,
        "told": module.told,
        "weights": weights(module),
    }


def stops() -> int:
    """The step at which a callback stops the run: of metrics that differ between the ranks."""
    return int(run(Tiny(), "stops", [EarlyStopping("seen_here", patience=2, mode="min")], epochs=9).global_step)


def unfreezes() -> dict[str, Any]:
    """Weights after a parameter was unfrozen between two epochs."""

    class Unfreezing(Tiny):
        def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
            self.net[1].requires_grad_(epoch > 0)

    module = Unfreezing(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    run(module, "unfreezes", epochs=2)
    return {"weights": weights(module)}


def batch_norm() -> dict[str, Any]:
    """Batch norm: the ranks validate with the same running statistics."""

    class Validated(Tiny):
        def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            return self.get_train_dataloader(sampler, batch_size)

    module = Validated(nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)), rows=16)
    result = run(module, "norm")
    module.eval()
    with torch.no_grad():
        by_hand = float(nn.functional.cross_entropy(module.net(module.x), module.y))
    return {"val_loss": result.metrics["val_loss"], "by_hand": by_hand, "weights": weights(module)}


def unused() -> str:
    """The error of a module with a parameter that no step uses."""
    module = Tiny()
    module.spare = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    try:
        run(module, "unused")
    except Exception as error:
        return "\n".join([str(error), *getattr(error, "__notes__", ())])
    return ""


def unused_is_found() -> list[float]:
    """The value of that parameter with the option, under weight decay."""
    module = Tiny()
    module.spare = nn.Parameter(torch.ones(1, dtype=torch.float64))
    run(module, "unused-is-found", strategy=Ddp(find_unused_parameters=True) if WORLD_SIZE > 1 else "auto")
    return [float(module.spare.detach())]


class OwnData(Tiny):
    """Trains on data of its own: DistributedSampler, or a stream of rows."""

    def __init__(self, kind: str) -> None:
        super().__init__(rows=11)
        self.kind = kind
        self.rows: list[int] = []

    def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
        data = TensorDataset(self.x, self.y, torch.arange(11))
        if self.kind == "sampler":
            own = DistributedSampler(data, WORLD_SIZE, RANK, shuffle=False) if WORLD_SIZE > 1 else None
            return DataLoader(data, batch_size=batch_size, sampler=own)
        module = self

        class Stream(IterableDataset[Any]):
            """Rank 0 has 6 rows, rank 1 has 5."""

            def __iter__(self) -> Iterator[Any]:
                start, step = (0, 1) if module.kind == "same" else (RANK, WORLD_SIZE)
                return iter([data[i] for i in range(start, 11, step)])

        class Sized(Stream):
            def __len__(self) -> int:
                return len(range(RANK, 11, WORLD_SIZE))

        return DataLoader(Sized() if self.kind == "sized" else Stream(), batch_size=1)

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        self.rows += batch[2].tolist()
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def own_data(kind: str) -> dict[str, Any]:
    """What each rank trains on, and the weights."""
    module = OwnData(kind)
    result = run(module, f"own-{kind}", train_batch_size=2 * WORLD_SIZE, gpu_batch_size_limit=1)
    return {"rows": module.rows, "weights": weights(module), "steps": result.global_step}


def evaluations() -> dict[str, Any]:
    """What `Trainer.validate` and `Trainer.test` return."""

    class Tested(Tiny):
        def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            data = TensorDataset(self.x, self.y)
            return {
                "sampled": DataLoader(data, batch_size=batch_size, sampler=sampler(data)),
                "in order": DataLoader(data, batch_size=3),
                "listed": [(self.x[:4], self.y[:4]), (self.x[4:], self.y[4:])],
            }

        get_test_dataloaders = get_val_dataloaders
        test_step = Tiny.val_step

        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
            pass

    module = Tested()
    arguments = TrainerArguments(val_batch_size=2, max_val_steps_per_epoch=3, train_batch_size=4)
    validated = Trainer(module, arguments, sinks=[], checkpoints=False, run_dir="together-validate").validate()
    tested = Trainer(module, arguments, sinks=[], checkpoints=False, run_dir="together-test").test()
    return {"validated": validated, "tested": {key: [one.tolist() for one in value] for key, value in tested.items()}}


def averaged() -> dict[str, Any]:
    """EMA that validates its average."""
    module = Tiny()
    result = run(module, "ema", [EMA(module, decay=0.5, validate=True)], epochs=2)
    return {"val_loss": result.metrics["val_loss"], "weights": weights(module)}


def precisions() -> dict[str, list[float]]:
    """Weights after training in other precisions, and with compiled steps."""

    class Plain(Tiny):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    found = {}
    for name, arguments in {
        "bfloat16": {"precision": "bfloat16"},
        "float16": {"precision": "float16", "clip_grads": True},
        "compiled": {"compile": True, "compile_options": {"backend": "eager"}},
    }.items():
        module = Plain()
        module.net.float()
        module.x = module.x.float()
        run(module, name, gpu_batch_size_limit=1, **arguments)
        found[name] = weights(module)
    return found


def tuned() -> list[float]:
    """The curve of `find_learning_rate`, which each rank computes for itself."""
    found = find_learning_rate(Tiny(), TrainerArguments(train_batch_size=4, seed=0), steps=10)
    return list(found.losses)


def hosted() -> dict[str, Any]:
    """A run inside a host's event loop."""

    async def main() -> tuple[int, list[float]]:
        module = Tiny()
        arguments = TrainerArguments(train_batch_size=4, val_batch_size=2, seed=0)
        async with Trainer(module, arguments, checkpoints=False, run_dir="together-hosted").run() as run:
            result = await run.result()
        return result.global_step, weights(module)

    steps, values = anyio.run(main)
    return {"steps": steps, "weights": values}


def in_the_hosts_group() -> dict[str, Any]:
    """A run of a program that has made the process group itself."""
    dist.init_process_group("gloo")
    module = Tiny()
    run(module, "own-group")
    is_left = dist.is_initialized()
    dist.destroy_process_group()
    return {"weights": weights(module), "is_left": is_left}


def everything() -> dict[str, Any]:
    """All of the above, by name."""
    found: dict[str, Any] = {}
    functions = hooks_and_metrics, stops, unfreezes, batch_norm, unused_is_found, evaluations, averaged, hosted, tuned
    for function in (*functions, precisions):
        found[function.__name__] = function()
    for kind in ("sampler", "sized", "stream"):
        found[kind] = own_data(kind)
    if WORLD_SIZE > 1:
        found["unused"] = unused()
        found["same"] = own_data("same")
        found["own group"] = in_the_hosts_group()
    else:
        found["modules"] = [name for name in sys.modules if name.startswith("trainer.distributed")]
        module = Tiny()
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        run(module, "of-one", strategy="ddp")
        found["of one"] = weights(module)
    return found
