"""Tar shards and Parquet: written by tarfile and pyarrow, read by place, trained on and prepared as folders are."""

import io
import itertools
import json
import pathlib
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from PIL import Image

import cjepa_jax
from cjepa_jax.config import Data
from cjepa_jax.data import pipeline, sources
from cjepa_jax.data.decode import UnreadableError
from cjepa_jax.data.prepare import prepare
from cjepa_jax.errors import UserError
from tests.helpers import encoded

PHOTO = Image.open(pathlib.Path(sklearn.datasets.__file__).parent / "images" / "china.jpg")
MEAN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "image_size": 16, "batch_size": 8}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A home of its own, where the index of tar shards is kept."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home" / ".cache" / "cjepa_jax" / "tar"


def jpeg(i: int) -> bytes:
    return encoded(PHOTO.crop((7 * i, 3 * i, 7 * i + 40, 3 * i + 30)), "JPEG")


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


LONG = "a_long_name/" * 12


@pytest.fixture(params=["webdataset ustar", "webdataset gnu", "webdataset pax", "parquet", "parquet of datasets"])
def archive(request, tmp_path):
    """20 images of train and 6 of val, in several files: kind, folder, labels of both and the names of the classes."""
    root = tmp_path / "set"
    labels = {"train": [i % 3 for i in range(20)], "val": [2, 1, 0, 0, 1, 2]}
    kind, _, way = request.param.partition(" ")
    for split, found in labels.items():
        start = 100 if split == "val" else 0
        for part in range(2):
            rows = range(part * len(found) // 2, (part + 1) * len(found) // 2)
            images = [jpeg(start + i) for i in rows]
            if kind == "webdataset":
                (root / split).mkdir(parents=True, exist_ok=True)
                form = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}[way]
                with tarfile.open(root / split / f"{part:04}.tar", "w", format=form) as tar:
                    for i, image in zip(rows, images, strict=True):
                        key = f"{'short/' if way == 'ustar' else LONG}{i}"
                        if way == "gnu":
                            add(tar, f"{key}.json", json.dumps({"label": found[i], "text": "x"}).encode())
                        add(tar, f"{key}.jpg", image)
                        if way != "gnu":
                            add(tar, f"{key}.cls", b"%d" % found[i])
            else:
                root.mkdir(exist_ok=True)
                column = pa.array([{"bytes": image, "path": f"{i}.jpg"} for i, image in zip(rows, images, strict=True)])
                table = pa.table({"image": column, "label": pa.array([found[i] for i in rows], pa.int64())})
                if way:
                    feature = {"_type": "ClassLabel", "names": ["cat", "dog", "owl"]}
                    about = {"info": {"features": {"image": {"_type": "Image"}, "label": feature}}}
                    table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
                pq.write_table(table, root / f"{split}-{part:05}-of-00002.parquet", row_group_size=3)
    return kind, root, labels, ("cat", "dog", "owl") if way == "of datasets" else ("0", "1", "2")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_long_name_of_a_folder_or_link_is_not_that_of_the_next_image(tmp_path, form):
    with tarfile.open(tmp_path / "train.tar", "w", format=form) as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE):
            info = tarfile.TarInfo(f"{LONG}{kind}")
            info.type, info.linkname = kind, f"{LONG}to" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info)
            add(tar, f"{kind.decode()}.jpg", jpeg(0))
    source = sources.load(Data(source="webdataset", data_dir=str(tmp_path), **MEAN), "train")
    assert [source.name(i).rpartition("/")[2] for i in range(2)] == ["5.jpg", "2.jpg"]


def load(archive, split: str) -> sources.Source:
    return sources.load(Data(source=archive[0], data_dir=str(archive[1]), **MEAN), split)


def test_images_and_labels_are_those_that_were_written(archive):
    _, root, labels, classes = archive
    source = load(archive, "train")
    assert len(source) == 20 and source.classes == classes and source.labels() == labels["train"]
    for i in (0, 7, 19):
        assert source.read(i) == {"image": jpeg(i), "label": labels["train"][i]}
    assert source.name(3).startswith(str(root)) and len({source.name(i) for i in range(20)}) == 20

    mixed = load(archive, "val[2:]+train[:25%]")
    assert [mixed.read(i)["image"] for i in range(9)] == [jpeg(i) for i in (102, 103, 104, 105, 0, 1, 2, 3, 4)]
    assert mixed.labels() == labels["val"][2:] + labels["train"][:5]
    assert mixed.fingerprint != source.fingerprint == load(archive, "train").fingerprint
    with pytest.raises(UserError, match="split 'tran' cannot be read"):
        load(archive, "tran")


def test_batches_are_a_function_of_seed_and_number(archive):
    """For any number of threads, and the same as of the images in memory."""

    def batches(source, start, threads):
        data = Data(source="folder", threads=threads, **MEAN)
        found = pipeline.train_batches(pipeline.Reader(source, data), seed=3, start=start)
        return [next(found) for _ in range(4 - start)]

    source = load(archive, "train")
    arrays = [np.asarray(Image.open(io.BytesIO(jpeg(i)))) for i in range(20)]
    straight = batches(source, 0, 1)
    for batch, again in zip(straight[2:], batches(source, 2, 3), strict=True):
        np.testing.assert_array_equal(batch.images, again.images)
        np.testing.assert_array_equal(batch.labels, again.labels)
    for batch, other in zip(straight, batches(sources.from_arrays(np.stack(arrays)), 0, 1), strict=True):
        assert np.abs(batch.images.astype(int) - other.images).mean() < 3  # decoded at reduced size
    assert any((a.images != b.images).any() for a, b in itertools.pairwise(straight))


def test_prepare_converts_them(archive, tmp_path, capsys):
    prepare(str(archive[1]), str(tmp_path / "prepared"), threads=2)
    assert "26 images (train 20, val 6), 3 classes" in capsys.readouterr().out
    builder = tfds.builder_from_directory(tmp_path / "prepared")
    assert builder.info.features["label"].names == list(archive[3])
    data = Data(source="tfds", data_dir=str(tmp_path / "prepared"), **MEAN)
    prepared = sources.load(data, "train")
    assert [prepared.read(i)["image"] for i in range(20)] == [jpeg(i) for i in range(20)]
    assert prepared.labels() == archive[2]["train"]
    prepare(str(archive[1]), str(tmp_path / "prepared"), threads=2)
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    "archive", ["webdataset pax", pytest.param("parquet of datasets", marks=pytest.mark.slow)], indirect=True
)
def test_a_run_trains_on_them(archive, tmp_path):
    data = {"source": archive[0], "data_dir": str(archive[1]), "test_split": "val"} | MEAN | {"batch_size": 8}
    settings = {"model": {"size": "16x1x2", "patch_size": 4, "dtype": "float32"}, "predictor": {"width": 8, "depth": 1}}
    settings |= {"mask": {"context_tokens": 8, "min_keep": 2}, "optim": {"epochs": 0.8, "warmup_epochs": 0.0}}
    settings |= {"data": data, "eval": {"every": 100, "evaluators": ("knn",), "images": 20}}
    state = cjepa_jax.train(settings, workdir=tmp_path / "run")
    assert int(state.step) == 2
    assert "knn" in json.loads((tmp_path / "run" / "evaluation.json").read_text())["results"]


def test_the_index_of_tar_shards_is_made_once(tmp_path, cache, monkeypatch):
    def write(count):
        with tarfile.open(tmp_path / "set" / "train.tar", "w") as tar:
            for i in range(count):
                add(tar, f"{i}.jpg", jpeg(i))

    (tmp_path / "set").mkdir()
    write(3)
    data = Data(source="webdataset", data_dir=str(tmp_path / "set"), **MEAN)
    first = sources.load(data, "train")
    (kept,) = cache.iterdir()
    stamp = kept.stat().st_mtime_ns
    assert sources.load(data, "train").fingerprint == first.fingerprint
    assert kept.stat().st_mtime_ns == stamp and first.classes == () and first.labels() == [None] * 3
    write(4)
    assert len(sources.load(data, "train")) == 4 and len(list(cache.iterdir())) == 2
    for file in cache.iterdir():
        file.write_bytes(b"damaged")
    assert len(sources.load(data, "train")) == 4
    monkeypatch.setenv("HOME", "/proc/none")  # where no cache can be
    assert len(sources.load(data, "train")) == 4


def damaged(name, tmp_path):
    """A folder with a bad file in it, the source that reads it, and what is said."""
    root = tmp_path / "bad"
    root.mkdir()
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(3):
            add(tar, f"{i}.jpg", jpeg(i))
        if name == "no number":
            add(tar, "2.cls", b"cat")
    raw = file.getvalue()
    table = pa.table({"label": [1, 2]})
    if name == "cut":
        raw = raw[: len(raw) // 4]
    elif name == "flipped":
        raw = raw[:20] + b"\xff" + raw[21:]
    if name in ("cut", "flipped", "no number"):
        (root / "train.tar").write_bytes(raw)
        say = {"cut": "is damaged at byte .*it reaches beyond", "flipped": "at byte 0: its checksum differs"}
        return root, "webdataset", say.get(name, r"2\.cls holds no number of a class")
    if name == "no image":
        pq.write_table(table, root / "train.parquet")
        return root, "parquet", r"has no column of images \(bytes, or \{bytes, path\}\), only label"
    if name == "no parquet":
        (root / "train.parquet").write_bytes(b"PAR1 or not")
        return root, "parquet", "is not a readable Parquet file"
    if name == "empty":
        pq.write_table(pa.table({"image": pa.array([], pa.binary())}), root / "train.parquet")
        return root, "parquet", "hold no images"
    return root, name, r"holds no \.(tar|parquet) files, nor do the folders one and two levels below"


@pytest.mark.parametrize(
    "name", ["cut", "flipped", "no number", "no image", "no parquet", "empty", "webdataset", "parquet"]
)
def test_bad_files_are_one_line(name, tmp_path):
    root, kind, says = damaged(name, tmp_path)
    with pytest.raises(UserError, match=says) as error:
        sources.load(Data(source=kind, data_dir=str(root), **MEAN), "train")
    assert str(error.value).startswith("data.data_dir: ") and "\n" not in str(error.value)


def write_labels(path, labels, names=()):
    about = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}} if names else {}
    table = pa.table({"image": [jpeg(i) for i in range(len(labels))], "label": labels})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), path)


def test_the_classes_of_parquet_are_those_of_all_splits(tmp_path):
    """Where no file names them, the largest label of any split counts them."""
    data = Data(source="parquet", data_dir=str(tmp_path), **MEAN)
    write_labels(tmp_path / "train.parquet", [0, 3])
    write_labels(tmp_path / "test.parquet", [1, 0, 2])
    assert sources.load(data, "train").classes == sources.load(data, "test").classes == ("0", "1", "2", "3")
    write_labels(tmp_path / "test.parquet", [1, 0], names=["cat", "cow", "dog", "emu"])
    assert sources.load(data, "train").classes == sources.load(data, "test").classes == ("cat", "cow", "dog", "emu")
    write_labels(tmp_path / "test.parquet", [1, 0], names=["cat", "cow", "dog"])
    with pytest.raises(UserError, match="there is a label 3, and the files name 3 classes"):
        sources.load(data, "train")
    write_labels(tmp_path / "train.parquet", [0, 1], names=["cat", "dog"])
    with pytest.raises(UserError, match=r"the splits of .* have different classes"):
        sources.load(data, "train")


def test_the_parquet_files_of_a_split_agree(tmp_path):
    """A file that names no classes has those of the others."""
    data = Data(source="parquet", data_dir=str(tmp_path), **MEAN)
    write_labels(tmp_path / "train-0.parquet", [1, 0], names=["cat", "dog"])
    write_labels(tmp_path / "train-1.parquet", [0, 1])
    assert sources.load(data, "train").classes == ("cat", "dog")
    says = r"train-1\.parquet has other columns of images and labels, or other classes, than .*train-0\.parquet"
    write_labels(tmp_path / "train-1.parquet", [0, 1], names=["dog", "cat"])
    with pytest.raises(UserError, match=says):
        sources.load(data, "train")
    pq.write_table(pa.table({"photo": [jpeg(0)]}), tmp_path / "train-1.parquet")
    with pytest.raises(UserError, match=says):
        sources.load(data, "train")


def test_names_are_those_of_the_files_below_the_folder(tmp_path):
    """To name an image reads no label, which may hang where the image does."""
    for part in "ab":
        (tmp_path / part).mkdir()
        write_labels(tmp_path / part / "0.parquet", [0, 1])
        with tarfile.open(tmp_path / part / "0.tar", "w") as tar:
            add(tar, "x.jpg", jpeg(0))
            add(tar, "deep/._x.jpg", b"what macOS adds")
    (tmp_path / "._c.tar").write_bytes(b"what macOS adds")
    source = sources.load(Data(source="webdataset", data_dir=str(tmp_path), **MEAN), "train")
    assert [source.name(i) for i in range(len(source))] == [f"{tmp_path}/{part}/0.tar/x.jpg" for part in "ab"]
    source = sources.load(Data(source="parquet", data_dir=str(tmp_path), **MEAN), "train")
    names = [f"{tmp_path}/{part}/0.parquet[group 0, row {row}]" for part in "ab" for row in range(2)]
    for part in "ab":
        (tmp_path / part / "0.parquet").unlink()
    assert [source.name(i) for i in range(len(source))] == names


def test_a_row_without_an_image_is_unreadable(tmp_path):
    rows = pa.array([{"bytes": jpeg(0), "path": "0.jpg"}, {"bytes": None, "path": "elsewhere.jpg"}])
    pq.write_table(pa.table({"image": rows}), tmp_path / "train.parquet")
    source = sources.load(Data(source="parquet", data_dir=str(tmp_path), **MEAN), "train")
    assert source.read(0)["image"] == jpeg(0) and source.classes == ()
    with pytest.raises(UnreadableError, match="the row holds no bytes of an image"):
        source.read(1)
