"""The arguments: strict, complete in their complaints, and the arithmetic of batches."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from events.field_docs import field_docs
from events.journal.writer import Journal
from sinks import CSV
from trainer import Checkpoints, Delivery
from trainer.arguments import TrainerArguments
from trainer.config import apply_overrides, check_struct, decode, describe_type, load_config
from trainer.errors import ArgumentsError

# ------------------------------------------------------------------------------------------ wrong values


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("epochs", 0, "an integer >= 1"),
        ("epochs", True, "an integer >= 1"),
        ("epochs", 1.0, "an integer >= 1"),
        ("epochs", "3", "an integer >= 1"),
        ("train_batch_size", None, "an integer >= 1"),
        ("gpu_batch_size_limit", 0, "an integer >= 1 or None"),
        ("max_steps", -1, "an integer >= 1 or None"),
        ("clip_grads", 1, "true or false"),
        ("max_grad_norm", 0.0, "a number > 0"),
        ("max_grad_norm", math.nan, "a number > 0"),
        ("seed", -1, "an integer >= 0"),
        ("seed", 2**63, "an integer >= 0 and <= 9223372036854775807 or None"),
        ("device", "", "a string that is not empty"),
        ("precision", "fp16", "one of 'bfloat16', 'float16', 'float32'"),
        ("compile_options", {1: 2}, "a mapping with string keys"),
        ("scheduler_interval", "batch", "one of 'epoch', 'step'"),
        ("val_interval_epochs", -1, "a number >= 0"),
        ("non_finite", "ignore", "one of 'skip', 'stop', 'warn'"),
        ("ledger_interval_s", 0, "a number > 0"),
        ("drain_timeout_s", -0.5, "a number >= 0"),
    ],
)
def test_an_invalid_value_is_named_with_the_valid_ones(name: str, value: Any, allowed: str) -> None:
    for build in (
        lambda: TrainerArguments(**{name: value}),
        lambda: TrainerArguments.from_dict({name: value}),
        lambda: msgspec.structs.replace(TrainerArguments(), **{name: value}),
    ):
        with pytest.raises(ArgumentsError) as caught:
            build()
        assert f"{name} = {value!r}: must be " in str(caught.value)
        assert allowed in str(caught.value)


def test_all_problems_come_in_one_error() -> None:
    with pytest.raises(ValueError, match=r"^the arguments: ") as caught:
        TrainerArguments.from_dict({"epochs": 0, "seeed": 1, "device": 3, "zzzz": 1})
    text = str(caught.value)
    assert "epochs = 0" in text
    assert "device = 3" in text
    assert "seeed: is not known; did you mean seed?" in text
    assert "zzzz: is not known; known are epochs, train_batch_size" in text


class Own(TrainerArguments, frozen=True, kw_only=True):
    """Arguments with a field of the user's, whose name is also an alias."""

    lr: float = 0.1


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: TrainerArguments(max_epochs=3), "TrainerArguments: max_epochs: is not known; did you mean epochs?"),
        (lambda: TrainerArguments(epohcs=3), "TrainerArguments: epohcs: is not known; did you mean epochs?"),
        (
            lambda: TrainerArguments(max_epoch=3, batch_size_train=2),
            "TrainerArguments: max_epoch: is not known; did you mean epochs?; batch_size_train: is not known; did you"
            " mean train_batch_size?",
        ),
        (lambda: TrainerArguments(lr=3), "TrainerArguments: lr: is not known; set it in get_optimizers_schedulers"),
        (lambda: TrainerArguments(3), "TrainerArguments: 3 has no name; write name=value"),
        (
            lambda: TrainerArguments(epochs=10**400),
            "TrainerArguments: epochs: an integer has 1,329 bits; give one within 64 bits",
        ),
        (
            lambda: TrainerArguments(max_steps=10**9_000),
            "TrainerArguments: max_steps: an integer has 29,898 bits; give one within 64 bits",
        ),
        (
            lambda: TrainerArguments(monitor=10**9_000),  # type: ignore[arg-type]
            "TrainerArguments: monitor: an integer has 29,898 bits; give one within 64 bits",
        ),
        (lambda: TrainerArguments.from_dict({"fp16": True}), "the arguments: fp16: is not known; use precision="),
        (lambda: Own(lrr=3), "Own: lrr: is not known; did you mean lr?"),
        (lambda: Checkpoints(monitor="val_loss"), "Checkpoints: monitor: is not known; did you mean best?"),
        (lambda: Delivery(on_eror="retry"), "Delivery: on_eror: is not known; did you mean on_error?"),
        (lambda: Journal(fsync=True), "Journal: fsync: is not known; known are "),
        (lambda: CSV(pth="a.csv"), "CSV: pth: is not known; did you mean path?"),
        (lambda: CSV("a.csv", path="b.csv"), "CSV: path: is given twice; give it once"),
    ],
)
def test_a_constructor_names_its_class_and_the_replacement(build: Callable[[], Any], says: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        build()
    assert str(caught.value).startswith(says)
    assert str(caught.value).count(says.partition(": ")[2].partition(":")[0]) == 1
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_every_alias_is_another_name_for_something_that_exists() -> None:
    """One word is a field; a field never has an alias of its own name."""
    for kind in (TrainerArguments, Checkpoints):
        fields = set(kind.__struct_fields__)
        single = {served for served in kind.argument_aliases.values() if " " not in served}
        assert single <= fields, single - fields
        assert not fields & set(kind.argument_aliases)


def test_arguments_of_a_subclass_are_built_pickled_and_replaced_as_others_are() -> None:
    own = Own(lr=1, epochs=2)
    assert pickle.loads(pickle.dumps(own)) == own == Own.from_dict({"lr": 1, "epochs": 2})
    assert msgspec.structs.replace(own, lr=2.0).lr == 2.0
    assert msgspec.json.decode(msgspec.json.encode(own), type=Own) == own


def test_names_without_a_similar_one_are_listed_once_with_the_known_ones() -> None:
    with pytest.raises(ArgumentsError) as caught:
        TrainerArguments.from_dict({"zzzz": 1, "yyyy": 2, "device": 3}, ["epochs", "seed=[", "xxxx=1"])
    text = str(caught.value)
    assert "zzzz, yyyy, xxxx: are not known; known are epochs" in text
    assert text.count("train_batch_size") == 1
    for problem in ("override 'epochs': must look like", "override 'seed=[': the value is not valid", "device = 3:"):
        assert problem in text


@pytest.mark.parametrize("values", [[], "epochs", None, 3])
def test_a_value_other_than_a_mapping_is_refused(values: Any) -> None:
    with pytest.raises(ArgumentsError, match="must be a mapping"):
        TrainerArguments.from_dict(values)


def test_integers_serve_as_floats_and_nothing_else_is_coerced() -> None:
    arguments = TrainerArguments(max_grad_norm=2, drain_timeout_s=0)
    assert isinstance(arguments.max_grad_norm, float)
    assert isinstance(arguments.drain_timeout_s, float)


def test_arguments_are_frozen_and_copy_mappings() -> None:
    options = {"mode": "default"}
    arguments = TrainerArguments(compile_options=options)
    options["mode"] = "other"
    assert arguments.compile_options == {"mode": "default"}
    assert TrainerArguments().compile_options is not TrainerArguments().compile_options
    with pytest.raises(AttributeError):
        arguments.epochs = 2  # type: ignore[misc]


def test_arguments_survive_json() -> None:
    arguments = TrainerArguments(epochs=3, seed=7, compile_options={"dynamic": True})
    assert msgspec.json.decode(msgspec.json.encode(arguments), type=TrainerArguments) == arguments
    with pytest.raises(msgspec.ValidationError, match="epochs"):
        msgspec.json.decode(b'{"epochs": 0}', type=TrainerArguments)


# ------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "epochs: [", "not valid YAML"),
        ("a.yml", "epochs: 1\nepochs: 2\n", "'epochs' is duplicated"),
        ("a.yaml", "- 1\n", "must hold a mapping"),
        ("a.yaml", "1: 2\n", "1: is not known"),
        ("a.yaml", "epochs: !!python/object:os.system 1\n", "not valid YAML"),
        ("a.json", '{"epochs": 1, "epochs": 2}', "'epochs' is duplicated"),
        ("a.json", '{"epochs": 1', "not valid JSON"),
        ("a.toml", "epochs = ", "not valid TOML"),
        ("a.toml", "epoch = 3", "did you mean epochs?"),
        ("a.ini", "epochs = 1", "'.ini' is not one of .yaml, .yml, .toml, .json"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ArgumentsError) as caught:
        TrainerArguments.from_file(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentsError, match=r"none\.yaml: cannot be read: No such file"):
        TrainerArguments.from_file(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ArgumentsError, match=r"binary\.yaml: is not valid YAML"):
        TrainerArguments.from_file(tmp_path / "binary.yaml")


def test_yaml_toml_and_json_give_equal_arguments(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("max_grad_norm: 1e-4\nseed: 3\ncompile_options: {dynamic: true}\n")
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert TrainerArguments.from_file(tmp_path / "empty.yaml") == TrainerArguments()
    (tmp_path / "a.toml").write_text("max_grad_norm = 1e-4\nseed = 3\ncompile_options = {dynamic = true}\n")
    values = {"max_grad_norm": 1e-4, "seed": 3, "compile_options": {"dynamic": True}}
    (tmp_path / "a.json").write_text(json.dumps(values))
    loaded = [TrainerArguments.from_file(tmp_path / f"a.{suffix}") for suffix in ("yaml", "toml", "json")]
    assert loaded == [TrainerArguments(**values)] * 3


# --------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("epochs", "must look like 'name=value'"),
        ("=3", "must look like 'name=value'"),
        ("a..b=3", "must look like 'name=value'"),
        ("epochs.more=3", "epochs is 1, not a group"),
        ("epochs=[", "not valid YAML"),
        (3, "must be text"),
        ("epochs=2024-13-45", "not valid YAML: month must be in 1..12"),
        ("epochs=" + "[" * 1_000, "not valid YAML"),
    ],
)
def test_an_override_that_cannot_be_applied_is_quoted(override: Any, says: str) -> None:
    problems: list[str] = []
    assert apply_overrides({"epochs": 1}, [override], problems) == {"epochs": 1}
    assert repr(override) in problems[0]
    assert says in problems[0]


def test_a_wrong_override_is_checked_like_a_value_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("epochs: 2\n")
    with pytest.raises(ArgumentsError, match=r"a\.yaml with epochs=none, sed=1: .*did you mean seed.*epochs = 'none'"):
        TrainerArguments.from_file(tmp_path / "a.yaml", ["epochs=none", "sed=1"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-.5e+3", -500.0),
        ("1.5", 1.5),
        ("3", 3),
        ("true", True),
        ("null", None),
        ("", None),
        ("''", ""),
        ("cuda:1", "cuda:1"),
        ("[1, 2]", [1, 2]),
        ("{mode: max-autotune}", {"mode": "max-autotune"}),
        ("a=b", "a=b"),
        ("e5", "e5"),
    ],
)
def test_override_values_are_read_as_yaml(text: str, value: Any) -> None:
    """Numbers with an exponent need no decimal point."""
    result = apply_overrides({}, [f"name={text}"], [])["name"]
    assert result == value
    assert type(result) is type(value)


def test_dotted_overrides_reach_into_groups_and_change_nothing_else() -> None:
    config = {"compile_options": {"dynamic": False}, "epochs": 1}
    result = apply_overrides(config, ["compile_options.mode=default", "new.deep.name=1", "epochs=2", "epochs=3"], [])
    assert result == {
        "compile_options": {"dynamic": False, "mode": "default"},
        "new": {"deep": {"name": 1}},
        "epochs": 3,
    }
    assert config == {"compile_options": {"dynamic": False}, "epochs": 1}


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rate: Annotated[float, msgspec.Meta(gt=0)]
    name: str = "x"

    def __post_init__(self) -> None:
        check_struct(self)
        if self.name == "forbidden":
            raise ArgumentsError("name and rate do not go together")


class Outer(msgspec.Struct, frozen=True):
    inner: Inner | None = None
    table: dict[str, int] = {}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"inner": {"rat": 1.0}}, "inner.rat: is not known; did you mean inner.rate?"),
        ({"inner": {}}, "inner.rate: is missing"),
        ({"inner": {"rate": 0}}, "inner.rate = 0: must be a number > 0"),
        ({"inner": 3}, "inner = 3: must be a mapping of the fields of Inner or None"),
        ({"inner": {"rate": 1, "name": "forbidden"}}, "inner: name and rate do not go together"),
        ({"table": {"a": "b"}}, "table = {'a': 'b'}: must be a mapping with string keys (Expected `int`, got `str`"),
    ],
)
def test_nested_configurations_name_the_path(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        decode(Outer, config, "here")
    assert str(caught.value).startswith("here: ")
    assert says in str(caught.value)
    assert decode(Outer, {"inner": None}, "here", ["inner.rate=1e-3"]) == Outer(Inner(0.001))
    assert decode(Outer, {"inner": Inner(1.0)}, "here") == Outer(Inner(1.0))


# ----------------------------------------------------------------------------------------------- batches


@given(st.integers(1, 5_000), st.one_of(st.none(), st.integers(1, 6_000)))
@example(14, 4)  # a micro-batch of exactly half of the limit
def test_the_micro_batch_is_the_largest_divisor_within_the_limit(total: int, limit: int | None) -> None:
    arguments = TrainerArguments(train_batch_size=total, gpu_batch_size_limit=limit)
    bound = total if limit is None else limit
    assert arguments.micro_batch_size == max(d for d in range(1, total + 1) if total % d == 0 and d <= bound)
    assert arguments.micro_batch_size * arguments.accumulation_steps == total
    warned = arguments.batch_size_warning() is not None
    assert warned == (bound < total and arguments.micro_batch_size * 2 < bound)


def test_the_warning_about_small_micro_batches_names_the_numbers_and_a_better_one() -> None:
    warning = TrainerArguments(train_batch_size=97, gpu_batch_size_limit=32).batch_size_warning()
    assert warning is not None
    for part in ("train_batch_size=97", "gpu_batch_size_limit=32", "97 micro-batches of 1", "train_batch_size=96"):
        assert part in warning


def test_validation_batches_default_to_the_micro_batch() -> None:
    assert TrainerArguments(train_batch_size=64, gpu_batch_size_limit=16).evaluation_batch_size == 16
    assert TrainerArguments(train_batch_size=64, val_batch_size=128).evaluation_batch_size == 128


# ------------------------------------------------------------------------------------------------- words


def test_every_argument_is_described() -> None:
    """The help texts show the docstring of each field."""
    documented = field_docs(TrainerArguments)
    assert all(documented[name].endswith(".") for name in TrainerArguments.__struct_fields__)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Any, "anything"),
        (list[int], "a list"),
        (str, "a string"),
        (tuple[int, ...], "a list"),
        (Inner, "a mapping of the fields of Inner"),
        (Annotated[float, msgspec.Meta(gt=0, lt=1)], "a number > 0 and < 1"),
    ],
)
def test_types_are_described_in_words(kind: Any, words: str) -> None:
    assert describe_type(kind) == words


def test_load_config_is_not_tied_to_the_arguments(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &base {rate: 1e-3}\nsame: {<<: *base, name: x}\n")
    assert load_config(tmp_path / "a.yaml") == {"base": {"rate": 0.001}, "same": {"rate": 0.001, "name": "x"}}
