"""torch.compile, applied to a module's steps for the length of a run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch

from trainer.callback_interface import CallbackInterface
from trainer.module_interface import ModuleInterface

_STEPS = ("train_step", "val_step", "test_step")


def compile_steps(module: ModuleInterface, options: Mapping[str, Any]) -> Callable[[], None]:
    """Compile the step methods in place, so that names in the state dict stay as they are; returns what undoes it."""
    make_log_opaque(module)
    before = {name: vars(module)[name] for name in _STEPS if name in vars(module)}
    for name in _STEPS:
        object.__setattr__(module, name, torch.compile(getattr(module, name), **options))

    def restore() -> None:
        for name in _STEPS:
            vars(module).pop(name, None)
        vars(module).update(before)

    return restore


_opaque_lock = threading.Lock()


def make_log_opaque(module: ModuleInterface) -> None:
    """Keep `CallbackInterface.log`, `log_dict` and `ModuleInterface.optimize` out of compiled graphs.

    Call it before compiling methods of ``module``.

    Without it torch.compile would trace into the recorder, specialise on each metric's name and compile again
    and again. The mark is a wrapper that costs about half a microsecond per call, which is why it is not
    there from the start: it is put on the classes (once, for the rest of the process) only when something is
    compiled. Idempotent, any thread.
    """
    with _opaque_lock:
        for kind in type(module).__mro__:
            for name in ("log", "log_dict", "optimize"):
                method = vars(kind).get(name)
                ours = issubclass(kind, CallbackInterface) and isinstance(method, FunctionType)
                if ours and not hasattr(method, "_torchdynamo_disable"):
                    setattr(kind, name, torch.compiler.disable(method))  # type: ignore[no-untyped-call]
