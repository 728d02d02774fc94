"""The JSON Schema of the events: up to date, and true of what is written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from events import wire
from events.journal.lines import CHECKSUM, PREVIOUS_SEQ
from events.messages import EVENT_TYPES, Event, MetricsLogged, TrainStepEnded
from events.schema import SCHEMA_PATH, json_schema, schema_text

LINES = sorted((Path(__file__).parent / "golden").glob("*.jsonl"))[-1].read_bytes().splitlines()
HEADER: dict[str, Any] = {
    "run_id": "run",
    "attempt": 1,
    "seq": 7,
    "time": 0.0,
    "rank": 0,
    "global_step": 5,
    "epoch": 0,
    "stage": None,
}
VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def refused(tree: dict[str, Any]) -> bool:
    return not VALIDATOR.is_valid(tree)


def test_the_checked_in_schema_is_the_one_that_is_generated() -> None:
    """A changed event requires `python -m events.schema --write`."""
    assert SCHEMA_PATH.read_text(encoding="utf-8") == schema_text()


def test_wrong_events_are_refused() -> None:
    """A missing header, a wrong type, a word instead of a number: otherwise the schema would accept anything."""
    good = json.loads(wire.encode_json(TrainStepEnded(**HEADER, loss=math.nan)))
    VALIDATOR.validate(good)
    assert refused({**good, "seq": "7"})
    assert refused({**good, "type": "TrainStepBegan"})
    assert refused({**good, "stage": "lunch"})
    assert refused({**good, "nonfinite": {"/loss": "huge"}})
    assert refused({**good, "nonfinite": {"loss": "nan"}})
    assert refused({name: value for name, value in good.items() if name != "run_id"})


def test_a_null_step_count_is_not_a_number() -> None:
    """Only floating-point numbers may be null for what JSON cannot hold; integers are always there."""
    good = json.loads(wire.encode_json(MetricsLogged(**HEADER, metrics={"a": math.inf})))
    VALIDATOR.validate(good)
    assert refused({**good, "global_step": None})


def test_members_of_later_versions_are_accepted() -> None:
    """The schema does not close what the wire leaves open."""
    VALIDATOR.validate({**json.loads(LINES[0]), "invented_later": [1]})


@pytest.mark.parametrize("line", LINES, ids=[wire.decode_json(line).__class__.__name__ for line in LINES])
def test_every_event_type_fits_the_schema(line: bytes) -> None:
    """With every field set, including NaNs, and without defaults."""
    VALIDATOR.validate(json.loads(line))
    event = wire.decode_json(line)
    required = [field.name for field in msgspec.structs.fields(event) if field.required]
    bare = type(event)(**{name: getattr(event, name) for name in required})
    VALIDATOR.validate(json.loads(wire.encode_json(bare)))


def test_the_schema_is_itself_valid_and_names_every_type_and_field() -> None:
    """Nothing is missing, and header and documented fields have their descriptions."""
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert [ref["$ref"].rpartition("/")[2] for ref in schema["oneOf"]] == [t.__name__ for t in EVENT_TYPES]
    header = [field.name for field in msgspec.structs.fields(Event)]
    for event_type in EVENT_TYPES:
        properties = schema["$defs"][event_type.__name__]["properties"]
        assert set(properties) == {field.name for field in msgspec.structs.fields(event_type)} | {
            "type",
            wire.NONFINITE,
            CHECKSUM,
            PREVIOUS_SEQ,
        }
        assert all(properties[name]["description"] for name in header)
    loss = schema["$defs"]["TrainStepEnded"]["properties"]["loss"]["description"]
    assert loss.startswith("Mean loss over the step's rows")


def test_the_module_prints_the_schema_and_refuses_other_arguments() -> None:
    """The command that the drift test names works."""
    root = SCHEMA_PATH.parents[1]
    printed = subprocess.run([sys.executable, "-m", "events.schema"], cwd=root, capture_output=True, check=True)
    assert printed.stdout.decode() == schema_text()
    refusal = subprocess.run([sys.executable, "-m", "events.schema", "-w"], cwd=root, capture_output=True)
    assert refusal.returncode == 1
    assert b"--write" in refusal.stderr
