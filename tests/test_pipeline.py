"""The stream of batches against what it promises."""

import contextlib
import copy
import itertools
import json
import os
import pathlib
import threading
import time

import numpy as np
import pytest
from PIL import Image

from cjepa_jax.data import decode, pipeline, sources
from cjepa_jax.data.augment import Augmentation, augment
from cjepa_jax.data.decode import UnreadableError
from cjepa_jax.errors import UserError
from tests import commands


class Colours:
    """Images of one colour, which is their index in base 256; some are no images."""

    def __init__(self, count, bad=()):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        pixels = np.full((4, 5, 3), (index >> 16, index >> 8 & 255, index & 255), np.uint8)
        return {"image": b"<html>" if index in self.bad else pixels, "label": index}


def colours(count, bad=()):
    return sources.Source(Colours(count, bad), "", ("any",), lambda index: f"colour {index}")


def indices(batches):
    """Returns the numbers [...] that the colours of images [..., H, W, 3] stand for."""
    assert (batches == batches[..., :1, :1, :]).all()
    return (batches[..., 0, 0, :].astype(int) * (65536, 256, 1)).sum(axis=-1)


@pytest.fixture
def make_data(make_config):
    """Returns settings with 12 RGB images per batch, and overrides."""

    def make(**overrides):
        settings = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": 4, "batch_size": 12}
        settings |= {"crop_scale": (0.3, 1.0), "crop_ratio": (3 / 4, 4 / 3)} | overrides
        return make_config(**{f"data__{key}": value for key, value in settings.items()}).data

    return make


def take(count, source, data, seed=0, **where):
    """Returns the batches [count, B, H, W, C]."""
    batches = pipeline.train_batches(pipeline.Reader(source, data), seed=seed, **where)
    return np.stack([batch.images for batch in itertools.islice(batches, count)])


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
def test_batches_depend_on_the_seed_but_not_on_threads(make_data, decoder):
    settings = dict(image_size=8, decoder=decoder, flip=0.5, blur=0.5, color=1.0)
    source = sources.load(make_data(), "train")
    one = take(20, source, make_data(**settings))
    for threads, prefetch in ((4, 7), (3, 1), (0, 2)):
        np.testing.assert_array_equal(one, take(20, source, make_data(threads=threads, prefetch=prefetch, **settings)))
    assert (one != take(20, source, make_data(**settings), seed=1)).any(axis=(2, 3, 4)).mean() > 0.9


@pytest.mark.parametrize("batch_size", [12, 7, 64])  # 7 is not a multiple of a chunk, 64 more than an epoch
def test_every_image_comes_once_an_epoch_in_a_new_order(make_data, batch_size):
    batches = take(15 * 30 // batch_size, colours(30), make_data(batch_size=batch_size))
    epochs = indices(batches).reshape(-1)[: 14 * 30].reshape(14, 30) if batch_size != 64 else None
    if epochs is None:
        epochs = indices(batches).reshape(-1)[: 7 * 64 // 30 * 30].reshape(-1, 30)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(30), (len(epochs), 1)))
    other = indices(take(5, colours(30), make_data(), seed=1)).reshape(2, 30)
    assert len({tuple(order) for order in [*epochs, *other, range(30)]}) == len(epochs) + 3


def test_every_image_is_cropped_anew_each_time(make_data):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
    source = sources.from_arrays(np.stack([pixels] * 12))  # all the same, so that only crops differ
    crops = take(5, source, make_data()).reshape(60, -1)
    assert len(np.unique(crops, axis=0)) == 60


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("start", [0, 1000])
def test_each_process_takes_its_rows_of_the_global_batches(make_data, processes, start):
    data = make_data(image_size=8)
    source = sources.load(data, "train[:50]")
    whole = take(7, source, data, start=start)
    for rows in (
        lambda p: range(12)[p::processes],
        lambda p: range(12)[12 * p // processes : 12 * (p + 1) // processes],
    ):
        for p in range(processes):
            share = take(7, source, data, start=start, rows=rows(p))
            np.testing.assert_array_equal(share, whole[:, list(rows(p))])


SHARE = """
import json, sys
from cjepa_jax.config import Data
from cjepa_jax.data import decode, pipeline, sources
from cjepa_jax.data.augment import Augmentation, augment
data, start, count, rows = json.loads(sys.argv[1])
data = Data(**{key: tuple(v) if isinstance(v, list) else v for key, v in data.items()})
reader = pipeline.Reader(sources.load(data, "train[:100]"), data)
batches = pipeline.train_batches(reader, seed=5, start=start, rows=rows)
print(json.dumps([next(batches).images.tolist() for _ in range(count)]))
"""


def test_another_number_of_processes_goes_on_with_the_same_batches(make_data):
    """Real processes: two for 3 batches, then three for 2, then one for 2."""
    data = make_data(image_size=8)
    found, start = [], 0
    for processes, count in ((2, 3), (3, 2), (1, 2)):
        arguments = [json.dumps((vars(data), start, count, list(range(12)[p::processes]))) for p in range(processes)]
        shares = [np.array(json.loads(commands.run("", a, first=SHARE).stdout), np.uint8) for a in arguments]
        found.append(np.stack(shares, axis=2).reshape(count, 12, 8, 8, 3))
        start += count
    np.testing.assert_array_equal(np.concatenate(found), take(7, sources.load(data, "train[:100]"), data, seed=5))


@pytest.mark.parametrize("batch_size", [12, 7])
@pytest.mark.parametrize("share", [{}, {"rows": [1, 2, 5]}])
def test_going_on_is_exact(make_data, batch_size, share):
    data = make_data(image_size=8, batch_size=batch_size)
    source = sources.load(data, "train")
    whole = take(9, source, data, seed=3, **share)
    np.testing.assert_array_equal(whole[5:], take(4, source, data, seed=3, start=5, **share))


def test_a_far_step_is_reached_at_once(make_data):
    far, data = 10**6, make_data(batch_size=30)
    take(1, colours(30), data)  # imports
    start = time.perf_counter()
    here = take(1, colours(30), data, start=far)
    assert time.perf_counter() - start < 2
    np.testing.assert_array_equal(here, take(4, colours(30), data, start=far - 3)[3:])
    assert sorted(indices(here[0])) == list(range(30))


def test_no_more_is_read_ahead_than_prefetch_says(make_data):
    """In images, `prefetch` batches beyond those taken, and one image a thread."""

    class Counting(Colours):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    records = Counting(10_000)
    data = make_data(batch_size=64, prefetch=3, threads=2)
    batches = pipeline.train_batches(pipeline.Reader(sources.Source(records, "", (), str), data), seed=0)
    for taken in range(1, 6):
        next(batches)
        deadline = time.monotonic() + 5
        while records.read < (taken + 3) * 64 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert records.read == (taken + 3) * 64
    batches.close()


@pytest.mark.parametrize("threads", [1, 5])
def test_an_image_is_read_by_several_threads_at_once(make_data, threads):
    together, barrier = [], threading.Barrier(threads)

    class Meeting(Colours):
        def __getitem__(self, index):
            together.append(barrier.wait(timeout=10))
            return super().__getitem__(index)

    data = make_data(batch_size=40, threads=threads, prefetch=2)
    reader = pipeline.Reader(sources.Source(Meeting(1000), "", (), str), data)
    assert len(next(pipeline.train_batches(reader, seed=0)).images) == 40
    assert set(together) == set(range(threads))


# Views

PLAIN = Augmentation((0.3, 1.0), (3 / 4, 4 / 3))


@pytest.fixture
def photos():
    """Twelve images of noise, so that every crop tells what it was cut from."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 30, 40, 3), np.uint8)
    return sources.from_arrays(pixels, np.arange(12))


class Recording(pipeline.Reader):
    """Keeps a copy of each image's generator, in the state in which its first box is drawn."""

    def __init__(self, source, data):
        super().__init__(source, data)
        self.generators = {}

    def crops(self, index, choose_boxes):
        self.generators.setdefault(index, copy.deepcopy(choose_boxes[0].keywords["rng"]))
        return super().crops(index, choose_boxes)


@pytest.mark.parametrize("views", [None, [Augmentation((0.3, 1.0), (3 / 4, 4 / 3), 0.5, 1.0, 0.5), PLAIN]])
def test_a_batch_is_what_the_public_functions_make_of_its_images(make_data, photos, views):
    data = make_data(image_size=8, threads=1, prefetch=1)
    reader = Recording(photos, data)
    batch = next(pipeline.train_batches(reader, seed=4, views=views))
    used = views or [Augmentation.of(data)]
    for images, label in zip(batch.images, batch.labels, strict=True):
        picture, rng = photos.read(label)["image"], reader.generators[label]
        boxes = [decode.random_box(40, 30, scale=view.crop_scale, ratio=view.crop_ratio, rng=rng) for view in used]
        crops = [
            decode.crop(picture, lambda w, h, box=box: box, shape=(8, 8), channels=3, decoder=data.decoder)
            for box in boxes
        ]
        expected = [augment(crop, view, rng) for crop, view in zip(crops, used, strict=True)]
        np.testing.assert_array_equal(images, expected[0] if views is None else np.stack(expected))


def test_one_view_is_the_crop_and_augmentation_of_the_settings(make_data, photos):
    data = make_data(image_size=8, flip=0.5, color=0.5, blur=0.5)
    given = take(3, photos, data, views=[Augmentation((0.3, 1.0), (3 / 4, 4 / 3), 0.5, 0.5, 0.5)])
    np.testing.assert_array_equal(given, take(3, photos, data))


def test_two_views_differ_from_each_other_and_from_batch_to_batch(make_data, photos):
    data = make_data(image_size=8)
    batches = take(4, photos, data, views=[PLAIN, PLAIN])
    assert batches.shape == (4, 12, 2, 8, 8, 3)
    assert len(np.unique(batches.reshape(4 * 12 * 2, -1), axis=0)) == 4 * 12 * 2
    np.testing.assert_array_equal(batches[2:], take(2, photos, data, views=[PLAIN, PLAIN], start=2))
    some = take(2, photos, make_data(image_size=8, threads=3), views=[PLAIN, PLAIN], rows=[1, 7])
    np.testing.assert_array_equal(some, batches[:2, [1, 7]])


def test_every_view_has_its_own_settings(make_data, photos):
    whole = Augmentation((1.0, 1.0), (4 / 3, 4 / 3))  # the aspect ratio of the images
    black = Augmentation((0.3, 1.0), (3 / 4, 4 / 3), distort=lambda pixels, rng: np.zeros_like(pixels))
    data = make_data(image_size=8)
    batch = next(pipeline.train_batches(pipeline.Reader(photos, data), seed=0, views=[whole, black, PLAIN]))
    assert batch.images.shape == (12, 3, 8, 8, 3) and not batch.images[:, 1].any()
    for views, label in zip(batch.images, batch.labels, strict=True):
        picture = photos.read(label)["image"]
        expected = decode.crop(picture, lambda w, h: (0, 0, w, h), shape=(8, 8), channels=3, decoder=data.decoder)
        np.testing.assert_array_equal(views[0], expected)
        assert (views[2] != views[0]).any()


def test_an_image_is_read_once_for_all_its_views(make_data):
    records = Colours(30, bad={4})
    read, lock = [], threading.Lock()

    class Counting(Colours):
        def __getitem__(self, index):
            with lock:
                read.append(index)
            return records[index]

    reader = pipeline.Reader(sources.Source(Counting(30), "", (), str), make_data(max_bad_fraction=0.1, batch_size=30))
    batches = pipeline.train_batches(reader, seed=0, views=[PLAIN, PLAIN])
    batch = next(batches)
    first, second = indices(batch.images[:, 0]), indices(batch.images[:, 1])
    np.testing.assert_array_equal(first, second)  # another image stands in for all views of a bad one
    np.testing.assert_array_equal(first, batch.labels)
    assert 4 not in first and reader.unreadable.keys() == {"4"}
    batches.close()
    assert len(read) <= 3 * 31 + 3  # three batches, of which each tries one bad image


def test_labels_come_with_the_images(make_data):
    data = make_data()
    batch = next(pipeline.train_batches(pipeline.Reader(colours(30), data), seed=0))
    np.testing.assert_array_equal(batch.labels, indices(batch.images))
    assert batch.labels.dtype == np.int32
    pipeline.check_labelled(batch)
    bare = next(
        pipeline.train_batches(pipeline.Reader(sources.from_arrays(np.zeros((30, 4, 4), np.uint8)), data), seed=0)
    )
    assert (bare.labels == pipeline.NO_LABEL).all()
    with pytest.raises(UserError, match=r"data\.train_split holds images without a label"):
        pipeline.check_labelled(bare)


# Images that cannot be read


def test_another_image_stands_in_for_a_bad_one(make_data):
    data = make_data(max_bad_fraction=0.2)
    bad = {3, 11, 17}
    reader = pipeline.Reader(colours(30, bad), data)
    batches = np.stack([batch.images for batch in itertools.islice(pipeline.train_batches(reader, seed=0), 10)])
    epochs, healthy = indices(batches).reshape(4, 30), indices(take(10, colours(30), data)).reshape(4, 30)
    assert not np.isin(epochs, list(bad)).any()
    np.testing.assert_array_equal(epochs[~np.isin(healthy, list(bad))], healthy[~np.isin(healthy, list(bad))])
    assert len(np.unique(epochs[np.isin(healthy, list(bad))])) > 6  # of 12: not the same one each time
    assert reader.unreadable.keys() == {f"colour {i}" for i in bad}
    for settings in ({"threads": 4}, {"prefetch": 5}):
        again = take(10, colours(30, bad), make_data(max_bad_fraction=0.2, **settings))
        np.testing.assert_array_equal(batches, again)
    for rows in (range(4), range(4, 12)):
        np.testing.assert_array_equal(take(10, colours(30, bad), data, rows=rows), batches[:, list(rows)])


def test_an_image_that_storage_does_not_give_is_bad_too(make_data):
    class Lost(Colours):
        def __getitem__(self, index):
            if index == 4:
                raise OSError(5, "Input/output error")
            return super().__getitem__(index)

    reader = pipeline.Reader(sources.Source(Lost(30), "", (), str), make_data(max_bad_fraction=0.1))
    batches = [batch.images for batch in itertools.islice(pipeline.train_batches(reader, seed=0), 5)]
    assert 4 not in indices(np.stack(batches))
    assert reader.unreadable == {"4": "OSError: [Errno 5] Input/output error"}


@pytest.mark.parametrize(
    "images, bad, limit, stops",
    [
        (100, 2, 0.02, False),
        (100, 3, 0.02, True),
        (100, 1, 0.0, True),
        (5000, 9, 0.01, False),
        (5000, 100, 0.01, True),
        (50, 50, 1.0, True),
    ],
)
def test_too_many_bad_images_stop_the_run(make_data, images, bad, limit, stops):
    reader = pipeline.Reader(colours(images, range(bad)), make_data(max_bad_fraction=limit))
    batches = pipeline.train_batches(reader, seed=0)
    if not stops:
        for _ in range(images // 12 + 2):
            next(batches)
        assert len(reader.unreadable) == bad
        return
    with pytest.raises(UserError, match=r"data\.max_bad_fraction|100 images in a row") as error:
        for _ in range(images // 12 + 2):
            next(batches)
    assert ("colour " in str(error.value) and "not a JPEG" in str(error.value)) or limit == 1.0


def test_bad_images_that_lie_together_are_no_large_share_of_what_is_read_in_order(make_data):
    """11 of 5,000 are bad, and 11 of the first 311."""
    data = make_data(max_bad_fraction=0.01, batch_size=100)
    reader = pipeline.Reader(colours(5000, range(300, 311)), data)
    read = sum(len(images) for images, _ in pipeline.ordered_batches(reader, size=100, crop_fraction=1.0))
    assert read == 4989 and len(reader.unreadable) == 11
    reader = pipeline.Reader(colours(5000, range(300, 351)), data)
    with pytest.raises(UserError, match=r"51 of the .* images tried cannot be read"):
        list(pipeline.ordered_batches(reader, size=100, crop_fraction=1.0))


@pytest.mark.parametrize("bad, stops", [(14, False), (22, False), (23, True)])
def test_a_share_of_a_part_is_known_within_chance_only(make_data, bad, stops):
    """10 of 1,000 may be bad, and 12.6 are four standard deviations."""
    reader = pipeline.Reader(colours(100_000, range(bad)), make_data(max_bad_fraction=0.01))

    def read():
        for index in range(1000):
            with contextlib.suppress(UnreadableError):
                pipeline.central_view(reader, crop_fraction=1.0)(index)

    if stops:
        with pytest.raises(UserError, match=r"data\.max_bad_fraction = 0\.01"):
            read()
    else:
        read()


# Images in order


def test_images_in_order_with_their_labels(make_data):
    reader = pipeline.Reader(colours(30, {5, 6}), make_data(max_bad_fraction=0.1, threads=3))
    batches = list(pipeline.ordered_batches(reader, size=8, crop_fraction=0.5))
    assert [len(images) for images, _ in batches] == [6, 8, 8, 6]
    expected = [i for i in range(30) if i not in (5, 6)]
    assert [label for _, labels in batches for label in labels] == expected
    assert indices(np.concatenate([images for images, _ in batches])).tolist() == expected
    assert reader.unreadable.keys() == {"colour 5", "colour 6"}


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_the_channels_of_the_config(make_data, channels, decoder):
    data = make_data(image_size=8, mean=(0.5,) * channels, std=(0.5,) * channels, decoder=decoder)
    source = sources.load(data, "test")
    batch = take(1, source, data)[0]
    images, labels = next(pipeline.ordered_batches(pipeline.Reader(source, data), size=400, crop_fraction=1.0))
    assert batch.shape == (12, 8, 8, channels) and images.shape == (360, 8, 8, channels)
    assert batch.dtype == images.dtype == np.uint8
    for image, label, record in zip(images, labels, source.records, strict=True):  # in order, and as they are
        assert label == record["label"]
        np.testing.assert_array_equal(image, np.repeat(record["image"][..., None], channels, axis=-1))


def test_reading_says_what_happened(make_data):
    reader = pipeline.Reader(colours(30, {5}), make_data(max_bad_fraction=0.1))
    with pytest.raises(decode.UnreadableError, match="not a JPEG, PNG"):
        reader.crops(5, [lambda w, h: (0, 0, w, h)])
    assert Image.fromarray(reader.crops(6, [lambda w, h: (0, 0, w, h)])[0][0]).size == (4, 4)


@pytest.mark.slow
def test_memory_stays_flat(make_data, tmp_path):
    """600 batches of 256 at 224: resident memory after the first 100 batches and at the end."""
    rng = np.random.default_rng(0)
    for i in range(500):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "bad.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:500])
    data = make_data(source="folder", data_dir=str(tmp_path), image_size=224, batch_size=256, threads=0, prefetch=2)
    reader = pipeline.Reader(sources.load(data, "train"), data)
    batches, resident = pipeline.train_batches(reader, seed=0), []
    for _ in range(600):
        next(batches)
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    print(f"resident MiB: {resident[0]:.0f} at first, {max(resident[:100]):.0f} of 100, {max(resident):.0f} of 600")
    assert max(resident[-100:]) < max(resident[:100]) + 64  # a batch has 37 MiB
