"""What the callbacks of this package look at when they are made, and when they first run."""

from __future__ import annotations

import math
from typing import Any

from trainer.errors import ArgumentsError, ContractError
from trainer.module_interface import ModuleInterface


class Checks:
    """Collects what is wrong with the arguments of one callback.

    Args:
        callback: Its class's name, for the message.
    """

    def __init__(self, callback: str) -> None:
        self._callback = callback
        self._problems: list[str] = []

    def that(self, right: bool, problem: str) -> None:
        """Note a problem, unless it is right."""
        if not right:
            self._problems.append(problem)

    def whole(self, name: str, value: Any) -> None:
        """It must be a whole number from 1."""
        self.that(type(value) is int and value >= 1, f"{name} must be a whole number, at least 1, not {value!r:.80}")

    def flag(self, name: str, value: Any) -> None:
        """It must be True or False."""
        self.that(isinstance(value, bool), f"{name} must be True or False, not {value!r:.80}")

    def module(self, value: Any) -> None:
        """It must be a module that can log."""
        shown = f"the class {value.__name__}" if isinstance(value, type) else f"{value!r:.80}"
        self.that(isinstance(value, ModuleInterface), f"module must be the ModuleInterface to be trained, not {shown}")

    def done(self) -> None:
        """Raises `ArgumentsError`, if there was a problem, which names all of them."""
        if self._problems:
            raise ArgumentsError(f"{self._callback}: {'; '.join(self._problems)}")


def is_finite(value: Any) -> bool:
    """Whether it is a plain finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def must_be_trained(callback: Any, module: ModuleInterface) -> None:
    """Raises `ContractError` if no run trains this module: what is logged through it would go nowhere."""
    if module._stagecast_recorder is None:
        raise ContractError(
            f"{type(callback).__name__} was given a {type(module).__name__} that this run does not train: give it the"
            f" very module that the Trainer gets"
        )
