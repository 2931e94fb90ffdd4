"""C-JEPA, ViT-B/16 on ImageNet-1k, on one accelerator: vitb16.py, its batch of 2048 in 32 parts.

    python -m cjepa_jax.main --config=configs/vitb16_one_device.py

The gradient is that of the whole batch. docs/one_device.md says what to expect.
Hardware: one TPU chip or GPU with 16 GB; compiled for a v5e (238 hours predicted), not yet run.
"""

from ml_collections import ConfigDict

from configs import vitb16


def get_config() -> ConfigDict:
    config = vitb16.get_config()
    config.optim.microbatches = 32
    return config
