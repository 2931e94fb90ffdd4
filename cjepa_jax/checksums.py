"""Computes checksums of arrays on the host or on devices; an array has the same checksum whole and sharded.

A checksum is the sum, modulo 2^32, of a hash of each element's bits and its position. A single changed element changes
its term, and thereby the sum, for certain; any other damage goes unnoticed with a chance of 2^-32. Sums of integers do
not depend on their order, so that every layout, mesh and number of processes gives the same checksum.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cjepa_jax.errors import one_line

_ODD = 0x9E3779B1  # an odd number without pattern, by which a product modulo 2^32 loses no bit
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_BLOCK = 1 << 18  # elements that fit a processor's cache


def of_tree(tree: PyTree) -> dict[str, int]:
    """Gives the checksum of each leaf by its path, such as "params/encoder/norm/scale".

    Leaves are arrays of JAX, whose checksums the devices compute where the arrays are, or of NumPy. All processes that
    hold shards call this together, and all get the same.
    """
    sums: dict[str, int] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        # One after another: many programs at once that sum over all devices can block one another on CPUs.
        number = int(jax.device_get(_on_device(x))) if isinstance(x, jax.Array) else _of(x)
        sums[jax.tree_util.keystr(path, simple=True, separator="/")] = number
    return sums


def differences(found: Mapping[str, int], wanted: Mapping[str, int]) -> str:
    """Says which arrays differ from their checksums, or have none; "" where all of those in `found` are right."""
    if not isinstance(wanted, Mapping):
        return "its checksums cannot be read"
    wrong = [name for name, number in found.items() if wanted.get(name) != number]
    if not wrong:
        return ""
    more = f" and {len(wrong) - 1} more of {len(found)} do" if len(wrong) > 1 else f", 1 of {len(found)}, does"
    return one_line(f"array {wrong[0]}{more} not match the saved checksum")


def _mix(bits: Any, position: Any) -> Any:
    """Hashes 32-bit words by MurmurHash3's finaliser; for a given position no two words have the same hash."""
    mixed = bits ^ (position * np.uint32(_ODD))
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return mixed ^ (mixed >> np.uint32(16))


@jax.jit
def _on_device(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.uint8) if x.dtype == bool else x, _UNSIGNED[x.dtype.itemsize])
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):  # not flattened, because a sharded array would be gathered for that
        stride = np.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
    return _mix(bits.astype(jnp.uint32), position).sum(dtype=jnp.uint32)


def _of(x: Any) -> int:
    array = np.ascontiguousarray(x)
    bits = array.reshape(-1).view(_UNSIGNED[array.dtype.itemsize])
    total = 0
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK].astype(np.uint32)
        position = np.arange(start, start + block.size, dtype=np.uint64).astype(np.uint32)
        total += int(_mix(block, position).sum(dtype=np.uint64))
    return total % 2**32
