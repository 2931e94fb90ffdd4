"""The methods by which a subject is judged: what each reads, and in which order it calls the mathematics."""

from collections.abc import Callable
from typing import NamedTuple

from etils import epath

from cjepa_jax.config import require
from cjepa_jax.evaluate import knn
from cjepa_jax.evaluate.results import Rows
from cjepa_jax.evaluate.subject import Subject


class Method(NamedTuple):
    """A way to judge."""

    judge: Callable[[Subject, epath.Path], Rows]  # the path is that of the JSON; a picture goes beside it
    labels: bool  # whether images need any


def _knn(subject: Subject, path: epath.Path) -> Rows:
    options, images = subject.settings.knn, len(subject.train.source)
    require(
        options.neighbours <= images,
        f"knn.neighbours = {options.neighbours} is more than the {images} training images; lower it",
    )
    rows: Rows = {}
    for name, splits in subject.splits(layers=1).items():
        weighted, plain = knn.accuracies(
            *splits,
            k=options.neighbours,
            classes=subject.classes,
            temperatures=[options.temperature, None],
            mesh=subject.mesh,
        )
        rows[name] = {"weighted %": weighted, "plain %": plain}
    return rows


METHODS = {"knn": Method(_knn, labels=True)}
