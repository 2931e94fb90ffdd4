"""Checkpoints: {state, config, fingerprint of the images}, written by Orbax in the background.

The stream of batches needs no entry: it is a function of the config and the step.
"""

import contextlib
import importlib.util
import io
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from cjepa_jax.config import Checkpoint, UserError, one_line, require
from cjepa_jax.parsing import differences

# Files and folders, and TensorBoard's events, on gs://.
GCS_INSTALL = "pip install gcsfs==2026.10.1 google-cloud-storage==3.17.1"


class Checkpointer:
    """The checkpoints of one workdir.

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
        """The newest state, or None where there is none yet.

        Abstract_state: shapes, dtypes and shardings to restore to. Raises
        UserError where the checkpoint cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore())
        try:
            with quiet_on_error():
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
        return restored.state

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
        """Waits until everything is on disk."""
        self._manager.close()


@contextlib.contextmanager
def quiet_on_error() -> Iterator[None]:
    """Of several reads that fail, Orbax raises the first; the others' threads would print tracebacks over it."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            yield
        except Exception:
            time.sleep(1)  # until the other reads have failed too
            raise
    sys.stderr.write(said.getvalue())


def is_remote(path: epath.Path) -> bool:
    """Whether it lies in an object store, gs:// say: no folders, no appending, and files that appear whole."""
    return "://" in str(path)


def absolute(path: epath.Path) -> epath.Path:
    """As Orbax wants it; `resolve` would take gs:// for a folder here."""
    return path if is_remote(path) else path.resolve()


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def check_workdir(workdir: epath.Path, meta: dict[str, Any]) -> None:
    """Raises UserError where `workdir` cannot be used for this experiment."""
    lacking = [name for name in ("gcsfs", "google.cloud.storage") if not _installed(name)]
    require(
        not (str(workdir).startswith("gs://") and lacking),
        f"--workdir {workdir}: {' and '.join(lacking)} missing; {GCS_INSTALL}",
    )
    require(
        is_remote(workdir) or workdir.resolve().parent.is_dir(),
        f"--workdir {workdir}: {workdir.parent} does not exist; make it first, or mend the path",
    )
    require(not workdir.exists() or workdir.is_dir(), f"--workdir {workdir} is a file")
    saved = workdir / "config.json"
    if not saved.exists():
        require(
            not (workdir / "checkpoints").exists(),
            f"--workdir {workdir} has checkpoints but no config.json; use another",
        )
        return
    try:
        old = json.loads(saved.read_text())
    except ValueError as error:
        raise UserError(f"{saved} is damaged ({error}); restore it or use another --workdir") from None
    changed = differences(old, meta["config"])
    require(
        not changed,
        f"--workdir {workdir} holds another experiment; use another --workdir, or undo: {'; '.join(changed)}",
    )


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file that is never seen half."""
    new = path if is_remote(path) else path.with_name(f"{path.name}.new")
    new.write_text(text)
    if new != path:
        new.replace(path)


def write_config(workdir: epath.Path, config: dict[str, Any]) -> None:
    """Makes the workdir and writes the flat config into it, from process 0."""
    if jax.process_index() == 0:
        workdir.mkdir(exist_ok=True)
        write_whole(workdir / "config.json", json.dumps(config, indent=1) + "\n")
