"""Several processes as one run: started where the environment asks for it, and stopped together."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from cjepa_jax.errors import UserError, one_line, require
from cjepa_jax.tpu import chips
from cjepa_jax.train import peers

_NOTICE = 60.0  # seconds of a step
ELSEWHERE = "another process could not go on and says why; all have stopped"
GO_ON, STOP, FAIL = range(3)  # what a process may ask of all; the largest counts


def start(coordinator_address: str | None, num_processes: int | None, process_id: int | None, timeout: int) -> None:
    """Connects this process with the others, where the flags, Slurm or a TPU slice say that there are some.

    Raises UserError where flags are missing, and where the others cannot be
    reached within `timeout` seconds.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    require(len(missing) in (0, 3), f"{' and '.join(missing)} missing: several processes need all three flags")
    slurm = int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ
    # Starting is harmless on a single TPU VM, except in notebooks, which name this machine as the only one.
    named = os.environ.get("TPU_WORKER_HOSTNAMES", "several,perhaps")
    alone = "," not in named and "MEGASCALE_COORDINATOR_ADDRESS" not in os.environ
    tpu = os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu") and chips.may_be_here() and not alone
    if not (slurm or tpu or not missing):
        return
    address = coordinator_address or "the first process (as Slurm or the TPU slice names it)"
    print(f"connecting with the other processes through {address}", file=sys.stderr, flush=True)
    try:
        if coordinator_address and process_id:  # JAX would end the process without a word to Python
            reach(coordinator_address, timeout)
        jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, which is ours: see `Consensus`
        with peers.without_abort():
            jax.distributed.initialize(**given, initialization_timeout=timeout)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"the processes did not find one another within {timeout} s through {address}; is each one running, and "
            f"can it be reached from {os.uname().nodename}? ({one_line(error)[:200]})"
        ) from None
    peers.watch()


def reach(address: str, timeout: float) -> None:
    """Waits until someone listens at HOST:PORT. Raises OSError where nobody has within `timeout` seconds."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def meet(name: str) -> None:
    """Waits until all processes have come to this place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def told_by_first(value: bool) -> bool:
    """Gives what process 0 says; all processes wait for it."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


def text_of_first(text: str) -> str:
    """Gives the text of process 0, in ASCII and as long in all processes; all wait for it."""
    return bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(text.encode(), np.uint8))).decode()


def wait_for(results: PyTree) -> None:
    """Waits until the devices have computed some arrays; says after a minute that other processes are waited for."""
    since = time.monotonic()
    while jax.process_count() > 1 and not all(x.is_ready() for x in jax.tree.leaves(results)):
        time.sleep(0.0005)
        if time.monotonic() - since > _NOTICE:
            text = "waiting for the other processes for a minute; one that waits for an image names the image file"
            print(text, file=sys.stderr, flush=True)
            break
    jax.block_until_ready(results)


def any_of_them(mine: bool) -> bool:
    """Tells whether something is true for one of the processes; all of them call this."""
    return mine if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(mine)).any())


@contextlib.contextmanager
def refused_together() -> Iterator[None]:
    """Raises UserError in all processes where the block raises it in one of them; all of them enter it."""
    refused: UserError | None = None
    try:
        yield
    except UserError as error:
        refused = error
    if any_of_them(refused is not None):
        raise refused or UserError(ELSEWHERE)


class Consensus:
    """Lets all processes do after the same step what one of them asks for."""

    def __init__(self, batch: jax.sharding.Sharding, whole: jax.sharding.Sharding):
        self._batch = batch
        self._largest = jax.jit(lambda requests: requests.max(), out_shardings=whole)
        self._answer: Any = np.int32(GO_ON)

    def ask(self, request: int) -> None:
        """Sends a request; all processes call this after each step, and the answer is there when that step is done."""
        if jax.process_count() == 1:
            self._answer = np.int32(request)
            return
        mine = np.full(jax.local_device_count(), request, np.int32)  # a row a device
        self._answer = self._largest(jax.make_array_from_process_local_data(self._batch, mine))

    def result(self) -> int:
        """Gives the largest of the requests that were sent last; waits for the step."""
        return int(jax.device_get(self._answer))
