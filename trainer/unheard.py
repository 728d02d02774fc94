"""Find methods that the trainer never calls: those of other trainers' contracts, and misspelt ones of ours."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping

from torch import nn

from events.strict import nearest
from trainer.peers import METHODS

_LIBRARIES = frozenset(
    ("composer", "fastai", "ignite", "keras", "lightning", "pytorch_lightning", "torch", "trainer", "transformers")
)
"""Packages whose classes have methods for other callers."""
_LIKENESS = 0.85  # `get_train_dataset` is not a misspelt `get_train_dataloader`


def unheard_methods(kind: type, contract: frozenset[str], own: Mapping[str, object] = {}) -> dict[str, str]:
    """Find the public methods of a user's class that the trainer never calls.

    Args:
        kind: The class.
        contract: The names that the trainer calls.
        own: Attributes of the instance.

    Returns:
        The replacement by name: a name of the contract, or a sentence. Methods that the class's own code calls, and
        those without a replacement, are skipped.
    """
    classes = [one for one in kind.__mro__ if one.__module__.partition(".")[0] not in _LIBRARIES]
    methods = {name: value for one in classes for name, value in vars(one).items() if _is_method(value)}
    methods |= {name: value for name, value in own.items() if name.startswith("on_") and callable(value)}
    aliases = {name: served for name, served in METHODS.items() if " " in served or served in contract}
    found: dict[str, str] = {}
    for name in methods:
        if not name.startswith("_") and name not in contract and not hasattr(nn.Module, name):
            served = nearest(name, contract, aliases, _LIKENESS)
            if served is not None:
                found[name] = served
    if found:
        called = {
            used
            for one in classes
            for name, value in vars(one).items()
            for used in _names_in(value)
            if used != name  # `super().training_step()` does not count as a call
        }
        found = {name: served for name, served in found.items() if name not in called}
    return found


def in_words(found: Mapping[str, str]) -> str:
    """Format the replacements of `unheard_methods` for a message."""
    return ", ".join(
        f"{name} is called {served} here" if " " not in served else f"instead of {name}, {served}"
        for name, served in found.items()
    )


def _is_method(value: object) -> bool:
    return isinstance(value, types.FunctionType | staticmethod | classmethod)


def _names_in(value: object) -> Iterator[str]:
    """The names that a function, method or property uses."""
    if isinstance(value, property):
        for part in (value.fget, value.fset):
            yield from _names_in(part)
        return
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    pending = [code] if isinstance(code, types.CodeType) else []
    while pending:
        one = pending.pop()
        yield from one.co_names
        pending += [const for const in one.co_consts if isinstance(const, types.CodeType)]
