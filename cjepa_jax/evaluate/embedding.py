"""Features of many images, and the files that hold them.

Shapes: n images, N patches, D width.
"""

import io
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath

from cjepa_jax.config import Mesh
from cjepa_jax.data import pipeline
from cjepa_jax.errors import require
from cjepa_jax.evaluate.features import Extractor, mean_features, patch_features
from cjepa_jax.files import printable, read_json, write_whole
from cjepa_jax.pretrained import Pretrained
from cjepa_jax.train import sharding


class Embedder:
    """Computes features of a source's images by one frozen encoder, on all devices."""

    def __init__(self, networks: Pretrained, reader: pipeline.Reader, *, crop_fraction: float, patches: bool):
        """Takes the only network in `networks`; `patches` asks for each patch's features and not for their mean.

        Raises UserError where the patches do not divide the images.
        """
        (params,), data, trained = networks.params.values(), reader.data, networks.image_shape
        if patches:
            apply = patch_features(
                networks.model, image_shape=data.image_shape, trained_shape=trained, mean=data.mean, std=data.std
            )
        else:
            apply = mean_features(networks.model, data, trained_shape=trained)
        mesh = sharding.make_mesh(Mesh(fsdp=1, parameters="replicated"))
        self._extractor = Extractor({"": apply}, mesh, batch_size=data.batch_size)
        self._params = {"": jax.device_put(params, sharding.replicated(mesh))}
        self._view = pipeline.central_view(reader, crop_fraction=crop_fraction)
        self._reader, self._patches = reader, patches

    def embed(self, indices: Sequence[int], *, done: int = 0) -> dict[str, np.ndarray]:
        """Computes `features` [n, D] or [n, N, D] float32 of the images at `indices` that can be read.

        `names` [n] says where each comes from; where the source has classes, `labels` [n] int32, -1 where unknown, and
        `classes` give them. On a terminal a bar shows how far it is; `done` images came before.
        """
        features, labels, source = [], [], self._reader.source
        with tqdm.tqdm(total=len(source), initial=done, unit=" images", disable=not sys.stderr.isatty()) as bar:
            for found, read in self._extractor.batches(self._params, self._reader, indices, self._view):
                values, read = sharding.fetch((found[""], read))
                features.append(values if self._patches else values[:, 0])
                labels.append(read)
                bar.update(min(len(read), done + len(indices) - bar.n))
        together = np.concatenate(labels)[: len(indices)]
        kept = together != pipeline.NO_IMAGE
        names = [source.name(index) for index, keep in zip(indices, kept, strict=True) if keep]
        arrays = {"features": np.concatenate(features)[: len(indices)][kept], "names": np.array(names, np.str_)}
        if source.classes:
            arrays |= {"labels": together[kept], "classes": np.array(source.classes)}
        return arrays


def begin_folder(output: epath.Path, about: Mapping[str, Any]) -> None:
    """Makes a folder for files of features, and says in about.json what they are.

    Raises UserError where the folder holds anything else.
    """
    output.mkdir(exist_ok=True)
    file = output / "about.json"
    if not file.exists():
        holds = output.is_dir() and any(output.iterdir())  # a bucket has no empty folders
        require(not holds, f"--output {output} holds other files; name another folder")
        write_whole(file, json.dumps(about, indent=1) + "\n")
        return
    found = read_json(file)
    other = [key for key in about if found.get(key, about[key]) != about[key]]  # older files have fewer keys
    require(not other, f"--output {output} holds other features: {', '.join(other)} differ; name another folder")


def write(file: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes what `Embedder.embed` gives as .npz, or as .parquet with a row an image; never seen half written."""
    buffer = io.BytesIO()
    if file.suffix == ".npz":
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
    else:
        import pyarrow
        import pyarrow.parquet

        flat = arrays["features"].reshape(len(arrays["names"]), -1)
        columns: dict[str, Any] = {"name": [*map(printable, arrays["names"])], "features": list(flat)}
        if "labels" in arrays:
            names = [*map(printable, arrays["classes"]), None]  # the last is that of -1
            columns |= {"label": arrays["labels"], "class": [names[label] for label in arrays["labels"]]}
        pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    write_whole(file, buffer.getvalue())
