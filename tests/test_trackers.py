"""Weights & Biases and MLflow get what metrics.jsonl gets, once, read back with their own libraries."""

import json
import math
import struct
import time

import mlflow
import pytest
import wandb
from etils import epath
from wandb.proto import wandb_internal_pb2

from cjepa_jax.errors import UserError
from cjepa_jax.train import loop, trackers, writer

CONFIG = {"data.source": "digits", "optim.epochs": 3.0, **{f"many.{i}": i for i in range(150)}}


def train(workdir, names, *, start: int, last: int) -> None:
    """Writes the lines of a run that is killed after step `last`: one a step, and an evaluation every third."""
    with trackers.connect(names, workdir, CONFIG, goes_on=start > 0) as following:
        log = writer.Writer(workdir, start=start, steps=9, batch_size=4, images=8, trackers=following)
        for step in range(start + 1, last + 1):
            log.write(step, {"loss/total": 1 / step, "rep/std": math.nan if step == 2 else 0.5})
            if step % 3 == 0:
                log.write(step, {"eval/knn": step / 10})
        log.close()


@pytest.fixture
def mlflow_here(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    return mlflow.MlflowClient


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_mlflow_has_every_line_once_after_a_kill(tmp_path, mlflow_here, monkeypatch):
    workdir = epath.Path(tmp_path / "digits")
    workdir.mkdir()
    train(workdir, ("mlflow",), start=0, last=7)
    train(workdir, ("mlflow",), start=5, last=9)
    client = mlflow_here()
    (run,) = client.search_runs([client.get_experiment_by_name("cjepa_jax").experiment_id])
    assert run.info.run_name == "digits" and run.info.status == "FINISHED"
    assert run.data.params == {key: str(value) for key, value in CONFIG.items()}
    for name, steps in (("loss/total", range(1, 10)), ("eval/knn", (3, 6, 9)), ("epoch", None)):
        found = client.get_metric_history(run.info.run_id, name)
        if steps:
            assert [metric.step for metric in found] == list(steps)
    assert client.get_metric_history(run.info.run_id, "loss/total")[3].value == 0.25
    assert math.isnan(client.get_metric_history(run.info.run_id, "rep/std")[1].value)

    (workdir / "trackers.json").write_text(json.dumps({"mlflow": "gone"}))
    with pytest.raises(UserError, match=r"^log.to: mlflow: .*gone.*; without .*/trackers.json it begins a new run"):
        trackers.connect(("mlflow",), workdir, CONFIG, goes_on=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_that_begins_anew_has_a_record_of_its_own(tmp_path, mlflow_here):
    """The one before it left no checkpoint, and may have had other settings."""
    workdir = epath.Path(tmp_path / "digits")
    workdir.mkdir()
    train(workdir, ("mlflow",), start=0, last=7)
    train(workdir, ("mlflow",), start=0, last=4)
    client = mlflow_here()
    runs = client.search_runs([client.get_experiment_by_name("cjepa_jax").experiment_id], order_by=["start_time"])
    found = [[line.step for line in client.get_metric_history(run.info.run_id, "loss/total")] for run in runs]
    assert sorted(found) == [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_that_fails_before_its_first_step_is_ended_as_failed(tmp_path, mlflow_here, make_config):
    def fail(program, steps):
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        loop.train(make_config(log__to=("mlflow",)), epath.Path(tmp_path / "run"), compile_step=fail)
    client = mlflow_here()
    (run,) = client.search_runs([client.get_experiment_by_name("cjepa_jax").experiment_id])
    assert run.info.status == "FAILED"


def records(log: bytes):
    """Yields the records of a file of Weights & Biases: LevelDB's log format behind a header of seven bytes."""
    position, whole = 7, b""
    while position + 7 <= len(log):
        if 32768 - position % 32768 < 7:  # no header fits into the rest of a block
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", log[position + 4 : position + 7])
        whole += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def lines(workdir) -> list[dict[str, float]]:
    """Reads what Weights & Biases has kept of the run's history."""
    found = []
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def test_weights_and_biases_has_every_line_once_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    workdir = epath.Path(tmp_path / "digits")
    workdir.mkdir()
    train(workdir, ("wandb",), start=0, last=7)
    time.sleep(1)  # it names its folders by the second
    train(workdir, ("wandb",), start=5, last=9)
    wandb.teardown()  # as at the end of a process: its service writes all that it has
    found = lines(workdir)
    assert [line["step"] for line in found if "loss/total" in line] == list(range(1, 10))
    assert [(line["step"], line["eval/knn"]) for line in found if "eval/knn" in line] == [(3, 0.3), (6, 0.6), (9, 0.9)]
    runs = {path.name.rpartition("-")[2] for path in workdir.glob("wandb/offline-run-*")}
    assert runs == {json.loads((workdir / "trackers.json").read_text())["wandb"]}  # one run, which went on


def test_a_tracker_that_cannot_be_reached_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(wandb.errors.UsageError("No API\nkey")))
    with pytest.raises(UserError, match=r"^log.to: wandb: No API key$"):
        trackers.connect(("wandb",), epath.Path(tmp_path), CONFIG, goes_on=False)
    assert not (tmp_path / "trackers.json").exists()
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^log.to: mlflow is not installed: pip install mlflow or mlflow-skinny, or"):
        trackers.check(("mlflow",))


def test_one_that_fails_is_named_once_and_the_run_goes_on(tmp_path, capsys):
    class Failing:
        name, identity = "mlflow", "x"

        def write(self, step, metrics):
            raise ConnectionError("no\nroute")

        def close(self, *, failed):
            raise AssertionError("it was left alone")

    with trackers.Trackers([Failing()]) as following:
        log = writer.Writer(epath.Path(tmp_path), start=0, steps=9, batch_size=4, images=8, trackers=following)
        log.write(1, {"loss/total": 1.0})
        log.write(2, {"loss/total": 1.0})
        log.close()
    assert capsys.readouterr().err.count("warning: mlflow gets no more lines: no route; metrics.jsonl has all") == 1
    assert len(writer.read(epath.Path(tmp_path))) == 2
