"""The networks of a checkpoint without the rest of its training: for evaluation, fine-tuning, conversion, new runs."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from cjepa_jax.checkpoint import absolute, quiet_on_error, write_whole
from cjepa_jax.config import Model, Predictor, UserError, one_line, require
from cjepa_jax.masking import Masks
from cjepa_jax.models.predictor import build_predictor
from cjepa_jax.models.vit import build_encoder
from cjepa_jax.parsing import group

# Where a checkpoint's state holds each of them.
TOWERS = {
    "encoder": ("params", "encoder"),
    "predictor": ("params", "predictor"),
    "projector": ("params", "projector"),
    "head": ("params", "head"),
    "target_encoder": ("target_params",),
    "ema_encoder": ("ema_params", "encoder"),  # of a fine-tuned network, as its head
    "ema_head": ("ema_params", "head"),
}
ENCODERS = ("target_encoder", "encoder")  # the first is what features are taken from


class Pretrained(NamedTuple):
    """Networks, and what it takes to run them."""

    model: Model
    predictor: Predictor | None  # its width and depth, where the checkpoint has one
    image_size: int  # pixels a side, in training
    mean: tuple[float, ...]  # per channel, of values in [0, 1]
    std: tuple[float, ...]
    step: int
    params: dict[str, Any]  # tower -> its parameters, NumPy arrays
    classes: tuple[str, ...] = ()  # of the head, where they have names
    epoch: int = 0  # of an imported checkpoint, which does not know its step


def load(path: epath.Path, towers: Sequence[str]) -> Pretrained:
    """The towers (keys of TOWERS) of a workdir's newest checkpoint, or of the given one, WORKDIR/checkpoints/STEP.

    Nothing else is read, and no device is touched. Raises UserError for a path
    that is no checkpoint, one that cannot be read, and a tower that it lacks.
    """
    workdir, state = _find(path)
    config = _read_config(workdir / "config.json")
    with _reading(state):
        tree = _metadata(state)
        item = _nest(tree["step"], {tower: _part(tree, tower, state) for tower in towers})
        item = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), item)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        restored = ocp.PyTreeCheckpointer().restore(state, args=arguments)
    return Pretrained(
        model=group(Model, config, "model"),
        predictor=group(Predictor, config, "predictor") if "predictor.width" in config else None,
        image_size=config["data.image_size"],
        mean=tuple(config["data.mean"]),
        std=tuple(config["data.std"]),
        step=int(restored["step"]),
        params={tower: _part(restored, tower, state) for tower in towers},
        classes=tuple(config.get("classes", ())),
        epoch=config.get("epoch", 0),
    )


def available(path: epath.Path) -> tuple[str, ...]:
    """The towers that `load` can give, those without parameters left out. Raises UserError as `load` does."""
    _, state = _find(path)
    with _reading(state):
        tree = _metadata(state)
    return tuple(tower for tower in TOWERS if jax.tree.leaves(_part(tree, tower)))


def save(workdir: epath.Path, pretrained: Pretrained) -> None:
    """Writes what `load` reads; `workdir` must not exist yet. Needs about 1.3 times the memory of the parameters."""
    state = _nest(np.asarray(pretrained.step, np.int32), pretrained.params)
    # Without OCDBT, which would collect everything in memory once more.
    ocp.PyTreeCheckpointer(use_ocdbt=False).save(
        absolute(workdir) / "checkpoints" / str(pretrained.step) / "state", state
    )
    config = {f"data.{key}": getattr(pretrained, key) for key in ("image_size", "mean", "std")}
    for name in ("model", "predictor"):
        if (settings := getattr(pretrained, name)) is not None:
            config |= {f"{name}.{key}": value for key, value in vars(settings).items()}
    config |= {"classes": pretrained.classes} if pretrained.classes else {}
    config |= {"epoch": pretrained.epoch} if pretrained.epoch else {}
    write_whole(workdir / "config.json", json.dumps(config, indent=1) + "\n")


def shapes(networks: Pretrained, *, classes: int) -> dict[str, Any]:
    """The parameters that the settings call for, as shapes and dtypes, by tower; those in `networks` do not count."""
    model, grid = networks.model, networks.image_size // networks.model.patch_size
    key = jax.eval_shape(lambda: jax.random.key(0))
    patches = jax.ShapeDtypeStruct((1, grid**2, model.patch_size**2 * len(networks.mean)), np.float32)
    encoder = build_encoder(model, grid=grid)
    width = encoder.size.width
    found = dict.fromkeys(("encoder", "target_encoder"), jax.eval_shape(encoder.init, key, patches)["params"])
    found["head"] = {
        "kernel": jax.ShapeDtypeStruct((width, classes), np.float32),
        "bias": jax.ShapeDtypeStruct((classes,), np.float32),
    }
    if networks.predictor:
        predictor = build_predictor(networks.predictor, model, grid=grid)
        masks: Any = (jax.ShapeDtypeStruct((1,) * rank, dtype) for rank in (2, 3) for dtype in (np.int32, bool))
        features = jax.ShapeDtypeStruct((1, 1, width), np.float32)
        found["predictor"] = jax.eval_shape(predictor.init, key, features, Masks(*masks))["params"]
    return found


def check(found: Any, wanted: Any, what: str) -> None:
    """Raises UserError where two trees differ in names or shapes, and says which; `what` names the first."""
    has, wants = (
        {jax.tree_util.keystr(k, simple=True, separator="/"): x.shape for k, x in leaves}
        for leaves in (jax.tree_util.tree_leaves_with_path(tree) for tree in (found, wanted))
    )
    wrong = mismatches(has, wants)
    more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    require(not wrong, f"{what} does not fit the config: {'; '.join(wrong[:5])}{more}")


def mismatches(found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> list[str]:
    """Names and shapes, two times -> what is wrong with the first, an entry a name, in the order of the names."""
    wrong = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    wrong += [f"{name} is not wanted" for name in found.keys() - wanted.keys()]
    both = found.keys() & wanted.keys()
    wrong += [f"{k} is {found[k]}, not {wanted[k]}" for k in both if tuple(found[k]) != tuple(wanted[k])]
    return sorted(wrong)


def describe(path: epath.Path) -> tuple[epath.Path, dict[str, Any]]:
    """The workdir of what `load` loads, and all of its flat config.json. Raises UserError."""
    workdir, _ = _find(path)
    return workdir, _read_config(workdir / "config.json")


def _find(path: epath.Path) -> tuple[epath.Path, epath.Path]:
    """Of a workdir, or one checkpoint of it: the workdir, and the folder of the state. Raises UserError."""
    require(path.is_dir(), f"--checkpoint {path} does not exist; wanted: a workdir, or WORKDIR/checkpoints/STEP")
    path = absolute(path)
    if (path / "state").is_dir():
        return path.parent.parent, path / "state"
    folder = path / "checkpoints"
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    require(bool(steps), f"--checkpoint {path} holds no checkpoint; wanted: a workdir, or WORKDIR/checkpoints/STEP")
    return path, folder / str(max(steps)) / "state"


def _read_config(file: epath.Path) -> dict[str, Any]:
    require(file.is_file(), f"{file} is missing; a checkpoint's networks are described there")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({one_line(error)})") from None
    require(isinstance(config, dict), f"{file} is damaged: no settings by name")
    return dict(config)


def _nest(step: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """The parts of each tower where a checkpoint's state holds them."""
    state = {"step": step}
    for tower, part in parts.items():
        *above, last = TOWERS[tower]
        parent = state
        for key in above:
            parent = parent.setdefault(key, {})
        parent[last] = part
    return state


def _part(tree: Any, tower: str, state: epath.Path | None = None) -> Any:
    """One tower of a state; where it lacks it, UserError about the folder of the state, or None without one."""
    for key in TOWERS[tower]:
        if key not in tree:
            require(state is None, f"checkpoint {state and state.parent} has no {tower}")
            return None
        tree = tree[key]
    return tree


@contextlib.contextmanager
def _reading(state: epath.Path) -> Iterator[None]:
    """Whatever goes wrong in reading a checkpoint's state becomes a UserError."""
    try:
        with quiet_on_error():
            yield
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
        raise UserError(f"checkpoint {state.parent} cannot be read ({one_line(error)[:300]})") from error


def _metadata(state: epath.Path) -> Any:
    """The state's tree of shapes and dtypes."""
    metadata = ocp.PyTreeCheckpointer().metadata(state).item_metadata
    require(metadata is not None, f"checkpoint {state.parent} cannot be read: its metadata is damaged")
    return metadata.tree
