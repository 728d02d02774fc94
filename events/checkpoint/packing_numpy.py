"""How `packing` writes NumPy's arrays and scalars: their dtype and their bytes."""

from __future__ import annotations

import math
import re
from typing import Any

from events.checkpoint.tensor_file import elements_of

_DIMENSIONS = 64  # NumPy's maximum
ARRAY, SCALAR = 50, 51
"""The codes of their marks."""
_ELEMENTS = re.compile(r"[<>|][biufcmMSUV]\d{1,10}(\[([1-9]\d{0,9})?[A-Za-z]{1,7}\])?")  # no objects, no unit of 0 days
_ITEM_BYTES = 2**31 - 1  # NumPy computes with C's ints, and wraps around without an error
_EMPTY_ITEMS = 2**16
"""Maximum elements of 0 bytes per array."""


def parts_of(value: Any) -> tuple[int, Any] | None:
    """Return the parts of an array or a scalar; None for any other object of NumPy."""
    import numpy as np  # loaded already: it defined the type

    if type(value) is np.ndarray:
        return ARRAY, (_describe(value.dtype), value.shape, value.tobytes())
    if not isinstance(value, np.generic):
        return None
    if isinstance(value, np.str_):  # NumPy drops trailing NULs, also of bytes_
        return SCALAR, ("U", str.__str__(value))
    if isinstance(value, np.bytes_):
        return SCALAR, ("S", bytes(value))
    return SCALAR, (_describe(value.dtype), value.tobytes())


def _describe(dtype: Any) -> Any:
    import numpy as np

    description: Any = dtype.str
    if dtype.subdtype is not None:
        description = [_describe(dtype.base), list(dtype.shape)]
    if dtype.names is not None:
        fields = [dtype.fields[name] for name in dtype.names]
        description = {
            "names": list(dtype.names),
            "formats": [_describe(field[0]) for field in fields],
            "offsets": [field[1] for field in fields],
            "itemsize": dtype.itemsize,
        }
    if dtype.hasobject or dtype.type is np.record or _dtype(description) != dtype:
        raise ValueError(
            f"no checkpoint keeps elements of {dtype!r}; convert them to numbers, bytes or fixed-width text"
        )
    return description


def _dtype(description: Any) -> Any:
    import numpy as np

    if type(description) is dict:
        names, formats, offsets, itemsize = (description[key] for key in ("names", "formats", "offsets", "itemsize"))
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
    if _ELEMENTS.fullmatch(description) is None:
        raise ValueError(f"{description!r} is not a dtype")
    return np.dtype(description)


def _whole(numbers: Any) -> list[int]:
    """Check that this is a list of sizes within an element: a range, for example, could be endless."""
    if type(numbers) is not list or not {int}.issuperset(map(type, numbers)):
        raise TypeError(f"{numbers!r:.80} are not whole numbers in a list")
    if not all(0 <= number <= _ITEM_BYTES for number in numbers):
        raise ValueError(f"an element has dimensions, offsets and sizes from 0 to {_ITEM_BYTES:,}")
    return numbers


def array(description: Any, shape: tuple[int, ...], data: bytes) -> Any:
    """Create an array from its parts. Raises an error that `packing` treats as damage."""
    import numpy as np

    dtype = _dtype(description)
    if type(shape) is not tuple or not {int}.issuperset(map(type, shape)):
        raise TypeError(f"{shape!r} is not a tuple of dimensions")
    if len(shape) > _DIMENSIONS or not all(0 <= size < 2**63 for size in shape):
        raise ValueError(f"{len(shape)} dimensions, of up to {max(shape).bit_length()} bits, are not a shape")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"no array of {dtype} and shape {shape} has {len(data)} bytes")
    if not dtype.itemsize and math.prod(shape) > _EMPTY_ITEMS:
        raise ValueError(f"an array has more than {_EMPTY_ITEMS:,} elements of 0 bytes")
    return np.ndarray(shape, dtype, buffer=bytearray(data))  # NumPy's copy() does not copy the padding


def scalar(description: Any, content: Any) -> Any:
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
