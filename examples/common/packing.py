"""Arrays as bytes, exactly as they are, and back."""

from collections.abc import Iterable
from typing import Any

import numpy as np


def pack(arrays: Iterable[np.ndarray]) -> bytes:
    """The arrays' bytes, one after the other."""
    return b"".join(array.tobytes() for array in arrays)


def unpack(data: bytes | np.ndarray, like: Iterable[Any]) -> list[np.ndarray]:
    """The arrays that `pack` was given; `like` has their shapes and dtypes."""
    arrays, start = [], 0
    for one in like:
        values = np.frombuffer(data, one.dtype, one.size, start)
        arrays.append(values.reshape(one.shape))
        start += values.nbytes
    return arrays
