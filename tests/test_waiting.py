"""Images that do not come: a pipe in the place of a file stands for a network file system that hangs."""

import concurrent.futures
import itertools
import os
import signal
import threading
import time

import numpy as np
import pytest
from etils import epath
from PIL import Image

from cjepa_jax.data import folder, pipeline, sources, waiting
from cjepa_jax.data.decode import UnreadableError
from cjepa_jax.errors import UserError
from cjepa_jax.train import loop
from tests.commands import Command
from tests.test_signals import end, start
from tests.test_train import FOLDER, lines, photos, saved_state


@pytest.fixture
def release():
    """Lets reads that hang come to their end."""
    event = threading.Event()
    yield event
    event.set()


def hang(release, name):
    with waiting.reading(lambda: name):
        release.wait(60)
    return name


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(2) as made:
        yield made


def test_a_result_comes_as_it_is(pool):
    assert waiting.result(pool.submit(lambda: 3)) == 3
    with pytest.raises(TimeoutError, match="of the storage"):
        waiting.result(pool.submit(lambda: (_ for _ in ()).throw(TimeoutError("of the storage"))))


def test_a_file_that_does_not_come_is_named_once_and_given_up(pool, release, monkeypatch, capsys):
    monkeypatch.setattr(waiting, "NOTICE", 0.3)
    monkeypatch.setattr(waiting, "HANGS", 0.2)
    future = pool.submit(hang, release, "a.jpg")
    with pytest.raises(waiting.StalledError, match=r"^a\.jpg was not read within data\.read_timeout = 1 s; mend"):
        waiting.result(future, timeout=1)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("waiting for a.jpg, which was not read within 0 s; gives up after")


def test_a_source_may_read_from_another_one():
    base = sources.from_arrays(np.arange(3 * 4, dtype=np.uint8).reshape(3, 2, 2))
    odd = sources.Source(sources.Records(1, lambda index: base.read(2 * index + 1)), "odd", (), str)
    np.testing.assert_array_equal(odd.read(0)["image"], [[4, 5], [6, 7]])
    assert not waiting._reads


def test_a_stop_gives_up_a_file_that_hangs_and_no_other(pool, release, monkeypatch):
    monkeypatch.setattr(waiting, "HANGS", 0.5)
    with waiting.until(lambda: True):
        assert waiting.result(pool.submit(lambda: time.sleep(1) or 3)) == 3  # decoding takes its time
        with pytest.raises(waiting.StalledError, match=r"^stopped while waiting for b\.jpg"):
            waiting.result(pool.submit(hang, release, "b.jpg"))
    release.set()


def test_pipes_and_broken_links_are_named_when_a_folder_is_listed(tmp_path, capsys):
    Image.new("L", (3, 3)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "nowhere")
    for _ in range(2):
        assert [file.path for file in folder.scan(str(tmp_path)).splits["train"]] == ["a.png"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and {line.partition(":")[0] for line in said} == {
        f"skipped {tmp_path}/b.png",
        f"skipped {tmp_path}/c.png",
    }


@pytest.fixture
def digits_that_hang(release, monkeypatch):
    """Lets every read hang that comes after the first `after`."""
    count = itertools.count()

    def hangs(after):
        def read(source, index):
            with waiting.reading(lambda: source.name(index)):
                if next(count) >= after:
                    release.wait(60)
                return source.records[index]

        monkeypatch.setattr(sources.Source, "read", read)
        monkeypatch.setattr(waiting, "HANGS", 0.2)

    return hangs


def test_an_image_that_does_not_come_in_time_ends_the_run_saved(make_config, tmp_path, digits_that_hang):
    config = make_config(
        data__read_timeout=1.0, optim__epochs=1000, log__every=1, checkpoint__every=100_000, checkpoint__keep_every=0
    )
    digits_that_hang(after=10 * config.data.batch_size)
    with pytest.raises(
        waiting.StalledError, match=r"^digits train\[\d+\] was not read within data\.read_timeout = 1 s"
    ):
        loop.train(config, epath.Path(tmp_path / "run"))
    (step,) = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir()]
    assert step == lines(tmp_path / "run")[-1]["step"] and step >= 6  # what was read ahead is not lost
    assert int(saved_state(tmp_path / "run", step)["step"]) == step


def test_images_that_cannot_be_read_end_the_run_saved(make_config, tmp_path, monkeypatch):
    config = make_config(log__every=1, checkpoint__every=1000, data__max_bad_fraction=1.0)
    count, read = itertools.count(), sources.Source.read

    def breaks(source, index):
        if next(count) >= 10 * config.data.batch_size:
            raise UnreadableError("the disk is gone")
        return read(source, index)

    monkeypatch.setattr(sources.Source, "read", breaks)
    with pytest.raises(UserError, match="100 images in a row cannot be read"):
        loop.train(config, epath.Path(tmp_path / "run"))
    (step,) = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir()]
    assert step == lines(tmp_path / "run")[-1]["step"] and step >= 6


def test_an_evaluation_gives_up_an_image_that_does_not_come(make_config, digits_that_hang):
    data = make_config(data__read_timeout=1.0).data
    batches = pipeline.ordered_batches(pipeline.Reader(sources.load(data, "train"), data), size=16, crop_fraction=1.0)
    digits_that_hang(after=40)
    next(batches)
    with pytest.raises(waiting.StalledError, match=r"^digits train\[\d+\] was not read within"):
        for _ in batches:
            pass


# The command, as a process


def train(tmp_path, *arguments: str) -> Command:
    """Trains for ever on images of which each becomes a pipe after a few steps; returns when that is so."""
    images = photos(tmp_path / "images", ".")
    workdir = tmp_path / "run"
    where = (f"--config.data.data_dir={images}", f"--workdir={workdir}", "--config.optim.epochs=1000")
    rare = ("--config.checkpoint.every=100000", "--config.checkpoint.keep_every=0")
    process = start("cjepa_jax.main", *FOLDER, *where, *rare, *arguments, first=PATIENCE)
    deadline = time.time() + 200
    while not (workdir / "metrics.jsonl").exists() or len(lines(workdir)) < 3:
        assert process.poll() is None and time.time() < deadline, process.communicate(0)
        time.sleep(0.1)
    for path in images.iterdir():
        os.mkfifo(path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
    return process


PATIENCE = "from cjepa_jax.data import waiting; waiting.NOTICE = 3.0"


def test_sigterm_saves_and_leaves_while_an_image_does_not_come(tmp_path):
    process = train(tmp_path)
    process.until_said(f"waiting for {tmp_path}/images/")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    stopped = lines(tmp_path / "run")[-1]["step"]
    assert f"stopped while waiting for {tmp_path}/images/" in said
    assert said.rstrip().splitlines()[-1].startswith(f"stopped and saved at step {stopped} of")
    assert int(saved_state(tmp_path / "run", stopped)["step"]) == stopped


@pytest.mark.slow
def test_the_command_leaves_when_an_image_does_not_come_in_time(tmp_path):
    process = train(tmp_path, "--config.data.read_timeout=4")
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 2, said
    assert said.rstrip().splitlines()[-1].startswith(f"error: {tmp_path}/images/"), said
    assert "was not read within data.read_timeout = 4 s" in said and "Traceback" not in said
    stopped = lines(tmp_path / "run")[-1]["step"]
    assert int(saved_state(tmp_path / "run", stopped)["step"]) == stopped


@pytest.mark.slow
def test_a_second_signal_ends_at_once_while_an_image_does_not_come(tmp_path):
    process = train(tmp_path)
    process.until_said("waiting for ")
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    assert end(process, signal.SIGINT)[0] == -signal.SIGINT


def test_preparing_names_a_file_that_does_not_come_and_can_be_interrupted(tmp_path):
    """Nothing of it is lost; the first signal ends it."""
    images = photos(tmp_path / "images", ".")
    before = f"""
import os
from cjepa_jax.data import folder, waiting
waiting.NOTICE = 3.0
def scan(root, scan=folder.scan):
    found = scan(root)
    os.remove({str(images / "8.jpg")!r})
    os.mkfifo({str(images / "8.jpg")!r})
    return found
folder.scan = scan
"""
    process = start("cjepa_jax.data.prepare", f"--input={images}", f"--output={tmp_path / 'out'}", first=before)
    process.until_said(f"waiting for {images}/8.jpg, which was not read within 3 s\n")
    assert end(process, signal.SIGTERM, within=5)[0] == -signal.SIGTERM
