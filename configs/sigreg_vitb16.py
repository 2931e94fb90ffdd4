"""C-JEPA with SIGReg instead of VICReg's terms, ViT-B/16 on ImageNet-1k: vitb16.py with another regulariser.

    python -m cjepa_jax.main --config=configs/sigreg_vitb16.py

Hardware: a TPU slice or several GPUs that share the batch; not yet run.
No paper reports this combination. The weight is LeJEPA's lambda (arXiv 2511.08544), and nothing says yet that it suits.
"""

from ml_collections import ConfigDict

from configs import vitb16


def get_config() -> ConfigDict:
    config = vitb16.get_config()
    config.vicreg = ConfigDict(dict(weight=0.0))
    config.sigreg = ConfigDict(dict(weight=0.05))
    return config
