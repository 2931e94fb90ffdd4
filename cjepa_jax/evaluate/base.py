"""What an evaluator is. To add one, write its file, its line in `config.Evaluation` and a test."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath

from cjepa_jax.evaluate.frozen import Frozen

Rows = dict[str, dict[str, Any]]  # encoder's name -> measure -> a number, `over_draws`, or whatever else JSON holds


class Evaluator:
    """Judges frozen encoders in one way.

    An evaluator derives from this class as a frozen dataclass, whose fields are its settings.
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = True
    in_training: ClassVar[bool] = True  # False: it looks at checkpoints only
    reads_checkpoint: ClassVar[bool] = False  # True: `run` reads more of the checkpoint than the encoder
    reads_data: ClassVar[bool] = True  # False: it has images of its own, and none of `data`
    numbers: ClassVar[tuple[str, ...]] = ()  # measures with a unit of their own; all others are fractions in [0, 1]
    pictures: ClassVar[tuple[str, ...]] = ()  # what follows the stem in the names of the pictures that `run` draws

    @property
    def deepest(self) -> int:
        """Returns how many of the encoder's last blocks the evaluator reads."""
        return 1

    def quick(self) -> "Evaluator":
        """Returns the evaluator with the settings of a probe in the midst of training."""
        return self

    def check(self, frozen: Frozen) -> None:
        """Raises UserError where the settings do not fit the encoders or the images; computes no features."""

    def run(self, frozen: Frozen, stem: epath.Path | None) -> Rows:
        """Judges every encoder, and gives the measures of each.

        The files that the evaluator writes beside its results, such as pictures, begin with the path `stem`; without a
        stem it writes none.
        """
        raise NotImplementedError

    def shown(self, rows: Rows) -> Rows:
        """Returns the rows as a table shows them; by default they stay as they are."""
        return rows

    def notes(self, rows: Rows) -> list[str]:
        """Returns what is to be said below the table, line by line."""
        return []

    def metrics(self, rows: Rows) -> dict[str, float]:
        """Returns what the log of a training shows of the rows, those of the judged encoder first."""
        judged = next(iter(rows.values()))
        return {f"{self.name}/{measure}": value for measure, value in judged.items() if isinstance(value, int | float)}


ERROR = "standard error"  # in a row: measure -> its standard error, where it has one


def over_draws(found: Sequence[float]) -> dict[str, Any]:
    """Returns a measure over several draws: mean, sample standard deviation, the mean's standard error, all values.

    A single draw has no standard error.
    """
    std = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
    error = {ERROR: std / len(found) ** 0.5} if len(found) > 1 else {}
    return {"mean": float(np.mean(found)), "std": std, **error, "draws": list(found)}


def binomial_error(share: float, images: int) -> float:
    """Returns the standard error of an accuracy, a share in [0, 1], that was measured on so many images."""
    return float((share * (1 - share) / images) ** 0.5)


def written(number: float) -> str:
    """Writes a number to four digits, and a count in full."""
    return str(number) if isinstance(number, int) else f"{number:.4g}"
