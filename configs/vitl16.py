"""C-JEPA, ViT-L/16 on ImageNet-1k, 600 epochs: vitb16.py with another encoder and a deeper predictor.

    python -m cjepa_jax.main --config=configs/vitl16.py

Hardware: a TPU slice or several GPUs that share the batch; not yet run.
The paper reports 78.1 % with a linear probe and 86.2 % fine-tuned.
Epochs and rates are those of B/16.
"""

from ml_collections import ConfigDict

from configs import vitb16


def get_config() -> ConfigDict:
    config = vitb16.get_config()
    config.model = dict(size="L", patch_size=16)
    config.predictor = dict(depth=12)
    return config
