"""A group of one rank on a GPU: the same run as without a group."""

from __future__ import annotations

import pytest
import torch
from support.ranks import StartRanks

PROGRAM = """
from torch import nn
from support.together import Tiny, run, weights
from trainer.distributed import Ddp

class OnGpu(Tiny):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), rows=24)
        self.net.float()
        self.x = self.x.float()

    def train_step(self, global_step, batch, device):
        return nn.functional.cross_entropy(self.net(batch[0].to(device)), batch[1].to(device))

    val_step = train_step

    def on_end_val_epoch(self, global_step, *outputs, key="default"):
        pass

def train(name, **arguments):
    module = OnGpu()
    result = run(module, name, device="cuda", train_batch_size=12, gpu_batch_size_limit=4, clip_grads=True, **arguments)
    return weights(module), result.metrics["val_loss"]

alone, loss = train("alone", strategy="single")
for name, options in {"ddp": {}, "norm": {"sync_batch_norm": True}, "unused": {"find_unused_parameters": True}}.items():
    found, its_loss = train(name, strategy=Ddp(**options))
    assert max(abs(one - other) for one, other in zip(alone, found, strict=True)) < 1e-4, name
    assert abs(loss - its_loss) < 1e-4, name
for precision in ("float16", "bfloat16"):
    train(precision, strategy="ddp", precision=precision)
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.timeout(200)
def test_a_group_of_one_gpu_trains_as_no_group_does(ranks: StartRanks) -> None:
    """NCCL, synchronised batch norms, float16 and bfloat16."""
    ended = ranks(PROGRAM, 1).end(180)
    assert ended.code == 0, ended.err
