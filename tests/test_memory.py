"""A step that does not fit into memory is one line that says what helps; parts of a batch are chosen by memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from cjepa_jax import command
from cjepa_jax.errors import UserError
from cjepa_jax.methods.cjepa import CJEPA, CJEPAConfig
from cjepa_jax.models.masking import Mask, context_tokens, sample_masks
from cjepa_jax.settings import parse
from cjepa_jax.train import loop, memory, optimizer, sharding
from cjepa_jax.train.step import build
from tests.conftest import small


def program(**overrides):
    config = small(data__batch_size=64, **overrides)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    return build(CJEPA(config), 10, mesh)


def test_the_fewest_parts_are_chosen_with_which_the_step_fits(monkeypatch, capsys):
    needed = memory.compile_measured(program(optim__microbatches=2))[2]
    monkeypatch.setattr(memory, "available", lambda: needed / memory.ROOM + 1)
    memory.compile_step(program(optim__microbatches=0), 10)
    assert "optim.microbatches = 2, chosen: the step needs" in capsys.readouterr().err


@pytest.mark.parametrize("microbatches", [0, 1])
def test_a_step_that_cannot_fit_is_one_line_before_the_first_step(microbatches, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 1e5)
    workdir = epath.Path(tmp_path / "run")
    with pytest.raises(UserError) as error:
        loop.train(make_config(optim__microbatches=microbatches), workdir)
    says = r"the step does not fit into memory: the step needs \d+\.\d GB, and the machine has 0\.0.*; what helps: .*"
    assert re.fullmatch(says, str(error.value))
    assert ("--config.optim.microbatches=0" in str(error.value)) == (microbatches == 1)
    assert "--config.model.remat=full" in str(error.value) and "data.batch_size below 16" in str(error.value)
    assert not (workdir / "config.json").exists()


def test_memory_that_runs_out_while_training_is_one_line(make_config, tmp_path, monkeypatch):
    def no_room(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 38000000000 bytes.\nmore")

    monkeypatch.setattr(memory, "compile_step", lambda program, steps: no_room)
    with pytest.raises(UserError, match=r"out of memory \(RESOURCE_EXHAUSTED: .* bytes. more\); what helps: ") as error:
        loop.train(make_config(), epath.Path(tmp_path / "run"))
    assert "\n" not in str(error.value)


def test_every_command_says_so_in_one_line(monkeypatch, capsys):
    def body():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 38 GB\nmore")

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as stop:
        command.run(body, "")
    says = "error: out of memory (RESOURCE_EXHAUSTED: 38 GB more); a smaller --config.data.batch_size helps"
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(says)


def test_what_a_control_group_allows_is_the_limit(monkeypatch):
    assert 1e8 < memory.available() * jax.local_device_count() < 1e15
    read = {"/sys/fs/cgroup/memory.max": "3000", "/sys/fs/cgroup/memory.current": "1500"}
    read |= {"/sys/fs/cgroup/memory.stat": "inactive_file 500\nanon 1\n"}
    real = memory.pathlib.Path.read_text
    monkeypatch.setattr(memory.pathlib.Path, "read_text", lambda path: read.get(str(path)) or real(path))
    assert memory.available() * jax.local_device_count() == 2000


def test_patches_context_and_rates_follow_the_images_and_the_batch():
    def folder(**data):
        values = {"data": {"source": "folder", **data}, "model": {"patch_size": 0}, "mask": {"context_tokens": 0}}
        return parse(values | {"optim": {"rates_for_batch": 2048}}, CJEPAConfig)

    for size, patch in ((224, 16), (96, 8), (64, 8), (32, 4), (28, 2)):
        config = folder(image_size=size)
        assert config.model.patch_size == patch
        CJEPA(config)
    with pytest.raises(
        UserError, match=r"model\.patch_size = 0: none of 16, 8, 4 and 2 divides data\.image_size = 225"
    ):
        folder(image_size=225)
    config = folder(batch_size=512)
    schedule = optimizer.learning_rate(config.optim, 1000, config.rate_scale)
    with jax.numpy_dtype_promotion("standard"):
        found = schedule(jnp.int32(149))
    assert float(found) == pytest.approx(config.optim.learning_rate / 2)  # the end of the warm-up
    assert folder().rate_scale == pytest.approx(np.sqrt(1 / 8))


@pytest.mark.parametrize("recipe", ["released", "corrected"])
def test_the_context_is_as_long_as_an_image_is_left_with_on_average(recipe):
    every = Mask(recipe=recipe, min_keep=1, context_tokens=144 if recipe == "corrected" else 121)
    draw = jax.jit(jax.vmap(lambda rng: sample_masks(rng, every, grid=(12, 12), batch=2).context_valid.sum(axis=1)))
    mean = float(draw(jax.random.split(jax.random.key(0), 1000)).mean())
    assert 0 <= context_tokens(Mask(recipe=recipe, context_tokens=0), (12, 12)) - mean < 8 + 0.5
    masks = sample_masks(jax.random.key(1), Mask(recipe=recipe, context_tokens=0), grid=(12, 12), batch=2)
    assert masks.context_idx.shape == (2, context_tokens(Mask(recipe=recipe, context_tokens=0), (12, 12)))
