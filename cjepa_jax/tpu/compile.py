"""Compiles the training step, or one layer of each transformer, for a TPU slice without a TPU."""

import contextlib
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from cjepa_jax.config import Config, Mesh
from cjepa_jax.errors import UserError, one_line, out_of_memory
from cjepa_jax.methods import METHODS
from cjepa_jax.methods.base import Transformer
from cjepa_jax.models import attention
from cjepa_jax.models.vit import Block, exact
from cjepa_jax.tpu import chips, cost, flops
from cjepa_jax.train import sharding
from cjepa_jax.train.setup import count_steps
from cjepa_jax.train.step import Program, build


def make_mesh(config: Mesh, topology: str) -> jax.sharding.Mesh:
    """Makes a mesh on the chips of a slice that need not exist."""
    kind, _, shape = topology.partition(":")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind in ("v4", "v5p") else {}
    if shape == "1x1":
        options["chips_per_host_bounds"] = [1, 1, 1]
    devices = topologies.get_topology_desc(topology, platform="tpu", **options).devices
    return sharding.make_mesh(config, devices)  # type: ignore[arg-type]


def lower_step(program: Program) -> jax.stages.Lowered:
    """Lowers the training step that `train` runs from shapes alone."""
    return program.step.trace(program.state, program.batch, jax.eval_shape(lambda: jax.random.key(0))).lower()


def lower_layer(config: Config, mesh: jax.sharding.Mesh, stack: Transformer, *, sequences: int) -> jax.stages.Lowered:
    """Lowers one block on tokens of `model.dtype`, with its gradients where the stack is trained."""
    dtype = jnp.dtype(config.model.dtype)
    attend = attention.choose(
        config.model.attention,
        device=mesh.devices.flat[0],
        per_device=sharding.per_device(mesh),
        dtype=config.model.dtype,
        shapes=[(stack.tokens, stack.width, stack.heads)],
    )
    block = Block(stack.heads, stack.mlp_ratio, config.model.init, dtype, attend)
    x = jax.ShapeDtypeStruct((sequences, stack.tokens, stack.width), dtype)
    valid = jax.ShapeDtypeStruct((sequences, stack.tokens), jnp.bool_) if stack.masked else None
    params = jax.eval_shape(block.init, jax.eval_shape(lambda: jax.random.key(0)), x, valid)

    def layer(params, x, valid, gradient):
        if not stack.trained:
            return block.apply(params, x, valid), None
        y, pull = jax.vjp(lambda params, x: block.apply(params, x, valid), params, x)
        return y, pull(gradient)

    whole, split = sharding.replicated(mesh), sharding.batch(mesh)
    jitted = jax.jit(
        layer,
        in_shardings=(whole, split, split, split),
        out_shardings=(split, (whole, split) if stack.trained else None),
    )
    return jitted.trace(params, x, valid, x if stack.trained else None).lower()


def _compile(lowered: jax.stages.Lowered, label: str) -> tuple[jax.stages.Compiled, float]:
    """Returns the compiled program and the seconds that it took. Raises UserError where it does not fit."""
    start = time.perf_counter()
    try:
        with _progress(label):
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(does_not_fit(str(error))) from None
    return compiled, time.perf_counter() - start


def _cost(compiled: jax.stages.Compiled, chip: chips.Chip, shape: tuple[int, ...]) -> dict[str, Any]:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # the TPU compiler gives both
    held = {"peak_hbm_bytes": memory.peak_memory_in_bytes, "argument_bytes": memory.argument_size_in_bytes}
    return held | cost.describe(text, chip, shape)


def does_not_fit(message: str) -> str:
    """Turns the compiler's message about too little memory into one line: how much is missing, and what would help."""
    number = r"([\d.]+)([KMGT])"
    amount = one_line(message)[:300]
    if found := re.search(rf"(?:Used |\(){number}\)? (?:of|exceeds available HBM) \(?{number}", message):
        size = {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}
        need, have = float(found[1]) * size[found[2]], float(found[3]) * size[found[4]]
        amount = f"a chip needs {need:.2f} GiB of HBM and has {have:.2f}: {need - have:.2f} GiB too much"
    return (
        f"does not fit: {amount}. "
        "Against activations: optim.microbatches above 1, model.remat=dots or full, more chips in --topology, or a "
        "smaller data.batch_size. Against parameters and optimizer: mesh.parameters=zero1 or fsdp"
    )


@contextlib.contextmanager
def _progress(label: str) -> Iterator[None]:
    """Prints the elapsed time on stderr: every second on a terminal, else every half minute."""
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


def compile_step(config: Config, topology: str, *, images: int, classes: int) -> dict[str, Any]:
    """Compiles the training step for a slice and reports what it costs; `classes` is the number of label classes.

    Raises UserError for what does not fit or exist.
    """
    chip, shape = chips.find_slice(topology)
    steps = count_steps(config, images=images)
    mesh = make_mesh(config.mesh, topology)
    method = METHODS[config.method](config, classes=classes)
    program = build(method, steps, mesh)
    with jax.set_mesh(mesh), exact(config.model.dtype):  # as in training
        with _progress("tracing the training step"):
            lowered = lower_step(program)
        compiled, seconds = _compile(lowered, f"compiling it for {topology}")
    stacks = method.transformers()
    report: dict[str, Any] = {
        "chips": mesh.size,
        "epochs": config.optim.epochs,
        "steps": steps,
        "compile_seconds": seconds,
    }
    report |= {"forward_flops_per_image": {name: flops.forward(stack) for name, stack in stacks.items()}}
    report |= _cost(compiled, chip, shape)
    cost.add_step(report, useful=flops.step(stacks.values()), batch=config.data.batch_size, chip=chip)
    return report


def compile_layers(config: Config, topology: str, *, classes: int) -> dict[str, Any]:
    """Compiles one block of each transformer for a slice and reports what each costs."""
    chip, shape = chips.find_slice(topology)
    mesh, report = make_mesh(config.mesh, topology), {}
    for name, stack in METHODS[config.method](config, classes=classes).transformers().items():
        sequences = config.data.batch_size * stack.sequences
        with jax.set_mesh(mesh), exact(config.model.dtype):
            lowered = lower_layer(config, mesh, stack, sequences=sequences)
            compiled, seconds = _compile(lowered, f"compiling a {name} layer")
        useful = sequences * flops.block(stack.tokens, stack.width, stack.mlp_ratio) / mesh.size
        useful *= flops.BACKWARD if stack.trained else 1
        report[name] = stack._asdict() | {"sequences": sequences, "useful_flops": useful, "compile_seconds": seconds}
        report[name] |= _cost(compiled, chip, shape)
        seconds = report[name]["compute_seconds"] + report[name]["kernel_seconds"]
        report[name]["predicted_mfu"] = useful / seconds / chip.flops
    return report
