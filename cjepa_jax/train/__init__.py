"""Training: the step, the loop, and what surrounds them. Called, as `cjepa_jax.train(...)`, it trains."""

import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """Makes `cjepa_jax.train` both this package and the function, whichever of them is wanted."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from cjepa_jax import api

        return api.train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
