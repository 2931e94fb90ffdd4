"""The command as a user runs it: results, resuming, stopping, and what it says of mistakes."""

import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import sklearn.datasets
from etils import epath
from PIL import Image

from cjepa_jax import settings
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate.during import DuringTraining
from cjepa_jax.settings import flatten
from cjepa_jax.train import checkpoint, loop, nonfinite, setup
from cjepa_jax.train.writer import TIMED
from tests import commands
from tests.helpers import lines

ROOT = pathlib.Path(__file__).parents[1]
SMALL = [
    "--config.model.size=16x1x2",
    "--config.predictor.width=8",
    "--config.predictor.depth=1",
    "--config.data.batch_size=16",
    "--config.eval.every=0",
    "--config.log.every=1",
    "--config.checkpoint.every=5",
]
TEN_STEPS = ["--config.optim.epochs=0.1114", "--config.optim.warmup_epochs=0.02"]  # of 1,437 images, 16 a step


def run(*arguments: str, code: int = 0) -> str:
    """What the command printed; checks its exit code."""
    done = commands.run("cjepa_jax.main", *arguments)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def saved_state(workdir: pathlib.Path, step: int):
    return ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """The workdir of ten steps, checkpoints at 5 and 10."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    run("--config=configs/digits.py", f"--workdir={workdir}", *SMALL, *TEN_STEPS)
    return workdir


def test_workdir_holds_what_the_readme_says(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["model.size"] == "16x1x2" and config["vicreg.weight"] == 0.02
    assert [line["step"] for line in lines(finished)] == list(range(1, 11))
    expected = "loss/total loss/prediction loss/variance loss/invariance loss/covariance rep/std rep/rank rep/cosine"
    expected += " rep/block_mean_error lr weight_decay ema_momentum grad_norm data/wait_fraction data/skipped"
    for line in lines(finished):
        assert set(expected.split()) <= line.keys()
        assert all(math.isfinite(value) for value in line.values())
        assert 0 <= line["data/wait_fraction"] <= 1 and line["data/skipped"] == 0
    assert "images_per_second" in lines(finished)[-1]
    assert sorted(p.name for p in (finished / "checkpoints").iterdir() if p.is_dir()) == ["10", "5"]
    assert list((finished / "tensorboard").glob("events.*"))
    for name in ("curves.png", "masks.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_ten_steps_equal_five_and_a_new_process_and_five(finished, tmp_path):
    """Bit for bit: state, losses (so images, crops and masks too)."""
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    shutil.rmtree(again / "checkpoints" / "10")
    said = run("--config=configs/digits.py", f"--workdir={again}", *SMALL, *TEN_STEPS)
    assert "going on from step 5" in said
    for a, b in zip(lines(finished), lines(again), strict=True):
        assert {k: v for k, v in a.items() if k not in TIMED} == {k: v for k, v in b.items() if k not in TIMED}
    straight, resumed = saved_state(finished, 10), saved_state(again, 10)
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    five = saved_state(finished, 5)
    assert any(
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (five, straight)), strict=True)
    )


def test_a_signal_does_not_end_a_run_that_writes_its_last_checkpoint(make_config, tmp_path, monkeypatch):
    close, ended = checkpoint.Checkpointer.close, []

    def signalled(self):
        os.kill(os.getpid(), signal.SIGTERM)
        close(self)

    monkeypatch.setattr(checkpoint.Checkpointer, "close", signalled)
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append(True))  # what it would do if nobody listened
    try:
        loop.train(make_config(optim__epochs=2 * 16 / 1437, optim__warmup_epochs=0.0), epath.Path(tmp_path / "run"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not ended and int(saved_state(tmp_path / "run", 2)["step"]) == 2


def test_the_seed_draws_the_network(make_config, tmp_path, monkeypatch):
    class DrawnError(Exception):
        pass

    def init(self, rng):
        drawn.append(jax.random.key_data(rng).tolist())
        raise DrawnError

    drawn = []
    monkeypatch.setattr(setup.Training, "init", init)
    for number, seed in enumerate((0, 1, 0)):
        with pytest.raises(DrawnError):
            loop.train(make_config(seed=seed), epath.Path(tmp_path / str(number)), compile_step=lambda *_: None)
    assert drawn[0] == drawn[2] != drawn[1]


def test_a_trace_holds_nothing_of_the_evaluation(make_config, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    monkeypatch.setattr(DuringTraining, "report", lambda *_, **__: seen.append("report") or {})
    short = make_config(optim__epochs=4 * 16 / 1437, optim__warmup_epochs=0.0, eval__every=1000)
    loop.train(short, epath.Path(tmp_path / "run"), profile=(2, 100))
    assert seen == ["start", "stop", "report"]


def test_sigterm_saves_and_leaves_and_the_same_command_goes_on(tmp_path):
    workdir = tmp_path / "run"
    arguments = ["--config=configs/digits.py", f"--workdir={workdir}", *SMALL, "--config.checkpoint.every=100000"]
    process = commands.Command("cjepa_jax.main", *arguments)
    deadline = time.time() + 200
    while not (workdir / "metrics.jsonl").exists() or len(lines(workdir)) < 3:
        assert process.poll() is None and time.time() < deadline, process.communicate(0)
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    stopped = lines(workdir)[-1]["step"]
    assert f"stopped and saved at step {stopped}" in said
    assert int(saved_state(workdir, stopped)["step"]) == stopped


def test_probes_report_a_table(make_config, tmp_path, capsys):
    config = make_config(optim__epochs=0.05, optim__warmup_epochs=0.01, eval__every=2, eval__draws=1, eval__images=600)
    loop.train(config, epath.Path(tmp_path / "run"))
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert report["step"] == 4 and report["results"].keys() == {"knn", "logistic"}
    for rows in report["results"].values():
        assert list(rows) == ["trained", "untrained", "raw pixels"]
        assert all(0 <= value <= 1 for row in rows.values() for value in row.values() if isinstance(value, float))
    rows = report["results"]["knn"]
    assert rows["raw pixels"]["weighted"] > 0.9
    printed = capsys.readouterr().out
    assert f"{100 * rows['trained']['weighted']:.2f}" in printed and "raw pixels" in printed
    probed = [line for line in lines(tmp_path / "run") if "eval/knn" in line and "eval/logistic" in line]
    assert [line["step"] for line in probed] == [2, 4]
    assert probed[-1]["eval/knn"] == rows["trained"]["weighted"]


BAD = {
    "patch": ({"model__patch_size": 3}, "model.patch_size = 3 does not divide data.image_size = 8"),
    "devices": ({"data__batch_size": 12}, "data.batch_size = 12 is not divisible by the 8 devices"),
    "context": ({"mask__context_tokens": 17}, "mask.context_tokens = 17 is more than the largest context block"),
    "targets": ({"mask__target_scale": (0.01, 0.2)}, "mask.target_scale = (0.01, 0.2) gives empty blocks"),
    "interval": ({"mask__target_scale": (0.3, 0.2)}, "mask.target_scale must be an increasing pair"),
    "negative": ({"vicreg__weight": -1.0}, "vicreg.weight must be in [0, 1e6], got -1.0"),
    "nan": ({"optim__learning_rate": math.nan}, "optim.learning_rate must be in [0, 1e30], got nan"),
    "grey levels": (
        {"data__mean": (127.5,), "data__std": (58.0,)},
        "got 127.5: Mean of each channel, of values in [0, 1]",
    ),
    "tiny std": ({"data__std": (1e-30,)}, "data.std must be in [0.004, 1], got 1e-30"),
    "size of nan": ({"model__size": "64x3x4xnan"}, "model.size = '64x3x4xnan': every number must be positive"),
    "seed": ({"seed": 2**32}, "seed must be in [0, 4294967295], got 4294967296"),
    "choice": ({"mask__recipe": "relased"}, "mask.recipe must be one of released, corrected, got 'relased'"),
    "type": ({"model__patch_size": 2.5}, "model.patch_size must be int, got 2.5"),
    "size": ({"model__size": "XL"}, "model.size = 'XL' is neither WIDTHxDEPTHxHEADS nor a known name"),
    "heads": ({"predictor__width": 10}, "predictor.width = 10 must be a multiple of 4 and of the encoder's 2 heads"),
    "warm-up": ({"optim__warmup_epochs": 60.0}, "optim.warmup_epochs must be below optim.epochs"),
    "split": ({"data__train_split": "tran"}, "split 'tran' cannot be read"),
    "length": ({"optim__epochs": 0.001, "optim__warmup_epochs": 0.0}, "are less than one batch"),
    "tfds": ({"data__source": "tfds", "data__name": "imgnet"}, "'imgnet' is not a TFDS data set"),
    "channels": ({"data__mean": (0.5, 0.5)}, "data.mean and data.std must both have 1 or 3 numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_line_before_compilation(case, make_config, tmp_path, monkeypatch):
    overrides, message = BAD[case]
    monkeypatch.setattr(jax, "jit", lambda *a, **k: pytest.fail("compiled before the check"))
    with pytest.raises(UserError) as error:
        loop.train(make_config(**overrides), epath.Path(tmp_path / "run"))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.mask.recipee=x"], "--config has no such setting: mask.recipee; did you mean 'mask.recipe'?"),
        (["--config.msk.recipe=x"], "--config has no such setting: msk.recipe; did you mean 'mask.recipe'?"),
        (["--config.mask=x"], "--config.mask is a group of settings; name one of them"),
        (["--config.method=cjpea"], "method = 'cjpea' is not known; did you mean 'cjepa'?"),
        (["--profile=3"], "--profile=3 must be START:STOP, two step numbers"),
        (["--profile=15:10"], "--profile=15:10 must be START:STOP, two step numbers, the first below the second"),
        (["--config.data.batch_size=many"], "flag --config.data.batch_size=many: invalid literal for int()"),
        (["--confg=x"], "Unknown command line flag 'confg'. Did you mean: config ?"),
        (["--config.zzz=1"], "--config has no such setting: zzz"),
        (["stray"], "unexpected argument 'stray'"),
        (["--workdir="], "--workdir is empty"),
        (["--workdir=/no/such/place"], "/no/such does not exist"),
    ],
)
def test_bad_flags_are_one_line(arguments, message):
    said = run("--config=configs/digits.py", *arguments, code=2)
    assert message in said
    assert said.startswith("error: ") and said.count("\n") == 1


def test_help_explains_workdir_overrides_and_resuming():
    said = run("--help")
    for word in ("--workdir", "--config.GROUP.KEY=VALUE", "newest checkpoint", "SIGTERM"):
        assert word in said


def test_commands_start_without_libraries_that_few_of_them_use():
    """PyTorch and scikit-learn take longer to import than everything else together."""
    code = "import sys, cjepa_jax.train.loop, cjepa_jax.evaluate.report, cjepa_jax.interop.conversion\n"
    code += "print({'torch', 'sklearn', 'tensorflow'} & set(sys.modules))\n"
    code += "import torch; torch.ones(1)"  # which can still be imported
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_another_experiment_in_the_workdir(make_config, finished):
    before = (finished / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"holds another experiment.*seed: 0 -> 1"):
        loop.train(make_config(seed=1), epath.Path(finished))
    assert (finished / "config.json").read_bytes() == before


def test_what_does_not_change_training_may_change(make_config):
    old, new = (make_config(data__threads=n, log__every=n, checkpoint__keep_last=n) for n in (1, 2))
    assert old != new and settings.adopt(settings.flatten(old), new) == (new, [], [])


@pytest.mark.parametrize("damage", ["truncated array", "no state"])
def test_damaged_checkpoint(damage, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    newest = workdir / "checkpoints" / "10"
    if damage == "no state":
        shutil.rmtree(newest / "state")
    else:
        for path in newest.glob("state/**/d/*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = run("--config=configs/digits.py", f"--workdir={workdir}", *SMALL, *TEN_STEPS, code=2)
    assert f"checkpoint {newest} cannot be read" in said
    assert said.count("\n") == 1


def test_other_images_are_refused(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    meta = next((workdir / "checkpoints" / "10" / "meta").iterdir())
    meta.write_text(meta.read_text().replace("1437 images", "1438 images"))
    said = run("--config=configs/digits.py", f"--workdir={workdir}", *SMALL, *TEN_STEPS, code=2)
    assert "was trained on other images (1438 images" in said


def test_last_and_every_kth_checkpoint_stay(make_config, tmp_path):
    config = make_config(checkpoint__every=2, checkpoint__keep_last=2, checkpoint__keep_every=4)
    meta = {"config": flatten(config), "fingerprint": "some images"}
    checkpoints = checkpoint.Checkpointer(epath.Path(tmp_path / "run"), config.checkpoint, meta)
    for step in range(1, 12):
        if checkpoints.due(step):
            checkpoints.save(step, {"x": jax.numpy.ones(3) * step})
    checkpoints.close()
    assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.is_dir()) == [4, 8, 10]


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(make_config, tmp_path):
    config = make_config(optim__learning_rate=1e30, optim__learning_rate_start=1e30, log__every=1, checkpoint__every=1)
    with pytest.raises(nonfinite.DivergedError, match=r"is not finite.* at step"):
        loop.train(config, epath.Path(tmp_path / "run"))
    last = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.is_dir())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved_state(tmp_path / "run", last)["params"]))


# Images as people have them


FOLDER = [
    "--config=configs/folder.py",
    "--config.data.image_size=32",
    "--config.model.patch_size=4",
    "--config.mask.context_tokens=24",
    "--config.mask.min_keep=4",
    "--config.optim.warmup_epochs=0.5",
    "--config.eval.evaluators=('knn',)",
    *SMALL,
]


def photos(root: pathlib.Path, *folders: str) -> pathlib.Path:
    """A hundred little pictures cut from a photo, a share of them in each folder."""
    rng = np.random.default_rng(0)
    photo = Image.open(pathlib.Path(sklearn.datasets.__file__).parent / "images" / "china.jpg")
    for i in range(100):
        left, top = rng.integers(0, 580), rng.integers(0, 367)
        target = root / folders[i % len(folders)]
        target.mkdir(parents=True, exist_ok=True)
        photo.crop((left, top, left + 60, top + 60)).save(target / f"{i}.jpg")
    return root


def test_a_folder_without_labels_trains_and_goes_on_with_the_same_images(tmp_path):
    """A bad file is named once and counted."""
    images = photos(tmp_path / "images", ".")
    (images / "7.jpg").write_text("<html>")
    where = (f"--config.data.data_dir={images}", "--config.data.max_bad_fraction=0.02", "--config.eval.every=3")
    said = run(*FOLDER, *where, f"--workdir={tmp_path / 'a'}", "--config.optim.epochs=2")
    assert said.count(f"skipped {images}/7.jpg: not a JPEG, PNG, WebP, BMP or GIF file") == 1
    assert "on 95 images, which have no labels" in said
    straight = lines(tmp_path / "a")
    assert [line["step"] for line in straight] == list(range(1, 13))
    assert straight[-1]["data/skipped"] == 1 and "eval/knn" not in straight[-1]

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoints/12")
    images.rename(tmp_path / "moved")
    moved = (f"--config.data.data_dir={tmp_path / 'moved'}", "--config.data.max_bad_fraction=0.02")
    said = run(*FOLDER, *moved, f"--workdir={tmp_path / 'b'}", "--config.optim.epochs=2", "--config.data.threads=1")
    assert "going on from step 10" in said
    assert [line["loss/total"] for line in lines(tmp_path / "b")] == [line["loss/total"] for line in straight]

    (tmp_path / "moved/8.jpg").unlink()
    shutil.rmtree(tmp_path / "b/checkpoints/12")
    said = run(*FOLDER, *moved, f"--workdir={tmp_path / 'b'}", "--config.optim.epochs=2", code=2)
    assert "was trained on other images (95 files" in said


def test_too_many_bad_images_stop_the_run_with_one_line(tmp_path):
    images = photos(tmp_path / "images", "cat", "dog")
    for i in range(0, 100, 10):
        (images / "cat" / f"{i}.jpg").write_bytes(b"")
    said = run(*FOLDER, f"--config.data.data_dir={images}", f"--workdir={tmp_path / 'run'}", code=2)
    assert said.splitlines()[-1].startswith("error: ") and "data.max_bad_fraction = 0.01" in said
    assert "Traceback" not in said


def test_labelled_folders_are_probed_and_need_labels_in_both_splits(tmp_path):
    images = photos(tmp_path / "images", "train/cat", "train/dog", "test/cat", "test/dog")
    where = [f"--config.data.data_dir={images}", "--config.data.test_split=test", "--config.data.train_split=train"]
    every = ["--config.eval.every=2", "--config.optim.epochs=1"]
    said = run(*FOLDER, *where, *every, f"--workdir={tmp_path / 'run'}")
    assert "on 50 images of 2 classes" in said
    assert [line["step"] for line in lines(tmp_path / "run") if "eval/knn" in line] == [2, 3]
    for i, path in enumerate((images / "test").glob("*/*.jpg")):
        path.rename(images / "test" / f"{i}.jpg")
    said = run(*FOLDER, *where, *every, f"--workdir={tmp_path / 'other'}", code=2)
    assert "data.test_split = 'test' has no labels" in said
