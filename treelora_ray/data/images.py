"""Images as rows hold them: the hub's struct, encoded bytes, or an array of pixels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from treelora_ray.data.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


def decode(value: Any, where: str = "") -> Image | NDArray[np.uint8]:
    """The picture, its pixels loaded; arrays [H, W] or [H, W, C] pass through.

    `where` says which row it is, for the error. A path in the hub's struct is a name only: no file is
    opened because data says so.
    """
    if isinstance(value, np.ndarray):
        return _checked_array(value, where)
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(data, bytes | bytearray | memoryview) or not len(data):
        raise _error(where, f"has no bytes of an image but {_shown(value)}")
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # A few kilobytes can unfold to gigabytes of pixels: refused, where Pillow would warn only.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
    except Exception as error:  # Pillow's decoders raise many kinds, SyntaxError and struct.error among them
        raise _error(where, f"has an image that cannot be decoded ({error})") from error
    return image


def _checked_array(value: NDArray[Any], where: str) -> NDArray[np.uint8]:
    if value.dtype != np.uint8 or value.ndim not in (2, 3) or not value.size:
        raise _error(where, f"has an array {value.dtype}{list(value.shape)} where uint8 [H, W] or [H, W, C] is wanted")
    return value


def _shown(value: Any) -> str:
    return "none" if value is None else f"a {type(value).__name__}"


def _error(where: str, problem: str) -> DataError:
    return DataError(f"{where or 'an image'}: {problem}; mend it, or leave such rows out with on_bad_row=skip")


@contextmanager
def naming(where: Callable[[int], str], columns: Mapping[str, Sequence[Any]]) -> Iterator[None]:
    """Says of an image that cannot be decoded which row it stands in: `where` of its place among the rows."""
    try:
        yield
    except DataError:
        for place, value in enumerate(columns.get("image", ())):
            decode(value, where(place))
        raise
