"""Configuration files, dotted overrides, and strict checks of any `msgspec.Struct`.

One `ArgumentsError` reports all problems; each names the path of the field, its value and the allowed values. Integers
are accepted for floats; nothing else is coerced.
"""

from __future__ import annotations

import functools
import json
import re
import reprlib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import msgspec
import yaml
from msgspec import inspect
from msgspec.structs import force_setattr

from events.bounds import INT_MAX, INT_MIN
from events.strict import unknown_names
from trainer.errors import ArgumentsError

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_SHOWN_BITS = 10_000  # Python refuses to write a longer integer as text

# ------------------------------------------------------------------------------------------------ reading


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML in which ``1e-4`` is a number (YAML 1.1: ``1.0e-4``) and duplicate keys are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is duplicated", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> object:
    """Parse a value as YAML (safe types only). Raises `yaml.YAMLError`; ValueError for an impossible date."""
    return yaml.load(text, Loader=_YamlLoader)


# tomllib, json and text decoding raise ValueErrors; too deep nesting raises RecursionError.
UNREADABLE = (ValueError, RecursionError, yaml.YAMLError)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values: dict[str, object] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {name!r} is duplicated")
        values[name] = value
    return values


_PARSERS: dict[str, tuple[str, Callable[[str], object]]] = {
    ".yaml": ("YAML", parse_yaml),
    ".yml": ("YAML", parse_yaml),
    ".toml": ("TOML", tomllib.loads),
    ".json": ("JSON", functools.partial(json.loads, object_pairs_hook=_unique)),
}


def load_config(path: str | PathLike[str]) -> dict[str, object]:
    """Read a mapping from a file with the suffix .yaml, .yml, .toml or .json; an empty YAML file is an empty mapping.

    Raises:
        ArgumentsError: The file cannot be read or parsed, or does not hold a mapping.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _PARSERS:
        raise ArgumentsError(f"{path}: the suffix {suffix!r} is not one of {', '.join(_PARSERS)}")
    language, parse = _PARSERS[suffix]
    try:
        config = parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UNREADABLE as error:
        raise ArgumentsError(f"{path}: is not valid {language}: {error}") from error
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise ArgumentsError(f"{path}: must hold a mapping of names to values, not {reprlib.repr(config)}")
    return config


def apply_overrides(
    config: Mapping[str, object], overrides: Iterable[object], problems: list[str]
) -> dict[str, object]:
    """Return a copy of ``config`` with ``"name=value"``, ``"group.name=value"``, ``"list.0=value"`` applied, in order.

    Values are read as YAML: ``1e-4`` is a number, ``null`` is None, ``[1, 2]`` a list. Missing groups and lists are
    created; an index equal to a list's length appends.

    Args:
        problems: Receives a description of each override that is skipped: it has no ``=``, an empty name, a value that
            is not YAML, or a path that leads through a plain value or past the end of a list.
    """
    result = dict(config)
    for override in overrides:
        if not isinstance(override, str):
            problems.append(f"override {override!r}: must be text like 'name=value'")
            continue
        path, equals, text = override.partition("=")
        names = path.strip().split(".")
        if not equals or not all(names):
            problems.append(f"override {override!r}: must look like 'name=value' or 'group.name=value'")
            continue
        try:
            result = _replaced(result, names, 0, parse_yaml(text))
        except UNREADABLE as error:
            problems.append(f"override {override!r}: the value is not valid YAML: {error}")
        except LookupError as error:
            problems.append(f"override {override!r}: {error.args[0]}")
    return result


def _replaced(group: Mapping[str, object], names: list[str], depth: int, value: object) -> dict[str, object]:
    """Copy a group with the value at the path ``names``. Raises LookupError for an impossible path."""
    name = names[depth]
    return {**group, name: _replaced_in(group.get(name), names, depth + 1, value)}


def _replaced_in(group: object, names: list[str], depth: int, value: object) -> object:
    if depth == len(names):
        return value
    name, at = names[depth], ".".join(names[:depth])
    if group is None and name == "0":  # starts a missing list
        group = []
    if isinstance(group, list):
        place = int(name) if name.isdecimal() else len(group) + 1
        if place > len(group):
            raise LookupError(f"{at} is a list of {len(group)}: {name!r} is not an index from 0 to {len(group)}")
        inner = group[place] if place < len(group) else None
        return [*group[:place], _replaced_in(inner, names, depth + 1, value), *group[place + 1 :]]
    if group is not None and not isinstance(group, Mapping):
        raise LookupError(f"{at} is {reprlib.repr(group)}, not a group of values")
    return _replaced(group or {}, names, depth, value)


# ----------------------------------------------------------------------------------------------- checking


def decode(
    kind: type[_Struct],
    config: Mapping[str, object],
    source: str,
    overrides: Iterable[str] = (),
    known_problems: Iterable[str] = (),
) -> _Struct:
    """Build a Struct from plain values and overrides, strictly.

    Args:
        kind: The Struct; fields that are Structs (or None) are decoded recursively.
        config: Values by field name.
        source: The origin of the values, for the message.
        overrides: See `apply_overrides`.
        known_problems: Earlier problems for the same error.

    Raises:
        ArgumentsError: Lists every unknown key (with the nearest known one), missing field, and wrong value.
    """
    if not isinstance(config, Mapping):
        raise ArgumentsError(f"{source}: must be a mapping of names to values, not {reprlib.repr(config)}")
    overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    problems = list(known_problems)
    values = _convert_fields(kind, apply_overrides(config, overrides, problems), "", problems)
    if overrides:
        source += f" with {', '.join(map(str, overrides))}"
    _raise_if(problems, source)
    return kind(**values)


def check_struct(struct: msgspec.Struct) -> None:
    """Check every field of a Struct against its type and constraints; for `__post_init__`.

    Values of a convertible type (an integer for a float) are converted, and containers are copied, so that the caller
    cannot change them later.

    Raises:
        ArgumentsError: Lists every wrong value.
    """
    problems: list[str] = []
    kind = type(struct)
    current = {name: getattr(struct, name) for name in kind.__struct_fields__}
    for name, value in _convert_fields(kind, current, "", problems).items():
        force_setattr(struct, name, value)
    _raise_if(problems, kind.__name__)


def _raise_if(problems: list[str], source: str) -> None:
    if problems:
        raise ArgumentsError(f"{source}: " + "; ".join(problems))


def _convert_fields(
    kind: type[msgspec.Struct], values: Mapping[str, object], path: str, problems: list[str]
) -> dict[str, Any]:
    """Convert each value to its field's type; add failures to ``problems``."""
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    unknown = [str(key) for key in values if key not in fields]
    problems += unknown_names(unknown, list(fields), getattr(kind, "argument_aliases", {}), path=path)
    problems += [f"{path}{name}: is missing" for name, field in fields.items() if field.required and name not in values]
    converted = {}
    for name, field in fields.items():
        if name in values:
            converted[name] = _convert(values[name], field.type, f"{path}{name}", problems)
    return converted


def _convert(value: object, expected: object, path: str, problems: list[str]) -> Any:
    structs = _structs_of(expected)
    if structs and isinstance(value, Mapping):
        before = len(problems)
        inner, value = _chosen(structs, value, path, problems)
        parts = _convert_fields(inner, value, f"{path}.", problems)
        if len(problems) > before:
            return None
        try:
            return inner(**parts)
        except (TypeError, ValueError) as error:  # from its __post_init__: fields that contradict each other
            problems.append(f"{path}: {error}")
            return None
    bits = value.bit_length() if type(value) is int and not INT_MIN <= value <= INT_MAX else 0
    try:
        converted = msgspec.convert(value, expected, str_keys=True)  # JSON, TOML and overrides have no others
        if not bits:
            return converted
    except msgspec.ValidationError as error:
        if bits < _SHOWN_BITS:
            inside = f" ({error})" if " - at " in str(error) else ""
            problems.append(f"{path} = {reprlib.repr(value)}: must be {describe_type(expected)}{inside}")
            return None
    problems.append(f"{path}: an integer has {bits:,} bits; give one within 64 bits")
    return None


def _structs_of(kind: object) -> list[type[msgspec.Struct]]:
    """The Struct types of a field, optional or not: one, or several with tags."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind]
    if get_origin(kind) not in (Annotated, Union, UnionType):
        return []
    return [struct for one in get_args(kind) for struct in _structs_of(one)]


def _chosen(
    structs: list[type[msgspec.Struct]], value: Mapping[str, object], path: str, problems: list[str]
) -> tuple[type[msgspec.Struct], Mapping[str, object]]:
    """The Struct that a mapping names by its tag, and the mapping without the tag; without one, the first Struct."""
    tags = {struct.__struct_config__.tag: struct for struct in structs}
    field = structs[0].__struct_config__.tag_field
    if field is None or field not in value:
        return structs[0], value
    tag = value[field]
    named = tags.get(tag) if isinstance(tag, str) else None
    if named is None:
        known = ", ".join(map(repr, tags))
        problems.append(f"{path}.{field} = {reprlib.repr(tag)}: must be one of {known}")
    return named or structs[0], {name: one for name, one in value.items() if name != field}


# ------------------------------------------------------------------------------------------------- words


def describe_type(kind: object) -> str:
    """Describe a field's type and constraints: ``an integer >= 1 or None``."""
    return _words(inspect.type_info(kind))


def _words(node: inspect.Type) -> str:
    match node:
        case inspect.Metadata():
            return _words(node.type)
        case inspect.UnionType():
            parts = sorted(node.types, key=lambda part: isinstance(part, inspect.NoneType))  # None last
            return " or ".join(_words(part) for part in parts)
        case inspect.IntType():
            return "an integer" + _bounds(node)
        case inspect.FloatType():
            return "a number" + _bounds(node)
        case inspect.StrType():
            return "a string that is not empty" if node.min_length else "a string"
        case inspect.LiteralType():
            return "one of " + ", ".join(repr(value) for value in sorted(node.values, key=str))
        case inspect.DictType(key_type=inspect.IntType()):
            return f"a mapping of {_words(node.key_type)} to {_words(node.value_type)}"
        case inspect.StructType():
            return f"a mapping of the fields of {node.cls.__name__}"
        case _:
            return _PLAIN_WORDS.get(type(node), type(node).__name__.removesuffix("Type").lower())


def _bounds(node: inspect.IntType | inspect.FloatType) -> str:
    signs = ((">", node.gt), (">=", node.ge), ("<", node.lt), ("<=", node.le))
    texts = [
        f"{sign} {bound:g}" if isinstance(bound, float) else f"{sign} {bound}"
        for sign, bound in signs
        if bound is not None
    ]
    return " " + " and ".join(texts) if texts else ""


_PLAIN_WORDS: dict[type[inspect.Type], str] = {
    inspect.NoneType: "None",
    inspect.BoolType: "true or false",
    inspect.DictType: "a mapping with string keys",
    inspect.ListType: "a list",
    inspect.VarTupleType: "a list",
    inspect.AnyType: "anything",
}
