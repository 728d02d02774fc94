"""Files and messages of a stranger: each gives a value, or the error of its kind.

With ``--hypothesis-profile=fuzz`` each test tries thousands of inputs; see CONTRIBUTING.md.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import tempfile
import tracemalloc
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin
from urllib.parse import quote, urlencode

import anyio
import anyio.lowlevel
import jsonschema
import msgspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from events.checkpoint import packing
from events.checkpoint.lineage import AttemptNote, decode_attempt
from events.checkpoint.manifest import Manifest, decode_manifest, encode_manifest
from events.checkpoint.remote_layout import Parts, decode_parts
from events.checkpoint.tensor_file import read_layout
from events.errors import CheckpointDamaged, CheckpointTooNew, WireError
from events.journal.history import read_history
from events.journal.reader import JournalReader
from events.journal.tail import journal_tail
from events.messages import EVENT_TYPES, Event, UnknownEvent
from events.metrics import metrics_of
from events.protocol import AnyCommand
from events.run.state import RunState
from events.run.summary import Summary
from events.wire import (
    decode_command,
    decode_json,
    decode_msgpack,
    encode_command,
    encode_json,
    encode_msgpack,
)
from sinks.console.bars import progress_line
from sinks.console.lines import Chronicle
from sinks.files.csv import _encode as table_rows
from sinks.live.access import Access
from sinks.live.app import LiveApp
from sinks.live.client import Hello
from sinks.live.frames import encode as encode_frame
from sinks.live.pushes import Pushes
from sinks.live.runs import RunsOfFolder
from sinks.live.stored import read_view, write_view
from sinks.live.view import Changes, RunView
from trainer.data.tensor_state import tensors_in
from trainer.remote.result import ResultBuilder, RunSnapshot

pytestmark = pytest.mark.fuzz

T = TypeVar("T")

names = ["", "\0", "\x1b[2J", "\u202e", "../../x", "a/b", "=1+1", "nan", "x" * 5_000, "default", "loss", "stop"]
texts = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.sampled_from(names))
integers = st.one_of(st.integers(-3, 100), st.integers(-3, 100), st.sampled_from([2**31, 2**53, 2**63 - 1, -(2**63)]))
reals = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([5e-324, 1.7976931348623157e308, -0.0, 1e18, 0.0])
)


def nested(atoms: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        atoms,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
        max_leaves=12,
    )


plain = nested(st.one_of(st.none(), st.booleans(), integers, reals, texts))
big = st.sampled_from([2**63, 2**64, -(2**63) - 1, -(10**30), 10**400, 10**4_000])
odd = st.sampled_from([math.nan, math.inf, -math.inf, "\ud800", "\udc80x"])
strange = st.one_of(big, odd, nested(st.one_of(st.none(), st.booleans(), integers, texts, big, odd)))
"""Values that few fields accept, or none."""


ATOMS: dict[Any, st.SearchStrategy[Any]] = {
    Any: plain,
    msgspec.Raw: plain,
    str: texts,
    bytes: texts,
    int: integers,
    float: reals,
    bool: st.booleans(),
    type(None): st.none(),
}


@functools.cache  # building a strategy costs more than drawing from it
def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """JSON values for a field of a type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is typing.Annotated:
        values, meta = values_of(args[0]), args[1]
        if args[0] is float:
            return st.floats(meta.ge, meta.le)
        return values.filter(lambda value: meta.ge <= value <= meta.le) if args[0] is int else values
    if kind in ATOMS:
        return ATOMS[kind]
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_of(arg) for arg in args])
    if origin is dict:
        return st.dictionaries(texts, values_of(args[1]), max_size=4)
    if origin in (list, tuple):
        return st.lists(values_of(args[0]), max_size=4)
    return objects_of(kind)


@st.composite
def objects_of(draw: st.DrawFn, struct: type[msgspec.Struct]) -> dict[str, Any]:
    """A Struct, or nearly: with a field that is missing, unknown, of another type, or beyond its bounds."""
    fields = msgspec.structs.fields(struct)
    given_ones = [one for one in fields if one.required or draw(st.booleans())]
    tree = {one.encode_name: draw(values_of(one.type)) for one in given_ones}
    if struct.__struct_config__.tag is not None:
        tree[struct.__struct_config__.tag_field] = struct.__struct_config__.tag
    match draw(st.sampled_from(["right", "right", "right", "changed", "changed", "lost", "added"])):
        case "changed":
            tree[draw(st.sampled_from([one.encode_name for one in fields]))] = draw(strange)
        case "lost" if tree:
            del tree[draw(st.sampled_from(sorted(tree)))]
        case "added":
            tree[draw(texts)] = draw(strange)
        case "right" if draw(st.booleans()):  # NaN and infinities in a journal
            tree["nonfinite"] = {f"/{name}": "nan" for name, value in tree.items() if value is None}
    return tree


def as_json(value: Any) -> bytes:
    """Encode, with ``NaN``, large integers and lone surrogates, which JSON does not allow."""
    return json.dumps(value).encode()


def as_msgpack(value: Any) -> bytes:
    def fit(one: Any) -> Any:
        if isinstance(one, str):
            return one.encode("utf-8", "replace").decode()
        if isinstance(one, dict):
            return {fit(key): fit(item) for key, item in one.items()}
        if isinstance(one, list):
            return [fit(item) for item in one]
        return one if not isinstance(one, int) or -(2**63) <= one < 2**64 else 2**64 - 1

    return msgspec.msgpack.encode(fit(value))


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes unchanged, cut, doubled, or with some of them replaced."""
    data = draw(whole)
    match draw(st.sampled_from(["whole", "whole", "whole", "cut", "replaced", "doubled"])):
        case "cut":
            return data[: draw(st.integers(0, len(data)))]
        case "replaced" if data:
            begin = draw(st.integers(0, len(data) - 1))
            return data[:begin] + draw(st.binary(max_size=8)) + data[begin + draw(st.integers(0, 8)) :]
        case "doubled":
            return data + data
    return data


def bounded(call: Callable[[], T], most_bytes: int = 32 * 2**20) -> T:
    """Make a call that may not need more memory at a time; a test's timeout bounds its time."""
    tracemalloc.start()
    try:
        return call()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most_bytes, f"{peak:,} bytes"


event_objects = st.one_of([objects_of(kind) for kind in EVENT_TYPES])
event_lines = event_objects.map(as_json)
MANY = settings().max_examples
fuzz = settings(max_examples=MANY if MANY > 100 else 40, deadline=20_000)


def decoded(lines: list[bytes]) -> list[Event]:
    events = []
    for line in lines:
        with contextlib.suppress(WireError):
            events.append(decode_json(line))
    return events


@fuzz
@given(damaged(event_lines))
def test_a_line_is_an_event_that_returns_from_json_and_msgpack_or_a_wire_error(line: bytes) -> None:
    event = decode_json(b'{"type":"X"}')
    with contextlib.suppress(WireError):
        event = bounded(lambda: decode_json(line))
    again = decode_json(encode_json(event))
    assert encode_json(again) == encode_json(event)
    if type(event) is not UnknownEvent:
        assert encode_json(decode_msgpack(encode_msgpack(event))) == encode_json(event)
        return
    with contextlib.suppress(WireError):  # an integer that only JSON can hold
        returned = json.loads(encode_json(decode_msgpack(encode_msgpack(event))))
        came = json.loads(event.raw)  # kept as the bytes it came as: an empty member may be lost on the way
        assert returned in (came, {name: value for name, value in came.items() if name != "nonfinite"})


@fuzz
@given(damaged(event_objects.map(as_msgpack)))
def test_msgpack_is_an_event_or_a_wire_error(data: bytes) -> None:
    with contextlib.suppress(WireError):
        encode_json(decode_msgpack(data))


@fuzz
@given(st.one_of([objects_of(kind) for kind in AnyCommand.__args__]).map(as_json))
def test_a_command_can_be_written_again_or_is_a_wire_error(data: bytes) -> None:
    with contextlib.suppress(WireError):
        encode_command(decode_command(data))


@fuzz
@given(st.lists(event_lines, min_size=1, max_size=8))
def test_any_events_can_be_shown(lines: list[bytes]) -> None:
    """The page's frames, the console, a table and a run's health do not fail, and write no control characters."""
    events = decoded(lines)
    view, changes = RunView(), Changes()
    view.add(events, changes)
    for message in (view.snapshot(), changes.members()):
        msgspec.json.decode(encode_frame(message))
    state = RunState()
    chronicle = Chronicle(state, "run\x1b[2J")
    for event in state.follow(events):
        for line in [*chronicle.take(event), *chronicle.finish(), progress_line(state)]:
            assert line.text.isprintable()
        metrics_of(event)
    table_rows(events)
    assert all(isinstance(one, str) for one in state.health.problems)


@fuzz
@given(st.lists(damaged(event_lines), max_size=8), st.data())
def test_any_journal_can_be_read_and_its_view_stored(lines: list[bytes], data: st.DataObject) -> None:
    """Damaged lines are skipped and named; a damaged stored view is not used."""
    with tempfile.TemporaryDirectory() as place:
        run = Path(place)
        (run / "journal").mkdir()
        (run / "journal" / f"{1:020}.jsonl").write_bytes(b"\n".join([*lines, b""]))
        reader = JournalReader(run / "journal")
        while reader.read(3):
            pass
        assert all(len(one.reason) < 2_000 for one in reader.skipped)
        list(read_history(run / "journal"))
        journal_tail(run / "journal")
        view, _ = read_view(run)
        write_view(run, view)
        stored = run / "view.msgpack"
        if stored.exists():
            stored.write_bytes(data.draw(damaged(st.just(stored.read_bytes()))))
        again, _ = read_view(run)
        again.add(decoded(lines))
        encode_frame(again.snapshot())


@fuzz
@given(damaged(objects_of(Manifest).map(as_json)), st.booleans())
def test_a_manifest_can_be_written_again_or_is_damaged(body: bytes, signed: bool) -> None:
    data = b'{"manifest":%s,"xxh3_128":"%s"}\n' % (body, xxhash.xxh3_128_hexdigest(body).encode()) if signed else body
    with contextlib.suppress(CheckpointDamaged, CheckpointTooNew):
        manifest = bounded(lambda: decode_manifest(data, "file"))
        encode_manifest(manifest)
        assert manifest.nbytes >= 0
        msgspec.msgpack.encode(msgspec.structs.replace(manifest, files={}))


@fuzz
@given(damaged(objects_of(AttemptNote).map(as_json)), damaged(objects_of(Parts).map(as_json)))
def test_an_attempt_and_parts_are_values_or_damaged(attempt: bytes, parts: bytes) -> None:
    signed = b'{"attempt":%s,"xxh3_128":"%s"}\n' % (attempt, xxhash.xxh3_128_hexdigest(attempt).encode())
    for data in (attempt, signed):
        found = decode_attempt("attempt-1.json", data)
        assert found is None or found.attempt == 1
    with contextlib.suppress(CheckpointDamaged):
        assert decode_parts(parts, "file").part_bytes >= 1


tensor_entries = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "U8", "C64", "BOOL", "F8_E4M3", "x"]),
    "shape": st.lists(st.sampled_from([0, 1, 2, 3, 2**47, 2**48, -1, 10**30]), max_size=4),
    "data_offsets": st.lists(st.sampled_from([0, 1, 4, 8, 12, 16, 2**63, -4, 10**30]), min_size=2, max_size=2),
})  # fmt: skip
notes = st.fixed_dictionaries(
    {},
    optional={
        "aliases": st.dictionaries(texts, st.sampled_from(["a", "b"]), max_size=2),
        "views": st.dictionaries(st.sampled_from(["a", "b"]), texts, max_size=2),
    },
)
tensor_headers = st.builds(
    lambda entries, said, extra: as_json({**extra, **entries, "__metadata__": {"stagecast": as_json(said).decode()}}),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), st.one_of(tensor_entries, tensor_entries, strange), max_size=3),
    notes,
    st.dictionaries(texts, plain, max_size=1),
)


@fuzz
@given(damaged(tensor_headers), st.integers(-8, 8))
def test_a_tensor_file_has_tensors_or_is_damaged(header: bytes, off: int) -> None:
    """Whatever shapes and offsets its header has, nothing outside the file is read."""
    data = memoryview(max(0, len(header) + off).to_bytes(8, "little") + header + bytes(range(16)))
    with contextlib.suppress(CheckpointDamaged):
        for info, offset in bounded(lambda: read_layout(data, "file")).tensors.values():
            assert 8 <= offset <= offset + info.nbytes <= len(data)
        tensors_in(data, "file")


marks = st.sampled_from([*range(5), 10, 11, 12, *range(20, 32), *range(40, 46), 50, 51, 60, 61, 62, 127])
packed_trees = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.binary(max_size=20),
        st.sampled_from(["<f4", ">M8[s]", "|V8", "U", "S", "Europe/Berlin", "1e999999999", "9" * 500]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=6),
        st.builds(lambda code, parts: [msgspec.msgpack.Ext(code, b""), *parts], marks, st.lists(inner, max_size=6)),
        st.dictionaries(st.one_of(st.integers(-3, 3), st.text(max_size=3)), inner, max_size=4),
    ),
    max_leaves=20,
)


@fuzz
@given(packed_trees, st.integers(0, 4), st.data())
def test_a_packed_state_is_a_value_that_can_be_packed_again_or_is_damaged(
    tree: Any, entries: int, data: st.DataObject
) -> None:
    packed = msgspec.msgpack.encode([entries, tree])
    found: Any = None
    with contextlib.suppress(CheckpointDamaged):
        found = bounded(lambda: packing.decode(packed))
    packing.encode(found)
    with contextlib.suppress(CheckpointDamaged):
        bounded(lambda: packing.decode(data.draw(damaged(st.just(packed)))))


@fuzz
@given(damaged(objects_of(RunSnapshot).map(as_json)), st.lists(event_lines, max_size=6))
def test_the_answers_of_a_server_give_a_result_or_are_refused(summary: bytes, lines: list[bytes]) -> None:
    try:
        snapshot = msgspec.json.decode(summary, type=RunSnapshot)
    except (ValueError, RecursionError):  # `trainer.remote.http` converts these
        snapshot = RunSnapshot(0, Summary("r"))
    builder = ResultBuilder(snapshot)
    builder.add(decoded(lines))
    assert builder.result is None or builder.result.run_id == snapshot.run.run_id


# ------------------------------------------------------------------------------------------------ the live API

API = json.loads((Path(__file__).parents[1] / "live" / "openapi.json").read_text())
REFUSED = {"400", "401", "403", "404", "405", "421"}
"""Answers that any address may give."""
ways = st.sampled_from([(path, method) for path, methods in API["paths"].items() for method in methods])
PUSHED = {"run": "r", "sender": "0" * 16, "path": "media/a.png"}
digits = st.sampled_from(["0", "-1", "7", str(2**63), "9" * 400, "9" * 5_000, "1e3", "\u0663"])
parameters = st.dictionaries(
    st.sampled_from(["since", "attempt", "follow", "mode", "token", "filter", "run", "sender", "path", "end", "x"]),
    st.one_of(digits, texts, st.sampled_from(["step > 0", "name ~ '('", "(a+)+$"])),
    max_size=3,
)
headers = st.dictionaries(
    st.sampled_from(["host", "origin", "authorization", "content-type", "cookie", "accept", "content-length"]),
    st.one_of(
        st.sampled_from(["127.0.0.1", "[localhost]x.evil", "http://127.0.0.1", "Bearer fuzz-token", "text/html"]),
        st.binary(max_size=20).map(lambda data: data.decode("latin-1")),
    ),
    max_size=3,
)
usual = {"host": "127.0.0.1", "authorization": "Bearer fuzz-token", "content-type": "application/json"}
bodies = st.one_of(
    st.one_of([objects_of(kind) for kind in get_args(AnyCommand)]).map(as_json),
    st.fixed_dictionaries({}, optional={"name": texts, "note": plain, "add_tags": st.lists(texts)}).map(as_json),
    plain.map(as_json),
    st.binary(max_size=50),
    st.lists(damaged(event_lines), max_size=3).map(b"\n".join),
)
hellos = st.one_of(
    st.builds(lambda tree: as_json({"token": "fuzz-token", **tree}), objects_of(Hello)),
    st.builds(lambda command: as_json({"type": "command", "command": command}), plain),
    st.just(b'{"type":"snapshot"}'),
    bodies,
)


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one sound, and one whose lines are nearly events."""
    folder = tmp_path_factory.mktemp("runs")
    header = {"run_id": "r", "attempt": 1, "time": 1.5, "rank": 0, "global_step": 0, "epoch": 0, "stage": None}
    lines = [
        {**header, "type": "RunStarted", "seq": 1, "module": "\x1b", "epochs": 2**63 - 1, "config": {"a": -(2**63)}},
        {**header, "type": "MetricsLogged", "seq": 2, "metrics": {"a\ud800": 1e308, "": -1e308}},
        {**header, "type": "RunEnded", "seq": 3, "status": "finished"},
    ]
    bad = [{**line, "epoch": 10**400} for line in lines]
    for name, written in (("fine", lines), ("bad", bad)):
        (folder / name / "journal").mkdir(parents=True)
        (folder / name / "journal" / f"{1:020}.jsonl").write_bytes(b"".join(as_json(one) + b"\n" for one in written))
    return folder


class Asked:
    """The client's side of one connection: sends messages, then leaves; keeps the answers."""

    def __init__(self, *messages: dict[str, Any], leaves: str) -> None:
        self._messages = [*messages]
        self._leaves = {"type": leaves, "code": 1000}
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        await anyio.lowlevel.checkpoint()
        return self._messages.pop(0) if self._messages else self._leaves

    async def send(self, message: Any) -> None:
        self.sent.append(message)


def ask(folder: Path, client: Asked, scope: dict[str, Any]) -> None:
    async def run() -> None:
        access = Access("fuzz-token", commands=True, hosts=["127.0.0.1"])
        pushes = Pushes(folder.with_name("pushed"), {"vision": "fuzz-token"})
        app = LiveApp(RunsOfFolder(folder), access, pushes=pushes)
        first = Asked(leaves="http.disconnect")
        newest = scope_of("/api/push/vision/events", PUSHED, usual)
        with anyio.fail_after(30), contextlib.closing(pushes):
            if "/push/" in scope["path"]:
                await app({"type": "http", "method": "GET", **newest}, first.receive, first.send)
            await app(scope, client.receive, client.send)

    anyio.run(run)


def scope_of(path: str, query: dict[str, str], given: dict[str, str]) -> dict[str, Any]:
    quoted = urlencode(query, errors="surrogatepass").encode()
    return {
        "path": path,
        "raw_path": quote(path, errors="surrogatepass").encode(),
        "query_string": quoted,
        "headers": [(name.encode(), value.encode("latin-1", "replace")) for name, value in given.items()],
        "scheme": "http",
        "client": ("127.0.0.1", 5),
    }


@fuzz
@given(
    ways,
    st.one_of(st.sampled_from(["GET", "POST", "HEAD", "OPTIONS", "PUT"]), st.none()),
    st.one_of(st.sampled_from(["fine", "bad"]), texts),
    st.one_of(st.sampled_from(["a.png", "../journal", "%2e%2e/x"]), texts),
    parameters,
    headers,
    bodies,
)
def test_the_live_api_answers_any_request_as_its_schema_says(
    runs_folder: Path,
    way: tuple[str, str],
    method: str | None,
    run_id: str,
    inside: str,
    query: dict[str, str],
    given_headers: dict[str, str],
    body: bytes,
) -> None:
    """Each answer is listed, and its JSON has the listed shape."""
    path, known = way
    known = method.lower() if method is not None and method.lower() in API["paths"][path] else known
    client = Asked({"type": "http.request", "body": body, "more_body": False}, leaves="http.disconnect")
    place = path.format(run_id=run_id, path=inside, project="vision")
    query = (PUSHED if "/push/" in path else {}) | query
    scope = scope_of(place, query, usual | {"content-length": str(len(body))} | given_headers)
    ask(runs_folder, client, {"type": "http", "method": method or known.upper(), **scope})
    status, *parts = client.sent
    responses = API["paths"][path][known]["responses"]
    others = {code for methods in API["paths"].values() for one in methods.values() for code in one["responses"]}
    # A run's name with a slash leads to another address.
    listed = set(responses) if "/" not in run_id + inside and run_id and inside else others
    assert str(status["status"]) in listed | REFUSED
    content = responses.get(str(status["status"]), {}).get("content", {}).get("application/json")
    if content is not None and method is None and listed is not others:
        answer = json.loads(b"".join(part.get("body", b"") for part in parts), parse_constant=pytest.fail)
        jsonschema.validate(answer, {**content["schema"], "components": API["components"]})


@fuzz
@given(st.one_of(st.sampled_from(["fine", "bad"]), texts), st.lists(hellos, max_size=4), st.booleans(), headers)
def test_a_websocket_accepts_any_messages_and_is_closed_with_a_code(
    runs_folder: Path, run_id: str, messages: list[bytes], as_text: bool, given_headers: dict[str, str]
) -> None:
    frames = [
        {"type": "websocket.receive", **({"text": one.decode("latin-1")} if as_text else {"bytes": one})}
        for one in messages
    ]
    client = Asked({"type": "websocket.connect"}, *frames, leaves="websocket.disconnect")
    scope = scope_of(f"/api/runs/{run_id}/ws", {}, usual | given_headers)
    ask(runs_folder, client, {"type": "websocket", **scope})
    for message in client.sent:
        if message["type"] == "websocket.send":
            json.loads(message["text"], parse_constant=pytest.fail)
        elif message["type"] == "websocket.close":
            assert len(message["reason"].encode()) <= 123
            assert message["code"] in (1001, 1008, 1012, 1013, 4401, 4404)
