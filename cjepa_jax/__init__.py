"""C-JEPA (I-JEPA + VICReg) pre-training of Vision Transformers in JAX.

`cjepa_jax.train(config, workdir=...)` trains, and `cjepa_jax.load(checkpoint)` gives an encoder; see docs/python.md.
"""

import importlib
import itertools
import os
import sys
from typing import TYPE_CHECKING, Any

from cjepa_jax import signals

if TYPE_CHECKING:
    from cjepa_jax.api import FrozenEncoder, load, train

__all__ = ["FrozenEncoder", "load", "train"]

_COMMANDS = {f"cjepa-{name}" for name in ("train", "evaluate", "embed", "convert", "compile", "study", "prepare")}


def _is_command() -> bool:
    """Tells whether `python -m cjepa_jax.NAME` or an installed command runs, and no program of somebody else."""
    if sys.argv[:1] == ["-m"]:  # Python is about to find the module
        module = next((name for flag, name in itertools.pairwise(sys.orig_argv) if flag == "-m"), "")
        return module.partition(".")[0] == "cjepa_jax"
    return os.path.basename(sys.argv[0] if sys.argv else "").removesuffix(".exe") in _COMMANDS


if _is_command():  # it is about to import for seconds
    signals.end_at_once()


def __getattr__(name: str) -> Any:
    """Imports JAX when it is first needed, so that --help does not wait for it."""
    if name == "train":
        return importlib.import_module("cjepa_jax.train")
    if name in __all__:
        return getattr(importlib.import_module("cjepa_jax.api"), name)
    raise AttributeError(f"module 'cjepa_jax' has no attribute {name!r}")
