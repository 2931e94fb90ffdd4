"""How spread out features are, with no labels; std, rank and cosine of a batch are in train/diagnostics.py.

Shapes: n images, Q views of each, D features.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from cjepa_jax import plots
from cjepa_jax.data import pipeline
from cjepa_jax.errors import require
from cjepa_jax.evaluate.base import Evaluator, Rows
from cjepa_jax.evaluate.frozen import Frozen
from cjepa_jax.evaluate.sets import unit
from cjepa_jax.settings import setting
from cjepa_jax.train import writer
from cjepa_jax.train.diagnostics import Watch, diagnose

LIDAR_DELTA = 1e-4  # of the paper: added to the covariance within objects


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collapse(Evaluator):
    """Computes statistics of central crops, and of random views of some of these images; labels play no part."""

    images: int = setting(
        10_000, "Images of the training split, for std, rank, spectrum and uniformity.", within="[2, 1e9]"
    )
    objects: int = setting(1000, "Images whose views LiDAR and alignment compare.", within="[2, 1e6]")
    views: int = setting(10, "Views of each.", within="[2, 1000]")

    name: ClassVar[str] = "collapse"
    needs_labels: ClassVar[bool] = False
    numbers: ClassVar[tuple[str, ...]] = ("std", "rank", "cosine", "alignment", "uniformity", "LiDAR")

    def check(self, frozen: Frozen) -> None:
        """Raises UserError where there are fewer training images than objects."""
        images = len(frozen.train.source)
        require(
            self.objects <= images,
            f"collapse.objects = {self.objects} is more than the {images} training images; lower it",
        )

    def run(self, frozen: Frozen, stem: epath.Path | None) -> Rows:
        """Gives the statistics; draws the spectrum; says when metrics.jsonl should have warned."""
        reader = frozen.train
        order = np.random.default_rng(frozen.seed).permutation(len(reader.source))
        view = pipeline.central_view(reader, crop_fraction=frozen.crop_fraction)
        central = frozen.extractor.split(frozen.params, reader, np.sort(order[: self.images]).tolist(), view)
        objects = np.sort(order[: self.objects]).tolist()
        drawn = [
            frozen.extractor.split(
                frozen.params, reader, objects, pipeline.random_view(reader, seed=(frozen.seed, number))
            )
            for number in range(self.views)
        ]
        spectra: dict[str, np.ndarray] = {}
        rows: Rows = {}
        for name in frozen.params:
            features = jnp.asarray(central[name].last(1).features)
            views = jnp.stack([found[name].last(1).features for found in drawn], axis=1)
            spectra[name] = jax.device_get(spectrum(features))
            rows[name] = {key.removeprefix("rep/"): float(value) for key, value in diagnose(features).items()}
            rows[name] |= {
                "alignment": float(alignment(views)),
                "uniformity": float(uniformity(features)),
                "LiDAR": float(lidar(views)),
                "spectrum": spectra[name].tolist(),
            }
        if frozen.origin:
            rows[frozen.judged]["training"] = first_alarms(writer.read(frozen.origin.workdir))
        if stem is not None:
            plots.spectra(spectra, stem.with_name(f"{stem.name}.collapse.png"))
        return rows


@jax.jit
def spectrum(features: jax.Array) -> jax.Array:
    """Computes the standard deviations along the principal axes of [n, D], largest first, [min(n, D)]."""
    centred = features - features.mean(axis=0, keepdims=True)
    return jnp.linalg.svd(centred, compute_uv=False) / jnp.sqrt(jnp.float32(len(features)))


@jax.jit
def alignment(views: jax.Array) -> jax.Array:
    """Computes the mean squared distance between two views of an image on the unit sphere.

    Views are [n, Q, D], and the mean is over all pairs of an image; 0 is best.

    Wang and Isola 2020 (arXiv 2005.10242), with alpha = 2.
    """
    on_sphere = unit(views)
    count = views.shape[1]
    # The mean over ordered pairs of |x - y|^2 is 2 Q / (Q - 1) times the mean squared distance from the centre.
    centred = on_sphere - on_sphere.mean(axis=1, keepdims=True)
    return 2 * count / (count - 1) * jnp.square(centred).sum(axis=-1).mean()


@jax.jit
def uniformity(features: jax.Array) -> jax.Array:
    """Computes the log of the mean of exp(-2 |x - y|^2) over pairs of [n, D] on the unit sphere.

    It is 0 when all coincide, and at least -4.

    Wang and Isola 2020, with t = 2.
    """
    on_sphere = unit(features)
    n = len(features)

    def one(row: jax.Array) -> jax.Array:
        return jnp.exp(-2 * jnp.square(on_sphere - row[None]).sum(axis=1)).sum()

    return jnp.log((jax.lax.map(one, on_sphere, batch_size=64).sum() - n) / (n * (n - 1)))


@jax.jit
def lidar(views: jax.Array) -> jax.Array:
    """Computes the effective rank of what tells images apart in views [n, Q, D].

    The unit is how the views of an image differ.

    Thilak et al. 2023 (arXiv 2312.04000): exp of the entropy of the normalised
    eigenvalues of S_w^-1/2 S_b S_w^-1/2, with S_b the covariance of the images'
    means and S_w that of the views about them plus 1e-4 on the diagonal. At most
    min(n - 1, D).
    """
    n, count, _ = views.shape
    means = views.mean(axis=1)
    between = (means - means.mean(axis=0, keepdims=True)) / jnp.sqrt(jnp.float32(n))
    within = (views - means[:, None]) / jnp.sqrt(jnp.float32(n * count))
    covariance = jnp.einsum("nqd,nqe->de", within, within, precision="highest")
    values, vectors = jnp.linalg.eigh(covariance)
    scale = jax.lax.rsqrt(jnp.maximum(values, 0) + LIDAR_DELTA)
    whitened = jnp.dot(between, vectors * scale[None], precision="highest")
    eigenvalues = jnp.square(jnp.linalg.svd(whitened, compute_uv=False))
    return jnp.exp(jax.scipy.special.entr(eigenvalues / eigenvalues.sum()).sum())


def first_alarms(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tells from the lines of metrics.jsonl what would have warned: each diagnostic's start, end, limit and alarm.

    The alarm is the step since which it stayed below its limit (diagnostics.LIMITS); None where it does not.
    """
    watch = Watch(steps=0)
    for line in lines:
        watch.look(line["step"], line)
    return {
        name: {"start": course.start, "end": course.end, "limit": course.limit, "alarm since step": course.since}
        for name, course in watch.courses.items()
    }
