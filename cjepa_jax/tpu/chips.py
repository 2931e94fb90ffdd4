"""Lists TPU chips, what they can do, and the slices of them that exist; and the peaks of GPUs."""

import dataclasses
import pathlib

from cjepa_jax.errors import require

GIB = 2**30

NO_TPU = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}  # keep libtpu from complaining
# These run the compiler without a TPU. The cache of compiled programs is off because a program for a TPU cannot be read
# back from it here.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
ENVIRONMENT |= {"JAX_ENABLE_COMPILATION_CACHE": "false", **NO_TPU}
PCI_DEVICES = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}  # v2 and v3, ..., v6e, TPU7x


def may_be_here(devices: str = "/sys/bus/pci/devices") -> bool:
    """Tells whether a PCI device of this machine is a TPU, by the numbers that JAX knows.

    The vendor alone does not tell: network and disk adapters of Google's cloud machines are Google's, too.
    """
    return any(
        file.read_text().strip() == "0x1ae0" and (file.parent / "device").read_text().strip() in PCI_DEVICES
        for file in pathlib.Path(devices).glob("*/vendor")
    )


@dataclasses.dataclass(frozen=True)
class Chip:
    """Describes what one chip can do, and the slices that it comes in.

    Source: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, specifications and configurations. The rate of an ICI link is
    the chip's bidirectional rate over twice its links; for v4 the pod's all-reduce rate (1.1 PB/s) over its 4096
    chips of 6 links. Clocks: with these an 8192^3 product shows 88 to 93 % of the peak; v6e's is not calibrated.
    """

    name: str
    flops: float  # per second, bfloat16
    hbm: int  # bytes
    clock: float  # Hz
    link: float  # bytes per second of one ICI link in one direction
    slices: str


_SLICES_2D = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_SLICES_3D = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"
CHIPS = {
    "v4": Chip("v4", 275e12, 32 * GIB, 1.05e9, 45e9, _SLICES_3D),
    "v5e": Chip("v5e", 197e12, 16 * GIB, 1.5e9, 50e9, _SLICES_2D),
    "v5p": Chip("v5p", 459e12, 95 * GIB, 1.75e9, 100e9, _SLICES_3D + " 16x16x16 16x16x24"),
    "v6e": Chip("v6e", 918e12, 32 * GIB, 1.75e9, 100e9, _SLICES_2D),
}
CLOCK_NOT_CALIBRATED = ("v6e",)

# What JAX calls a kind of device -> FLOP/s of dense products in bfloat16. Source for GPUs: NVIDIA's data sheets.
_PEAKS = {
    "TPU v4": CHIPS["v4"].flops,
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), CHIPS["v5e"].flops),
    **dict.fromkeys(("TPU v5", "TPU v5p"), CHIPS["v5p"].flops),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), CHIPS["v6e"].flops),
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,  # in float16; it has no bfloat16
    "NVIDIA GeForce RTX 4090": 165e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the FLOP/s of a device at its peak, in bfloat16; None for a kind that is not known, such as a CPU."""
    return _PEAKS.get(device_kind)


def find_slice(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """Returns, for "v5e:8x8", the chip and (8, 8). Raises UserError for a slice that does not exist."""
    kind, _, shape = topology.partition(":")
    listed = {kind: CHIPS[kind]} if kind in CHIPS else CHIPS
    known = "; ".join(f"{name}: {', '.join(chip.slices.split())}" for name, chip in listed.items())
    require(kind in CHIPS and shape in CHIPS[kind].slices.split(), f"--topology={topology} does not exist; {known}")
    return CHIPS[kind], tuple(map(int, shape.split("x")))


def ici_bandwidth(chip: Chip, shape: tuple[int, ...]) -> float:
    """Returns the bytes per second that a chip can send at most.

    It has two links along each axis of the slice, but only one where the axis is two chips long.
    """
    return chip.link * sum(min(side - 1, 2) for side in shape)
