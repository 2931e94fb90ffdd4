"""The training step compiled by the real TPU compiler, which needs no TPU; bad input; useful FLOPs."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from cjepa_jax.errors import UserError
from cjepa_jax.methods import CJEPA
from cjepa_jax.models.masking import Masks, target_tokens
from cjepa_jax.settings import parse
from cjepa_jax.tpu import chips, cost, flops
from cjepa_jax.tpu.compile import does_not_fit
from cjepa_jax.train import sharding
from cjepa_jax.train.step import build
from configs import vitb16, vith14, vitti16
from tests.siamese import small_method


def run(*arguments: str, before: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, without what conftest.py sets for XLA on CPU."""
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


@pytest.mark.parametrize(
    "level, budget",
    [
        pytest.param("", {"context": 394_000, "target": 403_000, "predictor": 4_712_000}, marks=pytest.mark.slow),
        ("O1", {"context": 750_000, "target": 682_000, "predictor": 9_898_000}),  # which takes a third of the time
    ],
    ids=["as shipped", "O1"],
)
def test_layers_compile_within_their_budget(tmp_path, level, budget):
    """Ti, 64 images a chip: every product that the compiler kept is one that the method needs."""
    settings = ("--config=configs/vitti16.py", "--topology=v5e:2x2", "--config.data.batch_size=256", "--layer")
    report = report_of(tmp_path, *settings, **({"JAX_OPTIMIZATION_LEVEL": level} if level else {}))
    layers = report["layers"]
    for layer in layers.values():
        # But for the scores, which the backward pass of attention computes anew.
        anew = layer["sequences"] // 4 * 2 * layer["tokens"] ** 2 * layer["width"] if layer["trained"] else 0
        assert layer["matmul_flops"] == layer["useful_flops"] + anew
        assert {k["name"] for k in layer["kernels"]} >= {f"attention_forward_3x{layer['width'] // 3}"}
        assert 0 < layer["kernel_seconds"] < layer["compute_seconds"]
        assert layer["predicted_mfu"] < 1
    assert layers["target"]["collectives"] == []
    width = 192
    gradients = sum(c["operand_bytes"] for c in layers["context"]["collectives"] if c["opcode"] == "all-reduce")
    parameters = 12 * width**2 + 13 * width
    assert 2 * parameters <= gradients <= 4 * parameters  # bfloat16 where the products are, float32 in the norms
    cycles = {name: layer["cycles"] for name, layer in layers.items()}
    assert all(cycles[name] < 1.05 * budget[name] for name in budget), cycles


@pytest.mark.slow
def test_ti_fits_four_v5e_chips(tmp_path):
    """At the compiler's lower level, which takes half the time and a little more memory."""
    report = report_of(
        tmp_path,
        "--config=configs/vitti16.py",
        "--topology=v5e:2x2",
        "--config.data.batch_size=256",
        "--config.model.layers=scanned",
        "--config.model.size=192x4x3",
        "--config.predictor.depth=2",
        JAX_OPTIMIZATION_LEVEL="O1",
    )
    assert report["chips"] == 4 and report["images_per_chip"] == 64
    assert 2**27 < report["peak_hbm_bytes"] < 16 * 2**30
    # A scan's products are compiled once: without the turns of its loop this would be 6.
    assert 0.95 < report["useful_of_compiled_flops"] < 1.01
    assert not any(name.startswith("while") for name in report["not_costed"])
    assert 0.03 < report["predicted_mfu"] < 1
    assert report["predicted_step_seconds"] == sum(
        report[f"{part}_seconds"] for part in ("compute", "kernel", "collective")
    )
    assert 0.01 < report["update_seconds"] / report["predicted_step_seconds"] < 0.3
    assert report["predicted_chip_hours"] == pytest.approx(4 * report["predicted_hours"])
    assert report["steps"] == round(600 * 1281167 / 256)
    reduced = sum(c["times"] * c["operand_bytes"] for c in report["collectives"] if c["opcode"] == "all-reduce")
    assert reduced > 2 * 5.6e6  # the gradients of encoder and predictor


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
        (
            ["--topology=v5e:2x2", "--config=configs/finetune_folder.py"],
            "model.size and model.patch_size and data.image_size would follow from a checkpoint, which is not read "
            "here: give such as --config.model.size=B --config.model.patch_size=16 --config.data.image_size=224",
        ),
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
    words = does_not_fit(f"RESOURCE_EXHAUSTED: {message}")
    assert "needs 18.20 GiB of HBM and has 15.75: 2.45 GiB too much" in words
    assert all(name in words for name in ("data.batch_size", "model.remat", "optim.microbatches"))


def test_a_layer_that_does_not_fit():
    done = run("--config=configs/vitti16.py", "--topology=v5e:1x1", "--config.data.batch_size=65536", "--layer")
    assert done.returncode == 2, done.stderr
    assert "error: does not fit: a chip needs" in done.stderr and "of HBM and has 15.75" in done.stderr


def test_every_slice_has_its_chip():
    for kind, chip in chips.CHIPS.items():
        for shape in chip.slices.split():
            assert chips.find_slice(f"{kind}:{shape}") == (chip, tuple(map(int, shape.split("x"))))
    v5e = chips.CHIPS["v5e"]
    # The rate of a full pod is what its specification calls all-reduce bandwidth, 51.2 TB/s.
    assert [chips.ici_bandwidth(v5e, shape) for shape in ((1, 1), (2, 2), (16, 16))] == [0, 100e9, 51.2e12 / 256]
    with pytest.raises(UserError, match="2x2x1"):
        chips.find_slice("v4:2x2")


def test_sixteen_shards_on_tori_of_other_sides():
    code = """
import os
import re
from cjepa_jax import compile as command
os.environ.update(command.ENVIRONMENT)
from cjepa_jax.methods import CJEPA
from cjepa_jax.settings import parse
from cjepa_jax.tpu import chips, compile
from configs import vith14
config = parse(vith14.get_config().to_dict(), CJEPA.settings)
for slice, count in {"v5e:8x8": 64, "v6e:8x8": 64, "v4:4x8x8": 256, "v5p:4x4x4": 64}.items():
    mesh = compile.make_mesh(config.mesh, slice)
    assert dict(mesh.shape) == {"data": count // 16, "fsdp": 16}, slice
    chip, _ = chips.find_slice(slice)
    assert chips.peak_flops(mesh.devices.flat[0].device_kind) == chip.flops, slice  # by the name that JAX gives it
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def method_of(config) -> CJEPA:
    return CJEPA(parse(config.to_dict(), CJEPA.settings))


def test_useful_flops_are_known_ones():
    """B/16 with 80 context tokens and a predictor of 6 layers; H/14 with 12."""
    config = vitb16.get_config()
    config.mask = dict(context_tokens=80)
    stacks = method_of(config).transformers()
    context, target, predictor = (flops.forward(stacks[name]) for name in ("context", "target", "predictor"))
    step = [3 * context / 1e9, target / 1e9, 3 * predictor / 1e9]
    assert step == pytest.approx([41.8, 34.9, 32.6], abs=0.05)
    assert sum(step) == pytest.approx(flops.step(stacks.values()) / 1e9)
    huge = method_of(vith14.get_config()).transformers()
    assert flops.forward(huge["target"]) / 1e9 == pytest.approx(333, abs=1)


def test_useful_flops_are_those_of_the_networks():
    """Against JAX' own count of the whole networks' float32 programs, which has elementwise work in it."""
    config = vitti16.get_config()
    config.model.dtype = "float32"
    method = method_of(config)
    mask, grid, shape = method.config.mask, method.config.grid, jax.ShapeDtypeStruct
    kept, hidden, blocks = mask.context_tokens, target_tokens(mask, grid), mask.targets
    masks = Masks(
        shape((1, kept), jnp.int32),
        shape((1, kept), bool),
        shape((1, blocks, hidden), jnp.int32),
        shape((1, blocks, hidden), bool),
    )
    patches, context = shape((1, grid[0] * grid[1], 768), jnp.float32), shape((1, kept, 192), jnp.float32)
    for name, module, inputs in (
        ("target", method.encoder, (patches,)),
        ("context", method.encoder, (patches, masks.context_idx, masks.context_valid)),
        ("predictor", method.predictor, (context, masks)),
    ):
        expected = flops.forward(method.transformers()[name])
        params = jax.eval_shape(functools.partial(module.init, jax.random.key(0)), *inputs)
        counted = jax.jit(module.apply).lower(params, *inputs).cost_analysis()["flops"]
        assert expected < counted < 1.1 * expected, name


def test_the_update_has_the_name_by_which_its_cost_is_found(make_config):
    program = build(CJEPA(make_config()), 10, sharding.make_mesh(make_config().mesh))
    rng = jax.eval_shape(lambda: jax.random.key(0))
    text = program.step.lower(program.state, program.batch, rng).as_text(debug_info=True)
    scopes = set(re.findall(r'"jit\(train_step\)/update/(\w+)', text))
    assert {"mul", "sqrt", "add"} <= scopes and "dot_general" not in scopes


def test_the_report_says_that_it_is_a_prediction():
    assert "Predicted, not measured" in cost.METHOD and "not costed" in cost.METHOD


def test_what_is_frozen_has_no_backward_pass(make_config):
    def trained(*frozen):
        stacks = CJEPA(make_config(optim__frozen=frozen)).transformers()
        return [name for name, stack in stacks.items() if stack.trained]

    assert trained() == ["context", "predictor"]
    assert trained("encoder") == ["predictor"]
    assert trained("predictor") == ["context", "predictor"]  # the encoder's gradient passes through it
    assert trained("encoder", "predictor") == []
    assert not small_method("vicreg", optim__frozen=("encoder",)).transformers()["encoder"].trained
