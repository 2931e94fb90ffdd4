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
            method="cjepa",
            data=dict(source="folder", train_split="train[:95%]", test_split="train[95%:]", batch_size=256),
            model=dict(size="S", patch_size=16),
            mask=dict(recipe="corrected", context_tokens=64, keep="random"),
            optim=dict(
                epochs=100.0,
                warmup_epochs=10.0,
                # The paper's 1e-3 at 2048 images, by the square root of the batch.
                learning_rate_start=3e-5,
                learning_rate=3.5e-4,
            ),
            checkpoint=dict(keep_every=50_000),
        )
    )
