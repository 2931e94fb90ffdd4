"""Fine-tuning on a folder of your own labelled images, one folder a class: the config to start from.

    python -m cjepa_jax.main --config=configs/finetune_folder.py --init=runs/folder --config.data.data_dir=FOLDER

The architecture and the size of the images are the checkpoint's. A fifth of the images is held out; the table at the
end shows the parameters and their moving average. The recipe is MAE's fine-tuning (arXiv 2111.06377, table 9) but for
batch, length and the average. The learning rates follow the batch. Hardware: one GPU, or a laptop for a small encoder.
Not yet run on a GPU.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            method="supervised",
            data=dict(
                source="folder",
                train_split="train[:80%]",
                test_split="train[80%:]",
                image_size=0,  # the checkpoint's
                crop_scale=(0.08, 1.0),
                flip=0.5,
                batch_size=64,
            ),
            model=dict(drop_path=0.1),
            augment=dict(randaugment=2, erase=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1),
            optim=dict(
                epochs=100.0,
                warmup_epochs=5.0,
                learning_rate_start=0.0,
                learning_rate=2e-3,  # MAE's at 1024 images, by the square root of the batch
                rates_for_batch=1024,
                layer_decay=0.65,
                weight_decay_start=0.05,
                weight_decay_end=0.05,
                microbatches=0,
            ),
            ema=dict(start=0.9999, end=0.9999, warmup=True),
            eval=dict(every=1000),
        )
    )
