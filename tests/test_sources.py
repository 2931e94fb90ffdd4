"""Each source gives what was put into it, says what is wrong, and knows itself again."""

import collections
import dataclasses
import os
import pathlib
import shutil

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from cjepa_jax import files
from cjepa_jax.data import decode, folder, pipeline, sources
from cjepa_jax.errors import UserError
from tests.helpers import encoded


@pytest.fixture
def make_data(make_config):
    def make(**overrides):
        settings = {"mean": (0.5,) * 3, "std": (0.5,) * 3} | overrides
        return make_config(**{f"data__{key}": value for key, value in settings.items()}).data

    return make


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


# Arrays


@pytest.fixture
def npz(tmp_path):
    """A file of 9 training and 4 test images, grey, with labels as MedMNIST has them."""
    rng = np.random.default_rng(0)
    arrays = {f"{s}_images": rng.integers(0, 256, (n, 6, 5), np.uint8) for s, n in (("train", 9), ("test", 4))}
    arrays |= {f"{s}_labels": rng.integers(0, 3, (n, 1)) for s, n in (("train", 9), ("test", 4))}
    np.savez(tmp_path / "small.npz", **arrays)
    return tmp_path / "small.npz", arrays


@pytest.mark.parametrize(
    "split, parts", [("train", [("train", 0, 9)]), ("test[1:]+train[:4]", [("test", 1, 4), ("train", 0, 4)])]
)
def test_npz_gives_its_arrays(make_data, npz, split, parts):
    path, arrays = npz
    source = sources.load(make_data(source="npz", data_dir=str(path)), split)
    images = np.concatenate([arrays[f"{name}_images"][a:b] for name, a, b in parts])
    labels = np.concatenate([arrays[f"{name}_labels"][a:b] for name, a, b in parts])[:, 0]
    np.testing.assert_array_equal([record["image"] for record in source.records], images)
    assert [record["label"] for record in source.records] == labels.tolist()
    assert source.classes == ("0", "1", "2")[: labels.max() + 1]


def test_npz_need_not_have_labels(make_data, npz):
    path, arrays = npz
    np.savez(path, **{key: value for key, value in arrays.items() if key != "test_labels"})
    data = make_data(source="npz", data_dir=str(path))
    assert sources.load(data, "train").classes and not sources.load(data, "test").classes
    both = sources.load(data, "train+test")
    assert both.classes == () and {record["label"] for record in both.records} == {None}


def test_negative_labels_of_arrays_are_unknown():
    source = sources.from_arrays(np.zeros((3, 4, 4), np.uint8), np.array([1, -100, 0]))
    assert source.labels() == [record["label"] for record in source.records] == [1, None, 0]
    assert source.classes == ("0", "1")


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"train_images": np.zeros((3, 4, 4), np.float32)}, "uint8"),
        ({"train_images": np.zeros((3, 4, 4, 4), np.uint8)}, r"\(3, 4, 4, 4\)"),
        ({"train_images": np.zeros((3, 4, 4), np.uint8), "train_labels": np.zeros(2, int)}, "3 integers"),
        ({"train_images": np.zeros((3, 4, 4), np.uint8), "train_labels": np.zeros((3, 2), int)}, "3 integers"),
        ({"train_images": np.zeros((3, 4, 4), np.uint8), "train_labels": np.zeros(3)}, "3 integers"),
        ({"x": np.zeros((3, 4, 4), np.uint8)}, "SPLIT_images, only x"),
        ({"test_images": np.zeros((3, 4, 4), np.uint8)}, "'train' cannot be read"),
        ({"train_images": np.array([{}], object)}, "allow_pickle"),
    ],
)
def test_npz_that_will_not_do_is_named(make_data, tmp_path, arrays, says):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=says):
        sources.load(make_data(source="npz", data_dir=str(tmp_path / "x.npz")), "train")


@pytest.mark.parametrize("length", [0, 3, 400])
def test_an_npz_that_was_cut_off_is_named(make_data, npz, length):
    path, _ = npz
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"is not a readable \.npz file"):
        sources.load(make_data(source="npz", data_dir=str(path)), "train")


def test_npz_must_be_one(make_data, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no")
    for name in ("a.npy", "text.npz", "missing.npz", "."):
        with pytest.raises(UserError, match=r"data\.data_dir = .* is not a readable \.npz file"):
            sources.load(make_data(source="npz", data_dir=str(tmp_path / name)), "train")


# Folders


def fill(root, *paths, colour=None):
    """Writes a small image to each path; its first pixel is the number of the path."""
    for i, path in enumerate(paths):
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encoded(Image.new("L", (3, 2), i if colour is None else colour)))


def listing(root, split="train"):
    found = folder.scan(str(root))
    return {file.path: file.label for file in found.splits[split]}, found.classes


def test_a_folder_is_nested_as_it_is(tmp_path):
    names = ["cat/1.png", "cat/deep/er/2.PNG", "dog/3.jpg", "dog/4.JPEG", "dog/5.webp", "owl/6.bmp"]
    fill(tmp_path, *names, "cat/notes.txt", ".hidden/7.png", "dog/.8.png", "owl/9.tiff")
    files, classes = listing(tmp_path)
    assert classes == ("cat", "dog", "owl")
    assert files == {name: classes.index(name[:3]) for name in names}


def test_a_folder_of_nothing_but_images_has_no_labels(tmp_path):
    fill(tmp_path, "1.png", "2.png")
    assert listing(tmp_path) == ({"1.png": None, "2.png": None}, ())
    fill(tmp_path, "more/3.png")  # beside classes, if they are classes
    assert set(listing(tmp_path)[0].values()) == {None}


def test_one_folder_around_everything_is_no_class(tmp_path):
    fill(tmp_path, "all/images/cat/1.png", "all/images/dog/2.png")
    assert listing(tmp_path)[1] == ("cat", "dog")
    fill(tmp_path / "only", "x/1.png", "x/2.png")
    assert listing(tmp_path / "only")[1] == ()


def test_folders_with_the_names_of_splits_are_splits(tmp_path):
    fill(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/dog/3.png", "val/owl/4.png", "test/5.png", "extra/6.png")
    assert listing(tmp_path) == ({"train/cat/1.png": 0, "train/dog/2.png": 1}, ("cat", "dog", "owl"))
    assert listing(tmp_path, "val")[0] == {"val/dog/3.png": 1, "val/owl/4.png": 2}
    assert listing(tmp_path, "test")[0] == {"test/5.png": None}


def test_the_order_is_random_but_always_the_same(tmp_path):
    """A slice is a sample: each class has its share in it."""
    fill(tmp_path / "a", *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(100)))
    fill(tmp_path / "b", *(f"{c}/{i}.png" for c in ("dog", "cat") for i in reversed(range(100))))
    orders = [[file.path for file in folder.scan(str(tmp_path / x)).splits["train"]] for x in "ab"]
    assert orders[0] == orders[1] != sorted(orders[0])
    assert 35 < sum(path.startswith("cat") for path in orders[0][:100]) < 65


def test_links_are_followed_but_not_in_circles(tmp_path):
    fill(tmp_path / "elsewhere", "1.png", "2.png")
    (tmp_path / "root/cat").mkdir(parents=True)
    (tmp_path / "root/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/cat/up").symlink_to(tmp_path / "root")
    (tmp_path / "root/cat/gone.png").symlink_to(tmp_path / "nowhere.png")
    fill(tmp_path / "root", "cat/3.png")
    assert set(listing(tmp_path / "root")[0]) == {"cat/3.png", "dog/1.png", "dog/2.png"}


def test_a_folder_feeds_batches(make_data, tmp_path):
    fill(tmp_path, *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(8)))
    data = make_data(source="folder", data_dir=str(tmp_path), batch_size=16, image_size=4)
    source = sources.load(data, "train")
    assert source.classes == ("cat", "dog") and source.name(0) == str(
        tmp_path / folder.scan(str(tmp_path)).splits["train"][0].path
    )
    batch = next(pipeline.train_batches(pipeline.Reader(source, data), seed=0)).images
    np.testing.assert_array_equal(np.sort(batch[:, 0, 0, 0]), np.arange(16))
    parts = [sources.load(data, split) for split in ("train[:25%]", "train[25%:]")]
    assert [len(part) for part in parts] == [4, 12]
    names = [part.name(i) for part in parts for i in range(len(part))]
    assert names == [source.name(i) for i in range(16)]


def test_a_folder_is_known_again(make_data, tmp_path):
    fill(tmp_path / "a", "cat/1.png", "dog/2.png", "dog/3.png")
    fill(tmp_path / "moved", "cat/1.png", "dog/2.png", "dog/3.png")

    def fingerprint(name, split="train"):
        return sources.load(make_data(source="folder", data_dir=str(tmp_path / name)), split).fingerprint

    first = fingerprint("a")
    assert fingerprint("moved") == first != fingerprint("a", "train[:2]")
    fill(tmp_path / "moved", "dog/4.png")
    assert fingerprint("moved") != first
    (tmp_path / "moved/dog/4.png").unlink()
    assert fingerprint("moved") == first
    (tmp_path / "moved/dog/3.png").rename(tmp_path / "moved/cat/3.png")
    assert fingerprint("moved") != first
    with (tmp_path / "a/cat/1.png").open("ab") as file:
        file.write(b"x")
    assert fingerprint("a") != first


def test_names_that_are_no_text_are_read(make_data, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    fill(tmp_path, name)
    source = sources.load(make_data(source="folder", data_dir=str(tmp_path)), "train")
    assert source.read(0)["image"].startswith(b"\x89PNG") and source.fingerprint


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda root: "", r"data\.data_dir is empty"),
        (lambda root: root / "missing", "missing does not exist"),
        (lambda root: root, r"holds no images \(\.jpg"),
        (lambda root: root / "file", "is not a folder of images, but a file"),
    ],
)
def test_a_folder_that_will_not_do_is_named(make_data, tmp_path, make, says):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=says):
        sources.load(make_data(source="folder", data_dir=str(make(tmp_path))), "train")


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
    return make_data(source="tfds", name="tiny", data_dir=str(tmp_path), batch_size=12)


def test_tfds_gives_encoded_images_and_labels(tiny):
    train, test = (sources.load(tiny, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (12, 5)
    records = [source.records[i] for source in (train, test) for i in range(len(source))]
    assert sorted(int(record["label"]) for record in records) == list(range(17))
    for record in records:
        label = int(record["label"])
        assert record["image"] == encoded(Image.new("RGB", (6, 4 + label), (0, 0, label)))


def test_tfds_feeds_batches(tiny):
    reader = pipeline.Reader(sources.load(tiny, "train"), tiny)
    batches = pipeline.train_batches(reader, seed=0)
    for _ in range(3):
        np.testing.assert_array_equal(np.sort(next(batches).images[:, 0, 0, 2]), np.arange(12))


def test_tfds_takes_split_expressions(tiny):
    assert len(sources.load(tiny, "train[:50%]+test")) == 11
    fingerprints = {sources.load(tiny, split).fingerprint for split in ("train", "train[:50%]", "test")}
    assert len(fingerprints) == 3
    with pytest.raises(UserError, match=r"'validation' of tiny/1\.0\.0 .*train.*test"):
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


def test_a_set_that_another_process_has_prepared_meanwhile_is_read(tiny, tmp_path, monkeypatch):
    """All processes of a run prepare it at once, and only one of them can put it in its place."""

    def slower(builder):
        shutil.copytree(tmp_path / "tiny", tmp_path / "ours" / "tiny")
        raise OSError("there is one already")

    monkeypatch.setattr(Tiny, "download_and_prepare", slower)
    monkeypatch.setattr(tfds, "builder", lambda name, **where: Tiny(**where))
    assert len(sources.load(dataclasses.replace(tiny, data_dir=str(tmp_path / "ours")), "train")) == 12


def test_tfds_names_an_unknown_data_set(make_data, tmp_path):
    with pytest.raises(UserError, match=r"data\.name = 'imagenet2021' is not a TFDS data set"):
        sources.load(make_data(source="tfds", name="imagenet2021", data_dir=str(tmp_path)), "train")


def test_tfds_says_why_it_cannot_prepare(make_data, tmp_path, monkeypatch, capsys):
    """MNIST can be had by TFDS itself, given a network."""

    def get(*args, **kwargs):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests.Session, "get", get)
    with pytest.raises(UserError, match=r"mnist could not be prepared in .*no network.*tfds\.builder\('mnist'"):
        sources.load(make_data(source="tfds", name="mnist", data_dir=str(tmp_path)), "train")
    assert f"preparing mnist in {tmp_path}/mnist" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tiny:", "tiny/x/y/z", "Tiny!", "tiny:9.9.9"])
def test_a_malformed_tfds_name_is_named(tiny, make_data, name):
    with pytest.raises(UserError, match=r"data\.name = "):
        sources.load(make_data(source="tfds", name=name, data_dir=tiny.data_dir), "train")


def test_a_folder_that_is_a_data_set_needs_no_name(tiny, make_data):
    (features,) = pathlib.Path(tiny.data_dir).glob("**/features.json")
    data = make_data(source="tfds", name="", data_dir=str(features.parent))
    named = sources.load(tiny, "train")
    found = sources.load(data, "train")
    assert found.fingerprint == named.fingerprint and found.records[3]["image"] == named.records[3]["image"]
    with pytest.raises(UserError, match=r"data\.name is empty, and data\.data_dir = .*downloads"):
        sources.load(make_data(source="tfds", name="", data_dir=str(features.parent / "downloads")), "train")


class Odd(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """An image and a label by other names, and a second image; some labels are unknown."""

    VERSION = tfds.core.Version("1.0.0")
    KEYS = ("photo", "mask", "kind")

    def _info(self):
        photo, mask, kind = self.KEYS
        kinds = tfds.features.ClassLabel(names=["a", "b"])
        images = {key: tfds.features.Image(encoding_format="png") for key in (photo, mask) if key}
        features = tfds.features.FeaturesDict({**images, **({kind: kinds} if kind else {}), "number": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(6):
            images = {key: encoded(Image.new("L", (4, 4), i)) for key in self.KEYS[:2] if key}
            yield i, {**images, **({self.KEYS[2]: i % 3 - 1} if self.KEYS[2] else {}), "number": i}


@pytest.fixture
def make_odd(tmp_path, make_data):
    def make(*keys):
        tfds.disable_progress_bar()
        Odd.KEYS = keys
        Odd(data_dir=tmp_path, file_format="array_record").download_and_prepare()
        return make_data(source="tfds", name="odd", data_dir=str(tmp_path))

    return make


def test_tfds_finds_the_image_and_the_label_by_their_kind(make_odd):
    source = sources.load(make_odd("photo", "mask", "kind"), "train")
    assert source.classes == ("a", "b")
    assert collections.Counter(record["label"] for record in source.records) == {None: 2, 0: 2, 1: 2}
    assert all(record["image"].startswith(b"\x89PNG") for record in source.records)


def test_tfds_without_a_label(make_odd):
    source = sources.load(make_odd("image", "mask", None), "train")
    assert source.classes == () and {record["label"] for record in source.records} == {None}


def test_tfds_without_an_image_is_refused(make_odd):
    with pytest.raises(UserError, match=r"odd/1\.0\.0 has no image, only kind, number"):
        sources.load(make_odd(None, None, "kind"), "train")


def test_a_folder_of_tfds_that_cannot_be_read_is_one_line(make_data, tmp_path, monkeypatch):
    tfds.disable_progress_bar()
    Tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    folder = tmp_path / "tiny" / "1.0.0"
    data = make_data(source="tfds", name="", data_dir=str(folder))
    with pytest.raises(UserError, match=r"split 'train\[5:3\]' of tiny/1\.0\.0 cannot be read"):
        sources.load(data, "train[5:3]")
    info = folder / "dataset_info.json"
    whole = info.read_text()
    info.write_text(whole.replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match=r"split 'train' of tiny/1\.0\.0 cannot be read"):
        sources.load(data, "train")
    info.write_text(whole[:50])
    with pytest.raises(UserError, match=r"data\.data_dir = .* is damaged: "):
        sources.load(data, "train")
    monkeypatch.setattr(files, "_is_installed", lambda name: False)
    with pytest.raises(UserError, match=r"data\.data_dir gs://x/y: gcsfs missing; pip install gcsfs"):
        sources.load(make_data(source="tfds", name="", data_dir="gs://x/y"), "train")


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32, np.uint16, np.int8])
def test_pixels_of_an_own_source_must_be_uint8(make_data, kind):
    """Pillow would take them, and make them black."""
    source = sources.Source([{"image": np.ones((8, 8), kind), "label": None}], "", (), str)
    reader = pipeline.Reader(source, make_data(max_bad_fraction=1.0))
    with pytest.raises(decode.UnreadableError, match=f"pixels must be uint8, got {np.dtype(kind)}"):
        pipeline.central_view(reader, crop_fraction=1.0)(0)


def test_labels_are_read_with_the_images_where_they_lie_there(tiny):
    """A record that cannot be read has none."""
    source = sources.load(tiny, "train")
    labels = [int(source.read(i)["label"]) for i in range(12)]
    assert source.labels() == labels

    def read(index):
        if index == 3:
            raise OSError("gone")
        return source.records[index]

    damaged = dataclasses.replace(source, records=sources.Records(12, read))
    assert damaged.labels() == [*labels[:3], None, *labels[4:]]


def test_a_split_whose_labels_are_all_unknown_is_not_labelled():
    """Such as the test split of ImageNet in TFDS, which names the classes; one label in a thousand images is one."""
    hidden = sources.Source([{"label": None}] * 1000, "", ("cat", "dog"), str)
    assert not hidden.is_labelled()
    assert dataclasses.replace(hidden, records=[*hidden.records, {"label": 1}]).is_labelled()
    assert dataclasses.replace(hidden, label=lambda index: 0 if index == 501 else None).is_labelled()
    assert not dataclasses.replace(hidden, label=lambda index: None).is_labelled()
    read = []
    sources.Source(sources.Records(9, lambda i: read.append(i) or {"label": 0}), "", ("cat",), str).is_labelled()
    assert read == [0]


def test_tfds_stored_otherwise_is_refused(make_data, tmp_path):
    tfds.disable_progress_bar()
    info = pathlib.Path(tmp_path / "tiny/1.0.0/dataset_info.json")
    Tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match=r"data\.name = 'tiny' cannot be read as array_record"):
        sources.load(make_data(source="tfds", name="tiny", data_dir=str(tmp_path)), "train")
