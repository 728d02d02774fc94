"""Mixed precision: one decision for all optimizers, and no work with float32."""

from __future__ import annotations

import pytest
import torch
from support.training import Net, train
from torch import nn

from events.errors import StagecastError
from events.messages import TrainStepEnded
from trainer.arguments import PrecisionName
from trainer.errors import PrecisionError
from trainer.loop.precision import Precision


class Parameters:
    """Two parameters of ones with an optimizer each, and a step as the loop takes it."""

    def __init__(self, precision: PrecisionName = "float16") -> None:
        self.precision = Precision(precision, "cpu")
        self.one, self.other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        self.optimizers = [torch.optim.SGD([self.one], lr=0.1), torch.optim.Adam([self.other], lr=0.1)]

    @property
    def scale(self) -> float:
        assert self.precision.scaler is not None
        scale: float = self.precision.scaler.get_scale()
        return scale

    @property
    def values(self) -> list[float]:
        return [*self.one.tolist(), *self.other.tolist()]

    def step(self, loss: torch.Tensor) -> bool:
        """Return whether the step was taken."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.precision.scale(loss.sum()).backward()
        self.precision.unscale_(self.optimizers)
        found = self.precision.found_inf(self.optimizers)
        taken = found is None or not found.item()
        for optimizer in self.optimizers if taken else ():
            optimizer.step()
        self.precision.update()
        return taken


# ----------------------------------------------------------------------------------------------- float16


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_overflow_in_one_optimizer_skips_the_step_of_all(broken: int, value: float) -> None:
    """The scale is halved, and the next step is taken."""
    state = Parameters()
    before, factors = state.scale, [1.0, 1.0]
    factors[broken] = value
    assert not state.step(state.one * factors[0] + state.other * factors[1])
    assert state.values == [1.0] * 4
    assert not state.optimizers[1].state  # Adam has not started
    assert state.scale == before / 2
    assert state.step(state.one + state.other)
    assert state.values == pytest.approx([0.9] * 4)


def test_unscaled_gradients_equal_those_without_scaling() -> None:
    """Clipping needs the true norm; 1e-8 is zero in float16, but not once it is scaled."""
    state = Parameters()
    small = (state.other.half() * torch.tensor(1e-4, dtype=torch.float16)).sum().float() * 1e-4
    state.precision.scale((3 * state.one).sum() + small).backward()
    assert state.one.grad is not None
    assert state.other.grad is not None
    assert state.one.grad[0] > 1000
    state.precision.unscale_(state.optimizers)
    assert torch.equal(state.one.grad, torch.full((2,), 3.0))
    assert torch.allclose(state.other.grad, torch.full((2,), 1e-8), rtol=1e-2)


def test_optimizers_without_gradients_do_not_break_the_step() -> None:
    """One of them, or all: nothing overflowed, and the scale stays."""
    state = Parameters()
    assert state.step(state.one)
    assert state.values[2:] == [1.0, 1.0]
    before = state.scale
    assert state.step(nn.Parameter(torch.ones(2)))
    assert state.scale == before
    assert state.step(state.other)


def test_found_inf_before_any_loss_was_scaled_is_an_error() -> None:
    state = Parameters()
    with pytest.raises(PrecisionError, match="before any loss was scaled"):
        state.precision.found_inf(state.optimizers)


@pytest.mark.parametrize("name", ["_found_inf_per_device", "_get_scale_async"])
def test_a_torch_without_a_needed_method_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delattr(torch.amp.GradScaler, name)
    with pytest.raises(PrecisionError, match=f"{name}.*torch {torch.__version__[:4]}.*bfloat16"):
        Precision("float16", "cpu")


# ------------------------------------------------------------------------------------ all precisions


def test_a_device_without_autocast_is_refused() -> None:
    with pytest.raises(PrecisionError, match="'bfloat16' does not work on 'nonsense'"):
        Precision("bfloat16", "nonsense")


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_only_float16_scales_the_loss_and_decides_about_steps(name: PrecisionName) -> None:
    """With float32 the loop can skip autocast too."""
    state = Parameters(name)
    precision, loss = state.precision, (state.one + state.other).sum()
    assert precision.scaler is None
    assert precision.scale(loss) is loss
    assert precision.found_inf(state.optimizers) is None
    assert state.step(state.one + state.other)
    assert precision.enabled == (name == "bfloat16")
    if not precision.enabled:
        with pytest.raises(PrecisionError, match="enabled"):
            precision.autocast()


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_autocast_can_be_entered_repeatedly(name: PrecisionName, dtype: torch.dtype) -> None:
    """The same object for each micro-batch, also after an exception in one; float32 outside of it."""
    precision = Precision(name, "cpu")
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
    dtype: torch.dtype, device: str, text: str
) -> None:
    net = Net()
    net.linear = nn.Linear(4, 1, dtype=dtype, device=device)
    outcome = train(net, precision="float16")
    assert isinstance(outcome.error, StagecastError)
    assert text in str(outcome.error)
    assert outcome.of(TrainStepEnded) == []
