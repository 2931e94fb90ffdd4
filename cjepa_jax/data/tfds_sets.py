"""Opens data sets in ArrayRecord files as TFDS writes them, by their TFDS name or their folder, and TFDS' clevr."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from cjepa_jax.config import Data
from cjepa_jax.errors import UserError, one_line, require


class _Label(NamedTuple):
    """Describes labels that follow from the stored features of a record."""

    classes: tuple[str, ...]
    derive: Callable[[Any], int]  # the stored features, by their names in the file -> label, negative where unknown


_CLEVR_DISTANCES = (8.0, 8.5, 9.0, 9.5, 10.0)  # VTAB's: about as many images between any two


def _clevr_count(stored: Any) -> int:
    """Returns the class 0 to 7 for 3 to 10 objects; it is negative for the split "test", which lists none."""
    return len(stored["objects/size"].int64_list.value) - 3


def _clevr_distance(stored: Any) -> int:
    """Counts the thresholds that lie below the distance of the closest object from the camera."""
    depths = stored["objects/pixel_coords"].float_list.value[2::3]  # (x, y, depth) of each object
    return int(np.searchsorted(_CLEVR_DISTANCES, min(depths))) if depths else -1


_CLEVR = {
    "clevr_count": _Label(tuple(f"{n} objects" for n in range(3, 11)), _clevr_count),
    "clevr_distance": _Label((*(f"to {d}" for d in _CLEVR_DISTANCES), "further"), _clevr_distance),
}


class Split(NamedTuple):
    """One split of a data set."""

    length: int
    read: Callable[[int], dict[str, Any]]  # number of a record -> {"image", "label"}
    fingerprint: str
    classes: tuple[str, ...]  # () where there are no labels
    name: Callable[[int], str]  # of a record


def load(data: Data, split: str) -> Split:
    """Opens a split; with `data.source` "clevr_count" or "clevr_distance", of clevr with that label.

    Raises UserError where it does not exist or cannot be prepared.
    """
    if data.source not in _CLEVR:
        return _open(data, split, None)
    found = _open(dataclasses.replace(data, name="clevr"), split, _CLEVR[data.source])
    return found._replace(fingerprint=f"{data.source} of {found.fingerprint}")


def _open(data: Data, split: str, label: _Label | None) -> Split:
    """Opens a TFDS data set, with its own label or `label`; images stay encoded until a thread crops them."""
    builder = _builder(data)
    features = dict(sorted(builder.info.features.items()))  # TFDS' own order changes from process to process
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    require(bool(images), f"data: {builder.info.full_name} has no image, only {', '.join(features)}")
    image_key = "image" if "image" in images else images[0]
    if label is None and labels:
        key = "label" if "label" in labels else labels[0]
        label = _Label(tuple(features[key].names), lambda stored: stored[key].int64_list.value[0])
    try:
        records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        length = len(records)  # a ValueError for "train[5:3]"
    except (ValueError, NotImplementedError) as error:  # the latter for TFRecord files
        raise UserError(
            f"data: split {split!r} of {builder.info.full_name} cannot be read: {one_line(error)}"
        ) from None

    def read(index: int) -> dict[str, Any]:
        # Twenty times as fast as TFDS' own deserialising, and other features need not be understood.
        stored = tf_example_pb2.Example.FromString(records[index]).features.feature
        found = -1 if label is None else label.derive(stored)  # TFDS' unknown label is -1
        return {"image": stored[image_key].bytes_list.value[0], "label": None if found < 0 else found}

    content = {name: [info.num_examples, info.num_bytes] for name, info in builder.info.splits.items()}
    return Split(
        length,
        read,
        f"{builder.info.full_name} {split} {json.dumps(content, sort_keys=True)}",
        label.classes if label else (),
        lambda index: f"{builder.info.full_name} {split}[{index}]",
    )


def _builder(data: Data) -> Any:
    """Returns the prepared builder; prepares the data set where TFDS can do so by itself."""
    data_dir = os.path.expanduser(data.data_dir)
    if not data.name:
        require(
            (epath.Path(data_dir) / "dataset_info.json").exists(),
            f"data.name is empty, and data.data_dir = {data.data_dir!r} has no dataset_info.json: it is not a data set",
        )
        try:
            return tfds.builder_from_directory(data_dir)
        except Exception as error:  # TFDS raises many kinds for damaged descriptions
            raise UserError(f"data.data_dir = {data.data_dir!r} is damaged: {one_line(error)[:300]}") from None
    try:
        builder = tfds.builder(data.name, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise UserError(f"data.name = {data.name!r} is not a TFDS data set (tfds.list_builders() lists them)") from None
    except (ValueError, AssertionError) as error:  # a malformed name or version, or another file format
        raise UserError(
            f"data.name = {data.name!r} cannot be read as array_record in data.data_dir = {data.data_dir!r}: "
            f"{one_line(error)}"
        ) from None
    if not builder.is_prepared():
        print(f"preparing {data.name} in {builder.data_path}", file=sys.stderr, flush=True)
        try:
            builder.download_and_prepare()
        except Exception as error:  # no network, no TensorFlow, files to be placed by hand, no space, ...
            if builder.is_prepared():  # by another process, which has been faster
                return _builder(data)
            raise UserError(_how_to_prepare(builder, data, one_line(error))) from None
    return builder


def _how_to_prepare(builder: Any, data: Data, reason: str) -> str:
    arguments = f"{data.name!r}, file_format='array_record'" + (
        f", data_dir={data.data_dir!r}" if data.data_dir else ""
    )
    command = f"import tensorflow_datasets as tfds; tfds.builder({arguments}).download_and_prepare()"
    manual = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    root = os.path.dirname(os.path.dirname(str(builder.data_path)))
    where = f" First put the files into {root}/downloads/manual: {one_line(manual)}" if manual else ""
    return (
        f"{data.name} could not be prepared in {root} ({reason[:300]}).{where} Then install TensorFlow, which some "
        f'sets need, and run: python -c "{command}". Images in folders need no TensorFlow: see '
        "python -m cjepa_jax.data.prepare --help"
    )
