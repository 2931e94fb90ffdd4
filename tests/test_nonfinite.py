"""Where a run stopped being finite is named, and what is left repeats that step."""

import dataclasses
import json
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from cjepa_jax import methods
from cjepa_jax.config import Config
from cjepa_jax.methods.base import Method
from cjepa_jax.settings import parse
from cjepa_jax.train import nonfinite
from cjepa_jax.train.loop import train

BAD_STEP = 7


@dataclasses.dataclass(frozen=True)
class Poisoned(Method):
    """A linear encoder whose loss or gradient is not finite at the seventh step, and at no other of its own."""

    settings = Config
    in_gradient = True

    def init(self, rng):
        return {"encoder": {"bias": jnp.zeros(3), "kernel": jax.random.normal(rng, (64, 8)) / 8, "last": jnp.ones(2)}}

    def prepare(self, batch, rng):
        root = jax.random.split(jax.random.key(self.config.seed))[1]
        bad = (jax.random.key_data(rng) == jax.random.key_data(jax.random.fold_in(root, BAD_STEP - 1))).all()
        images = batch.images.reshape(len(batch.images), -1).astype(jnp.float32) / 255
        return images, jnp.full(len(images), bad, jnp.float32)

    def forward(self, params, averages, inputs):
        return {"features": inputs[0] @ params["encoder"]["kernel"], "bad": inputs[1]}

    def loss(self, params, outputs):
        encoder, bad = params["encoder"], outputs["bad"].max()
        spread = outputs["features"].std(axis=0).mean() + encoder["last"].sum()
        # The square root of nothing has a finite value and no gradient.
        term = jnp.sqrt((1 - bad) + jnp.square(encoder["bias"]).sum())
        if not self.in_gradient:
            term = encoder["bias"].sum() / (1 - bad)
        return term - spread, {"loss/spread": spread, "loss/term": term, "loss/total": term - spread}


@pytest.fixture
def poisoned(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "poisoned", Poisoned)
    data = dict(source="digits", image_size=8, mean=(0.5,), std=(0.5,), batch_size=16, train_split="train[:160]")
    values = dict(method="poisoned", data=data, optim=dict(epochs=2.0, warmup_epochs=0.2))
    return parse(values | dict(log=dict(every=4), checkpoint=dict(every=5)), Config)


@pytest.mark.parametrize(
    "in_gradient, named",
    [
        (True, "the gradient of encoder/bias is not finite (no other leaf is) at step 7"),
        (False, "loss/term is not finite at step 7"),
    ],
    ids=["gradient", "term"],
)
def test_the_first_leaf_or_term_is_named_and_the_same_command_repeats_it(
    in_gradient, named, poisoned, tmp_path, monkeypatch
):
    """The step is named, not the next one to be logged; by then all is lost in it."""
    monkeypatch.setattr(Poisoned, "in_gradient", in_gradient)
    workdir = epath.Path(tmp_path / "run")
    with pytest.raises(nonfinite.DivergedError) as first:
        train(poisoned, workdir)
    assert named in str(first.value) and "\n" not in str(first.value)
    assert f"from checkpoint {workdir}/checkpoints/5: {workdir}/nonfinite.json" in str(first.value)
    left = json.loads((workdir / "nonfinite.json").read_text())
    assert left["step"] == BAD_STEP and left["seed"] == 0 and left["checkpoint"] == f"{workdir}/checkpoints/5"
    assert left["command"] == shlex.join(sys.orig_argv)
    bad = [name for name, norm in left["gradient norms"].items() if not np.isfinite(norm)]
    assert bad == ["encoder/bias"]
    assert np.isfinite(left["metrics"]["loss/total"]) == in_gradient

    (workdir / "nonfinite.json").unlink()
    with pytest.raises(nonfinite.DivergedError) as again:
        train(poisoned, workdir)
    assert str(again.value) == str(first.value)
    assert json.loads((workdir / "nonfinite.json").read_text()) == left


def test_only_steps_since_the_last_check_are_kept(tmp_path):
    recorder = nonfinite.Recorder(epath.Path(tmp_path), seed=0, start=0, params={"w": jnp.ones(1)})
    good = {"loss/total": jnp.float32(1), "grad_norm": jnp.float32(1)}
    for step in range(1, 10):
        recorder.keep(step, good, jnp.ones(1))
    recorder.check(8, good)
    assert [step for step, *_ in recorder.steps] == [9]
    bad = good | {"grad_norm": jnp.float32(jnp.inf)}
    recorder.keep(10, bad, jnp.ones(1))
    with pytest.raises(
        nonfinite.DivergedError, match="grad_norm is not finite, though that of each leaf is, at step 10"
    ):
        recorder.check(10, bad)
    assert json.loads((tmp_path / "nonfinite.json").read_text())["checkpoint"] is None
