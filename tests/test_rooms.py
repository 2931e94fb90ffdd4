"""What each kind of module may import (README, Architecture)."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "cjepa_jax"
MATH = ["config", "errors", "settings", "batch", "checksums", "methods", "models", "tpu/flops"]
MATH += ["data/augment", "data/randaugment"]
MATH += [f"train/{name}" for name in ("step", "microbatch", "optimizer", "sharding", "diagnostics", "trouble")]
MATH += [f"evaluate/{name}" for name in ("sets", "linear_grid", "segmentation_heads", "tracking")]
MATH_MAY_IMPORT = {"jax", "numpy", "einops", "flax", "optax", "jaxtyping", "dataclasses", "typing", "types", "abc"}
MATH_MAY_IMPORT |= {"collections", "functools", "difflib", "math", "textwrap", "statistics", "contextlib"}
MASKS = ("evaluate/tracking",)  # which has OpenCV's dilation
PIXELS = ("data/augment", "data/randaugment")  # which have Pillow's operations
IO = ["files", "data", "train/checkpoint", "pretrained", "interop", "train/writer", "plots"]
TRAINING = ("cjepa_jax.main", "cjepa_jax.finetune", "cjepa_jax.methods", "cjepa_jax.train.setup")
TRAINING += ("cjepa_jax.train.loop", "cjepa_jax.train.step", "cjepa_jax.train.optimizer")
CARD = "cjepa_jax.methods.find_method", "cjepa_jax.methods.METHODS"  # by which a model card names the method


def modules(room: str) -> list[pathlib.Path]:
    file = ROOT / f"{room}.py"
    return [file] if file.exists() else sorted((ROOT / room).rglob("*.py"))


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            rooms = node.module == "cjepa_jax" or (ROOT.parent / node.module.replace(".", "/")).is_dir()
            found |= {f"{node.module}.{a.name}" if rooms else node.module for a in node.names}
    return found


@pytest.mark.parametrize("room", MATH)
def test_math_imports_math(room):
    own = {f"cjepa_jax.{name.replace('/', '.')}" for name in MATH}
    may_import = MATH_MAY_IMPORT | ({"cv2"} if room in MASKS else set())
    may_import |= {"PIL"} if room in PIXELS else set()
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
        found = imports(path) - (set(CARD) if path.name == "card.py" else set())
        assert not [name for name in found if name.startswith(TRAINING)], path.name


def test_imports_run_in_no_circle():
    """Each module can be reached from itself by no chain of imports, those inside of functions included."""
    names = {path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    names = {path: name.removesuffix(".__init__") for path, name in names.items()}
    arrows = {names[path]: imports(path) & set(names.values()) for path in names}
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in arrows[name]:
                walk(other, (*above, name))
            done.add(name)

    for name in arrows:
        walk(name, ())


def test_only_sharding_knows_axis_names():
    for path in ROOT.rglob("*.py"):
        if path.name != "sharding.py":
            assert "PartitionSpec" not in path.read_text(), path.name


def test_one_function_opens_image_files():
    """It says which formats; Pillow by itself would try all that it knows, and call Ghostscript for one of them."""
    used = [path.name for path in ROOT.rglob("*.py") for _ in range(path.read_text().count("Image.open("))]
    assert used == ["decode.py"]


@pytest.mark.parametrize("room", ["tpu/hlo", "tpu/cost", "tpu/chips", "command", "convert"])
def test_what_runs_before_jax_imports_none(room):
    """The environment that the TPU compiler wants must be set first; and --help should be quick."""
    for path in modules(room):
        assert not {name.split(".")[0] for name in imports(path)} & {"jax", "flax", "optax", "orbax"}, path.name


def test_files_stay_readable():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 350, path.name
