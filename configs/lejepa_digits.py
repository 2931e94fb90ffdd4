"""LeJEPA on scikit-learn's digits: 1,437 training scans of 8x8 pixels, in about two minutes on 2 CPU cores.

    python -m cjepa_jax.main --config=configs/lejepa_digits.py

The paper reports nothing on digits; docs/methods.md says what to expect.
"""

from ml_collections import ConfigDict

from configs import vicreg_digits


def get_config() -> ConfigDict:
    config = vicreg_digits.get_config()
    config.method = "lejepa"
    del config.vicreg
    config.views = ConfigDict(dict(blur=(0.5, 0.5)))
    config.sigreg = ConfigDict(dict(projector=(256, 256, 16), slices=256))
    return config
