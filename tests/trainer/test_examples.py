"""The examples train as documented."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.data import SequentialSampler

from sinks import Memory
from trainer import Trainer
from trainer.examples import digits, find_settings, gan, mean_teacher, text
from trainer.examples.charlm import CharLM, Size, arguments_for


@pytest.mark.timeout(120)
def test_the_digits_are_classified(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = Trainer(digits.Digits(), digits.ARGUMENTS, sinks=[], run_dir=tmp_path / "run").train()
    assert result.metrics["accuracy"] >= 0.97
    assert 0 < result.metrics["accuracy_worst_digit"] <= 1


@pytest.mark.timeout(120)
def test_the_digits_are_classified_with_settings_that_were_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = find_settings.Scheduled()
    arguments = find_settings.settings_for(module)
    assert [path.name for path in tmp_path.iterdir()] == ["learning_rate.png"]
    result = Trainer(module, arguments, sinks=[], journal=False, checkpoints=False).train()
    assert (arguments.gpu_batch_size_limit, arguments.accumulation_steps) == (256, 1)
    assert result.metrics["accuracy"] >= 0.95


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


def gan_by_hand(net: gan.RingGan) -> Callable[[int, Any], None]:
    """Return a step of training the GAN, written by hand."""
    (of_critic, of_generator), _ = net.get_optimizers_schedulers(0, 0)

    def step(number: int, batch: Any) -> None:
        (real,) = batch
        fake = net.generator(torch.randn(len(real), 8)).detach()
        loss = (1 - net.critic(real)).relu().mean() + (1 + net.critic(fake)).relu().mean()
        of_critic.zero_grad()
        loss.backward()
        of_critic.step()
        if number % 2 == 0:
            of_generator.zero_grad()
            (-net.critic(net.generator(torch.randn(len(real), 8))).mean()).backward()
            of_generator.step()

    return step


def mean_teacher_by_hand(net: mean_teacher.MeanTeacher) -> Callable[[int, Any], None]:
    """Return a step of training the student and its teacher, written by hand."""
    ((optimizer,), _) = net.get_optimizers_schedulers(0, 0)

    def step(number: int, batch: Any) -> None:
        x, _, known = batch
        logits = net.student(x + 0.1 * torch.randn_like(x))
        target = net.teacher(x + 0.1 * torch.randn_like(x)).softmax(1)
        supervised = functional.cross_entropy(logits, known, reduction="sum") / max(1, int((known >= 0).sum()))
        optimizer.zero_grad()
        (supervised + 5 * min(1, number / 200) * functional.mse_loss(logits.softmax(1), target)).backward()
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(net.teacher.parameters(), net.student.parameters(), strict=True):
                mean.lerp_(weight, 0.05)

    return step


class InOrder:
    """The rows of an example in their order, which a loop written by hand has, too."""

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        return super().get_train_dataloader(SequentialSampler, batch_size)  # type: ignore[misc]


class RingGanInOrder(InOrder, gan.RingGan): ...


class MeanTeacherInOrder(InOrder, mean_teacher.MeanTeacher): ...


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("kind", "arguments", "by_hand", "metric", "least", "most"),
    [
        (RingGanInOrder, gan.ARGUMENTS, gan_by_hand, "distance", 0.0, 0.2),
        (MeanTeacherInOrder, mean_teacher.ARGUMENTS, mean_teacher_by_hand, "accuracy", 0.99, 1.0),
    ],
    ids=["gan", "mean_teacher"],
)
def test_an_example_of_manual_optimization_equals_the_loop_by_hand(
    kind: Any, arguments: Any, by_hand: Any, metric: str, least: float, most: float
) -> None:
    """Bit for bit; and it learns."""
    torch.manual_seed(0)
    module = kind()
    trained = Trainer(module, arguments, sinks=[], journal=False, checkpoints=False).train()
    assert least <= trained.metrics[metric] <= most

    torch.manual_seed(0)
    bare = kind()
    torch.manual_seed(0)
    step, number = by_hand(bare), 0
    for _ in range(arguments.epochs):
        for batch in bare.get_train_dataloader(SequentialSampler, arguments.train_batch_size):
            step(number := number + 1, batch)
    assert number == trained.global_step
    assert all(map(torch.equal, module.state_dict().values(), bare.state_dict().values()))
