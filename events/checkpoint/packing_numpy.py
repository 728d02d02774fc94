"""How `packing` writes NumPy's arrays and scalars: their dtype and their bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from events.checkpoint.tensor_file import elements_of

if TYPE_CHECKING:
    import numpy as np

_DIMENSIONS = 64  # NumPy's maximum
ARRAY, SCALAR = 50, 51
"""The codes of their marks."""
_ELEMENTS = re.compile(r"[<>|][biufcmMSUV]\d{1,10}(\[([1-9]\d{0,9})?[A-Za-z]{1,7}\])?")  # no objects, no unit of 0 days
_ITEM_BYTES = 2**31 - 1  # NumPy computes with C's ints, and wraps around without an error
_EMPTY_ITEMS = 2**16
"""Maximum elements of 0 bytes per array."""
_FIELDS = ("names", "formats", "offsets", "itemsize")


def parts_of(value: object) -> tuple[int, tuple[object, ...]] | None:
    """Return the parts of an array or a scalar; None for any other object of NumPy."""
    import numpy as np  # loaded already: it defined the type

    if type(value) is np.ndarray:
        return ARRAY, (_describe(value.dtype), value.shape, value.tobytes())
    if isinstance(value, np.str_):  # NumPy drops trailing NULs, also of bytes_
        return SCALAR, ("U", str.__str__(value))
    if isinstance(value, np.bytes_):
        return SCALAR, ("S", bytes(value))
    if isinstance(value, np.generic):
        return SCALAR, (_describe(value.dtype), value.tobytes())
    return None


def _describe(dtype: np.dtype) -> object:
    import numpy as np

    description: object = dtype.str
    if dtype.subdtype is not None:
        description = [_describe(dtype.base), list(dtype.shape)]
    if dtype.names is not None:
        by_name = cast("Mapping[str, tuple[np.dtype, int]]", dtype.fields)
        fields = [by_name[name] for name in dtype.names]
        formats, offsets = [_describe(field[0]) for field in fields], [field[1] for field in fields]
        description = dict(zip(_FIELDS, (list(dtype.names), formats, offsets, dtype.itemsize), strict=True))
    if dtype.hasobject or dtype.type is np.record or _dtype(description) != dtype:
        raise ValueError(
            f"no checkpoint keeps elements of {dtype!r}; convert them to numbers, bytes or fixed-width text"
        )
    return description


def _dtype(description: object) -> np.dtype:
    import numpy as np

    if type(description) is dict:
        names, formats, offsets, itemsize = (description[key] for key in _FIELDS)
        formats = [_dtype(field) for field in formats]
        for field, offset in zip(formats, _whole(offsets), strict=True):
            if offset + field.itemsize > itemsize:
                raise ValueError(f"a field of {field.itemsize:,} bytes at {offset:,} is outside of {itemsize:,} bytes")
        _whole([itemsize])
        return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": itemsize})
    if type(description) is list:
        base, shape = _dtype(description[0]), tuple(_whole(description[1]))
        elements_of(shape, _ITEM_BYTES // max(1, base.itemsize))
        return np.dtype((base, shape))
    if type(description) is not str or _ELEMENTS.fullmatch(description) is None:
        raise ValueError(f"{description!r} is not a dtype")
    return np.dtype(description)


def _whole(numbers: object) -> list[int]:
    """Check that this is a list of sizes within an element: a range, for example, could be endless."""
    if type(numbers) is not list or not {int}.issuperset(map(type, numbers)):
        raise TypeError(f"{numbers!r:.80} are not whole numbers in a list")
    if not all(0 <= number <= _ITEM_BYTES for number in numbers):
        raise ValueError(f"an element has dimensions, offsets and sizes from 0 to {_ITEM_BYTES:,}")
    return numbers


def array(description: object, shape: object, data: object) -> np.ndarray:
    """Create an array from its parts. Raises an error that `packing` treats as damage."""
    import numpy as np

    dtype = _dtype(description)
    if type(shape) is not tuple or not {int}.issuperset(map(type, shape)):
        raise TypeError(f"{shape!r} is not a tuple of dimensions")
    if type(data) is not bytes:
        raise TypeError(f"{data!r:.80} is not the bytes of elements")
    if len(shape) > _DIMENSIONS or not all(0 <= size < 2**63 for size in shape):
        raise ValueError(f"{len(shape)} dimensions, of up to {max(shape).bit_length()} bits, are not a shape")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"no array of {dtype} and shape {shape} has {len(data)} bytes")
    if not dtype.itemsize and math.prod(shape) > _EMPTY_ITEMS:
        raise ValueError(f"an array has more than {_EMPTY_ITEMS:,} elements of 0 bytes")
    return np.ndarray(shape, dtype, buffer=bytearray(data))  # NumPy's copy() does not copy the padding


def scalar(description: object, content: object) -> object:
    """Create a scalar from its parts. Raises as `array` does."""
    import numpy as np

    if description == "S" and type(content) is bytes:
        return np.bytes_(content)
    if description == "U" and type(content) is str:
        return np.str_(content)
    try:
        return array(description, (), content)[()]
    except SystemError as error:  # NumPy's for text with a number that is not a character
        raise ValueError(f"{description!r:.80} does not fit its bytes") from error
