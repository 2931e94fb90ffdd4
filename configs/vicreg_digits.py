"""VICReg on scikit-learn's digits: 1,437 training scans of 8x8 pixels, in about two minutes on 2 CPU cores.

    python -m cjepa_jax.main --config=configs/vicreg_digits.py

The paper reports nothing on digits; docs/methods.md says what to expect.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            method="vicreg",
            data=dict(
                source="digits",
                image_size=8,
                crop_scale=(0.5, 1.0),
                mean=(0.5,),
                std=(0.5,),
                batch_size=64,
                decoder="pillow",
                threads=1,
            ),
            views=dict(blur=(0.5, 0.1), solarize=(0.0, 0.0)),  # half of the pixels are black, and would be white
            # At this width a plain std of 0.02 would let the position embedding drown the content.
            model=dict(size="64x3x4", patch_size=2, init="fan_in", dtype="float32"),
            vicreg=dict(projector=(256, 256, 256)),
            optim=dict(epochs=50.0, warmup_epochs=5.0, learning_rate=1e-3),
            checkpoint=dict(every=250),
            eval=dict(every=500, crop_fraction=1.0),
        )
    )
