"""Images that are not square, from the pixels to the checkpoints of other programs."""

import functools
import json
import math
import random
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from etils import epath
from PIL import Image

import cjepa_jax
from cjepa_jax import plots, pretrained
from cjepa_jax.batch import Batch
from cjepa_jax.config import Data, undivided
from cjepa_jax.data import decode, pipeline
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate import decoder
from cjepa_jax.evaluate.checkpoint import judge
from cjepa_jax.methods import METHODS
from cjepa_jax.methods.cjepa import CJEPA
from cjepa_jax.methods.supervised import Supervised
from cjepa_jax.models.masking import Mask, Masks, context_tokens, sample_masks, target_tokens
from cjepa_jax.models.vit import interpolate_positions, patchify, sincos_positions
from cjepa_jax.settings import parse
from cjepa_jax.train.loop import train
from tests import commands, helpers
from tests.conftest import small
from tests.test_convert import (
    MEAN,
    NAMES,
    ODD,
    STD,
    assert_close,
    features,
    features_of_ours,
    features_of_timm,
    features_of_transformers,
    make_networks,
    to,
)
from tests.test_decode import PHOTOS, psnr, torchvision_box
from tests.test_evaluate import settings

HEIGHT, WIDTH = 8, 16
RUN = {"data__image_size": HEIGHT, "data__image_width": WIDTH, "data__mean": MEAN, "data__std": STD}
RUN |= {"data__source": "npz", "data__flip": 0.5, "optim__epochs": 3.0, "optim__warmup_epochs": 1.0}
RUN |= {"checkpoint__every": 4, "log__every": 4}  # of 12 steps


# Positions


def test_positions_are_those_of_row_and_column():
    table = sincos_positions(16, (3, 5))
    assert table.shape == (15, 16)
    for row in range(3):
        for column in range(5):
            angles = [[place / 10_000 ** (i / 4) for i in range(4)] for place in (column, row)]
            wanted = [f(angle) for half in angles for f in (math.sin, math.cos) for angle in half]
            np.testing.assert_allclose(table[row * 5 + column], wanted, atol=1e-6)


@pytest.mark.parametrize("old, new", [((4, 8), (6, 5)), ((5, 2), (5, 7)), ((3, 3), (2, 9))])
def test_positions_are_interpolated_as_pytorch_does(old, new):
    table = sincos_positions(16, old)
    maps = torch.tensor(table).reshape(1, *old, 16).permute(0, 3, 1, 2).double()
    wanted = torch.nn.functional.interpolate(maps, size=new, mode="bicubic", align_corners=False)
    found = interpolate_positions(table, old, new)
    np.testing.assert_allclose(found, wanted[0].permute(1, 2, 0).reshape(-1, 16), atol=1e-6)


# Masks; those of tests/test_masking.py are drawn on rectangles, too


@pytest.mark.parametrize("grid", [(14, 28), (28, 14), (3, 6)])
def test_the_context_block_can_cover_the_whole_image(grid):
    mask = Mask(recipe="corrected", context_scale=(1.0, 1.0), min_keep=1, targets=2, context_tokens=math.prod(grid))
    sample = jax.jit(functools.partial(sample_masks, mask=mask, grid=grid, batch=64))
    found = jax.device_get(sample(jax.random.key(0)))
    for i in range(64):
        context, targets = found.context_idx[i][found.context_valid[i]], found.target_idx[i][found.target_valid[i]]
        assert sorted({*context.tolist(), *targets.tolist()}) == list(range(math.prod(grid)))


@pytest.mark.parametrize("grid", [(14, 28), (6, 3)])
def test_released_masks_reach_all_but_the_last_row_and_column(grid):
    mask = Mask(recipe="released", min_keep=1, targets=2, context_tokens=0)
    sample = jax.jit(functools.partial(sample_masks, mask=mask, grid=grid, batch=32))
    reached = np.zeros(math.prod(grid), bool)
    for step in range(20):
        found = jax.device_get(sample(jax.random.key(step)))
        reached[found.target_idx[found.target_valid]] = True
        assert found.context_idx.shape[1] == context_tokens(mask, grid) and not reached.reshape(grid)[-1].any()
    wanted = np.zeros(grid, bool)
    wanted[:-1, :-1] = True
    np.testing.assert_array_equal(reached.reshape(grid), wanted)


@pytest.mark.parametrize("recipe", ["released", "corrected"])
def test_the_chosen_context_is_as_long_as_what_is_left_on_average(recipe):
    mask = Mask(recipe=recipe, context_tokens=0)
    whole = Mask(recipe=recipe, context_tokens=250)
    draw = jax.jit(lambda rng: sample_masks(rng, whole, grid=(12, 24), batch=64).context_valid.sum(axis=1))
    mean = np.mean([draw(jax.random.key(step)) for step in range(20)])
    assert 0 <= context_tokens(mask, (12, 24)) - mean < 8 + 2.5


# Crops


@pytest.mark.parametrize("height, width", [(16, 48), (40, 10)])
def test_random_crops_have_the_shape_of_the_result(height, width):
    """Their aspect ratios are as torchvision draws them from crop_ratio times that of the result."""
    data = Data(source="own", image_size=height, image_width=width, mean=MEAN, std=STD, crop_scale=(0.05, 0.1))
    drawn = []

    class Record(pipeline.Reader):
        def crops(self, index, choose_boxes):
            drawn.extend(choose(1000, 800) for choose in choose_boxes)
            return [np.zeros((1, 1, 3), np.uint8)] * len(choose_boxes), None

    view = pipeline.random_view(Record(None, data), seed=(0,))
    for index in range(1000):
        view(index)
    rng, aspect = random.Random(0), width / height
    ratio = 0.75 * aspect, 4 / 3 * aspect
    theirs = [torchvision_box(1000, 800, scale=(0.05, 0.1), ratio=ratio, rng=rng) for _ in range(1000)]
    found, wanted = (
        np.sort([(right - left) / (bottom - top) for left, top, right, bottom in boxes]) for boxes in (drawn, theirs)
    )
    assert 0.74 * aspect < found[0] and found[-1] < 1.35 * aspect
    shares = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(np.quantile(found, shares), np.quantile(wanted, shares), rtol=0.05)


@pytest.mark.parametrize(
    "size, aspect, fraction, box",
    [
        ((200, 100), 2.0, 1.0, (0, 0, 200, 100)),
        ((300, 100), 2.0, 1.0, (50, 0, 250, 100)),
        ((200, 200), 2.0, 0.5, (50, 75, 150, 125)),
        ((100, 400), 0.5, 0.875, (6, 112, 94, 287)),
        ((100, 90), 200.0, 0.01, (49, 44, 50, 45)),
    ],
)
def test_the_central_box_is_the_largest_of_its_shape(size, aspect, fraction, box):
    found = decode.central_box(*size, aspect=aspect, fraction=fraction)
    assert np.abs(np.subtract(found, box)).max() <= 1


def pillow(picture, box, shape):
    return np.asarray(Image.open(picture).convert("RGB").crop(box).resize(shape[::-1], Image.Resampling.BILINEAR))


@pytest.mark.parametrize("shape", [(24, 72), (72, 24), (200, 20)])
@pytest.mark.parametrize("box", [(0, 0, 640, 427), (100, 30, 132, 427), (40, 50, 640, 82)])
def test_crops_are_resized_as_torchvision_does(shape, box):
    """Bit for bit by Pillow; and near to that by the fast decoder, which may shrink neither side too far."""
    for path in PHOTOS:
        options = {"shape": shape, "channels": 3}
        crops = {
            kind: decode.crop(path.read_bytes(), lambda w, h: box, decoder=kind, **options)
            for kind in ("pillow", "fast")
        }
        wanted = pillow(path, box, shape)
        np.testing.assert_array_equal(crops["pillow"], wanted)
        assert psnr(crops["fast"], wanted) > 34


# What a config gives, and its errors


def rectangular(method, **overrides):
    values = {
        "method": method,
        "data": {"source": "digits", "image_size": 8, "image_width": 12, "mean": (0.5,), "std": (0.5,)},
        "model": {"size": "16x1x2", "patch_size": 2, "dtype": "float32"},
        "optim": {"epochs": 2.0, "warmup_epochs": 1.0},
    }
    if method == "cjepa":
        values |= {"predictor": {"width": 8, "depth": 1}, "mask": {"context_tokens": 0, "min_keep": 2}}
    if method == "supervised":
        values["model"]["encoder"] = "random"
        values["eval"] = {"every": 1}
    group = {"vicreg": "vicreg", "simsiam": "simsiam", "lejepa": "sigreg"}.get(method)
    values |= {group: {"projector": (8, 8)}} if group else {}
    for name, value in overrides.items():
        group, key = name.split("__")
        values[group][key] = value
    return parse(values, METHODS[method].settings)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_sees_height_and_width(method):
    """The features of an image change with its last column; and its sides cannot be exchanged."""
    config = rectangular(method)
    built = METHODS[method](config, classes=3) if method == "supervised" else METHODS[method](config)
    assert config.grid == built.encoder.grid == (4, 6)
    views = (len(built.views),) if len(built.views) > 1 else ()
    images = np.random.default_rng(0).integers(0, 256, (8, *views, 8, 12, 1), np.uint8)

    @jax.jit
    def run(images):
        params = built.init(jax.random.key(0))
        averages = {name: params[of] for name, of in built.averaged.items()}
        inputs = built.prepare(Batch(images, jnp.arange(8) % 3), jax.random.key(1))
        outputs = built.forward(params, averages, inputs)
        return built.loss(params, outputs)[0], outputs.get("features", outputs.get("logits"))

    loss, found = run(images)
    changed = images.copy()
    changed[..., -2:, :] = 255 - changed[..., -2:, :]
    assert np.isfinite(loss) and (np.asarray(run(changed)[1]) != found).any(axis=-1).all()
    with pytest.raises(TypeError, match="shape"):
        run(np.zeros((8, *views, 8, 8, 1), np.uint8))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side, wrong", [("image_size", 9), ("image_width", 13)])
def test_a_side_that_patches_do_not_divide_is_named(method, side, wrong):
    with pytest.raises(UserError, match=rf"data\.{side} = {wrong}\b"):
        METHODS[method](rectangular(method, **{f"data__{side}": wrong}))


def test_patches_that_follow_the_image_divide_both_sides():
    assert rectangular("cjepa", data__image_size=96, data__image_width=192, model__patch_size=0).grid == (12, 24)
    assert rectangular("vicreg", data__image_size=128, data__image_width=136, model__patch_size=0).grid == (16, 17)
    with pytest.raises(UserError, match=r"divides data\.image_size = 96 and data\.image_width = 99 into 8x8 patches"):
        rectangular("cjepa", data__image_size=96, data__image_width=99, model__patch_size=0)
    with pytest.raises(UserError, match=r"data\.image_size = 12 and data\.image_width = 640 into"):
        rectangular("cjepa", data__image_size=12, data__image_width=640, model__patch_size=0)


def test_too_low_a_grid_is_named():
    with pytest.raises(UserError, match="a grid of 1x6 patches is too small for masking"):
        CJEPA(rectangular("cjepa", data__image_size=2))
    with pytest.raises(UserError, match="4x6 patches holds: 15"):
        CJEPA(rectangular("cjepa", mask__context_tokens=16))


@pytest.mark.parametrize(
    "given, shape",
    [((0, 0), (32, 48)), ((0, 64), (32, 64)), ((24, 0), (24, 24)), ((24, 40), (24, 40))],
)
def test_fine_tuning_follows_the_checkpoint(given, shape):
    networks = make_networks()._replace(image_width=48)
    model = {"size": "", "patch_size": 0}
    data = {"source": "digits", "mean": MEAN, "std": STD, "image_size": given[0], "image_width": given[1]}
    config = parse({"data": data, "model": model, "eval": {"every": 1}}, Supervised.settings)
    assert Supervised.resolve(config, "x", networks).data.image_shape == shape


# A run and all that comes after it


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images of a bright stripe, whose place is the class, and noise."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 64), ("test", 24)):
        labels = np.arange(count) % 4
        images = rng.integers(0, 90, (count, HEIGHT, WIDTH, 3))
        for image, label in zip(images, labels, strict=True):
            image[:, 4 * label : 4 * label + 4] += 150
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    path = tmp_path_factory.mktemp("images") / "stripes.npz"
    np.savez(path, **arrays)
    return path, arrays


@pytest.fixture(scope="module")
def workdir(files, tmp_path_factory):
    """A run by the command."""
    path = tmp_path_factory.mktemp("runs") / "run"
    config = small(**RUN, data__data_dir=str(files[0]), data__batch_size=16)
    values = {
        **{f"data.{key}": getattr(config.data, key) for key in ("image_size", "image_width", "source", "data_dir")},
        **{"data.mean": MEAN, "data.std": STD, "data.batch_size": 16, "data.flip": 0.5},
        **{"model.size": "16x1x2", "predictor.width": 8, "predictor.depth": 1},
        **{"optim.epochs": 3.0, "optim.warmup_epochs": 1.0, "checkpoint.every": 4, "log.every": 4, "eval.every": 12},
    }
    arguments = [f"--config.{key}={value}" for key, value in values.items()]
    done = commands.run("cjepa_jax.main", "--config=configs/digits.py", f"--workdir={path}", *arguments)
    assert done.returncode == 0, done.stderr
    return epath.Path(path), config


def test_the_command_trains_and_evaluates(workdir):
    path, config = workdir
    lines = helpers.lines(path)
    assert lines[-1]["step"] == 12 and all(np.isfinite(line.get("loss/total", 0.0)) for line in lines)
    results = json.loads((path / "evaluation.json").read_text())["results"]
    assert results["knn"]["raw pixels"]["weighted"] > 0.9
    with Image.open(path / "masks.png") as picture:
        width, height = picture.size
    assert width / height == pytest.approx(6 * 17 / (6 * 11), rel=0.02)  # 6 rows of an image, its context and blocks
    loaded = pretrained.load(path, ("target_encoder",))
    assert loaded.image_shape == (HEIGHT, WIDTH) and loaded.grid == config.grid == (4, 8)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(workdir, tmp_path):
    path, config = workdir
    shutil.copytree(path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    resumed = train(config, epath.Path(tmp_path / "run"))
    straight = pretrained.load(path, ("encoder", "predictor", "target_encoder"))
    again = {**resumed.params, **resumed.averages}
    assert int(resumed.step) == straight.step == 12
    for name, params in straight.params.items():
        jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(again[name]))


def drawn_by(monkeypatch):
    """Collects what the pictures of evaluators show."""
    found = {}
    show = plots.side_by_side

    def keep(columns, path, **options):
        found[path.name.split(".", 1)[1]] = columns
        show(columns, path, **options)

    monkeypatch.setattr(plots, "side_by_side", keep)
    return found


@pytest.mark.slow
def test_evaluators_see_rectangles(workdir, files, tmp_path, monkeypatch):
    path, _ = workdir
    write_scenes(tmp_path, files[1]["train_images"][:12])
    shown = drawn_by(monkeypatch)
    chosen = settings(
        data__crop_fraction=1.0,
        attention__query=(3, 7),
        attention__images=3,
        segmentation__data_dir=str(tmp_path),
        segmentation__classes=2,
        segmentation__steps=3,
        collapse__objects=8,
        neighbours__images=2,
        neighbours__nearest=2,
    )
    wanted = ["knn", "collapse", "attention", "neighbours", "decoder", "segmentation"]
    judge(path, chosen, wanted, name="all")
    rows = {one: json.loads((path / "evaluation" / f"all.{one}.json").read_text())["results"][one] for one in wanted}
    assert rows["knn"]["raw pixels"]["weighted"] == 1.0
    assert 0 < rows["attention"][next(iter(rows["attention"]))]["entropy of attention / log N"] < 1

    maps, colours = shown["attention.png"], shown["components.png"]
    images = maps.pop("image")
    assert images.shape == (3, HEIGHT, WIDTH, 3) and (images[:, 6:, 14:] == (255, 0, 0)).all()
    assert (images[:, :6] != (255, 0, 0)).any(axis=-1).all()
    for name, found in maps.items():
        assert found.shape == (3, HEIGHT, WIDTH) and colours[name].shape == (3, 4, 8, 3)
    for name, found in shown["decoder.png"].items():
        assert found.shape[1:] == (HEIGHT, WIDTH, 3), name
    assert shown["segmentation.png"]["image"][0].shape == (20, 30, 3)
    assert (path / "evaluation" / "all.neighbours.png").exists()


def write_scenes(root, pictures):
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i, picture in enumerate(pictures):
            large = Image.fromarray(picture).resize((30, 20), Image.Resampling.NEAREST)
            large.save(root / f"images/{split}/{i}.png")
            mask = (np.asarray(large.convert("L")) > 120).astype(np.uint8) + 1
            Image.fromarray(mask).save(root / f"annotations/{split}/{i}.png")


def test_decoded_patches_come_back_to_their_places():
    images = np.random.default_rng(0).integers(0, 256, (2, HEIGHT, WIDTH, 3), np.uint8)

    frozen = types.SimpleNamespace(model=types.SimpleNamespace(patch_size=2))

    def pixels(params, images):
        return patchify(images.astype(jnp.float32) / 255, 2)

    identity = decoder.LinearMap(np.eye(12), np.zeros(12))
    np.testing.assert_allclose(decoder.decoded(frozen, pixels, {}, identity, images), images / 255, atol=1e-6)


def test_another_shape_than_in_training_interpolates(workdir, files):
    path, _ = workdir
    with pytest.raises(UserError, match=r"data\.image_width = 15 is not divisible by the encoder's patch size, 2"):
        judge(path, settings(data__image_width=15), ["knn"], name="x")
    judge(path, settings(data__image_size=6, data__image_width=0), ["knn"], name="square")
    judge(path, settings(data__image_size=12), ["knn"], name="high")
    shapes = {}
    for name in ("square", "high"):
        data = json.loads((path / "evaluation" / f"{name}.knn.json").read_text())["data"]
        shapes[name] = data["image_size"], data["image_width"]
    assert shapes == {"square": (6, 0), "high": (12, 16)}  # what is not given is the checkpoint's
    encoder = cjepa_jax.load(path)
    assert encoder.patches(np.zeros((1, 6, 20, 3), np.uint8)).shape == (1, 30, 16)
    with pytest.raises(UserError, match=r"data\.image_size = 7 is not divisible"):
        encoder(np.zeros((1, 7, 16, 3), np.uint8))


def test_features_of_a_run_are_those_of_timm_and_transformers(workdir, files, tmp_path):
    """Of real images, normalised by each program as its files say, and embedded by the command."""
    path, _ = workdir
    images = files[1]["test_images"]
    ours = np.asarray(cjepa_jax.load(path).patches(images))
    normalised = ((images / 255 - MEAN) / STD).astype(np.float32)
    to(path, tmp_path / "timm.safetensors", "timm")
    to(path, tmp_path / "folder", "transformers")
    assert_close(features_of_timm(tmp_path / "timm.safetensors", normalised, "16x1x2"), ours)
    assert_close(features_of_transformers(tmp_path / "folder", normalised), ours)

    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(tmp_path / "folder")
    fraction = json.loads((path / "config.json").read_text())["eval.crop_fraction"]
    assert processor.crop_size == {"height": HEIGHT, "width": WIDTH} and fraction == 1.0
    prepared = processor([Image.fromarray(image) for image in images], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(prepared.transpose(0, 2, 3, 1), normalised, atol=1e-5)
    assert "8 x 16 (height x width)\npixels" in (tmp_path / "folder" / "README.md").read_text()

    done = commands.run("cjepa_jax.embed", f"--checkpoint={path}", "--split=test", f"--output={tmp_path / 'f.npz'}")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "f.npz") as file:
        np.testing.assert_allclose(file["features"], ours.mean(axis=1), atol=1e-5)


# Formats


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The folder of networks of 32 x 48 pixels in every format that can hold them."""
    folder = tmp_path_factory.mktemp("wide")
    pretrained.save(epath.Path(folder / "ours"), make_networks()._replace(image_width=48))
    for kind in ("timm", "transformers"):
        to(folder / "ours", folder / NAMES[kind], kind)
    return folder


@pytest.mark.parametrize("source", ["orbax", "timm", "transformers"])
@pytest.mark.parametrize("kind", ["orbax", "timm", "transformers"])
def test_every_pair_of_formats_keeps_the_shape(wide, tmp_path, source, kind):
    images = np.random.default_rng(1).standard_normal((2, 32, 48, 3), np.float32)
    to(wide / NAMES[source], tmp_path / NAMES[kind], kind)
    found = features(kind, tmp_path / NAMES[kind], images, ODD)
    assert found.shape == (2, 24, 24)
    assert_close(found, features_of_ours(wide / "ours", images))
    if kind == "orbax":
        assert pretrained.load(epath.Path(tmp_path / NAMES[kind]), ()).image_shape == (32, 48)


def test_the_printed_line_gives_height_and_width(wide, tmp_path):
    said = to(wide / "ours", tmp_path / "a.safetensors", "timm")
    assert "img_size=(32, 48)" in said


def test_the_release_holds_squares_only(wide, tmp_path):
    with pytest.raises(UserError, match=r"square images only, and those of --input are 32 pixels high and 48 wide"):
        to(wide / "ours", tmp_path / "x.pth.tar", "ijepa")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "said, says",
    [
        (None, "has 24 positions, which are not a square"),
        ("[48, 48]", "images of 48 x 48 pixels do not have 24 patches of 8 pixels"),
        ("[48, 32]", "differs from the fixed sin-cos positions"),
        ("[32, 48, 1]", "no height and width"),
        ("[32, -48]", "no height and width"),
        ("[64, 24.0]", "no height and width"),
        ("32", "is damaged: it says image_size = 32"),
        ("[4, 384]", "do not have 24 patches"),
    ],
)
def test_a_file_must_say_a_shape_that_fits(wide, tmp_path, said, says):
    tensors = safetensors.numpy.load_file(wide / NAMES["timm"])
    metadata = {"num_heads": "3"} | ({} if said is None else {"image_size": said})
    safetensors.numpy.save_file(tensors, tmp_path / "in.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=says):
        to(tmp_path / "in.safetensors", tmp_path / "out", "orbax")
    assert not (tmp_path / "out").exists()


# Pictures and small things


def test_masks_are_drawn_on_their_patches(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    images = np.full((1, 8, 16, 1), 255, np.uint8)
    everywhere = np.ones((1, 2), bool)
    shown = Masks(np.array([[1, 15]]), everywhere, np.array([[[7, 31]]]), everywhere[None])
    plots.masks(images, shown, epath.Path(tmp_path / "masks.png"), grid=(4, 8))
    picture = figures[0].axes[0].images[0].get_array()[..., 0]
    high, wide = picture.shape[0], picture.shape[1] // 3
    parts = [picture[high - 8 :, i * wide : i * wide + 16] == 1 for i in range(3)]
    assert parts[0].all() and [part.sum() for part in parts[1:]] == [8, 8]
    assert parts[1][:2, 2:4].all() and parts[1][2:4, 14:].all()
    assert parts[2][:2, 14:].all() and parts[2][6:, 14:].all()
    assert figures[0].get_size_inches()[0] / figures[0].get_size_inches()[1] == pytest.approx(picture.shape[1] / high)


def test_neighbours_keep_the_shape_of_the_images(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    panel = plots.Panel(np.zeros((8, 16, 3), np.uint8), "a", True)
    plots.panels([[panel] * 3], epath.Path(tmp_path / "x.png"), title="t")
    (axes,) = figures[0].axes
    width, height = figures[0].get_size_inches()
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    for image in axes.images:
        x0, x1, y0, y1 = image.get_extent()
        on_paper = (x1 - x0) / (right - left) * width, (y1 - y0) / (high - low) * height
        assert abs(on_paper[0]) / abs(on_paper[1]) == pytest.approx(2)


def test_one_function_names_the_side():
    assert [undivided(shape, 4) for shape in ((8, 12), (9, 12), (8, 13), (9, 13))] == [
        "",
        "data.image_size = 9",
        "data.image_width = 13",
        "data.image_size = 9",
    ]
    assert Data(source="digits", image_size=8).image_shape == (8, 8)


def test_all_target_blocks_fit_into_the_longest(tmp_path):
    assert target_tokens(Mask(recipe="corrected", target_scale=(0.2, 0.2), target_aspect=(1.0, 1.0)), (3, 40)) == 15
