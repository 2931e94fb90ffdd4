"""Fine-tuning on few of scikit-learn's digits, ten of each on average; 75 s of CPU time.

    python -m cjepa_jax.main --config=configs/digits.py
    python -m cjepa_jax.main --config=configs/finetune_digits.py --init=runs/digits

--config.model.encoder=random trains the same network from scratch.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            method="supervised",
            data=dict(
                source="digits",
                train_split="train[:100]",
                image_size=8,
                crop_scale=(1.0, 1.0),  # 8x8 pixels leave nothing to crop, a 2 is not a flipped 2
                crop_ratio=(1.0, 1.0),
                mean=(0.5,),
                std=(0.5,),
                batch_size=64,
                decoder="pillow",
                threads=1,
            ),
            model=dict(drop_path=0.1, dtype="float32"),
            augment=dict(mixup=0.8, label_smoothing=0.1),
            optim=dict(
                epochs=320.0,
                warmup_epochs=32.0,
                learning_rate_start=0.0,
                learning_rate=3e-3,
                layer_decay=0.75,
                weight_decay_start=0.05,
                weight_decay_end=0.05,
            ),
            ema=dict(start=0.98, end=0.98),
            checkpoint=dict(every=250),
            eval=dict(every=250, crop_fraction=1.0),
        )
    )
