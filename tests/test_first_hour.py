"""What misleads in the first hour with own images is refused, or said in one line."""

import contextlib
import pathlib

import pytest
from etils import epath

from cjepa_jax import pretrained
from cjepa_jax.config import Data
from cjepa_jax.data import decode, folder, pipeline, sources
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate import frozen
from cjepa_jax.train import setup
from cjepa_jax.train.setup import set_up


def images(root: pathlib.Path, *paths: str) -> str:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return str(root)


def test_folders_named_as_splits_are_splits_whatever_their_capitals(tmp_path):
    root = images(tmp_path, "Train/cat/1.jpg", "Train/dog/2.jpg", "VAL/cat/3.jpg", "VAL/dog/4.jpg")
    found = folder.scan(root)
    assert found.splits.keys() == {"train", "val"} and found.classes == ("cat", "dog")
    assert {file.path for file in found.splits["val"]} == {"VAL/cat/3.jpg", "VAL/dog/4.jpg"}
    images(tmp_path, "val/cat/5.jpg")
    with pytest.raises(UserError, match=r"holds both VAL and val: rename one"):
        folder.scan(root)


def test_stray_images_are_named_where_they_cost_the_labels(tmp_path, capsys):
    assert folder.scan(images(tmp_path, "cat/1.jpg", "dog/2.jpg", "stray.jpg")).classes == ()
    says = f"{tmp_path}/: the images have no labels, because 1 of them, such as stray.jpg, lie beside the folders"
    assert says in capsys.readouterr().err
    nested = images(tmp_path / "nested", "all/cat/1.jpg", "all/dog/2.jpg", "all/stray.jpg")
    assert folder.scan(nested).classes == ()
    assert "because 1 of them, such as all/stray.jpg, lie beside the folders" in capsys.readouterr().err
    assert folder.scan(images(tmp_path / "flat", "1.jpg", "2.jpg")).classes == ()
    assert capsys.readouterr().err == ""


def test_images_beside_folders_of_splits_are_named(tmp_path, capsys):
    root = images(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "bus/3.jpg", "car/x/4.jpg", "5.jpg", "notes/6.txt")
    assert len(folder.scan(root).splits["train"]) == 2
    assert capsys.readouterr().err == (
        f"{root}: the images in train are taken as splits, and those beside them are not read: 5.jpg, bus, car\n"
    )


def test_a_file_is_no_folder_and_is_not_said_to_be_missing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a folder of images, but a file"):
        folder.scan(str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"--checkpoint .*/file is not a folder; wanted: a workdir"):
        pretrained.load(str(tmp_path / "file"), ["encoder"])


def test_the_flag_is_named_by_which_a_checkpoint_was_given(make_config, tmp_path):
    with pytest.raises(UserError, match=r"^--init /nope does not exist"):
        set_up(make_config(), epath.Path(tmp_path / "run"), epath.Path("/nope"))
    with pytest.raises(UserError, match=r"^--config\.attention\.other /nope does not exist"):
        pretrained.available(epath.Path("/nope"), flag="--config.attention.other")


def test_results_that_mean_less_than_they_seem_are_announced(make_config, capsys):
    config = make_config(data__batch_size=64, eval__every=5)
    few = sources.load(config.data, "train[:40]")
    assert (
        "a batch of 64 images holds some of the 40 training images more than once" in setup.doubts(config, few, few)[0]
    )
    whole = sources.load(config.data, "train")
    assert setup.doubts(config, whole, whole) == []
    for classes, says in ((("cat",), "are all of one class, 'cat'"), ((), "have no labels")):
        source = sources.Source(range(100), "", classes, str)
        (note,) = setup.doubts(config, source, source)
        assert note.startswith(f"warning: eval.every = 5 evaluates nothing, because the training images {says}; ")
        assert setup.doubts(config, source, whole) == []  # which eval.source may name
    frozen.warn_of_same_images(config.data, whole, sources.load(config.data, "test"))
    assert capsys.readouterr().err == ""
    frozen.warn_of_same_images(config.data, whole, sources.load(config.data, "train[:100%]"))
    assert "the accuracies are not those of held-out images" in capsys.readouterr().err
    one = sources.Source(range(100), "", ("cat",), str)
    with pytest.raises(UserError, match="has one class only, 'cat': nothing can be told apart"):
        frozen.check_labels(config.data, one, one)
    hidden = sources.Source([{"label": None}] * 100, "", whole.classes, str)
    with pytest.raises(UserError, match=r"^data\.test_split = 'test' names classes, but none of its images has a"):
        frozen.check_labels(config.data, whole, hidden)


def test_the_count_of_unreadable_images_is_that_of_the_images_tried():
    broken = sources.Source([{"image": b"x", "label": None}] * 1800, "", (), str)
    reader = pipeline.Reader(broken, Data(source="own", max_bad_fraction=0.01))
    with pytest.raises(UserError, match=r"^23 of the 23 images tried cannot be read, more than"):
        for index in range(30):
            with contextlib.suppress(decode.UnreadableError):
                reader.crops(index, [])
