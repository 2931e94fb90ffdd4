"""C-JEPA, ViT-g/16 on ImageNet-1k, 300 epochs: the recipe of vith14.py, and the predictor of I-JEPA's released g/16.

    python -m cjepa_jax.main --config=configs/vitg16.py

Hardware: 256 chips of a TPU v5e or more, compiled for but not yet run.
The paper reports nothing for g/16 (I-JEPA trained its own on ImageNet-22k).
"""

from ml_collections import ConfigDict

from configs import vith14


def get_config() -> ConfigDict:
    config = vith14.get_config()
    config.model.size, config.model.patch_size = "g", 16
    config.predictor.depth = 16
    config.mask.context_tokens = 56  # about what the released code's cut to the batch's minimum leaves
    return config
