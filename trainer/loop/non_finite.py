"""What happens when a loss or a gradient that is not finite is read, after its step."""

from __future__ import annotations

from typing import Literal

from events.bus.ring import Ring
from events.log import logger
from events.messages import NonFiniteGradient, NonFiniteLoss, TrainStepEnded
from events.origin import header_of
from trainer.errors import REMEDY, NonFiniteGradientError, NonFiniteLossError
from trainer.loop.control import Control


class NonFinitePolicy:
    """Reports and, by the policy, stops. In the event loop, where numbers are read.

    Args:
        stops: The policy is ``non_finite="stop"``.
    """

    def __init__(self, ring: Ring, control: Control, *, stops: bool) -> None:
        self._ring = ring
        self._control = control
        self._stops = stops
        self._action: Literal["warned", "stopped"] = "stopped" if stops else "warned"

    def on_loss(self, event: TrainStepEnded, consecutive: int) -> None:
        """A loss that is not finite was read.

        Args:
            consecutive: How many in a row, this one included.
        """
        loss = event.loss if event.loss is not None else float("nan")
        report = NonFiniteLoss(
            *header_of(event), loss=loss, action=self._action, consecutive=consecutive, of_seq=event.seq
        )
        self._report(report, f"the loss of step {event.global_step} is {loss}")
        if self._stops:
            text = f"the loss of step {event.global_step} is {loss} and non_finite='stop'; {REMEDY}"
            self._control.fail(NonFiniteLossError(text))

    def on_gradient(self, event: TrainStepEnded, consecutive: int) -> None:
        """A gradient that is not finite was read, of a step whose loss was finite. ``consecutive``: as `on_loss`."""
        report = NonFiniteGradient(*header_of(event), action=self._action, consecutive=consecutive, of_seq=event.seq)
        what = f"a gradient of step {event.global_step} is NaN or infinite"
        self._report(report, f"{what}, its loss is {event.loss}")
        if self._stops:
            self._control.fail(NonFiniteGradientError(f"{what} and non_finite='stop'; {REMEDY}"))

    def _report(self, event: NonFiniteLoss | NonFiniteGradient, text: str) -> None:
        count = event.consecutive
        if count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th...: a diverged run is not flooded
            self._ring.publish(event)
        if count == 1:
            logger.warning(text, published=True)
