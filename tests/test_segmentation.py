"""Segmentation by heads on frozen features: drawn images whose answer is known, PyTorch, NumPy, and bad folders."""

import dataclasses
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath
from PIL import Image
from sklearn.metrics import confusion_matrix

from cjepa_jax import plots, pretrained
from cjepa_jax.config import Mesh, Model
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate import masks
from cjepa_jax.evaluate import segmentation_heads as heads
from cjepa_jax.evaluate.features import Extractor
from cjepa_jax.models.vit import build_encoder
from cjepa_jax.train import sharding
from cjepa_jax.train.sharding import make_mesh
from tests.test_evaluate import freeze, settings

SIDE, PATCH = 16, 4
COLOURS = {1: (220, 40, 40), 2: (40, 200, 60), 3: (60, 60, 230)}  # of classes


def draw(rng, scale):
    """A picture [H, W, 3] and its mask: rectangles along patches, one colour a class; the upper left patch is 0."""
    mask = np.full((SIDE // PATCH, SIDE // PATCH), 1, np.uint8)
    for value in (2, 3):
        y, x = rng.integers(0, 3, 2)
        mask[y : y + 2, x : x + 2] = value
    mask[0, 0] = 0
    mask = mask.repeat(scale, axis=0).repeat(scale + 1, axis=1)  # wider than high
    picture = np.full((*mask.shape, 3), 128, np.uint8)
    for value, colour in COLOURS.items():
        picture[mask == value] = colour
    return picture, mask


def write(root, *, training=12, validation=5):
    rng = np.random.default_rng(0)
    for split, count in (("training", training), ("validation", validation)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            picture, mask = draw(rng, 8 + 2 * (i % 2))
            Image.fromarray(picture).save(root / f"images/{split}/{i:03}.jpg", "png")  # without loss; content counts
            Image.fromarray(mask).save(root / f"annotations/{split}/{i:03}.png")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write(root)
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random encoder."""
    model = Model(size="16x1x2", patch_size=PATCH, init="fan_in", dtype="float32", layers="unrolled", remat="none")
    shape = (1, (SIDE // PATCH) ** 2, PATCH**2 * 3)
    encoder = build_encoder(model, grid=(SIDE // PATCH, SIDE // PATCH))
    params = encoder.init(jax.random.key(0), np.zeros(shape, np.float32))["params"]
    networks = pretrained.Pretrained(model, None, SIDE, (0.5,) * 3, (0.25,) * 3, 7, {"target_encoder": params})
    path = epath.Path(tmp_path_factory.mktemp("runs")) / "run"
    pretrained.save(path, networks)
    return path


def load(checkpoint, scenes, *, baselines=False, **changes):
    """The evaluator with quick settings, and the frozen encoders."""
    images = {"data__source": "own", "data__train_split": "train", "data__test_split": "test"}  # which nothing reads
    quick = {"data_dir": str(scenes), "classes": 3, "steps": 40, "batch_size": 8, "learning_rate": 0.03} | changes
    chosen = settings(**images, **{f"segmentation__{key}": value for key, value in quick.items()})
    return chosen.segmentation, freeze(checkpoint, "target_encoder", chosen, baselines=baselines)


def alone(frozen):
    """The same on one device, which is quicker where there is little to do."""
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    extractor = Extractor(frozen.extractor.encoders, mesh, batch_size=8)
    params = {name: jax.device_put(jax.device_get(x), sharding.replicated(mesh)) for name, x in frozen.params.items()}
    return dataclasses.replace(frozen, extractor=extractor, params=params)


def test_colours_are_told_apart_and_pixels_are_counted(checkpoint, scenes, tmp_path, monkeypatch):
    """Against scikit-learn, on what the picture shows; patches of one colour are easy even for a random encoder."""
    drawn = {}
    monkeypatch.setattr(plots, "side_by_side", lambda columns, path, *, title: drawn.update({path.name: columns}))
    counted = []
    count = heads.confusion
    monkeypatch.setattr(heads, "confusion", lambda *args: counted.append(args) or count(*args))
    evaluator, frozen = load(checkpoint, scenes, baselines=True, steps=30, learning_rate=0.01)
    evaluator.check(frozen)
    rows = evaluator.run(alone(frozen), epath.Path(tmp_path) / "x")
    assert [*rows] == ["trained", "untrained", "raw pixels"]
    for row in rows.values():
        assert row["images"] == 5
        assert row["linear mIoU"] > 0.8 and row["convolutional mIoU"] > 0.6, row
        assert row["linear pixel accuracy"] > row["linear mIoU"]
    first = counted[0::6]  # of the encoder's linear head
    truths = [np.asarray(Image.open(p)) for p in sorted((scenes / "annotations/validation").glob("*.png"))]
    for mask, (truth, found, _) in zip(truths, first, strict=True):
        np.testing.assert_array_equal(truth, mask.astype(int) - 1)  # at the masks' own sizes
        assert found.shape == mask.shape
    truth = np.concatenate([mask.ravel() for mask in truths])
    found = np.concatenate([found.ravel() for _, found, _ in first])[truth > 0] + 1
    matrix = confusion_matrix(truth[truth > 0], found, labels=[1, 2, 3])
    iou = [matrix[i, i] / (matrix[i].sum() + matrix[:, i].sum() - matrix[i, i]) for i in range(3)]
    assert rows["trained"]["IoU of classes"]["linear"] == pytest.approx(dict(zip("123", iou, strict=True)))
    assert rows["trained"]["linear mIoU"] == pytest.approx(np.mean(iou))
    assert rows["trained"]["linear pixel accuracy"] == pytest.approx(np.trace(matrix) / matrix.sum())
    columns = drawn["x.segmentation.png"]
    assert [*columns] == ["image", "truth", "trained,\nlinear head", "trained,\nconvolutional head"]
    shapes = [mask.shape + (3,) for mask in truths]
    assert all([picture.shape for picture in column] == shapes for column in columns.values())
    assert (columns["truth"][0][truths[0] == 0] == 0).all() and columns["truth"][0][truths[0] > 0].max() == 1
    assert evaluator.notes(rows) == []


def linear_only(monkeypatch):
    monkeypatch.setattr("cjepa_jax.evaluate.segmentation._CONVOLUTIONS", {"linear": 0})


def trained(evaluator, frozen, monkeypatch):
    """The linear head that the evaluator's run ends with, and its rows."""
    linear_only(monkeypatch)
    kept, train = [], type(evaluator)._train
    monkeypatch.setattr(type(evaluator), "_train", lambda *args: kept.append(train(*args)) or kept[-1])
    rows = evaluator.run(frozen, None)
    return kept[0]["trained", "linear"], rows


def test_one_device_does_what_eight_do(checkpoint, scenes, monkeypatch):
    evaluator, frozen = load(checkpoint, scenes, steps=4)
    assert frozen.mesh.size == 8
    state, rows = trained(evaluator, frozen, monkeypatch)
    other, same = trained(evaluator, alone(frozen), monkeypatch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), state, other)
    assert rows["trained"]["linear mIoU"] == pytest.approx(same["trained"]["linear mIoU"], abs=0.01)


def test_own_masks_from_0_with_255_ignored_are_the_same(checkpoint, scenes, tmp_path, monkeypatch):
    """Two values are ignored there, of which the first one is not a class of ADE20K's numbers either."""
    write(tmp_path)
    for path in (tmp_path / "annotations").rglob("*.png"):
        mask = np.asarray(Image.open(path)).astype(int)
        other = np.where(mask == 0, np.where(np.indices(mask.shape)[0] % 2, 255, 9), mask - 1)
        Image.fromarray(other.astype(np.uint8)).save(path)
    evaluator, frozen = load(checkpoint, scenes, steps=2)
    state, rows = trained(evaluator, alone(frozen), monkeypatch)
    own, frozen = load(checkpoint, tmp_path, steps=2, first_class=0, ignored=(255, 9))
    own.check(frozen)
    other, same = trained(own, alone(frozen), monkeypatch)
    jax.tree.map(np.testing.assert_array_equal, state, other)
    each = rows["trained"]["IoU of classes"]["linear"]
    assert [*same["trained"]["IoU of classes"]["linear"]] == ["0", "1", "2"]
    assert [*same["trained"]["IoU of classes"]["linear"].values()] == [*each.values()]


@pytest.mark.parametrize("convolutions, grid", [(0, (4, 4)), (2, (4, 4)), (2, (2, 8))])
def test_three_steps_equal_pytorchs(convolutions, grid):
    """Batch norm, head, bilinear upsampling, cross entropy and AdamW with its rates; and then the classes found."""
    rng = np.random.default_rng(1)
    batches = rng.normal(size=(3, 8, 16, 6)).astype(np.float32) * 3 + 1
    truths = rng.integers(-1, 5, (3, 8, 10, 12)).astype(np.int16)
    head, optimizer = heads.Head(5, convolutions), heads.adamw(3, learning_rate=0.02, weight_decay=0.1)
    state = heads.init(head, width=6, optimizer=optimizer, rng=jax.random.key(0))
    start = jax.device_get(state.params)

    layers, norm = [], torch.nn.BatchNorm2d(6, affine=False, momentum=None)  # averages what it has seen
    for i in range(convolutions):
        kernel = start[f"Conv_{i}"]["kernel"]
        layers += [torch.nn.Conv2d(kernel.shape[2], kernel.shape[3], 3, padding=1), torch.nn.ReLU()]
        layers[-2].weight.data = torch.tensor(kernel.transpose(3, 2, 0, 1))
        layers[-2].bias.data.zero_()
    layers.append(torch.nn.Conv2d(start["Dense_0"]["kernel"].shape[0], 5, 1))
    layers[-1].weight.data = torch.tensor(start["Dense_0"]["kernel"].T[..., None, None])
    layers[-1].bias.data.zero_()
    network = torch.nn.Sequential(*layers)
    adamw = torch.optim.AdamW(network.parameters(), lr=0.02, weight_decay=0.1)
    rates = [0.02, 0.02 * 2 / 3, 0.02 / 3]
    for x, truth, rate in zip(batches, truths, rates, strict=True):
        adamw.param_groups[0]["lr"] = rate
        maps = torch.tensor(x.transpose(0, 2, 1).reshape(8, 6, *grid))
        logits = torch.nn.functional.interpolate(network(norm(maps)), size=(10, 12), mode="bilinear")
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(truth.astype(np.int64)), ignore_index=-1)
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        state, value = heads.train_step(state, x, truth, grid=grid, head=head, optimizer=optimizer)
        assert float(value) == pytest.approx(loss.item(), rel=1e-4)
    kernel = network[-1].weight.detach().numpy()[..., 0, 0].T
    np.testing.assert_allclose(state.params["Dense_0"]["kernel"], kernel, atol=1e-4)

    seen = batches.reshape(-1, 6)
    normed = (batches[0] - seen.mean(axis=0)) / np.sqrt(seen.var(axis=0) + 1e-5)
    with torch.no_grad():
        maps = network(torch.tensor(normed.transpose(0, 2, 1).reshape(8, 6, *grid)))
        logits = torch.nn.functional.interpolate(maps, size=(64, 20), mode="bilinear").numpy()
    weights = (np.tile(heads.bilinear(*sizes), (8, 1, 1)) for sizes in zip((64, 20), grid, strict=True))
    found = np.asarray(heads.predict(state, batches[0], *weights, grid=grid, head=head))
    best, second = np.sort(logits, axis=1)[:, ::-1][:, :2].transpose(1, 0, 2, 3)
    clear = best - second > 1e-3
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(found[clear], logits.argmax(axis=1)[clear])


def test_ignored_pixels_have_no_gradient_and_no_pixel_no_loss():
    head = heads.Head(3, 0)
    params = head.init(jax.random.key(0), jnp.zeros((1, 1, 1, 4)))["params"]
    maps = jax.random.normal(jax.random.key(1), (2, 4, 4, 4))
    truth = np.full((2, 16, 16), -1, np.int16)
    assert float(heads.loss(params, head, maps, truth)) == 0
    truth[:, :2] = 1  # which the upper row of patches alone has a part in
    grads = jax.jit(jax.grad(lambda maps: heads.loss(params, head, maps, truth)))(maps)
    assert float(abs(grads[:, 0]).min()) > 0 and not grads[:, 1:].any()


def test_a_class_that_is_neither_there_nor_found_is_left_out():
    miou, accuracy, each = heads.scores(np.array([[6, 2, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]))
    assert each == [6 / 8, 0.0, 1.0, None] and miou == pytest.approx((6 / 8 + 0 + 1) / 3) and accuracy == 0.8
    truth = np.array([[0, -1], [2, 1]], np.int16)
    np.testing.assert_array_equal(
        heads.confusion(truth, np.array([[0, 1], [2, 2]], np.int16), 3),
        np.diag([1, 0, 1]) + np.eye(3, dtype=int)[[0, 2, 0]] * [[0], [1], [0]],
    )
    from cjepa_jax.evaluate.segmentation import Segmentation

    (note,) = Segmentation().notes({"trained": {"IoU of classes": {"linear": {"1": 0.5, "2": None}}}})
    assert note == "trained, linear: 1 of 2 classes are neither there nor found, and not in the mean"


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_masks_of_all_depths_hold_the_numbers_as_they_are(tmp_path, bits):
    """Written by hand, because Pillow writes no grey of two or four bits, and stretches it when it reads."""
    row = np.array([0, 1, 1, 0, 1, 0, 0, 1] if bits == 1 else [0, 1, 2, 3, 3, 2, 1, 0])
    packed = np.array([[value >> bit & 1 for bit in reversed(range(bits))] for value in row]).ravel()
    lines = b"\0" + np.packbits(packed).tobytes()

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    path = epath.Path(tmp_path / "mask.png")
    np.testing.assert_array_equal(masks.read_mask(path), row[None])
    found = masks.read_classes(path, masks.Values(classes=3, first=1, ignored=(0,)))
    np.testing.assert_array_equal(found, row[None] - 1)


def save(path, array):
    return lambda root: Image.fromarray(array).save(root / path)


def replace(path, content):
    return lambda root: (root / path).write_bytes(content)


def remove(path):
    return lambda root: (root / path).unlink()


def nothing(root):
    pass


def only(split, value):
    def change(root):
        for path in (root / "annotations" / split).glob("*.png"):
            Image.fromarray(np.full_like(np.asarray(Image.open(path)), value)).save(path)

    return change


def without_images(root):
    for path in (root / "images/training").glob("*.jpg"):
        path.unlink()


def twice(root):
    (root / "images/training/001.png").write_bytes((root / "images/training/001.jpg").read_bytes())


@pytest.mark.parametrize(
    "damage, changes, says",
    [
        (nothing, {"data_dir": ""}, r"segmentation\.data_dir is empty: --config\.segmentation\.data_dir=FOLDER"),
        (nothing, {"data_dir": "/nowhere"}, r"data_dir = '/nowhere': the folder /nowhere/images/training is missing"),
        (without_images, {}, r"images/training holds no files \.jpg"),
        (twice, {}, r"training/001\.jpg and .*training/001\.png have the same name"),
        (remove("annotations/training/002.png"), {}, r"images/training/002\.jpg has no mask: .* no file 002\.png"),
        (remove("images/validation/002.jpg"), {}, r"annotations/validation/002\.png has no image: .* no file 002\.jpg"),
        (
            save("annotations/validation/001.png", np.ones((3, 5), np.uint8)),
            {},
            r"validation/001\.png has 5 x 3 pixels, its image .*001\.jpg 44 x 40",
        ),
        (save("annotations/training/001.png", np.ones((40, 44, 3), np.uint8)), {}, r"training/001\.png is a RGB image"),
        (
            nothing,
            {"classes": 2},
            r"\.png holds the value 3, which is neither a class \(1 to 2, by segmentation\.first_",
        ),
        (
            nothing,
            {"ignored": ()},
            r"\.png holds the value 0, which is neither .* nor one of segmentation\.ignored = \(",
        ),
        (
            nothing,
            {"first_class": 0},
            r"segmentation\.ignored holds 0, which is a class by segmentation\.first_class = 0",
        ),
        (only("training", 0), {}, r"no training mask holds a class"),
        (
            lambda root: (only("training", 1)(root), only("validation", 2)(root)),
            {},
            r"the training masks and the validation masks have no class in common",
        ),
        (replace("images/validation/003.jpg", b"x"), {}, r"images/validation/003\.jpg cannot be read: not a JPEG"),
        (replace("annotations/validation/003.png", b"x"), {}, r"annotations/validation/003\.png cannot be read"),
    ],
)
def test_what_is_wrong_is_named_before_features_are_computed(checkpoint, tmp_path, damage, changes, says):
    write(tmp_path, training=3, validation=4)
    damage(tmp_path)
    evaluator, frozen = load(checkpoint, tmp_path, **changes)
    with pytest.raises(UserError, match=says) as error:
        evaluator.check(frozen)
    assert "\n" not in str(error.value)


def test_a_training_that_diverges_is_no_result(checkpoint, scenes, monkeypatch):
    linear_only(monkeypatch)
    evaluator, frozen = load(checkpoint, scenes, steps=3, learning_rate=1000.0, weight_decay=1000.0)
    monkeypatch.setattr(heads, "train_step", lambda state, *args, **options: (state, jnp.float32(np.nan)))
    with pytest.raises(
        UserError, match=r"the loss of the linear head on trained is nan: lower segmentation\.learning_"
    ):
        evaluator.run(alone(frozen), None)
