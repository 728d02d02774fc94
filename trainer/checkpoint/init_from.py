"""The argument ``init_from``: which weights a new run starts from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import ClassVar

import msgspec

from events.strict import Strict


class InitFrom(Strict, frozen=True):
    """The weights that a new run starts from; ``init_from="path"`` is short for ``init_from=InitFrom("path")``::

        InitFrom("runs/pretrained", strict=False, rename={"encoder.": "backbone."})

    Raises:
        ValueError: A field has a wrong type.
    """

    argument_aliases: ClassVar[Mapping[str, str]] = {
        "ignore_mismatched_sizes": "use strict=False",
        "prefix": "use rename={'': 'prefix.'}, or rename={'prefix.': ''}",
        "mapping": "rename",
    }

    path: str
    """A checkpoint, a run folder (its newest checkpoint), a safetensors file, a folder with ``model.safetensors`` or
    ``model.safetensors.index.json``; or the address (s3://, gs://, az://, file://) of a checkpoint, of a run or of a
    safetensors file, which may also be at https://."""
    strict: bool = True
    """Whether every tensor must fit. False takes those with the name and shape of one in the module, and warns about
    the others by name."""
    rename: dict[str, str] = msgspec.field(default_factory=dict)
    """Prefixes of names in the module, by the prefixes that they have in the source. The longest match counts; an empty
    one matches every name."""

    def __post_init__(self) -> None:
        if isinstance(self.path, os.PathLike):
            msgspec.structs.force_setattr(self, "path", os.fspath(self.path))
        # A Struct's constructor does not validate; only decoding does.
        for field in msgspec.structs.fields(type(self)):
            value = getattr(self, field.name)
            try:
                msgspec.convert(value, field.type)
            except msgspec.ValidationError as error:
                raise ValueError(f"InitFrom({field.name}={value!r:.80}): {error}") from None
        if not self.path:
            raise ValueError("InitFrom(path=''): the path is empty; name the weights")
