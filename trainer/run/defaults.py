"""Defaults of a trainer: the name of a run, and the sink that shows it to a person."""

from __future__ import annotations

import importlib
import secrets
import time

from events.ipython import kernel_shell
from events.sink import Sink


def new_run_id() -> str:
    """Return a unique name that sorts by time: ``20260131-235959-a1b2c3``."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def console() -> Sink:
    """Return the default sink of `Trainer.train`, imported on first use."""
    sink: Sink = importlib.import_module("sinks").Console()
    return sink


def default_sinks() -> tuple[Sink, ...]:
    """Return the default sinks of `Trainer.run` and `Trainer.start`: in a notebook a person watches."""
    return (console(),) if kernel_shell() is not None else ()
