"""Where images come from: random access to records, each {"image", "label"}.

An image is a PIL image or the bytes of an image file; a label an int. Splits
are TFDS split expressions everywhere.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cjepa_jax.config import Data, UserError, require


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set."""

    records: Sequence[dict[str, Any]]
    fingerprint: str  # tells this split's content from any other's

    def __len__(self) -> int:
        return len(self.records)


def load(data: Data, split: str) -> Source:
    """The split of the source that `data` names.

    Raises UserError where it does not exist or has not been prepared.
    """
    source = _LOADERS[data.source](data, split)
    require(len(source) > 0, f"data: split {split!r} of {data.name or data.source} holds no images")
    return source


class _Arrays(Sequence[dict[str, Any]]):
    """Images [n, H, W] or [n, H, W, 3] uint8 in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index):
        return {"image": Image.fromarray(self._images[index]), "label": int(self._labels[index])}


def _digits(data: Data, split: str) -> Source:
    """scikit-learn's 1,797 scanned digits of 8x8 pixels; a stratified fifth of them is the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    index = _select({"train": train, "test": test}, split)
    images, labels = images[index], labels[index]
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
    return Source(_Arrays(images, labels), f"digits {split} {len(index)} {digest}")


def _select(splits: dict[str, np.ndarray], split: str) -> np.ndarray:
    """The indices that a split expression such as "train[:80%]" selects."""
    import tensorflow_datasets as tfds

    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[len(index)], num_bytes=0) for name, index in splits.items()
    }
    try:
        instructions = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError) as error:
        raise UserError(f"data: split {split!r} cannot be read: {_one_line(error)}") from None
    return np.concatenate([splits[i.splitname][i.from_ : i.to] for i in instructions])


def _tfds(data: Data, split: str) -> Source:
    """A data set that TFDS has prepared as ArrayRecord files; images stay encoded."""
    import tensorflow_datasets as tfds

    data_dir = os.path.expanduser(data.data_dir) or None
    try:
        builder = tfds.builder(data.name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise UserError(f"data.name = {data.name!r} is not a TFDS data set (tfds.list_builders() lists them)") from None
    except (ValueError, AssertionError) as error:  # a malformed name or version, or another file format
        raise UserError(
            f"data.name = {data.name!r} cannot be read as array_record in data.data_dir = {data.data_dir!r}: "
            f"{_one_line(error)}"
        ) from None
    if not builder.is_prepared():
        raise UserError(_how_to_prepare(builder, data))
    try:
        records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except ValueError as error:
        raise UserError(f"data: split {split!r} of {data.name} cannot be read: {_one_line(error)}") from None
    content = {name: [info.num_examples, info.num_bytes] for name, info in builder.info.splits.items()}
    return Source(records, f"{builder.info.full_name} {split} {json.dumps(content, sort_keys=True)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _how_to_prepare(builder: Any, data: Data) -> str:
    arguments = f"{data.name!r}, file_format='array_record'" + (
        f", data_dir={data.data_dir!r}" if data.data_dir else ""
    )
    command = f"import tensorflow_datasets as tfds; tfds.builder({arguments}).download_and_prepare()"
    manual = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    root = os.path.dirname(os.path.dirname(str(builder.data_path)))
    where = f" First, into {root}/downloads/manual: {' '.join(manual.split())}" if manual else ""
    run = f'Then, with TensorFlow installed too, which some sets need to be built: python -c "{command}"'
    return f"{data.name} is not prepared in {root}.{where} {run}"


_LOADERS: dict[str, Callable[[Data, str], Source]] = {"digits": _digits, "tfds": _tfds}
