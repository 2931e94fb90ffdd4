"""C-JEPA on scikit-learn's digits: 1,437 training scans of 8x8 pixels, in about two minutes on 2 CPU cores.

    python -m cjepa_jax.main --config=configs/digits.py

The paper reports nothing on digits; the README's first table says what to expect.
Two overrides switch the average of the target encoder off, with and without the
regulariser: --config.ema.start=0 --config.ema.end=0 [--config.vicreg.weight=0].
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=0,
            data=dict(
                source="digits",
                name="",
                data_dir="",
                train_split="train",
                test_split="test",
                image_size=8,
                crop_scale=(1.0, 1.0),  # 8x8 pixels leave nothing to crop
                crop_ratio=(1.0, 1.0),
                flip=0.0,
                color=0.0,
                blur=0.0,
                mean=(0.5,),
                std=(0.5,),
                batch_size=64,
                decoder="pillow",
                threads=1,
                prefetch=2,
                max_bad_fraction=0.01,
            ),
            # At this width a plain std of 0.02 would let the position embedding drown the content.
            model=dict(size="64x3x4", patch_size=2, init="fan_in", dtype="float32", layers="unrolled", remat="none"),
            predictor=dict(width=32, depth=2),
            mask=dict(
                recipe="corrected",
                targets=4,
                target_scale=(0.2, 0.3),
                target_aspect=(0.75, 1.5),
                context_scale=(0.85, 1.0),
                min_keep=4,
                context_tokens=9,
                keep="random",
            ),
            loss=dict(kind="smooth_l1"),
            vicreg=dict(
                weight=0.02,
                views="target_blocks",
                invariance=25.0,
                variance=25.0,
                covariance=1.0,
                gamma=1.0,
                eps=1e-4,
                projector=(),
            ),
            optim=dict(
                epochs=50.0,
                warmup_epochs=5.0,
                learning_rate_start=1e-4,
                learning_rate=3e-3,
                learning_rate_end=1e-6,
                weight_decay_start=0.04,
                weight_decay_end=0.4,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
            ),
            # Over a short run 0.996 would leave much of the initial weights in the target.
            ema=dict(start=0.96, end=1.0),
            mesh=dict(fsdp=1, parameters="replicated"),
            log=dict(every=50),
            checkpoint=dict(every=250, keep_last=2, keep_every=0),
            eval=dict(every=500, images=10_000, crop_fraction=1.0, neighbours=20, shots=10, draws=5),
        )
    )
