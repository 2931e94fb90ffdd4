"""Fine-tuning on a folder of your own labelled images, one folder a class: the config to start from.

    python -m cjepa_jax.main --config=configs/finetune_folder.py --init=runs/folder --config.data.data_dir=FOLDER

The architecture and the size of the images are the checkpoint's. A fifth of the images is held out; the table at the
end shows the parameters and their moving average. The recipe is finetune_vitb16.py's but for the batch, which the
learning rates follow, and the average. Hardware: one GPU, or a laptop for a small encoder. Not yet run on a GPU.
"""

from ml_collections import ConfigDict

from configs import finetune_vitb16


def get_config() -> ConfigDict:
    config = finetune_vitb16.get_config()
    config.data = dict(
        source="folder",
        train_split="train[:80%]",
        test_split="train[80%:]",
        image_size=0,  # the checkpoint's
        crop_scale=(0.08, 1.0),
        flip=0.5,
        batch_size=64,
    )
    config.optim.rates_for_batch = 1024
    config.optim.microbatches = 0
    config.ema.warmup = True
    config.eval.every = 1000
    return config
