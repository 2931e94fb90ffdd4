"""Compiles the step and says whether it fits into memory; chooses the parts of the batch where that is wished."""

import contextlib
import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cjepa_jax.config import Config
from cjepa_jax.errors import UserError, one_line, out_of_memory
from cjepa_jax.train import step

ROOM = 0.9  # the share of the memory that a choice of ours may fill; the rest is for images, probes and other programs
_GB = 1e9


def compile_step(program: step.Program, steps: int) -> jax.stages.Compiled:
    """Compiles the step of a run of `steps` steps and checks that it fits into memory.

    Where `optim.microbatches` is 0, the batch is cut into the fewest parts with which the step fits. All processes must
    call this. Raises UserError, which says what is needed, what there is and which settings help.
    """
    config, mesh = program.method.config, program.split.mesh
    there, chooses = available(), config.optim.microbatches == 0
    most = config.data.batch_size // mesh.size if chooses else 1
    left = [parts for parts in range(1, most + 1) if most % parts == 0] if chooses else [config.optim.microbatches]
    needed = math.inf
    while left:
        parts = left.pop(0)
        if chooses:
            optim = dataclasses.replace(config.optim, microbatches=parts)
            method = dataclasses.replace(program.method, config=dataclasses.replace(config, optim=optim))
            program = step.build(method, steps, mesh)  # type: ignore[arg-type]
        compiled, kept, needed = compile_measured(program)
        limit = there * (ROOM if chooses else 1)
        if compiled is not None and needed <= limit:
            if chooses and jax.process_index() == 0:
                _say(f"optim.microbatches = {parts}, chosen: {_needs(needed, there)}")
            return compiled
        if limit <= kept:  # the parameters alone do not fit
            break
        # What a step needs beside the parameters shrinks with the parts, about in proportion; the first cut saves more.
        least = parts * ((needed - kept) / (limit - kept) if math.isfinite(needed) else 2) / (2 if parts == 1 else 1)
        left = [more for more in left if more >= least] or left[-1:]
    raise UserError(f"the step does not fit into memory: {_needs(needed, there)}; {_remedies(config)}")


class SharedSteps:
    """Compiles steps as `compile_step` does, and gives the newest again where only the seed of the run is another.

    The seed is not part of a step, so that the runs of one experiment with several seeds compile it once.
    """

    def __init__(self):
        self._newest: tuple[Any, jax.stages.Compiled] | None = None

    def __call__(self, program: step.Program, steps: int) -> jax.stages.Compiled:
        """Gives the step of a run of `steps` steps, compiled. Raises UserError as `compile_step` does."""
        method = program.method
        key = dataclasses.replace(method.config, seed=0), method.classes, steps, program.split.mesh
        if self._newest is None or self._newest[0] != key:
            self._newest = None  # so that the devices hold one program at a time
            self._newest = key, compile_step(program, steps)
        return self._newest[1]


@contextlib.contextmanager
def explained(config: Config) -> Iterator[None]:
    """Turns an error of JAX that means a lack of memory into a UserError that says which settings help."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"out of memory ({one_line(error)[:200]}); {_remedies(config)}") from error


def available() -> float:
    """Gives the bytes that a device of this run may use; the least over all processes, infinity where none is known."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    limits = [found["bytes_limit"] for found in stats if found and "bytes_limit" in found]
    if limits:
        least = float(min(limits))
    elif jax.default_backend() == "cpu":
        least = _of_machine() / jax.local_device_count()
    else:
        least = math.inf
    if jax.process_count() > 1:
        least = float(multihost_utils.process_allgather(np.asarray(least)).min())
    return least


def compile_measured(program: step.Program) -> tuple[jax.stages.Compiled | None, float, float]:
    """Compiles a step; gives the program, the bytes per device for its inputs and outputs, and those for all it needs.

    Gives (None, 0, infinity) where the compiler itself says that the step does not fit, and (program, 0, 0) where the
    compiler does not tell the bytes.
    """
    try:
        lowered = program.step.lower(program.state, program.batch, jax.eval_shape(lambda: jax.random.key(0)))
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        return None, 0.0, math.inf
    found = compiled.memory_analysis()
    if found is None:
        return compiled, 0.0, 0.0
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return compiled, kept, kept + found.temp_size_in_bytes + found.generated_code_size_in_bytes


def _of_machine() -> float:
    """Gives the bytes of main memory that can be had, swap included, or what the control group allows if that is less.

    Gives infinity where the system does not tell.
    """
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        values = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
        found = float(values["MemAvailable"] + values.get("SwapFree", 0))
    except (OSError, ValueError, LookupError):
        try:
            return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (OSError, ValueError, AttributeError):
            return math.inf
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError, LookupError):  # "max" is not a number
            place = pathlib.Path(folder)
            stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))  # which the kernel gives back
            left = int((place / limit).read_text()) - int((place / used).read_text()) + cache
            found = min(found, float(max(0, left)))
    return found


def _needs(needed: float, there: float) -> str:
    """Says how much memory a step needs and how much there is."""
    device = jax.devices()[0]
    what = f"the step needs {needed / _GB:.1f} GB" if math.isfinite(needed) else "the compiler refuses the step"
    if not math.isfinite(there):
        return f"{what} of a {device.device_kind}"
    if device.platform != "cpu":
        return f"{what}, and {device.device_kind} has {there / _GB:.1f} GB"
    each = f" for each of {jax.local_device_count()} devices" if jax.device_count() > 1 else ""
    return f"{what}, and the machine has {there / _GB:.1f} GB{each}"


def _remedies(config: Config) -> str:
    """Lists the settings with which a step needs less memory, those first that change nothing but that."""
    model, data, parts = config.model, config.data, config.optim.microbatches
    helps = []
    if parts and data.batch_size > parts * jax.device_count():
        helps.append("--config.optim.microbatches=0, which sees the batch in so many parts as are needed")
    if model.remat != "full":
        helps.append("--config.model.remat=full")
    helps.append(f"a data.batch_size below {data.batch_size}")
    helps.append(f"a model.size below {model.size}, or fewer patches than {'x'.join(map(str, config.grid))} an image")
    return f"what helps: {'; '.join(helps)}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
