"""Networks out of checkpoints, and into new runs."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from cjepa_jax import pretrained
from cjepa_jax.errors import UserError
from cjepa_jax.interop.conversion import convert
from cjepa_jax.interop.tensors import ImportOptions
from cjepa_jax.train.loop import train
from cjepa_jax.train.setup import set_up
from tests import commands
from tests.helpers import same

ALL = ("encoder", "predictor", "target_encoder")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir of four steps, and the state that its run returned."""
    from tests.conftest import small

    workdir = epath.Path(tmp_path_factory.mktemp("runs")) / "trained"
    config = small(data__train_split="train[:64]", optim__epochs=1.0, optim__warmup_epochs=0.0, checkpoint__every=2)
    return workdir, train(config, workdir)


def test_load_gives_the_networks_of_the_newest_checkpoint(trained):
    workdir, state = trained
    loaded = pretrained.load(workdir, ALL)
    assert loaded.step == 4
    assert loaded.model.size == "16x1x2" and loaded.predictor.width == 8
    assert loaded.image_size == 8 and len(loaded.mean) == len(loaded.std) == 1
    same(loaded.params["encoder"], state.params["encoder"])
    same(loaded.params["predictor"], state.params["predictor"])
    same(loaded.params["target_encoder"], state.averages["target_encoder"])
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(loaded.params))


def test_load_of_one_checkpoint_reads_what_is_asked_only(trained):
    workdir, state = trained
    loaded = pretrained.load(workdir / "checkpoints" / "2", ("target_encoder",))
    assert loaded.step == 2 and loaded.params.keys() == {"target_encoder"}
    with pytest.raises(AssertionError):
        same(loaded.params["target_encoder"], state.averages["target_encoder"])


def test_save_and_load(trained, tmp_path):
    loaded = pretrained.load(trained[0], ALL)
    pretrained.save(epath.Path(tmp_path / "copy"), loaded)
    again = pretrained.load(epath.Path(tmp_path / "copy"), ALL)
    same(loaded.params, again.params)
    assert loaded._replace(params=None) == again._replace(params=None)


def test_a_new_run_starts_from_another_ones_networks(trained, tmp_path, make_config):
    """With a learning rate of 0 and no decay the networks stay what they were."""
    frozen = {f"optim__{key}": 0.0 for key in ("learning_rate_start", "learning_rate", "learning_rate_end")}
    config = make_config(data__train_split="train[64:80]", optim__epochs=1.0, optim__warmup_epochs=0.0, **frozen)
    state = train(config, epath.Path(tmp_path / "run"), init=trained[0])
    assert int(state.step) == 1
    for name in ("encoder", "predictor"):
        same(state.params[name], trained[1].params[name])
    with pytest.raises(AssertionError):
        same(state.averages["target_encoder"], state.params["encoder"])  # the average came along, too
    begun = set_up(config, epath.Path(tmp_path / "run"), epath.Path(tmp_path / "gone"))  # not needed any more
    assert not begun.networks and begun.meta["config"]["init.path"] == str(trained[0])
    rng = jax.random.key(5)
    same(begun.untrained_encoder(rng), begun.init(rng).params["encoder"])


@pytest.mark.parametrize("kind", ["transformers", "encoder", "target_encoder"])
def test_a_checkpoint_of_one_encoder_starts_both_and_the_predictor_is_fresh(trained, tmp_path, make_config, kind):
    alone, name = epath.Path(tmp_path / "alone"), "encoder" if kind == "encoder" else "target_encoder"
    if kind == "transformers":
        convert(str(trained[0]), str(alone), kind, encoder=None, force=False, options=ImportOptions())
    else:
        pretrained.save(alone, pretrained.load(trained[0], (name,)))
    run = set_up(make_config(), epath.Path(tmp_path / "run"), alone)
    step = "" if kind == "transformers" else ", step 4"
    assert run.origin == f"started from {alone}{step}, with its {name} as encoder and target_encoder; fresh: predictor"
    wanted = pretrained.load(trained[0], (name,)).params[name]
    random = jax.device_get(run.program.init(jax.random.key(3)))
    state = run.init(jax.random.key(3))
    same(state.params["encoder"], wanted)
    same(state.averages["target_encoder"], wanted)
    same(state.params["predictor"], random.params["predictor"])


def test_what_a_new_run_starts_from_is_said(trained, tmp_path, make_config):
    run = set_up(make_config(vicreg__projector=(8, 8)), epath.Path(tmp_path / "run"), trained[0])
    says = f"started from {trained[0]}, step 4, with its encoder, predictor, target_encoder; fresh: projector"
    assert run.origin == says
    with pytest.raises(UserError, match=r"its encoder has 2 attention heads, and model\.size = 16x1x4 asks for 4"):
        set_up(make_config(model__size="16x1x4"), epath.Path(tmp_path / "run"), trained[0])
    folder = epath.Path(tmp_path / "folder")
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "vit"}')
    (folder / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"^--init .*folder: config.json describes a model of the type vit, not ijepa"):
        set_up(make_config(), epath.Path(tmp_path / "run"), folder)


def test_another_architecture_is_listed_by_name(trained, tmp_path, make_config):
    config = make_config(model__size="32x2x2")
    with pytest.raises(
        UserError, match=r"--init .*trained: its encoder does not fit.*block00/fc1/bias is \(64,\)"
    ) as error:
        train(config, epath.Path(tmp_path / "run"), init=trained[0])
    assert "and " in str(error.value) and " more" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_bad_paths(trained, tmp_path):
    for path, message in (
        (tmp_path / "none", "does not exist; wanted: a workdir"),
        (tmp_path, "holds no checkpoint; wanted: a workdir"),
    ):
        with pytest.raises(UserError, match=message):
            pretrained.load(epath.Path(path), ALL)
    with pytest.raises(UserError, match="checkpoints/4 has no head"):
        pretrained.load(trained[0], ("head",))


def test_damaged_checkpoints(trained, tmp_path):
    workdir = epath.Path(tmp_path / "copy")
    pretrained.save(workdir, pretrained.load(trained[0], ALL))
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "model.size"}))
    with pytest.raises(UserError, match=r"model\.size is missing"):
        pretrained.load(workdir, ALL)
    (workdir / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        pretrained.load(workdir, ALL)
    (workdir / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json is missing"):
        pretrained.load(workdir, ALL)


def test_the_command_takes_init(trained, tmp_path):
    damaged = tmp_path / "damaged"
    pretrained.save(epath.Path(damaged), pretrained.load(trained[0], ALL))
    for file in (damaged / "checkpoints" / "4" / "state").rglob("[0-9]*"):
        file.write_bytes(b"")
    arguments = ["--config=configs/digits.py", f"--workdir={tmp_path / 'run'}", f"--init={damaged}"]
    done = commands.run("cjepa_jax.main", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: checkpoint {damaged / 'checkpoints' / '4'} cannot be read")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
