"""Conditions on runs, such as ``lr > 0.01 and val_loss < 0.5``: read by a small parser, never by Python.

::

    condition   either ("or" either)*       either   part ("and" part)*
    part        "not" part | "(" condition ")" | value [operator value]
    operator    < <= > >= == = != ~ !~      (~ searches a regular expression in a text)
    value       a column, a number, true, false, none, nan, a date such as 2026-11-30, or a text in quotes

A column whose name has other characters is written in backticks. A word on the right that is not a column is a text
where two values are compared for equality: ``status == failed``. A comparison with a value that a run does not have is
false; only ``!=`` and ``!~`` are true.
"""

from __future__ import annotations

import datetime
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from events.errors import ArgumentsError
from events.table.columns import Columns, Value
from events.table.entry import RunEntry

MAX_CHARS = 2_000
"""Maximum characters per condition."""
MAX_DEPTH = 50
"""Maximum parentheses and ``not`` in each other."""

_TOKEN = re.compile(r"""\s*(?:(?P<op><=|>=|==|!=|!~|[<>=~()])|`(?P<name>[^`]*)`|"(?P<text>[^"]*)"|'(?P<other>[^']*)'"""
                    r"""|(?P<word>[^\s<>=!~()`"']+))""")  # fmt: skip
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_OPERATORS = frozenset({*_ORDER, "==", "=", "!=", "~", "!~"})
_WORDS: dict[str, Value] = {"true": True, "false": False, "none": None, "nan": math.nan}
_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ][\d:.+Z-]+)?")
_GROUPS = re.compile(r"\(\?(<?[=!]|P?<\w+>|P=\w+)")

Condition = Callable[[RunEntry], bool]
Search = Callable[[str], object]
"""Searches a regular expression in a text; truthy if it is found."""


class _Token(NamedTuple):
    kind: str
    text: str


class _Operand(NamedTuple):
    of: Callable[[RunEntry], Value]
    word: str | None
    """An unquoted word that is not a column, which may be a text."""


def search_of(pattern: str) -> Search:
    """Compile a regular expression of the user, who may wait for it. Raises `ArgumentsError`."""
    try:
        return re.compile(pattern).search
    except (re.error, OverflowError, RecursionError) as error:
        raise ArgumentsError(f"{pattern!r:.100} is not a regular expression: {error}") from None


def select(
    entries: Sequence[RunEntry], filters: Sequence[str], columns: Columns, search: Callable[[str], Search] = search_of
) -> list[RunEntry]:
    """Return the runs that fulfil all filters.

    Args:
        filters: Each a condition, or, where it has no comparison, a regular expression that is searched in the name.
        search: Compiles a regular expression; one of a stranger may take for ever in `search_of`.

    Raises:
        ArgumentsError: One cannot be read, or names an unknown column.
    """
    found = list(entries)
    for text in filters:
        if not text.strip():
            continue
        fulfils = condition(text, columns, search) if is_condition(text) else _named(text, search)
        found = [entry for entry in found if fulfils(entry)]
    return found


def is_condition(text: str) -> bool:
    """Whether a filter has a comparison."""
    return re.search("[<>=~]", _GROUPS.sub("", text)) is not None


def condition(text: str, columns: Columns, search: Callable[[str], Search] = search_of) -> Condition:
    """Compile a condition. Raises `ArgumentsError`."""
    if len(text) > MAX_CHARS:
        raise ArgumentsError(f"the condition has {len(text):,} characters, more than {MAX_CHARS:,}; shorten it")
    return _ConditionParser(text, columns, search).condition()


def _named(text: str, search: Callable[[str], Search]) -> Condition:
    is_in = _pattern(text, search)
    return lambda entry: any(is_in(name) for name in {entry.name, entry.label})


def _pattern(text: str, search: Callable[[str], Search]) -> Search:
    if len(text) > MAX_CHARS:
        raise ArgumentsError(f"the pattern has {len(text):,} characters, more than {MAX_CHARS:,}; shorten it")
    return search(text)


class _ConditionParser:
    def __init__(self, text: str, columns: Columns, search: Callable[[str], Search]) -> None:
        self._columns = columns
        self._search = search
        self._tokens = _tokens(text)
        self._next = 0
        self._depth = 0

    def condition(self) -> Condition:
        found = self._either()
        if (token := self._peek()) is not None:
            raise ArgumentsError(f"{token.text!r:.100} is unexpected in the condition; join conditions with and, or")
        return found

    def _either(self) -> Condition:
        parts = [self._all()]
        while self._take_word("or"):
            parts.append(self._all())
        return parts[0] if len(parts) == 1 else lambda entry: any(part(entry) for part in parts)

    def _all(self) -> Condition:
        parts = [self._part()]
        while self._take_word("and"):
            parts.append(self._part())
        return parts[0] if len(parts) == 1 else lambda entry: all(part(entry) for part in parts)

    def _part(self) -> Condition:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ArgumentsError(f"the condition is nested more than {MAX_DEPTH} levels deep; simplify it")
        try:
            if self._take_word("not"):
                inner = self._part()
                return lambda entry: not inner(entry)
            if self._peek() == _Token("op", "("):
                self._next += 1
                inner = self._either()
                if self._peek() != _Token("op", ")"):
                    raise ArgumentsError("a parenthesis of the condition is not closed; add )")
                self._next += 1
                return inner
            return self._comparison()
        finally:
            self._depth -= 1

    def _comparison(self) -> Condition:
        left = self._operand()
        token = self._peek()
        if token is None or token.kind != "op" or token.text not in _OPERATORS:
            return _truth(self._known(left))
        self._next += 1
        right = self._operand()
        if token.text in ("~", "!~"):
            return _search(self._known(left), self._literal(right), is_negated=token.text == "!~")
        if token.text in _ORDER:
            return _order(self._known(left), self._known(right), _ORDER[token.text])
        return _equal(self._known(left), right.of, is_negated=token.text == "!=")

    def _operand(self) -> _Operand:
        token = self._peek()
        if token is None or token.kind == "op":
            where = "ends" if token is None else f"has {token.text}"
            raise ArgumentsError(f"the condition {where} where a value is expected; write it as in lr > 0.01")
        self._next += 1
        if token.kind == "name":
            return _Operand(self._columns.column(token.text).of, None)
        if token.kind == "text":
            return _Operand(lambda entry: token.text, None)
        if (column := self._columns.find(token.text)) is not None:
            return _Operand(column.of, None)
        is_literal, value = _literal(token.text)
        return _Operand(lambda entry: value, None if is_literal else token.text)

    def _known(self, operand: _Operand) -> Callable[[RunEntry], Value]:
        """Return the value of an operand that must not be an unknown word."""
        return operand.of if operand.word is None else self._columns.column(operand.word).of

    def _literal(self, operand: _Operand) -> Search:
        value = operand.of(RunEntry())
        return _pattern(value if isinstance(value, str) else str(value), self._search)

    def _peek(self) -> _Token | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _take_word(self, word: str) -> bool:
        token = self._peek()
        if token is None or token.kind != "word" or token.text.lower() != word:
            return False
        self._next += 1
        return True


def _tokens(text: str) -> list[_Token]:
    found, place = [], 0
    text = text.rstrip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ArgumentsError(f"{text[place:].strip()!r:.100} cannot be read in the condition; put texts in quotes")
        kind = match.lastgroup or ""
        found.append(_Token("text" if kind == "other" else kind, match[kind]))
        place = match.end()
    return found


def _literal(word: str) -> tuple[bool, Value]:
    """Return whether a word is a value that is not a text, and its value."""
    if word.lower() in _WORDS:
        return True, _WORDS[word.lower()]
    try:
        return True, float(word.replace("_", "") if word[0].isdigit() else word)
    except ValueError:
        pass
    if _DATE.fullmatch(word):
        try:
            return True, datetime.datetime.fromisoformat(word.replace("Z", "+00:00")).timestamp()
        except (ValueError, OverflowError, OSError):
            pass
    return False, word


def _truth(value: Callable[[RunEntry], Value]) -> Condition:
    return lambda entry: bool(value(entry))


def _order(
    left: Callable[[RunEntry], Value], right: Callable[[RunEntry], Value], compare: Callable[[Any, Any], bool]
) -> Condition:
    def fulfils(entry: RunEntry) -> bool:
        one, other = left(entry), right(entry)
        if isinstance(one, int | float) and isinstance(other, int | float):
            return compare(one, other)
        return isinstance(one, str) and isinstance(other, str) and compare(one, other)

    return fulfils


def _equal(left: Callable[[RunEntry], Value], right: Callable[[RunEntry], Value], *, is_negated: bool) -> Condition:
    def fulfils(entry: RunEntry) -> bool:
        one, other = left(entry), right(entry)
        if isinstance(one, tuple):
            return (other in one or (other is None and not one)) != is_negated
        are_nan = one != one and other != other
        return (are_nan or one == other) != is_negated

    return fulfils


def _search(value: Callable[[RunEntry], Value], is_in: Search, *, is_negated: bool) -> Condition:
    def fulfils(entry: RunEntry) -> bool:
        found = value(entry)
        texts = found if isinstance(found, tuple) else () if found is None else (str(found),)
        return any(is_in(text) for text in texts) != is_negated

    return fulfils
