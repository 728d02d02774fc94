"""The docstrings behind the fields of a class, which Python itself does not keep: read from its source."""

from __future__ import annotations

import ast
import functools
import inspect
import sys


def field_docs(kind: type) -> dict[str, str]:
    """The text behind each annotated attribute of a class and of those it comes from, by name, on one line.

    Empty where there is no source to be read.
    """
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        try:
            source = inspect.getsource(sys.modules[base.__module__])
        except (KeyError, OSError, TypeError):  # built in, or installed without its source
            continue
        docs |= {field: text for (name, field), text in _read(source).items() if name == base.__name__}
    return docs


@functools.lru_cache(maxsize=8)
def _read(source: str) -> dict[tuple[str, str], str]:
    docs = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for attribute, following in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(attribute, ast.AnnAssign)
                and isinstance(attribute.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                docs[node.name, attribute.target.id] = " ".join(following.value.value.split())
    return docs
