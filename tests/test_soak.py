"""A long run stays as it began, and one that is killed again and again is the one that never was: `make soak`."""

import json
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cjepa_jax.train.writer import TIMED
from tests import helpers

ROOT = pathlib.Path(__file__).parents[1]
STEPS = int(os.environ.get("SOAK_STEPS", "40000"))
KILLS = int(os.environ.get("SOAK_KILLS", "26"))
TINY = [
    "--config=configs/digits.py",
    "--config.model.size=16x1x2",
    "--config.predictor.width=8",
    "--config.predictor.depth=1",
    "--config.data.batch_size=16",
]


def start(workdir: pathlib.Path, steps: int, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    epochs = [f"--config.optim.epochs={steps * 16 / 1437}", f"--config.optim.warmup_epochs={steps * 1.6 / 1437}"]
    command = [sys.executable, "-m", "cjepa_jax.main", *TINY, *epochs, f"--workdir={workdir}", *arguments]
    with open(f"{workdir}.log", "ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | environment)


def last_step(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    whole = path.read_text().splitlines()[:-1] if path.exists() else []
    return json.loads(whole[-1])["step"] if whole else 0


def sample(pid: int, workdir: pathlib.Path) -> dict[str, float]:
    """What a process holds now; memory that the system has swapped out counts."""
    proc = pathlib.Path(f"/proc/{pid}")
    status = dict(re.findall(r"(\w+):\s+(\d+)", (proc / "status").read_text()))
    times = (proc / "stat").read_text().rpartition(")")[2].split()[11:13]
    return {
        "step": last_step(workdir),
        "MB": (int(status["RssAnon"]) + int(status["VmSwap"])) / 1024,
        "descriptors": len(list((proc / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "CPU s": sum(map(int, times)) / os.sysconf("SC_CLK_TCK"),
        "s": time.monotonic(),
    }


@pytest.mark.slow
def test_memory_descriptors_threads_and_speed_stay_as_they_were(tmp_path):
    """With a checkpoint every 250 steps and a probe every 1,000; the last tenth is compared with the second.

    With as many arenas as it likes, malloc keeps more and more memory for reuse.
    """
    workdir = tmp_path / "run"
    settings = ("--config.checkpoint.every=250", "--config.eval.every=1000")
    process = start(workdir, STEPS, *settings, MALLOC_ARENA_MAX="2")
    seen: list[dict[str, float]] = []
    while process.poll() is None:
        time.sleep(2)
        try:
            seen.append(sample(process.pid, workdir))
        except (OSError, KeyError):  # it has ended
            break
    assert process.wait() == 0, pathlib.Path(f"{workdir}.log").read_text()[-2000:]
    tenths = []
    for tenth in range(10):
        part = [s for s in seen if tenth * STEPS / 10 <= s["step"] < (tenth + 1) * STEPS / 10 and s["step"] > 0]
        row = {name: statistics.median(s[name] for s in part) for name in ("MB", "descriptors", "threads")}
        row |= {"descriptors at most": max(s["descriptors"] for s in part)}
        row |= {"threads at most": max(s["threads"] for s in part)}
        steps = part[-1]["step"] - part[0]["step"]
        row |= {f"steps per {name}": steps / (part[-1][name] - part[0][name]) for name in ("s", "CPU s")}
        tenths.append(row)
    print("\n" + "  ".join(["tenth", *tenths[0]]))
    for number, row in enumerate(tenths, 1):
        print(f"{number:5d}  " + "  ".join(f"{value:{len(name)}.1f}" for name, value in row.items()))
    early, late = tenths[1], tenths[-1]
    assert late["MB"] < 1.05 * early["MB"]
    for name in ("descriptors", "threads"):
        assert late[name] <= early[name] + 2 and late[f"{name} at most"] <= early[f"{name} at most"] + 5
    assert late["steps per CPU s"] > 0.9 * early["steps per CPU s"]


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path):
    """Every array of the last checkpoint, and every line of metrics but for what was timed, bit for bit."""
    steps, every = 60 * max(KILLS, 2), 20
    settings = (f"--config.checkpoint.every={every}", "--config.log.every=1", "--config.eval.every=0")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, steps, *settings).wait() == 0
    rng, kills, twice = random.Random(0), 0, 0
    while True:
        process = start(killed, steps, *settings)
        begun = last_step(killed)
        # Half of the kills hit training, at any step of the next sixty; the others hit the start, or the first steps.
        until, seconds = (rng.randrange(1, 60), 600.0) if kills % 2 else (60, rng.uniform(0.5, 20))
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline and last_step(killed) < begun + until:
            time.sleep(0.01)
        if process.poll() is not None or kills == KILLS:
            assert process.wait() == 0, pathlib.Path(f"{killed}.log").read_text()[-2000:]
            break
        process.kill()
        process.wait()
        kills += 1
        saved = [int(p.name) for p in (killed / "checkpoints").glob("[0-9]*") if p.name.isdigit()]
        twice += max(0, last_step(killed) - max(saved, default=0))
    arrays = [ocp.StandardCheckpointer().restore(w / "checkpoints" / str(steps) / "state") for w in (whole, killed)]
    jax.tree.map(np.testing.assert_array_equal, *arrays)
    metrics = []
    for workdir in (whole, killed):
        found = helpers.lines(workdir)
        metrics.append([{k: v for k, v in line.items() if k not in TIMED} for line in found])
    assert metrics[0] == metrics[1] and len(metrics[0]) == steps
    print(
        f"\n{kills} kills, {steps} steps, {twice} of them taken twice, {len(jax.tree.leaves(arrays[0]))} arrays equal"
    )
    assert kills == KILLS
