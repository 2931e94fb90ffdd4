"""Judge the features of a checkpoint.

    python -m cjepa_jax.evaluate --checkpoint=runs/digits --method=knn,linear

--checkpoint=PATH         a workdir (its newest checkpoint), WORKDIR/checkpoints/STEP,
                          or one of another program, such as I-JEPA's .pth.tar, which is
                          converted into the folder PATH.orbax
--method=NAME,NAME        knn       nearest neighbours, weighted and plain vote
                          linear    linear probe: a grid of rates and decays at once
                          logistic  logistic regression, with all labels and with few
                          accuracy  a fine-tuned network's own head
                          collapse  std, rank, spectrum, alignment, uniformity, LiDAR;
                                    needs no labels
                          attention pictures: attention, bare and over the image, and principal
                                    components; --config.attention.other=DIR: of two runs
                          neighbours  picture: test images beside their nearest training images
                          map       picture: features in two dimensions, by PCA and t-SNE
                          davis     masks propagated through --config.davis.data_dir=DAVIS
                          segmentation  mIoU of small heads on patch features, by images
                                    and masks in --config.segmentation.data_dir=FOLDER
                          decoder   pixels decoded from patch features by ridge regression:
                                    R2, PSNR and a picture; needs no labels
--encoder=target_encoder  or encoder: the context encoder, or that of a fine-tuned network
--baselines               judges an untrained encoder and raw pixels, too (the default);
                          --nobaselines leaves them out
--name=NAME               of the results; default step<STEP>_<ENCODER>
--config.GROUP.KEY=VALUE  overrides a setting, e.g. --config.data.data_dir=FOLDER;
                          --config=FILE reads settings from a file
--config=configs/evaluate.py --help  lists all settings

The images are those of the checkpoint's own config unless settings say otherwise.
Prints what is judged, tables with standard errors, and the files and pictures that it writes.
WORKDIR/evaluation/NAME.METHOD.json holds the results and all that it takes to repeat them;
shares of images are in % in the tables and fractions in the files. What is there already with
other settings is not overwritten.

Exit codes: 0 finished; 2 a mistake that the user can mend; 1 any other error; 130 and 143 ended by
Ctrl-C and SIGTERM.
"""

import sys

from absl import flags
from etils import epath

from cjepa_jax import command
from cjepa_jax.errors import nearest, require

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "What to judge.")
_METHOD = flags.DEFINE_string("method", None, "How, separated by commas.")
_ENCODER = flags.DEFINE_string("encoder", None, "target_encoder or encoder.")
_BASELINES = flags.DEFINE_bool("baselines", True, "Judge an untrained encoder and raw pixels, too.")
_NAME = flags.DEFINE_string("name", None, "Of the results; default step<STEP>_<ENCODER>.")
flags.DEFINE_alias("tower", "encoder")  # its former name
_RENAMED = {"lowshot": "logistic"}


def _run() -> None:
    from cjepa_jax.evaluate.checkpoint import judge  # after the flags: importing jax takes seconds
    from cjepa_jax.evaluate.config import Evaluation
    from cjepa_jax.interop.conversion import in_our_format

    _, settings = command.read_config(lambda _: Evaluation, default="evaluate")
    known = settings.evaluators
    require(bool(_CHECKPOINT.value), "--checkpoint is missing, e.g. --checkpoint=runs/digits")
    require(bool(_METHOD.value), f"--method is missing; known: {', '.join(known)}")
    wanted = []
    for name in str(_METHOD.value).split(","):
        if name in _RENAMED:
            print(f"--method={name} is called {_RENAMED[name]} now", file=sys.stderr)
        wanted.append(_RENAMED.get(name, name))
        require(wanted[-1] in known, f"--method {name!r} is not known; {nearest(name, known)}")
    judge(
        in_our_format(epath.Path(_CHECKPOINT.value)),
        settings,
        wanted,
        encoder=_ENCODER.value,
        baselines=_BASELINES.value,
        name=_NAME.value,
    )


def main() -> None:
    """Exit code 0; 2 after a mistake that the user can mend; 1 after any other error."""
    command.run(_run, __doc__)


if __name__ == "__main__":
    main()
