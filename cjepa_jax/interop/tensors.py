"""Tensors by name, as a file of PyTorch holds them <-> our networks.

What a file holds is checked by name and shape before anything of it is used. Sizes
are read off the tensors; what these do not say is `Given`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from cjepa_jax import pretrained
from cjepa_jax.config import Model, Predictor, UserError, require
from cjepa_jax.interop.torch_names import Names, from_torch, spell, to_torch
from cjepa_jax.models.vit import SIZES, sincos_positions
from cjepa_jax.pretrained import ENCODERS, Pretrained

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POSITIONS_TOLERANCE = 1e-5  # they are at most 1; float32 rounds them to 6e-8

Tensors = Mapping[str, np.ndarray]


class Given(NamedTuple):
    """What a file may leave open, by the flags that say it."""

    num_heads: int | None = None  # by default those of the size table, by the width
    mean: tuple[float, ...] | None = None  # ImageNet's
    std: tuple[float, ...] | None = None


class Source(NamedTuple):
    """A checkpoint that has been opened."""

    kind: str
    towers: tuple[str, ...]  # keys of pretrained.TOWERS; an encoder that is alone is the target encoder
    load: Callable[[Sequence[str]], Pretrained]  # of these towers; once, for the tensors are given away


def assemble(
    file: str, tensors: Mapping[str, dict[str, np.ndarray]], names: Mapping[str, Names], given: Given
) -> Pretrained:
    """The networks, from the tensors of each tower, which are taken out of their dicts.

    Raises UserError, which begins with `file`, and lists by name what is missing,
    not wanted or of another shape; and for positions that are not ours.
    """
    first = next(tower for tower in ENCODERS if tower in tensors)
    networks = _describe(file, tensors[first], names[first], given)
    if "predictor" in tensors:
        width, depth, _ = _outline(f"{file}: predictor", tensors["predictor"], names["predictor"])
        networks = networks._replace(predictor=Predictor(width=width, depth=depth))
    classes = len(tensors["head"].get(spell("bias", names["head"])[0], ())) if "head" in tensors else 0
    shapes = pretrained.shapes(networks, classes=classes)
    likes = {tower: jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes[tower]) for tower in tensors}
    wrong = []
    for tower, found in tensors.items():
        wanted = spell_out(likes[tower], names[tower], networks)
        has, wants = ({name: x.shape for name, x in some.items()} for some in (found, wanted))
        wrong += [f"{tower}: {problem}" for problem in pretrained.mismatches(has, wants)]
    require(not wrong, f"{file} does not hold what it should: {'; '.join(wrong)}")
    for tower, found in tensors.items():
        for name, ours in positions(likes[tower], names[tower], networks).items():
            difference = float(np.abs(found[name] - ours).max())
            require(
                difference <= POSITIONS_TOLERANCE,
                f"{file}: {tower}: {name} differs from the fixed sin-cos positions by up to {difference:.2g}; a "
                "network with other positions cannot be converted",
            )
    params = {
        tower: from_torch(x, likes[tower], names[tower], networks.model.patch_size) for tower, x in tensors.items()
    }
    return networks._replace(params=params)


def spell_out(params: Any, names: Names, networks: Pretrained) -> dict[str, np.ndarray]:
    """The tensors of one tower, positions included; views where that is possible."""
    return to_torch(params, names, networks.model.patch_size) | positions(params, names, networks)


def give(params: Any, names: Names, networks: Pretrained) -> dict[str, np.ndarray]:
    """`spell_out` in contiguous copies, for a file; empties the tree on the way, to need no more memory than that."""
    tensors = positions(params, names, networks)
    leaves = flatten_dict(params, sep="/")
    params.clear()
    while leaves:
        one = dict([leaves.popitem()])
        spelled = to_torch(unflatten_dict(one, sep="/"), names, networks.model.patch_size)
        tensors |= {name: np.ascontiguousarray(x, np.float32) for name, x in spelled.items()}
        one.clear()
    return tensors


def positions(params: Any, names: Names, networks: Pretrained) -> dict[str, np.ndarray]:
    """The position embedding of one tower, [1, N, D] by its name, where it has one."""
    if not names.positions:
        return {}
    grid = networks.image_size // networks.model.patch_size
    return {names.positions: sincos_positions(params["embed"]["bias"].size, grid)[None]}


def _describe(file: str, tensors: Tensors, names: Names, given: Given) -> Pretrained:
    """The encoder's settings, from the shapes of its tensors."""
    width, depth, hidden = _outline(file, tensors, names)
    channels, patch = _shape(file, tensors, spell("embed/kernel", names)[0], 4)[1:3]
    patches = _shape(file, tensors, names.positions, 3)[1]
    grid = round(patches**0.5)
    require(grid**2 == patches, f"{file}: {names.positions} has {patches} positions, which are no square")
    size = _size(file, width, depth, hidden, given.num_heads)
    model = Model(size=size, patch_size=patch, init="normal", dtype="float32", layers="unrolled", remat="none")
    mean, std = given.mean or IMAGENET_MEAN, given.std or IMAGENET_STD
    require(
        len(mean) == len(std) == channels,
        f"{file}: images have {channels} channels; give --mean and --std with as many numbers",
    )
    return Pretrained(model, None, grid * patch, mean, std, 0, {})


def _outline(file: str, tensors: Tensors, names: Names) -> tuple[int, int, int]:
    """Width, depth and the MLP's width of an encoder or a predictor."""
    width = _shape(file, tensors, spell("embed/bias", names)[0], 1)[0]
    hidden = _shape(file, tensors, spell("block00/fc1/bias", names)[0], 1)[0]
    blocks = {name.removeprefix(names.blocks).split(".")[0] for name in tensors if name.startswith(names.blocks)}
    return width, len(blocks), hidden


def _shape(file: str, tensors: Tensors, name: str, rank: int) -> tuple[int, ...]:
    require(name in tensors, f"{file}: {name} is missing")
    shape = tensors[name].shape
    require(len(shape) == rank, f"{file}: {name} is {shape}, and should have {rank} axes")
    return shape


def _size(file: str, width: int, depth: int, hidden: int, heads: int | None) -> str:
    """The name of the size table, or WIDTHxDEPTHxHEADS[xRATIO]."""
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
    """Of the head, 0 without one."""
    return len(networks.params["head"]["bias"]) if "head" in networks.params else 0


def check_float32(path: epath.Path, kinds: Mapping[str, str], wanted: str) -> None:
    """Of dtypes by the names of the tensors. Raises UserError that lists those that are not `wanted`."""
    wrong = [f"{name} is {kind}" for name, kind in kinds.items() if kind != wanted]
    require(not wrong, f"--input {path} must hold float32 only: {'; '.join(wrong)}")
