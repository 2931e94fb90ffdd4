"""The mesh, and where every array lives; no other file knows axis names."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cjepa_jax.config import require


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The given devices, by default all of all processes, along one axis, `data`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def check_batch(batch_size: int) -> None:
    """Raises UserError where the devices cannot share the batch evenly."""
    devices = jax.device_count()
    require(batch_size % devices == 0, f"data.batch_size = {batch_size} is not divisible by the {devices} devices")


def batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
