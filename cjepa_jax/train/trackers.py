"""Experiment trackers that get every line of metrics.jsonl, too, where `log.to` names them.

Where they send it is what their own environment variables say, such as WANDB_PROJECT, WANDB_MODE=offline,
MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.
"""

import importlib.util
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from cjepa_jax.errors import UserError, one_line, require
from cjepa_jax.files import is_remote, read_json, write_whole

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow or mlflow-skinny"}  # by the names that `log.to` knows
_PROJECT = "cjepa_jax"  # the project or experiment, where the environment names no other


class Tracker(Protocol):
    """Follows one run in a service such as Weights & Biases or MLflow."""

    name: str
    identity: str  # by which the tracker knows the run when it goes on

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the metrics of a step, under the names that metrics.jsonl gives them."""

    def close(self, *, failed: bool) -> None:
        """Waits until everything has been sent, and ends the run there, as one that failed or not."""


class _WandB:
    """A run of Weights & Biases; its own files lie in WORKDIR/wandb."""

    name = "wandb"

    def __init__(self, workdir: epath.Path, config: Mapping[str, Any], identity: str | None):
        import wandb

        self.identity = identity or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=self.identity,
            resume="allow",
            name=workdir.name,
            dir=None if is_remote(workdir) else str(workdir),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")  # of a step there may be two lines

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    """A run of MLflow."""

    name = "mlflow"

    def __init__(self, workdir: epath.Path, config: Mapping[str, Any], identity: str | None):
        from mlflow import MlflowClient, entities

        self._client, self._metric = MlflowClient(), entities.Metric
        if identity is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            place = experiment.experiment_id if experiment else self._client.create_experiment(name)
            identity = self._client.create_run(place, run_name=workdir.name).info.run_id
            params = [entities.Param(key, str(value)) for key, value in config.items()]
            for start in range(0, len(params), 100):  # no more go at a time
                self._client.log_batch(identity, params=params[start : start + 100])
        else:
            self._client.update_run(identity, status="RUNNING")
        self.identity = identity

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self.identity, [self._metric(key, value, now, step) for key, value in metrics.items()])

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self.identity, status="FAILED" if failed else "FINISHED")


_KINDS: dict[str, Callable[[epath.Path, Mapping[str, Any], str | None], Tracker]] = {
    "wandb": _WandB,
    "mlflow": _MLflow,
}


def check(names: Sequence[str]) -> None:
    """Raises UserError for a tracker whose package is not installed."""
    for name in names:
        require(
            importlib.util.find_spec(name) is not None,
            f"log.to: {name} is not installed: pip install {PACKAGES[name]}, or leave it out",
        )


def connect(names: Sequence[str], workdir: epath.Path, config: Mapping[str, Any], *, goes_on: bool) -> "Trackers":
    """Begins a run in each tracker, or goes on with the one that WORKDIR/trackers.json knows; `config` is flat.

    goes_on: whether the run has a checkpoint. Without one it begins anew, perhaps with other settings, and so do its
    records. Raises UserError where a tracker cannot be reached.
    """
    path = workdir / "trackers.json"
    known = read_json(path) if names and goes_on and path.exists() else {}
    trackers = []
    for name in names:
        try:
            trackers.append(_KINDS[name](workdir, config, known.get(name)))
        except Exception as error:  # each has its own kinds
            went_on = f"; without {path} it begins a new run there" if name in known else ""
            raise UserError(f"log.to: {name}: {one_line(error)}{went_on}") from error
    if names:
        write_whole(path, json.dumps(known | {one.name: one.identity for one in trackers}) + "\n")
    return Trackers(trackers)


class Trackers:
    """Sends lines to several trackers; one that fails is named once and left alone, as the run itself goes on.

    As a context it ends the run there, which has failed where the block raises an error.
    """

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = list(trackers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the metrics of a step to each tracker that has not failed."""
        self._each(lambda tracker: tracker.write(step, metrics))

    def __enter__(self):
        return self

    def __exit__(self, kind: type[BaseException] | None, *_):
        self._each(lambda tracker: tracker.close(failed=kind is not None))

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._trackers):
            try:
                do(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                print(
                    f"warning: {tracker.name} gets no more lines: {one_line(error)}; metrics.jsonl has all of them",
                    file=sys.stderr,
                    flush=True,
                )
