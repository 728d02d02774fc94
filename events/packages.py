"""Checks that `trainer` and `sinks` are ours: the names are generic, so a file in the user's folder may shadow them."""

from __future__ import annotations

import importlib.util
import os
import sys

_MARK = "__stagecast__"


def shadow_of(package: str) -> str | None:
    """The file or folder that shadows a package of ours; None if it is ours, or is not there. Imports nothing."""
    found = sys.modules.get(package)
    if found is not None:
        if getattr(found, _MARK, False) is True:
            return None
        return getattr(found, "__file__", None) or ", ".join(getattr(found, "__path__", ())) or repr(found)
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, AttributeError, ValueError):  # raised by another package's import finder
        return None
    if spec is None or spec.origin is None:  # a folder without __init__.py shadows no package
        return None
    here = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    if os.path.realpath(spec.origin) == os.path.join(here, package, "__init__.py"):
        return None
    try:
        with open(spec.origin, encoding="utf-8") as file:
            return None if _MARK in file.read() else spec.origin
    except (OSError, ValueError):
        return spec.origin


def check_packages() -> None:
    """See that all packages of ours are what `import` finds.

    Raises:
        ImportError: A file or folder shadows one of them; names it.
    """
    for package in ("trainer", "sinks"):
        shadow = shadow_of(package)
        if shadow is not None:
            raise ImportError(
                f"stagecast needs its own package '{package}', but {shadow} shadows it: rename that file or folder, or"
                f" take its folder off the front of sys.path",
                name=package,
                path=shadow,
            )
