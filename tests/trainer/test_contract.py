"""The contract: each name, argument, default and abstractness, and what methods do by default."""

from __future__ import annotations

import copy
import html
import inspect
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainer.callback_interface import HOOKS, LANE_ATTRIBUTE, CallbackInterface, Lane, fenced, inline, observer
from trainer.module_interface import ModuleInterface, Stage

# The contract as a table: class, method, parameters (a default after "="), abstract.
CONTRACT = [
    (CallbackInterface, "on_begin_train_epoch", ["global_step", "epoch"], False),
    (CallbackInterface, "on_end_train_step", ["global_step", "*train_step_collated_outputs"], False),
    (CallbackInterface, "on_end_train_epoch", ["global_step", "*train_step_collated_outputs"], False),
    (CallbackInterface, "on_end_backward", ["global_step", "loss_tensor"], False),
    (CallbackInterface, "on_end_val_epoch", ["global_step", "*val_step_collated_outputs", 'key="default"'], False),
    (CallbackInterface, "on_end_train", ["global_step"], False),
    (ModuleInterface, "get_optimizers_schedulers", ["estimated_global_steps_per_epoch", "epochs"], True),
    (ModuleInterface, "get_train_dataloader", ["sampler", "batch_size"], True),
    (ModuleInterface, "get_val_dataloaders", ["sampler", "batch_size"], True),
    (ModuleInterface, "get_test_dataloaders", ["sampler", "batch_size"], False),
    (ModuleInterface, "forward", ["stage", "global_step", "batch", "device"], False),
    (ModuleInterface, "train_step", ["global_step", "batch", "device"], True),
    (ModuleInterface, "val_step", ["global_step", "batch", "device"], True),
    (ModuleInterface, "test_step", ["global_step", "batch", "device"], False),
    (ModuleInterface, "get_state", [], False),
    (ModuleInterface, "update_state", ["state"], False),
]
DOCUMENT = Path(__file__).resolve().parents[2].parent / "shared" / "module_interface.md"


def _parameters(function: Callable[..., Any]) -> list[str]:
    found = []
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        text = ("*" if parameter.kind is parameter.VAR_POSITIONAL else "") + parameter.name
        if parameter.default is not parameter.empty:
            text += f'="{parameter.default}"'
        found.append(text)
    return found


class Minimal(ModuleInterface):
    """The least that a user must write."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), lr=0.1)], []

    def get_train_dataloader(self, sampler, batch_size):
        return []

    def get_val_dataloaders(self, sampler, batch_size):
        return None

    def train_step(self, global_step, batch, device):
        return "train", global_step, batch, device

    def val_step(self, global_step, batch, device):
        return "val", global_step, batch, device


class Recording:
    """A recorder that keeps what it gets."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, Any]] = []

    def log(self, name: str, value: Any, reduce: str) -> None:
        self.logged.append((name, value))


# ------------------------------------------------------------------------------------------- signatures


@pytest.mark.parametrize(("owner", "name", "parameters", "abstract"), CONTRACT)
def test_each_method_has_the_contracts_parameters_defaults_and_abstractness(
    owner: type, name: str, parameters: list[str], abstract: bool
) -> None:
    method = vars(owner)[name]
    assert _parameters(method) == parameters
    assert getattr(method, "__isabstractmethod__", False) is abstract


def _document_signatures() -> list[tuple[str, str, list[str], bool]]:
    """Parse class, method, parameters and abstractness out of the document."""
    text = html.unescape(DOCUMENT.read_text())
    found, owner = [], ""
    for part in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        if title.endswith(" Objects"):
            owner = title.removesuffix(" Objects")
            continue
        if not body.strip().startswith("```python"):
            continue
        code = re.sub(r"^ \| ?", "", body.split("```")[1].removeprefix("python\n"), flags=re.MULTILINE)
        abstract = "@abstractmethod" in code
        # The document writes a bare `*` after `*args`, which Python does not allow and which changes nothing.
        code = code.replace("@abstractmethod", "").replace("outputs, *, ", "outputs, ").strip()
        space: dict[str, Any] = {}
        exec(f"from __future__ import annotations\ndef {code}:\n    ...", space)
        name = title.replace("\\", "").strip()
        found.append((owner, name, _parameters(_with_self(space[name])), abstract))
    return found


def _with_self(function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)
    self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    function.__signature__ = signature.replace(parameters=[self, *signature.parameters.values()])  # type: ignore[attr-defined]
    return function


@pytest.mark.skipif(not DOCUMENT.exists(), reason="the contract's document is not beside this checkout")
def test_the_contracts_document_agrees_with_the_table() -> None:
    table = [(owner.__name__, name, parameters, abstract) for owner, name, parameters, abstract in CONTRACT]
    assert _document_signatures() == table


def test_the_classes_and_the_hooks_are_those_of_the_contract() -> None:
    assert [(stage.name, stage.value) for stage in Stage] == [("TRAIN", "train"), ("VAL", "val"), ("TEST", "test")]
    assert issubclass(ModuleInterface, nn.Module)
    assert issubclass(ModuleInterface, CallbackInterface)
    assert list(HOOKS) == [name for owner, name, *_ in CONTRACT if owner is CallbackInterface]


# --------------------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize("stage", ["train", None, 0, "predict"])
def test_forward_refuses_an_invalid_stage(stage: object) -> None:
    with pytest.raises(AttributeError) as caught:
        Minimal()(stage, 1, "batch", "cpu")
    for part in ("Minimal", repr(stage), "Stage.TRAIN", "Stage.VAL", "Stage.TEST"):
        assert part in str(caught.value)


def test_forward_dispatches_on_the_stage() -> None:
    module = Minimal()
    assert module(Stage.TRAIN, 3, "batch", "cpu") == ("train", 3, "batch", "cpu")
    assert module(Stage.VAL, 3, "batch", "cpu") == ("val", 3, "batch", "cpu")
    assert module(Stage.TEST, 3, "batch", "cpu") == ("val", 3, "batch", "cpu")


def test_hooks_are_no_ops_and_test_dataloaders_default_to_none() -> None:
    callback = CallbackInterface()
    module = Minimal()
    for target in (callback, module):
        assert target.on_begin_train_epoch(0, 0) is None
        assert target.on_end_train_step(1, 2, 3) is None
        assert target.on_end_train_epoch(1) is None
        assert target.on_end_backward(1, torch.ones(())) is None
        assert target.on_end_val_epoch(1, 2, key="other") is None
        assert target.on_end_train(1) is None
    assert module.get_test_dataloaders(object, 3) is None


def test_state_defaults_to_the_state_dict() -> None:
    one, other = Minimal(), Minimal()
    assert set(one.get_state()) == {"linear.weight", "linear.bias"}
    other.update_state(one.get_state())
    assert torch.equal(one.linear.weight, other.linear.weight)
    with pytest.raises(RuntimeError, match="unknown"):
        other.update_state({"unknown": torch.ones(())})


# ---------------------------------------------------------------------------------------------- logging


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("", 1.0, ValueError, "empty name"),
        (None, 1.0, TypeError, "None"),
        (b"loss", 1.0, TypeError, "b'loss'"),
        ("loss", b"1.0", TypeError, "b'1.0'"),
        ("loss", None, TypeError, "None"),
        ("loss", [1.0], TypeError, r"\[1.0\]"),
        ("loss", 1j, TypeError, "1j"),
        ("loss", np.complex64(1), TypeError, "one element"),
        ("loss", 10**400, ValueError, "too large"),
        ("loss", np.zeros(2), (TypeError, ValueError), "loss"),
        ("loss", torch.zeros(2), ValueError, r"shape \(2,\)"),
        ("loss", torch.zeros(0), ValueError, r"shape \(0,\)"),
        ("loss", torch.zeros((), dtype=torch.complex64), TypeError, "complex64"),
    ],
)
def test_log_refuses_an_invalid_value(name: Any, value: Any, error: Any, says: str) -> None:
    module = Minimal()
    module._stagecast_recorder = recorder = Recording()
    with pytest.raises(error, match=says):
        module.log(name, value)
    assert recorder.logged == []


def test_the_recorder_is_neither_state_nor_copied_nor_pickled() -> None:
    module = Minimal()
    before = set(module.state_dict())
    module._stagecast_recorder = recorder = Recording()
    assert set(module.state_dict()) == before
    assert copy.deepcopy(module)._stagecast_recorder is None
    assert copy.copy(module)._stagecast_recorder is None
    assert pickle.loads(pickle.dumps(module))._stagecast_recorder is None
    assert module._stagecast_recorder is recorder


# ------------------------------------------------------------------------------------------------ lanes


@pytest.mark.parametrize(("mark", "lane"), [(inline, Lane.INLINE), (fenced, Lane.FENCED), (observer, Lane.OBSERVER)])
def test_a_mark_sets_the_lane_and_returns_the_function(mark: Callable[..., Any], lane: Lane) -> None:
    def on_end_train(self: Any, global_step: int) -> None: ...

    assert mark(on_end_train) is on_end_train
    callback = type("Marked", (CallbackInterface,), {"on_end_train": on_end_train})()
    assert getattr(callback.on_end_train, LANE_ATTRIBUTE) is lane


def test_a_mark_on_a_bound_method_names_the_right_place() -> None:
    with pytest.raises(TypeError, match=r"@fenced.*where the hook is defined"):
        fenced(CallbackInterface().on_end_train)
