"""The training step compiled by the real TPU compiler, which needs no TPU; bad input; useful FLOPs."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from cjepa_jax import compile as command
from cjepa_jax import flops, predict, tpu
from cjepa_jax.config import UserError
from cjepa_jax.masking import Masks, target_tokens
from cjepa_jax.models.predictor import build_predictor
from cjepa_jax.models.vit import build_encoder
from cjepa_jax.parsing import parse
from configs import vitb16, vith14, vitti16


def run(*arguments: str, before: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, without what conftest.py sets for XLA on CPU."""
    unset = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_PLATFORMS")
    environment = {key: value for key, value in os.environ.items() if key not in unset} | variables
    module = (
        ["-c", f"{before}; from cjepa_jax import compile; compile.main()"] if before else ["-m", "cjepa_jax.compile"]
    )
    return subprocess.run([sys.executable, *module, *arguments], env=environment, capture_output=True, text=True)


def report_of(tmp_path, *arguments: str, **variables: str):
    done = run(*arguments, f"--output={tmp_path / 'report.json'}", **variables)
    assert done.returncode == 0, done.stderr
    assert "Predicted, not measured" in done.stdout and "not costed:" in done.stdout
    assert "compiling" in done.stderr
    return json.loads((tmp_path / "report.json").read_text())


def test_layers_compile_within_their_budget(tmp_path):
    """Ti, 64 images a chip: every product that the compiler kept is one that the method needs."""
    report = report_of(
        tmp_path, "--config=configs/vitti16.py", "--topology=v5e:2x2", "--config.data.batch_size=256", "--layer"
    )
    layers = report["layers"]
    for layer in layers.values():
        assert layer["matmul_flops"] == layer["useful_flops"]
        assert layer["predicted_mfu"] < 1
    assert layers["target"]["collectives"] == []
    width = 192
    gradients = sum(c["operand_bytes"] for c in layers["context"]["collectives"] if c["opcode"] == "all-reduce")
    parameters = 12 * width**2 + 13 * width
    assert 2 * parameters <= gradients <= 4 * parameters  # bfloat16 where the products are, float32 in the norms
    cycles = {tower: layer["cycles"] for tower, layer in layers.items()}
    budget = {"context": 693_000, "target": 575_000, "predictor": 8_100_000}
    assert all(cycles[tower] < 1.05 * budget[tower] for tower in budget), cycles


def test_ti_fits_four_v5e_chips(tmp_path):
    """At the compiler's lower level, which takes half the time and a little more memory."""
    report = report_of(
        tmp_path,
        "--config=configs/vitti16.py",
        "--topology=v5e:2x2",
        "--config.data.batch_size=256",
        "--config.model.layers=scanned",
        JAX_OPTIMIZATION_LEVEL="O1",
    )
    assert report["chips"] == 4 and report["images_a_chip"] == 64
    assert 2**27 < report["peak_hbm_bytes"] < 16 * 2**30
    # A scan's products are compiled once: without the turns of its loop this would be 6.
    assert 0.95 < report["useful_of_compiled_flops"] < 1.01
    assert not any(name.startswith("while") for name in report["not_costed"])
    assert 0.03 < report["predicted_mfu"] < 1
    assert report["predicted_step_seconds"] == report["compute_seconds"] + report["collective_seconds"]
    assert report["predicted_chip_hours"] == pytest.approx(4 * report["predicted_hours"])
    assert report["steps"] == round(600 * 1281167 / 256)
    reduced = sum(c["times"] * c["operand_bytes"] for c in report["collectives"] if c["opcode"] == "all-reduce")
    assert reduced > 2 * 16e6  # the gradients of encoder and predictor


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v5e:3x3"], "--topology=v5e:3x3 does not exist; v5e: 1x1, 2x2"),
        (["--topology=v9:2x2"], "v5p: 2x2x1"),
        ([], "--topology is missing"),
        (["--topology=v5e:2x2", "--config.data.batch_size=2050"], "2050 is not divisible by the 4 chips"),
        (["--topology=v5e:2x2", "--config.data.batchsize=2"], "no such setting"),
        (["--topology=v5e:2x2", "--config.model.size=XXL"], "model.size = 'XXL'"),
        (["--topology=v5e:2x2", "--images=1", "--config.optim.epochs=20."], "less than one batch"),
        (["--topology=v5e:2x2", "more"], "unexpected argument 'more'"),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    done = run("--config=configs/vitti16.py", *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr


def test_a_missing_compiler_is_told():
    before = "import sys; sys.modules['libtpu'] = None"
    done = run("--config=configs/vitti16.py", "--topology=v5e:2x2", before=before)
    assert done.returncode == 2
    assert done.stderr == 'error: the TPU compiler is missing: pip install "jax[tpu]==0.10.2"\n'


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory in memory space hbm. Used 18.20G of 15.75G hbm. Exceeded hbm capacity by 2.45G.",
        "Ran out of memory on HBM, the memory required for HLO temporaries (18.20G) exceeds available HBM (15.75G).",
    ],
)
def test_what_does_not_fit_says_by_how_much(message):
    words = command.does_not_fit(f"RESOURCE_EXHAUSTED: {message}")
    assert "needs 18.20 GiB of HBM and has 15.75: 2.45 GiB too much" in words
    assert "data.batch_size" in words and "model.remat" in words


def test_a_layer_that_does_not_fit():
    done = run("--config=configs/vitti16.py", "--topology=v5e:1x1", "--config.data.batch_size=65536", "--layer")
    assert done.returncode == 2, done.stderr
    assert "error: does not fit: a chip needs" in done.stderr and "of HBM and has 15.75" in done.stderr


def test_every_slice_has_its_chip():
    for kind, chip in tpu.CHIPS.items():
        for shape in chip.slices.split():
            assert tpu.find_slice(f"{kind}:{shape}") == (chip, tuple(map(int, shape.split("x"))))
    v5e = tpu.CHIPS["v5e"]
    # The rate of a full pod is what its specification calls all-reduce bandwidth, 51.2 TB/s.
    assert [tpu.ici_bandwidth(v5e, shape) for shape in ((1, 1), (2, 2), (16, 16))] == [0, 100e9, 51.2e12 / 256]
    with pytest.raises(UserError, match="2x2x1"):
        tpu.find_slice("v4:2x2")


def test_sixteen_shards_on_tori_of_other_sides():
    code = """
import os
from cjepa_jax import compile
os.environ.update(compile._ENVIRONMENT)
from cjepa_jax.parsing import parse
from configs import vith14
config = parse(vith14.get_config().to_dict())
for slice, chips in {"v5e:8x8": 64, "v6e:8x8": 64, "v4:4x8x8": 256, "v5p:4x4x4": 64}.items():
    assert dict(compile._make_mesh(config, slice).shape) == {"data": chips // 16, "fsdp": 16}, slice
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_useful_flops_are_known_ones():
    """B/16 with 80 context tokens and a predictor of 6 layers; H/14 with 12."""
    config = vitb16.get_config()
    config.mask.context_tokens = 80
    forward = flops.forward(parse(config.to_dict()))
    step = [3 * forward.context / 1e9, forward.target / 1e9, 3 * forward.predictor / 1e9]
    assert step == pytest.approx([41.8, 34.9, 32.6], abs=0.05)
    assert sum(step) == pytest.approx(forward.step / 1e9)
    huge = flops.forward(parse(vith14.get_config().to_dict()))
    assert huge.target / 1e9 == pytest.approx(333, abs=1)


def test_useful_flops_are_those_of_the_towers():
    """Against JAX' own count of the whole towers' float32 programs, which has elementwise work in it."""
    config = vitti16.get_config()
    config.model.dtype = "float32"
    config = parse(config.to_dict())
    encoder, predictor = (
        build_encoder(config.model, grid=config.grid),
        build_predictor(config.predictor, config.model, grid=config.grid),
    )
    kept, hidden, shape = config.mask.context_tokens, target_tokens(config.mask, config.grid), jax.ShapeDtypeStruct
    blocks = config.mask.targets
    masks = Masks(
        shape((1, kept), jnp.int32),
        shape((1, kept), bool),
        shape((1, blocks, hidden), jnp.int32),
        shape((1, blocks, hidden), bool),
    )
    patches, context = shape((1, config.grid**2, 768), jnp.float32), shape((1, kept, 192), jnp.float32)
    forward = flops.forward(config)
    for module, inputs, expected in (
        (encoder, (patches,), forward.target),
        (encoder, (patches, masks.context_idx, masks.context_valid), forward.context),
        (predictor, (context, masks), forward.predictor),
    ):
        params = jax.eval_shape(functools.partial(module.init, jax.random.key(0)), *inputs)
        counted = jax.jit(module.apply).lower(params, *inputs).cost_analysis()["flops"]
        assert expected < counted < 1.1 * expected


def test_the_report_says_that_it_is_a_prediction():
    assert "Predicted, not measured" in predict.METHOD and "not costed" in predict.METHOD
