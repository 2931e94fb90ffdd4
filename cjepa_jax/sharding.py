"""The mesh, and where every array lives; no other file knows axis names."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cjepa_jax.config import require


def make_mesh() -> Mesh:
    """All devices of all processes along one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


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
