"""C-JEPA with SIGReg instead of VICReg's terms, on scikit-learn's digits, in about two minutes on 2 CPU cores.

    python -m cjepa_jax.main --config=configs/sigreg_digits.py

No paper reports this combination; docs/methods.md says what to expect.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.vicreg = ConfigDict(dict(weight=0.0))
    config.sigreg = ConfigDict(dict(weight=0.02, slices=256))
    return config
