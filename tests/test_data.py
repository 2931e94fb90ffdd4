"""Crops against torchvision's rule, and the stream of batches against what it promises."""

import collections
import io
import itertools
import math
import random
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from cjepa_jax.config import UserError
from cjepa_jax.data import decode, pipeline, sources

CROP = dict(scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3))


# Crops


def torchvision_box(width, height, scale, ratio, rng):
    """RandomResizedCrop.get_params, line by line -> left, top, right, bottom."""
    for _ in range(10):
        target_area = width * height * rng.uniform(*scale)
        aspect_ratio = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            i, j = rng.randint(0, height - h), rng.randint(0, width - w)
            return j, i, j + w, i + h
    in_ratio = width / height
    if in_ratio < min(ratio):
        w = width
        h = round(w / min(ratio))
    elif in_ratio > max(ratio):
        h = height
        w = round(h * max(ratio))
    else:
        w, h = width, height
    i, j = (height - h) // 2, (width - w) // 2
    return j, i, j + w, i + h


@pytest.mark.parametrize(
    "width, height, crop",
    [(500, 375, CROP), (500, 375, dict(scale=(0.08, 0.4), ratio=(0.4, 0.9))), (8, 8, CROP), (30, 90, CROP)],
)
def test_random_box_is_distributed_as_in_torchvision(width, height, crop):
    """No statistic differs by more than two samples do by chance (Kolmogorov-Smirnov, p = 0.001)."""
    count, theirs_rng, ours_rng = 20_000, random.Random(0), np.random.default_rng(0)
    ours = np.array([decode.random_box(width, height, **crop, rng=ours_rng) for _ in range(count)])
    theirs = np.array([torchvision_box(width, height, **crop, rng=theirs_rng) for _ in range(count)])
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] <= (width, height)).all() and (ours[:, :2] < ours[:, 2:]).all()

    def statistics(boxes):
        left, top, right, bottom = boxes.T
        w, h = right - left, bottom - top
        return left, top, right, bottom, w, h, w * h, w / h, left / (width - w + 1), top / (height - h + 1)

    for a, b in zip(statistics(ours), statistics(theirs), strict=True):
        places = np.unique(np.concatenate([a, b]))
        shares = [np.searchsorted(np.sort(x), places, side="right") / count for x in (a, b)]
        assert np.abs(shares[0] - shares[1]).max() < 1.95 * math.sqrt(2 / count)


@pytest.mark.parametrize("width, height", [(1, 100), (100, 1), (1000, 3), (3, 1001), (7, 1000)])
def test_random_box_of_a_thin_image_is_central(width, height):
    expected = torchvision_box(width, height, **CROP, rng=random.Random(0))
    assert decode.random_box(width, height, **CROP, rng=np.random.default_rng(0)) == expected


@pytest.mark.parametrize(
    "width, height, fraction, box",
    [
        (8, 8, 1.0, (0, 0, 8, 8)),
        (500, 375, 1.0, (62, 0, 437, 375)),
        (256, 320, 224 / 256, (16, 48, 240, 272)),
        (400, 100, 0.5, (175, 25, 225, 75)),
    ],
)
def test_central_box_is_a_share_of_the_short_side(width, height, fraction, box):
    assert decode.central_box(width, height, fraction=fraction) == pytest.approx(box)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size, box", [(224, (100, 30, 480, 370)), (32, (0, 0, 500, 375)), (224, (40, 50, 120, 110))])
def test_resize_is_pils_crop_and_resize(channels, size, box):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, channels), np.uint8).squeeze())
    resized = decode.resize(image, box, size)
    assert resized.shape == (size, size, channels) and resized.dtype == np.uint8
    expected = np.asarray(image.crop(box).resize((size, size), Image.Resampling.BILINEAR)).reshape(resized.shape)
    np.testing.assert_array_equal(resized, expected)


def encoded(image, form="png"):
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode, form", [("L", "png"), ("RGB", "png"), ("RGBA", "png"), ("P", "gif"), ("CMYK", "jpeg")])
def test_images_of_any_mode_become_grey_or_rgb(channels, mode, form):
    colour = 204, 51, 102  # of the palette
    image = Image.new("RGB", (12, 10), colour).convert(mode)
    expected = round(np.dot(colour, (0.299, 0.587, 0.114))) if channels == 1 or mode == "L" else colour
    for given in (image, encoded(image, form)):
        opened = decode.open_image(given, channels)
        assert (opened.size, opened.mode) == ((12, 10), "L" if channels == 1 else "RGB")
        pixels = np.asarray(opened).reshape(-1, channels).astype(int)
        np.testing.assert_allclose(pixels, np.broadcast_to(expected, pixels.shape), atol=4)


# The stream of batches


class Colours(collections.abc.Sequence):
    """Images of one colour, which is their index in base 256."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"image": Image.new("RGB", (5, 4), (index >> 16, index >> 8 & 255, index & 255)), "label": index}


def colours(count):
    return sources.Source(Colours(count), "")


def indices(batches):
    """Of colours, [..., H, W, 3] -> [...]."""
    assert (batches == batches[..., :1, :1, :]).all()
    return (batches[..., 0, 0, :].astype(int) * (65536, 256, 1)).sum(axis=-1)


@pytest.fixture
def make_data(make_config):
    """12 images a batch, RGB, and overrides."""

    def make(**overrides):
        settings = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": 4, "batch_size": 12}
        settings |= {"crop_scale": CROP["scale"], "crop_ratio": CROP["ratio"]} | overrides
        return make_config(**{f"data__{key}": value for key, value in settings.items()}).data

    return make


def take(count, source, data, seed=0, start=0, **share):
    """The batches [count, B, H, W, C] from `start` on."""
    batches = pipeline.train_batches(source, data, seed=seed, **share)
    if start:
        batches.set_state({"next_index": start})
    return np.stack(list(itertools.islice(batches, count)))


def test_batches_depend_on_the_seed_but_not_on_threads(make_data):
    data = make_data(image_size=8)
    source = sources.load(data, "train")
    one = take(20, source, data)
    np.testing.assert_array_equal(one, take(20, source, make_data(image_size=8, threads=4, prefetch=7)))
    np.testing.assert_array_equal(one, take(20, source, data))
    assert (one != take(20, source, data, seed=1)).any(axis=(2, 3, 4)).mean() > 0.9


def test_every_image_comes_once_an_epoch_in_a_new_order(make_data):
    epochs = indices(take(35, colours(30), make_data())).reshape(14, 30)  # 2.5 batches an epoch
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(30), (14, 1)))
    other = indices(take(5, colours(30), make_data(), seed=1)).reshape(2, 30)
    assert len({tuple(order) for order in [*epochs, *other, range(30)]}) == 17


def test_every_image_is_cropped_anew_each_time(make_data):
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8))
    source = sources.Source([{"image": pixels, "label": 0}] * 12, "")  # all the same, so that only crops differ
    crops = take(5, source, make_data()).reshape(60, -1)
    assert len(np.unique(crops, axis=0)) == 60


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("start", [0, 1000])
def test_shares_of_the_processes_interleave_to_the_global_batches(make_data, processes, start):
    data = make_data(image_size=8)
    source = sources.load(data, "train[:50]")
    whole = take(7, source, data, start=start)
    shares = [take(7, source, data, start=start, process=p, processes=processes) for p in range(processes)]
    assert {share.shape for share in shares} == {(7, 12 // processes, 8, 8, 3)}
    np.testing.assert_array_equal(np.stack(shares, axis=2).reshape(whole.shape), whole)


def test_a_batch_that_the_processes_cannot_share_is_refused(make_data):
    with pytest.raises(UserError, match=r"data\.batch_size = 12 .* 5 processes"):
        pipeline.train_batches(colours(30), make_data(), seed=0, processes=5)


@pytest.mark.parametrize("processes", [1, 3])
def test_state_continues_exactly(make_data, processes):
    data, share = make_data(image_size=8), {"process": processes - 1, "processes": processes}
    source = sources.load(data, "train")
    batches = pipeline.train_batches(source, data, seed=3, **share)
    for taken in range(5):
        assert batches.get_state() == {"next_index": taken}
        next(batches)
    state, following = batches.get_state(), np.stack([next(batches) for _ in range(4)])
    np.testing.assert_array_equal(following, take(4, source, data, seed=3, start=state["next_index"], **share))
    batches.set_state(state)  # back, with batches already read ahead
    np.testing.assert_array_equal(following[0], next(batches))


def test_a_far_state_is_reached_at_once(make_data):
    far, data = 10**6, make_data(batch_size=30)
    start = time.perf_counter()
    here = take(1, colours(30), data, start=far)
    assert time.perf_counter() - start < 1
    np.testing.assert_array_equal(here, take(4, colours(30), data, start=far - 3)[3:])
    assert sorted(indices(here[0])) == list(range(30))


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_and_probes_have_the_channels_of_the_config(make_data, channels):
    data = make_data(image_size=8, mean=(0.5,) * channels, std=(0.5,) * channels)
    source = sources.load(data, "test")
    batch = take(1, source, data)[0]
    images, labels = pipeline.probe_images(source, data, crop_fraction=1.0)
    assert batch.shape == (12, 8, 8, channels) and images.shape == (360, 8, 8, channels)
    assert batch.dtype == images.dtype == np.uint8
    for image, label, record in zip(images, labels, source.records, strict=True):  # in order, and as they are
        assert label == record["label"]
        np.testing.assert_array_equal(image, np.repeat(np.asarray(record["image"])[..., None], channels, axis=-1))


# Digits


def rows(source):
    return [(*np.asarray(record["image"]).ravel().tolist(), record["label"]) for record in source.records]


def test_digits_are_split_once_and_stratified(make_data):
    train, test = (sources.load(make_data(), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    digits = load_digits()
    pixels = np.rint(digits.data * 255 / 16).astype(int).tolist()
    everything = collections.Counter((*p, label) for p, label in zip(pixels, digits.target.tolist(), strict=True))
    assert collections.Counter(rows(train)) + collections.Counter(rows(test)) == everything
    counts = np.bincount([label for *_, label in rows(test)])
    np.testing.assert_allclose(counts, np.bincount(digits.target) * 360 / 1797, atol=1)


@pytest.mark.parametrize(
    "split, part",
    [("train[:80%]", slice(0, 1150)), ("train[80%:]", slice(1150, None)), ("train[-7:]", slice(-7, None))],
)
def test_digits_take_split_expressions(make_data, split, part):
    assert rows(sources.load(make_data(), split)) == rows(sources.load(make_data(), "train"))[part]


def test_digits_splits_add_up(make_data):
    both = rows(sources.load(make_data(), "test+train[:5]"))
    assert both == [row for split in ("test", "train[:5]") for row in rows(sources.load(make_data(), split))]


def test_fingerprints_tell_splits_apart(make_data):
    splits = ["train", "test", "train[:80%]", "train[:50]", "train[50:100]"]
    found = [[sources.load(make_data(), split).fingerprint for split in splits] for _ in range(2)]
    assert found[0] == found[1] and len(set(found[0])) == len(splits)


@pytest.mark.parametrize("split", ["validation", "train[", "train[:x]", ""])
def test_a_split_that_cannot_be_read_is_named(make_data, split):
    with pytest.raises(UserError) as error:
        sources.load(make_data(), split)
    assert repr(split) in str(error.value)


# TFDS


class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # so it is known by its files alone
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image, label = tfds.features.Image(encoding_format="png"), tfds.features.ClassLabel(num_classes=20)
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(12)), "test": self._generate_examples(range(12, 17))}

    def _generate_examples(self, values):
        for i in values:
            yield i, {"image": encoded(Image.new("RGB", (6, 4 + i), (0, 0, i))), "label": i}


@pytest.fixture
def tiny(tmp_path, make_data):
    """The settings of a prepared TFDS data set of 12 and 5 PNG images."""
    tfds.disable_progress_bar()
    Tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    return make_data(source="tfds", name="tiny", data_dir=str(tmp_path))


def test_tfds_gives_encoded_images_and_labels(tiny):
    train, test = (sources.load(tiny, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (12, 5)
    records = [source.records[i] for source in (train, test) for i in range(len(source))]
    assert sorted(int(record["label"]) for record in records) == list(range(17))
    for record in records:
        label = int(record["label"])
        assert record["image"] == encoded(Image.new("RGB", (6, 4 + label), (0, 0, label)))


def test_tfds_feeds_batches_and_probes(tiny):
    source = sources.load(tiny, "train")
    epochs = indices(take(3, source, tiny))
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(12), (3, 1)))
    images, labels = pipeline.probe_images(source, tiny, crop_fraction=0.5)
    np.testing.assert_array_equal(indices(images), labels)


def test_tfds_takes_split_expressions(tiny):
    assert len(sources.load(tiny, "train[:50%]+test")) == 11
    fingerprints = {sources.load(tiny, split).fingerprint for split in ("train", "train[:50%]", "test")}
    assert len(fingerprints) == 3
    with pytest.raises(UserError, match=r"'validation' of tiny .*train.*test"):
        sources.load(tiny, "validation")


def test_tfds_says_how_to_prepare_imagenet(make_data, tmp_path):
    with pytest.raises(UserError) as error:
        sources.load(make_data(source="tfds", name="imagenet2012", data_dir=str(tmp_path)), "train")
    message = str(error.value)
    assert "\n" not in message
    for part in (
        f"{tmp_path}/downloads/manual",
        "ILSVRC2012_img_train.tar",
        "ILSVRC2012_img_val.tar",
        f"tfds.builder('imagenet2012', file_format='array_record', data_dir='{tmp_path}').download_and_prepare()",
    ):
        assert part in message


def test_tfds_names_an_unknown_data_set(make_data, tmp_path):
    with pytest.raises(UserError, match=r"data\.name = 'imagenet2021' is not a TFDS data set"):
        sources.load(make_data(source="tfds", name="imagenet2021", data_dir=str(tmp_path)), "train")
