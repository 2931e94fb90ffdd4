"""C-JEPA, ViT-S, on a folder of your own images: the config to start from.

    python -m cjepa_jax.main --config=configs/folder.py --config.data.data_dir=FOLDER

Labels are not needed. Where the images lie in one folder a class, --config.eval.every=2000 judges the features on
the held-out twentieth every 2000 steps. Where the images are large, `python -m cjepa_jax.data.prepare` stores them
smaller once, which makes reading several times faster.

Small images: --config.data.image_size=96, 64 or 32. Patches and context follow; the learning rates follow
--config.data.batch_size. Fewer images than 50,000 want more epochs. Fewer than 27,000 want a lower
--config.ema.start, about 1 - 40 / steps, so that the target keeps up.
Hardware: one GPU, or a laptop with patience, for which --config.model.size=Ti --config.model.init=fan_in is quicker;
the batch is seen in as many parts as memory asks for. Not yet run on a GPU.

The weight of the regulariser, --config.vicreg.weight, is the paper's .001. Where the run collapses, raise it up to .01,
which has cost nothing in kNN at each width and batch size that was tried, with three seeds; .03 has cost up to 2.4
points (docs/study.md).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            method="cjepa",
            data=dict(source="folder", train_split="train[:95%]", test_split="train[95%:]", batch_size=256),
            model=dict(size="S", patch_size=0),  # 16 at 224 pixels, 8 at 96 and 64, 4 at 32
            mask=dict(recipe="corrected", context_tokens=0, keep="random"),
            # The paper's rates, 1e-4 to 1e-3 at 2048 images, by the square root of the batch.
            optim=dict(epochs=100.0, warmup_epochs=10.0, rates_for_batch=2048, microbatches=0),
            checkpoint=dict(keep_every=50_000),
        )
    )
