"""Check that a user's method accepts the trainer's arguments, without calling it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType

from trainer.errors import SignatureError

_FIXED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def signature_of(method: Callable[..., object]) -> inspect.Signature | None:
    """The signature of a bound method; None if it accepts no ``self``, or unknown, as for some functions in C."""
    try:
        return inspect.signature(method)
    except (TypeError, ValueError):
        return None


def signature_problem(owner: str, name: str, method: object, contract: Callable[..., object]) -> str | None:
    """Describe why a method cannot be called as in the contract; None if it can.

    Args:
        owner: The class, for the message.
        name: The method's name.
        method: The object's attribute, bound.
        contract: The declaring function, with ``self``.
    """
    expected = inspect.signature(contract)
    should = f"define it as {name}{_shown(expected)}"
    if not callable(method):
        return f"{owner}.{name} is {method!r:.80}, not a method; {should}"
    if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
        return f"{owner}.{name} is async, but the trainer calls it on a thread; make it a plain function"
    if name.startswith("on_") and inspect.isgeneratorfunction(method):
        return f"{owner}.{name} is a generator, whose body would never run; make it a function without yield"
    signature = signature_of(method)
    if signature is None:
        takes_nothing = isinstance(getattr(method, "__func__", None), FunctionType)  # of a bound method
        return f"{owner}.{name}() takes no argument, not even self; {should}" if takes_nothing else None
    parameters = list(expected.parameters.values())[1:]
    given = [None for one in parameters if one.kind in _FIXED and one.default is one.empty]
    named = {one.name: None for one in parameters if one.kind is one.KEYWORD_ONLY}
    fixed = [one.name for one in parameters[: len(given)]]
    if any(one.kind is one.VAR_POSITIONAL for one in parameters):
        # The number of outputs is only known once a step has returned them.
        least = _least_outputs(signature, len(given), named)
        takes_any = any(one.kind is one.VAR_POSITIONAL for one in signature.parameters.values())
        given += [None] * max(least, takes_any)
    if can_take(signature, given, named):
        places = [one.name for one in signature.parameters.values() if one.kind in _FIXED]
        if all(places.index(one) == place for place, one in enumerate(fixed) if one in places):
            return None
        return f"{owner}.{name}{_with_self(signature)} takes its arguments in another order; {should}"
    return f"{owner}.{name}{_with_self(signature)} cannot take the trainer's arguments; {should}"


def takes_outputs(hook: Callable[..., object]) -> bool:
    """Whether a hook accepts any outputs after its first argument, ``global_step``."""
    signature = signature_of(hook)
    if signature is None:
        return True
    kinds = [one.kind for one in signature.parameters.values() if one.name != "key"]
    return inspect.Parameter.VAR_POSITIONAL in kinds or sum(kind in _FIXED for kind in kinds) > 1


def requires_outputs(hook: Callable[..., object]) -> bool:
    """Whether a hook cannot be called with its first argument, ``global_step``, alone."""
    signature = signature_of(hook)
    return signature is not None and not can_take(signature, [None], {})


def can_take(signature: inspect.Signature, given: Sequence[object], named: Mapping[str, object]) -> bool:
    """Whether these arguments can be bound."""
    try:
        signature.bind(*given, **named)
    except TypeError:
        return False
    return True


def clear_error(
    error: Exception,
    owner: str,
    name: str,
    hook: Callable[..., object],
    given: Sequence[object],
    named: Mapping[str, object],
) -> Exception:
    """Return a SignatureError if the call itself failed on the number of outputs, else the hook's own error."""
    trace = error.__traceback__
    if type(error) is not TypeError or trace is None or trace.tb_next is not None:
        return error  # raised in the hook
    signature = signature_of(hook)
    if signature is None or can_take(signature, given, named):
        return error
    count = len(given) - 1
    outputs = "1 output" if count == 1 else f"{count} outputs"
    return SignatureError(
        f"{owner}.{name}{_with_self(signature)} cannot take the {outputs} of the step; let it take *outputs"
    )


def _least_outputs(signature: inspect.Signature, fixed: int, named: Mapping[str, object]) -> int:
    required = [
        one
        for one in signature.parameters.values()
        if one.kind in _FIXED and one.default is one.empty and one.name not in named
    ]
    return max(0, len(required) - fixed)


def _with_self(signature: inspect.Signature) -> str:
    """The signature of a bound method as in its definition."""
    rest = _shown(signature).removeprefix("(")
    return f"(self, {rest}" if rest != ")" else "(self)"


def _shown(signature: inspect.Signature) -> str:
    bare = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty)).replace("'", '"')
