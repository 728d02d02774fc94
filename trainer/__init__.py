"""The contract that users implement, and the trainer that runs it."""

import events as _events

if not getattr(_events, "__stagecast__", False):
    raise ImportError(
        f"stagecast needs its own package 'events', but {getattr(_events, '__file__', None) or _events!r} shadows it:"
        f" rename that file or folder, or take its folder off the front of sys.path"
    )

from events.sink import Delivery as Delivery
from trainer.arguments import TrainerArguments as TrainerArguments
from trainer.data import to_device as to_device
from trainer.module_interface import CallbackInterface as CallbackInterface
from trainer.module_interface import ModuleInterface as ModuleInterface
from trainer.module_interface import Stage as Stage
from trainer.module_interface import fenced as fenced
from trainer.module_interface import inline as inline
from trainer.module_interface import observer as observer
from trainer.trainer import Trainer as Trainer

__all__ = [
    "CallbackInterface",
    "Delivery",
    "ModuleInterface",
    "Stage",
    "Trainer",
    "TrainerArguments",
    "fenced",
    "inline",
    "observer",
    "to_device",
]
