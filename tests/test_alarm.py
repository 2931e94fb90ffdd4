"""A collapse is said while it happens, once, and ends the run where that is wished; a healthy run says nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from cjepa_jax import methods
from cjepa_jax.config import Config, Log
from cjepa_jax.methods.base import Method
from cjepa_jax.settings import parse
from cjepa_jax.train.alarm import Alarm
from cjepa_jax.train.loop import train
from cjepa_jax.train.nonfinite import DivergedError
from tests import helpers

# Step, rep/std, rep/rank and rep/cosine of configs/digits.py, seed 0, of 1,123 steps (docs/reliability.md).
HEALTHY = [  # without EMA
    (5, 0.0699, 2.71, 0.99229),
    (25, 0.1136, 2.81, 0.97929),
    (50, 0.0844, 2.57, 0.98984),
    (100, 0.1253, 4.84, 0.94534),
    (150, 0.079, 3.14, 0.98656),
    (200, 0.066, 2.95, 0.98739),
    (300, 0.0563, 3.82, 0.98543),
    (400, 0.0554, 4.31, 0.98229),
]
COLLAPSED = [  # without EMA and with vicreg.weight = 0
    (5, 0.0687, 2.68, 0.99261),
    (25, 0.0324, 1.72, 0.99873),
    (50, 0.0157, 1.38, 0.99972),
    (100, 0.0145, 1.34, 0.99976),
    (150, 0.0142, 1.34, 0.99977),
    (200, 0.0158, 1.36, 0.99971),
    (300, 0.014, 1.31, 0.99977),
    (400, 0.0151, 1.31, 0.99973),
]


def look(alarm, curve):
    """The metric and the warning at each step of a curve."""
    names = ("rep/std", "rep/rank", "rep/cosine")
    return {step: alarm.look(step, dict(zip(names, values, strict=True))) for step, *values in curve}


def test_a_healthy_run_says_nothing_and_a_collapsed_one_once():
    assert all(said == ({"rep/collapsed": 0.0}, "") for said in look(Alarm(Log(), 1123, []), HEALTHY).values())
    said = look(Alarm(Log(), 1123, []), COLLAPSED)
    # Below since step 25: three lines later, and 5 % of the run.
    assert [metric["rep/collapsed"] for metric, _ in said.values()] == [0, 0, 0, 1, 1, 1, 1, 1]
    notes = [note for _, note in said.values() if note]
    assert len(notes) == 1 and notes[0] == said[100][1] and "\n" not in notes[0]
    assert "at step 100, rep/std is 0.0145, less than 0.5 of its 0.0687 at the start, since step 25" in notes[0]
    assert "1 - rep/cosine is 0.00024, less than 0.25 of its 0.00739" in notes[0] and "vicreg.weight" in notes[0]


def test_a_dip_says_nothing():
    dip = [(1, 1.0), (2, 0.1), (3, 0.1), (300, 0.1), (301, 0.9), (302, 0.1), (303, 0.1), (304, 0.1), (305, 0.1)]
    alarm = Alarm(Log(), 10_000, [])
    assert not any(alarm.look(step, {"rep/std": std})[1] for step, std in dip)
    assert alarm.look(801, {"rep/std": 0.1})[0] == {"rep/collapsed": 0.0}
    assert alarm.look(802, {"rep/std": 0.1})[0] == {"rep/collapsed": 1.0}
    assert alarm.look(803, {"rep/std": 0.9})[0] == {"rep/collapsed": 0.0}


def test_a_run_that_goes_on_compares_with_its_first_step():
    names = ("step", "rep/std", "rep/rank", "rep/cosine")
    lines = [dict(zip(names, values, strict=True)) for values in COLLAPSED]
    metric, note = Alarm(Log(), 1123, lines[:3]).look(100, lines[3])
    assert metric == {"rep/collapsed": 1.0} and "since step 25" in note
    metric, note = Alarm(Log(), 1123, []).look(100, lines[3])
    assert metric == {"rep/collapsed": 0.0} and not note


def test_off_is_silent_and_lines_without_diagnostics_are_left_alone():
    assert all(said == ({}, "") for said in look(Alarm(Log(collapse="off"), 1123, []), COLLAPSED).values())
    assert Alarm(Log(), 10, []).look(1, {"loss/total": 0.0}) == ({}, "")


@dataclasses.dataclass(frozen=True)
class Shrinking(Method):
    """A linear encoder whose loss is the size of its features."""

    settings = Config

    def init(self, rng):
        return {"encoder": {"kernel": jax.random.normal(rng, (64, 8)) / 8}}

    def prepare(self, batch, rng):
        return batch.images.reshape(len(batch.images), -1).astype(jnp.float32) / 255

    def forward(self, params, averages, inputs):
        return {"features": inputs @ params["encoder"]["kernel"]}

    def loss(self, params, outputs):
        total = jnp.square(outputs["features"]).mean()
        return total, {"loss/total": total}


@pytest.fixture
def shrinking(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "shrinking", Shrinking)
    data = dict(source="digits", image_size=8, mean=(0.5,), std=(0.5,), batch_size=16, train_split="train[:160]")
    optim = dict(epochs=6.0, warmup_epochs=0.2, learning_rate=0.05, weight_decay_end=0.04)
    values = dict(method="shrinking", data=data, optim=optim)
    return lambda how: parse(values | dict(log=dict(every=5, collapse=how)), Config)


def test_the_loop_warns_and_goes_on_or_saves_and_ends(shrinking, tmp_path, capsys):
    workdir = epath.Path(tmp_path / "stopped")
    with pytest.raises(DivergedError, match="features are collapsing: at step ") as error:
        train(shrinking("stop"), workdir)
    lines = helpers.lines(workdir)
    assert lines[0]["step"] == 1 and lines[0]["rep/collapsed"] == 0
    (saved,) = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.is_dir()]
    assert f"saved at step {saved};" in str(error.value) and "\n" not in str(error.value)
    warned = next(line["step"] for line in lines if line["rep/collapsed"])
    assert warned < saved <= warned + 3 < 60
    assert capsys.readouterr().err.count("warning: the features are collapsing") == 1

    train(shrinking("warn"), workdir)  # may be changed in a workdir
    assert "finished at step 60" in (said := capsys.readouterr().err)
    assert said.count("warning: the features are collapsing") == 1
