"""C-JEPA, ViT-B/16 on ImageNet-1k, 600 epochs; what it does not state are the defaults, the paper's recipe.

    python -m cjepa_jax.main --config=configs/vitb16.py

Wants ImageNet-1k prepared by TFDS; where it is not, the command says how to do that.
Hardware: a TPU slice or several GPUs that share the batch; not yet run.
The paper reports 73.7 % with a linear probe and 84.5 % fine-tuned (I-JEPA: 72.9 and 83.5).
After 100 epochs, linear: 69.5 % (I-JEPA: 63.7).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            method="cjepa",
            data=dict(source="tfds", name="imagenet2012", test_split="validation", batch_size=2048),
            model=dict(size="B", patch_size=16),
            optim=dict(epochs=600.0, warmup_epochs=15.0),
            checkpoint=dict(keep_every=50_000),
        )
    )
