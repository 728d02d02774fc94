"""Structs that people build by hand: a wrong argument is an `ArgumentsError` that names the class and the right one."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import msgspec

from events.errors import ArgumentsError
from events.masking import masked

_Method = TypeVar("_Method", bound=Callable[..., Any])


def nearest(name: str, known: Iterable[str], aliases: Mapping[str, str], likeness: float = 0.7) -> str | None:
    """What serves instead of an unknown name.

    Args:
        name: What came.
        known: The names that exist.
        aliases: By other names (those of other trainers): the known one, or what to do in a few words.
        likeness: How alike a misspelt name must be to one of these, from 0 to 1.

    Returns:
        A known name, the words of an alias, or None if nothing is near.
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
    """Say of each name that it is not known, and what serves instead; the known names are listed once, at the end."""
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
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], aliases: Mapping[str, str]
) -> list[str]:
    """Say what is wrong with the arguments of a call, in the order in which one would mend it.

    Args:
        signature: What can be given, without ``self``.
        aliases: As `nearest` takes them.
    """
    known = signature.parameters
    positional = [name for name, one in known.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    problems = unknown_names([name for name in kwargs if name not in known], list(known), aliases)
    if len(args) > len(positional):
        problems.append(f"{args[len(positional)]!r:.80} has no name; write name=value")
    by_place = positional[: len(args)]
    problems += [f"{name}: is given twice; give it once" for name in by_place if name in kwargs]
    if not problems:  # or what is missing is what was misspelt
        given = {*by_place, *kwargs}
        missing = [name for name, one in known.items() if one.default is one.empty and name not in given]
        problems += [f"{name}: is missing; give it" for name in missing]
    return problems


def refusing(aliases: Mapping[str, str]) -> Callable[[_Method], _Method]:
    """Have a method that takes no arguments name those that it gets, and what serves instead.

    Args:
        aliases: What serves instead of an argument of another library, in a few words.
    """

    def decorate(method: Any) -> Any:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
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
    """Looks at the arguments of a constructor once it has refused them, so that right ones cost nothing."""

    if not TYPE_CHECKING:  # a type checker must see the constructor of each Struct

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().__call__(*args, **kwargs)
            except TypeError:
                problems = argument_problems(inspect.signature(self), args, kwargs, self.argument_aliases)
                if not problems:
                    raise  # raised in `__post_init__`, not by the constructor
                raise ArgumentsError(f"{self.__name__}: {'; '.join(problems)}") from None


class Strict(msgspec.Struct, frozen=True, metaclass=_StrictType):
    """Base of Structs whose constructor names what is wrong with its arguments.

    Decoding and `msgspec.structs.replace` do not pass through it.
    """

    argument_aliases: ClassVar[Mapping[str, str]] = {}
    """Names that other libraries have for fields: the field, or what to do in a few words."""

    def __repr__(self) -> str:
        """Show the fields, without the passwords of URLs: a settings object ends in logs."""
        return masked(super().__repr__())
