"""The notebook kernel around this code, found without an import: IPython is loaded wherever there is one."""

from __future__ import annotations

import sys
from typing import Any


def kernel_shell() -> Any | None:
    """Return IPython's shell if this process is the kernel of a notebook; None elsewhere, as in IPython's terminal."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get_ipython() if callable(get_ipython) else None
    return shell if getattr(shell, "kernel", None) is not None else None
