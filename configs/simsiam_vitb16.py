"""SimSiam, ViT-B/16 on ImageNet-1k: the loss, views, batch and epochs of the paper, with another encoder and optimizer.

    python -m cjepa_jax.main --config=configs/simsiam_vitb16.py

Wants ImageNet-1k prepared by TFDS; where it is not, the command says how to do that.
Hardware: a TPU slice or several GPUs that share the batch; not yet run.
The paper reports 68.1 % with a linear probe, of a ResNet-50 after 100 epochs of 512 images by SGD (71.3 % after 800).
It reports nothing for a ViT: ours is one, and trains by AdamW with the rates and the weight decay of MoCo v3 (arXiv
2104.02057): 1.5e-4 times batch / 256, weight decay 0.1; the warm-up is ours. The augmentation is that of MoCo v2, as
the paper's. The paper keeps the learning rate of the prediction MLP constant; here it decays like the others.
"""

from ml_collections import ConfigDict

from configs import vicreg_vitb16


def get_config() -> ConfigDict:
    config = vicreg_vitb16.get_config()
    config.method = "simsiam"
    config.data.update(crop_scale=(0.2, 1.0), batch_size=512)
    config.views = ConfigDict(dict(blur=(0.5, 0.5)))
    config.optim.update(epochs=100.0, warmup_epochs=10.0, learning_rate=3e-4)
    return config
