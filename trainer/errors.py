"""Errors of the trainer: arguments that cannot work, and modules that break the contract.

StagecastError                    (events.errors)
├── ArgumentsError                arguments or a configuration file that cannot be used; also a ValueError
├── ContractError                 the user's module does not keep the contract
│   ├── DataLoaderError           no dataloader, or not one, came back; also a TypeError
│   │   └── EmptyDataLoader       a dataloader yielded no batch
│   ├── StepOutputError           a step returned no loss tensor, or nothing that can be kept; also a TypeError
│   ├── OptimizerError            get_optimizers_schedulers returned something else; also a TypeError
│   └── MetricNotFound            the monitored metric was never logged; also a LookupError
├── NonFiniteLossError            the loss was NaN or infinite and the policy says stop; also an ArithmeticError
├── EpochOutputsTooLarge          outputs kept for the end of an epoch exceed their limit; also a MemoryError
└── PrecisionError                this torch cannot do the requested precision

Whatever the user's own code raises comes out as itself, never wrapped in one of these.
"""

from __future__ import annotations

import contextlib

from events.errors import StagecastError


class ArgumentsError(StagecastError, ValueError):
    """Arguments that cannot be used: names every wrong field, its value and what is allowed."""


class ContractError(StagecastError):
    """The user's module does not keep the contract: names the method and what it returned."""


class DataLoaderError(ContractError, TypeError):
    """A method that returns dataloaders returned something else."""


class EmptyDataLoader(DataLoaderError):
    """A dataloader yielded no batch, so there is nothing to train or evaluate."""


class StepOutputError(ContractError, TypeError):
    """A step did not return what the contract says: a loss tensor first, then any further outputs."""


class OptimizerError(ContractError, TypeError):
    """`get_optimizers_schedulers` did not return optimizers and schedulers."""


class MetricNotFound(ContractError, LookupError):
    """The metric that a scheduler waits for was neither logged nor computed; names those that were."""


class NonFiniteLossError(StagecastError, ArithmeticError):
    """The loss was NaN or infinite, and ``non_finite_loss="stop"`` ends the run there."""


class EpochOutputsTooLarge(StagecastError, MemoryError):
    """The outputs kept for the end of an epoch exceed their limit; names the hook and the ways out."""


class PrecisionError(StagecastError):
    """The requested precision needs something that this version of torch does not have."""


def add_note(error: BaseException, text: str) -> None:
    """Say where an exception came from. One of the user's own kind may refuse: then it goes without."""
    with contextlib.suppress(Exception):
        error.add_note(text)
