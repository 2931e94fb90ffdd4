"""How features are judged: the default of `python -m cjepa_jax.evaluate`, which takes overrides of it.

    python -m cjepa_jax.evaluate --checkpoint=runs/digits --method=knn,linear
    python -m cjepa_jax.evaluate --checkpoint=DIR --method=knn --config.data.data_dir=FOLDER

What is None is as in the checkpoint's config.json. Every setting is explained in cjepa_jax/evaluate/config.py.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=0,
            data=dict(
                source=config_dict.placeholder(str),
                name=config_dict.placeholder(str),
                data_dir=config_dict.placeholder(str),
                train_split=config_dict.placeholder(str),
                test_split=config_dict.placeholder(str),
                image_size=config_dict.placeholder(int),
                crop_fraction=config_dict.placeholder(float),
                decoder=config_dict.placeholder(str),
                batch_size=256,
                threads=0,
                max_bad_fraction=0.01,
            ),
            # ImageNet's usual ones, for linear.augment and the collapse report.
            views=dict(crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5, color=0.0, blur=0.0),
            knn=dict(neighbours=20, temperature=0.07),
            # Epochs, momentum, decay and batch are VISSL's for ImageNet, which I-JEPA says it follows on other sets.
            linear=dict(
                layers=(1, 4),
                learning_rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
                weight_decays=(0.0, 5e-4, 5e-3),
                epochs=28,
                min_steps=3000,
                decay_every=8,
                batch_size=256,
                holdout=0.1,
                augment=False,
            ),
            lowshot=dict(fraction=0.01, shots=(1, 5, 10), draws=5),
            collapse=dict(images=10_000, objects=1000, views=10),
            attention=dict(images=8, query=(), other=""),
            davis=dict(data_dir="", short_side=480),
        )
    )
