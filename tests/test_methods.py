"""A method is a value: one that the package does not know trains through the common step, loop and pipeline."""

import dataclasses
import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from cjepa_jax import methods
from cjepa_jax.config import Config
from cjepa_jax.data.augment import Augmentation
from cjepa_jax.errors import UserError
from cjepa_jax.methods.base import Method
from cjepa_jax.settings import group, parse, setting
from cjepa_jax.train.loop import train
from tests.helpers import lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pull:
    strength: float = setting(0.5, "Weight of the distance between two views.", within="[0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwinsConfig(Config):
    pull: Pull = group(Pull, "How views are compared.")


@dataclasses.dataclass(frozen=True)
class Twins(Method):
    """Two views of an image, a linear encoder, and the spread over the batch: a method in a dozen lines."""

    settings = TwinsConfig
    averaged = {"slow": "encoder"}
    panels = {"Distance": ("loss/distance",)}

    @property
    def views(self):
        return (*super().views, Augmentation(crop_scale=(0.2, 0.5), crop_ratio=(1.0, 1.0)))

    def init(self, rng):
        return {"encoder": {"kernel": jax.random.normal(rng, (64, 8)) / 8}}

    def prepare(self, batch, rng):
        noise = 0.01 * jax.random.normal(rng, batch.images.shape)
        return batch.images.astype(jnp.float32) / 255 + noise

    def forward(self, params, averages, inputs):
        views = inputs.reshape(len(inputs), 2, -1) @ params["encoder"]["kernel"]
        return {"first": views[:, 0], "second": views[:, 1], "features": views[:, 0]}

    def loss(self, params, outputs):
        distance = jnp.square(outputs["first"] - outputs["second"]).mean()
        total = self.config.pull.strength * distance - outputs["first"].std(axis=0).mean()
        return total, {"loss/total": total, "loss/distance": distance}


@pytest.fixture
def twins(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "twins", Twins)
    data = dict(source="digits", image_size=8, mean=(0.5,), std=(0.5,), batch_size=16, train_split="train[:160]")
    run = dict(epochs=1.0, warmup_epochs=0.2, learning_rate=0.05, weight_decay_end=0.04)
    values = dict(method="twins", data=data, optim=run, log=dict(every=1), checkpoint=dict(every=5))
    return lambda **changes: parse(values | changes, methods.find_method(values).settings)


def test_a_method_of_a_dozen_lines_trains_and_resumes(twins, tmp_path):
    workdir = epath.Path(tmp_path / "run")
    straight = train(twins(pull=dict(strength=0.25)), workdir)
    found = lines(workdir)
    assert [line["step"] for line in found] == list(range(1, 11))
    assert {"loss/distance", "rep/rank", "lr", "ema_momentum"} <= found[0].keys()
    assert found[-1]["rep/std"] > 2 * found[0]["rep/std"]  # which the loss rewards
    assert straight.averages.keys() == {"slow"}
    assert np.abs(straight.averages["slow"]["kernel"] - straight.params["encoder"]["kernel"]).max() > 0
    (workdir / "checkpoints" / "10").rmtree()
    resumed = train(twins(pull=dict(strength=0.25)), workdir)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(straight), jax.device_get(resumed))
    assert json.loads((workdir / "config.json").read_text())["pull.strength"] == 0.25
    with pytest.raises(UserError, match=r"another experiment.*pull\.strength: 0\.25 -> 0\.5"):
        train(twins(), workdir)


def test_the_documentation_shows_this_method():
    text = (pathlib.Path(__file__).parents[1] / "docs" / "adding_a_method.md").read_text()
    for part in (Pull, TwinsConfig, Twins):
        assert inspect.getsource(part) in text, part


def test_a_method_that_is_not_known_is_named():
    with pytest.raises(UserError, match="method = 'cjpea' is not known; did you mean 'cjepa'"):
        methods.find_method({"method": "cjpea"})


def test_settings_from_before_there_was_a_choice_name_their_method():
    assert methods.find_method({"vicreg.weight": 0.0}) is methods.METHODS["cjepa"]
    assert methods.find_method({"augment.mixup": 0.0}) is methods.METHODS["supervised"]
    assert methods.find_method({"augment": {}}) is methods.METHODS["supervised"]
