"""Compile the training step for a TPU slice, without a TPU, and predict what it will cost.

    python -m cjepa_jax.compile --config=configs/vith14.py --topology=v5e:8x8

--config=FILE             the experiment, as for cjepa_jax.main
--config.GROUP.KEY=VALUE  overrides any setting
--topology=NAME           the slice; a wrong name lists those that exist
--layer                   one layer of each transformer instead of the whole step: quicker, for tuning
--images=1281167          training images of an epoch (ImageNet-1k's); steps and hours follow from it
--classes=1000            classes of the labels, where the method has some
--output=FILE             JSON with all numbers; default runs/compile/<config>-<topology>[-layer].json

The command needs the TPU compiler: pip install "jax[tpu]==0.10.2". The whole step takes minutes and some GB.

Exit codes: 0 finished; 2 a mistake that the user can mend, or a step that does not fit; 1 any other error;
130 and 143 ended by Ctrl-C and SIGTERM.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib

from absl import flags
from etils import epath

from cjepa_jax import command
from cjepa_jax.errors import UserError, require
from cjepa_jax.files import check_writable
from cjepa_jax.tpu import chips, cost
from cjepa_jax.tpu.chips import ENVIRONMENT

_TOPOLOGY = flags.DEFINE_string("topology", "", "The TPU slice, e.g. v5e:8x8.")
_LAYER = flags.DEFINE_bool("layer", False, "One layer of each transformer instead of the whole step.")
_IMAGES = flags.DEFINE_integer("images", 1281167, "Training images of an epoch.", lower_bound=1)
_CLASSES = flags.DEFINE_integer("classes", 1000, "Classes of the labels.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "Where the JSON goes.")


def _run() -> None:
    # Before jax is imported, by the settings of a method.
    os.environ.update(ENVIRONMENT)
    from cjepa_jax.methods import find_method

    name, config = command.read_config(lambda values: find_method(values).settings)
    require(bool(_TOPOLOGY.value), "--topology is missing, e.g. --topology=v5e:8x8")
    examples = {"model.size": "B", "model.patch_size": "16", "data.image_size": "224"}
    values = config.model.size, config.model.patch_size, config.data.image_size
    lacking = [key for key, value in zip(examples, values, strict=True) if not value]
    require(
        not lacking,
        f"{' and '.join(lacking)} would follow from a checkpoint, which is not read here: give such as "
        + " ".join(f"--config.{key}={examples[key]}" for key in lacking),
    )
    topology = _TOPOLOGY.value
    chip, shape = chips.find_slice(topology)
    count = math.prod(shape)
    batch = config.data.batch_size
    require(batch % count == 0, f"data.batch_size = {batch} is not divisible by the {count} chips of {topology}")
    require(
        importlib.util.find_spec("libtpu") is not None, 'the TPU compiler is missing: pip install "jax[tpu]==0.10.2"'
    )
    from cjepa_jax.tpu import compile as compiling

    file = f"{name}-{topology.replace(':', '-')}{'-layer' if _LAYER.value else ''}.json"
    output = pathlib.Path(_OUTPUT.value or f"runs/compile/{file}")
    try:  # before minutes of compiling
        output.parent.mkdir(parents=True, exist_ok=True)
        check_writable(epath.Path(output), "--output")
    except (OSError, ValueError) as error:
        raise UserError(f"--output={output} cannot be written ({error}); name another place") from None

    head = {"config": name, "topology": topology, "chips": count, "images_per_chip": batch // count}
    head |= {"method": cost.METHOD, "clock_calibrated": topology[:3] not in chips.CLOCK_NOT_CALIBRATED}
    head |= {f"{name}_version": importlib.metadata.version(name) for name in ("jax", "libtpu")}
    if _LAYER.value:
        layers_report = compiling.compile_layers(config, topology, classes=_CLASSES.value)
        report, table = head | {"layers": layers_report}, cost.format_layers(layers_report, chip)
        table += "".join(f"\n{stack}: {cost.not_costed(layer)}" for stack, layer in layers_report.items())
    else:
        report = head | compiling.compile_step(config, topology, images=_IMAGES.value, classes=_CLASSES.value)
        table = f"{cost.format_step(report, chip)}\n{cost.not_costed(report)}"
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{name} on {topology}, {config.model.size}/{config.model.patch_size}\n{table}\n\n{cost.METHOD}")
    if not report["clock_calibrated"]:
        print(f"The clock of {topology[:3]} is not calibrated: the times can rank designs, but predict no real times.")
    print(f"All numbers: {output}")


def main() -> None:
    """Runs the command; its exit codes are those that --help names."""
    command.run(_run, __doc__)


if __name__ == "__main__":
    main()
