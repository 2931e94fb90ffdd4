"""C-JEPA, ViT-S/16 at 224 pixels, on a folder of about 130,000 images such as ImageNet-100, for one accelerator.

    python -m cjepa_jax.main --config=configs/imagenet100.py --config.data.data_dir=FOLDER
    python -m cjepa_jax.evaluate --checkpoint=runs/imagenet100 --method=knn,linear

The folder holds train/CLASS/... and val/CLASS/...; labels are needed by the second command alone.
Hardware: one TPU chip or GPU with 16 GB; compiled for a v5e (5.7 hours predicted), not yet run.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            method="cjepa",
            data=dict(source="folder", test_split="val", batch_size=512),
            model=dict(size="S", patch_size=16),
            # 54 + 42 tokens are a sequence of the predictor whose length is a multiple of 8.
            mask=dict(recipe="corrected", context_tokens=54, keep="random"),
            # The paper's rate, 1e-3 at 2048 images, by the square root of the batch.
            optim=dict(epochs=200.0, warmup_epochs=10.0, learning_rate_start=5e-5, learning_rate=5e-4, microbatches=8),
            checkpoint=dict(keep_every=10_000),
        )
    )
