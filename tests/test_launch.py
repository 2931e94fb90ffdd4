"""What launch/ would do, with a fake gcloud, Slurm and container; the notebook is executed."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import nbclient
import nbformat
import pytest
import yaml
from test_train import SMALL

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
TPU_VM, SLURM = LAUNCH / "tpu_vm.sh", LAUNCH / "slurm.sbatch"
JOBSET = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
POD = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
SET = {"PROJECT": "my-project", "ZONE": "us-central1-a", "WORKDIR": "gs://bucket/run"}
SUBCOMMANDS = ["create", "status", "setup", "run", "logs", "stop", "resume", "delete"]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(NAME=SCRIPT) puts commands first on PATH; every one writes a line into tmp_path/called before."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(**scripts: str) -> None:
        for name, script in scripts.items():
            (folder / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {tmp_path}/called\n{script}\n')
            (folder / name).chmod(0o755)

    return make


def called(tmp_path: pathlib.Path) -> list[str]:
    path = tmp_path / "called"
    return path.read_text().splitlines() if path.exists() else []


def bash(*arguments: object, code: int = 0, **environment: str) -> str:
    """Standard output, or, where failure is expected, standard error; unset variables are those that users set."""
    clean = {k: v for k, v in os.environ.items() if k not in (*SET, "CONFIG", "DATA_DIR", "NAME", "REPO", "SPOT")}
    command = ["bash", *map(str, arguments)]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def dry_run(*arguments: str, **environment: str) -> list[list[str]]:
    """The commands that tpu_vm.sh would run, as lists of words."""
    return [shlex.split(line) for line in bash(TPU_VM, *arguments, "--dry-run", **SET, **environment).splitlines()]


def until(condition) -> None:
    deadline = time.time() + 20
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm.sbatch", "gke_jobset.yaml"])
def test_shellcheck(script):
    text = POD["containers"][0]["args"][0] if script.endswith("yaml") else (LAUNCH / script).read_text()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, 'pip install ".[test]" brings it'
    done = subprocess.run([shellcheck, "-s", "bash", "-"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


class TestTpuVm:
    def test_dry_run_calls_nothing(self, fake, tmp_path):
        fake(gcloud="exit 1", git="exit 1")
        for subcommand in SUBCOMMANDS:
            for command in dry_run(subcommand):
                if command[0] == "gcloud":
                    assert command[1:3] == ["compute", "tpus"]
                    assert command[-2:] == ["--project=my-project", "--zone=us-central1-a"]
        assert called(tmp_path) == []

    def test_create(self):
        (command,) = dry_run("create")
        assert command[3:6] == ["queued-resources", "create", "cjepa"]
        expected = "--node-id=cjepa --accelerator-type=v5litepod-64 --runtime-version=v2-alpha-tpuv5-lite --spot"
        assert set(expected.split()) <= set(command)
        (command,) = dry_run("create", SPOT="", NAME="x", ACCELERATOR_TYPE="v6e-64", RUNTIME_VERSION="v2-alpha-tpuv6e")
        expected = "x --node-id=x --accelerator-type=v6e-64 --runtime-version=v2-alpha-tpuv6e"
        assert set(expected.split()) <= set(command) and "--spot" not in command

    def test_setup_copies_and_installs_everywhere(self):
        archive, copy, unpack, install = dry_run("setup", TMPDIR="/some")
        assert archive[0] == "git" and archive[-2:] == ["--output=/some/cjepa_jax.tar", "HEAD"]
        assert copy[3:8] == ["tpu-vm", "scp", "/some/cjepa_jax.tar", "cjepa:cjepa_jax.tar", "--worker=all"]
        for command in (unpack, install):
            assert command[3:7] == ["tpu-vm", "ssh", "cjepa", "--worker=all"]
        assert "tar -xf cjepa_jax.tar" in unpack[7]
        assert "-r requirements.txt 'jax[tpu]==" in install[7]
        clone, _ = dry_run("setup", REPO="https://host/repo")
        assert "git clone --depth=1 https://host/repo cjepa_jax" in clone[7]

    def test_run(self):
        (command,) = dry_run("run", "--config.vicreg.projector=(64, 64)", CONFIG="configs/x.py", DATA_DIR="gs://data")
        assert command[3:7] == ["tpu-vm", "ssh", "cjepa", "--worker=all"]
        remote = shlex.split(command[7].removeprefix("--command="))
        start = remote.index("cjepa_jax.main")
        assert remote[start + 1 : start + 5] == [
            "--config=configs/x.py",
            "--workdir=gs://bucket/run",
            "--config.data.data_dir=gs://data",
            "--config.vicreg.projector=(64, 64)",
        ]
        assert "nohup" in remote and remote[-1] == "&"

    def test_the_others(self):
        (logs,) = dry_run("logs", WORKER="3")
        assert "--worker=3" in logs and "--command=tail -n 100 -F cjepa.log" in logs
        (stop,) = dry_run("stop")
        assert "--worker=all" in stop and "--command=pkill -TERM -f '[c]jepa_jax.main'" in stop
        (delete,) = dry_run("delete")
        assert delete[3:8] == ["queued-resources", "delete", "cjepa", "--force", "--quiet"]
        describe, processes = dry_run("status")
        assert describe[3:6] == ["queued-resources", "describe", "cjepa"] and "pgrep" in processes[7]
        again = [*dry_run("delete"), *dry_run("create"), *dry_run("setup"), *dry_run("run", "--config.x=1")]
        assert dry_run("resume", "--config.x=1") == again

    def test_waits_for_the_slice_and_stops_where_there_will_be_none(self, fake, tmp_path):
        states = tmp_path / "states"
        fake(sleep="", git="", gcloud=f"[[ $* != *describe* ]] || {{ head -1 {states}; sed -i 1d {states}; }}")
        states.write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
        bash(TPU_VM, "setup", **SET)
        words = [" ".join(line.split()[:5]) for line in called(tmp_path)]
        describe, ssh = "gcloud compute tpus queued-resources describe", "gcloud compute tpus tpu-vm ssh"
        assert [w for w in words if w != "sleep 60"][:3] == [describe] * 3 and words.count("sleep 60") == 2
        assert words[-1] == ssh
        states.write_text("SUSPENDED\n")
        assert "error: cjepa is SUSPENDED" in bash(TPU_VM, "setup", code=1, **SET)
        states.write_text("ACTIVE\n")
        assert "is ACTIVE" in bash(TPU_VM, "resume", code=1, **SET)
        assert not any("delete" in line for line in called(tmp_path))

    def test_run_goes_on_by_itself_and_only_once(self, fake, tmp_path, monkeypatch):
        """The remote command, run here: the shell returns at once, the training stays."""
        home = tmp_path / "home"
        python = home / "cjepa_jax" / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text("#!/usr/bin/env bash\necho started $$ $*\nexec sleep 30\n")
        python.chmod(0o755)
        fake(gcloud='for a; do [[ $a != --command=* ]] || exec bash -c "${a#--command=}"; done')
        monkeypatch.chdir(home)
        bash(TPU_VM, "run", **SET)  # reads the output to its end: nothing may hold it open
        log = home / "cjepa.log"
        until(lambda: log.exists() and log.read_text().startswith("started"))
        process = int(log.read_text().split()[1])
        try:
            assert "--workdir=gs://bucket/run" in log.read_text()
            assert "a run is going on" in bash("-c", f"{TPU_VM} run >&2", code=1, **SET)
        finally:
            os.kill(process, signal.SIGTERM)

    @pytest.mark.parametrize(
        "arguments, environment, code, message",
        [
            (["run"], SET | {"WORKDIR": "/disk"}, 2, "WORKDIR=/disk is not on gs://"),
            (["rnu"], SET, 2, "unknown subcommand rnu"),
            (["run"], {"PROJECT": "p", "ZONE": "z"}, 1, "WORKDIR: results and checkpoints"),
        ],
    )
    def test_mistakes(self, fake, tmp_path, arguments, environment, code, message):
        fake(gcloud="exit 1")
        assert message in bash(TPU_VM, *arguments, code=code, **environment)
        assert called(tmp_path) == []

    def test_help_names_every_subcommand(self):
        said = bash(TPU_VM, "--help")
        for subcommand in SUBCOMMANDS:
            assert f"launch/tpu_vm.sh {subcommand} " in said


class TestSlurm:
    def test_dry_run(self, fake, tmp_path):
        fake(srun="exit 1")
        said = bash(SLURM, "--dry-run", "--config.vicreg.projector=(64, 64)", CONFIG="configs/vits16.py")
        words = shlex.split(said)
        assert words[0] == "srun" and "--cpus-per-task=12" in words
        assert words[words.index("-m") :] == [
            *("-m", "cjepa_jax.main", "--config=configs/vits16.py", "--workdir=runs/vits16"),
            *("--config.data.threads=12", "--config.vicreg.projector=(64, 64)"),
        ]
        assert "--cpus-per-task=7 " in bash(SLURM, "--dry-run", SLURM_CPUS_PER_TASK="7")
        assert called(tmp_path) == []

    def test_options_suit_how_jax_finds_its_way(self):
        lines = [line.split()[1] for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH")]
        options = dict(line.removeprefix("--").partition("=")[::2] for line in lines)
        assert options["gpus-per-node"] == options["ntasks-per-node"]  # one task a GPU
        assert not {"gpus-per-task", "gpu-bind"} & options.keys()  # that sees all GPUs of its node
        assert "requeue" in options and options["signal"].startswith("B:USR1@")

    @pytest.mark.parametrize("sent, queued_again", [(signal.SIGUSR1, True), (signal.SIGTERM, False), (None, False)])
    def test_the_time_limit_saves_and_queues_again(self, sent, queued_again, fake, tmp_path):
        loop = "while true; do sleep 0.05; done" if sent else "exit 3"
        fake(
            srun=f"trap 'echo saved >> {tmp_path}/called; exit 0' TERM; echo $$ > {tmp_path}/step; {loop}",
            scancel=f"kill -TERM $(cat {tmp_path}/step)",
            scontrol="",
        )
        job = subprocess.Popen(["bash", str(SLURM)], env=os.environ | {"SLURM_JOB_ID": "42"})
        if sent:
            until(lambda: (tmp_path / "step").exists() and (tmp_path / "step").read_text())
            if sent == signal.SIGTERM:  # Slurm sends it to the tasks too
                os.kill(int((tmp_path / "step").read_text()), sent)
            job.send_signal(sent)
        assert job.wait(timeout=20) == (0 if sent else 3)
        rest = called(tmp_path)[1:]
        if queued_again:
            assert rest == ["scancel --signal=TERM 42", "saved", "scontrol requeue 42"]
        else:
            assert rest == (["saved"] if sent else [])


class TestJobSet:
    def test_structure(self):
        """Of what is used here; the whole was once validated against JobSet's own schema."""
        assert JOBSET["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and JOBSET["kind"] == "JobSet"
        assert JOBSET.keys() == {"apiVersion", "kind", "metadata", "spec"}
        spec = JOBSET["spec"]
        assert spec.keys() == {"failurePolicy", "replicatedJobs"}
        (rule,) = spec["failurePolicy"]["rules"]
        assert rule.keys() == {"name", "action", "onJobFailureReasons"}
        (job,) = spec["replicatedJobs"]
        assert job.keys() == {"name", "replicas", "template"} and job["template"].keys() == {"spec"}
        job = job["template"]["spec"]
        assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0 and POD["restartPolicy"] == "Never"
        (container,) = POD["containers"]
        assert container.keys() == {"name", "image", "env", "command", "args", "resources"}
        assert all(entry.keys() == {"name", "value"} for entry in container["env"])
        assert all(isinstance(value, str) for value in POD["nodeSelector"].values())

    def test_a_preemption_restarts_all(self):
        (rule,) = JOBSET["spec"]["failurePolicy"]["rules"]
        job = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
        (reason,) = job["podFailurePolicy"]["rules"]
        assert reason == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]}
        assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
        assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]

    def test_machines_make_up_the_slice(self):
        job = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
        height, width = map(int, POD["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
        chips = POD["containers"][0]["resources"]["limits"]["google.com/tpu"]
        assert job["parallelism"] == job["completions"] == height * width // chips

    @pytest.mark.parametrize("stop, expected", [(True, 143), (False, 0)])
    def test_a_stopped_run_fails_and_a_finished_one_succeeds(self, stop, expected, fake, tmp_path):
        loop = "while true; do sleep 0.05; done" if stop else "exit 0"
        fake(
            git="mkdir cjepa_jax",
            pip="",
            python=f"trap 'echo saved >> {tmp_path}/called; exit 0' TERM; echo > {tmp_path}/runs; {loop}",
        )
        container = POD["containers"][0]
        environment = os.environ | {entry["name"]: entry["value"] for entry in container["env"]}
        pod = subprocess.Popen([*container["command"], *container["args"]], cwd=tmp_path, env=environment)
        if stop:
            until((tmp_path / "runs").exists)
            pod.send_signal(signal.SIGTERM)
        assert pod.wait(timeout=20) == expected
        assert called(tmp_path)[2].startswith("python -m cjepa_jax.main --config=configs/vitb16.py --workdir=gs://")
        assert called(tmp_path)[3:] == (["saved"] if stop else [])


def test_notebook(tmp_path, monkeypatch):
    """Trains five steps and ends with pictures of neighbours and a map."""
    notebook = nbformat.read(LAUNCH / "colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    flags = [*SMALL, "--config.optim.epochs=0.06", "--config.optim.warmup_epochs=0.02"]
    monkeypatch.setenv("CJEPA_NOTEBOOK", json.dumps({"WORKDIR": str(tmp_path / "run"), "FLAGS": flags}))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(LAUNCH)}}).execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert "finished at step 5" in "".join(output.text for output in outputs["train"])
    for name in ("curves", "masks", "neighbours"):
        assert outputs[name][-1].data["image/png"]
    assert sum("data" in output for output in outputs["neighbours"]) == 2  # neighbours and a map
    assert (tmp_path / "run" / "encoder" / "model.safetensors").exists()


def test_notebook_chooses_config_and_microbatches():
    notebook = nbformat.read(LAUNCH / "colab.ipynb", as_version=4)
    (train,) = (cell.source for cell in notebook.cells if cell.id == "train")
    names: dict = {}
    exec(train.partition("name, settings =")[0], names)
    find_settings, microbatches = names["find_settings"], names["microbatches"]
    for data in ("digits", "stl10", "imagenet", "imagenet100:/some/folder", "tfds:cifar10", "/drive/photos"):
        name, flags = find_settings(data)
        assert (ROOT / "configs" / f"{name}.py").is_file()
        assert all(flag.startswith("--config.") for flag in flags)
    assert find_settings("imagenet100:/some/folder") == ("imagenet100", ["--config.data.data_dir=/some/folder"])
    assert find_settings("/drive/photos") == ("folder", ["--config.data.data_dir=/drive/photos"])
    # One v5e; a 16 GB GPU, of whose memory JAX takes three quarters; one of 24 and one of 80 GB; 8 chips.
    sizes = (15.75, 11.0, 17.0, 60.0, 126.0)
    assert [microbatches(32, gib) for gib in sizes] == [32, 64, 32, 8, 4]
    assert [microbatches(1, gib) for gib in sizes] == [1, 2, 1, 1, 1]
    assert [microbatches(0, gib) for gib in sizes] == [0] * 5  # the run chooses, as configs/folder.py wishes
