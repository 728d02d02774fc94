"""Structs that people build by hand: a wrong argument is an `ArgumentsError` that names the class and the right one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from events.errors import ArgumentsError


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
                problems = self._problems(args, kwargs)
                if not problems:
                    raise  # raised in `__post_init__`, not by the constructor
                raise ArgumentsError(f"{self.__name__}: {'; '.join(problems)}") from None

        def _problems(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
            fields = inspect.signature(self).parameters
            positional = [name for name, one in fields.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
            unknown = [name for name in kwargs if name not in fields]
            problems = unknown_names(unknown, self.__struct_fields__, self.argument_aliases)
            if len(args) > len(positional):
                problems.append(f"{args[len(positional)]!r:.80} has no name; write name=value")
            given = {*positional[: len(args)], *kwargs}
            problems += [f"{name}: is given twice; give it once" for name in positional[: len(args)] if name in kwargs]
            missing = [name for name, one in fields.items() if one.default is one.empty and name not in given]
            return problems + [f"{name}: is missing; give it" for name in missing]


class Strict(msgspec.Struct, frozen=True, metaclass=_StrictType):
    """Base of Structs whose constructor names what is wrong with its arguments.

    Decoding and `msgspec.structs.replace` do not pass through it.
    """

    argument_aliases: ClassVar[Mapping[str, str]] = {}
    """Names that other libraries have for fields: the field, or what to do in a few words."""
