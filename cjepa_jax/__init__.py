"""C-JEPA (I-JEPA + VICReg) pre-training of Vision Transformers in JAX."""

import sys

from cjepa_jax import signals

if sys.argv[:1] == ["-m"]:  # `python -m cjepa_jax.NAME` is about to import for seconds
    signals.end_at_once()
