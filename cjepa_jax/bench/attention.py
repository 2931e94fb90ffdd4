"""Lists the cycles that the attention kernels take on a TPU, as the TPU compiler schedules them; no TPU is needed.

    python -m cjepa_jax.bench.attention --chip=v5e

--chip=NAME          v4, v5e, v5p or v6e
--shape=56x12x64     tokens x heads x features of a head; repeatable; by default all that are known
--whole              no token of these shapes is masked

The compiler writes down each kernel's schedule. Of the loop over the sequences it gives the instruction bundles of one
turn, of which one can start a cycle, and the length of the critical path. cjepa_jax/tpu/kernels.py keeps the larger.
"""

import functools
import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable

from absl import flags

from cjepa_jax import command
from cjepa_jax.errors import require
from cjepa_jax.tpu import chips
from cjepa_jax.tpu.kernels import CYCLES

_SEQUENCES = 32  # on a chip


def read_schedule(folder: pathlib.Path, kernel: str) -> tuple[int, int]:
    """Reads from the compiler's dump of a kernel the bundles of its innermost loop, and the critical path in cycles.

    Raises FileNotFoundError where the dump does not hold the kernel.
    """
    paths, bundles = (
        sorted(path for path in folder.glob(f"*{kernel}*{ending}") if "schedule" not in path.name)
        for ending in ("critical-path.txt", "final_bundles.txt")
    )
    if not paths or not bundles:
        raise FileNotFoundError(f"{folder} holds no schedule of {kernel}")
    lengths = re.findall(r"Length to end: (\d+)", "".join(path.read_text() for path in paths))
    # A bundle is "0x1a LB: > > { ... }", with a > for each loop around it.
    depths = [
        found[1].count(">")
        for line in bundles[0].read_text().splitlines()
        if (found := re.match(r"\s*0x[0-9a-f]+ +(?:[A-Z]{2})*:?\s*((?:> ?)*)\s*\{", line))
    ]
    return depths.count(max(depths)), max(map(int, lengths))


def measure(chip: str, shapes: Iterable[tuple[int, int, int, bool]]) -> str:
    """Compiles both kernels for each (tokens, heads, features, masked) and returns a table."""
    folder = pathlib.Path(tempfile.mkdtemp())
    os.environ.update(chips.ENVIRONMENT)
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    import jax
    import jax.numpy as jnp

    from cjepa_jax.config import Mesh
    from cjepa_jax.models import fused_attention
    from cjepa_jax.tpu.compile import make_mesh
    from cjepa_jax.train import sharding

    mesh = make_mesh(Mesh(), f"{chip}:{'1x1' if chip in ('v5e', 'v6e') else '2x2x1'}")
    rows, whole = sharding.batch(mesh), sharding.replicated(mesh)
    lines = [
        f"{'tokens x heads x features':28}{'forward':>20}{'backward':>20}   bundles / critical path, cycles a sequence"
    ]
    for tokens, heads, head_dim, masked in shapes:
        width, count = heads * head_dim, _SEQUENCES * mesh.size
        reason = fused_attention.unsupported(tokens=tokens, width=width, heads=heads, dtype="bfloat16")
        require(reason is None, f"--shape={tokens}x{heads}x{head_dim}: {reason}")

        attend = functools.partial(fused_attention.attend, heads=heads, per_device=sharding.per_device(mesh))

        def both(qkv, bias, valid, gradient, attend=attend):
            out, pull = jax.vjp(lambda qkv, bias: attend(qkv, bias, valid), qkv, bias)
            return out, *pull(gradient)

        with jax.set_mesh(mesh):
            jitted = jax.jit(both, in_shardings=(rows, whole, rows, rows), out_shardings=(rows, rows, whole))
            shape = jax.ShapeDtypeStruct
            jitted.trace(
                shape((count, tokens, 3 * width), jnp.bfloat16),
                shape((3 * width,), jnp.float32),
                shape((count, tokens), bool) if masked else None,
                shape((count, tokens, width), jnp.bfloat16),
            ).lower().compile()
        found = [read_schedule(folder, f"attention_{name}_{heads}x{head_dim}") for name in ("forward", "backward")]
        lines.append(
            f"{tokens} x {heads} x {head_dim}{'' if masked else ', whole'}".ljust(28)
            + "".join(f"{a:>11} / {b:>6}" for a, b in found)
        )
        for path in folder.iterdir():
            path.unlink()
    return "\n".join(lines)


def _parse(text: str, masked: bool) -> tuple[int, int, int, bool]:
    require(re.fullmatch(r"\d+x\d+x\d+", text) is not None, f"--shape={text} is not like 56x12x64")
    tokens, heads, head_dim = map(int, text.split("x"))
    return tokens, heads, head_dim, masked


def main() -> None:
    """Runs the command; exit code 0, 2 after a mistake that the user can mend, 1 after any other error."""
    chip = flags.DEFINE_enum("chip", "v5e", list(chips.CHIPS), "The kind of TPU.")
    given = flags.DEFINE_multi_string("shape", [], "Tokens x heads x features of a head.")
    whole = flags.DEFINE_bool("whole", False, "No token of these shapes is masked.")

    def body() -> None:
        require(
            importlib.util.find_spec("libtpu") is not None,
            'the TPU compiler is missing: pip install "jax[tpu]==0.10.2"',
        )
        shapes = [_parse(text, not whole.value) for text in given.value]
        print(measure(chip.value, shapes or sorted(CYCLES["v5e"])))

    command.run(body, __doc__)


if __name__ == "__main__":
    main()
