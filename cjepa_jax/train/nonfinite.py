"""Finds where a run stopped being finite, and leaves what repeats that step."""

import collections
import json
import math
import shlex
import sys
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree

from cjepa_jax.files import write_whole

_KEPT = 1000  # steps, at most, whose metrics are kept


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer finite, or the features collapsed and the run was to end then."""


class Recorder:
    """Keeps the metrics of the last steps on the devices, and looks at them where the newest ones are not finite.

    Nothing is computed or fetched for it in a step that is finite.
    """

    def __init__(self, workdir: epath.Path, *, seed: int, start: int, params: PyTree):
        """`start` is the step that the run begins or goes on from; `params` has the tree of the parameters."""
        self._workdir, self._seed = workdir, seed
        self._saved = start or None  # the step of the newest checkpoint
        self._leaves = [
            jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)
        ]
        self.steps: collections.deque[tuple[int, dict[str, jax.Array], jax.Array]] = collections.deque(maxlen=_KEPT)

    def keep(self, step: int, metrics: dict[str, jax.Array], grad_norms: jax.Array) -> None:
        """Keeps what a step has given, until `check` has found a later one finite."""
        self.steps.append((step, metrics, grad_norms))

    def check(self, step: int, metrics: dict[str, jax.Array], *, saved: bool = False) -> None:
        """Raises DivergedError unless loss and gradient of a step are finite; then the state after it is so too.

        The error names the first step since the last check that is not finite, and the first of its terms or of the
        gradient's leaves. Process 0 writes WORKDIR/nonfinite.json. `saved`: a checkpoint of this step follows.
        """
        if all(math.isfinite(float(jax.device_get(metrics[name]))) for name in ("loss/total", "grad_norm")):
            while self.steps and self.steps[0][0] <= step:
                self.steps.popleft()
            self._saved = step if saved else self._saved
            return
        looked_at = ((*kept, self._first(*kept[1:])) for kept in jax.device_get(list(self.steps)))
        first, values, grad_norms, what = next(found for found in looked_at if found[-1])
        path = self._workdir / "nonfinite.json"
        if jax.process_index() == 0:
            self._write(path, first, what, values, grad_norms)
        after = f"checkpoint {self._workdir / 'checkpoints' / str(self._saved)}" if self._saved else "step 0"
        raise DivergedError(
            f"{what} at step {first}; lower optim.learning_rate or lengthen optim.warmup_epochs. The same command "
            f"repeats it from {after}: {path} has the details"
        )

    def _first(self, metrics: dict[str, Any], grad_norms: Any) -> str:
        """Says which terms of the loss are not finite, else which leaf of the gradient comes first; "" if none is."""
        terms = [name for name in metrics if name.startswith("loss/") and not math.isfinite(metrics[name])]
        terms = [name for name in terms if name != "loss/total"] or terms
        if terms:
            return f"{terms[0]} is not finite" + (f" (nor is {', '.join(terms[1:])})" if terms[1:] else "")
        bad = np.flatnonzero(~np.isfinite(grad_norms))
        if len(bad):
            which = f"the first of {len(bad)} such leaves of {len(grad_norms)}" if len(bad) > 1 else "no other leaf is"
            return f"the gradient of {self._leaves[bad[0]]} is not finite ({which})"
        return "" if math.isfinite(metrics["grad_norm"]) else "grad_norm is not finite, though that of each leaf is,"

    def _write(self, path: epath.Path, step: int, what: str, metrics: dict[str, Any], grad_norms: Any) -> None:
        """Writes what repeats the step."""
        found = {
            "step": step,
            "what": what,
            "seed": self._seed,
            "checkpoint": str(self._workdir / "checkpoints" / str(self._saved)) if self._saved else None,
            "command": shlex.join(sys.orig_argv),
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "processes": jax.process_count(),
            "jax": jax.__version__,
            "metrics": {name: float(value) for name, value in metrics.items()},
            "gradient norms": dict(zip(self._leaves, map(float, grad_norms), strict=True)),
        }
        write_whole(path, json.dumps(found, indent=1) + "\n")
