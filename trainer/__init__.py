"""The contract that users implement, and the trainer that runs it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__stagecast__ = True
"""Tells the other packages that this one, under its generic name, is ours."""

import events as _events  # it looks at `sinks`, too

if not getattr(_events, "__stagecast__", False):
    _shadow = getattr(_events, "__file__", None) or ", ".join(getattr(_events, "__path__", ())) or repr(_events)
    raise ImportError(
        f"stagecast needs its own package 'events', but {_shadow} shadows it: rename that file or folder, or take its"
        f" folder off the front of sys.path",
        name="events",
        path=_shadow,
    )

if TYPE_CHECKING:
    from events.checkpoint.settings import Checkpoints as Checkpoints
    from events.sink import Delivery as Delivery
    from trainer.arguments import TrainerArguments as TrainerArguments
    from trainer.audio import Audio as Audio
    from trainer.callback_interface import CallbackInterface as CallbackInterface
    from trainer.callback_interface import fenced as fenced
    from trainer.callback_interface import inline as inline
    from trainer.callback_interface import observer as observer
    from trainer.checkpoint.init_from import InitFrom as InitFrom
    from trainer.data.tensors import to_device as to_device
    from trainer.errors import RunInterrupted as RunInterrupted
    from trainer.errors import RunTerminated as RunTerminated
    from trainer.loop.schedule import Schedule as Schedule
    from trainer.media import Histogram as Histogram
    from trainer.media import Image as Image
    from trainer.module_interface import ModuleInterface as ModuleInterface
    from trainer.module_interface import Stage as Stage
    from trainer.remote.connect import connect as connect
    from trainer.remote.launch import launch as launch
    from trainer.tables import Table as Table
    from trainer.trainer import Trainer as Trainer
    from trainer.tuning.batch_size import find_batch_size as find_batch_size
    from trainer.tuning.learning_rate import find_learning_rate as find_learning_rate

__all__ = [
    "Audio",
    "CallbackInterface",
    "Checkpoints",
    "Delivery",
    "Histogram",
    "Image",
    "InitFrom",
    "ModuleInterface",
    "RunInterrupted",
    "RunTerminated",
    "Schedule",
    "Stage",
    "Table",
    "Trainer",
    "TrainerArguments",
    "connect",
    "fenced",
    "find_batch_size",
    "find_learning_rate",
    "inline",
    "launch",
    "observer",
    "to_device",
]

_HOMES = {
    "Audio": "trainer.audio",
    "CallbackInterface": "trainer.callback_interface",
    "Checkpoints": "events.checkpoint.settings",
    "Delivery": "events.sink",
    "Histogram": "trainer.media",
    "Image": "trainer.media",
    "InitFrom": "trainer.checkpoint.init_from",
    "RunInterrupted": "trainer.errors",
    "RunTerminated": "trainer.errors",
    "Schedule": "trainer.loop.schedule",
    "Table": "trainer.tables",
    "Trainer": "trainer.trainer",
    "TrainerArguments": "trainer.arguments",
    "connect": "trainer.remote.connect",
    "fenced": "trainer.callback_interface",
    "find_batch_size": "trainer.tuning.batch_size",
    "find_learning_rate": "trainer.tuning.learning_rate",
    "inline": "trainer.callback_interface",
    "launch": "trainer.remote.launch",
    "observer": "trainer.callback_interface",
    "to_device": "trainer.data.tensors",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: ``stagecast --help`` need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES.get(name, "trainer.module_interface")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
