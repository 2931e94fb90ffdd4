"""Tells when a run blows up, long before its loss is no longer a number."""

import collections
import statistics
from collections.abc import Mapping
from typing import Any, SupportsFloat

WATCHED = ("loss/total", "grad_norm")
_FACTOR = 5.0  # healthy runs stayed below 4: docs/reliability.md
_WINDOW = 100  # observations


class Trouble:
    """Compares loss and gradient norm with their running medians.

    The medians are taken over calm observations only, so that no blow-up, however slow, becomes what is usual.
    """

    def __init__(self):
        self._calm = {name: collections.deque[float](maxlen=_WINDOW) for name in WATCHED}
        self.found = False  # whether one of the two was far above its running median when they were last observed

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step; what is not watched is ignored."""
        seen = {name: float(metrics[name]) for name in WATCHED if isinstance(metrics.get(name), SupportsFloat)}
        if not seen:
            return
        self.found = any(
            not value <= _FACTOR * abs(statistics.median(self._calm[name]))
            for name, value in seen.items()
            if self._calm[name]
        )
        if not self.found:
            for name, value in seen.items():
                self._calm[name].append(value)
