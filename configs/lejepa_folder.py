"""LeJEPA, ViT-S, on a folder of your own images: folder.py with the method that learns most from small images.

    python -m cjepa_jax.main --config=configs/lejepa_folder.py --config.data.data_dir=FOLDER

It compares two augmented views of each image, which takes about twice as long per image. On CIFAR-10, over six epochs,
its features were better than C-JEPA's (docs/study.md). The augmentations must leave alone what matters in your images:
--config.data.color=0 keeps colours, --config.data.flip=0 keeps left and right, and a larger first number of
--config.data.crop_scale keeps more of the image in each view. Rates and augmentation are those of lejepa_vith14.py.
Hardware: one GPU. Not yet run to an end on photographs.
"""

from ml_collections import ConfigDict

from configs import folder, lejepa_vith14


def get_config() -> ConfigDict:
    config, large = folder.get_config(), lejepa_vith14.get_config()
    del config.mask
    config.method = large.method
    config.data.update({name: large.data[name] for name in ("crop_scale", "flip", "color")})
    config.views = large.views
    rates = ("learning_rate_start", "learning_rate", "weight_decay_start", "weight_decay_end")
    config.optim.update({name: large.optim[name] for name in rates}, rates_for_batch=large.data.batch_size)
    return config
