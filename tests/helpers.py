"""What several files of tests read, compare and encode."""

import io
import json
import pathlib
from typing import Any

import jax
import numpy as np
from PIL import Image


def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def same(a, b) -> None:
    """Asserts that two trees have the same arrays, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def encoded(image: Image.Image, form: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()
