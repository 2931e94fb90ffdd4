"""Turns tensors by name, as a file of PyTorch holds them, into our networks, and back.

The names and shapes of a file's tensors are checked before any tensor is used. Sizes
are read off the tensors; `ImportOptions` says what the tensors do not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, PyTree

from cjepa_jax import pretrained
from cjepa_jax.errors import UserError, require
from cjepa_jax.interop.torch_names import Names, from_torch, tensor_names, to_torch
from cjepa_jax.models.vit import SIZES, sincos_positions
from cjepa_jax.pretrained import ENCODERS, Pretrained

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POSITIONS_TOLERANCE = 1e-5  # they are at most 1; float32 rounds them to 6e-8

Tensors = Mapping[str, np.ndarray]


class ImportOptions(NamedTuple):
    """Says what a file may leave open; each field is a flag of the command."""

    num_heads: int | None = None  # by default, the size table's for the width
    mean: tuple[float, ...] | None = None  # by default, ImageNet's
    std: tuple[float, ...] | None = None
    image_size: tuple[int, int] | None = None  # height and width, which only a file can say; by default, a square


class OpenedCheckpoint(NamedTuple):
    """Describes a checkpoint that has been opened: what it holds, and a function that loads it."""

    kind: str  # the name of its format
    networks: tuple[str, ...]  # keys of pretrained.NETWORKS; an encoder that is alone is the target encoder
    load: Callable[[Sequence[str]], Pretrained]  # loads the networks of these names; may be called once only


def merge_options(path: epath.Path, options: ImportOptions, known: Mapping[str, Any]) -> ImportOptions:
    """Merges what the flags say with `known`, what the file says.

    The flags' mean and std count, as files are known that say wrong ones. Raises UserError where other things differ.
    """
    known = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
    for key, value in known.items():
        numbers = (value,) if key == "num_heads" else value
        are_numbers = isinstance(numbers, tuple) and all(type(x) in (int, float) for x in numbers)
        require(are_numbers, f"--input {path} is damaged: it says {key} = {str(value)[:100]}")
        are_sizes = key != "image_size" or (len(numbers) == 2 and all(type(x) is int and x > 0 for x in numbers))
        require(are_sizes, f"--input {path} is damaged: it says {key} = {str(value)[:100]}, no height and width")
        said = getattr(options, key)
        flag = key.replace("_", "-")
        fits = said in (None, value) or key in ("mean", "std")
        require(fits, f"--{flag} = {said}, but --input {path} says {value}: leave the flag out")
    return options._replace(**{key: value for key, value in known.items() if getattr(options, key) is None})


def assemble(
    file: str, tensors: Mapping[str, dict[str, np.ndarray]], names: Mapping[str, Names], options: ImportOptions
) -> Pretrained:
    """Builds the networks from the tensors of each, and takes the tensors out of their dicts.

    `tensors` and `names` have the names of the networks as keys. Messages begin with `file`.

    Raises UserError, which lists by name the tensors that are missing, not wanted or of another shape; and for
    positions other than the fixed sin-cos ones.
    """
    first = next(network for network in ENCODERS if network in tensors)
    settings = _describe(file, tensors[first], names[first], options)
    if "predictor" in tensors:
        width, depth, _, _ = _outline(f"{file}: predictor", tensors["predictor"], names["predictor"])
        settings |= {"predictor.width": width, "predictor.depth": depth}
    networks = pretrained.outline(settings, file)
    classes = len(tensors["head"].get(tensor_names("bias", names["head"])[0], ())) if "head" in tensors else 0
    shapes = pretrained.shapes(networks, classes=classes)
    templates = {
        network: jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes[network]) for network in tensors
    }
    wrong = []
    for network, found in tensors.items():
        wanted = to_tensors(templates[network], names[network], networks)
        has, wants = ({name: x.shape for name, x in some.items()} for some in (found, wanted))
        wrong += [f"{network}: {problem}" for problem in pretrained.mismatches(has, wants)]
    more = f", and {len(wrong) - 20} more" if len(wrong) > 20 else ""
    require(not wrong, f"{file} does not hold what it should: {'; '.join(wrong[:20])}{more}")
    for network, found in tensors.items():
        for name, x in found.items():
            require(bool(np.isfinite(x).all()), f"{file}: {network}: {name} holds numbers that are not finite")
        for name, ours in positions(templates[network], names[network], networks).items():
            difference = float(np.abs(found[name] - ours).max())
            require(
                difference <= POSITIONS_TOLERANCE,
                f"{file}: {network}: {name} differs from the fixed sin-cos positions by up to {difference:.2g}; a "
                "network with other positions cannot be converted",
            )
    params = {
        network: from_torch(x, templates[network], names[network], networks.model.patch_size)
        for network, x in tensors.items()
    }
    return networks._replace(params=params)


def to_tensors(params: PyTree, names: Names, networks: Pretrained) -> dict[str, np.ndarray]:
    """Returns the tensors of one network by name, positions included; they are views where that is possible."""
    return to_torch(params, names, networks.model.patch_size) | positions(params, names, networks)


def to_contiguous_tensors(params: PyTree, names: Names, networks: Pretrained) -> dict[str, np.ndarray]:
    """Returns what `to_tensors` does, as contiguous float32 copies for a file.

    Empties the tree on the way, so that no more than one copy of the parameters is in memory.
    """
    tensors = positions(params, names, networks)
    leaves = flatten_dict(params, sep="/")
    params.clear()
    while leaves:
        one = dict([leaves.popitem()])
        named = to_torch(unflatten_dict(one, sep="/"), names, networks.model.patch_size)
        tensors |= {name: np.ascontiguousarray(x, np.float32) for name, x in named.items()}
        one.clear()
    return tensors


def positions(params: PyTree, names: Names, networks: Pretrained) -> dict[str, Float[np.ndarray, "1 N D"]]:
    """Returns the position embedding of one network by its name, or an empty dict where it has none."""
    if not names.positions:
        return {}
    return {names.positions: sincos_positions(params["embed"]["bias"].size, networks.grid)[None]}


def _describe(file: str, tensors: Tensors, names: Names, options: ImportOptions) -> dict[str, Any]:
    """Reads the encoder's flat settings off the shapes of its tensors."""
    width, depth, hidden, count = _outline(file, tensors, names)
    channels, patch = _shape(file, tensors, tensor_names("embed/kernel", names)[0], 4)[1:3]
    size = _size(file, width, depth, hidden, options.num_heads)
    mean, std = options.mean or IMAGENET_MEAN, options.std or IMAGENET_STD
    require(
        len(mean) == len(std) == channels,
        f"{file}: images have {channels} channels; give --mean and --std with as many numbers",
    )
    height, image_width = options.image_size or 2 * (math.isqrt(count) * patch,)
    if options.image_size is None:
        require(
            height**2 == count * patch**2, f"{file}: {names.positions} has {count} positions, which are not a square"
        )
    require(
        height % patch == image_width % patch == 0 and height * image_width == count * patch**2,
        f"{file} is damaged: images of {height} x {image_width} pixels do not have {count} patches of {patch} pixels",
    )
    settings: dict[str, Any] = {"data.image_size": height, "data.mean": mean, "data.std": std}
    settings |= {} if image_width == height else {"data.image_width": image_width}
    return settings | {"model.size": size, "model.patch_size": patch, "model.init": "normal", "model.dtype": "float32"}


def _outline(file: str, tensors: Tensors, names: Names) -> tuple[int, int, int, int]:
    """Reads the width, the depth, the MLP's width and the number of patches of an encoder or a predictor."""
    width = _shape(file, tensors, tensor_names("embed/bias", names)[0], 1)[0]
    hidden = _shape(file, tensors, tensor_names("block00/fc1/bias", names)[0], 1)[0]
    blocks = {name.removeprefix(names.blocks).split(".")[0] for name in tensors if name.startswith(names.blocks)}
    positions = _shape(file, tensors, names.positions, 3)
    wanted = (1, positions[1], width)  # before an embedding of this size is computed to compare with
    require(positions == wanted, f"{file}: {names.positions} is {positions}, and should be {wanted}")
    return width, len(blocks), hidden, positions[1]


def _shape(file: str, tensors: Tensors, name: str, rank: int) -> tuple[int, ...]:
    require(name in tensors, f"{file}: {name} is missing")
    shape = tensors[name].shape
    require(len(shape) == rank and min(shape) > 0, f"{file}: {name} is {shape}, and should have {rank} axes")
    return tuple(shape)


def _size(file: str, width: int, depth: int, hidden: int, heads: int | None) -> str:
    """Returns a name of the size table, or else WIDTHxDEPTHxHEADS[xMLP_RATIO]."""
    if heads is None:
        usual = {size.width: size.heads for size in SIZES.values()}
        if width not in usual:
            raise UserError(f"{file} does not say how many heads its width of {width} has: give --num-heads=N")
        heads = usual[width]
    for name, size in SIZES.items():
        if (width, depth, heads, hidden) == (size.width, size.depth, size.heads, round(size.width * size.mlp_ratio)):
            return name
    return f"{width}x{depth}x{heads}" + (f"x{hidden / width!r}" if hidden != 4 * width else "")


def class_count(networks: Pretrained) -> int:
    """Returns the number of classes of the head, or 0 where there is no head."""
    return len(networks.params["head"]["bias"]) if "head" in networks.params else 0


def check_float32(path: epath.Path, kinds: Mapping[str, str], wanted: str) -> None:
    """Raises UserError, which lists the tensors whose type is not `wanted`; `kinds` has types by name of tensor."""
    wrong = [f"{name} is {kind}" for name, kind in kinds.items() if kind != wanted]
    more = f", and {len(wrong) - 20} more" if len(wrong) > 20 else ""
    require(not wrong, f"--input {path} must hold float32 only: {'; '.join(wrong[:20])}{more}")
