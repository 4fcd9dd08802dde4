"""Several processes for several devices: main.py starts itself once for each, and all walk through all stages together.

Nothing of this happens where somebody else has done it already (torchrun, srun), which Lightning knows.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ldm.common.files import UserError

PATIENCE = 30.0  # seconds that the others get to leave by themselves when one process has failed


class OnAllRanks(UserError):
    """A mistake that every process finds: one of them tells it."""


def needed(group: Any) -> bool:
    """Whether there is more than one device, and nobody has started the processes for them. group: a Lightning Trainer."""
    return group.world_size > 1 and not group.strategy.cluster_environment.creates_processes_externally


def rank() -> int:
    """Global rank, known before torch.distributed is."""
    return next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0)


def in_turn(group: Any, action: Callable[[], None]) -> None:
    """Rank 0 of each machine first, for what downloads files that the others then find. group: a Lightning Trainer."""
    for turn in (False, True):
        if (group.local_rank > 0) == turn:
            action()
        group.strategy.barrier()


def decided(group: Any, decide: Callable[[], Any]) -> Any:
    """-> what rank 0 decides, on all ranks; its UserError too."""
    answer = None
    if group.is_global_zero:
        try:
            answer = decide()
        except UserError as error:
            answer = OnAllRanks(str(error))
    answer = group.strategy.broadcast(answer)
    if isinstance(answer, OnAllRanks):
        raise answer
    return answer


def leave() -> None:
    """Closes the group of processes, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start(count: int, command: Sequence[str]) -> int:
    """Runs `command` in `count` processes of this machine; gives back the first exit status that is not 0, or 0.

    SIGINT and SIGTERM are passed on to all. When one process fails, the others, which would wait for it for ever, are
    asked to stop, and killed if they do not.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "NODE_RANK": "0"}
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    processes: list[subprocess.Popen] = []

    def tell(number: int, frame: object = None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for i in range(count):  # groups of their own: else Ctrl-C would reach them twice, from the terminal and from here
            place = {"RANK": str(i), "LOCAL_RANK": str(i)}
            processes.append(subprocess.Popen(command, env=shared | place, process_group=0))
        failed_at = None
        while None in (codes := [process.poll() for process in processes]):
            time.sleep(0.1)
            if failed_at is None and any(codes):
                failed_at = time.monotonic()
                tell(signal.SIGTERM)
            elif failed_at is not None and time.monotonic() - failed_at > PATIENCE:
                tell(signal.SIGKILL)
        return _status(processes)
    finally:
        tell(signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def _status(processes: list[subprocess.Popen]) -> int:
    """As a shell would say it: 128 + n for signal n. SIGTERM is what we ourselves end the others with: it counts last."""
    codes = [128 - process.returncode if process.returncode < 0 else process.returncode for process in processes]
    by_us = 128 + signal.SIGTERM
    return next((code for code in codes if code not in (0, by_us)), max(codes))
