"""What each kind of module may import (README, Architecture)."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "cjepa_jax"
MATH = ["config", "parsing", "masking", "losses", "optimizer", "diagnostics", "step", "sharding", "models", "flops"]
MATH += [f"evaluate/{name}" for name in ("sets", "knn", "logistic", "linear", "collapse", "attention", "tracking")]
MATH += ["finetune/config", "finetune/mixing", "finetune/tuning"]
MATH_MAY_IMPORT = {"jax", "numpy", "einops", "flax", "optax", "dataclasses", "typing", "types", "collections"}
MATH_MAY_IMPORT |= {"functools", "difflib", "math"}
PATCHES = ("evaluate/attention", "evaluate/tracking")  # which have scikit-learn's PCA and OpenCV's dilation
IO = ["data", "checkpoint", "pretrained", "interop", "metrics", "plots"]
TRAINING = {f"cjepa_jax.{name}" for name in ("train", "main", "loop", "finetune", "step", "losses", "optimizer")}


def modules(room: str) -> list[pathlib.Path]:
    file = ROOT / f"{room}.py"
    return [file] if file.exists() else sorted((ROOT / room).rglob("*.py"))


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{a.name}" if node.module == "cjepa_jax" else node.module for a in node.names}
    return found


@pytest.mark.parametrize("room", MATH)
def test_math_imports_math(room):
    own = {f"cjepa_jax.{name.replace('/', '.')}" for name in MATH}
    may_import = MATH_MAY_IMPORT | ({"cv2", "sklearn"} if room in PATCHES else set())
    assert modules(room)
    for path in modules(room):
        for name in imports(path):
            if name.startswith("cjepa_jax"):
                assert name in own or name.rpartition(".")[0] in own, f"{path.name} imports {name}"
            else:
                assert name.split(".")[0] in may_import, f"{path.name} imports {name}"


@pytest.mark.parametrize("room", IO)
def test_io_knows_no_training(room):
    assert modules(room)
    for path in modules(room):
        assert not imports(path) & TRAINING, path.name


def test_only_sharding_knows_axis_names():
    for path in ROOT.rglob("*.py"):
        if path.name != "sharding.py":
            assert "PartitionSpec" not in path.read_text(), path.name


@pytest.mark.parametrize("room", ["hlo", "predict", "tpu", "command", "convert"])
def test_what_runs_before_jax_imports_none(room):
    """The environment that the TPU compiler wants must be set first; and --help should be quick."""
    for path in modules(room):
        assert not {name.split(".")[0] for name in imports(path)} & {"jax", "flax", "optax", "orbax"}, path.name


def test_files_stay_readable():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 350, path.name
