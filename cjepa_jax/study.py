"""Study: trains several arms with several seeds, tunes each with the same budget, and compares them in one table.

    python -m cjepa_jax.study --config=configs/study_collapse_digits.py --plan
    python -m cjepa_jax.study --config=configs/study_collapse_digits.py

--config=FILE  the study, or the name of one that comes with the package; docs/study.md
               says what such a file holds
--workdir=DIR  where results go; default runs/<name of the config file>
--plan         says what is to run, what has run, and about how long the rest takes; in a
               new workdir it takes a few steps of every arm to find out, and writes nothing
--arm=NAME     runs this arm only, and those of further --arm; the tables are left to the
               command without it. So several processes, each with devices of its own, share
               out a study in one workdir

First every arm has its trials, which are judged on images held out of the training split.
Then the best settings of each arm run with every seed. When all of these are finished, the
test split is judged, once. Every run is what cjepa_jax.main would train, in
WORKDIR/runs/ARM/trialN or seedN.

The same command in the same workdir goes on where the study was stopped. SIGTERM or
Ctrl-C saves the run and leaves; a second one, or one before the first step of a run is
compiled, ends the study at once. A run whose loss is no longer finite counts as the worst
trial, and the tables name such seeds.

Exit codes: those of cjepa_jax.main.

Into the workdir: study.json, progress.txt, table.json, table.csv, table.md, and the
figures convergence.png, signs_of_collapse.png, spectrum.png and ablation.png.
"""

import sys

from absl import flags

from cjepa_jax import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go; default runs/<name of the config file>.")
_ARM = flags.DEFINE_multi_string("arm", [], "Runs this arm only; may be given several times.")
_PLAN = flags.DEFINE_bool("plan", False, "Says what is to run and how long it takes.")


def _run() -> None:
    from etils import epath

    from cjepa_jax.studies import design, runs  # after the flags: importing jax takes seconds
    from cjepa_jax.train import lock

    name, values = command.read_values(__doc__)
    study = design.read(values, epath.Path(command.workdir_of(_WORKDIR.value, name)))
    try:
        if _PLAN.value:
            print(runs.plan(study, _ARM.value), flush=True)
        else:
            runs.run(study, _ARM.value)
    except lock.LockLostError as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """Runs the command; its exit codes are those that --help names."""
    command.run(_run, __doc__)


if __name__ == "__main__":
    main()
