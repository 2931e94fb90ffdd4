"""Fine-tuning on few of scikit-learn's digits, ten of each on average; 75 s of CPU time.

    python -m cjepa_jax.main --config=configs/digits.py
    python -m cjepa_jax.finetune --config=configs/finetune_digits.py --checkpoint=runs/digits

--config.model.tower=random trains the same network from scratch.
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
                train_split="train[:100]",
                test_split="test",
                image_size=8,
                crop_scale=(1.0, 1.0),  # 8x8 pixels leave nothing to crop, a 2 is no flipped 2
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
            model=dict(tower="target_encoder", drop_path=0.1, dtype="float32", layers="unrolled", remat="none"),
            augment=dict(
                randaugment=0,
                probability=0.5,
                magnitude=9.0,
                magnitude_std=0.5,
                erase=0.0,
                mixup=0.8,
                cutmix=0.0,
                label_smoothing=0.1,
            ),
            optim=dict(
                epochs=320.0,
                warmup_epochs=32.0,
                learning_rate_start=0.0,
                learning_rate=3e-3,
                learning_rate_end=1e-6,
                layer_decay=0.75,
                weight_decay_start=0.05,
                weight_decay_end=0.05,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
            ),
            ema=dict(start=0.98, end=0.98),
            mesh=dict(fsdp=1, parameters="replicated"),
            log=dict(every=50),
            checkpoint=dict(every=250, keep_last=2, keep_every=0),
            eval=dict(every=250, crop_fraction=1.0),
        )
    )
