"""C-JEPA, ViT-S/16 at 224 pixels, on a folder of your own images: the config to start from.

    python -m cjepa_jax.main --config=configs/folder.py --config.data.data_dir=FOLDER

Labels are not needed. Where the images lie in one folder a class, --config.eval.every=2000 judges the features on
the held-out twentieth every 2000 steps. Where the images are large, `python -m cjepa_jax.data.prepare` stores them
smaller once, which makes reading several times faster.
Hardware: one GPU; not yet run there. Fewer images than 50,000 want more epochs, small images a smaller
data.image_size and model.patch_size (64 and 8, say).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=0,
            data=dict(
                source="folder",
                name="",
                data_dir="",
                train_split="train[:95%]",
                test_split="train[95%:]",
                image_size=224,
                crop_scale=(0.3, 1.0),
                crop_ratio=(3 / 4, 4 / 3),
                flip=0.0,
                color=0.0,
                blur=0.0,
                mean=(0.485, 0.456, 0.406),
                std=(0.229, 0.224, 0.225),
                batch_size=256,
                decoder="fast",
                threads=0,
                prefetch=2,
                max_bad_fraction=0.01,
            ),
            model=dict(size="S", patch_size=16, init="normal", dtype="bfloat16", layers="unrolled", remat="none"),
            predictor=dict(width=384, depth=6),
            mask=dict(
                recipe="corrected",
                targets=4,
                target_scale=(0.15, 0.2),
                target_aspect=(0.75, 1.5),
                context_scale=(0.85, 1.0),
                min_keep=10,
                context_tokens=64,
                keep="random",
            ),
            loss=dict(kind="smooth_l1"),
            vicreg=dict(
                weight=0.001,
                views="target_blocks",
                invariance=25.0,
                variance=25.0,
                covariance=1.0,
                gamma=1.0,
                eps=1e-4,
                projector=(),
            ),
            optim=dict(
                epochs=100.0,
                warmup_epochs=10.0,
                # The paper's 1e-3 at 2048 images, by the square root of the batch.
                learning_rate_start=3e-5,
                learning_rate=3.5e-4,
                learning_rate_end=1e-6,
                weight_decay_start=0.04,
                weight_decay_end=0.4,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
            ),
            ema=dict(start=0.996, end=1.0),
            mesh=dict(fsdp=1, parameters="replicated"),
            log=dict(every=50),
            checkpoint=dict(every=1000, keep_last=2, keep_every=50_000),
            eval=dict(every=0, images=10_000, crop_fraction=0.875, neighbours=20, shots=10, draws=5),
        )
    )
