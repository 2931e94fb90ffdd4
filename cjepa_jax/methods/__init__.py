"""The methods by name; `config.method` chooses one."""

from collections.abc import Mapping
from typing import Any

from cjepa_jax.errors import nearest, require
from cjepa_jax.methods.base import Method
from cjepa_jax.methods.cjepa import CJEPA
from cjepa_jax.methods.lejepa import LeJEPA
from cjepa_jax.methods.simsiam import SimSiam
from cjepa_jax.methods.supervised import Supervised
from cjepa_jax.methods.vicreg import VICReg

METHODS: dict[str, type[Method]] = {
    "cjepa": CJEPA,
    "supervised": Supervised,
    "vicreg": VICReg,
    "simsiam": SimSiam,
    "lejepa": LeJEPA,
}


def find_method(values: Mapping[str, Any]) -> type[Method]:
    """Gives the method of settings, nested or flat; old ones name none, and their groups tell which it was.

    Raises UserError for a name that is not known.
    """
    name = values.get("method")
    if name is None:
        name = "supervised" if "augment" in values or "augment.mixup" in values else "cjepa"
    require(isinstance(name, str) and name in METHODS, f"method = {name!r} is not known; {nearest(str(name), METHODS)}")
    return METHODS[name]
