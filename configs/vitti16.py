"""C-JEPA, ViT-Ti/16 on ImageNet-1k, 600 epochs: vitb16.py with another encoder.

    python -m cjepa_jax.main --config=configs/vitti16.py

Hardware: a TPU slice or several GPUs that share the batch; not yet run.
The paper's appendix reports kNN, linear and fine-tuned accuracy for Ti/16; no number is quoted until it is checked.
Epochs and rates are those of B/16, and the initialisation is the release's; at this width docs/faq.md suggests
--config.model.init=fan_in.
"""

from ml_collections import ConfigDict

from configs import vitb16


def get_config() -> ConfigDict:
    config = vitb16.get_config()
    config.model.size = "Ti"
    config.mesh = dict(fsdp=1)  # so narrow, cut parameters make a step on a TPU slower by half or more
    return config
