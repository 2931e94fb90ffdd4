"""How long the attention kernels take; the compiler notes no estimate for what is written in Pallas.

`python -m cjepa_jax.bench.attention` gives the numbers of the table. A kernel handles its sequences in a loop. For one
iteration the compiler's schedule gives the number of instruction bundles, one of which can start per cycle, and the
length of the critical path in cycles. The larger of the two counts here. It is mostly the critical path, an upper
bound; where sequences are short, there are about half as many bundles.
"""

import re
from collections.abc import Mapping

from cjepa_jax.tpu.hlo import Kernel

# Chip -> (tokens, heads, features of a head, whether tokens may be masked) -> cycles forward, backward, of a sequence.
CYCLES: Mapping[str, Mapping[tuple[int, int, int, bool], tuple[int, ...]]] = {
    "v5e": {
        (42, 6, 64, True): (1142, 2249),
        (54, 6, 64, True): (1214, 2382),
        (56, 3, 64, True): (845, 886),
        (56, 6, 64, True): (1742, 1444),
        (56, 12, 64, True): (1333, 2211),
        (56, 16, 64, True): (1880, 2493),
        (56, 16, 88, True): (3077, 7595),
        (72, 6, 64, True): (1361, 1864),
        (72, 16, 80, True): (3735, 8222),
        (96, 3, 128, True): (1312, 1691),
        (96, 6, 64, True): (1515, 2133),
        (96, 12, 32, True): (1309, 2158),
        (96, 16, 24, True): (2808, 3511),
        (126, 16, 24, True): (2796, 9823),
        (144, 6, 64, False): (2481, 2997),
        (196, 3, 64, False): (2080,),
        (196, 6, 64, False): (2643,),
        (196, 12, 64, False): (3891, 12332),
        (196, 16, 64, False): (4723,),
        (196, 16, 88, False): (13211,),
        (256, 16, 80, False): (14381,),
    },
    "v6e": {
        (42, 6, 64, True): (1153, 2981),
        (54, 6, 64, True): (2759, 3008),
        (56, 3, 64, True): (1183, 1394),
        (56, 6, 64, True): (1588, 1652),
        (56, 12, 64, True): (2904, 3061),
        (56, 16, 64, True): (3792, 3978),
        (56, 16, 88, True): (3507, 6888),
        (72, 6, 64, True): (1275, 1798),
        (72, 16, 80, True): (1693, 7480),
        (96, 3, 128, True): (1597, 1586),
        (96, 6, 64, True): (1392, 1858),
        (96, 12, 32, True): (1670, 2137),
        (96, 16, 24, True): (1915, 3198),
        (126, 16, 24, True): (7263, 8110),
        (144, 6, 64, False): (1138, 2565),
        (196, 3, 64, False): (1651,),
        (196, 6, 64, False): (1940,),
        (196, 12, 64, False): (2564, 9189),
        (196, 16, 64, False): (2980,),
        (196, 16, 88, False): (2980,),
        (256, 16, 80, False): (3388,),
    },
    "v4": {
        (42, 6, 64, True): (638, 1594),
        (54, 6, 64, True): (714, 1726),
        (56, 3, 64, True): (634, 939),
        (56, 6, 64, True): (692, 1132),
        (56, 12, 64, True): (1185, 1860),
        (56, 16, 64, True): (1638, 2354),
        (56, 16, 88, True): (2724, 6768),
        (72, 6, 64, True): (1109, 1628),
        (72, 16, 80, True): (3335, 7261),
        (96, 3, 128, True): (832, 1599),
        (96, 6, 64, True): (1471, 1910),
        (96, 12, 32, True): (1241, 2126),
        (96, 16, 24, True): (3431, 3480),
        (126, 16, 24, True): (2963, 8428),
        (144, 6, 64, False): (1894, 2908),
        (196, 3, 64, False): (1903,),
        (196, 6, 64, False): (2646,),
        (196, 12, 64, False): (4706, 11521),
        (196, 16, 64, False): (6061,),
        (196, 16, 88, False): (12382,),
        (256, 16, 80, False): (13581,),
    },
    "v5p": {
        (42, 6, 64, True): (1150, 2265),
        (54, 6, 64, True): (1222, 2398),
        (56, 3, 64, True): (849, 890),
        (56, 6, 64, True): (1754, 1448),
        (56, 12, 64, True): (1341, 2219),
        (56, 16, 64, True): (1892, 2497),
        (56, 16, 88, True): (3097, 7643),
        (72, 6, 64, True): (1369, 1868),
        (72, 16, 80, True): (3759, 8262),
        (96, 3, 128, True): (1320, 1699),
        (96, 6, 64, True): (1523, 2137),
        (96, 12, 32, True): (1313, 2170),
        (96, 16, 24, True): (2820, 3527),
        (126, 16, 24, True): (2808, 9851),
        (144, 6, 64, False): (2493, 3005),
        (196, 3, 64, False): (2088,),
        (196, 6, 64, False): (2651,),
        (196, 12, 64, False): (3899, 12380),
        (196, 16, 64, False): (4731,),
        (196, 16, 88, False): (13275,),
        (256, 16, 80, False): (14441,),
    },
}


def cycles(kernel: Kernel, chip: str) -> int | None:
    """Gives the cycles of all calls of a kernel on a chip such as "v5e", or None where they are not known."""
    named = re.fullmatch(r"attention_(forward|backward)_(\d+)x(\d+)", kernel.name)
    if not named:
        return None
    heads, head_dim = int(named[2]), int(named[3])
    shapes = [tuple(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]", kernel.operands)]
    sequences, tokens = next(shape[:2] for shape in shapes if shape[2:] == (3 * heads * head_dim,))
    masked = (sequences, tokens, 1) in shapes
    known = CYCLES.get(chip, {}).get((tokens, heads, head_dim, masked), ())
    which = ("forward", "backward").index(named[1])
    return known[which] * sequences * kernel.times if which < len(known) else None
