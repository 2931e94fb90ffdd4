"""The alarms of a collapse, each against a second formula in float64."""

import itertools

import jax
import numpy as np
import pytest

from cjepa_jax.train import diagnostics


def draw(batch, width, rank=None, seed=0):
    """Uneven features off the origin; with a rank, a product of two factors."""
    rng = np.random.default_rng(seed)
    if rank:
        return (rng.normal(size=(batch, rank)) @ rng.normal(size=(rank, width))).astype(np.float32)
    return (rng.normal(size=(batch, width)) * np.geomspace(0.01, 3, width) + 0.5).astype(np.float32)


def rank_me(features):
    singular = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    share = singular / singular.sum()
    return np.exp(-sum(p * np.log(p) for p in share if p > 0))


def std(features):
    return np.mean([np.sqrt(np.mean((column - column.mean()) ** 2)) for column in features.astype(np.float64).T])


def cosine(features):
    pairs = itertools.permutations(features.astype(np.float64), 2)
    return np.mean([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs])


@pytest.mark.parametrize("batch, width, rank", [(40, 12, None), (12, 40, None), (64, 64, 5), (2, 3, None)])
@pytest.mark.parametrize(
    "name, reference", [("rep/rank", rank_me), ("rep/std", std), ("rep/cosine", cosine)], ids=["rank", "std", "cosine"]
)
def test_alarms_are_those_of_the_second_formula(name, reference, batch, width, rank):
    features = draw(batch, width, rank)
    assert float(diagnostics.diagnose(jax.numpy.asarray(features))[name]) == pytest.approx(
        reference(features), rel=1e-4, abs=1e-5
    )


@pytest.mark.parametrize("rank", [1, 3, 32])
def test_rank_counts_equal_directions(rank):
    """An isotropic cloud fills as many as it has, be they few or all; their scale and place do not matter."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 32)))[0][:, :rank] for n in (64, 32))
    for scale in (1e-3, 1, 1e3):
        features = (scale * left @ right.T).astype(np.float32)
        assert diagnostics.effective_rank(features) == pytest.approx(rank, rel=2e-3)


def test_a_large_isotropic_cloud_has_nearly_full_rank():
    features = np.random.default_rng(0).normal(size=(4096, 32)).astype(np.float32)
    assert 31.8 < diagnostics.effective_rank(features) <= 32.001


@pytest.mark.parametrize("batch, width", [(64, 64), (512, 384)])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_a_collapse_reads_as_one(batch, width, spread):
    """All images the same, or on one line: the rounding of float32 must not look like a rank."""
    rng = np.random.default_rng(0)
    line = 1 + spread * rng.normal(size=(batch, 1))
    features = (line * rng.normal(size=width)).astype(np.float32)
    assert 1 - 1e-5 < diagnostics.effective_rank(features) < 1.05
    assert abs(float(diagnostics.mean_cosine(np.abs(features))) - 1) < 1e-4
    assert (float(diagnostics.feature_std(features)) < 1e-5) == (spread == 0)


def test_cosine_tells_opposite_orthogonal_and_parallel_apart():
    eye = np.eye(4, dtype=np.float32)
    for features, expected in ((eye, 0), (np.stack([eye[0], -eye[0]]), -1), (np.stack([eye[0], 3 * eye[0]]), 1)):
        assert float(diagnostics.mean_cosine(features)) == pytest.approx(expected, abs=1e-6)
