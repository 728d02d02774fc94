"""The wire form: what goes in comes out, and bytes that are no event say what is wrong with them."""

from __future__ import annotations

import contextlib
import json
import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events import wire
from events.errors import WireError
from events.journal.lines import CHECKSUM, PREVIOUS_SEQ
from events.messages import (
    EVENT_TYPES,
    Event,
    GpuSample,
    LedgerReported,
    MetricsLogged,
    ObserverFailed,
    ObserverHealth,
    OperatorTime,
    RunStarted,
    StallLedger,
    TrainStepEnded,
    UnknownEvent,
)
from events.protocol import AnyCommand, Checkpoint, Pause, Resume, Stop

HEADER: dict[str, Any] = {
    "run_id": "run",
    "attempt": 1,
    "seq": 7,
    "time": 1_700_000_000.25,
    "rank": 0,
    "global_step": 5,
    "epoch": 0,
    "stage": "train",
}
GOLDEN = Path(__file__).parent / "golden"
VERSION = "0.1.0"

# ------------------------------------------------------------------------------------------- any event at all

int64 = st.integers(-(2**63), 2**63 - 1)
text = st.text(st.characters(exclude_categories=["Cs"]))
plain = st.recursive(
    st.none() | st.booleans() | int64 | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """A strategy for the annotation of any field that events have."""
    if annotation is Any:
        return plain
    if get_origin(annotation) is typing.Annotated:
        annotation, meta = get_args(annotation)
        if annotation in (int, float):
            return (st.integers if annotation is int else st.floats)(meta.ge, meta.le)
    simple = {str: text, int: int64, float: st.floats(), bool: st.booleans(), type(None): st.none()}
    if annotation in simple:
        return simple[annotation]
    args = get_args(annotation)
    origin = get_origin(annotation)
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_of(arg) for arg in args])
    if origin is dict:
        return st.dictionaries(values_of(args[0]), values_of(args[1]), max_size=3)
    if origin is list:
        return st.lists(values_of(args[0]), max_size=3)
    assert issubclass(annotation, msgspec.Struct), f"teach `values_of` the type {annotation!r}"
    return structs_of(annotation)


def structs_of(struct: type[Any]) -> st.SearchStrategy[Any]:
    """A strategy for a struct, its optional fields sometimes left to their defaults."""
    fields = msgspec.structs.fields(struct)
    required = {field.encode_name: values_of(field.type) for field in fields if field.required}
    optional = {field.encode_name: values_of(field.type) for field in fields if not field.required}
    return st.fixed_dictionaries(required, optional=optional).map(lambda values: struct(**values))


any_event: st.SearchStrategy[Event] = st.one_of([structs_of(event_type) for event_type in EVENT_TYPES])


def same(left: Any, right: Any) -> bool:
    """Equality under which NaN equals NaN, and a 0.0 a -0.0 only if it is one."""
    return repr(left) == repr(right)


# ---------------------------------------------------------------------------------------------- unhappy paths


def check_decoder(decode: Callable[[bytes], object], data: bytes) -> None:
    with contextlib.suppress(WireError):
        decode(data)


@pytest.mark.fuzz
@settings(deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_wire_errors(data: bytes) -> None:
    """Whatever arrives, the caller has one error to handle."""
    for decode in (wire.decode_json, wire.decode_msgpack, wire.decode_command):
        check_decoder(decode, data)


@pytest.mark.fuzz
@settings(deadline=None)
@given(any_event, st.data())
def test_mutated_events_raise_nothing_but_wire_errors(event: Event, data: st.DataObject) -> None:
    """Bytes that were an event once, then lost, gained or changed some, give an event or a `WireError`."""
    for encode, decode in ((wire.encode_json, wire.decode_json), (wire.encode_msgpack, wire.decode_msgpack)):
        encoded = bytearray(encode(event))
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, max(0, len(encoded) - 1)))
            encoded[at : at + data.draw(st.integers(0, 6))] = data.draw(st.binary(max_size=6))
        check_decoder(decode, bytes(encoded))


@settings(deadline=None)
@given(any_event, st.dictionaries(text, text | st.sampled_from(["nan", "inf"]) | plain, max_size=3))
def test_any_nonfinite_member_raises_nothing_but_wire_errors(event: Event, nonfinite: dict[str, Any]) -> None:
    """A `nonfinite` that somebody else wrote may point anywhere and say anything."""
    tree = json.loads(wire.encode_json(event))
    tree["nonfinite"] = nonfinite
    check_decoder(wire.decode_json, json.dumps(tree).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b'{"type":5}',
        b'{"type":null}',
        b'{"type":"RunResumed"}',
        b'{"type":"TrainStepEnded"',
        b'{"type":"RunResumed","run_id":"\xff"}',
        b'{"type":"X","run_id":"\\ud800"}',
        b'{"type":"X","x":' + b"[" * 100_000,
        b'{"type":"X","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"type":"X","seq":' + b"9" * 10_000 + b"}",
        b'{"type":"X","time":1e999}',
        b'{"type":"X","nonfinite":[]}',
        b'{"type":"X","nonfinite":{"/time":"big"}}',
    ],
)
def test_json_that_is_no_event_is_refused(data: bytes) -> None:
    """Cut, damaged, too deep, too big, not Unicode, not an object: one error that shows the beginning."""
    with pytest.raises(WireError, match=r"not an event|RunResumed event"):
        wire.decode_json(data)


@pytest.mark.parametrize(
    "data", [b"", b"\xc0", b"\x90", b"\x91" * 100_000, b"\x80", b"\xc1", b"\x81\xa4type\x05", b"\x81\x90\x01"]
)
def test_msgpack_that_is_no_event_is_refused(data: bytes) -> None:
    """The same for msgpack."""
    with pytest.raises(WireError, match="not an event"):
        wire.decode_msgpack(data)


BIG = 10**399
DEEP = b'{"a":' * 500 + b"1" + b"}" * 500
LINE = (
    b'{"type":"RunStarted","run_id":"r","attempt":1,"seq":7,"time":1.5,"rank":0,"global_step":5,"epoch":0,"stage":null'
)


@pytest.mark.parametrize(
    "members",
    [
        b',"module":"m","epochs":%d' % BIG,
        b',"module":"m","epochs":%d' % 2**63,
        b',"module":"m","epochs":%d' % -BIG,
        b',"module":"m","epochs":1%s' % (b"0" * 5000),
        b',"module":"m","epochs":1,"arguments":{"a":[{"b":%d}]}' % BIG,
        b',"module":"m","epochs":1,"config":{"a":%d}' % 2**64,
        b',"module":"m","epochs":1,"config":' + DEEP,
        b',"module":"m","epochs":1,"config":' + b"[" * 100_000,
        b',"module":"\xff","epochs":1',
        b',"module":"\\udc80","epochs":1',
        b',"module":"m","epochs":NaN',
        b',"module":"m","epochs":1,"time":null,"nonfinite":{"/time":"inf"}',
        b',"module":"m","epochs":1,"config":{"a":%d,"b":null},"nonfinite":{"/config/b":"nan"}' % BIG,
    ],
)
def test_an_event_that_could_not_be_written_again_is_refused_in_a_few_words(members: bytes) -> None:
    """Integers beyond 64 bits, deep nesting, text that is not Unicode, a time that is not finite."""
    with pytest.raises(WireError, match="event: ") as caught:
        wire.decode_json(LINE + members + b"}")
    assert len(str(caught.value)) < 500


def test_integers_and_times_of_msgpack_have_the_same_bounds() -> None:
    """An integer of 64 bits without a sign and a NaN are what msgpack can hold beyond JSON."""
    fields = {**HEADER, "type": "RunStarted", "module": "m", "epochs": 1}
    for wrong in (
        {"seq": 2**63},
        {"global_step": -1},
        {"attempt": 10**9},
        {"time": math.nan},
        {"time": math.inf},
        {"time": 2.0**34},
    ):
        with pytest.raises(WireError, match="RunStarted event: "):
            wire.decode_msgpack(msgspec.msgpack.encode(fields | wrong))


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        *((b'"%s":%d' % (name, BIG), {}) for name in (b"attempt", b"seq", b"rank", b"global_step", b"epoch")),
        (b'"time":' + b"9" * 400, {}),
        (b'"seq":true,"rank":"a","stage":["train"],"run_id":5,"time":"b"', {}),
        (b'"seq":"a","attempt":2,"stage":"val"', {"attempt": 2, "stage": "val"}),
    ],
)
def test_the_header_of_an_unknown_event_is_read_as_far_as_it_is_valid(members: bytes, expected: dict[str, Any]) -> None:
    """The rest is zero, and its bytes are kept as they are."""
    event = wire.decode_json(b'{"type":"X",%b}' % members)
    zeros: dict[str, Any] = dict.fromkeys(HEADER, 0) | {"run_id": "", "stage": None}
    assert {name: getattr(event, name) for name in HEADER} == zeros | expected
    wire.encode_json(event)
    msgspec.msgpack.encode(msgspec.structs.replace(event, raw=b""))


def test_a_known_type_with_wrong_content_names_type_path_and_remedy() -> None:
    """The message is enough to find the producer's mistake."""
    data = wire.encode_json(TrainStepEnded(**HEADER, loss=1.0)).replace(b'"loss":1.0', b'"loss":"low"')
    with pytest.raises(WireError, match=r"TrainStepEnded event: .*got `str` - at `\$\.loss`.*schema\.json"):
        wire.decode_json(data)


def test_a_null_that_nobody_named_is_not_a_number() -> None:
    """Without `nonfinite` a null metric is an error, not silently a NaN."""
    data = wire.encode_json(MetricsLogged(**HEADER, metrics={"a": math.nan}))
    with pytest.raises(WireError, match="MetricsLogged"):
        wire.decode_json(data.replace(b'"nonfinite":{"/metrics/a":"nan"}', b'"other":{}'))


def endless() -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for _ in range(100_000):
        tree = {"a": tree}
    return tree


@pytest.mark.parametrize("arguments", [{"a": object()}, {"a": 1j}, endless()])
def test_values_that_are_not_plain_cannot_be_encoded(arguments: dict[str, Any]) -> None:
    """The error names the event, so that its producer can be found."""
    event = RunStarted(**HEADER, module="m", epochs=1, arguments=arguments)
    for encode in (wire.encode_json, wire.encode_msgpack, lambda event: wire.encode_json_lines([event])):
        with pytest.raises(WireError, match=r"RunStarted event .*seq 7.*plain host values"):
            encode(event)


def test_integers_beyond_64_bits_cannot_be_written_as_msgpack() -> None:
    """msgpack has no such integers, and rounding one would be a lie."""
    with pytest.raises(WireError, match="RunStarted event"):
        wire.encode_msgpack(RunStarted(**HEADER, module="m", epochs=1, arguments={"a": 2**70}))


@pytest.mark.parametrize(
    ("encode", "decode"),
    [(wire.encode_json, wire.decode_json), (wire.encode_msgpack, wire.decode_msgpack)],
)
def test_lone_surrogates_are_written_as_their_escapes(encode: Any, decode: Any) -> None:
    """An error that names an undecodable file still gets through."""
    for stage in ("train", None):
        event = ObserverFailed(**{**HEADER, "stage": stage}, observer="o", error="no file 'a\udc80'")
        assert decode(encode(event)).error == "no file 'a\\udc80'"
    metrics = MetricsLogged(**HEADER, metrics={"m\ud800": math.nan, "n": 1.0})
    restored = decode(encode(metrics)).metrics
    assert math.isnan(restored["m\\ud800"])
    assert restored["n"] == 1.0


# ------------------------------------------------------------------------------------------------ round trips


@settings(deadline=None)
@given(any_event)
def test_every_event_survives_both_encodings(event: Event) -> None:
    """NaN and infinities in any field, at any depth, under any name; in JSON that any reader takes, on one line."""
    encoded = wire.encode_json(event)
    assert b"\n" not in encoded
    json.loads(encoded, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert same(wire.decode_json(encoded), event)
    assert same(wire.decode_msgpack(wire.encode_msgpack(event)), event)


@settings(deadline=None)
@given(st.lists(any_event, max_size=4))
def test_lines_are_the_events_one_by_one(events: list[Event]) -> None:
    """A batch encodes to what its events encode to, each on its line; an unknown event to its bytes."""
    events = [*events, wire.decode_json(b'{"type":"X","stage":"train"}')]
    assert wire.encode_json_lines(events) == b"".join(wire.encode_json(event) + b"\n" for event in events)


def test_nonfinite_numbers_stand_beside_the_others_by_pointer() -> None:
    """The form is fixed: others read it."""
    event = MetricsLogged(**HEADER, metrics={"a/b~c": math.nan, "": math.inf, "d": -math.inf, "e": 1.5})
    tree = json.loads(wire.encode_json(event))
    assert tree["nonfinite"] == {"/metrics/a~1b~0c": "nan", "/metrics/": "inf", "/metrics/d": "-inf"}
    assert tree["metrics"] == {"a/b~c": None, "": None, "d": None, "e": 1.5}


@pytest.mark.parametrize("stage", ["train", None])
def test_of_several_nulls_only_those_that_are_named_are_numbers(stage: str | None) -> None:
    """Also of metrics with the names of other members, and in nested structs."""
    header: Any = {**HEADER, "stage": stage}
    for event in (
        MetricsLogged(**header, metrics={"stage": math.nan, "nonfinite": 1.0}),
        LedgerReported(**header, scope="run", ledger=StallLedger(wall_s=math.inf, device_idle_s=None)),
    ):
        assert same(wire.decode_json(wire.encode_json(event)), event)


def test_unknown_fields_are_ignored() -> None:
    """A newer producer may add fields, also beside NaNs and named like something else."""
    data = b',"new":{"nonfinite":null,"x":[1]}}'
    for loss in (1.0, math.nan):
        event = TrainStepEnded(**HEADER, loss=loss)
        assert same(wire.decode_json(wire.encode_json(event)[:-1] + data), event)


def test_no_event_has_a_field_that_the_wire_needs() -> None:
    """`type` and `nonfinite` belong to the wire form."""
    for event_type in EVENT_TYPES:
        names = {field.encode_name for field in msgspec.structs.fields(event_type)}
        assert not names & {"type", wire.NONFINITE, CHECKSUM, PREVIOUS_SEQ}


# --------------------------------------------------------------------------------------------- unknown events


class FutureEvent(Event, frozen=True, gc=False, tag=True):
    """What a later version may add."""

    value: float = 0.0


def test_an_unknown_type_keeps_its_header_and_its_bytes() -> None:
    """A consumer can place it, store it and pass it on unchanged."""
    future = FutureEvent(**HEADER, value=2.0)
    for encode, decode, encoding in (
        (wire.encode_json, wire.decode_json, "json"),
        (wire.encode_msgpack, wire.decode_msgpack, "msgpack"),
    ):
        raw = encode(future)
        event = decode(raw)
        assert isinstance(event, UnknownEvent)
        assert {name: getattr(event, name) for name in HEADER} == HEADER
        assert (event.unknown_type, event.raw, event.encoding) == ("FutureEvent", raw, encoding)
        assert encode(event) == raw


@pytest.mark.parametrize("value", [2.0, math.nan, -math.inf])
def test_an_unknown_type_changes_its_encoding_on_demand(value: float) -> None:
    """From JSON to msgpack and back, non-finite numbers included."""
    raw = wire.encode_json(FutureEvent(**HEADER, value=value))
    packed = wire.encode_msgpack(wire.decode_json(raw))
    assert same(msgspec.msgpack.decode(packed, type=FutureEvent), FutureEvent(**HEADER, value=value))
    assert wire.encode_json(wire.decode_msgpack(packed)) == raw


def test_an_unknown_event_written_over_several_lines_becomes_one_line() -> None:
    """A pretty-printed event must not break the journal's lines."""
    event = wire.decode_json(b'{\n "type": "X",\n "a": "b c"\n}')
    assert wire.encode_json_lines([event]) == b'{"type":"X","a":"b c"}\n'


def test_an_unknown_event_that_the_other_encoding_cannot_hold_says_so() -> None:
    """An msgpack extension has no JSON."""
    event = wire.decode_msgpack(b"\x82\xa4type\xa1X\xa1a\xc7\x01\x05a")
    with pytest.raises(WireError, match="X event: its msgpack cannot be written as json"):
        wire.encode_json(event)


# --------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    "command", [Stop(id="a", reason="enough", checkpoint=False), Pause(id="b"), Resume(id="c"), Checkpoint(id="d")]
)
def test_every_command_is_decoded_as_it_was_encoded(command: AnyCommand) -> None:
    assert wire.decode_command(wire.encode_command(command)) == command


@pytest.mark.parametrize("data", [b"{}", b'{"command":"explode","id":"a"}', b'{"command":"stop"}', b"x", b"[]"])
def test_what_is_no_command_is_refused(data: bytes) -> None:
    """A command that is not understood must not pass as one; the message lists what would."""
    with pytest.raises(WireError, match=r"not a command.*'pause'"):
        wire.decode_command(data)


def test_a_command_with_a_lone_surrogate_is_sent_escaped_and_one_with_an_object_is_refused() -> None:
    command = wire.decode_command(wire.encode_command(Stop(id="a", reason="\udc80")))
    assert command.reason == "\\udc80"
    with pytest.raises(WireError, match="Stop cannot be encoded"):
        wire.encode_command(Stop(id="a", reason=object()))  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- golden files


def golden_examples() -> list[Event]:
    """One event of every type, every field set, NaNs and infinities among them."""

    def example(annotation: Any, name: str) -> Any:
        if get_origin(annotation) is typing.Annotated:
            annotation = get_args(annotation)[0]
        if annotation in (str, Any):
            return f"{name} é/~"
        if annotation is float:
            return {"loss": math.nan, "grad_norm": math.inf, "backpressure_s": -math.inf}.get(name, 0.5)
        if annotation in (int, bool):
            return annotation(3)
        args = get_args(annotation)
        if get_origin(annotation) is typing.Literal:
            return args[-1]
        if get_origin(annotation) is dict:
            if args[1] is Any:
                return {"plain": [1, None, True], "nested/~": {"lr": math.nan, "x": 1.5}}
            keys = ("a/b~c", "", "nonfinite") if args[1] is float else ("python", "torch")
            values = (math.nan, -math.inf, 0.25) if args[1] is float else ("3.11", "2.13")
            return dict(zip(keys, values, strict=True))
        if get_origin(annotation) is list:
            return [example(args[0], name)]
        if get_origin(annotation) in (typing.Union, types.UnionType):
            return example(next(arg for arg in args if arg is not type(None)), name)
        return full(annotation)

    def full(struct: type[Any]) -> Any:
        fields = msgspec.structs.fields(struct)
        return struct(**{field.name: example(field.type, field.name) for field in fields})

    return [msgspec.structs.replace(full(event_type), seq=seq) for seq, event_type in enumerate(EVENT_TYPES, start=1)]


def regenerate_golden_files() -> None:
    """Write the golden files of the current version; run by hand when an event was added before its release.

    `python -c "import runpy; runpy.run_path('tests/events/test_wire.py')['regenerate_golden_files']()"`.
    A released version's files are never written again: they are the promise.
    """
    events = golden_examples()
    (GOLDEN / f"{VERSION}.jsonl").write_bytes(wire.encode_json_lines(events))
    packed = [wire.encode_msgpack(event) for event in events]
    (GOLDEN / f"{VERSION}.msgpack").write_bytes(msgspec.msgpack.encode(packed))
    # The values again, in a form that this library's wire has no part in.
    (GOLDEN / f"{VERSION}.txt").write_text("".join(f"{event!r}\n" for event in events), encoding="utf-8")


def fields_in_repr(line: str) -> dict[str, Any]:
    """The fields that a golden text line names, as Python values."""
    names: dict[str, Any] = {
        "nan": math.nan,
        "inf": math.inf,
        "StallLedger": StallLedger,
        "GpuSample": GpuSample,
        "ObserverHealth": ObserverHealth,
        "OperatorTime": OperatorTime,
        "__builtins__": {},
        **{event_type.__name__: dict for event_type in EVENT_TYPES},
    }
    fields: dict[str, Any] = eval(line, names)
    return fields


@pytest.mark.parametrize("version", sorted(path.stem for path in GOLDEN.glob("*.jsonl")))
def test_golden_files_decode_forever(version: str) -> None:
    """What any released version wrote still decodes, to the values it had."""
    lines = (GOLDEN / f"{version}.jsonl").read_bytes().splitlines()
    packed = msgspec.msgpack.decode((GOLDEN / f"{version}.msgpack").read_bytes(), type=list[bytes])
    expected = (GOLDEN / f"{version}.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(packed) == len(expected) > 0
    for line, pack, text_line in zip(lines, packed, expected, strict=True):
        for event in (wire.decode_json(line), wire.decode_msgpack(pack)):
            assert type(event).__name__ == text_line.partition("(")[0]
            for name, value in fields_in_repr(text_line).items():
                assert same(getattr(event, name), value), (text_line, name)


def test_the_golden_files_of_this_version_hold_every_event_type() -> None:
    """Whoever adds an event or a field extends them: see `regenerate_golden_files`."""
    assert json.dumps(VERSION) in (GOLDEN.parents[2] / "pyproject.toml").read_text(), "set VERSION to the project's"
    decoded = [wire.decode_json(line) for line in (GOLDEN / f"{VERSION}.jsonl").read_bytes().splitlines()]
    assert {type(event) for event in decoded} == set(EVENT_TYPES)
    assert [repr(event) for event in decoded] == [repr(event) for event in golden_examples()]
