"""Checkpoints: {state, config, fingerprint of the images, checksums}, written by Orbax in the background.

The stream of batches needs no entry: it is a function of the config and the step.
"""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers as managers

from cjepa_jax import checksums
from cjepa_jax.config import Checkpoint, Config
from cjepa_jax.errors import StorageError, UserError, one_line, out_of_memory, require
from cjepa_jax.files import (
    absolute,
    check_bucket_support,
    check_writable,
    is_remote,
    read_json,
    remove_remains,
    storing,
    write_whole,
)
from cjepa_jax.settings import adopt
from cjepa_jax.train import distributed, orbax, writer

C = TypeVar("C", bound=Config)
META = "meta/metadata"  # where Orbax puts the item "meta" inside of a checkpoint


class DamagedError(Exception):
    """A checkpoint cannot be read, or is not what was saved; the message says how."""


@dataclasses.dataclass
class _KeepOne(managers.PreservationPolicy):
    """Keeps the checkpoint of one step."""

    step: int | None = None

    def should_preserve(self, checkpoints, *, context):
        return [info.step == self.step for info in checkpoints]


class Checkpointer:
    """Writes and restores the checkpoints of one workdir.

    `meta` is {"config": flat config, "fingerprint": of the training images}; only a workdir with the same may be
    continued, which `check_workdir` and `check_images` see to. Each checkpoint holds in addition the checksum of every
    array, as the devices had it when it was saved, and whether the run was calm then.
    """

    failure: StorageError | None = None  # of the last save, as soon as `watch` has seen it

    def __init__(self, workdir: epath.Path, checkpoint: Checkpoint, meta: dict[str, Any]):
        """Takes a workdir that `check_workdir` has accepted; removes what a run that was cut off had half written.

        Raises StorageError where the disk is full.
        """
        orbax.quieten_threads()
        orbax.write_arrays_whole()
        self._directory = workdir / "checkpoints"
        self._meta = meta
        self._every, self._fall_back = checkpoint.every, checkpoint.fall_back
        self._saving: tuple[int, int] | None = None  # step and bytes of a save that is not known to be complete
        self._calm = _KeepOne()  # the newest one that was saved while the run was calm
        self._best, self._best_by, self._highest = _KeepOne(), checkpoint.keep_best, -math.inf
        kept: list[managers.PreservationPolicy] = [managers.LatestN(checkpoint.keep_last), self._calm, self._best]
        if checkpoint.keep_every:
            kept.append(managers.EveryNSteps(checkpoint.keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(kept),
            single_host_load_and_broadcast=True,  # because a network disk may show a process an old list
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=orbax.meet_writers),
        )
        if jax.process_index() == 0:
            remove_remains(workdir)
        with storing(self._directory):
            self._manager = ocp.CheckpointManager(absolute(self._directory), options=options)

    def restore(self, abstract_state: PyTree) -> PyTree | None:
        """Restores the newest state, or gives None where there is none yet.

        abstract_state: a TrainState of shapes, dtypes and shardings to restore to. Raises UserError where the
        checkpoint is damaged; where the settings allow it, the newest good one is restored instead, and those after it
        are set aside.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._read(step, abstract_state)
            except DamagedError as error:
                damaged[step] = str(error)
                if not self._fall_back:
                    break
                continue
            if damaged:
                self._set_aside(damaged, step)
            self._calm.step = self._newest_calm()
            return state
        if damaged:
            if len(damaged) == len(self._manager.all_steps()):
                remedy = "there is no good one before it; restore one from a copy, or use another --workdir"
            else:
                remedy = "move it away to go on from the one before it, or let --config.checkpoint.fall_back=True do so"
            raise UserError(f"{damaged[max(damaged)]}; {remedy}")
        return None

    def _read(self, step: int, abstract_state: PyTree) -> PyTree:
        """Restores one state. Raises DamagedError on all processes where one of them cannot, at a second try either."""
        with contextlib.suppress(DamagedError):  # the network of a shared disk may have failed for a moment
            return self._read_once(step, abstract_state)
        return self._read_once(step, abstract_state)

    def _read_once(self, step: int, abstract_state: PyTree) -> PyTree:
        path = self._directory / str(step)
        failure, reason = None, "another process cannot read it"
        try:
            with orbax.quiet_on_error():
                as_saved = layout_as_saved(abstract_state, path / "state")
                reader = orbax.reader(ocp.StandardCheckpointHandler)
                saved = reader.restore(absolute(path / "state"), args=ocp.args.StandardRestore(as_saved))
                meta = read_json(path / META)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            failure, reason = error, one_line(error)[:300]
        if distributed.any_of_them(failure is not None):
            if failure and (out_of_memory(failure) or isinstance(failure, PermissionError)):
                raise failure  # which says nothing of the checkpoint
            raise DamagedError(f"checkpoint {path} cannot be read ({reason})") from failure
        wanted = meta.get("checksums")  # which older checkpoints do not have
        if wanted is not None and (wrong := checksums.differences(checksums.of_tree(saved), wanted)):
            raise DamagedError(f"checkpoint {path} is damaged: {wrong}")
        if as_saved is abstract_state:
            return saved
        kept = {name: saved[name] for name in ("step", "params", "opt_state")}
        return abstract_state.replace(averages=_averages(saved), **kept)

    def _set_aside(self, damaged: dict[int, str], good: int) -> None:
        """Renames damaged checkpoints, so that the run goes on from the good one, and says so."""
        for step in damaged:
            path = self._directory / str(step)
            aside = path.with_name(f"{step}.damaged")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}.damaged")
            distributed.meet(f"{step} judged")
            if jax.process_index() == 0:
                path.rename(aside)
                print(f"{damaged[step]}; it is now {aside}", file=sys.stderr, flush=True)
            distributed.meet(f"{step} set aside")
        if jax.process_index() == 0:
            lost = max(damaged) - good
            print(f"going on from checkpoint {good}: {lost} steps are trained again", file=sys.stderr, flush=True)
        self._manager.reload()

    def _newest_calm(self) -> int | None:
        for step in sorted(self._manager.all_steps(), reverse=True):
            with contextlib.suppress(UserError):
                if read_meta(self._directory / str(step)).get("calm", True):
                    return step
        return None

    def save(self, step: int, state: PyTree, *, calm: bool = True) -> None:
        """Saves the state after `step`, unless the newest checkpoint is of this step; the writing goes on meanwhile.

        calm: whether loss and gradient are as usual; the newest such checkpoint is kept. Raises StorageError where the
        disk is full, or was during the save before.
        """
        if step == self._manager.latest_step():
            return
        self.finish()
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        meta = self._meta | {"checksums": checksums.of_tree(state), "calm": calm}
        if calm:
            self._calm.step = step
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        with storing(self._directory / str(step), needed), orbax.quiet_on_error():
            self._manager.save(step, args=args, force=True)
        self._saving = step, needed

    def judge(self, step: int, metrics: Mapping[str, float]) -> None:
        """Looks at a line of metrics.jsonl: where it is the best evaluation of a checkpoint so far, this one stays."""
        value = metrics.get(f"eval/{self._best_by}", -math.inf)
        if value > self._highest and step in self._manager.all_steps():
            self._best.step, self._highest = step, value

    def best(self) -> str:
        """Says which checkpoint had the best evaluation; "" where none is chosen by that."""
        if self._best.step is None:
            return ""
        return f"; the best {self._best_by}, {self._highest:.1%}, is that of {self._directory / str(self._best.step)}"

    def watch(self) -> StorageError | None:
        """Returns the failure of the last save, where it is over and has failed; does not wait."""
        if self._saving and not self._manager.is_saving_in_progress():
            try:
                self.finish()
            except StorageError as error:
                self.failure = error
        return self.failure

    def finish(self) -> None:
        """Waits until the last save is complete. Raises StorageError."""
        if self.failure:
            raise self.failure
        if self._saving:
            (step, needed), self._saving = self._saving, None
            with storing(self._directory / str(step), needed), orbax.quiet_on_error():
                self._manager.wait_until_finished()

    def due(self, step: int) -> bool:
        """Tells whether a checkpoint belongs at this step."""
        return step % self._every == 0

    def close(self) -> None:
        """Waits until everything that was saved is on disk. Raises StorageError."""
        self.finish()
        self._manager.close()

    def before_trouble(self) -> str:
        """Says which checkpoint is from before loss and gradient left their usual range; "" if the newest one is."""
        if self._calm.step == self._manager.latest_step():
            return ""
        if self._calm.step is None:
            return "there is no checkpoint from before the trouble"
        path = self._directory / str(self._calm.step)
        return f"{path} is the newest checkpoint from before the trouble, --init={path} starts a new run from it"


def read_meta(checkpoint: epath.Path) -> dict[str, Any]:
    """Reads what a checkpoint knows of itself beside its state, {} if it is an old one. Raises UserError."""
    return read_json(checkpoint / META) if (checkpoint / META).exists() else {}


def layout_as_saved(state: PyTree, path: epath.Path) -> PyTree:
    """Gives a TrainState the layout on disk, which was another one before states had "averages"."""
    metadata = ocp.PyTreeCheckpointer().metadata(absolute(path)).item_metadata
    found = set() if metadata is None else metadata.tree.keys()
    old: dict[str, Any] = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    if "target_params" in found:
        return old | {"target_params": state.averages["target_encoder"]}
    if "ema_params" in found:
        return old | {"ema_params": {name: state.averages[f"ema_{name}"] for name in ("encoder", "head")}}
    return state


def _averages(saved: dict[str, Any]) -> dict[str, Any]:
    """Names the averages of a state that was saved before states had "averages"."""
    if "target_params" in saved:
        return {"target_encoder": saved["target_params"]}
    return {f"ema_{name}": average for name, average in saved["ema_params"].items()}


def check_workdir(
    workdir: epath.Path, config: C, start: Mapping[str, Any], *, extend: bool = False
) -> tuple[C, list[str], float | None]:
    """Checks that `workdir` can be used for this experiment.

    Returns the settings to train with, which are `config` but for settings that are younger than the workdir, a note
    about each of these, and the optim.epochs that the run had so far where `extend` lets `config` have more of them,
    else None. `start` is what else of config.json must stay as it is: the data and checkpoint that the run started
    from. Raises UserError.
    """
    check_bucket_support(workdir, "--workdir")
    require("\0" not in str(workdir), "--workdir holds a character that no path may hold")
    require(
        is_remote(workdir) or workdir.resolve().parent.is_dir(),
        f"--workdir {workdir}: {workdir.parent} does not exist; make it first, or mend the path",
    )
    check_writable(workdir, "--workdir")
    require(not workdir.exists() or workdir.is_dir(), f"--workdir {workdir} is a file")
    saved, steps = workdir / "config.json", orbax.saved_steps(workdir)
    if not saved.exists():
        require(not steps, f"--workdir {workdir} has checkpoints but no config.json; use another")
        require(not extend, f"--extend: --workdir {workdir} holds no run to make longer; leave --extend out")
        return config, [], None
    try:
        old = read_json(saved)
    except UserError as error:
        raise UserError(f"{error}; restore it or use another --workdir") from None
    require("seed" in old, f"--workdir {workdir} holds a converted checkpoint; use another, and --init={workdir}")
    if not steps:  # it belongs to whoever comes next
        lost = _lost_checkpoint(workdir, old)
        require(
            not lost,
            f"--workdir {workdir}: {lost}, but no checkpoint is left; restore {workdir / 'checkpoints'}, or delete the "
            "workdir to start anew",
        )
        require(not extend, f"--extend: --workdir {workdir} holds no checkpoint; leave --extend out to begin the run")
        return config, [], None
    config, notes, changed = adopt(old, config)
    before = old.get("optim.epochs")
    is_longer = isinstance(before, int | float) and before < config.optim.epochs
    length = [change for change in changed if change.startswith("optim.epochs: ")]
    if extend and is_longer:
        changed = [change for change in changed if change not in length]
    changed += [f"{key}: {old.get(key)} -> {value}" for key, value in start.items() if old.get(key) != value]
    require(
        not changed,
        f"--workdir {workdir} holds another experiment; use another --workdir, or undo: {'; '.join(changed)}"
        + ("; or give --extend, which makes a run longer" if changed == length and is_longer else "")
        + ("; --extend only makes a run longer" if changed == length and extend else ""),
    )
    return config, notes, before if extend and is_longer else None


def check_images(workdir: epath.Path, fingerprint: str) -> None:
    """Raises UserError where the newest checkpoint that can be read was trained on images of another fingerprint."""
    for step in sorted(orbax.saved_steps(workdir), reverse=True):
        path = workdir / "checkpoints" / str(step)
        try:
            before = read_json(path / META)["fingerprint"]
        except (UserError, KeyError):  # it is damaged, which restoring says
            continue
        require(
            before == fingerprint,
            f"checkpoint {path} was trained on other images ({before}) than data now gives ({fingerprint}); use "
            "another workdir",
        )
        return


def _lost_checkpoint(workdir: epath.Path, config: dict[str, Any]) -> str:
    """Says what shows that a workdir without checkpoints once had one; "" where its run may never have saved.

    A run makes the folder before config.json, and saves no checkpoint before the one ahead of it is complete.
    """
    last = max((line["step"] for line in writer.read(workdir)), default=0)
    gone = not is_remote(workdir) and not (workdir / "checkpoints").exists()
    every = config.get("checkpoint.every")
    if last > (0 if gone else 2 * every if isinstance(every, int) else math.inf):
        return f"metrics.jsonl reaches step {last}"
    return ""


def write_config(workdir: epath.Path, config: dict[str, Any]) -> None:
    """Makes the workdir and writes the flat config into it, from process 0."""
    if jax.process_index() == 0:
        workdir.mkdir(exist_ok=True)
        write_whole(workdir / "config.json", json.dumps(config, indent=1) + "\n")
