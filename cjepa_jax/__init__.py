"""C-JEPA (I-JEPA + VICReg) pre-training of Vision Transformers in JAX.

`cjepa_jax.train(config, workdir=...)` trains, and `cjepa_jax.load(checkpoint)` gives an encoder; see docs/python.md.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from cjepa_jax import signals

if TYPE_CHECKING:
    from cjepa_jax.api import FrozenEncoder, load, train

__all__ = ["FrozenEncoder", "load", "train"]

# `python -m cjepa_jax.NAME`, or the installed command, is about to import for seconds.
if sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0] if sys.argv else "").startswith("cjepa-"):
    signals.end_at_once()


def __getattr__(name: str) -> Any:
    """Imports JAX when it is first needed, so that --help does not wait for it."""
    if name == "train":
        return importlib.import_module("cjepa_jax.train")
    if name in __all__:
        return getattr(importlib.import_module("cjepa_jax.api"), name)
    raise AttributeError(f"module 'cjepa_jax' has no attribute {name!r}")
