"""How a run uses Orbax: quietly, without waits that one process could miss, and with as little standing still."""

import contextlib
import io
import logging
import re
import sys
import time
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp
from etils import epath

from cjepa_jax.files import forget_listings, is_remote


def saved_steps(workdir: epath.Path) -> list[int]:
    """Lists the steps whose checkpoints are complete, in no order.

    On gs:// an incomplete one has its final name, too, while it is written, or when the run was killed meanwhile.
    """
    folder = workdir / "checkpoints"
    forget_listings(folder)
    found = [path for path in folder.iterdir() if re.fullmatch("[0-9]{1,18}", path.name)] if folder.is_dir() else []
    complete = ocp.step.is_checkpoint_finalized
    return [int(path.name) for path in found if not is_remote(path) or complete(path)]


def write_arrays_whole() -> None:
    """Makes a single process write an array that all its devices hold from one of them.

    By default Orbax takes a part of it from every device, such as an eighth from each of eight. That lets several
    processes share the writing; in a single process the cutting only makes the run wait longer.
    """
    handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


def reader(handler: type[ocp.CheckpointHandler]) -> ocp.Checkpointer:
    """Reads states without a wait for other processes, so that one that fails leaves nobody waiting.

    Each process reads the parts of arrays that its devices hold. handler: Orbax' class for what is read.
    """
    mine = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"process{mine}"
    )
    return ocp.Checkpointer(handler(multiprocessing_options=alone), multiprocessing_options=alone)


def meet_writers(*, key: str, timeout_ms: int) -> None:
    """Lets Orbax' threads, which write, wait for those of the other processes.

    One that could not write does not wait: the others will not come, and its error is raised only afterwards.
    """
    if sys.exc_info()[1] is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def quieten_threads() -> None:
    """Keeps threads from telling of failed writes: the first is raised in the main one, and the others say no more."""
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


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
