"""The networks of a checkpoint without the rest of its training: for evaluation, fine-tuning, conversion, new runs."""

import contextlib
import hashlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from cjepa_jax import checksums
from cjepa_jax.config import Data, Grid, Model, grid_of
from cjepa_jax.errors import UserError, nearest, one_line, require
from cjepa_jax.files import absolute, check_bucket_support, is_file, is_remote, read_json, storing, write_whole
from cjepa_jax.models.masking import Masks
from cjepa_jax.models.predictor import PredictorConfig, build_predictor
from cjepa_jax.models.vit import build_encoder
from cjepa_jax.settings import parse_flat
from cjepa_jax.train.checkpoint import META, read_meta
from cjepa_jax.train.orbax import quiet_on_error, reader, saved_steps

# Where a checkpoint's state holds each network: now, and in checkpoints written before states had "averages".
NETWORKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "encoder": (("params", "encoder"),),
    "predictor": (("params", "predictor"),),
    "projector": (("params", "projector"),),
    "head": (("params", "head"),),
    "target_encoder": (("averages", "target_encoder"), ("target_params",)),
    "ema_encoder": (("averages", "ema_encoder"), ("ema_params", "encoder")),  # of a fine-tuned network
    "ema_head": (("averages", "ema_head"), ("ema_params", "head")),
}
_ESSENTIAL = ("model.size", "model.patch_size", "model.init", "data.image_size", "data.mean", "data.std")
ENCODERS = ("target_encoder", "encoder")  # the first is what features are taken from


class Pretrained(NamedTuple):
    """Networks, and what it takes to run them."""

    model: Model
    predictor: PredictorConfig | None  # its width and depth, where the checkpoint has one
    image_size: int  # pixels per side, or of height, in training
    mean: tuple[float, ...]  # per channel, of values in [0, 1]
    std: tuple[float, ...]
    step: int
    params: dict[str, Any]  # name of a network -> its parameters, NumPy arrays
    classes: tuple[str, ...] = ()  # of the head, where they have names
    epoch: int = 0  # of an imported checkpoint, which does not know its step
    image_width: int = 0  # pixels; 0: the images are square

    @property
    def image_shape(self) -> tuple[int, int]:
        """Gives height and width of the images in training, in pixels."""
        return self.image_size, self.image_width or self.image_size

    @property
    def is_square(self) -> bool:
        """Tells whether these images are square."""
        height, width = self.image_shape
        return height == width

    @property
    def grid(self) -> Grid:
        """Gives the numbers of rows and columns of patches of these images."""
        return grid_of(self.image_shape, self.model.patch_size)


def load(path: epath.Path, names: Sequence[str], *, flag: str = "--checkpoint") -> Pretrained:
    """Loads networks (keys of NETWORKS) of a workdir's newest checkpoint, or of the one at WORKDIR/checkpoints/STEP.

    Nothing else is read, and no device is touched. Raises UserError for a path that is not a checkpoint, one that
    cannot be read, and a network that it lacks; `flag` is what the user gave the path by.
    """
    workdir, state = _find(epath.Path(path), flag)
    file = workdir / "config.json"
    config = _read_config(file)
    networks = outline(config, f"{file} is damaged")
    classes, epoch = config.get("classes", []), config.get("epoch", 0)
    are_names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    require(are_names, f"{file} is damaged: classes must be a list of names")
    require(type(epoch) is int and epoch >= 0, f"{file} is damaged: epoch must be a number of epochs")
    with _reading(state):
        tree = _metadata(state)
        places = {name: _place(tree, name, state) for name in names}
        item = _nest(tree["step"], {place: _part(tree, place) for place in places.values()})
        item = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), item)
        _check_size(item, state)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        restored = reader(ocp.PyTreeCheckpointHandler).restore(state, args=arguments)
        wanted = read_meta(state.parent).get("checksums")  # which older checkpoints do not have
    wrong = "" if wanted is None else checksums.differences(checksums.of_tree(restored), wanted)
    require(not wrong, f"checkpoint {state.parent} is damaged: {wrong}; name another one, WORKDIR/checkpoints/STEP")
    params = {name: _part(restored, place) for name, place in places.items()}
    step = np.asarray(restored["step"])
    require(
        step.shape == () and step.dtype.kind == "i", f"checkpoint {state.parent} is damaged: its step is not a number"
    )
    return networks._replace(step=int(step), params=params, classes=tuple(classes), epoch=epoch)


def outline(config: Mapping[str, Any], what: str) -> Pretrained:
    """Describes networks by flat settings, such as config.json has them; the result has no parameters yet.

    Raises UserError, which begins with `what`, where a setting is missing or out of its range.
    """
    for key in _ESSENTIAL:  # they were always there, so no default stands for what was meant
        require(config.get(key) is not None, f"{what}: {key} is missing")
    images = {key: config[key] for key in _ESSENTIAL if key.startswith("data.")}
    images |= {"data.image_width": config.get("data.image_width", 0)}
    try:
        data = parse_flat({"data.source": "folder"} | images, Data, "data.")
        model = parse_flat(config, Model, "model.")
        predictor = parse_flat(config, PredictorConfig, "predictor.") if "predictor.width" in config else None
        require(model.patch_size > 0, "model.patch_size must be in [1, 1024], got 0")
        networks = Pretrained(
            model, predictor, data.image_size, data.mean, data.std, 0, {}, image_width=data.image_width
        )
        shortest = "image_size" if min(networks.grid) == networks.grid[0] else "image_width"
        require(
            min(networks.grid) > 0,
            f"model.patch_size = {model.patch_size} is more than data.{shortest} = {getattr(data, shortest)}",
        )
        build_encoder(model, grid=networks.grid)
        if predictor:
            build_predictor(predictor, model, grid=networks.grid)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    return networks


def available(path: epath.Path, *, flag: str = "--checkpoint") -> tuple[str, ...]:
    """Lists the networks that `load` can give and that have parameters. Raises UserError as `load` does."""
    _, state = _find(epath.Path(path), flag)
    with _reading(state):
        tree = _metadata(state)
    places = {name: _place(tree, name) for name in NETWORKS}
    return tuple(name for name, place in places.items() if place and jax.tree.leaves(_part(tree, place)))


def choose_encoder(path: epath.Path, wanted: str | None) -> str:
    """Gives the encoder that --encoder names, or the first of ENCODERS that a checkpoint has. Raises UserError."""
    has = available(path)
    chosen = wanted or next((name for name in ENCODERS if name in has), ENCODERS[0])
    require(chosen in ENCODERS, f"--encoder {chosen!r} is not known; {nearest(chosen, ENCODERS)}")
    return chosen


def digest(params: PyTree) -> str:
    """Gives a fingerprint of parameters: the first 16 hexadecimal digits of a SHA-256 of their values."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        found.update(np.ascontiguousarray(leaf).data)
    return found.hexdigest()[:16]


def save(workdir: epath.Path, pretrained: Pretrained, *, crop_fraction: float | None = None) -> None:
    """Writes what `load` reads; `workdir` must not exist yet. Needs about 1.3 times the memory of the parameters.

    crop_fraction: how images are cropped for evaluation, where it is known.
    """
    parts = {NETWORKS[name][0]: params for name, params in pretrained.params.items()}
    state = _nest(np.asarray(pretrained.step, np.int32), parts)
    folder = absolute(workdir) / "checkpoints" / str(pretrained.step)
    with storing(folder, sum(x.nbytes for x in jax.tree.leaves(state))):
        # Without OCDBT, which would collect everything in memory once more.
        ocp.PyTreeCheckpointer(use_ocdbt=False).save(folder / "state", state)
    (folder / META).parent.mkdir(exist_ok=True)
    write_whole(folder / META, json.dumps({"checksums": checksums.of_tree(state)}))
    config = {f"data.{key}": getattr(pretrained, key) for key in ("image_size", "image_width", "mean", "std")}
    for name in ("model", "predictor"):
        if (settings := getattr(pretrained, name)) is not None:
            config |= {f"{name}.{key}": value for key, value in vars(settings).items()}
    config |= {"classes": pretrained.classes} if pretrained.classes else {}
    config |= {"epoch": pretrained.epoch} if pretrained.epoch else {}
    config |= {"eval.crop_fraction": crop_fraction} if crop_fraction else {}
    write_whole(workdir / "config.json", json.dumps(config, indent=1) + "\n")


def shapes(networks: Pretrained, *, classes: int) -> dict[str, Any]:
    """Gives the parameters that the settings call for, not those in `networks`, as shapes and dtypes, by network."""
    model, grid = networks.model, networks.grid
    key = jax.eval_shape(lambda: jax.random.key(0))
    patches = jax.ShapeDtypeStruct((1, math.prod(grid), model.patch_size**2 * len(networks.mean)), np.float32)
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


def check(found: PyTree, wanted: PyTree, what: str) -> None:
    """Raises UserError where two trees differ in names or shapes, and says which; `what` names the first."""
    has, wants = (
        {jax.tree_util.keystr(k, simple=True, separator="/"): x.shape for k, x in leaves}
        for leaves in (jax.tree_util.tree_leaves_with_path(tree) for tree in (found, wanted))
    )
    wrong = mismatches(has, wants)
    more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    require(not wrong, f"{what} does not fit the config: {'; '.join(wrong[:5])}{more}")


def mismatches(found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> list[str]:
    """Lists by name what is wrong with the names and shapes in `found`, against those in `wanted`."""
    wrong = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    wrong += [f"{name} is not wanted" for name in found.keys() - wanted.keys()]
    both = found.keys() & wanted.keys()
    wrong += [f"{k} is {found[k]}, not {wanted[k]}" for k in both if tuple(found[k]) != tuple(wanted[k])]
    return sorted(wrong)


def describe(path: epath.Path) -> tuple[epath.Path, dict[str, Any]]:
    """Returns the workdir of what `load` loads, and all of its flat config.json. Raises UserError."""
    workdir, _ = _find(epath.Path(path), "--checkpoint")
    return workdir, _read_config(workdir / "config.json")


def _find(path: epath.Path, flag: str) -> tuple[epath.Path, epath.Path]:
    """Returns the workdir and the folder of the state, for a workdir or one checkpoint of it. Raises UserError."""
    wanted = "wanted: a workdir, or WORKDIR/checkpoints/STEP"
    check_bucket_support(path, flag)
    require(path.exists(), f"{flag} {path} does not exist; {wanted}")
    require(path.is_dir(), f"{flag} {path} is not a folder; {wanted}")
    path = absolute(path)
    if (path / "state").is_dir():
        return path.parent.parent, path / "state"
    steps = saved_steps(path)
    require(bool(steps), f"{flag} {path} holds no checkpoint; {wanted}")
    return path, path / "checkpoints" / str(max(steps)) / "state"


def _read_config(file: epath.Path) -> dict[str, Any]:
    require(is_file(file), f"{file} is missing; a checkpoint's networks are described there")
    return read_json(file)


def _check_size(item: PyTree, state: epath.Path) -> None:
    """Raises UserError where arrays claim far more than their files can hold; parameters hardly compress."""
    if not is_remote(state):
        claimed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(item))
        held = sum(file.stat().st_size for file in pathlib.Path(state).rglob("*") if file.is_file())
        require(
            claimed <= 100 * held + 2**26,
            f"checkpoint {state.parent} is damaged: {claimed} bytes of arrays cannot come from files of {held}",
        )


def _nest(step: Any, parts: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Builds a state that holds each part at its place."""
    state = {"step": step}
    for place, part in parts.items():
        *above, last = place
        parent = state
        for key in above:
            parent = parent.setdefault(key, {})
        parent[last] = part
    return state


def _place(tree: PyTree, name: str, state: epath.Path | None = None) -> tuple[str, ...]:
    """Finds a network in a state; where it is lacking, raises UserError about the state's folder, or gives ()."""
    for place in NETWORKS[name]:
        inside = tree
        for key in place:
            inside = inside.get(key) if isinstance(inside, Mapping) else None
        if inside is not None:
            return place
    require(state is None, f"checkpoint {state and state.parent} has no {name}")
    return ()


def _part(tree: PyTree, place: Sequence[str]) -> PyTree:
    for key in place:
        tree = tree[key]
    return tree


@contextlib.contextmanager
def _reading(state: epath.Path) -> Iterator[None]:
    """Turns whatever goes wrong in reading the state of a checkpoint into a UserError."""
    try:
        with quiet_on_error():
            yield
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
        raise UserError(f"checkpoint {state.parent} cannot be read ({one_line(error)[:300]})") from error


def _metadata(state: epath.Path) -> PyTree:
    """Reads the tree of shapes and dtypes of the state."""
    metadata = ocp.PyTreeCheckpointer().metadata(state).item_metadata
    require(metadata is not None, f"checkpoint {state.parent} cannot be read: its metadata is damaged")
    return metadata.tree
