"""Workdirs written by earlier versions resume, start new runs, are evaluated and converted.

fixtures/*.tar.gz hold ten steps of configs/digits.py and of configs/finetune_digits.py at small sizes, with checkpoints
at 5 and 10, and the first one converted to I-JEPA's format and back. They were written before states had "averages",
before `optim.schedule_offset`, and before `model.tower` was called `model.encoder`. They are never written anew: a
later format gets a fixture of its own.
"""

import json
import pathlib
import tarfile

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from cjepa_jax import pretrained
from cjepa_jax.errors import UserError
from cjepa_jax.methods import find_method
from cjepa_jax.settings import parse
from cjepa_jax.train.loop import train
from configs import digits, finetune_digits
from tests import commands, helpers

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
TEN_STEPS = {"log.every": 1, "checkpoint.every": 5, "eval.every": 4, "data.batch_size": 16}
PRETRAINED = TEN_STEPS | {"model.size": "16x1x2", "predictor.width": 8, "predictor.depth": 1}
PRETRAINED |= {"optim.epochs": 0.1114, "optim.warmup_epochs": 0.02}
FINETUNED = TEN_STEPS | {"optim.epochs": 1.6, "optim.warmup_epochs": 0.4}


def settings(values, changes):
    """A config file's settings with changes by "group.key"."""
    for name, value in changes.items():
        group, _, key = name.rpartition(".")
        place = values.setdefault(group, {}) if group else values
        place[key] = value
    return parse(values, find_method(values).settings)


@pytest.fixture
def old(tmp_path):
    """The workdirs by name."""
    found = {}
    for archive in FIXTURES.glob("*.tar.gz"):
        with tarfile.open(archive) as file:
            file.extractall(tmp_path, filter="data")
        name = archive.name.removesuffix(".tar.gz")
        found[name] = epath.Path(tmp_path / name)
    return found


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def saved(workdir, step):
    return ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")


def check_the_last_five_steps(state, then, averages):
    """Another kind of processor may round otherwise, and Adam scales rounding up; a step moves numbers by 1e-3."""
    pairs = [(state.params, then["params"]), (state.opt_state, then["opt_state"]), (averages(state.averages), None)]
    pairs[2] = (pairs[2][0], then["target_params"] if "target_params" in then else then["ema_params"])
    for now, before in pairs:
        now, before = leaves(jax.device_get(now)), leaves(before)
        assert len(now) == len(before)
        for a, b in zip(now.values(), before.values(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


def test_pretraining_resumes_as_it_was_begun(old, capfd):
    workdir = old["pretrained"]
    then = saved(workdir, 10)
    (workdir / "checkpoints" / "10").rmtree()
    state = train(settings(digits.get_config().to_dict(), PRETRAINED), workdir)
    assert int(state.step) == 10
    check_the_last_five_steps(state, then, lambda averages: averages["target_encoder"])
    assert "optim.schedule_offset = 0, as when this workdir was begun" in capfd.readouterr().err
    assert json.loads((workdir / "config.json").read_text())["optim.schedule_offset"] == 0
    lines = helpers.lines(workdir)
    assert [line["step"] for line in lines if "loss/total" in line] == list(range(1, 11))


def test_a_setting_that_the_workdir_did_not_know_is_another_experiment_where_it_is_changed(old):
    config = settings(digits.get_config().to_dict(), PRETRAINED | {"ema.start": 0.9})
    with pytest.raises(UserError, match=r"holds another experiment.*ema\.start: 0\.96 -> 0\.9$"):
        train(config, old["pretrained"])


def test_finetuning_resumes_as_it_was_begun(old):
    workdir = old["finetuned"]
    then = saved(workdir, 10)
    (workdir / "checkpoints" / "10").rmtree()
    config = settings(finetune_digits.get_config().to_dict(), FINETUNED)
    state = train(config, workdir, old["pretrained"])
    check_the_last_five_steps(
        state, then, lambda averages: {name.removeprefix("ema_"): x for name, x in averages.items()}
    )


@pytest.mark.parametrize("name", ["pretrained", "finetuned", "converted"])
def test_networks_are_read_bit_for_bit(old, name):
    then = saved(old[name], 0 if name == "converted" else 10)
    names = pretrained.available(old[name])
    loaded = pretrained.load(old[name], names)
    wanted = {"pretrained": {"encoder", "predictor", "target_encoder"}}
    wanted |= {"converted": wanted["pretrained"], "finetuned": {"encoder", "head", "ema_encoder", "ema_head"}}
    assert set(names) == wanted[name]
    where = {"target_encoder": "target_params", "ema_encoder": "ema_params", "ema_head": "ema_params"}
    for network in names:
        tree = then[where.get(network, "params")]
        if network != "target_encoder":
            tree = tree[network.removeprefix("ema_")]
        found = leaves(loaded.params[network])
        for path, array in leaves(tree).items():
            np.testing.assert_array_equal(found[path], array)


@pytest.mark.parametrize("name", ["pretrained", "converted"])
def test_new_runs_start_from_them(old, tmp_path, name):
    still = {f"optim.{key}": 0.0 for key in ("learning_rate_start", "learning_rate", "learning_rate_end")}
    changes = PRETRAINED | still | {"optim.epochs": 0.0112, "optim.warmup_epochs": 0.0, "eval.every": 0}
    state = train(settings(digits.get_config().to_dict(), changes), epath.Path(tmp_path / "new"), old[name])
    assert int(state.step) == 1
    encoder = pretrained.load(old[name], ("encoder",)).params["encoder"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params["encoder"]), encoder)


def command(*arguments):
    done = commands.run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["finetuned", "converted"])
def test_they_are_converted(old, tmp_path, name):
    output = f"--output={tmp_path / 'encoder'}"
    assert "16x1x2/2" in command("cjepa_jax.convert", f"--input={old[name]}", output, "--format=transformers")


def test_they_are_evaluated(old):
    where = ["data.source=digits", "data.train_split=train[:100]", "data.test_split=test", "knn.neighbours=5"]
    said = command(
        *("cjepa_jax.evaluate", f"--checkpoint={old['converted']}", "--method=knn", "--nobaselines"),
        *(f"--config.{override}" for override in where),
    )
    assert "knn" in said and len(list((old["converted"] / "evaluation").glob("*.knn.json"))) == 1
