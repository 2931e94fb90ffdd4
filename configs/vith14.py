"""C-JEPA, ViT-H/14 on ImageNet-1k, 300 epochs: I-JEPA's released recipe plus the regulariser.

    python -m cjepa_jax.main --config=configs/vith14.py

Hardware: 64 chips of a TPU v5e or more, compiled for but not yet run.
The paper reports nothing for H/14.
"""

from ml_collections import ConfigDict

from configs import vitb16


def get_config() -> ConfigDict:
    config = vitb16.get_config()
    config.model = dict(size="H", patch_size=14)
    config.predictor = dict(depth=12)
    config.mask = dict(context_tokens=72)  # about what the released code's cut to the batch's minimum leaves
    config.optim = dict(epochs=300.0, warmup_epochs=40.0, learning_rate_start=2e-4)
    return config
