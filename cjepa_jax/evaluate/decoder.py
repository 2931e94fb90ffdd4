"""What features of patches hold of their pixels: a linear decoder, fitted in closed form by ridge regression.

Shapes: n patches, D features, F = patch_size^2 * channels values of a patch.
"""

import dataclasses
import operator
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from etils import epath
from jaxtyping import Array, Float, Float64, UInt8

from cjepa_jax import plots, pretrained
from cjepa_jax.data import pipeline
from cjepa_jax.errors import require
from cjepa_jax.evaluate.base import Evaluator, Rows
from cjepa_jax.evaluate.features import Apply, Extractor, Params, patch_features
from cjepa_jax.evaluate.frozen import PIXELS, TRAINED, Frozen
from cjepa_jax.models.vit import patchify
from cjepa_jax.settings import setting
from cjepa_jax.train import sharding

_KINDS = {"target_encoder": "target encoder", "encoder": "context encoder"}
_HELD_OUT = 10  # every tenth training image helps to choose the strength
_SHOWN = 8  # images in the picture
_TARGET = "pixels"  # beside the names of the encoders


class Moments(NamedTuple):
    """Sums over patches of features x and pixels y: all that the fit and its error take."""

    patches: int
    x: Float64[np.ndarray, " D"]
    y: Float64[np.ndarray, " F"]
    xx: Float64[np.ndarray, "D D"]
    xy: Float64[np.ndarray, "D F"]
    yy: Float64[np.ndarray, " F"]

    @classmethod
    def of(cls, x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "n F"]) -> "Moments":
        """Sums over n patches, in float64."""
        x, y = x.astype(np.float64), y.astype(np.float64)
        return cls(len(x), x.sum(axis=0), y.sum(axis=0), x.T @ x, x.T @ y, np.square(y).sum(axis=0))

    def plus(self, other: "Moments") -> "Moments":
        """Joins the patches of two sets."""
        return jax.tree.map(operator.add, self, other)


class LinearMap(NamedTuple):
    """Holds a linear map from the features of a patch to its pixels."""

    kernel: Float64[np.ndarray, "D F"]
    bias: Float64[np.ndarray, " F"]


def fit(moments: Moments, strength: float) -> LinearMap:
    """Fits ridge regression with a bias that is not shrunk.

    It minimises the mean squared error of a patch + alpha |kernel|^2, where alpha is `strength` times the mean variance
    of the features.
    """
    n, mean, target = moments.patches, moments.x / moments.patches, moments.y / moments.patches
    values, vectors = np.linalg.eigh(moments.xx / n - np.outer(mean, mean))
    values = values.clip(0)
    # Where features are all the same, their variances are no more than the rounding of their squares.
    float64 = np.finfo(np.float64)
    alpha = max(strength * values.mean(), float64.eps * np.trace(moments.xx) / n / len(mean), float64.tiny)
    kernel = vectors @ (vectors.T @ (moments.xy / n - np.outer(mean, target)) / (values + alpha)[:, None])
    return LinearMap(kernel, target - mean @ kernel)


def squared_error(moments: Moments, decoder: LinearMap) -> float:
    """Sums the squared errors of all values of all patches."""
    kernel, bias = decoder
    found = np.sum(kernel * (moments.xx @ kernel)) + moments.patches * bias @ bias + 2 * (moments.x @ kernel) @ bias
    return float(moments.yy.sum() - 2 * (np.sum(kernel * moments.xy) + bias @ moments.y) + found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder(Evaluator):
    """Decodes the pixels of patches from their features by ridge regression."""

    images: int = setting(
        1000, "Training images to fit on, and test images to judge by, at most; random ones.", within="[2, 1e9]"
    )
    strengths: tuple[float, ...] = setting(
        (1e-8, 1e-6, 1e-4, 1e-2, 1.0),
        "To choose from by the error on held-out training images, in multiples of the features' mean variance.",
        within="(0, 1e9]",
    )

    name: ClassVar[str] = "decoder"
    needs_labels: ClassVar[bool] = False
    in_training: ClassVar[bool] = False
    reads_checkpoint: ClassVar[bool] = True
    numbers: ClassVar[tuple[str, ...]] = ("R2", "PSNR in dB", "strength")
    pictures: ClassVar[tuple[str, ...]] = ("decoder.png",)

    def __post_init__(self):
        require(len(self.strengths) > 0, "decoder.strengths is empty")

    def check(self, frozen: Frozen) -> None:
        """Raises UserError where there are not two training images, of which one can be held out."""
        count = len(frozen.train.source)
        require(count > 1, f"data.train_split = {frozen.data.train_split!r} has {count} image; decoder needs 2 or more")
        require(len(frozen.test.source) > 0, f"data.test_split = {frozen.data.test_split!r} has no images")

    def run(self, frozen: Frozen, stem: epath.Path | None) -> Rows:
        """Gives R^2 and PSNR on the test images for every encoder, the checkpoint's other one among them.

        Draws STEM.decoder.png. Raises UserError where no image can be read, or where all patches are the same.
        """
        params = shown_encoders(frozen)
        train, test = (frozen.sampled(reader, self.images) for reader in (frozen.train, frozen.test))
        held = train[::_HELD_OUT]
        kept = np.setdiff1d(train, held).tolist()
        extractor = extractor_of(frozen, params)
        sets = {
            name: _moments(frozen, extractor, params, reader, indices, name)
            for name, reader, indices in (
                ("training", frozen.train, kept),
                ("held-out", frozen.train, held),
                ("test", frozen.test, test),
            )
        }
        rows: Rows = {}
        decoders: dict[str, LinearMap] = {}
        for name in params:
            fitted, chosen, judged = (sets[which][name] for which in sets)
            errors = {s: squared_error(chosen, fit(fitted, s)) for s in self.strengths}
            strength = min(errors, key=errors.__getitem__)
            decoders[name] = fit(fitted.plus(chosen), strength)
            error = max(squared_error(judged, decoders[name]), 0.0)
            variance = float((judged.yy - judged.y**2 / judged.patches).sum())
            require(variance > 0, f"data.test_split = {frozen.data.test_split!r}: all patches are the same")
            mean = error / (judged.patches * len(judged.y))
            rows[name] = {
                "R2": 1 - error / variance,
                "PSNR in dB": float(-10 * np.log10(max(mean, 1e-20))),  # pixels are in [0, 1]
                "strength": strength,
                "images": len(test),
                "held-out error": {f"{s:g}": e / (chosen.patches * len(chosen.y)) for s, e in errors.items()},
            }
        if stem is not None and jax.process_index() == 0:
            images = frozen.spread_images(_SHOWN)
            columns: dict[str, np.ndarray] = {"image": images}
            for name, decoder in decoders.items():
                columns[_title(frozen, name)] = decoded(frozen, extractor.encoders[name], params[name], decoder, images)
            title = "Pixels decoded from the features of each patch by a linear map"
            plots.side_by_side(columns, stem.with_name(f"{stem.name}.decoder.png"), title=title)
        return rows

    def notes(self, rows: Rows) -> list[str]:
        """Explains the column R2 below the table."""
        return [
            "R2 is the share of the variance of the pixels, about each one's mean over all patches, that is decoded"
        ]


def shown_encoders(frozen: Frozen) -> dict[str, Params]:
    """Lists the encoders with features of their own, the checkpoint's other one behind the judged one."""
    found = {name: params for name, params in frozen.params.items() if name != PIXELS}
    if frozen.origin and TRAINED in found:
        path = frozen.origin.checkpoint
        others = [name for name in pretrained.available(path) if name in _KINDS and name != frozen.origin.encoder]
        loaded = pretrained.load(path, others).params if others else {}
        more = {_KINDS[name]: jax.device_put(loaded[name], sharding.replicated(frozen.mesh)) for name in others}
        found = {TRAINED: found[TRAINED], **more, **found}
    return found


def _title(frozen: Frozen, name: str) -> str:
    return f"{name},\n{_KINDS[frozen.origin.encoder]}" if frozen.origin and name == TRAINED else name


def extractor_of(frozen: Frozen, names: dict[str, Params]) -> Extractor:
    """Builds what computes the features of patches by each of these encoders, and the pixels that belong to them."""
    model, data = frozen.model, frozen.data
    shapes = {"image_shape": data.image_shape, "trained_shape": frozen.trained_shape}
    apply = patch_features(model, **shapes, mean=data.mean, std=data.std)

    def pixels(params: Params, images: UInt8[Array, "B H W C"]) -> Float[Array, "B N F"]:
        return patchify(images.astype(jnp.float32) / 255, model.patch_size)

    return Extractor({**dict.fromkeys(names, apply), _TARGET: pixels}, frozen.mesh, batch_size=data.batch_size)


def _moments(
    frozen: Frozen,
    extractor: Extractor,
    params: dict[str, Params],
    reader: pipeline.Reader,
    indices: list[int],
    which: str,
) -> dict[str, Moments]:
    """Sums over the patches of the readable images, for each encoder; only one batch is there at once."""
    view = pipeline.central_view(reader, crop_fraction=frozen.crop_fraction)
    found: dict[str, Moments] = {}
    with frozen.progress(f"patches of {which} images", total=len(indices), unit="images") as bar:
        for batch, labels in extractor.batches({**params, _TARGET: {}}, reader, indices, view):
            values, names = sharding.fetch((batch, labels))
            read = names != pipeline.NO_IMAGE
            rows = {name: rearrange(x[read], "b n d -> (b n) d") for name, x in values.items()}
            for name in params:
                more = Moments.of(rows[name], rows[_TARGET])
                found[name] = found[name].plus(more) if name in found else more
            bar.update(min(len(names), len(indices) - bar.n))
    readable = bool(found) and all(moments.patches > 0 for moments in found.values())
    split = frozen.data.test_split if reader is frozen.test else frozen.data.train_split
    require(readable, f"{split!r}: none of its {which} images can be read")
    return found


def decoded(
    frozen: Frozen, apply: Apply, params: Params, decoder: LinearMap, images: UInt8[np.ndarray, "n H W C"]
) -> Float[np.ndarray, "n H W C"]:
    """Decodes whole images, in [0, 1]."""
    features = np.asarray(jax.jit(apply)(params, images), np.float64)
    size = frozen.model.patch_size
    patches = (features @ decoder.kernel + decoder.bias).clip(0, 1)
    rows = images.shape[1] // size
    return rearrange(patches, "b (h w) (p q c) -> b (h p) (w q) c", h=rows, p=size, q=size)
