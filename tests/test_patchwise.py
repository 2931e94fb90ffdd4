"""Pictures of attention and components, and DAVIS, of whole checkpoints: what is shown, and what is refused."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
import torch
from etils import epath
from PIL import Image
from test_davis import write

from cjepa_jax import plots, pretrained
from cjepa_jax.config import Model
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate import attention as maps
from cjepa_jax.evaluate import davis
from cjepa_jax.models.layer_norm import layer_norm
from cjepa_jax.models.vit import Block, build_encoder, interpolate_positions, patchify, sincos_positions
from tests.test_evaluate import freeze, settings

SIZE = 16


@pytest.fixture
def save(tmp_path):
    """Writes a checkpoint of random encoders."""

    def save(name, *, patch_size=4, channels=3, towers=("target_encoder", "encoder"), seed=0):
        model = Model(
            size="16x2x2", patch_size=patch_size, init="fan_in", dtype="float32", layers="scanned", remat="none"
        )
        encoder = build_encoder(model, grid=(SIZE // patch_size, SIZE // patch_size))
        patches = np.zeros((1, math.prod(encoder.grid), patch_size**2 * channels), np.float32)
        keys = jax.random.split(jax.random.key(seed), len(towers))
        params = {tower: jax.jit(encoder.init)(key, patches)["params"] for tower, key in zip(towers, keys, strict=True)}
        mean, std = (0.5,) * channels, (0.25,) * channels
        networks = pretrained.Pretrained(model, None, SIZE, mean, std, step=7, params=jax.device_get(params))
        pretrained.save(tmp_path / name, networks)
        return tmp_path / name

    return save


@pytest.fixture
def load(tmp_path):
    """A checkpoint as the command loads it, on 20 images."""
    images = np.random.default_rng(0).integers(0, 256, (20, SIZE, SIZE, 3), np.uint8)
    np.savez(tmp_path / "images.npz", train_images=images, test_images=images[::-1])

    def load(checkpoint, *, baselines=True, **overrides):
        data = {"source": "npz", "data_dir": str(tmp_path / "images.npz"), "train_split": "train", "test_split": "test"}
        chosen = settings(
            **{f"data__{key}": value for key, value in data.items()}, data__crop_fraction=1.0, **overrides
        )
        return chosen, freeze(checkpoint, "target_encoder", chosen, baselines=baselines), images[::-1]

    return load


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: file's name -> (columns, title); it is drawn all the same."""
    found, draw = {}, plots.side_by_side

    def keep(columns, path, *, title, under=None):
        found[path.name] = columns, title
        if under is not None:
            found[f"under {path.name}"] = under
        draw(columns, path, title=title, under=under)

    monkeypatch.setattr(plots, "side_by_side", keep)
    return found


def test_two_checkpoints_side_by_side(save, load, drawn, tmp_path):
    first, second = save("first"), save("second", patch_size=8, seed=1)
    chosen, frozen, images = load(first, attention__other=str(second), attention__images=3)
    rows = chosen.attention.run(frozen, tmp_path / "x")
    names = [f"{name}, step 7\n{kind} encoder" for name in ("first", "second") for kind in ("target", "context")]
    assert [*rows] == [name.replace("\n", ", ") for name in names] + ["untrained"]
    attended, title = drawn["x.attention.png"]
    components, _ = drawn["x.components.png"]
    assert [*attended] == [*components] == ["image", *names, "untrained"]
    assert "query: mean over all patches" in title
    np.testing.assert_array_equal(attended["image"], images[[0, 10, 19]])  # evenly spread

    checkpoints = [(first, 4), (first, 4), (second, 8), (second, 8)]
    for name, tower, (path, patch) in zip(names, ("target_encoder", "encoder") * 2, checkpoints, strict=True):
        networks = pretrained.load(path, (tower,))
        model = Model(**vars(networks.model) | {"layers": "unrolled"})
        pixels = (images[[0, 10, 19]] / 255 - 0.5) / 0.25
        encoder = build_encoder(model, grid=(SIZE // patch, SIZE // patch))
        look = jax.jit(functools.partial(maps.last_layer, encoder))
        weights, found = look(networks.params[tower], patchify(pixels.astype(np.float32), patch))
        expected = np.asarray(weights).mean(axis=(1, 2)) * weights.shape[-1]
        large = torch.nn.functional.interpolate(
            torch.tensor(expected).reshape(3, 1, *encoder.grid), size=SIZE, mode="bilinear"
        )[:, 0]
        np.testing.assert_allclose(attended[name], large, atol=1e-5)
        colours = maps.component_colours(np.asarray(found))[0]
        np.testing.assert_allclose(components[name].reshape(colours.shape), colours, atol=1e-3)
        p = np.asarray(weights, np.float64)
        entropy = -(p * np.log(p)).sum(axis=-1).mean() / np.log(p.shape[-1])
        assert rows[name.replace("\n", ", ")]["entropy of attention / log N"] == pytest.approx(entropy, abs=1e-5)
    overlaid, _ = drawn["x.attention_overlaid.png"]
    assert [*overlaid] == [*attended] and all(overlaid[name] is attended[name] for name in attended)
    np.testing.assert_array_equal(drawn["under x.attention_overlaid.png"], images[[0, 10, 19]])
    for kind in ("attention", "attention_overlaid", "components"):
        with Image.open(tmp_path / f"x.{kind}.png") as picture:
            assert picture.size[0] > 500

    columns = ("other.target_encoder", "target_encoder", "encoder")  # as in the paper's figures
    some = dataclasses.replace(chosen.attention, columns=columns).run(frozen, None)
    shown = [names[i].replace("\n", ", ") for i in (2, 0, 1)]
    assert [*some] == shown
    for name in shown:
        assert some[name]["entropy of attention / log N"] == rows[name]["entropy of attention / log N"]


def test_runs_whose_folders_have_one_name_are_told_apart(tmp_path):
    runs = [epath.Path(f"/runs/{name}") for name in ("ijepa/seed0", "cjepa/seed0", "seed0", "other")]
    assert maps.run_names([runs[0], runs[1]]) == ["ijepa/seed0", "cjepa/seed0"]
    assert maps.run_names([runs[0], runs[3]]) == ["seed0", "other"]
    assert maps.run_names([runs[0], runs[2]]) == ["ijepa/seed0", "runs/seed0"]
    assert maps.run_names([runs[0], runs[0]]) == maps.run_names(runs[:1]) * 2 == ["seed0", "seed0"]  # of two steps


def test_an_image_shines_through_a_map(tmp_path):
    """Of a map with one value only the halves of the image differ; without the image they are alike."""
    halves = np.zeros((1, 8, 8, 3), np.uint8)
    halves[:, :, 4:] = 255
    found = {}
    for name, under in (("bare", None), ("overlaid", halves)):
        plots.side_by_side({"map": np.ones((1, 8, 8))}, tmp_path / f"{name}.png", title="", under=under)
        with Image.open(tmp_path / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        _, height, width = np.nonzero((pixels < 250).any(axis=-1)[None])
        middle = pixels[int(np.median(height)), int(np.quantile(width, 0.1)) : int(np.quantile(width, 0.7))]
        found[name] = len(np.unique(middle, axis=0))
    assert found["bare"] == 1 and found["overlaid"] > 1


def test_colours_are_components_stretched_but_for_a_patch_in_a_hundred_at_either_end():
    features = np.random.default_rng(0).standard_normal((4, 100, 6)) * [1, 2, 3, 4, 5, 6]
    colours, shares = maps.component_colours(features)
    flat = features.reshape(400, 6)
    flat = flat - flat.mean(axis=0)
    variances, axes = np.linalg.eigh(flat.T @ flat)
    for component in range(3):
        axis = axes[:, -1 - component]
        along = flat @ (axis * np.sign(axis[np.abs(axis).argmax()]))
        low, high = np.quantile(along, [0.01, 0.99])
        wanted = ((along - low) / (high - low)).clip(0, 1)
        np.testing.assert_allclose(colours[..., component], wanted.reshape(4, 100), atol=1e-6)
        assert ((wanted == 0).sum(), (wanted == 1).sum()) == (4, 4)
        assert shares[component] == pytest.approx(variances[-1 - component] / variances.sum())


def test_the_query_is_a_patch(save, load, drawn, tmp_path):
    """Its attention is shown, it is outlined and named; a checkpoint of one encoder shows one."""
    chosen, frozen, images = load(save("only", towers=("target_encoder",)), baselines=False, attention__query=(1, 2))
    rows = chosen.attention.run(frozen, tmp_path / "x")
    assert [*rows] == ["only, step 7, target encoder"]
    columns, title = drawn["x.attention.png"]
    assert "query: patch (1, 2), outlined" in title
    clean = images[np.linspace(0, 19, 8).round().astype(int)]
    edge = np.zeros((SIZE, SIZE), bool)
    edge[4:8, 8:12], edge[5:7, 9:11] = True, False
    np.testing.assert_array_equal(columns["image"], np.where(edge[..., None], (255, 0, 0), clean))
    networks = frozen.origin.networks
    encoder = build_encoder(dataclasses.replace(networks.model, layers="unrolled"), grid=(4, 4))
    patches = patchify(((clean / 255 - 0.5) / 0.25).astype(np.float32), 4)  # not of what is outlined
    look = jax.jit(functools.partial(maps.last_layer, encoder))
    weights, _ = look(networks.params["target_encoder"], patches)
    from_query = np.asarray(weights).mean(axis=1)[:, 1 * 4 + 2] * 16  # not what attends to it
    expected = maps.enlarged(from_query, grid=(4, 4), shape=(SIZE, SIZE))
    np.testing.assert_allclose(columns["only, step 7\ntarget encoder"], expected, atol=1e-5)


@pytest.mark.parametrize(
    "other, overrides, says",
    [
        (
            {},
            {"attention__query": (4, 0)},
            r"attention\.query = \(4, 0\) is not a patch: rows are 0 to 3, ",
        ),
        ({}, {"attention__query": (0, -1)}, r"attention\.query must be in \[0, 8191\], got -1"),
        ({"patch_size": 8}, {"attention__query": (0, 0)}, r"grids differ, 2x2 and 4x4 patches"),
        ({"channels": 1}, {}, r"second takes images of 1 channels, the first one of 3"),
        ({}, {"attention__query": (1,)}, r"attention\.query must be \(\) or \(row, column\), got \(1,\)"),
        ({}, {"attention__images": 0}, r"attention\.images must be in \[1, 1000\], got 0"),
        ({}, {"attention__columns": ("encodr",)}, r"attention\.columns: 'encodr' is not known; did you mean 'encoder'"),
        ({}, {"attention__columns": ("encoder", "encoder")}, r"attention\.columns names a column twice"),
        (
            {"towers": ("target_encoder",)},
            {"attention__columns": ("other.encoder",)},
            r"attention\.columns: there is no other.encoder, but target_encoder, encoder, other\.target_encoder, untr",
        ),
        (
            {},
            {"attention__columns": ("other.encoder",), "attention__other": ""},
            r"there is no other.encoder, but .*; --config\.attention\.other=DIR names the second checkpoint",
        ),
        (
            {},
            {"attention__columns": ("untrained",), "baselines": False},
            r"there is no untrained, but target_encoder, ",
        ),
        ({}, {"attention__other": "first"}, r"--config\.attention\.other .*first is the checkpoint itself"),
    ],
)
def test_what_does_not_fit_is_named(save, load, tmp_path, monkeypatch, other, overrides, says):
    monkeypatch.chdir(tmp_path)
    first, second = save("first"), save("second", **other)
    with pytest.raises(UserError, match=says):
        chosen, frozen, _ = load(first, **{"attention__other": str(second)} | overrides)
        chosen.attention.run(frozen, tmp_path / "x")


def test_davis_of_a_checkpoint(save, load, drawn, tmp_path):
    """On all devices; wide frames; the encoder's features are those of its positions, interpolated."""
    write(tmp_path / "davis", "bands")
    checkpoint = save("run")
    chosen, frozen, _ = load(checkpoint, davis__data_dir=str(tmp_path / "davis"), davis__short_side=64)
    rows = chosen.davis.run(frozen, tmp_path / "x")
    assert {*rows} == {"trained", "untrained", "raw pixels"}
    for row in rows.values():
        assert row["J&F"] == pytest.approx((row["J"] + row["F"]) / 2) and 0 < row["J&F"] <= 1
        assert [*row["objects"]] == ["bands"] and len(row["objects"]["bands"]["J"]) == 2
    assert rows["raw pixels"]["J&F"] == 1  # a patch looks like itself and no other
    columns, title = drawn["x.davis.png"]
    assert "bands" in title and [*columns] == ["first frame, given", *(f"{i}/3 of the video" for i in (1, 2, 3))]
    assert {frame.shape for frames in columns.values() for frame in frames} == {(64, 128, 3)}


def test_frames_are_encoded_at_positions_interpolated_as_pytorch_does(save, load):
    """From 4 x 4 patches to 16 x 32: with PyTorch's table added to the patches, and none of its own, the same."""
    checkpoint = save("run")
    _, frozen, _ = load(checkpoint, baselines=False)
    frames = np.random.default_rng(0).integers(0, 256, (8, 64, 128, 3), np.uint8)
    found = davis.patch_features(frozen, "trained")(frozen.params["trained"], frames)

    table = torch.tensor(sincos_positions(16, (4, 4))).T.reshape(1, 16, 4, 4)
    wide = torch.nn.functional.interpolate(table, size=(16, 32), mode="bicubic")[0].reshape(16, 512).T.numpy()
    np.testing.assert_allclose(interpolate_positions(sincos_positions(16, (4, 4)), (4, 4), (16, 32)), wide, atol=1e-5)
    params = pretrained.load(checkpoint, ("target_encoder",)).params["target_encoder"]
    x = (
        patchify((frames / 255 - 0.5).astype(np.float32) / 0.25, 4) @ params["embed"]["kernel"]
        + params["embed"]["bias"]
    )
    x = x + wide
    for i in range(2):
        x = Block(2, 4, "fan_in", np.dtype("float32")).apply({"params": params[f"block{i:02}"]}, x)
    np.testing.assert_allclose(found, layer_norm(x, params=params["norm"]), atol=1e-4)
    pixels = davis.patch_features(frozen, "raw pixels")({}, frames)
    np.testing.assert_allclose(pixels, patchify((frames / 255 - 0.5) / 0.25, 4), atol=1e-5)
