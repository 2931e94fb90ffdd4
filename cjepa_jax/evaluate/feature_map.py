"""Maps of features in two dimensions: principal components, and t-SNE."""

import dataclasses
from typing import ClassVar

import jax
import numpy as np
from etils import epath
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from cjepa_jax import plots
from cjepa_jax.errors import require
from cjepa_jax.evaluate.base import Evaluator, Rows
from cjepa_jax.evaluate.frozen import Frozen
from cjepa_jax.evaluate.neighbours import class_names
from cjepa_jax.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureMap(Evaluator):
    """Draws the features of test images as points in the plane, by PCA and by t-SNE."""

    images: int = setting(1000, "Images of the test split, at most: a random sample.", within="[4, 20000]")
    perplexity: float = setting(
        30.0, "Of t-SNE: about how many neighbours count; a third of the images at most.", within="[1, 1000]"
    )

    name: ClassVar[str] = "map"
    needs_labels: ClassVar[bool] = False
    in_training: ClassVar[bool] = False
    pictures: ClassVar[tuple[str, ...]] = ("map.png",)

    def check(self, frozen: Frozen) -> None:
        """Raises UserError where there are fewer than four test images."""
        images = len(frozen.test.source)
        require(images >= 4, f"data.test_split = {frozen.data.test_split!r}: a map needs 4 images, there are {images}")

    def run(self, frozen: Frozen, stem: epath.Path | None) -> Rows:
        """Draws STEM.map.png: a column an encoder, PCA above t-SNE, a colour for each class where there are labels.

        The rows of the result hold the share of the variance that two principal components have. Raises UserError
        for features that are not numbers.
        """
        _, features = frozen.sample(frozen.test, self.images)
        labels = features[frozen.judged].labels
        rows: Rows = {}
        maps: dict[str, dict[str, np.ndarray]] = {"PCA": {}, "t-SNE": {}}
        with frozen.progress("maps", total=len(frozen.params), unit="encoders") as bar:
            for name in frozen.params:
                values = features[name].features
                require(bool(np.isfinite(values).all()), f"the features of {name} hold values that are not numbers")
                points, share = principal(values)
                rows[name] = {"variance of two components": share}
                maps["PCA"][f"{name}\n{100 * share:.0f} % of the variance"] = points
                maps["t-SNE"][name] = embedded(values, perplexity=self.perplexity, seed=frozen.seed)
                bar.update()
        if stem is not None and jax.process_index() == 0:
            assert frozen.origin
            workdir, encoder, networks = frozen.origin
            title = f"Features of {len(labels)} test images: {workdir.name}, step {networks.step}, {encoder}"
            names = class_names(frozen.test.source, labels)
            plots.maps(maps, names, stem.with_name(f"{stem.name}.map.png"), title=title)
        return rows


def principal(features: Float[np.ndarray, "n D"]) -> tuple[Float[np.ndarray, "n 2"], float]:
    """Gives the first two principal components, and their share of the variance; 0 where all features are the same."""
    from sklearn.decomposition import PCA  # here, because it takes a second

    if not np.ptp(features, axis=0).any():
        return np.zeros((len(features), 2), features.dtype), 0.0
    pca = PCA(2, svd_solver="full")
    points = pca.fit_transform(features)
    return points, float(pca.explained_variance_ratio_.sum())


def embedded(features: Float[np.ndarray, "n D"], *, perplexity: float, seed: int) -> Float[np.ndarray, "n 2"]:
    """Embeds features by t-SNE, which starts from their principal components; all zeros where they are the same.

    The perplexity is a third of n - 1 at most. It runs in one thread: with several, the sums and so the map depend on
    their number.
    """
    from sklearn.manifold import TSNE

    if not np.ptp(features, axis=0).any():
        return np.zeros((len(features), 2), features.dtype)
    with threadpool_limits(1):
        tsne = TSNE(perplexity=min(perplexity, (len(features) - 1) / 3), init="pca", random_state=seed)
        return tsne.fit_transform(features)
