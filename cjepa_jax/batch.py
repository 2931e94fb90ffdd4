"""One training batch, as the pipeline gives it and a method takes it."""

from typing import Any, NamedTuple

NO_LABEL = -1  # in the place of the label that an image does not have


class Batch(NamedTuple):
    """Arrays, or shapes of arrays, whose first axis is the image.

    images: [B, H, W, C] uint8, or [B, V, H, W, C] where a method asks for V > 1 views of an image.
    labels: [B] int32, NO_LABEL where an image has none.
    """

    images: Any
    labels: Any
