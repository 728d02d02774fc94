"""Exceptions as text of bounded length: in one line, or with the frames that led there."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable
from types import FrameType, TracebackType

from events.masking import masked
from events.text import plain_lines

_OURS = tuple(
    os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), name)
    for name in ("trainer", "events", "sinks")
)
_TORCH_CALL = os.path.join("torch", "nn", "modules", "module.py")
_LINE_CHARS = 1_000
_TEXT_CHARS = 4_000
"""Most characters of one exception's own text in a traceback."""
_FRAMES_FIRST, _FRAMES_LAST = 6, 30
"""Frames of one exception that are kept, from either end: where it was called from, and where it was raised."""
_CHARS = 16_000
"""Most characters of a traceback with all its causes."""
_MOST_CAUSES = 50
"""Maximum exceptions in a chain that are copied."""


def describe(error: BaseException) -> str:
    """An exception in one line of at most a thousand characters: its type and its text."""
    try:
        text = " ".join(masked(str(error)).split())
    except Exception as broken:  # the exception is the user's
        text = f"its text cannot be had, {type(broken).__name__}"
    text = text if len(text) <= _LINE_CHARS else f"{text[:_LINE_CHARS]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def format_traceback(error: BaseException) -> str:
    """Format an exception as Python prints it, causes and notes included, in at most 16,000 characters.

    It begins with the user's first frame, if there is one: the frames of this library before it are left out. Deep
    stacks lose their middle, so that the frames where each exception was raised stay. Never raises: an exception whose
    text cannot be had is named by its type.
    """
    try:
        told = traceback.TracebackException.from_exception(error, compact=True)
        for one in _chain(told):
            _drop_ours(one.stack)
            if isinstance(one.__notes__, list):  # masked as a whole: they are formatted line by line
                one.__notes__ = [masked(str(note)) for note in one.__notes__]
            if len(one.stack) > _FRAMES_FIRST + _FRAMES_LAST:
                one.stack = traceback.StackSummary.from_list(
                    [*one.stack[:_FRAMES_FIRST], _gap(len(one.stack)), *one.stack[-_FRAMES_LAST:]]
                )
        lines = [_cut(plain_lines(masked(line)), _TEXT_CHARS, 3 * _TEXT_CHARS // 4) for line in told.format()]
        return _cut("".join(lines).rstrip(), _CHARS, _CHARS // 4)
    except Exception as broken:  # formatting a stranger's exception must not hide it
        return f"{describe(error)}\n(its traceback cannot be had: {type(broken).__name__})"


def _drop_ours(stack: traceback.StackSummary) -> None:
    """Drop the frames on the way into the user's code: this library's own, and of torch's call of a module."""
    first = next((number for number, frame in enumerate(stack) if not is_ours(frame.filename)), len(stack))
    if first < len(stack):
        stack[:] = [frame for frame in stack[first:] if not frame.filename.endswith(_TORCH_CALL)]


def is_ours(path: str) -> bool:
    """Whether a source file is of this library, or the one of torch's through which it calls a module."""
    folder = os.path.dirname(path)
    return path.endswith(_TORCH_CALL) or (folder.startswith(_OURS) and not folder.endswith("examples"))


def drop_own_frames(error: BaseException) -> None:
    """Remove this library's frames from the tracebacks of an exception and of its causes, for a notebook's output.

    Frames through which the exception is raised further are added later: they have ``__tracebackhide__``, by which
    IPython and pytest skip them.
    """
    for one in chain_of(error):
        kept = [frame for frame in _frames_of(one) if not is_ours(frame.tb_frame.f_code.co_filename)]
        for frame, following in zip(kept, [*kept[1:], None], strict=True):
            frame.tb_next = following
        one.__traceback__ = kept[0] if kept else None


def _frames_of(error: BaseException) -> Iterable[TracebackType]:
    frame = error.__traceback__
    while frame is not None:
        following = frame.tb_next
        yield frame
        frame = following


def format_stack(frame: FrameType) -> str:
    """Format where a thread is, its newest call last, bounded as `format_traceback`."""
    frames = traceback.extract_stack(frame)
    if len(frames) > _FRAMES_FIRST + _FRAMES_LAST:
        frames = traceback.StackSummary.from_list([*frames[:_FRAMES_FIRST], _gap(len(frames)), *frames[-_FRAMES_LAST:]])
    return _cut("".join(frames.format()).rstrip(), _CHARS, _CHARS // 4)


def _chain(told: traceback.TracebackException) -> Iterable[traceback.TracebackException]:
    """An exception, those behind it, and those within a group."""
    ahead, seen = [told], set()
    while ahead:
        one = ahead.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            ahead += [other for other in (one.__cause__, one.__context__, *(one.exceptions or ())) if other is not None]


def chain_of(error: BaseException) -> Iterable[BaseException]:
    """An exception, those behind it, and those within a group; each once."""
    ahead, seen = [error], set()
    while ahead:
        one = ahead.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            within = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
            ahead += [other for other in (one.__cause__, one.__context__, *within) if other is not None]


def without_controls(error: BaseException) -> BaseException:
    """Return an exception whose texts, and those of its causes and notes, may be shown in a terminal.

    It is the exception itself where they may be already. Otherwise it is a copy whose type has the same name: its
    texts keep their line breaks, have no other control characters and no marks of text direction, and their URLs
    have no secrets. Never raises.
    """
    try:
        return error if all(map(_is_clean, chain_of(error))) else _copy(error, {}, 0) or error
    except Exception:  # the exception is the user's
        return Exception(describe(error)).with_traceback(error.__traceback__)


def _is_clean(error: BaseException) -> bool:
    return all(_clean(text) == text for text in _texts_of(error))


def _clean(text: str) -> str:
    return plain_lines(masked(text))


def _texts_of(error: BaseException) -> list[str]:
    """The texts of an exception that a traceback shows: its own, and its notes."""
    text = error.message if isinstance(error, BaseExceptionGroup) else str(error)
    return [text, *map(str, getattr(error, "__notes__", None) or ())]


def _copy(error: BaseException | None, copies: dict[int, BaseException | None], depth: int) -> BaseException | None:
    """Copy an exception with clean texts; None for one that is too deep, or among its own causes."""
    if error is None or depth > _MOST_CAUSES:
        return None
    if id(error) in copies:
        return copies[id(error)]
    copies[id(error)] = None
    kind, (text, *notes) = type(error), map(_clean, _texts_of(error))
    named: dict[str, object] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    within = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    copied = [found for one in within if (found := _copy(one, copies, depth + 1)) is not None]
    copy: BaseException
    if copied:
        copy = type(kind.__name__, (BaseExceptionGroup,), named)(text, copied)
    else:
        copy = type(kind.__name__, (Exception,), named)(text)
    copies[id(error)] = copy
    copy.__traceback__ = error.__traceback__
    copy.__cause__ = _copy(error.__cause__, copies, depth + 1)
    copy.__context__ = _copy(error.__context__, copies, depth + 1)
    copy.__suppress_context__ = error.__suppress_context__
    for note in notes:
        copy.add_note(note)
    return copy


def _gap(frames: int) -> traceback.FrameSummary:
    skipped = frames - _FRAMES_FIRST - _FRAMES_LAST
    return traceback.FrameSummary("...", 0, f"({skipped:,} frames not shown)", lookup_line=False, line="")


def _cut(text: str, limit: int, first: int) -> str:
    """The text, or its two ends with the number of characters between them."""
    if len(text) <= limit:
        return text
    last = limit - first
    return f"{text[:first]}\n... {len(text) - limit:,} characters not shown ...\n{text[-last:]}"
