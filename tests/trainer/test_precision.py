"""Mixed precision: one decision for all optimizers, and nothing at all with float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from events.errors import StagecastError
from events.messages import TrainStepEnded
from trainer.errors import PrecisionError
from trainer.loop.precision import Precision


def _two() -> tuple[nn.Parameter, nn.Parameter, list[torch.optim.Optimizer]]:
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    return one, other, [torch.optim.SGD([one], lr=0.1), torch.optim.Adam([other], lr=0.1)]


def _step(precision: Precision, loss: torch.Tensor, optimizers: list[torch.optim.Optimizer]) -> bool:
    """A step as the loop does it; returns whether it was taken."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    precision.scale(loss).backward()
    precision.unscale_(optimizers)
    found = precision.found_inf(optimizers)
    taken = found is None or not found.item()
    if taken:
        for optimizer in optimizers:
            optimizer.step()
    precision.update()
    return taken


# ----------------------------------------------------------------------------------------------- float16


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_overflow_in_one_optimizer_leaves_all_of_them_out(broken: int, value: float) -> None:
    """The other one's gradients are fine, yet neither steps, and the scale is halved."""
    precision = Precision("float16", "cpu")
    one, other, optimizers = _two()
    factors = [1.0, 1.0]
    factors[broken] = value
    before = precision.scaler.get_scale() if precision.scaler else 0.0
    assert not _step(precision, (one * factors[0] + other * factors[1]).sum(), optimizers)
    assert torch.equal(one, torch.ones(2))
    assert torch.equal(other, torch.ones(2))
    assert not optimizers[1].state  # Adam has not even begun
    assert precision.scaler is not None
    assert precision.scaler.get_scale() == before / 2


def test_training_goes_on_after_a_step_was_left_out() -> None:
    """Every optimizer can be unscaled again, and the next step is taken."""
    precision = Precision("float16", "cpu")
    one, other, optimizers = _two()
    assert not _step(precision, (one * torch.inf + other).sum(), optimizers)
    assert _step(precision, (one + other).sum(), optimizers)
    assert torch.allclose(one, torch.full((2,), 0.9))
    assert torch.allclose(other, torch.full((2,), 0.9))


def test_gradients_are_what_they_would_be_without_scaling() -> None:
    """After unscaling, so that clipping sees the true norm."""
    precision = Precision("float16", "cpu")
    one, other, optimizers = _two()
    precision.scale((3 * one + 5 * other).sum()).backward()
    assert one.grad is not None
    assert other.grad is not None
    assert one.grad[0] > 1000
    precision.unscale_(optimizers)
    assert torch.equal(one.grad, torch.full((2,), 3.0))
    assert torch.equal(other.grad, torch.full((2,), 5.0))


def test_small_gradients_survive_float16_because_of_the_scale() -> None:
    """1e-8 is zero in float16; scaled it is not."""
    precision = Precision("float16", "cpu")
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    loss = (weight.half() * torch.tensor(1e-4, dtype=torch.float16)).sum().float() * 1e-4
    precision.scale(loss).backward()
    precision.unscale_([optimizer])
    assert weight.grad is not None
    assert torch.allclose(weight.grad, torch.full((2,), 1e-8), rtol=1e-2)


def test_optimizers_without_gradients_do_not_break_the_step() -> None:
    """One that got none, and all of them: nothing overflowed; the scale stays; the next step works."""
    precision = Precision("float16", "cpu")
    one, other, optimizers = _two()
    assert _step(precision, one.sum(), optimizers)
    assert torch.equal(other, torch.ones(2))
    free = nn.Parameter(torch.ones(2))
    before = precision.scaler.get_scale() if precision.scaler else 0.0
    assert _step(precision, free.sum(), optimizers)
    assert precision.scaler is not None
    assert precision.scaler.get_scale() == before
    assert _step(precision, other.sum(), optimizers)


def test_asking_before_any_loss_was_scaled_is_a_clear_error() -> None:
    """The order of calls is wrong."""
    precision = Precision("float16", "cpu")
    with pytest.raises(PrecisionError, match="before any loss was scaled"):
        precision.found_inf(_two()[2])


@pytest.mark.parametrize("name", ["_found_inf_per_device", "_get_scale_async"])
def test_a_torch_without_what_we_read_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Not at the first overflow; the message names what is lacking and the way out."""
    monkeypatch.delattr(torch.amp.GradScaler, name)
    with pytest.raises(PrecisionError, match=f"{name}.*torch {torch.__version__[:4]}.*bfloat16"):
        Precision("float16", "cpu")


def test_a_device_without_autocast_is_refused() -> None:
    """The message names precision and device."""
    with pytest.raises(PrecisionError, match="'bfloat16' does not work on 'nonsense'"):
        Precision("bfloat16", "nonsense")


# ------------------------------------------------------------------------------------ the other precisions


def test_float32_is_nothing_to_do() -> None:
    """The loop can skip it all: no scaler, no autocast; what is called anyway changes nothing."""
    precision = Precision("float32", "cpu")
    one, other, optimizers = _two()
    assert not precision.enabled
    assert precision.scaler is None
    with pytest.raises(PrecisionError, match="enabled"):
        precision.autocast()
    loss = (one + other).sum()
    assert precision.scale(loss) is loss
    assert _step(precision, loss, optimizers)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_autocast_can_be_entered_again_and_again(name: str, dtype: torch.dtype) -> None:
    """The same object for each micro-batch, also after an exception in one; outside of it float32 rules."""
    precision = Precision(name, "cpu")  # type: ignore[arg-type]
    linear = nn.Linear(2, 2)
    context = precision.autocast()
    for _ in range(3):
        assert precision.autocast() is context
        with context:
            assert linear(torch.ones(1, 2)).dtype is dtype
        assert linear(torch.ones(1, 2)).dtype is torch.float32
        with pytest.raises(RuntimeError, match="on purpose"), context:
            raise RuntimeError("on purpose")
        assert not torch.is_autocast_enabled("cpu")


def test_bfloat16_scales_nothing() -> None:
    """It has float32's exponents: the step needs no decision and no wait."""
    precision = Precision("bfloat16", "cpu")
    one, other, optimizers = _two()
    assert precision.enabled
    loss = (one + other).sum()
    assert precision.scale(loss) is loss
    assert precision.found_inf(optimizers) is None
    assert _step(precision, loss, optimizers)


@pytest.mark.parametrize(
    ("dtype", "device", "text"),
    [
        (torch.float16, "cpu", "parameter linear.weight has the dtype float16"),
        (torch.complex64, "cpu", "parameter linear.weight has the dtype complex64"),
        (torch.float32, "meta", "parameter linear.weight is on the meta device"),
    ],
    ids=["float16", "complex", "meta"],
)
def test_a_parameter_that_cannot_be_trained_is_named_before_the_first_step(
    kit: Any, dtype: torch.dtype, device: str, text: str
) -> None:
    net = kit.Net()
    net.linear = torch.nn.Linear(4, 1, dtype=dtype, device=device)
    outcome = kit.train(net, precision="float16")
    assert isinstance(outcome.error, StagecastError)
    assert text in str(outcome.error)
    assert outcome.of(TrainStepEnded) == []
