"""Structs whose constructors explain wrong arguments: an `ArgumentsError` names the class and the right argument."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import msgspec

from events.errors import ArgumentsError
from events.masking import masked

_Method = TypeVar("_Method", bound=Callable[..., object])


def nearest(name: str, known: Iterable[str], aliases: Mapping[str, str], likeness: float = 0.7) -> str | None:
    """Find the replacement for an unknown name.

    Args:
        name: The unknown name.
        known: The known names.
        aliases: Known names, or sentences, by the names of other trainers.
        likeness: Minimum similarity of a misspelt name, from 0 to 1.

    Returns:
        A known name, the sentence of an alias, or None.
    """
    known = list(known)
    aliases = {alias: served for alias, served in aliases.items() if alias not in known}
    if name in aliases:
        return aliases[name]
    words = sorted(name.split("_"))
    swapped = [one for one in known if len(words) > 1 and sorted(one.split("_")) == words]
    # A misspelt name may also be an alias.
    near = swapped or difflib.get_close_matches(name, [*known, *aliases], n=1, cutoff=likeness)
    return aliases.get(near[0], near[0]) if near else None


def unknown_names(
    names: Sequence[str], known: Sequence[str], aliases: Mapping[str, str] = {}, *, path: str = ""
) -> list[str]:
    """Describe each unknown name and its replacement; the known names are listed once, at the end."""
    problems, strange = [], []
    for name in names:
        near = nearest(name, known, aliases)
        if near is None:
            strange.append(f"{path}{name}")
        elif near in known:
            problems.append(f"{path}{name}: is not known; did you mean {path}{near}?")
        else:
            problems.append(f"{path}{name}: is not known; {near}")
    if strange:
        verb = "is" if len(strange) == 1 else "are"
        problems.append(f"{', '.join(strange)}: {verb} not known; known are {', '.join(known) or 'none'}")
    return problems


def argument_problems(
    signature: inspect.Signature, args: tuple[object, ...], kwargs: Mapping[str, object], aliases: Mapping[str, str]
) -> list[str]:
    """Describe problems with the arguments of a call, most urgent first.

    Args:
        signature: The signature, without ``self``.
        aliases: See `nearest`.
    """
    known = signature.parameters
    positional = [name for name, one in known.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    problems = unknown_names([name for name in kwargs if name not in known], list(known), aliases)
    if len(args) > len(positional):
        problems.append(f"{args[len(positional)]!r:.80} has no name; write name=value")
    by_place = positional[: len(args)]
    problems += [f"{name}: is given twice; give it once" for name in by_place if name in kwargs]
    if not problems:  # otherwise the missing name may be the misspelt one
        given = {*by_place, *kwargs}
        missing = [name for name, one in known.items() if one.default is one.empty and name not in given]
        problems += [f"{name}: is missing; give it" for name in missing]
    return problems


def refusing(aliases: Mapping[str, str]) -> Callable[[_Method], _Method]:
    """Make a method without parameters raise `ArgumentsError` for arguments, with their replacements.

    Args:
        aliases: Sentences by the names of other libraries' arguments.
    """

    def decorate(method: Any) -> Any:
        @functools.wraps(method)
        def call(self: object, *args: object, **kwargs: object) -> object:
            __tracebackhide__ = True
            if args or kwargs:
                where = f"{type(self).__name__}.{method.__name__}() takes no arguments"
                named = [f"instead of {name}, {aliases[name]}" for name in kwargs if name in aliases]
                raise ArgumentsError(f"{where}; {', '.join(named) or 'give them to ' + type(self).__name__}")
            return method(self)

        return call

    return decorate


if TYPE_CHECKING:
    from msgspec import StructMeta as _StructType
else:
    _StructType = type(msgspec.Struct)  # older versions do not export it


class _StrictType(_StructType):
    """Inspects the arguments of a constructor only after it has refused them, so that right ones cost nothing."""

    if not TYPE_CHECKING:  # a type checker must see the constructor of each Struct

        def __call__(self, *args: object, **kwargs: object) -> object:
            try:
                return super().__call__(*args, **kwargs)
            except TypeError:
                problems = argument_problems(inspect.signature(self), args, kwargs, self.argument_aliases)
                if not problems:
                    raise  # raised in `__post_init__`, not by the constructor
                raise ArgumentsError(f"{self.__name__}: {'; '.join(problems)}") from None


class Strict(msgspec.Struct, frozen=True, metaclass=_StrictType):
    """Base of Structs whose constructor explains wrong arguments.

    Decoding and `msgspec.structs.replace` bypass it.
    """

    argument_aliases: ClassVar[Mapping[str, str]] = {}
    """Fields, or sentences, by the names that other libraries use."""

    def __repr__(self) -> str:
        """Show the fields without passwords in URLs, because settings are logged."""
        return masked(super().__repr__())
