"""The package from Python and the shell: train, load, embed, and what an installation holds."""

import io
import json
import os
import pathlib
import re
import sys
import tomllib

import jax
import numpy as np
import pyarrow.parquet
import pytest
import sklearn.datasets
from etils import epath
from PIL import Image

import cjepa_jax
from cjepa_jax import command, pretrained
from cjepa_jax.config import Data
from cjepa_jax.data import sources
from cjepa_jax.errors import UserError
from cjepa_jax.evaluate import embedding
from cjepa_jax.models.vit import build_encoder
from cjepa_jax.train import memory
from tests import commands

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    "model": {"size": "16x1x2"},
    "predictor": {"width": 8, "depth": 1},
    "optim": {"epochs": 0.05, "warmup_epochs": 0.0},
    "eval": {"every": 0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of one step on the digits."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    state = cjepa_jax.train("digits", workdir=workdir, **SMALL)
    assert int(state.step) == 1
    return workdir


def test_the_package_and_the_function_share_a_name(run):
    from cjepa_jax.train import loop

    assert callable(cjepa_jax.train) and cjepa_jax.train.loop is loop
    assert {"train", "load"} <= set(cjepa_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = cjepa_jax.lode


def test_train_takes_files_and_settings_and_goes_on(run, capsys):
    before = json.loads((run / "config.json").read_text())
    assert before["model.size"] == "16x1x2" and before["data.batch_size"] == 64
    capsys.readouterr()
    file = str(ROOT / "configs" / "digits.py")
    assert int(cjepa_jax.train(file, workdir=str(run), **SMALL).step) == 1
    assert "finished at step 1" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"another experiment.*seed: 0 -> 1"):
        cjepa_jax.train("digits", workdir=run, seed=1, **SMALL)
    with pytest.raises(UserError, match="'no_such' does not exist; known by name: digits,"):
        cjepa_jax.train("no_such", workdir=run)


def test_a_file_of_ones_own_imports_the_configs_that_are_installed(tmp_path, monkeypatch):
    installed = tmp_path / "site" / "cjepa_jax" / "configs"
    for folder, name, text in (
        (installed, "__init__", ""),
        (installed, "base", "def get_config():\n    return {'seed': 7}\n"),
        (tmp_path / "own", "mine", "from configs import base\nget_config = base.get_config\n"),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(command, "_shipped", lambda: installed)
    others = [path for path in sys.path if not (pathlib.Path(path) / "configs").is_dir()]
    monkeypatch.setattr(sys, "path", others)
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    assert command.load_config(str(tmp_path / "own" / "mine.py")) == {"seed": 7}
    assert sys.path == others
    del sys.modules["configs.base"]


def test_train_on_images_that_a_program_gives(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (70, 8, 8), np.uint8)
    settings = SMALL | {"optim": {"epochs": 1.0, "warmup_epochs": 0.0}}
    cjepa_jax.train("digits", workdir=tmp_path / "own", source=sources.from_arrays(images), **settings)
    assert json.loads((tmp_path / "own" / "config.json").read_text())["data.source"] == "own"
    monkeypatch.setattr(memory, "compile_step", None)  # what follows is said before anything is compiled
    with pytest.raises(UserError, match="was trained on other images"):
        cjepa_jax.train("digits", workdir=tmp_path / "own", source=sources.from_arrays(images[1:]), **settings)
    with pytest.raises(UserError, match=r"data.source = 'own' are images that a program gave"):
        cjepa_jax.train("digits", workdir=tmp_path / "other", data={"source": "own"}, **settings)


def test_features_are_the_encoders(run):
    """By the formulas of normalisation, patches and mean, and the encoder applied by hand."""
    encoder = cjepa_jax.load(run)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    patches = ((images / 255 - 0.5) / 0.5).reshape(3, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(3, 16, 4)
    networks = pretrained.load(run, ["target_encoder"])
    net = build_encoder(networks.model, grid=(4, 4))
    expected = net.apply({"params": networks.params["target_encoder"]}, patches.astype(np.float32))
    np.testing.assert_allclose(encoder.patches(images), expected, atol=1e-5)
    np.testing.assert_allclose(encoder(images), np.asarray(expected).mean(1), atol=1e-5)
    assert encoder.patches(np.zeros((1, 12, 12, 1), np.uint8)).shape == (1, 36, 16)
    assert cjepa_jax.load(run, "encoder").name == "encoder"


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 8, 8, 1)), np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 6, 3), np.uint8), [1]],
    ids=["float", "no channels", "other channels", "list"],
)
def test_other_images_are_one_line(run, images):
    with pytest.raises(UserError, match=r"images must be uint8 of shape \[B, H, W, 1\], got"):
        cjepa_jax.load(run)(images)
    with pytest.raises(UserError, match="has no head; "):
        cjepa_jax.load(run, "head")


# Embedding


def embed(*arguments, code=0):
    done = commands.run("cjepa_jax.embed", *map(str, arguments))
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_the_command_writes_the_features_of_a_set(run, tmp_path):
    said = embed(f"--checkpoint={run}", "--split=test[:70]", f"--output={tmp_path / 'f.npz'}")
    assert "target_encoder of" in said and f"-> {tmp_path / 'f.npz'}" in said
    source = sources.load(Data(source="digits"), "test[:70]")
    images = np.stack([source.records[i]["image"] for i in range(70)])[..., None]
    with np.load(tmp_path / "f.npz") as file:
        np.testing.assert_allclose(file["features"], cjepa_jax.load(run)(images), atol=1e-5)
        assert list(file["labels"]) == source.labels() and list(file["classes"]) == list(map(str, range(10)))
        assert file["names"][3] == source.name(3)
    assert "exists already" in embed(f"--checkpoint={run}", f"--output={tmp_path / 'f.npz'}", code=2)
    arguments = [f"--checkpoint={run}", "--split=test[:70]", "--features=patches", f"--output={tmp_path / 'f.parquet'}"]
    embed(*arguments)
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pydict()
    flat = np.asarray(cjepa_jax.load(run).patches(images)).reshape(70, -1)
    np.testing.assert_allclose(np.array(table["features"]), flat, atol=1e-5)
    assert table["class"][3] == str(source.label(3)) and table["name"][3] == source.name(3)


def test_a_folder_of_features_goes_on_where_it_was_stopped(run, tmp_path):
    """A file that is not an image is left out and named."""
    photo = Image.open(pathlib.Path(sklearn.datasets.__file__).parent / "images" / "china.jpg").convert("L")
    (tmp_path / "in").mkdir()
    for i in range(25):
        photo.crop((20 * i, 0, 20 * i + 16, 16)).save(tmp_path / "in" / f"{i:02}.png")
    (tmp_path / "in" / "07.png").write_text("<html>")
    out = tmp_path / "out"
    arguments = [f"--checkpoint={run}", f"--input={tmp_path / 'in'}", f"--output={out}", "--shard=10"]
    arguments += ["--config.data.max_bad_fraction=0.1"]
    said = embed(*arguments)
    assert said.count(f"left out {tmp_path / 'in' / '07.png'}: not a JPEG") == 1
    files = sorted(out.glob("features-*.npz"))
    assert [file.name for file in files] == [f"features-{i:05}-of-00003.npz" for i in range(3)]
    contents = [file.read_bytes() for file in files]
    arrays = [dict(np.load(io.BytesIO(content))) for content in contents]
    assert sum(len(a["features"]) for a in arrays) == sum(len(a["names"]) for a in arrays) == 24
    assert "labels" not in arrays[0]

    files[1].unlink()
    kept = files[0].stat().st_mtime_ns
    assert "on 25 images, 15 of them done before" in embed(*arguments)
    assert [file.read_bytes() for file in files] == contents and files[0].stat().st_mtime_ns == kept
    said = embed(*arguments, "--features=patches", code=2)
    assert said == f"error: --output {out} holds other features: features differ; name another folder\n"
    about = json.loads((out / "about.json").read_text())
    (out / "about.json").write_text(json.dumps(about | {"step": 7, "parameters": "others"}))  # an older checkpoint's
    said = embed(*arguments, code=2)
    assert said == f"error: --output {out} holds other features: step, parameters differ; name another folder\n"
    older = {key: value for key, value in about.items() if key not in ("step", "parameters")}
    (out / "about.json").write_text(json.dumps(older))  # as it was written before it had these
    assert "25 of them done before" in embed(*arguments)
    assert "holds other files" in embed(*arguments[:2], f"--output={tmp_path / 'in'}", code=2)


def test_parquet_takes_names_that_are_no_text(tmp_path):
    file = epath.Path(tmp_path / "f.parquet")
    names = np.array([os.fsdecode(b"caf\xe9.png"), "caf\xe9.png"])
    embedding.write(file, {"features": np.zeros((2, 3), np.float32), "names": names})
    assert pyarrow.parquet.read_table(file).to_pydict()["name"] == ["caf\\xe9.png", "caf\xe9.png"]


def test_a_converted_checkpoint_embeds_a_folder(run, tmp_path):
    """It does not say on which splits it was trained."""
    pretrained.save(epath.Path(tmp_path / "converted"), pretrained.load(epath.Path(run), ("target_encoder",)))
    (tmp_path / "in").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "in" / "0.png")
    out = tmp_path / "f.npz"
    said = embed(f"--checkpoint={tmp_path / 'converted'}", f"--input={tmp_path / 'in'}", f"--output={out}")
    assert "on 1 images" in said and np.load(out)["features"].shape == (1, 16)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--output=x.npz"], "--checkpoint is missing"),
        (["--checkpoint=RUN"], "--output is missing"),
        (["--checkpoint=RUN", "--output=x.txt"], "must end in .npz or .parquet, or name a folder"),
        (["--checkpoint=RUN", "--output=x.npz", "--input=/no/such"], "--input /no/such does not exist"),
        (["--checkpoint=RUN", "--output=/no/such/x.npz"], "the folder /no/such does not exist"),
        (["--checkpoint=RUN", "--output=x.npz", "--encoder=head"], "--encoder 'head' is not known"),
        (["--checkpoint=RUN", "--output=x.npz", "--split=tset"], "split 'tset' cannot be read"),
    ],
)
def test_bad_input_is_one_line(run, arguments, says):
    said = embed(*(argument.replace("RUN", str(run)) for argument in arguments), code=2)
    assert says in said and said.startswith("error: ") and said.count("\n") == 1


# The installation, and the page


def test_what_is_installed_is_complete():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rooms = {"cjepa_jax", "cjepa_jax.configs"}
    rooms |= {
        ".".join(p.relative_to(ROOT).parts) for p in (ROOT / "cjepa_jax").rglob("*") if (p / "__init__.py").exists()
    }
    assert set(project["tool"]["setuptools"]["packages"]) == rooms
    for target in project["project"]["scripts"].values():
        module, _, function = target.partition(":")
        file = ROOT / f"{module.replace('.', '/')}.py"
        assert f"def {function}(" in file.read_text()


def test_the_page_runs(tmp_path, monkeypatch):
    """The blocks one after another, with little networks; the command between them writes features.npz."""
    monkeypatch.chdir(tmp_path)
    train = cjepa_jax.api.train
    little = {key: SMALL[key] for key in ("model", "predictor")}
    monkeypatch.setattr(cjepa_jax.api, "train", lambda *a, **k: train(*a, **little, **k))
    page, names = (ROOT / "docs" / "python.md").read_text(), {}
    for block in re.findall(r"^```python tested=.*\n((?s:.*?))^```$", page, re.MULTILINE):
        if '"features.npz"' in block:
            embed(f"--checkpoint={tmp_path / 'small'}", f"--output={tmp_path / 'features.npz'}")
        exec(block, names)
    assert names["features"].shape == (1437, 16) and names["state"].step == 2
    assert jax.tree.map(type, names["Norms"]().run(names["frozen"]))["trained"] == {"norm": float}
