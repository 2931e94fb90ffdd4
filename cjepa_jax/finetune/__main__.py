"""Fine-tune the encoder of a checkpoint on labelled images.

    python -m cjepa_jax.finetune --config=configs/finetune_vitb16.py --checkpoint=runs/vitb16

--config=FILE             the experiment; its docstring says what it needs
--checkpoint=DIR          the pre-trained network: a workdir, or WORKDIR/checkpoints/STEP
--workdir=DIR             where results go; default runs/<name of the config file>
--config.GROUP.KEY=VALUE  overrides any setting, e.g. --config.data.batch_size=256

Several processes, each started with the same command, train as one. Slurm and TPU
slices are recognised; elsewhere each process is told

--coordinator_address=HOST:PORT  of process 0
--num_processes=N --process_id=0...N-1
--start_timeout=300       seconds to wait for one another

The same command in the same workdir goes on from its newest checkpoint. SIGTERM
or Ctrl-C saves and leaves. Every setting is explained in cjepa_jax/config.py and
cjepa_jax/finetune/config.py.

Into the workdir: config.json, checkpoints/, metrics.jsonl, tensorboard/,
curves.png and, at the end, evaluation.json.
"""

import sys

from absl import flags
from etils import epath

from cjepa_jax import command
from cjepa_jax.config import require
from cjepa_jax.finetune.config import Finetune

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The pre-trained network.")
_FLAGS = command.TrainingFlags()


def _run() -> None:
    from cjepa_jax import loop  # after the flags: importing jax takes seconds
    from cjepa_jax.finetune.training import finetune

    name, settings = command.read_config(Finetune)
    require(bool(_CHECKPOINT.value), "--checkpoint is missing, e.g. --checkpoint=runs/vitb16")
    workdir = _FLAGS.start(name)
    try:
        finetune(settings, epath.Path(_CHECKPOINT.value), epath.Path(workdir))
    except loop.DivergedError as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """Exit code 0; 2 after a mistake that the user can mend; 1 after any other error."""
    command.run(_run, __doc__)


if __name__ == "__main__":
    main()
