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
from cjepa_jax.evaluate.frozen import UNTRAINED, Frozen
from cjepa_jax.evaluate.sets import unit
from cjepa_jax.files import is_file, read_json
from cjepa_jax.settings import setting
from cjepa_jax.train import writer
from cjepa_jax.train.diagnostics import LIMITS, Watch, diagnose

LIDAR_DELTA = 1e-4  # of the paper: added to the covariance within objects
_MEANING = {  # of an alarm, by the key of LIMITS
    "rep/std": "the features of different images are becoming the same",
    "rep/rank": "the features differ in fewer and fewer directions",
    "1 - rep/cosine": "the features of all images point more and more in one direction",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collapse(Evaluator):
    """Computes statistics of central crops, and of random views of some of these images; labels play no part."""

    images: int = setting(
        10_000, "Images of the training split, for std, rank, spectrum and uniformity.", within="[2, 1e9]"
    )
    objects: int = setting(
        1000, "Images whose views LiDAR and alignment compare; all where there are fewer.", within="[2, 1e6]"
    )
    views: int = setting(10, "Views of each.", within="[2, 1000]")

    name: ClassVar[str] = "collapse"
    needs_labels: ClassVar[bool] = False
    numbers: ClassVar[tuple[str, ...]] = ("std", "rank", "cosine", "alignment", "uniformity", "LiDAR")
    pictures: ClassVar[tuple[str, ...]] = ("collapse.png",)

    def check(self, frozen: Frozen) -> None:
        """Raises UserError where there is a single training image."""
        require(len(frozen.train.source) > 1, "collapse compares training images, and there is only one")

    def run(self, frozen: Frozen, stem: epath.Path | None) -> Rows:
        """Gives the statistics and a verdict; draws the spectrum; says when metrics.jsonl should have warned."""
        reader = frozen.train
        order = np.random.default_rng(frozen.seed).permutation(len(reader.source))
        view = pipeline.central_view(reader, crop_fraction=frozen.crop_fraction)
        images, objects = (np.sort(order[:count]).tolist() for count in (self.images, self.objects))
        with frozen.progress("features of training images", total=len(images), unit="images") as bar:
            central = frozen.extractor.split(frozen.params, reader, images, view, seen=bar.update)
        with frozen.progress("features of random views", total=self.views * len(objects), unit="views") as bar:
            views_of = [pipeline.random_view(reader, seed=(frozen.seed, number)) for number in range(self.views)]
            drawn = [frozen.extractor.split(frozen.params, reader, objects, view, seen=bar.update) for view in views_of]
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
            workdir, step = frozen.origin.workdir, frozen.origin.networks.step
            lines = [line for line in writer.read(workdir) if line["step"] <= step]
            rows[frozen.judged]["training"] = first_alarms(lines)
            rows[frozen.judged]["verdict"] = verdict(rows, lines, steps=_planned(workdir, lines))
        else:
            rows[frozen.judged]["verdict"] = verdict(rows, [], steps=0)
        if stem is not None:
            plots.spectra(spectra, stem.with_name(f"{stem.name}.collapse.png"))
        return rows

    def notes(self, rows: Rows) -> list[str]:
        """Says the verdict on the judged encoder."""
        found = next(iter(rows.values())).get("verdict")
        if not found or not found["compared"]:
            return ["verdict: none, for want of metrics.jsonl and of an untrained encoder to compare with"]
        word = "the features are collapsing" if found["alarms"] else "no alarm"
        return [f"verdict: {word}", *(f"  alarm: {alarm}" for alarm in found["alarms"]), *found["compared"]]


def verdict(rows: Rows, lines: Sequence[Mapping[str, Any]], *, steps: int) -> dict[str, list[str]]:
    """Says which alarms there are and what they mean, and what was compared; the limits are the training alarm's.

    The first of the rows is compared with that of the untrained encoder, where there is one, and the lines of
    metrics.jsonl of a run of `steps` steps with their start.
    """
    alarms, compared = [], []
    judged, untrained = next(iter(rows.values())), rows.get(UNTRAINED)
    if untrained is not None and untrained is not judged:
        shares = []
        for key, limit in LIMITS.items():
            name = key.removeprefix("1 - ").removeprefix("rep/")
            now, before = (1 - row[name] if key.startswith("1 - ") else row[name] for row in (judged, untrained))
            label = key.replace("rep/", "")
            shares.append(f"{label} {now / before:.2f} (alarm below {limit})" if before else f"{label} {now:.3g}")
            if not now >= limit * before:  # NaN is an alarm, too
                alarms.append(
                    f"{label} is {now:.3g}, less than {limit} of the untrained encoder's {before:.3g}: {_MEANING[key]}"
                )
        compared.append(f"  in multiples of the untrained encoder's on the same images: {', '.join(shares)}")
    watch = Watch(steps)
    found = ""
    for line in lines:
        if "rep/std" in line:  # others are lines of evaluation
            found = watch.look(line["step"], line)
    if watch.courses:
        compared.append(f"  in metrics.jsonl: {'an' if found else 'no'} alarm at step {lines[-1]['step']}")
        for key, course in watch.courses.items():
            if course.since and key in found:
                alarms.append(
                    f"in metrics.jsonl {key} is {course.end:.3g}, below its limit of {course.limit:.3g} since step "
                    f"{course.since}: {_MEANING[key]}"
                )
    return {"alarms": alarms, "compared": compared}


def _planned(workdir: epath.Path, lines: Sequence[Mapping[str, Any]]) -> int:
    """Gives the number of steps that the run was meant to have; 0 where its files do not say so."""
    file = workdir / "config.json"
    epochs = read_json(file).get("optim.epochs") if is_file(file) else None
    epoch = lines[-1].get("epoch") if lines else None
    return round(epochs * lines[-1]["step"] / epoch) if epochs and epoch else 0


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

    It is 0 when all coincide, and at least -4 n / (n - 1).

    Wang and Isola 2020, with t = 2.
    """
    on_sphere = unit(features)
    n = len(features)

    def one(row: jax.Array) -> jax.Array:
        return jnp.exp(-2 * jnp.square(on_sphere - row[None]).sum(axis=1)).sum()

    return jnp.log((jax.lax.map(one, on_sphere, batch_size=64).sum() - n) / (n * (n - 1)))


@jax.jit
def lidar(views: jax.Array) -> jax.Array:
    """Computes LiDAR of views [n, Q, D]: the effective rank of the differences between images.

    They are measured relative to the differences between the views of one image.

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
