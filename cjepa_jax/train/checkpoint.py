"""Checkpoints: {state, config, fingerprint of the images}, written by Orbax in the background.

The stream of batches needs no entry: it is a function of the config and the step.
"""

import contextlib
import io
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from cjepa_jax.config import Checkpoint, Config
from cjepa_jax.errors import UserError, one_line, require
from cjepa_jax.files import absolute, check_bucket_support, check_writable, is_remote, read_json, write_whole
from cjepa_jax.settings import adopt

C = TypeVar("C", bound=Config)


class Checkpointer:
    """Writes and restores the checkpoints of one workdir.

    `meta` is {"config": flat config, "fingerprint": of the training images};
    only a workdir with the same may be continued.
    """

    def __init__(self, workdir: epath.Path, checkpoint: Checkpoint, meta: dict[str, Any]):
        """For a workdir that `check_workdir` has accepted."""
        self._directory = workdir / "checkpoints"
        self._meta = meta
        options = ocp.CheckpointManagerOptions(
            max_to_keep=checkpoint.keep_last,
            keep_period=checkpoint.keep_every or None,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(absolute(self._directory), options=options)
        self._every = checkpoint.every

    def restore(self, abstract_state: Any) -> Any | None:
        """Restores the newest state, or gives None where there is none yet.

        abstract_state: a TrainState of shapes, dtypes and shardings to restore to. Raises UserError where the
        checkpoint cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        try:
            with quiet_on_error():
                as_saved = _as_saved(abstract_state, self._directory / str(step) / "state")
                args = ocp.args.Composite(state=ocp.args.StandardRestore(as_saved), meta=ocp.args.JsonRestore())
                restored = self._manager.restore(step, args=args)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            reason = one_line(error)[:300]
            raise UserError(
                f"checkpoint {self._directory / str(step)} cannot be read; move it away to go on from the one before "
                f"it ({reason})"
            ) from error
        require(
            restored.meta["fingerprint"] == self._meta["fingerprint"],
            f"checkpoint {self._directory / str(step)} was trained on other images "
            f"({restored.meta['fingerprint']}) than data now gives ({self._meta['fingerprint']}); use another workdir",
        )
        if as_saved is abstract_state:
            return restored.state
        kept = {name: restored.state[name] for name in ("step", "params", "opt_state")}
        return abstract_state.replace(averages=_averages(restored.state), **kept)

    def save(self, step: int, state: Any) -> None:
        """Saves, due or not; returns while the writing goes on."""
        if step == self._manager.latest_step():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(self._meta))
        self._manager.save(step, args=args, force=True)

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs at this step."""
        return step % self._every == 0

    def close(self) -> None:
        """Waits until everything that was saved is on disk."""
        self._manager.close()


def _as_saved(state: Any, path: epath.Path) -> Any:
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


@contextlib.contextmanager
def quiet_on_error() -> Iterator[None]:
    """Keeps other threads quiet: of several reads that fail Orbax raises the first, and the others print tracebacks."""
    asyncio = logging.getLogger("asyncio")
    level = asyncio.level
    asyncio.setLevel(logging.CRITICAL)  # it tells of each further read that fails, at any time from now on
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            yield
        except Exception:
            for _ in range(10):  # until the other reads have failed too
                length = said.tell()
                time.sleep(1)
                if said.tell() == length:
                    break
            raise
    asyncio.setLevel(level)
    sys.stderr.write(said.getvalue())


def check_workdir(workdir: epath.Path, config: C, start: Mapping[str, Any]) -> tuple[C, list[str]]:
    """Checks that `workdir` can be used for this experiment.

    Returns the settings to train with, which are `config` but for settings that are younger than the workdir, and a
    note about each of these. `start` is what else of config.json must stay as it is: the data and checkpoint that the
    run started from. Raises UserError.
    """
    check_bucket_support(workdir, "--workdir")
    require("\0" not in str(workdir), "--workdir holds a character that no path may hold")
    require(
        is_remote(workdir) or workdir.resolve().parent.is_dir(),
        f"--workdir {workdir}: {workdir.parent} does not exist; make it first, or mend the path",
    )
    check_writable(workdir, "--workdir")
    require(not workdir.exists() or workdir.is_dir(), f"--workdir {workdir} is a file")
    saved = workdir / "config.json"
    if not saved.exists():
        # A run that ended while it started may have left the empty folder.
        require(
            not (workdir / "checkpoints").exists() or not any((workdir / "checkpoints").iterdir()),
            f"--workdir {workdir} has checkpoints but no config.json; use another",
        )
        return config, []
    try:
        old = read_json(saved)
    except UserError as error:
        raise UserError(f"{error}; restore it or use another --workdir") from None
    require("seed" in old, f"--workdir {workdir} holds a converted checkpoint; use another, and --init={workdir}")
    config, notes, changed = adopt(old, config)
    changed += [f"{key}: {old.get(key)} -> {value}" for key, value in start.items() if old.get(key) != value]
    require(
        not changed,
        f"--workdir {workdir} holds another experiment; use another --workdir, or undo: {'; '.join(changed)}",
    )
    return config, notes


def write_config(workdir: epath.Path, config: dict[str, Any]) -> None:
    """Makes the workdir and writes the flat config into it, from process 0."""
    if jax.process_index() == 0:
        workdir.mkdir(exist_ok=True)
        write_whole(workdir / "config.json", json.dumps(config, indent=1) + "\n")
