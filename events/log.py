"""The library's logger: structlog over the standard library's logging.

The library configures nothing: records go to the standard logger ``stagecast`` with ``run_id``, ``rank`` and
``global_step`` as extra fields, and a host that has configured no logging sees none of them.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Any

import structlog

from events.origin import Origin

current_origin: ContextVar[Origin | None] = ContextVar("stagecast_origin", default=None)
"""The run that the current thread or task works for."""

_RESERVED = {*vars(logging.makeLogRecord({})), "message", "asctime"} - {"exc_info", "stack_info"}


def _add_origin(_: Any, __: str, event_dict: Any) -> Any:
    origin = current_origin.get()
    if origin is not None:
        event_dict.setdefault("run_id", origin.run_id)
        event_dict.setdefault("rank", origin.rank)
        event_dict.setdefault("global_step", origin.global_step)
    return event_dict


def _rename_reserved(_: Any, __: str, event_dict: Any) -> Any:
    """A host may have bound ``name``: the standard library refuses extra fields that a record has itself."""
    return {f"{key}_" if key in _RESERVED else key: value for key, value in event_dict.items()}


_stdlib_logger = logging.getLogger("stagecast")
_stdlib_logger.addHandler(logging.NullHandler())

logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
    _stdlib_logger,
    processors=[
        structlog.stdlib.filter_by_level,
        structlog.contextvars.merge_contextvars,
        _add_origin,
        _rename_reserved,
        structlog.stdlib.render_to_log_kwargs,
    ],
    wrapper_class=structlog.stdlib.BoundLogger,
    context_class=dict,
    cache_logger_on_first_use=True,
)
