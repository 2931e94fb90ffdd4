"""Holds one table of names and layouts: those of our parameters, and of the same in PyTorch's checkpoints.

Our trees have paths such as "block00/qkv/kernel". The leaves of such paths correspond to PyTorch's as follows:

    kernel   [in, out]      weight [out, in]; that of the patch embedding is [D, C, p, p], ours is [p * p * C, D]
    scale    [D]            weight [D]
    bias     [D]            bias [D]

I-JEPA's release and timm name the parameters of an encoder alike. transformers keeps query, key and
value apart; the names here are those in its files, which all its versions read.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree


class Names(NamedTuple):
    """Says how a format names the parameters of one network."""

    modules: Mapping[str, str]  # our module, or leaf, outside the blocks -> theirs
    blocks: str = ""  # what stands before the number of a block
    block: Mapping[str, tuple[str, ...]] = {}  # our module inside a block -> theirs
    positions: str = ""  # the name of the position embedding, which our networks compute instead of storing it
    image: bool = False  # whether its embedding takes patches of an image


_BLOCK = {name: (name,) for name in ("norm1", "norm2")} | {
    "qkv": ("attn.qkv",),
    "proj": ("attn.proj",),
    "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
}
ENCODER = Names({"embed": "patch_embed.proj", "norm": "norm"}, "blocks.", _BLOCK, "pos_embed", image=True)
PREDICTOR = Names(
    {"embed": "predictor_embed", "norm": "predictor_norm", "head": "predictor_proj", "mask_token": "mask_token"},
    "predictor_blocks.",
    _BLOCK,
    "predictor_pos_embed",
)
TIMM_HEAD = Names({"": "head"})
TRANSFORMERS = Names(
    {"embed": "embeddings.patch_embeddings.projection", "norm": "layernorm"},
    "encoder.layer.",
    {
        "norm1": ("layernorm_before",),
        "qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
        "proj": ("attention.output.dense",),
        "norm2": ("layernorm_after",),
        "fc1": ("intermediate.dense",),
        "fc2": ("output.dense",),
    },
    "embeddings.position_embeddings",
    image=True,
)
TRANSFORMERS_HEAD = Names({"": "classifier"})


def to_torch(params: PyTree, names: Names, patch_size: int) -> dict[str, np.ndarray]:
    """Returns the tensors of our tree of one network by their names in PyTorch; they are views where possible.

    The position embedding is not among them.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        theirs = tensor_names(path, names)
        forth, _ = _layout(path, names, patch_size)
        tensors |= zip(theirs, np.split(forth(leaf), len(theirs)), strict=True)
    return tensors


def from_torch(tensors: dict[str, np.ndarray], like: PyTree, names: Names, patch_size: int) -> PyTree:
    """Does the inverse of `to_torch`: returns the tree that has the paths of `like`.

    Takes the tensors out of the dict, so that none is kept in memory twice.
    """
    leaves = {}
    for path in flatten_dict(like, sep="/"):
        parts = [tensors.pop(name) for name in tensor_names(path, names)]
        _, back = _layout(path, names, patch_size)
        leaves[path] = back(parts[0] if len(parts) == 1 else np.concatenate(parts))
    return unflatten_dict(leaves, sep="/")


def tensor_names(path: str, names: Names) -> tuple[str, ...]:
    """Returns the name in PyTorch of our leaf at `path`, or the names of its parts along their first axis."""
    if path in names.modules:
        return (names.modules[path],)
    module, _, leaf = path.rpartition("/")
    block, _, inside = module.partition("/")
    if inside:
        theirs = [f"{names.blocks}{int(block.removeprefix('block'))}.{name}" for name in names.block[inside]]
    else:
        theirs = [names.modules[module]]
    return tuple(f"{name}.{'bias' if leaf == 'bias' else 'weight'}" for name in theirs)


def _layout(path: str, names: Names, patch_size: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Returns two functions: one brings a leaf's axes into PyTorch's order, the other brings them back."""
    if path == "embed/kernel" and names.image:
        p = {"p": patch_size, "q": patch_size}
        ours, theirs = "(p q c) d", "d c p q"
        return lambda x: rearrange(x, f"{ours} -> {theirs}", **p), lambda x: rearrange(x, f"{theirs} -> {ours}", **p)
    if path.endswith("kernel"):
        return np.transpose, np.transpose
    return np.asarray, np.asarray
