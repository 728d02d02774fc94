"""The JSON Schema of all events, as `events.wire` writes them, for readers in other languages.

``python -m events.schema`` prints it; ``--write`` updates the checked-in ``schema.json`` in this folder. Descriptions
are the docstrings of `events.messages`.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from events import messages
from events.field_docs import field_docs
from events.journal.lines import CHECKSUM, PREVIOUS_SEQ
from events.messages import EVENT_TYPES, Event
from events.wire import NONFINITE

SCHEMA_PATH = Path(__file__).with_name("schema.json")

_NONFINITE_SCHEMA = {
    "description": "Numbers of this event that JSON cannot represent, by JSON pointer (RFC 6901). "
    "The members themselves are null.",
    "type": "object",
    "propertyNames": {"pattern": "^/"},
    "additionalProperties": {"enum": ["nan", "inf", "-inf"]},
}

_CHECKSUM_SCHEMA = {
    "description": "Only in a journal, as the last member: the CRC-32 (zlib's, in hexadecimal) of the line's bytes "
    "without this member and its comma. Missing in lines of early versions.",
    "type": "string",
    "pattern": "^[0-9a-f]{8}$",
}
_PREVIOUS_SEQ_SCHEMA = {
    "description": "Only in a journal, and only if it is not seq - 1: the seq of the previous line. "
    "If that line has another seq, lines are lost.",
    "type": "integer",
    "minimum": 0,
}
_ADDED: dict[str, dict[str, Any]] = {
    NONFINITE: _NONFINITE_SCHEMA,
    PREVIOUS_SEQ: _PREVIOUS_SEQ_SCHEMA,
    CHECKSUM: _CHECKSUM_SCHEMA,
}
"""Members of an encoded event other than its fields."""


def json_schema() -> dict[str, Any]:
    """Build the schema (JSON Schema 2020-12) of one encoded event, which is one line of a journal."""
    _, definitions = msgspec.json.schema_components(EVENT_TYPES, ref_template="#/$defs/{name}")
    header = _header_docs(inspect.cleandoc(Event.__doc__ or ""))
    for name, definition in definitions.items():
        is_event = "type" in definition["properties"]
        definition["description"] = " ".join(definition["description"].split())
        documented = (header if is_event else {}) | field_docs(getattr(messages, name))
        for field, schema in definition["properties"].items():
            text = documented.get(field)
            if text is not None:
                schema["description"] = text
        if is_event:
            for member in _ADDED:
                definition["properties"][member] = {"$ref": f"#/$defs/{member}"}
    definitions |= _ADDED
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "stagecast event",
        "description": "One event of a training run. Ignore unknown members, and expect unknown types: "
        "newer versions add them.",
        "oneOf": [{"$ref": f"#/$defs/{event_type.__name__}"} for event_type in EVENT_TYPES],
        "$defs": {name: _allow_null_numbers(definitions[name]) for name in sorted(definitions)},
    }


def schema_text() -> str:
    """The content of ``schema.json``."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _allow_null_numbers(schema: object) -> Any:
    """Allow null for every floating-point number: see `NONFINITE`."""
    if isinstance(schema, list):
        return [_allow_null_numbers(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: _allow_null_numbers(value) for key, value in schema.items()}
    if changed.get("type") == "number":
        changed["type"] = ["number", "null"]
    return changed


def _header_docs(docstring: str) -> dict[str, str]:
    """The entries of a docstring's ``Attributes`` section."""
    docs: dict[str, str] = {}
    name = ""
    for line in docstring.partition("Attributes:\n")[2].splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            name, _, text = line.strip().partition(": ")
            docs[name] = text
        elif line.strip() and name:
            docs[name] += " " + line.strip()
    return docs


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        SCHEMA_PATH.write_text(schema_text(), encoding="utf-8")
    elif sys.argv[1:]:
        sys.exit(f"unknown argument {sys.argv[1]!r}; the only one is --write")
    else:
        sys.stdout.write(schema_text())
