"""Folders of images to ArrayRecord shards, read back through plain TFDS."""

import errno
import hashlib
import io
import json
import os
import pathlib
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl.testing import flagsaver
from PIL import Image

from cjepa_jax import signals
from cjepa_jax.data import decode, prepare, shard_file, sources
from cjepa_jax.errors import UserError
from tests import commands
from tests.helpers import encoded

BICUBIC, LANCZOS = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS


def picture(width, height, mode="RGB", seed=0):
    """Makes a smooth picture, which JPEG changes little."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), np.uint8)
    bands = [Image.fromarray(coarse[..., i]).resize((width, height), BICUBIC) for i in range(channels)]
    return Image.merge(mode, bands)


def rotated(image):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif, quality=97, subsampling=0)


def fill(root, files):
    for path, raw in files.items():
        os.makedirs(os.path.dirname(root / path), exist_ok=True)
        (root / path).write_bytes(raw)


def small_jpegs(count, prefix=""):
    return {f"{prefix}{'ab'[i % 2]}/{i}.jpg": encoded(picture(12, 10, seed=i), "JPEG") for i in range(count)}


def in_hash_order(paths):
    return sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest())


def read(output, split="train"):
    """Returns (builder, records) as TFDS reads them."""
    builder = tfds.builder_from_directory(output)
    return builder, list(builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}))


def names(records):
    return [record["file_name"].decode() for record in records]


@pytest.fixture
def shards_of_8(monkeypatch):
    monkeypatch.setattr(prepare, "IMAGES_PER_SHARD", 8)


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "in"
    fill(root, small_jpegs(20))
    return root


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
    with flagsaver.flagsaver():  # main() defines flags, which another test may define anew
        prepare.main()


# What TFDS reads


def test_tfds_reads_what_was_in_the_folder(tmp_path, shards_of_8, monkeypatch, capsys):
    files = small_jpegs(20, "train/") | small_jpegs(5, "val/")
    fill(tmp_path / "in", files)
    output = tmp_path / "2 My-Set"
    command(monkeypatch, f"--input={tmp_path / 'in'}", f"--output={output}", "--threads=2")
    shown = capsys.readouterr()
    for split, count in (("train", 20), ("val", 5)):
        builder, records = read(output, split)
        assert builder.info.features["label"].names == ["a", "b"]
        assert builder.info.splits[split].shard_lengths == ([8, 8, 4] if split == "train" else [5])
        assert names(records) == in_hash_order(path for path in files if path.startswith(split))
        assert len(records) == count
        images = sum(len(record["image"]) for record in records)
        assert images < builder.info.splits[split].num_bytes < images + 200 * count
        for record in records:
            path = record["file_name"].decode()
            assert record["image"] == files[path] and "ab"[record["label"]] == path.split("/")[1]
    assert names(read(output, "train[25%:50%]+val[:2]")[1]) == names(read(output)[1])[5:10] + names(records)[:2]
    assert builder.info.full_name == "images_2_my_set/1.0.0"
    assert "short side" in builder.info.description and "320" in builder.info.description
    assert "25 images (train 20, val 5), 2 classes" in shown.out and "0 files skipped" in shown.out
    assert f"--config.data.source=tfds --config.data.name= --config.data.data_dir='{output}'" in shown.out
    assert "25/25 images" in shown.err


def test_training_sees_the_same_sequence_as_in_the_folder(tmp_path, source, shards_of_8, make_config):
    prepare.prepare(str(source), str(tmp_path / "out"))
    folder = sources.load(make_config(data__source="folder", data__data_dir=str(source)).data, "train[:75%]")
    options = dict(data__source="tfds", data__name="", data__data_dir=str(tmp_path / "out"))
    prepared = sources.load(make_config(**options).data, "train[:75%]")
    assert list(folder.records) == list(prepared.records) and folder.classes == prepared.classes == ("a", "b")


def test_images_without_labels_get_minus_one(tmp_path):
    fill(tmp_path / "in", small_jpegs(4, "train/") | {"test/x.jpg": encoded(picture(9, 9), "JPEG")})
    prepare.prepare(str(tmp_path / "in"), str(tmp_path / "out"))
    assert [record["label"] for record in read(tmp_path / "out", "test")[1]] == [-1]
    assert sorted(record["label"] for record in read(tmp_path / "out")[1]) == [0, 0, 1, 1]


def test_a_folder_without_classes_has_no_labels(tmp_path):
    fill(
        tmp_path / "in",
        {"x.jpg": encoded(picture(9, 9), "JPEG"), os.fsdecode(b"\xff\xc3\xbc.jpg"): encoded(picture(8, 8), "JPEG")},
    )
    prepare.prepare(str(tmp_path / "in"), str(tmp_path / "out"))
    builder, records = read(tmp_path / "out")
    assert set(builder.info.features) == {"image", "file_name"}
    assert {record["file_name"] for record in records} == {b"x.jpg", b"\xff\xc3\xbc.jpg"}


def test_threads_do_not_matter(tmp_path, source, shards_of_8):
    fill(source, {"a/large.png": encoded(picture(400, 500), "PNG"), "b/bad.jpg": b""})
    for threads in (1, 5):
        prepare.prepare(str(source), str(tmp_path / f"out{threads}"), threads=threads)
    assert read(tmp_path / "out1")[1] == read(tmp_path / "out5")[1]


def test_few_results_are_held(monkeypatch):
    lock, begun, taken = threading.Lock(), [], 0
    with ThreadPoolExecutor(3) as pool:

        def work(item):
            with lock:
                begun.append(item)
            return item

        for item in prepare.in_order(pool, work, range(100), window=6):
            assert item == taken
            time.sleep(0.001)
            taken += 1
            assert len(begun) <= taken + 6
    assert taken == 100


# Single images


@pytest.mark.parametrize(
    "raw",
    [
        encoded(picture(320, 900), "JPEG"),
        encoded(picture(20, 10, "L"), "JPEG"),
        encoded(picture(320, 400), "PNG"),
        encoded(picture(8, 8, "RGBA"), "PNG"),
        encoded(picture(30, 20), "WEBP", lossless=True),
        encoded(picture(30, 20, "L"), "BMP"),
    ],
)
def test_small_images_stay_as_they_are(raw):
    assert decode.shrink_file(raw, short_side=320, quality=90) == raw


GREY16 = Image.fromarray(np.asarray(picture(400, 500, "L")).astype(np.uint16) * 257)


@pytest.mark.parametrize(
    "raw, expected",
    [
        (encoded(picture(500, 375), "JPEG", quality=97), picture(500, 375)),
        (encoded(picture(375, 1001), "JPEG", quality=97), picture(375, 1001)),
        (encoded(picture(321, 330, "L"), "JPEG", quality=97), picture(321, 330, "L")),
        (encoded(picture(400, 500), "PNG"), picture(400, 500)),
        (encoded(picture(400, 500, "L"), "PNG"), picture(400, 500, "L")),
        (encoded(GREY16, "PNG"), picture(400, 500, "L")),
        (encoded(picture(400, 500, "L").convert("1", dither=Image.Dither.NONE), "PNG"), None),
        (encoded(picture(400, 500).convert("CMYK"), "JPEG"), picture(400, 500)),
        (encoded(picture(40, 50).convert("CMYK"), "JPEG"), picture(40, 50)),
        (rotated(picture(500, 400)), picture(500, 400).rotate(270, expand=True)),
        (rotated(picture(50, 40)), picture(50, 40).rotate(270, expand=True)),
        (
            encoded(Image.new("RGBA", (400, 400), (200, 0, 0, 127)), "PNG"),
            Image.new("RGB", (400, 400), (228, 128, 128)),
        ),
        (encoded(picture(30, 20).quantize(), "GIF"), picture(30, 20).quantize().convert("RGB")),
    ],
)
@pytest.mark.parametrize("quality", [60, 90])
def test_other_images_become_upright_jpegs_no_larger_than_asked(raw, expected, quality):
    stored = Image.open(io.BytesIO(decode.shrink_file(raw, short_side=320, quality=quality)))
    expected = picture(400, 500, "L").point(lambda v: 255 * (v > 127)) if expected is None else expected
    if min(expected.size) > 320:
        factor = 320 / min(expected.size)
        expected = expected.resize([round(side * factor) for side in expected.size], LANCZOS)
        assert min(expected.size) == 320
    assert (stored.format, stored.mode, stored.size) == ("JPEG", expected.mode, expected.size)
    assert stored.getexif().get(0x0112, 1) == 1
    reference = Image.open(io.BytesIO(encoded(expected, "JPEG", quality=quality)))
    assert stored.quantization == reference.quantization
    difference = np.asarray(stored).astype(int) - np.asarray(reference)
    assert np.sqrt(np.mean(np.square(difference))) < 3


def test_shrinking_is_lanczos():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 500, 3), np.uint8))
    expected = encoded(noise.resize((400, 320), LANCZOS), "JPEG", quality=85)
    assert decode.shrink_file(encoded(noise, "PNG"), short_side=320, quality=85) == expected


def damaged(raw):
    """The middle of the pixels, which most decoders fill with something."""
    middle = len(raw) // 2
    return raw[:middle] + b"\xff\xd0" * 20 + raw[middle + 40 :]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 500, 3), np.uint8))
BAD = {
    "a/cut.jpg": encoded(NOISE, "JPEG")[:-2000],
    "a/small_cut.jpg": encoded(picture(100, 100), "JPEG")[:-100],
    "b/damaged.jpg": damaged(encoded(NOISE, "JPEG")),
    "b/small_damaged.jpg": damaged(encoded(NOISE.resize((100, 100)), "JPEG")),
    "a/page.jpg": b"<html><body>404</body></html>",
    "b/empty.png": b"",
    "a/cut.png": encoded(picture(100, 100), "PNG")[:-300],
    "b/head.jpg": encoded(NOISE, "JPEG")[:100],
}


def test_unreadable_files_are_left_out_and_listed(tmp_path, source, shards_of_8, capsys):
    fill(source, BAD)
    prepare.prepare(str(source), str(tmp_path / "out"))
    assert f"{len(BAD)} files skipped, see {tmp_path / 'out' / 'skipped.txt'}" in capsys.readouterr().out
    listed = [line.split("\t") for line in (tmp_path / "out" / "skipped.txt").read_text().splitlines()]
    assert {path for path, _ in listed} == set(BAD) and all(len(reason) > 10 for _, reason in listed)
    assert dict(listed)["a/page.jpg"].startswith("not a JPEG, PNG, WebP, BMP or GIF file")
    records = read(tmp_path / "out")[1]
    assert names(records) == in_hash_order(small_jpegs(20))
    assert names(read(tmp_path / "out", "train[3:15]")[1]) == names(records)[3:15]


def test_a_shard_may_be_empty(tmp_path, source, monkeypatch):
    monkeypatch.setattr(prepare, "IMAGES_PER_SHARD", 2)
    paths = in_hash_order(small_jpegs(20))
    fill(source, {path: b"" for path in (paths[:2] + paths[6:8])})
    prepare.prepare(str(source), str(tmp_path / "out"))
    builder, records = read(tmp_path / "out")
    assert builder.info.splits["train"].shard_lengths == [0, 2, 2, 0, 2, 2, 2, 2, 2, 2]
    assert names(records) == paths[2:6] + paths[8:]
    assert names(read(tmp_path / "out", "train[1:6]")[1]) == names(records)[1:6]


def test_too_many_unreadable_files_are_an_error(tmp_path, source):
    fill(source, {f"a/{i}.png": b"" for i in range(21)})
    for _ in range(2):
        with pytest.raises(UserError, match=r"21 of the 41 images of the split train cannot be read; .*skipped\.txt"):
            prepare.prepare(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "dataset_info.json").exists()


@pytest.mark.parametrize("number, stops", [(errno.EIO, True), (errno.EMFILE, True), (errno.EACCES, False)])
def test_storage_that_fails_ends_the_command_and_loses_no_image(tmp_path, source, monkeypatch, number, stops):
    """A file that nobody may read is left out; after a failure of the storage the same command goes on."""
    real = pathlib.Path.read_bytes

    def fail(path):
        if path.name == "3.jpg":
            raise OSError(number, "of the storage")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "read_bytes", fail)
        if stops:
            with pytest.raises(UserError, match=r"3\.jpg cannot be read .*of the storage\); mend the storage, or move"):
                prepare.prepare(str(source), str(tmp_path / "out"))
        else:
            prepare.prepare(str(source), str(tmp_path / "out"))
    prepare.prepare(str(source), str(tmp_path / "out"))
    assert len(read(tmp_path / "out")[1]) == 20 - (not stops)


# Going on


def run(source, output, hook):
    """Runs the preparation with shards of 8 images in a process of its own, after some code."""
    code = f"import os, signal\nfrom cjepa_jax.data import prepare\nprepare.IMAGES_PER_SHARD = 8\n{hook}\n"
    return commands.run("", first=f"{code}prepare.prepare({str(source)!r}, {str(output)!r}, threads=2)")


DIE = """
def die_at(holder, name, call):
    calls, real = iter(range(1, call)), getattr(holder, name)
    def stand_in(*args, **kwargs):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(holder, name, stand_in)
"""


@pytest.mark.parametrize(
    "where, finished",
    [
        ("prepare.decode, 'shrink_file', 20", 2),  # at most 4 images are ahead of the writer
        ("os, 'replace', 1", 0),  # of prepare.json, before it has ever been there
        ("os, 'replace', 4", 1),  # of the second shard
        ("os, 'replace', 5", 1),  # of prepare.json, after the second shard
        ("prepare.tfds.folder_dataset, 'write_metadata', 1", 3),
    ],
)
def test_a_killed_command_goes_on(tmp_path, source, shards_of_8, where, finished):
    fill(source, {in_hash_order(small_jpegs(20))[3]: b""})
    output = tmp_path / "out"
    assert run(source, output, f"{DIE}\ndie_at({where})").returncode == -9
    assert not (output / "dataset_info.json").exists()
    done = sorted(json.loads((output / "prepare.json").read_text())["shards"]) if finished else []
    assert len(done) == finished
    times = [os.stat(output / name).st_mtime_ns for name in done]
    prepare.prepare(str(source), str(output))
    assert [os.stat(output / name).st_mtime_ns for name in done] == times
    prepare.prepare(str(source), str(tmp_path / "at_once"))
    assert read(output)[1] == read(tmp_path / "at_once")[1]
    assert (output / "skipped.txt").read_text() == (tmp_path / "at_once" / "skipped.txt").read_text()
    assert not list(output.glob("*.tmp"))


def test_a_complete_folder_is_left_alone(tmp_path, source, shards_of_8, monkeypatch, capsys):
    flags = f"--input={source}", f"--output={tmp_path / 'out'}"
    command(monkeypatch, *flags)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*array_record*")}
    assert len(shards) == 3 and "already complete" not in capsys.readouterr().out
    command(monkeypatch, *flags)
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert f"{tmp_path / 'out'} is already complete" in capsys.readouterr().out


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[70_000] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [flip, lambda path: path.unlink(), lambda path: path.write_bytes(b""), lambda path: os.truncate(path, 100_000)],
)
def test_a_damaged_shard_is_prepared_again(tmp_path, shards_of_8, damage, capsys):
    fill(tmp_path / "in", {f"{i}.png": encoded(NOISE.resize((80, 60 + i)), "PNG") for i in range(20)})
    prepare.prepare(str(tmp_path / "in"), str(tmp_path / "out"))
    expected = read(tmp_path / "out")[1]
    damage(tmp_path / "out" / "out-train.array_record-00001-of-00003")
    capsys.readouterr()
    prepare.prepare(str(tmp_path / "in"), str(tmp_path / "out"))
    assert "out-train.array_record-00001-of-00003 is damaged" in capsys.readouterr().err
    assert read(tmp_path / "out")[1] == expected


def test_no_data_set_while_a_damaged_shard_is_prepared_again(tmp_path, source, shards_of_8, monkeypatch):
    prepare.prepare(str(source), str(tmp_path / "out"))
    (tmp_path / "out" / "out-train.array_record-00001-of-00003").unlink()
    monkeypatch.setattr(shard_file, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare.prepare(str(source), str(tmp_path / "out"))
    with pytest.raises(tfds.core.dataset_info.DatasetInfoFileError):
        tfds.builder_from_directory(tmp_path / "out")


def test_what_was_written_is_read_back(tmp_path, source, shards_of_8, monkeypatch):
    class Faulty:
        def __init__(self, *args):
            self._writer = real(*args)

        def write(self, record):
            self._writer.write(record[:-1] + bytes([record[-1] ^ 1]))

        def close(self):
            self._writer.close()

    real = shard_file.ArrayRecordWriter
    monkeypatch.setattr(shard_file, "ArrayRecordWriter", Faulty)
    with pytest.raises(UserError, match=r"out-train\.array_record-00000-of-00003 does not hold .* same command again"):
        prepare.prepare(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "out-train.array_record-00000-of-00003").exists()
    monkeypatch.setattr(shard_file, "ArrayRecordWriter", real)
    prepare.prepare(str(source), str(tmp_path / "out"))
    assert len(read(tmp_path / "out")[1]) == 20


def test_a_full_disk_is_one_line(tmp_path, source, shards_of_8, monkeypatch, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, f"--input={source}", f"--output={tmp_path / 'out'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stop.value.code == 2
    assert "00000-of-00003 cannot be written: is the disk full?" in capsys.readouterr().err.strip()
    prepare.prepare(str(source), str(tmp_path / "out"))
    assert len(read(tmp_path / "out")[1]) == 20


# Mistakes


def more_images(source):
    fill(source, {"a/new.jpg": encoded(picture(9, 9), "JPEG")})


def a_new_class(source):
    fill(source, {"c/0.jpg": (source / "a/0.jpg").read_bytes()})


@pytest.mark.parametrize(
    "change, options, message",
    [
        (None, {"short_side": 256}, "short_side: 320 -> 256"),
        (None, {"quality": 91}, "quality: 90 -> 91"),
        (more_images, {}, r"train: 20 images \w+ -> 21 images \w+"),
        (a_new_class, {}, r"train: 20 images \w+ -> 21 images \w+"),
    ],
)
def test_another_command_for_the_same_output_is_refused(tmp_path, source, change, options, message):
    prepare.prepare(str(source), str(tmp_path / "out"))
    if change:
        change(source)
    with pytest.raises(UserError, match=f"out was begun with other settings .*{message}.*name another --output"):
        prepare.prepare(str(source), str(tmp_path / "out"), **options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input={in}"], "--output is missing"),
        (["--input={in}", "--output={out}", "--short-side=x"], "--short-side"),
        (["--input={in}", "--output={out}", "--short_side=0"], "--short-side must be at least 1"),
        (["--input={in}", "--output={out}", "--quality=101"], "--quality"),
        (["--input={in}", "--output={out}", "--threads=0"], "--threads"),
        (["--input={in}", "--output={out}", "--size=3"], "'size'"),
        (["--input={in}", "--output="], "--output must be a local folder"),
        (["--input={in}", "--output=gs://bucket/set"], "--output must be a local folder"),
        (["--input={in}", "--output={in}"], "lies inside --input"),
        (["--input={in}", "--output={in}/a/b"], "lies inside --input"),
        (["--input={in}", "--output={tmp}"], "not empty"),
        (["--input={in}", "--output={in}/a/0.jpg/b"], "lies inside"),
        (["--input={in}", "--output=/proc/no/such"], "/proc/no"),
        (["--input={tmp}/none", "--output={out}"], "does not exist"),
        (["--input={tmp}/nothing", "--output={out}"], "holds no images"),
    ],
)
def test_mistakes_are_one_line(tmp_path, source, arguments, message, monkeypatch, capsys):
    (tmp_path / "nothing").mkdir()
    places = {"in": source, "out": tmp_path / "out", "tmp": tmp_path}
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *(argument.format(**places) for argument in arguments))
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.startswith("error: ") and shown.count("\n") == 1 and message in shown
    assert not (tmp_path / "out").exists()


def test_help_is_the_docstring(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "--help")
    assert not stop.value.code and capsys.readouterr().out == prepare.__doc__.strip() + "\n"


def test_an_interrupt_says_how_to_go_on(tmp_path, source, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "prepare", interrupt)
    ended = []
    monkeypatch.setattr(signals, "end", ended.append)
    command(monkeypatch, f"--input={source}", f"--output={tmp_path / 'out'}")
    says = "interrupted; complete shards of 4096 images stay, and the same command goes on after them\n"
    assert capsys.readouterr().err == says and ended == [2]


def test_archives_beside_images_are_refused(tmp_path, source):
    """Either could be what is meant."""
    (source / "download.tar").touch()
    message = r"in .*/in/download\.tar and others as files, such as .*\.jpg; move one kind away"
    with pytest.raises(UserError, match=message):
        prepare.prepare(str(source), str(tmp_path / "out"))


def test_a_name_that_tfds_would_change_is_refused(tmp_path, source):
    fill(source, {"b /0.jpg": encoded(picture(9, 9), "JPEG")})
    with pytest.raises(UserError, match=r"'b '.*rename"):
        prepare.prepare(str(source), str(tmp_path / "out"))


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_foreign_prepare_json_is_refused(tmp_path, source, text):
    fill(tmp_path, {"out/prepare.json": text.encode()})
    with pytest.raises(UserError, match=r"out/prepare\.json cannot be read"):
        prepare.prepare(str(source), str(tmp_path / "out"))


def test_two_commands_at_once_are_refused(tmp_path, source):
    with prepare.claimed(str(tmp_path / "out")), pytest.raises(UserError, match="another command is writing into"):
        prepare.prepare(str(source), str(tmp_path / "out"))
    prepare.prepare(str(source), str(tmp_path / "out"))
