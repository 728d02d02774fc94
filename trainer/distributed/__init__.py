"""Training on several devices and machines: the processes that ``torchrun`` starts train one run."""

from trainer.distributed.options import Ddp as Ddp

__all__ = ["Ddp"]
