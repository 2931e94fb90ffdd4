"""Masks: their statistics over many draws, and that hidden patches and padding have no influence."""

import functools
import math
import random
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cjepa_jax.config import Mesh
from cjepa_jax.errors import UserError
from cjepa_jax.methods.cjepa import CJEPA, MaskedImages
from cjepa_jax.models.masking import Masks, sample_masks, target_tokens
from cjepa_jax.models.vit import take
from cjepa_jax.train import sharding

STEPS, BATCH = 5_000, 2  # 10,000 images; in `released` a block size belongs to a step
KEPT = 60  # of the context tokens, where they are cut
SQUARE, WIDE, SMALL = (14, 14), (14, 28), (3, 6)  # rows and columns
RECIPES = ["released", "corrected"]
QUICK = {"xla_backend_optimization_level": 1}  # runs several times faster than 0, compiles faster than 3


@pytest.fixture
def make_mask(make_config):
    """I-JEPA's settings with the context uncut, and overrides."""

    def make(recipe, grid, **overrides):
        settings = dict(recipe=recipe, targets=4, target_scale=(0.15, 0.2), target_aspect=(0.75, 1.5))
        settings |= dict(context_scale=(0.85, 1.0), min_keep=10, context_tokens=math.prod(longest(recipe, grid)))
        return make_config(**{f"mask__{key}": value for key, value in (settings | overrides).items()}).mask

    return make


def longest(recipe, grid):
    rows, columns = grid
    return (rows - 1, columns - 1) if recipe == "released" else grid


@functools.cache
def draw(mask, grid):
    """The masks of all steps, [STEPS, BATCH, ...]."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(STEPS))
    sample = functools.partial(sample_masks, mask=mask, grid=grid, batch=BATCH)
    return jax.device_get(jax.jit(jax.vmap(sample), compiler_options=QUICK)(keys))


def covered(idx, valid, grid):
    """Which patches the valid indices name, [..., N]."""
    hits = np.zeros((*idx.shape[:-1], math.prod(grid) + 1), bool)
    np.put_along_axis(hits, np.where(valid, idx, math.prod(grid)), True, axis=-1)
    return hits[..., :-1]


def context_of(masks, grid):
    return covered(masks.context_idx, masks.context_valid, grid)


def targets_of(masks, grid):
    """Patches of any block of an image."""
    return covered(masks.target_idx, masks.target_valid, grid).any(axis=-2)


def bounds(masks, grid):
    """Top-left corner and size of the target blocks' bounding boxes, both [..., 2]."""
    position, valid = np.stack(np.divmod(masks.target_idx, grid[1])), masks.target_valid
    low = np.where(valid, position, max(grid)).min(axis=-1)
    return np.moveaxis(low, 0, -1), np.moveaxis(np.where(valid, position, -1).max(axis=-1) - low + 1, 0, -1)


def shares(sizes):
    """Sizes [..., 2] -> {(height, width): share}."""
    counts = Counter(map(tuple, np.reshape(sizes, (-1, 2)).tolist()))
    return {size: count / counts.total() for size, count in counts.items()}


def reference(mask, grid, images):
    """The recipes in plain Python, one image a step: a block size of each, and its number of context patches."""
    rng = random.Random(1)
    rows, columns = grid
    highest, widest = longest(mask.recipe, grid)

    def size(scale, aspect):
        r = rng.random()
        q = r if mask.recipe == "released" else rng.random()
        patches = int(rows * columns * (scale[0] + r * (scale[1] - scale[0])))
        ratio = aspect[0] + q * (aspect[1] - aspect[0])
        return min(round(math.sqrt(patches * ratio)), highest), min(round(math.sqrt(patches / ratio)), widest)

    def block(size):
        height, width = size  # `released` excludes the last corner
        top, left = rng.randrange(highest + 1 - height), rng.randrange(widest + 1 - width)
        return {(top + row) * columns + left + column for row in range(height) for column in range(width)}

    sizes, counts = [], []
    for _ in range(images):
        target_sizes = [size(mask.target_scale, mask.target_aspect)] * mask.targets
        if mask.recipe == "corrected":
            target_sizes[1:] = [size(mask.target_scale, mask.target_aspect) for _ in target_sizes[1:]]
        context_size = size(mask.context_scale, (rows / columns, rows / columns))
        kept = set()
        while len(kept) < mask.min_keep:
            kept = block(context_size).difference(*map(block, target_sizes))
        sizes.append(target_sizes[0])
        counts.append(len(kept))
    return shares(np.array(sizes)), np.array(counts)


# What every draw must satisfy


@pytest.mark.parametrize(
    "recipe, grid, overrides",
    [
        ("released", SQUARE, {}),
        ("released", SQUARE, {"context_tokens": KEPT, "keep": "raster"}),
        ("corrected", SQUARE, {}),
        ("corrected", SQUARE, {"context_tokens": KEPT}),
        ("released", WIDE, {}),
        ("corrected", WIDE, {}),
        ("released", SMALL, {"min_keep": 1, "targets": 2}),
        ("corrected", SMALL, {"min_keep": 1, "targets": 2}),
    ],
)
def test_every_draw_is_well_formed(make_mask, recipe, grid, overrides):
    mask = make_mask(recipe, grid, **overrides)
    masks = draw(mask, grid)
    for idx, valid, length in (
        (masks.context_idx, masks.context_valid, mask.context_tokens),
        (masks.target_idx, masks.target_valid, target_tokens(mask, grid)),
    ):
        assert idx.shape[-1] == valid.shape[-1] == length
        assert (idx.min(), idx.max() < math.prod(grid)) == (0, True)
        distinct = np.sort(np.where(valid, idx, -1 - np.arange(length)), axis=-1)
        assert (np.diff(distinct) > 0).all()
    assert not (context_of(masks, grid) & targets_of(masks, grid)).any()
    assert (masks.context_valid.sum(axis=-1) >= mask.min_keep).all()

    counts = masks.target_valid.sum(axis=-1)
    np.testing.assert_array_equal(counts, bounds(masks, grid)[1].prod(axis=-1))  # full rectangles
    assert counts.max() == target_tokens(mask, grid)  # no padding that no draw needs


def test_too_small_a_context_is_drawn_again(make_mask):
    """And where none reaches min_keep (of 16 patches at least one is hidden) the fullest of several is taken."""
    once, again, fullest = (
        draw(make_mask("corrected", (4, 4), min_keep=n), (4, 4)).context_valid.sum(axis=-1) for n in (1, 6, 16)
    )
    assert (once < 6).mean() > 0.01
    assert again.min() == 6
    assert fullest.min() > once.min() and fullest.mean() > once.mean() + 1.5


@pytest.mark.parametrize("recipe", ["released", "corrected"])
def test_a_share_that_is_a_whole_number_of_patches_is_drawn_as_it_is_counted(make_mask, recipe):
    """100 * .57 is 56.99... in float64 and 57 in float32, in which blocks are drawn."""
    mask = make_mask(recipe, (10, 10), target_scale=(0.57, 0.57), min_keep=1)
    sizes = bounds(draw(mask, (10, 10)), (10, 10))[1]
    assert sizes.prod(axis=-1).max() == target_tokens(mask, (10, 10)) == draw(mask, (10, 10)).target_idx.shape[-1]


# Statistics of the recipes


@pytest.mark.parametrize(
    "grid, tokens, sizes, mean, std, quantiles",
    [
        (SQUARE, 40, {(5, 6): 0.265, (6, 6): 0.218, (6, 5): 0.126, (7, 5): 0.364, (8, 5): 0.026}, 82, 14, (51, 114)),
        ((16, 16), 54, None, 110, 18, None),
    ],
)
def test_released_has_the_published_statistics(make_mask, grid, tokens, sizes, mean, std, quantiles):
    mask = make_mask("released", grid)
    masks = draw(mask, grid)
    assert target_tokens(mask, grid) == tokens
    if sizes:
        found = shares(bounds(masks, grid)[1])
        assert found.keys() == sizes.keys()
        assert found == pytest.approx(sizes, abs=0.02)
    counts = masks.context_valid.sum(axis=-1)
    assert (counts.mean(), counts.std()) == (pytest.approx(mean, abs=0.6), pytest.approx(std, abs=0.6))
    if quantiles:
        assert tuple(np.quantile(counts, (0.01, 0.99))) == pytest.approx(quantiles, abs=1.0)


@pytest.mark.parametrize(
    "recipe, grid, again",
    [
        ("released", SQUARE, 0),
        ("released", SQUARE, 71),
        ("released", (16, 16), 0),
        ("corrected", SQUARE, 79),
        ("released", WIDE, 0),
        ("corrected", WIDE, 0),
    ],
)
def test_distribution_is_that_of_the_reference(make_mask, recipe, grid, again):
    """Also with a min_keep (`again`) that a fifth of the placements miss."""
    mask = make_mask(recipe, grid, **({"min_keep": again} if again else {}))
    sizes, counts = reference(mask, grid, 4_000)
    masks = draw(mask, grid)
    found, ours = shares(bounds(masks, grid)[1]), masks.context_valid.sum(axis=-1)
    assert sum(abs(found.get(s, 0) - sizes.get(s, 0)) for s in found.keys() | sizes.keys()) < 0.06
    assert ours.mean() == pytest.approx(counts.mean(), abs=1.0)
    assert ours.std() == pytest.approx(counts.std(), rel=0.05)


@pytest.mark.parametrize("recipe", RECIPES)
def test_corners_are_uniform_and_independent(make_mask, recipe):
    corner, size = bounds(draw(make_mask(recipe, SQUARE), SQUARE), SQUARE)
    places = np.array(longest(recipe, SQUARE)) + 1 - size  # in `released` the end is excluded
    coordinates = ((corner + 0.5) / places).reshape(STEPS, -1)  # of both axes, all blocks, both images
    correlation = np.corrcoef(coordinates, rowvar=False) - np.eye(coordinates.shape[1])
    assert np.abs(correlation).max() < 5 / math.sqrt(STEPS)
    for axis in (0, 1):
        for length in np.unique(size[..., axis]):
            chosen = size[..., axis] == length
            counts, ends = np.bincount(corner[..., axis][chosen]), places[..., axis][chosen]
            assert len(counts) == ends[0]
            assert np.abs(counts - counts.mean()).max() < 5 * math.sqrt(counts.mean())


@pytest.mark.parametrize("grid", [SQUARE, (16, 16)])
def test_released_never_reaches_the_last_row_and_column(make_mask, grid):
    """Its context block is all the rest, always; and the targets reach all the rest."""
    masks = draw(make_mask("released", grid), grid)
    rest = (np.indices(grid) < np.reshape(grid, (2, 1, 1)) - 1).all(axis=0).ravel()
    targets = targets_of(masks, grid)
    np.testing.assert_array_equal(targets.any(axis=(0, 1)), rest)
    np.testing.assert_array_equal(context_of(masks, grid), rest & ~targets)


@pytest.mark.parametrize("grid, overrides", [(SQUARE, {}), (SQUARE, {"context_tokens": KEPT}), (WIDE, {})])
def test_corrected_reaches_every_patch(make_mask, grid, overrides):
    masks = draw(make_mask("corrected", grid, **overrides), grid)
    assert targets_of(masks, grid).any(axis=(0, 1)).all()
    assert context_of(masks, grid).any(axis=(0, 1)).all()


def test_one_size_a_step_or_one_a_block(make_mask):
    sizes = {recipe: bounds(draw(make_mask(recipe, SQUARE), SQUARE), SQUARE)[1] for recipe in RECIPES}
    assert (sizes["released"] == sizes["released"][:, :1, :1]).all()
    differs = (sizes["corrected"][:, :, 1:] != sizes["corrected"][:, :, :1]).any(axis=-1).mean(axis=(0, 1))
    assert (differs > 0.5).all()
    between_images = (sizes["corrected"][:, 1] != sizes["corrected"][:, 0]).any(axis=-1).mean()
    assert between_images > 0.5


# The cut to a fixed number of context tokens


def test_raster_keeps_the_first(make_mask):
    whole = context_of(draw(make_mask("released", SQUARE), SQUARE), SQUARE)
    cut = draw(make_mask("released", SQUARE, context_tokens=KEPT, keep="raster"), SQUARE)
    np.testing.assert_array_equal(context_of(cut, SQUARE), whole & (whole.cumsum(axis=-1) <= KEPT))


def test_random_keeps_a_uniform_subset(make_mask):
    """Each eligible patch with probability K / n, and each two neighbours in raster order with K (K-1) / (n (n-1))."""
    whole = context_of(draw(make_mask("corrected", SQUARE), SQUARE), SQUARE).reshape(-1, 196)
    cut = context_of(draw(make_mask("corrected", SQUARE, context_tokens=KEPT), SQUARE), SQUARE).reshape(-1, 196)
    n = np.maximum(whole.sum(axis=-1, keepdims=True), KEPT)
    assert not (cut & ~whole).any()
    np.testing.assert_array_equal(cut.sum(axis=-1), np.minimum(whole.sum(axis=-1), KEPT))

    chance = np.where(whole, KEPT / n, 0.0)
    z = (cut - chance).sum(axis=0) / np.sqrt((chance * (1 - chance)).sum(axis=0)).clip(1e-9)
    eligible = whole.any(axis=0)
    assert np.abs(z[eligible]).max() < 4.5
    assert np.square(z[eligible]).mean() == pytest.approx(1, abs=0.35)

    pairs = whole[:, :-1] & whole[:, 1:]
    chance = np.where(pairs, KEPT * (KEPT - 1) / (n * (n - 1)), 0.0)
    assert (cut[:, :-1] & cut[:, 1:]).sum() == pytest.approx(chance.sum(), rel=0.01)


# Where the randomness comes from


@pytest.mark.parametrize("recipe", RECIPES)
def test_masks_are_a_function_of_the_step_and_not_of_the_devices(make_mask, recipe):
    mask = make_mask(recipe, SQUARE, context_tokens=KEPT)

    def masks_of(step):
        return sample_masks(jax.random.fold_in(jax.random.key(0), step), mask, grid=SQUARE, batch=16)

    one = jax.jit(masks_of, compiler_options=QUICK)
    eight = jax.jit(
        masks_of,
        compiler_options=QUICK,
        out_shardings=sharding.batch(sharding.make_mesh(Mesh(fsdp=1, parameters="replicated"))),
    )
    split = eight(7)
    for x in split:
        assert len(x.sharding.device_set) == 8 and x.addressable_shards[0].data.shape[0] == 2
    first, again, other = jax.device_get((one(7), split, one(8)))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.target_idx != other.target_idx).any(axis=(1, 2)).all()
    assert (first.context_idx != other.context_idx).any(axis=1).all()
    assert len(np.unique(first.context_idx, axis=0)) == 16  # nor is one image masked like another


@pytest.mark.parametrize(
    "recipe, grid, overrides, message",
    [
        ("released", (2, 2), {"context_tokens": 10}, "2x2"),
        ("corrected", (1, 1), {"context_tokens": 10}, "model.patch_size"),
        ("corrected", (4, 4), {"target_scale": (0.01, 0.2)}, "mask.target_scale"),
        ("released", SQUARE, {"context_tokens": 170}, "169"),
        ("corrected", SQUARE, {"context_tokens": 197}, "196"),
        ("released", (2, 9), {"context_tokens": 10}, "a grid of 2x9 patches is too small"),
        ("released", WIDE, {"context_tokens": 352}, "on 14x28 patches holds: 351"),
        ("corrected", WIDE, {"min_keep": 393, "context_tokens": 0}, "on 14x28 patches holds: 392"),
    ],
)
def test_impossible_settings_are_named(make_mask, recipe, grid, overrides, message):
    with pytest.raises(UserError, match=message):
        target_tokens(make_mask(recipe, grid, **overrides), grid)


# Gathered features equal masked ones


@pytest.fixture
def networks(make_config):
    """(method, parameters, patches, masks, rng) of 4 images of 8x8 patches; contexts and blocks differ in length."""
    method = CJEPA(make_config(model__size="32x2x4", predictor__width=16, data__image_size=16))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(method.init, jax.random.key(0))
    params = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), shapes)
    order = rng.permuted(np.tile(np.arange(64, dtype=np.int32), (4, 1)), axis=1)
    context, target = np.arange(40) < [[40], [31], [7], [1]], np.arange(5) < rng.integers(1, 6, (4, 4, 1))
    masks = Masks(np.where(context, order[:, :40], 0), context, order[:, 40:60].reshape(4, 4, 5), target)
    return method, params, rng.normal(size=(4, 64, 4)).astype(np.float32), masks, rng


def encode(networks, patches, *context):
    return np.array(jax.jit(networks[0].encoder.apply)({"params": networks[1]["encoder"]}, patches, *context))


def test_gathered_features_equal_masked_ones(networks):
    _, _, patches, masks, _ = networks
    gathered = encode(networks, patches, masks.context_idx, masks.context_valid)
    masked = encode(networks, patches, None, context_of(masks, (8, 8)))
    valid = masks.context_valid
    np.testing.assert_allclose(gathered[valid], take(masked, masks.context_idx)[valid], rtol=1e-5, atol=1e-5)
    assert not np.allclose(masked, encode(networks, patches), atol=1e-2)  # the mask matters


def test_hidden_patches_and_padding_have_no_influence(networks):
    _, _, patches, masks, rng = networks
    valid = masks.context_valid
    before = encode(networks, patches, masks.context_idx, valid)[valid]
    hidden = np.where(context_of(masks, (8, 8))[..., None], patches, 1e3)
    padding = np.where(valid, masks.context_idx, rng.integers(64, size=valid.shape))
    for pixels, idx in ((hidden, masks.context_idx), (patches, padding), (hidden, padding)):
        np.testing.assert_array_equal(encode(networks, pixels, idx, valid)[valid], before)


def test_an_image_without_context_has_a_finite_loss(networks, make_config):
    """Many target blocks may cover all of a context block, and its mean is then 0."""
    _, params, _, masks, rng = networks
    method = CJEPA(
        make_config(
            model__size="32x2x4",
            predictor__width=16,
            data__image_size=16,
            vicreg__weight=0.3,
            vicreg__views="context_target",
        )
    )
    images = rng.integers(256, size=(4, 16, 16, 1), dtype=np.uint8)
    empty = masks._replace(context_valid=masks.context_valid & (np.arange(4) < 3)[:, None])
    averages = {"target_encoder": params["encoder"]}

    def loss(params, masks):
        outputs = method.forward(params, averages, MaskedImages(images, masks))
        return method.loss(params, outputs)[0], outputs["context_mean"]

    compute = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, means), gradients = compute(params, empty)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((total, gradients)))
    np.testing.assert_array_equal(means[3], 0)
    np.testing.assert_allclose(means[:3], compute(params, masks)[0][1][:3], rtol=1e-6)


def predict(networks, context, masks):
    return np.array(jax.jit(networks[0].predictor.apply)({"params": networks[1]["predictor"]}, context, masks))


def test_longer_padding_gives_the_same_predictions(networks):
    _, _, _, masks, rng = networks

    def longer(idx, valid, count):
        """With more padding, wherever it points."""
        tail = (*idx.shape[:-1], count)
        return (
            np.concatenate([idx, rng.integers(64, size=tail, dtype=np.int32)], axis=-1),
            np.concatenate([valid, np.zeros(tail, bool)], axis=-1),
        )

    context = rng.normal(size=(*masks.context_idx.shape, 32)).astype(np.float32)
    before = predict(networks, context, masks)
    more = np.concatenate([context, np.full((4, 7, 32), 1e3, np.float32)], axis=1)
    padded = Masks(*longer(masks.context_idx, masks.context_valid, 7), *longer(masks.target_idx, masks.target_valid, 5))
    after = predict(networks, more, padded)[:, :, : before.shape[2]]
    valid = masks.target_valid
    np.testing.assert_allclose(after[valid], before[valid], rtol=1e-5, atol=1e-5)


def test_a_block_is_predicted_from_its_own_image_and_place(networks):
    _, _, _, masks, rng = networks
    context = rng.normal(size=(*masks.context_idx.shape, 32)).astype(np.float32)
    before = predict(networks, context, masks)
    others_moved = masks.target_idx.copy()
    others_moved[:, 1:] ^= 1
    for changed, same in (
        (predict(networks, np.concatenate([context[:1], -context[1:]]), masks), np.s_[:1]),
        (predict(networks, context, masks._replace(target_idx=others_moved)), np.s_[:, :1]),
    ):
        alike = np.isclose(changed, before, rtol=1e-5, atol=1e-5).all(axis=-1)
        expected = np.zeros_like(alike)
        expected[same] = True
        np.testing.assert_array_equal(alike[masks.target_valid], expected[masks.target_valid])
