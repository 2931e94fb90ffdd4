"""How features are judged: the default of `python -m cjepa_jax.evaluate`, which takes overrides of it.

    python -m cjepa_jax.evaluate --checkpoint=runs/digits --method=knn,linear
    python -m cjepa_jax.evaluate --checkpoint=DIR --method=knn --config.data.data_dir=FOLDER

What is stated here differs from the defaults, which `--config=configs/evaluate.py --help` lists: nothing so far.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict()
