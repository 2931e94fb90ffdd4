"""The mesh, and where every array lives; no other file knows axis names.

The batch is split over both axes. Parameters, their moments and their average are
whole on every device, or cut over `fsdp` and repeated over `data`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from cjepa_jax.config import Mesh as MeshConfig
from cjepa_jax.errors import require

Place = Callable[[PyTree], PyTree]  # puts a tree of arrays where they are wanted; the values stay
_DATA, _FSDP = "data", "fsdp"
SHARDS = 16  # where mesh.fsdp leaves it open: most parameters of every size can be cut into so many that tile
_TILE = (8, 128)  # of a float32 array in a TPU's memory; a shard of other sizes would be padded to it


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the given devices, by default all of all processes, as data x fsdp.

    Raises UserError where they do not make such a grid.
    """
    devices = jax.devices() if devices is None else devices
    cuts = config.parameters != "replicated" and len(devices) % SHARDS == 0
    shards = config.fsdp or (SHARDS if cuts else 1)
    require(len(devices) % shards == 0, f"mesh.fsdp = {shards} does not divide the {len(devices)} devices")
    shape = len(devices) // shards, shards
    # 4 x 16 on a torus of 8 x 8: an axis of the mesh may take a part of a physical one.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, (_DATA, _FSDP), axis_types=(AxisType.Auto,) * 2)


def check_batch(batch_size: int, microbatches: int, mesh: Mesh) -> None:
    """Raises UserError where the devices cannot share the batch, or a microbatch of it, evenly."""
    require(batch_size % mesh.size == 0, f"data.batch_size = {batch_size} is not divisible by the {mesh.size} devices")
    require(
        batch_size % (max(1, microbatches) * mesh.size) == 0,
        f"optim.microbatches = {microbatches}: data.batch_size = {batch_size} is not divisible by so many parts on "
        f"{mesh.size} devices",
    )


def batch(mesh: Mesh) -> NamedSharding:
    """Gives the sharding whose first axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec((_DATA, _FSDP)))


def per_device(mesh: Mesh) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function run on each device's own rows: the first axis of all that it takes and gives is the batch."""
    rows = PartitionSpec((_DATA, _FSDP))
    return functools.partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)


def local_rows(images: jax.ShapeDtypeStruct) -> list[int]:
    """Lists the rows of a global array that this process's devices hold, ascending; a mesh may interleave processes."""
    held = images.sharding.addressable_devices_indices_map(images.shape).values()  # type: ignore[union-attr]
    return sorted({row for index in held for row in range(*index[0].indices(images.shape[0]))})


def from_local_rows(rows: np.ndarray, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Makes the global array of a shape, of which this process gives its `local_rows` in that order."""
    return jax.make_array_from_process_local_data(shape.sharding, rows, shape.shape)


def fetch(tree: PyTree) -> PyTree:
    """Fetches whole arrays to the host of every process; all of them must ask."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def replicated(mesh: Mesh) -> NamedSharding:
    """Gives the sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameters(shapes: PyTree, config: MeshConfig, mesh: Mesh) -> PyTree:
    """Gives a sharding for each shape of a tree: cut over `fsdp` where the shards tile, else whole.

    Raises UserError where most of the numbers would stay whole although `mesh.fsdp` asks for so many shards.
    """
    shards = mesh.shape[_FSDP]
    specs = jax.tree.map(lambda x: _spec(x.shape, shards), shapes)
    leaves = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(specs), strict=True))
    cut = sum(x.size for x, spec in leaves if spec != PartitionSpec())
    share = cut / sum(x.size for x, _ in leaves)
    require(
        config.fsdp <= 1 or share > 0.5,
        f"mesh.fsdp = {shards}: only {share:.0%} of the parameters can be cut into so many shards of a multiple of "
        f"{_TILE[0]} rows or of {_TILE[1]} columns; lower mesh.fsdp",
    )
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def put(x: np.ndarray, to: jax.sharding.Sharding) -> jax.Array:
    """Puts an array that every process holds whole onto the devices, each of which gets its part.

    With several processes, `jax.device_put` would first compare what they hold, by a copy of each on every device.
    """
    return jax.make_array_from_callback(x.shape, to, lambda index: x[index])


def places(config: MeshConfig, mesh: Mesh, params: PyTree) -> tuple[Place, Place | None, Place]:
    """Gives three functions for `mesh.parameters`: on all parameters before a pass, on a block's, and on gradients.

    The first gathers the parameters, but not those of blocks where the second, which is None for "zero1", gathers each
    block's within the pass; the third scatters gradients after it. params: the shardings of the parameters.
    """
    if mesh.shape[_FSDP] == 1:
        return _stay, None, _stay
    whole = functools.partial(jax.lax.with_sharding_constraint, shardings=replicated(mesh))
    scatter = functools.partial(jax.lax.with_sharding_constraint, shardings=params)
    if config.parameters == "zero1":
        return whole, None, scatter
    return functools.partial(_outside_blocks, whole), whole, scatter


def _stay(tree: PyTree) -> PyTree:
    return tree


def _outside_blocks(place: Place, params: PyTree) -> PyTree:
    return jax.tree.map_with_path(lambda path, x: x if "block" in jax.tree_util.keystr(path) else place(x), params)


def _spec(shape: tuple[int, ...], shards: int) -> PartitionSpec:
    """Rows are cut rather than columns: what is gathered is then contiguous."""
    if shards > 1:
        for axis, tile in ((-2, _TILE[0]), (-1, _TILE[1])):
            if len(shape) >= -axis and shape[axis] % (shards * tile) == 0:
                spec: list[str | None] = [None] * len(shape)
                spec[axis] = _FSDP
                return PartitionSpec(*spec)
    return PartitionSpec()
