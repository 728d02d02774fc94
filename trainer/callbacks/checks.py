"""Checks of the callbacks of this package, in their constructors and in a run."""

from __future__ import annotations

import math

from trainer.errors import ArgumentsError, ContractError
from trainer.module_interface import ModuleInterface


class Checks:
    """Collects problems with the arguments of a callback.

    Args:
        callback: The name of its class, for the message.
    """

    def __init__(self, callback: str) -> None:
        self._callback = callback
        self._problems: list[str] = []

    def that(self, holds: bool, problem: str) -> None:
        """Add a problem, unless the condition holds."""
        if not holds:
            self._problems.append(problem)

    def count(self, name: str, value: object) -> None:
        """Check for an integer >= 1."""
        self.that(type(value) is int and value >= 1, f"{name} must be an integer >= 1, not {value!r:.80}")

    def flag(self, name: str, value: object) -> None:
        """Check for True or False."""
        self.that(isinstance(value, bool), f"{name} must be True or False, not {value!r:.80}")

    def module(self, value: object) -> None:
        """Check for an instance of `ModuleInterface`."""
        shown = f"the class {value.__name__}" if isinstance(value, type) else f"{value!r:.80}"
        self.that(isinstance(value, ModuleInterface), f"module must be the trained ModuleInterface, not {shown}")

    def done(self) -> None:
        """Raise one `ArgumentsError` for all problems."""
        if self._problems:
            raise ArgumentsError(f"{self._callback}: {'; '.join(self._problems)}")


def is_finite(value: object) -> bool:
    """Whether a value is a plain finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def must_be_trained(callback: object, module: ModuleInterface) -> None:
    """Raise `ContractError` if the run does not train this module: values that it logs would be lost."""
    if module._stagecast_recorder is None:
        raise ContractError(
            f"{type(callback).__name__} has a {type(module).__name__} that this run does not train; give it the module"
            f" of the Trainer"
        )
