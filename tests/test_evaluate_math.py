"""kNN, logistic regression, linear probes and collapse statistics against scikit-learn, PyTorch and float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cjepa_jax.config import Mesh
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate import collapse, knn, logistic
from cjepa_jax.evaluate import linear_grid as linear
from cjepa_jax.evaluate.sets import Labelled, Splits, check_classes, few, lacking
from cjepa_jax.models.vit import interpolate_positions, sincos_positions
from cjepa_jax.train import sharding


def blobs(n: int, m: int, *, width: int = 24, classes: int = 5, spread: float = 2.0, seed: int = 0) -> Splits:
    """Overlapping Gaussian classes, with columns of very different scale and mean, some of them constant."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width))
    scale, shift = np.exp(rng.normal(size=width)), rng.normal(size=width)
    scale[0] = 0.0

    def draw(count):
        labels = rng.integers(0, classes, count).astype(np.int32)
        features = (centres[labels] + spread * rng.normal(size=(count, width))) * scale + shift
        return Labelled(features.astype(np.float32), labels)

    return Splits(draw(n), draw(m))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(Mesh(fsdp=1, parameters="replicated"))


def test_eight_devices_share(mesh):
    assert mesh.size == 8


@pytest.mark.parametrize("temperature", [0.07, None])
@pytest.mark.parametrize("n, m", [(500, 301), (21, 5)])
def test_knn_equals_scikit_learn(n, m, temperature, mesh):
    train, test = blobs(n, m)
    weights = "uniform" if temperature is None else lambda distance: np.exp(-distance / temperature)
    reference = KNeighborsClassifier(20, metric="cosine", weights=weights)
    reference.fit(train.features.astype(np.float64), train.labels)
    expected = reference.predict(test.features.astype(np.float64))
    cosine, rows = knn.nearest(jnp.asarray(test.features), jnp.asarray(train.features), k=20, chunk=64)
    np.testing.assert_array_equal(
        knn.vote(cosine, jnp.asarray(train.labels)[rows], classes=5, temperature=temperature), expected
    )
    (accuracy,) = knn.accuracies(train, test, k=20, classes=5, temperatures=[temperature], mesh=mesh)
    assert accuracy == pytest.approx((expected == test.labels).mean())


def test_nearest_holds_no_second_copy_of_the_bank():
    queries, bank = jax.ShapeDtypeStruct((16, 64), jnp.float32), jax.ShapeDtypeStruct((200_001, 64), jnp.float32)
    needed = knn.nearest.lower(queries, bank, k=20).compile().memory_analysis()
    assert needed.temp_size_in_bytes < needed.argument_size_in_bytes / 4


@pytest.mark.parametrize("n, chunk", [(64, 64), (65, 64), (7, 64), (100, 30)])
def test_nearest_sees_each_row_once(n, chunk):
    queries, bank = (np.random.default_rng(i).normal(size=(size, 5)).astype(np.float32) for i, size in ((0, 9), (1, n)))
    k = min(20, n)
    cosine, rows = knn.nearest(jnp.asarray(queries), jnp.asarray(bank), k=k, chunk=chunk)
    exact = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (bank / np.linalg.norm(bank, axis=1)[:, None]).T
    np.testing.assert_array_equal(rows, np.argsort(-exact, axis=1, kind="stable")[:, :k])
    np.testing.assert_allclose(cosine, -np.sort(-exact, axis=1)[:, :k], atol=1e-6)


def test_logistic_equals_scikit_learn(mesh):
    train, test = blobs(403, 999)
    reference = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, tol=1e-8)).fit(*train)
    found = logistic.fit(jnp.asarray(train.features), jnp.asarray(train.labels), classes=5, tol=1e-6)
    probability = jax.nn.softmax(found.logits(jnp.asarray(test.features)))
    np.testing.assert_allclose(probability, reference.predict_proba(test.features), atol=2e-3)
    agreed = (np.asarray(probability).argmax(axis=1) == reference.predict(test.features)).mean()
    assert agreed > 0.995
    accuracy = logistic.accuracy(train, test, classes=5, mesh=mesh)
    assert accuracy == pytest.approx(reference.score(*test), abs=0.005)


def batches(train: Labelled, size: int, epochs: int):
    rng = np.random.default_rng(1)
    for _ in range(epochs):
        order = rng.permutation(len(train.labels))[: len(train.labels) // size * size].reshape(-1, size)
        yield [({"x": train.features[rows]}, train.labels[rows]) for rows in order]


def test_each_member_of_the_grid_trains_as_pytorch_trains_it_alone():
    train, test = blobs(90, 40, width=6, classes=3)
    rates, decays = linear.grid((0.02, 0.5), (0.0, 0.03))
    assert list(zip(rates.tolist(), decays.tolist(), strict=True))[1] == pytest.approx((0.02, 0.03))
    probe = linear.fit(batches(train, 30, 4), {"x": (rates, decays)}, decay_every=2, classes=3)["x"]
    found = np.asarray(linear.predict(probe, jnp.asarray(test.features)))
    for member, (rate, decay) in enumerate(zip(rates.tolist(), decays.tolist(), strict=True)):
        norm = torch.nn.BatchNorm1d(6, affine=False, momentum=None)
        layer = torch.nn.Linear(6, 3)
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        groups = [{"params": [layer.weight], "weight_decay": decay}, {"params": [layer.bias]}]
        sgd = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
        for epoch, epoch_batches in enumerate(batches(train, 30, 4)):
            for group in sgd.param_groups:
                group["lr"] = rate * 0.1 ** (epoch // 2)
            for features, labels in epoch_batches:
                sgd.zero_grad()
                logits = layer(norm(torch.tensor(features["x"])))
                torch.nn.functional.cross_entropy(logits, torch.tensor(labels).long()).backward()
                sgd.step()
        np.testing.assert_allclose(probe.params["kernel"][member].T, layer.weight.detach(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(probe.params["bias"][member], layer.bias.detach(), rtol=1e-4, atol=1e-4)
        seen = torch.tensor(train.features)  # PyTorch averages the batches' variances; the test wants that of all
        norm.running_mean, norm.running_var = seen.mean(0), seen.var(0, unbiased=False)
        with torch.no_grad():
            expected = layer(norm.eval()(torch.tensor(test.features))).argmax(1)
        np.testing.assert_array_equal(found[member], expected)


def test_rows_without_a_label_change_nothing():
    train, _ = blobs(24, 1, width=6, classes=3)
    rates, decays = linear.grid((0.1,), (0.0,))
    padded = (
        np.pad(train.features, ((0, 8), (0, 0)), constant_values=7.0),
        np.pad(train.labels, (0, 8), constant_values=-1),
    )
    step = jax.jit(linear.train_step)
    plain = step(linear.init(1, width=6, classes=3), *train, rates, decays)
    more = step(linear.init(1, width=6, classes=3), *padded, rates, decays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, more)


def test_linear_probe_agrees_with_logistic_regression_within_half_a_point(mesh):
    train, test = blobs(3000, 20000)
    reference = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(*train).score(*test)
    members = {"x": linear.grid((0.01, 0.1), (0.0,))}
    probe = linear.fit(batches(train, 256, 28), members, decay_every=8, classes=5)["x"]
    assert 0.4 < reference < 0.9
    np.testing.assert_allclose(linear.accuracies(probe, test, mesh=mesh), reference, atol=0.005)


def test_few_draws_equal_shares():
    labels = np.repeat([0, 1, 2], [50, 40, 3])
    first, second = few(labels, shots=5, draws=2, seed=0)
    assert np.bincount(labels[first]).tolist() == [5, 5, 3] and len(set(first.tolist())) == 13
    assert first.tolist() != second.tolist()
    assert first.tolist() == few(labels, shots=5, draws=1, seed=0)[0].tolist()


def test_test_images_have_no_class_that_training_images_lack():
    about = {"names": ("data.train_split = 'a'", "data.test_split = 'b'"), "classes": ("ant", "bee", "cat", "dog")}
    check_classes(np.array([0, 1, 1]), np.array([1, 0]), **about)
    check_classes(np.array([0, 1, 3]), np.array([0]), **about)
    assert lacking(np.array([0]), np.array([0, 1, 3]), about["classes"]) == "2 classes (bee, dog)"
    with pytest.raises(UserError, match=r"data.train_split = 'a' lacks 1 class \(bee\) that data.test_split = 'b' has"):
        check_classes(np.array([0]), np.array([0, 1]), **about)
    with pytest.raises(UserError, match=r"data.test_split = 'b': 1 of 2 images have no label"):
        check_classes(np.array([0]), np.array([0, -1]), **about)


def test_collapse_statistics_equal_their_definitions_in_float64():
    rng = np.random.default_rng(0)
    objects, count, width = 40, 5, 12
    centres = rng.normal(size=(objects, width)) * np.exp(-np.arange(width) / 3)
    views = centres[:, None] + 0.3 * rng.normal(size=(objects, count, width)) + 1.0
    found = jnp.asarray(views, jnp.float32)

    sphere = views / np.linalg.norm(views, axis=-1, keepdims=True)
    pairs = [(q, r) for q in range(count) for r in range(count) if q != r]
    expected = np.mean([np.square(sphere[:, q] - sphere[:, r]).sum(-1) for q, r in pairs])
    assert collapse.alignment(found) == pytest.approx(expected, rel=1e-4)

    first = sphere[:, 0]
    potential = [np.exp(-2 * np.square(first[i] - first[j]).sum()) for i in range(objects) for j in range(i)]
    assert collapse.uniformity(found[:, 0]) == pytest.approx(np.log(np.mean(potential)), rel=1e-4)

    means = views.mean(1)
    between = np.cov(means.T, bias=True)
    within = np.mean([np.outer(x, x) for x in (views - means[:, None]).reshape(-1, width)], axis=0)
    values = scipy.linalg.eigh(between, within + 1e-4 * np.eye(width), eigvals_only=True)
    share = np.maximum(values, 1e-300) / values.sum()
    assert collapse.lidar(found) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-3)

    np.testing.assert_allclose(
        np.square(collapse.spectrum(found[:, 0])), np.linalg.eigvalsh(np.cov(views[:, 0].T, bias=True))[::-1], rtol=1e-3
    )


def test_collapse_is_seen():
    same = jnp.ones((10, 4, 6)) + 1e-4 * jax.random.normal(jax.random.key(0), (10, 4, 6))
    assert collapse.uniformity(same[:, 0]) == pytest.approx(0, abs=1e-5)
    line = jnp.arange(10.0)[:, None, None] * jnp.ones((10, 4, 6)) + 0.1 * jax.random.normal(
        jax.random.key(0), (10, 4, 6)
    )
    assert collapse.lidar(line) < 1.5


def test_alarms_name_the_step_since_which_collapse_showed():
    cosines = [0.9, 0.99, 0.9, 0.99, 0.999]
    lines = [{"step": 10 * i, "rep/cosine": c, "rep/std": 1.0, "rep/rank": 5 - i} for i, c in enumerate(cosines)]
    found = collapse.first_alarms([*lines, {"step": 45, "eval/knn": 0.5}])
    assert found["1 - rep/cosine"]["alarm since step"] == 30
    assert found["rep/std"]["alarm since step"] is None
    assert found["rep/rank"] == {"start": 5, "end": 1, "limit": 2.5, "alarm since step": 30}


@pytest.mark.parametrize("old, new", [(14, 16), (14, 28), (16, 7), (2, 5)])
def test_positions_are_interpolated_as_pytorch_does(old, new):
    table = sincos_positions(16, (old, old))
    square = torch.tensor(table).reshape(1, old, old, 16).permute(0, 3, 1, 2).double()
    expected = torch.nn.functional.interpolate(square, scale_factor=new / old, mode="bicubic")
    assert expected.shape[-1] == new
    expected = expected.permute(0, 2, 3, 1).reshape(new * new, 16)
    np.testing.assert_allclose(interpolate_positions(table, (old, old), (new, new)), expected, atol=1e-6)
