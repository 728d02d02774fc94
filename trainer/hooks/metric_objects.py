"""Metric objects such as torchmetrics': logged by name, computed when an epoch ends, reset after its hooks.

Nothing here imports torchmetrics: a metric is whatever has ``update``, ``compute`` and ``reset``. The states of
torchmetrics are found by ``_defaults``, the attribute in which ``Metric.add_state`` keeps their names and defaults.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeGuard

import torch

from events.log import logger
from trainer.errors import add_note

State = dict[str, dict[str, Any]]
"""The states of metrics by their names in the module."""


class MetricObject(Protocol):
    """A metric object; `torchmetrics.Metric` and `torchmetrics.MetricCollection` are such."""

    def compute(self) -> Any:
        """Return the value of all updates since the last reset."""

    def reset(self) -> None:
        """Forget all updates."""


def is_metric(value: object) -> TypeGuard[MetricObject]:
    """Whether a value is a metric object: it has the methods ``update``, ``compute`` and ``reset``."""
    if isinstance(value, type):
        return False
    return all(callable(getattr(value, name, None)) for name in ("compute", "update", "reset"))


class MetricObjects:
    """The metric objects of one run. On the loop's thread, or on that of a hook while the loop waits for it.

    Attributes:
        epoch: Those logged in training since the epoch began, by their names and ids.
        evaluation: Those logged in the current evaluation of a dataloader.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.epoch: dict[tuple[str | None, int], MetricObject] = {}
        self.evaluation: dict[tuple[str | None, int], MetricObject] = {}
        self._module = module
        self._computed: list[MetricObject] = []  # to be reset
        self._held: State | None = None
        self._warned: set[str] = set()
        self._is_shared = False  # among ranks, which compute together

    def add(self, name: str | None, metric: MetricObject, owner: object, *, evaluates: bool) -> None:
        """Register a metric, to be computed at the end of the epoch or evaluation. Called in each step.

        Args:
            name: None for `log_dict`: the metric's own names.
            owner: The module or callback that logs it.

        Raises:
            TypeError: A name was given for a collection.
            ValueError: The name is that of another metric, or the metric is used in training and in evaluation.
        """
        logged = self.evaluation if evaluates else self.epoch
        if (name, id(metric)) not in logged:
            self._check(name, metric, owner, logged, evaluates=evaluates)
            logged[name, id(metric)] = metric

    def _check(self, name: str | None, metric: MetricObject, owner: object, logged: Any, *, evaluates: bool) -> None:
        kind = type(metric).__name__
        check_single(name, metric)
        if name is not None and any(other == name for other, _ in logged):
            raise ValueError(
                f"log({name!r}) got another {kind} object than before in the same epoch; create it once, in __init__"
            )
        if evaluates and (both := [other for other, one in self.epoch if one == id(metric)]):
            raise ValueError(
                f"{_call(name)} got the metric object of {_call(both[0])} in training, which would mix both; give each"
                f" a {kind} of its own"
            )
        if owner is self._module and id(metric) not in map(id, self._module.modules()):
            self._warn_once(
                f"{_call(name)} got a {kind} that is not registered in {type(owner).__name__}, so neither moved to the"
                f" device nor part of checkpoints; assign it to an attribute in __init__, in a ModuleDict or ModuleList"
            )

    def agree(self, exchange: Callable[[Any], list[Any]], *, evaluates: bool) -> None:
        """Register what any rank has logged, in one order: to compute a metric, all ranks exchange its state.

        Args:
            exchange: Returns this value of each rank.
        """
        self._is_shared = True
        logged = self.evaluation if evaluates else self.epoch
        modules = dict(self._module.named_modules())
        paths = {id(one): path for path, one in modules.items()}
        everyone = exchange([(name, paths[one]) for name, one in logged if one in paths])
        own, ordered = dict(logged), [entry for entries in everyone for entry in entries]
        logged.clear()
        for name, path in ordered:
            if is_metric(metric := modules.get(path)):
                logged[name, id(metric)] = metric
        logged.update(own)

    def compute(self, name: str | None, metric: MetricObject) -> dict[str, Any]:
        """Compute a metric, which may wait for the device; return its values by name, unchecked.

        The result is empty, with a warning, if the metric has had no update since its last reset.

        Raises:
            TypeError: The result is a dictionary for a name, or none for `log_dict`.
            Exception: What ``compute`` raised.
        """
        kind = type(metric).__name__
        states = [one for _, one in _stateful(metric)] if isinstance(metric, torch.nn.Module) else []
        if states and not self._is_shared and not any(map(_is_updated, states)):
            logger.warning(f"{_call(name)} got a {kind} without any update() in this epoch; it has no value this time")
            return {}
        try:
            with torch.no_grad():
                # SYNC: once per epoch, because the user logs a metric object, which may read its state on the host.
                result = metric.compute()
        except Exception as error:
            add_note(error, f"raised by compute() of the {kind} that {_call(name)} got")
            raise
        if name is None:
            if not isinstance(result, Mapping):
                raise TypeError(
                    f"log_dict() got a {kind}, whose compute() returns {_shown(result)} and not a dictionary; call"
                    f" log(name, metric)"
                )
            return self._numbers(kind, result)
        if isinstance(result, Mapping):
            names = ", ".join(map(str, result))
            raise TypeError(
                f"{_call(name)} got a {kind}, whose compute() returns a dictionary ({names:.99}); call log_dict(metric)"
            )
        if not _is_number(result):
            raise ValueError(
                f"{_call(name)} got a {kind}, whose compute() returns {_shown(result)} and not one number; average it,"
                f" or wrap it with torchmetrics.ClasswiseWrapper and call log_dict(metric)"
            )
        return {name: result}

    def _numbers(self, kind: str, result: Mapping[Any, Any]) -> dict[str, Any]:
        """Return the entries that are single numbers; name the others in a warning."""
        others = [str(key) for key, value in result.items() if not _is_number(value)]
        if others:
            self._warn_once(
                f"log_dict() records no {', '.join(others):.200} of {kind}.compute(), which is not one number; log its"
                f" parts in on_end_val_epoch or on_end_train_epoch"
            )
        return {str(key): value for key, value in result.items() if _is_number(value)}

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning(text)

    def computed(self, logged: dict[tuple[str | None, int], MetricObject]) -> Iterator[dict[str, Any]]:
        """Compute and unregister each of ``epoch`` or ``evaluation``; `reset` resets them. Raises as `compute`."""
        metrics = list(logged.items())
        self._computed += logged.values()
        logged.clear()
        for (name, _), metric in metrics:
            yield self.compute(name, metric)

    def reset_later(self, metric: MetricObject) -> None:
        """Let the next `reset` reset this metric."""
        self._computed.append(metric)

    def reset(self) -> None:
        """Reset the metrics that were computed, now that the hooks have seen them."""
        metrics, self._computed = self._computed, []
        for metric in metrics:
            metric.reset()

    def abandon(self) -> None:
        """Reset the metrics of an evaluation that has not reached its end."""
        self._computed += self.evaluation.values()
        self.evaluation.clear()
        self.reset()

    def close(self) -> None:
        """Reset all that was logged, at the end of the run: another run may use the module."""
        self._computed += self.epoch.values()
        self.epoch.clear()
        self.abandon()

    # ------------------------------------------------------------------------------------------- checkpoints

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Undo the updates that metrics get within the block, and forget those that it logs."""
        states = _copies(self._states())
        logged = dict(self.epoch), dict(self.evaluation)
        yield
        self.epoch, self.evaluation = logged
        self.load_state_dict({"states": states})

    def hold(self) -> None:
        """Keep the state before a dataloader is evaluated: a run that resumes within it starts it again."""
        self._held = _copies(self._states())

    def release(self) -> None:
        """The dataloader is done: the state is the current one again."""
        self._held = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every metric of the module, logged or not, and the names to compute; without copies."""
        states = self._held if self._held is not None else self._states()
        paths = {id(one): path for path, one in self._module.named_modules()} if self.epoch else {}
        return {"states": states, "logged": [(name, paths[one]) for name, one in self.epoch if one in paths]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned. Metrics that had no state are reset."""
        states, modules = dict(state.get("states", {})), dict(self._module.named_modules())
        for path, metric in _stateful(self._module):
            metric.reset()
            if path in states:
                _restore(path, metric, states.pop(path))
        if states:
            logger.warning(
                f"the checkpoint has the states of the metrics {', '.join(map(str, states)):.200}, which"
                f" {type(self._module).__name__} does not have; resume with the metrics of the run"
            )
        for name, path in state.get("logged", ()):
            if is_metric(metric := modules.get(path)):
                self.epoch[name, id(metric)] = metric

    def _states(self) -> State:
        states = {}
        for path, metric in _stateful(self._module):
            names = _names(metric)
            if _is_updated(metric) or len(names) > len(_defaults(metric)) + len(_counters(metric)):
                states[path] = {name: getattr(metric, name) for name in names}
        return states


def check_single(name: str | None, metric: MetricObject) -> None:
    """Check that a metric for one name is not a collection of several. Raises TypeError."""
    if name is not None and callable(getattr(metric, "keys", None)):
        raise TypeError(
            f"{_call(name)} got a {type(metric).__name__}, which has several metrics; call log_dict(metric)"
        )


def _stateful(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The torchmetrics objects among the submodules, with their names."""
    for path, one in module.named_modules():
        if "_update_count" in vars(one) and isinstance(vars(one).get("_defaults"), dict):
            yield path, one


def _defaults(metric: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = metric._defaults
    return defaults


def _counters(metric: Any) -> list[str]:
    """Names of the counts of updates; `torchmetrics.wrappers.Running` has one of its own."""
    return [name for name, value in vars(metric).items() if name.startswith("_") and type(value) is int]


def _is_updated(metric: Any) -> bool:
    """Whether it has had an update since its last reset."""
    return any(getattr(metric, name) for name in _counters(metric))


def _names(metric: Any) -> list[str]:
    """Names of all that changes with updates: states, counts, and the tensors that `MinMaxMetric` has beside them."""
    own = [name for name, value in vars(metric).items() if isinstance(value, torch.Tensor) and name[:1] != "_"]
    return list(dict.fromkeys([*_defaults(metric), *_counters(metric), *own]))


def _copies(states: State) -> State:
    return {path: {name: _copy(value) for name, value in one.items()} for path, one in states.items()}


def _copy(value: Any) -> Any:
    """A copy that later updates do not change: they add to tensors in place, and append to lists."""
    return value.clone() if isinstance(value, torch.Tensor) else list(value) if isinstance(value, list) else value


def _restore(path: str, metric: Any, saved: Mapping[str, Any]) -> None:
    own = {name: getattr(metric, name) for name in _names(metric)}
    if own.keys() != saved.keys() or any(not _is_like(one, saved[name]) for name, one in own.items()):
        logger.warning(
            f"the checkpoint has a state for the metric {path} that does not fit its {type(metric).__name__}, which"
            f" starts empty; resume with the metrics of the run"
        )
        return
    lists_on = "cpu" if getattr(metric, "compute_on_cpu", False) else getattr(metric, "device", "cpu")
    for name, one in own.items():
        value = saved[name]
        if isinstance(one, torch.Tensor):
            value = value.to(one.device, copy=True)
        elif isinstance(one, list):
            value = [item.to(lists_on, copy=True) if isinstance(item, torch.Tensor) else item for item in value]
        setattr(metric, name, value)


def _is_like(own: Any, saved: Any) -> bool:
    if isinstance(own, torch.Tensor):
        return isinstance(saved, torch.Tensor) and saved.dtype == own.dtype and saved.dim() == own.dim()
    return type(own) is type(saved)


def _is_number(value: Any) -> bool:
    """Whether a value is one number: of Python, of NumPy, or a tensor of one element."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return hasattr(value, "__float__") and getattr(value, "shape", ()) == ()


def _call(name: str | None) -> str:
    return "log_dict()" if name is None else f"log({name!r})"


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
