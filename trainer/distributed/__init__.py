"""Training on several devices and machines: the processes that ``torchrun`` starts train one run."""

from trainer.distributed.options import Ddp as Ddp
from trainer.distributed.options import Fsdp as Fsdp
from trainer.errors import PeerFailed as PeerFailed

__all__ = ["Ddp", "Fsdp", "PeerFailed"]
