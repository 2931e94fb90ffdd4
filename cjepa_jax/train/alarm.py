"""Says while a run goes on that its features are collapsing, and ends it where that is wished."""

from collections.abc import Iterable, Mapping

from cjepa_jax.config import Log
from cjepa_jax.train.diagnostics import Watch
from cjepa_jax.train.nonfinite import DivergedError

_REMEDY = "try a smaller optim.learning_rate, ema.start and ema.end nearer to 1 or, with C-JEPA, a larger vicreg.weight"


class Alarm:
    """Looks at every line of metrics; all processes see the same ones, and so agree."""

    wants_stop = False  # whether the run is to be saved and ended

    def __init__(self, config: Log, steps: int, lines: Iterable[Mapping[str, float]]):
        """`steps` is the length of the run, and `lines` are the metrics of its part that is over."""
        self._watch, self._mode = Watch(steps), config.collapse
        self._said = ""
        for line in lines:
            self._watch.look(int(line["step"]), line)

    def look(self, step: int, metrics: Mapping[str, float]) -> tuple[dict[str, float], str]:
        """Gives the metric "rep/collapsed", 1 or 0, where there are diagnostics, and a warning the first time."""
        found = self._watch.look(step, metrics)
        if self._mode == "off" or "rep/std" not in metrics:
            return {}, ""
        note = ""
        if found and not self._said:
            self._said = f"the features are collapsing: at step {step}, {found}"
            self.wants_stop = self._mode == "stop"
            note = f"warning: {self._said}; {_REMEDY}"
        return {"rep/collapsed": float(bool(found))}, note

    def check(self, step: int) -> None:
        """Raises DivergedError where the run was ended after a step because of a collapse."""
        if self.wants_stop:
            raise DivergedError(
                f"{self._said}; log.collapse = 'stop' has ended the run, which is saved at step {step}; {_REMEDY}, in "
                "another --workdir, or go on all the same with --config.log.collapse=warn"
            )
