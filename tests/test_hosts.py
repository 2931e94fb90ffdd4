"""Several real processes on this machine, each with simulated devices, against one process."""

import json
import os
import pathlib
import shutil
import signal
import socket
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from cjepa_jax.errors import UserError
from cjepa_jax.tpu import chips
from cjepa_jax.train import distributed, lock
from tests.commands import QUICK, Command, run
from tests.helpers import lines

SMALL = [
    "--config=configs/digits.py",
    "--config.model.size=64x1x2",
    "--config.predictor.width=32",
    "--config.predictor.depth=1",
    "--config.data.batch_size=16",
    "--config.eval.every=0",
    "--config.log.every=1",
    "--config.checkpoint.every=5",
    "--config.optim.epochs=0.1114",  # ten steps of 1,437 images
    "--config.optim.warmup_epochs=0.02",
]

ENDLESS = ["--config.optim.epochs=1000", "--config.checkpoint.every=100000"]
JUDGED = ["--config.eval.every=10", "--config.eval.images=100", "--config.eval.draws=1"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(count: int, devices: int, *arguments: str, first: str = "") -> list[Command]:
    """The command in `count` processes that know of one another, with `devices` simulated devices each."""
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    address = f"localhost:{free_port()}"
    several = [f"--coordinator_address={address}", f"--num_processes={count}"] if count > 1 else []
    return [
        Command(
            "cjepa_jax.main",
            *(*SMALL, *arguments, *several, *(several and [f"--process_id={process}"])),
            first=first,
            XLA_FLAGS=flags,
        )
        for process in range(count)
    ]


def finish(processes: list[Command], *codes: int) -> list[str]:
    said = [process.communicate(timeout=300)[0] for process in processes]
    found = [process.returncode for process in processes]
    assert found == list(codes or [0] * len(processes)), "\n\n".join(said)
    return said


def losses(workdir: pathlib.Path) -> list[float]:
    return [line["loss/total"] for line in lines(workdir) if "loss/total" in line]


def saved(workdir: pathlib.Path, step: int):
    """The state, on one device, whatever devices saved it."""
    path = workdir / "checkpoints" / str(step) / "state"
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.metadata(path).item_metadata.tree
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), found)
        return checkpointer.restore(path, shapes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finish(start(1, 4, f"--workdir={workdir}", *JUDGED))
    return workdir


SHARED = ["--config.mesh.parameters=fsdp", "--config.model.remat=dots", "--config.model.layers=scanned"]


def check(said: list[str], workdir: pathlib.Path, alone: pathlib.Path, *steps: int) -> None:
    """The same losses and the same checkpoints; process 0 alone writes metrics and says how far it is."""
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-4)
    for step in steps:
        for a, b in zip(*map(jax.tree.leaves, (saved(workdir, step), saved(alone, step))), strict=True):
            a, b = np.asarray(a, float), np.asarray(b, float)
            assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b) + 1e-4 * a.size**0.5
    assert "step 10/10" in said[0] and not any("step 10/10" in other for other in said[1:])


@pytest.mark.slow  # the next two tests hold what it shows
@pytest.mark.parametrize(
    "count, devices, settings",
    [(2, 2, []), (4, 1, []), (2, 2, ["--config.mesh.fsdp=4", *SHARED])],
    ids=["two", "four", "two, fsdp over both"],
)
def test_processes_train_as_one(alone, tmp_path, count, devices, settings):
    workdir = tmp_path / "run"
    check(finish(start(count, devices, f"--workdir={workdir}", *settings)), workdir, alone, 5, 10)


# Code by which each process has its own number where the command line says PROCESS.
APART = "import sys; sys.argv[1:] = [word.replace('PROCESS', sys.argv[-1][-1]) for word in sys.argv[1:]]; "


def test_a_workdir_that_they_do_not_share_is_refused(tmp_path):
    first = APART + "from cjepa_jax.train import lock; lock.SEEN = 1.0"
    for process in ("0", "1"):
        (tmp_path / process).mkdir()
    said = finish(start(2, 1, f"--workdir={tmp_path}/PROCESS/run", first=first), 2, 2)
    for process, text in enumerate(said):
        assert f"error: --workdir {tmp_path}/{process}/run is not one folder for all processes" in text
    assert not (tmp_path / "0" / "run" / "lock.json").exists()
    assert not (tmp_path / "1" / "run").exists()


def test_another_number_of_processes_goes_on(alone, tmp_path):
    """Two processes, which share the parameters, take the second half of what one has begun: same images and masks.

    At the end they judge the features, of which each has a part.
    """
    workdir = tmp_path / "run"
    shutil.copytree(alone, workdir)
    shutil.rmtree(workdir / "checkpoints" / "10")
    kept = [line for line in lines(workdir) if line["step"] <= 5]
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    (workdir / "evaluation.json").unlink()
    said = finish(start(2, 2, f"--workdir={workdir}", "--config.mesh.fsdp=4", *SHARED, *JUDGED))
    assert "going on from step 5" in said[0]
    check(said, workdir, alone, 10)
    for name in ("eval/knn", "eval/logistic"):
        assert lines(workdir)[-1][name] == pytest.approx(lines(alone)[-1][name], abs=0.01)
    assert (workdir / "evaluation.json").exists()


def test_all_take_the_checkpoint_that_the_first_finds_newest(alone, tmp_path):
    """Process 1 has links to the files of process 0, but none to the last checkpoint, as on a disk that lags behind."""
    whole, lags = tmp_path / "0" / "run", tmp_path / "1" / "run"
    shutil.copytree(alone, whole)
    (lags / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", "evaluation.json", "lock.json", "checkpoints/5"):
        (lags / name).symlink_to(whole / name)
    said = finish(start(2, 1, f"--workdir={tmp_path}/PROCESS/run", *JUDGED, first=APART), 1, 1)
    missing = f"[Errno 2] No such file or directory: '{lags}/checkpoints/10'"
    assert f"error: process 1 cannot go on ({missing}), so all have ended; start all again" in said[0]


def test_a_stop_of_one_stops_all_after_the_same_step(alone, tmp_path):
    workdir = tmp_path / "run"
    processes, deadline = start(2, 1, f"--workdir={workdir}", *ENDLESS), time.time() + 200
    while not (workdir / "metrics.jsonl").exists() or len(losses(workdir)) < 3:
        assert all(process.poll() is None for process in processes) and time.time() < deadline
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes)
    (step,) = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.is_dir()]
    assert f"stopped and saved at step {step}" in said[0]
    assert int(saved(workdir, step)["step"]) == step
    assert losses(workdir)[0] == pytest.approx(losses(alone)[0], rel=1e-4)


def gone(split: str) -> str:
    """Code by which process 1 finds the images of a split gone."""
    return (
        "import sys; from cjepa_jax.data import sources; read = sources.Source.read; "
        f"gone = lambda self: '--process_id=1' in sys.argv and {split!r} in self.name(0); "
        "sources.Source.read = lambda self, i: "
        "(_ for _ in ()).throw(sources.UnreadableError('gone')) if gone(self) else read(self, i)"
    )


def test_an_error_of_one_stops_all_and_saves_nothing_of_it(tmp_path):
    workdir = tmp_path / "run"
    settings = [*ENDLESS, "--config.data.max_bad_fraction=1.0"]
    said = finish(start(2, 1, f"--workdir={workdir}", *settings, first=gone("train")), 2, 2)
    assert "error: another process could not go on and says why" in said[0]
    assert "error: 100 images in a row cannot be read" in said[1]
    assert not list((workdir / "checkpoints").glob("[0-9]*"))


def test_an_error_of_one_in_an_evaluation_ends_all(tmp_path):
    """Process 0 would wait for the features of process 1."""
    said = finish(start(2, 1, f"--workdir={tmp_path / 'run'}", *ENDLESS, *JUDGED, first=gone("test")), 1, 1)
    assert "error: process 1 cannot go on" in said[0] and "images tried cannot be read" in said[0]


def test_a_workdir_in_use_is_refused_by_all(tmp_path):
    """Process 0 says by whom; this process is the one."""
    with lock.Lock(epath.Path(tmp_path / "run")):
        said = finish(start(2, 1, f"--workdir={tmp_path / 'run'}"), 2, 2)
    assert f"is in use by process {os.getpid()} on" in said[0]
    assert "error: another process could not go on and says why" in said[1]
    assert "Traceback" not in "".join(said)


def test_a_process_that_cannot_be_reached_is_named(tmp_path):
    address = f"localhost:{free_port()}"
    flags = [f"--coordinator_address={address}", "--num_processes=2", "--process_id=1", "--start_timeout=3"]
    done = run("cjepa_jax.main", *SMALL, f"--workdir={tmp_path / 'run'}", *flags)
    assert done.returncode == 2, done.stderr
    assert f"did not find one another within 3 s through {address}" in done.stderr


def test_half_of_the_flags_are_refused():
    with pytest.raises(UserError, match="--num_processes and --process_id missing"):
        distributed.start("localhost:1", None, None, 1)


def test_nothing_is_started_where_nothing_asks_for_it(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("started"))
    for variables in ({}, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {"SLURM_NTASKS": "4"}):
        with monkeypatch.context() as patch:
            for key in ("SLURM_NTASKS", "SLURM_PROCID"):
                patch.delenv(key, raising=False)
            for key, value in variables.items():
                patch.setenv(key, value)
            distributed.start(None, None, None, 1)


def test_slurm_starts_it(monkeypatch):
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: started.append(given))
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "2")
    distributed.start(None, None, None, 7)
    assert [given["initialization_timeout"] for given in started] == [7]


def test_a_tpu_starts_it_and_other_accelerators_do_not(monkeypatch):
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: started.append(given))
    for name in ("JAX_PLATFORMS", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for there in (False, True):
        monkeypatch.setattr(chips, "may_be_here", lambda there=there: there)
        distributed.start(None, None, None, 1)
        assert len(started) == there
    for hosts, count in (("localhost", 1), ("t1v-0,t1v-1", 2)):  # the first is what Kaggle's notebooks say
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", hosts)
        distributed.start(None, None, None, 1)
        assert len(started) == count
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "slice-0")
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "slice-0")  # one machine of each of several slices
    distributed.start(None, None, None, 1)
    assert len(started) == 3
