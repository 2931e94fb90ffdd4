"""Pictures of test images beside the training images that are nearest to them in the features.

Shapes: m test images, n training images, k neighbours.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int

from cjepa_jax import plots
from cjepa_jax.data import pipeline
from cjepa_jax.data.sources import Source
from cjepa_jax.errors import require
from cjepa_jax.evaluate.base import ERROR, Evaluator, Rows
from cjepa_jax.evaluate.frozen import Frozen
from cjepa_jax.evaluate.knn import search
from cjepa_jax.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbours(Evaluator):
    """Shows test images beside their nearest training images, and tells how many of these are of the same class."""

    images: int = setting(8, "Test images that are drawn, evenly spread.", within="[1, 100]")
    nearest: int = setting(8, "Nearest training images of each, k.", within="[1, 100]")
    sample: int = setting(
        10_000, "Images of each split, at most: a random sample, among which neighbours are sought.", within="[1, 1e9]"
    )

    name: ClassVar[str] = "neighbours"
    needs_labels: ClassVar[bool] = False
    in_training: ClassVar[bool] = False
    numbers: ClassVar[tuple[str, ...]] = ("cosine of neighbours",)
    pictures: ClassVar[tuple[str, ...]] = ("neighbours.png",)

    def check(self, frozen: Frozen) -> None:
        """Raises UserError where there is no training image to compare with."""
        require(
            len(frozen.train.source) > _same_images(frozen),
            f"data.train_split = {frozen.data.train_split!r} has one image, which data.test_split has, too",
        )

    def run(self, frozen: Frozen, stem: epath.Path | None) -> Rows:
        """Draws STEM.neighbours.png, of the judged encoder.

        The rows of the result hold the mean cosine of the neighbours of all test images in the sample; where there are
        labels, which share of the neighbours is of the same class; and what the picture shows. No image is a neighbour
        of itself where both splits are the same images.
        """
        train, bank = frozen.sample(frozen.train, self.sample)
        test, queries = frozen.sample(frozen.test, self.sample)
        same = _same_images(frozen)
        count = min(self.nearest, len(train) - same)
        drawn = np.unique(np.linspace(0, len(test) - 1, min(self.images, len(test))).round().astype(int))
        rows: Rows = {}
        for name in frozen.params:
            found = search(queries[name].features, bank[name].features, k=count + same, mesh=frozen.mesh)
            parts = jax.device_get(list(found))
            cosine, near = (np.concatenate(part)[: len(test)] for part in zip(*parts, strict=True))
            if same:  # then both samples are the same
                cosine, near = without(near == np.arange(len(test))[:, None], cosine, near)
            rows[name] = {"cosine of neighbours": float(cosine.mean())}
            classes, other = (
                class_names(reader.source, labels)
                for reader, labels in ((frozen.test, queries[name].labels), (frozen.train, bank[name].labels))
            )
            if "" not in {*classes, *other}:
                shares = (other[near] == classes[:, None]).mean(axis=1)
                rows[name]["same class"] = float(shares.mean())
                error = float(np.std(shares, ddof=1) / len(shares) ** 0.5) if len(shares) > 1 else 0.0
                rows[name][ERROR] = {"same class": error}
            rows[name]["shown"] = [
                _entry(frozen.test.source, test[i], classes[i])
                | {
                    "neighbours": [
                        _entry(frozen.train.source, train[j], other[j]) | {"cosine": float(c)}
                        for c, j in zip(cosine[i], near[i], strict=True)
                    ]
                }
                for i in drawn
            ]
            if name == frozen.judged and stem is not None and jax.process_index() == 0:
                self._draw(frozen, stem, rows[name]["shown"], test[drawn], train[near[drawn]])
        return rows

    def _draw(
        self,
        frozen: Frozen,
        stem: epath.Path,
        shown: Sequence[dict[str, Any]],
        test: Int[np.ndarray, " m"],
        train: Int[np.ndarray, "m k"],
    ) -> None:
        assert frozen.origin
        see, see_train = (
            pipeline.central_view(reader, crop_fraction=frozen.crop_fraction) for reader in (frozen.test, frozen.train)
        )
        panels = []
        for entry, index, others in zip(shown, test, train, strict=True):
            row = [plots.Panel(see(int(index))[0], entry["class"])]
            for other, number in zip(entry["neighbours"], others, strict=True):
                agree = None if "" in (entry["class"], other["class"]) else entry["class"] == other["class"]
                lines = [other["class"], f"{other['cosine']:.3f}"]
                row.append(plots.Panel(see_train(int(number))[0], "\n".join(filter(None, lines)), agree))
            panels.append(row)
        workdir, encoder, networks = frozen.origin
        title = (
            f"Test images, and the training images nearest by cosine: {workdir.name}, step {networks.step}, {encoder}"
        )
        if any(panel.agrees is not None for row in panels for panel in row):
            title += "\ngreen frame: of the same class; orange: of another one"
        plots.panels(panels, stem.with_name(f"{stem.name}.neighbours.png"), title=title)


def _same_images(frozen: Frozen) -> bool:
    return frozen.train.source.fingerprint == frozen.test.source.fingerprint


def class_names(source: Source, labels: Int[np.ndarray, " n"]) -> np.ndarray:
    """Gives the names of the images' classes; "" for an image without a label."""
    return np.array([source.classes[label] if label >= 0 and source.classes else "" for label in labels], object)


def without(
    left_out: np.ndarray, cosine: Float[np.ndarray, "m k"], near: Int[np.ndarray, "m k"]
) -> tuple[Float[np.ndarray, "m k-1"], Int[np.ndarray, "m k-1"]]:
    """Leaves out a neighbour of each image: the one marked in `left_out`, or, where none is, the farthest."""
    order = np.argsort(left_out, axis=1, kind="stable")[:, :-1]
    return np.take_along_axis(cosine, order, axis=1), np.take_along_axis(near, order, axis=1)


def _entry(source: Source, index: int, name: str) -> dict[str, Any]:
    return {"image": source.name(int(index)), "class": name}
