"""C-JEPA on scikit-learn's digits: 1,437 training scans of 8x8 pixels, in about two minutes on 2 CPU cores.

    python -m cjepa_jax.main --config=configs/digits.py

The paper reports nothing on digits; docs/results.md says what to expect.
Two overrides switch the average of the target encoder off, with and without the
regulariser: --config.ema.start=0 --config.ema.end=0 [--config.vicreg.weight=0].
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            method="cjepa",
            data=dict(
                source="digits",
                image_size=8,
                crop_scale=(1.0, 1.0),  # 8x8 pixels leave nothing to crop
                crop_ratio=(1.0, 1.0),
                mean=(0.5,),
                std=(0.5,),
                batch_size=64,
                decoder="pillow",
                threads=1,
            ),
            # At this width a plain std of 0.02 would let the position embedding drown the content.
            model=dict(size="64x3x4", patch_size=2, init="fan_in", dtype="float32"),
            predictor=dict(width=32, depth=2),
            mask=dict(recipe="corrected", target_scale=(0.2, 0.3), min_keep=4, context_tokens=9, keep="random"),
            vicreg=dict(weight=0.02),
            optim=dict(epochs=50.0, warmup_epochs=5.0, learning_rate=3e-3),
            # Over a short run 0.996 would leave much of the initial weights in the target.
            ema=dict(start=0.96),
            checkpoint=dict(every=250),
            eval=dict(every=500, crop_fraction=1.0),
        )
    )
