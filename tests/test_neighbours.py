"""Pictures of neighbours and maps of features: against NumPy, with and without labels, on eight devices and on one."""

import dataclasses
import re

import jax
import matplotlib
import numpy as np
import pyarrow.parquet
import pytest
import sklearn.datasets
from etils import epath
from PIL import Image
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from cjepa_jax import plots, pretrained
from cjepa_jax.config import Mesh, Model
from cjepa_jax.data import decode, sources
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate import embedding, feature_map, report
from cjepa_jax.evaluate.base import ERROR
from cjepa_jax.evaluate.features import Extractor
from cjepa_jax.evaluate.neighbours import without
from cjepa_jax.models.vit import build_encoder
from cjepa_jax.train import sharding
from tests.test_evaluate import freeze, settings

TRAIN, TEST = 90, 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random encoder of images of 8 x 8 pixels."""
    model = Model(size="16x1x2", patch_size=4, init="fan_in", dtype="float32", layers="unrolled", remat="none")
    params = build_encoder(model, grid=(2, 2)).init(jax.random.key(0), np.zeros((1, 4, 48), np.float32))["params"]
    parts = {"target_encoder": jax.device_get(params)}
    path = epath.Path(tmp_path_factory.mktemp("runs")) / "run"
    pretrained.save(path, pretrained.Pretrained(model, None, 8, (0.5,) * 3, (0.25,) * 3, 7, parts))
    return path


@pytest.fixture
def load(checkpoint, tmp_path):
    """The checkpoint as the command loads it, on random images, labelled or not."""
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (TRAIN, 8, 8, 3), np.uint8),
        "test_images": rng.integers(0, 256, (TEST, 8, 8, 3), np.uint8),
    }
    np.savez(tmp_path / "bare.npz", **arrays)
    labels = {"train_labels": rng.integers(0, 3, TRAIN), "test_labels": rng.integers(0, 3, TEST)}
    np.savez(tmp_path / "labelled.npz", **arrays, **labels)

    def load(name, *, train="train", test="test", baselines=False, **overrides):
        data = {"source": "npz", "data_dir": str(tmp_path / f"{name}.npz"), "train_split": train, "test_split": test}
        chosen = settings(
            **{f"data__{key}": value for key, value in data.items()}, data__crop_fraction=1.0, **overrides
        )
        return chosen, freeze(checkpoint, "target_encoder", chosen, baselines=baselines), arrays | labels

    return load


def rows_of(entries) -> np.ndarray:
    """The numbers of the images, with which their names end."""
    return np.array([int(re.findall(r"\d+", entry["image"])[-1]) for entry in entries])


def test_neighbours_are_those_of_a_plain_search(load, tmp_path):
    """By cosine in float64; and one device finds the same ones as eight."""
    chosen, frozen, arrays = load("labelled", neighbours__nearest=5, neighbours__images=4)
    assert frozen.mesh.size == 8
    rows = chosen.neighbours.run(frozen, tmp_path / "x")["trained"]
    train, test = (
        found["trained"].last(1).features.astype(np.float64)
        for found in (frozen.train_features, frozen.test_features)  # all images, in order
    )
    cosine = test @ train.T / np.linalg.norm(test, axis=1)[:, None] / np.linalg.norm(train, axis=1)
    near = np.argsort(-cosine, axis=1)[:, :5]
    shown = rows["shown"]
    assert rows_of(shown).tolist() == [0, 10, 19, 29]  # evenly spread
    for i, entry in zip((0, 10, 19, 29), shown, strict=True):
        assert rows_of(entry["neighbours"]).tolist() == near[i].tolist()
        np.testing.assert_allclose([one["cosine"] for one in entry["neighbours"]], cosine[i, near[i]], atol=1e-5)
        assert entry["class"] == str(arrays["test_labels"][i])
        assert [one["class"] for one in entry["neighbours"]] == arrays["train_labels"][near[i]].astype(str).tolist()
    shares = (arrays["train_labels"][near] == arrays["test_labels"][:, None]).mean(axis=1)
    assert rows["same class"] == pytest.approx(shares.mean()) and 0 < shares.mean() < 1
    assert rows[ERROR]["same class"] == pytest.approx(shares.std(ddof=1) / TEST**0.5)
    assert rows["cosine of neighbours"] == pytest.approx(np.take_along_axis(cosine, near, axis=1).mean(), abs=1e-5)
    with Image.open(tmp_path / "x.neighbours.png") as picture:
        assert picture.size[0] > 800 and picture.size[1] > 700  # six images wide, four high

    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    params = jax.device_put(frozen.params, sharding.replicated(mesh))
    extractor = Extractor(frozen.extractor.encoders, mesh, batch_size=60)
    alone = chosen.neighbours.run(dataclasses.replace(frozen, params=params, extractor=extractor), None)["trained"]
    for here, there in zip(alone["shown"], shown, strict=True):
        assert rows_of(here["neighbours"]).tolist() == rows_of(there["neighbours"]).tolist()
    assert alone["same class"] == rows["same class"]


def test_no_image_is_its_own_neighbour_and_few_are_enough(load, tmp_path, monkeypatch):
    """Five images without labels, where ten are asked for, with eight neighbours each."""
    drawn, draw = {}, plots.panels
    monkeypatch.setattr(
        plots, "panels", lambda rows, path, title: (drawn.update({title: rows}), draw(rows, path, title=title))
    )
    chosen, frozen, arrays = load("bare", train="train[:5]", test="train[:5]", neighbours__images=10)
    chosen.neighbours.check(frozen)
    rows = chosen.neighbours.run(frozen, tmp_path / "x")["trained"]
    assert rows.keys() == {"cosine of neighbours", "shown"} and len(rows["shown"]) == 5
    for i, entry in enumerate(rows["shown"]):
        assert sorted(rows_of(entry["neighbours"])) == [j for j in range(5) if j != i] and entry["class"] == ""
    ((title, panels),) = drawn.items()
    assert "run, step 7, target_encoder" in title and "green" not in title
    assert all(panel.agrees is None for row in panels for panel in row) and len(panels[0]) == 5
    np.testing.assert_array_equal(panels[2][0].image, arrays["train_images"][2])
    first = rows_of(rows["shown"][2]["neighbours"])[0]
    np.testing.assert_array_equal(panels[2][1].image, arrays["train_images"][first])
    with Image.open(tmp_path / "x.neighbours.png") as picture:
        assert picture.size[0] > 700


def test_a_farthest_one_is_left_out_where_the_image_itself_is_not_found():
    near = np.array([[7, 0, 3], [1, 7, 4]])
    cosine = np.array([[1.0, 1.0, 0.5], [0.9, 0.8, 0.7]])
    cosine, near = without(near == np.array([[0], [9]]), cosine, near)
    assert near.tolist() == [[7, 3], [1, 7]] and cosine.tolist() == [[1.0, 0.5], [0.9, 0.8]]


def test_a_sample_knows_which_images_it_could_read(load, monkeypatch):
    _, frozen, arrays = load("labelled", baselines=True, data__max_bad_fraction=1.0)
    read = sources.Source.read

    def sometimes(self, index):
        if index % 3 == 0:
            raise decode.UnreadableError("torn")
        return read(self, index)

    monkeypatch.setattr(sources.Source, "read", sometimes)
    indices, found = frozen.sample(frozen.train, 60)
    assert 30 < len(indices) < 60 and (indices % 3 != 0).all() and (np.diff(indices) > 0).all()
    pixels = arrays["train_images"][indices].reshape(len(indices), -1) / 255
    np.testing.assert_allclose(found["raw pixels"].features, pixels, atol=1e-6)
    assert found["trained"].labels.tolist() == arrays["train_labels"][indices].tolist()
    monkeypatch.setattr(sources.Source, "read", lambda self, index: sometimes(self, 0))
    with pytest.raises(UserError, match="none of 30 test images can be read"):
        frozen.sample(frozen.test, 60)


def test_a_map_has_the_principal_components_and_is_repeatable(load, tmp_path, monkeypatch):
    drawn, draw = [], plots.maps
    monkeypatch.setattr(
        plots,
        "maps",
        lambda rows, names, path, title: (drawn.append((rows, names)), draw(rows, names, path, title=title)),
    )
    for name in ("labelled", "bare"):
        chosen, frozen, arrays = load(name, map__images=25)
        chosen.map.check(frozen)
        rows = chosen.map.run(frozen, tmp_path / name)
        with Image.open(tmp_path / f"{name}.map.png") as picture:
            assert picture.size[0] > 350 and picture.size[1] > 700
    indices, found = frozen.sample(frozen.test, 25)
    features = found["trained"].features.astype(np.float64)
    u, s, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    assert rows["trained"]["variance of two components"] == pytest.approx((s[:2] ** 2).sum() / (s**2).sum(), abs=1e-5)
    (labelled, names), (bare, no_names) = drawn
    assert names.tolist() == arrays["test_labels"][indices].astype(str).tolist() and set(no_names) == {""}
    (points,) = bare["PCA"].values()
    np.testing.assert_allclose(np.abs(points), np.abs(u[:, :2] * s[:2]), atol=1e-4)
    for kind in ("PCA", "t-SNE"):  # labels play no part, and the second time is as the first
        np.testing.assert_array_equal(*(next(iter(rows[kind].values())) for rows in (labelled, bare)))
    assert np.isfinite(next(iter(bare["t-SNE"].values()))).all()


def test_a_map_does_not_depend_on_the_number_of_threads(monkeypatch):
    features = sklearn.datasets.load_digits().data[:300].astype(np.float32)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # otherwise there are no more than cores
    with threadpool_limits(3):
        plain = TSNE(perplexity=10, init="pca", random_state=0).fit_transform(features)
        several = feature_map.embedded(features, perplexity=10, seed=0)
    with threadpool_limits(1):
        one = TSNE(perplexity=10, init="pca", random_state=0).fit_transform(features)
    np.testing.assert_array_equal(several, one)
    assert (plain != one).any()  # which is what it would be without care


def test_features_that_are_all_the_same_are_one_point():
    same = np.ones((6, 4), np.float32)
    points, share = feature_map.principal(same)
    assert share == 0 and not points.any() and not feature_map.embedded(same, perplexity=30, seed=0).any()
    assert feature_map.embedded(np.eye(4, dtype=np.float32), perplexity=30, seed=0).shape == (4, 2)


def test_only_the_commonest_classes_have_a_colour(tmp_path, monkeypatch):
    """Of 25 classes five have one image only and are shown in grey, as is an image without a label."""
    found, legend = [], plots.Figure.legend
    monkeypatch.setattr(
        plots.Figure,
        "legend",
        lambda self, handles, labels, **more: found.append(labels) or legend(self, handles, labels, **more),
    )
    names = np.array([f"class {i:02}" for i in range(25)] + [f"class {i:02}" for i in range(20)] + [""], object)
    points = np.random.default_rng(0).normal(size=(46, 2))
    plots.maps({"PCA": {"a": points}}, names, epath.Path(tmp_path / "many.png"), title="")
    assert found == [["other classes", *(f"class {i:02}" for i in range(20))]]


@pytest.mark.parametrize(
    "method, options, says",
    [
        ("map", {"test": "test[:3]"}, r"data.test_split = 'test\[:3\]': a map needs 4 images, there are 3"),
        ("neighbours", {"train": "train[:1]", "test": "train[:1]"}, r"data.train_split = 'train\[:1\]' has one image"),
        ("map", {"map__images": 3}, r"map.images must be in \[4, 20000\], got 3"),
        ("neighbours", {"neighbours__nearest": 0}, r"neighbours.nearest must be in \[1, 100\], got 0"),
    ],
)
def test_what_does_not_fit_is_named(load, method, options, says):
    with pytest.raises(UserError, match=says):
        chosen, frozen, _ = load("bare", **options)
        chosen.evaluators[method].check(frozen)


def test_names_that_matplotlib_cannot_write_as_they_are_are_drawn(tmp_path):
    """Of two classes that begin alike, the ends do not matter, but a long word is not left out."""
    names = ["caf\udce9", "a$_$b", "american_staffordshire_terrier", "\udcff"]
    assert [plots._text(name, 20) for name in names] == [r"caf\xe9", r"a\$_\$b", "american_stafford...", r"\xff"]
    image, path = np.zeros((8, 8, 3), np.uint8), epath.Path(tmp_path / "x.png")
    plots.panels([[plots.Panel(image, "\n".join(names))]], path, title=names[0] + names[1])
    plots.maps({"PCA": {"a": np.eye(4)[:, :2]}}, np.array(names), path, title=names[1])
    arrays = {"features": np.zeros((2, 3), np.float32), "names": np.array(names[:2])}
    embedding.write(
        epath.Path(tmp_path / "x.parquet"), arrays | {"labels": np.array([0, -1]), "classes": np.array(names[:1])}
    )
    assert pyarrow.parquet.read_table(tmp_path / "x.parquet").column("class").to_pylist() == [r"caf\xe9", None]


def test_pictures_leave_matplotlibs_settings_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    plots.spectra({"trained": np.ones(3)}, epath.Path(tmp_path / "x.png"))
    assert dict(matplotlib.rcParams) == before and not before["axes.grid"]


def test_counts_are_written_in_full():
    assert report._cell({"images": 12_345}, "images", percent=False) == "12345"
    assert report._cell({"std": 0.123456}, "std", percent=False) == "0.1235"
