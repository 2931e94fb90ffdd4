"""C-JEPA, ViT-S/8 on STL-10's 100,000 unlabelled images of 96 pixels, for one accelerator.

    python -m cjepa_jax.main --config=configs/stl10.py
    python -m cjepa_jax.evaluate --checkpoint=runs/stl10 --method=knn,linear --config.data.train_split=train

Wants TFDS' stl10 in ArrayRecord files, which TFDS prepares where TensorFlow is installed; otherwise the command says
how to do that. The second command judges the features on the 5,000 labelled and 8,000 test images.
Hardware: one TPU chip or GPU with 16 GB; compiled for a v5e (5.3 hours predicted), not yet run.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            method="cjepa",
            data=dict(
                source="tfds",
                name="stl10",
                train_split="unlabelled",
                image_size=96,
                mean=(0.447, 0.440, 0.407),
                std=(0.260, 0.257, 0.271),
                batch_size=512,
            ),
            model=dict(size="S", patch_size=8),
            # 144 patches; 42 + 30 tokens are a sequence of the predictor whose length is a multiple of 8.
            mask=dict(recipe="corrected", context_tokens=42, keep="random"),
            # The paper's rate, 1e-3 at 2048 images, by the square root of the batch.
            optim=dict(epochs=300.0, warmup_epochs=15.0, learning_rate_start=5e-5, learning_rate=5e-4, microbatches=4),
            checkpoint=dict(keep_every=10_000),
        )
    )
