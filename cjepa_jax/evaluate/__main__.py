"""Judge the features of a checkpoint.

    python -m cjepa_jax.evaluate --checkpoint=runs/digits --method=knn,linear

--checkpoint=DIR          a workdir (its newest checkpoint), WORKDIR/checkpoints/STEP,
                          or what cjepa_jax.convert wrote
--method=NAME,NAME        knn       weighted and plain vote of the nearest neighbours
                          linear    linear probe: a grid of rates and decays at once
                          lowshot   logistic regression on few labels
                          collapse  std, rank, spectrum, alignment, uniformity, LiDAR;
                                    needs no labels
                          attention pictures: attention and principal components
                                    of both encoders, and of --config.attention.other=DIR
                          davis     masks propagated through --config.davis.data_dir=DAVIS
--tower=target_encoder    or encoder, the context encoder
--baselines               judge an untrained encoder and raw pixels, too (the default);
                          --nobaselines leaves them out
--name=NAME               of the results; default step<STEP>_<TOWER>
--config.GROUP.KEY=VALUE  overrides a setting of configs/evaluate.py, or of --config=FILE,
                          e.g. --config.data.data_dir=FOLDER

The images are those of the checkpoint's own config unless settings say otherwise.
Prints a table; WORKDIR/evaluation/NAME.METHOD.json holds the results and all that it
takes to repeat them. What is there already with other settings is not overwritten.
"""

import time

from absl import flags
from etils import epath

from cjepa_jax import command
from cjepa_jax.config import nearest, require

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "What to judge.")
_METHOD = flags.DEFINE_string("method", None, "How, separated by commas.")
_TOWER = flags.DEFINE_string("tower", "target_encoder", "target_encoder or encoder.")
_BASELINES = flags.DEFINE_bool("baselines", True, "Judge an untrained encoder and raw pixels, too.")
_NAME = flags.DEFINE_string("name", None, "Of the results; default step<STEP>_<TOWER>.")


def _run() -> None:
    from cjepa_jax.evaluate import methods, results  # after the flags: importing jax takes seconds
    from cjepa_jax.evaluate.config import Evaluation
    from cjepa_jax.evaluate.subject import Subject

    _, settings = command.read_config(Evaluation)
    require(bool(_CHECKPOINT.value), "--checkpoint is missing, e.g. --checkpoint=runs/digits")
    require(bool(_METHOD.value), f"--method is missing; known: {', '.join(methods.METHODS)}")
    wanted = str(_METHOD.value).split(",")
    for name in wanted:
        require(name in methods.METHODS, f"--method {name!r} is not known; {nearest(name, methods.METHODS)}")
    towers = ("target_encoder", "encoder")
    require(_TOWER.value in towers, f"--tower {_TOWER.value!r} is not known; {nearest(_TOWER.value, towers)}")
    layers = max(settings.linear.layers) if "linear" in wanted else 1
    subject = Subject(epath.Path(_CHECKPOINT.value), _TOWER.value, settings, baselines=_BASELINES.value, layers=layers)
    if any(methods.METHODS[name].labels for name in wanted):
        subject.check_labels()
    files = {name: results.File(subject, name, _NAME.value) for name in wanted}
    for name, file in files.items():
        start = time.perf_counter()
        found = methods.METHODS[name].judge(subject, file.path)
        file.write(found, seconds=time.perf_counter() - start)
        print(results.table(name, found), flush=True)
        print(f"-> {file.path}")


def main() -> None:
    """Exit code 0; 2 after a mistake that the user can mend; 1 after any other error."""
    default = epath.resource_path("cjepa_jax").parent / "configs" / "evaluate.py"
    command.run(_run, __doc__, config=str(default))


if __name__ == "__main__":
    main()
