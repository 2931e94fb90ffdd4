"""Compile the training step for a TPU slice, without a TPU, and predict what it will cost.

    python -m cjepa_jax.compile --config=configs/vith14.py --topology=v5e:8x8

--config=FILE             the experiment, as for cjepa_jax.main
--config.GROUP.KEY=VALUE  overrides any setting
--topology=NAME           the slice; a wrong name lists those that exist
--layer                   one layer of each tower instead of the whole step: quicker, for tuning
--images=1281167          training images of an epoch (ImageNet-1k's); steps and hours follow from it
--output=FILE             JSON with all numbers; default runs/compile/<config>-<topology>[-layer].json

Wants the TPU compiler: pip install "jax[tpu]==0.10.2". The whole step takes minutes and some GB.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from cjepa_jax import command, predict, tpu
from cjepa_jax.config import Config, UserError, one_line, require

_TOPOLOGY = flags.DEFINE_string("topology", "", "The TPU slice, e.g. v5e:8x8.")
_LAYER = flags.DEFINE_bool("layer", False, "One layer of each tower instead of the whole step.")
_IMAGES = flags.DEFINE_integer("images", 1281167, "Training images of an epoch.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "Where the JSON goes.")

# The compiler without a TPU; the last two keep it from complaining that there is none.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
_ENVIRONMENT |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}


def _make_mesh(config: Config, topology: str) -> Any:
    from jax.experimental import topologies

    from cjepa_jax import sharding

    kind, _, shape = topology.partition(":")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind in ("v4", "v5p") else {}
    if shape == "1x1":
        options["chips_per_host_bounds"] = [1, 1, 1]
    devices = topologies.get_topology_desc(topology, platform="tpu", **options).devices
    return sharding.make_mesh(config.mesh, devices)  # type: ignore[arg-type]


def _lower(program: Any) -> Any:
    """The training step that `train` runs, lowered from shapes alone."""
    import jax

    return program.step.trace(program.state, program.inputs, jax.eval_shape(lambda: jax.random.key(0))).lower()


def _lower_layer(
    config: Config, mesh: Any, *, sequences: int, tokens: int, width: int, mlp_ratio: float, masked: bool, train: bool
) -> Any:
    """One block, lowered on bfloat16 (or model.dtype) tokens; `train` adds its gradients."""
    import jax
    import jax.numpy as jnp

    from cjepa_jax import sharding
    from cjepa_jax.models.vit import Block, parse_size

    dtype = jnp.dtype(config.model.dtype)
    block = Block(parse_size(config.model.size).heads, mlp_ratio, config.model.init, dtype)
    x = jax.ShapeDtypeStruct((sequences, tokens, width), dtype)
    valid = jax.ShapeDtypeStruct((sequences, tokens), jnp.bool_) if masked else None
    params = jax.eval_shape(block.init, jax.eval_shape(lambda: jax.random.key(0)), x, valid)

    def layer(params, x, valid, gradient):
        if not train:
            return block.apply(params, x, valid), None
        y, pull = jax.vjp(lambda params, x: block.apply(params, x, valid), params, x)
        return y, pull(gradient)

    whole, split = sharding.replicated(mesh), sharding.batch(mesh)
    jitted = jax.jit(
        layer, in_shardings=(whole, split, split, split), out_shardings=(split, (whole, split) if train else None)
    )
    return jitted.trace(params, x, valid, x if train else None).lower()


def _compile(lowered: Any, label: str) -> tuple[Any, float]:
    """The compiled program and the seconds it took. Raises UserError where it does not fit."""
    import jax

    start = time.perf_counter()
    try:
        with _progress(label):
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(does_not_fit(str(error))) from None
    return compiled, time.perf_counter() - start


def does_not_fit(message: str) -> str:
    """The compiler's words for too little memory -> one line: by how much, and which settings would help."""
    number = r"([\d.]+)([KMGT])"
    amount = one_line(message)[:300]
    if found := re.search(rf"(?:Used |\(){number}\)? (?:of|exceeds available HBM) \(?{number}", message):
        size = {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}
        need, have = float(found[1]) * size[found[2]], float(found[3]) * size[found[4]]
        amount = f"a chip needs {need:.2f} GiB of HBM and has {have:.2f}: {need - have:.2f} GiB too much"
    return (
        f"does not fit: {amount}. "
        "Against activations: a smaller data.batch_size, more chips in --topology, model.remat=dots or full. "
        "Against parameters and optimizer: mesh.parameters=zero1 or fsdp"
    )


@contextlib.contextmanager
def _progress(label: str) -> Iterator[None]:
    """A line on stderr that tells the time: each second on a terminal, else every half minute."""
    done, start, terminal = threading.Event(), time.perf_counter(), sys.stderr.isatty()

    def show():
        while True:
            text = f"{label} ... {time.perf_counter() - start:.0f} s"
            print(f"\r{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)
            if done.wait(1 if terminal else 30):
                break

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if terminal:
            print(file=sys.stderr)


def compile_step(config: Config, topology: str, *, images: int) -> dict[str, Any]:
    """Compiles the training step for a slice; the report. Raises UserError for what does not fit or exist."""
    import jax

    from cjepa_jax import flops
    from cjepa_jax.step import Method, build

    chip, shape = tpu.find_slice(topology)
    steps = round(config.optim.epochs * images / config.data.batch_size)
    require(steps >= 1, f"--images={images}: optim.epochs = {config.optim.epochs} of them are less than one batch")
    mesh = _make_mesh(config, topology)
    program = build(Method(config, steps), mesh)
    with jax.set_mesh(mesh):
        with _progress("tracing the training step"):
            lowered = _lower(program)
        compiled, seconds = _compile(lowered, f"compiling it for {topology}")
    forward = flops.forward(config)
    report = {"chips": mesh.size, "epochs": config.optim.epochs, "steps": steps, "compile_seconds": seconds}
    report |= {"forward_flops_an_image": forward._asdict()} | predict.describe(compiled, chip, shape)
    predict.add_step(report, useful=forward.step, batch=config.data.batch_size, chip=chip)
    return report


def compile_layers(config: Config, topology: str) -> dict[str, Any]:
    """Compiles one block of each tower for a slice; the report of each."""
    import jax

    from cjepa_jax import flops
    from cjepa_jax.masking import target_tokens
    from cjepa_jax.models.vit import parse_size

    chip, shape = tpu.find_slice(topology)
    mesh, size, mask, batch = (
        _make_mesh(config, topology),
        parse_size(config.model.size),
        config.mask,
        config.data.batch_size,
    )
    encoder = {"width": size.width, "mlp_ratio": size.mlp_ratio}
    sequence = mask.context_tokens + target_tokens(mask, config.grid)
    towers: dict[str, tuple[int, dict[str, Any]]] = {
        "context": (size.depth, dict(sequences=batch, tokens=mask.context_tokens, masked=True, train=True) | encoder),
        "target": (size.depth, dict(sequences=batch, tokens=config.grid**2, masked=False, train=False) | encoder),
        "predictor": (
            config.predictor.depth,
            dict(sequences=batch * mask.targets, tokens=sequence, masked=True, train=True)
            | dict(width=config.predictor.width, mlp_ratio=4),
        ),
    }
    report: dict[str, Any] = {}
    for tower, (depth, layer) in towers.items():
        with jax.set_mesh(mesh):
            compiled, seconds = _compile(_lower_layer(config, mesh, **layer), f"compiling a {tower} layer")
        useful = layer["sequences"] * flops.block(layer["tokens"], layer["width"], layer["mlp_ratio"]) / mesh.size
        useful *= flops.BACKWARD if layer["train"] else 1
        report[tower] = layer | {"depth": depth, "useful_flops": useful, "compile_seconds": seconds}
        report[tower] |= predict.describe(compiled, chip, shape)
        report[tower]["predicted_mfu"] = useful / report[tower]["compute_seconds"] / chip.flops
    return report


def _run() -> None:
    name, config = command.read_config()
    require(bool(_TOPOLOGY.value), "--topology is missing, e.g. --topology=v5e:8x8")
    topology = _TOPOLOGY.value
    chip, shape = tpu.find_slice(topology)
    chips = math.prod(shape)
    batch = config.data.batch_size
    require(batch % chips == 0, f"data.batch_size = {batch} is not divisible by the {chips} chips of {topology}")
    require(
        importlib.util.find_spec("libtpu") is not None, 'the TPU compiler is missing: pip install "jax[tpu]==0.10.2"'
    )
    os.environ.update(_ENVIRONMENT)
    import jax  # after the environment is set

    if config.model.dtype == "float32":  # as train does
        jax.config.update("jax_default_matmul_precision", "highest")

    head = {"config": name, "topology": topology, "chips": chips, "images_a_chip": batch // chips}
    head |= {"method": predict.METHOD, "clock_calibrated": topology[:3] not in tpu.CLOCK_NOT_CALIBRATED}
    head |= {f"{name}_version": importlib.metadata.version(name) for name in ("jax", "libtpu")}
    if _LAYER.value:
        towers = compile_layers(config, topology)
        report, table = head | {"layers": towers}, predict.format_layers(towers, chip)
        table += "".join(f"\n{tower}: {predict.not_costed(layer)}" for tower, layer in towers.items())
    else:
        report = head | compile_step(config, topology, images=_IMAGES.value)
        table = f"{predict.format_step(report, chip)}\n{predict.not_costed(report)}"
    file = f"{name}-{topology.replace(':', '-')}{'-layer' if _LAYER.value else ''}.json"
    output = pathlib.Path(_OUTPUT.value or f"runs/compile/{file}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{name} on {topology}, {config.model.size}/{config.model.patch_size}\n{table}\n\n{predict.METHOD}")
    if not report["clock_calibrated"]:
        print(f"The clock of {topology[:3]} is not calibrated: times rank designs and say nothing more.")
    print(f"All numbers: {output}")


def main() -> None:
    """Exit code 0; 2 after a mistake that the user can mend, or where the step does not fit; 1 after any other."""
    command.run(_run, __doc__)


if __name__ == "__main__":
    main()
