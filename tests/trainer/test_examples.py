"""The examples train as documented."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sinks import Memory
from trainer import Trainer
from trainer.examples import digits, text
from trainer.examples.charlm import CharLM, Size, arguments_for


@pytest.mark.timeout(120)
def test_the_digits_are_classified(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = Trainer(digits.Digits(), digits.ARGUMENTS, sinks=[], run_dir=tmp_path / "run").train()
    assert result.metrics["accuracy"] >= 0.97
    assert 0 < result.metrics["accuracy_worst_digit"] <= 1


@pytest.mark.timeout(120)
def test_the_language_model_learns_from_the_standard_library(tmp_path: Path) -> None:
    size = Size(width=32, depth=1, heads=2, context=32, batch=16, steps=60, epochs=3, max_lr=1e-2)
    torch.manual_seed(0)
    module = CharLM(text.load_text(limit_bytes=2**20), size)
    arguments = arguments_for(size, torch.device("cpu"))
    sink = Memory()
    result = Trainer(module, arguments, sinks=[sink], run_dir=tmp_path / "run").train()
    losses = [value for _, value in sink.metrics("val_loss")]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert result.metrics["train_loss"] < 4.0
    assert len(module.write("def ", 200)) >= 200


def test_the_text_is_split_by_file_and_alike_each_time() -> None:
    first, second = text.load_text(limit_bytes=2**20), text.load_text(limit_bytes=2**20)
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.val, second.val)
    assert 0.02 < len(first.val) / (len(first.train) + len(first.val)) < 0.3


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="are too few"):
        text.load_text(tmp_path)


def test_characters_survive_the_way_to_tokens_and_back() -> None:
    assert text.decode(text.encode(b"def f():\n    return 1")) == "def f():\n    return 1"
    assert text.decode(text.encode("é".encode())) == "??"
