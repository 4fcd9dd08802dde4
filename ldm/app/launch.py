"""Several processes for several devices: main.py starts itself once for each, and all walk through all stages together.

Nothing of this happens where somebody else has done it already (torchrun, srun), which Lightning knows.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from typing import Any

import torch

from ldm.common.files import OnAllRanks, UserError

log = logging.getLogger(__name__)
PATIENCE = 15.0  # seconds that the others get to leave by themselves when one process has failed
MEETING = 60.0  # seconds in which processes have to find one another
EXCHANGE = timedelta(minutes=30)  # that one process may be behind the others
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TOGETHER = {2, 3, *(128 + number for number in PASSED_ON)}  # statuses of main.py that all processes end with, one after another


def needed(group: Any) -> bool:
    """Whether there is more than one device, and nobody has started the processes for them. group: a Lightning Trainer."""
    return group.world_size > 1 and not group.strategy.cluster_environment.creates_processes_externally


def rank() -> int:
    """Global rank, known before torch.distributed is."""
    return next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0)


def world() -> int:
    """Number of processes, known before torch.distributed is."""
    return next((int(os.environ[name]) for name in ("WORLD_SIZE", "SLURM_NTASKS") if name in os.environ), 1)


def meet(place: int, count: int, device: torch.device, seconds: float = MEETING) -> None:
    """Process `place` of `count` finds the others, at MASTER_ADDR:MASTER_PORT of the environment. UserError, with what may be
    the cause, where they are not all there in time."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    here = f"rank {place} of {count} on {socket.gethostname()}"
    log.info("%s: meeting at %s:%s", here, host, port)
    try:
        store, *_ = next(torch.distributed.rendezvous("env://", place, count, timeout=timedelta(seconds=seconds)))
    except (torch.distributed.DistError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"{here}: the processes did not find one another at {host}:{port} in {seconds:g} s ({said}). Likely causes: not "
            f"{count} processes were started (trainer.devices x num_nodes, torchrun --nproc-per-node x --nnodes, srun "
            "--ntasks-per-node x --nodes); one of them failed first, see its message; MASTER_ADDR is not the first machine, or "
            "a firewall closes MASTER_PORT; another run has this port; the wrong network card (GLOO_SOCKET_IFNAME, "
            "NCCL_SOCKET_IFNAME)"
        ) from error
    store.set_timeout(EXCHANGE)
    nccl = device.type == "cuda"
    torch.distributed.init_process_group("nccl" if nccl else "gloo", store=store, rank=place, world_size=count,
                                         timeout=EXCHANGE, device_id=device if nccl else None)


def join(group: Any) -> None:
    """Before the first decision, the processes of a training find one another. group: a Lightning Trainer."""
    if group.world_size > 1 and not torch.distributed.is_initialized():
        environment = group.strategy.cluster_environment
        os.environ |= {"MASTER_ADDR": environment.main_address, "MASTER_PORT": str(environment.main_port)}
        meet(environment.global_rank(), group.world_size, group.strategy.root_device)
    group.strategy.setup_environment()


@contextmanager
def team() -> Iterator[None]:
    """For a command other than training, which torchrun or srun started several times: the processes find one another, and
    only rank 0 prints. MASTER_ADDR and MASTER_PORT say where; torchrun sets them."""
    if world() == 1:
        yield
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"{' and '.join(missing)}: not set, so that {world()} processes cannot find one another; export the "
                        "name of the first machine, and a port that is free on it")
    os.environ |= {"RANK": str(rank()), "WORLD_SIZE": str(world())}
    meet(rank(), world(), torch.device("cpu"))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if rank() else nullcontext():
            yield
    finally:
        leave()


def in_turn(group: Any, action: Callable[[], None]) -> None:
    """Rank 0 of each machine first, for what downloads files that the others then find. group: a Lightning Trainer."""
    for turn in (False, True):
        if (group.local_rank > 0) == turn:
            action()
        group.strategy.barrier()


def decided(group: Any, decide: Callable[[], Any]) -> Any:
    """-> what rank 0 decides, on all ranks; its UserError, or what a disk refuses it, too."""
    answer = None
    if group.is_global_zero:
        try:
            answer = decide()
        except (UserError, OSError) as error:
            answer = OnAllRanks(str(error))
    answer = group.strategy.broadcast(answer)
    if isinstance(answer, OnAllRanks):
        raise answer
    return answer


def leave() -> None:
    """Closes the group of processes, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fail() -> None:
    """Ends this process, one of several, with the traceback of the error at hand: at once, since whatever is left to do
    (closing groups, waiting for workers) may wait for the others, and they for this one."""
    log.exception("rank %d failed", rank())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def start(count: int, command: Sequence[str]) -> int:
    """Runs `command` in `count` processes of this machine; gives back the first exit status that is not 0, or 0.

    SIGINT, SIGTERM and SIGUSR1 are passed on to all. When one process fails, the others, which would wait for it for ever, are
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

    before = {number: signal.signal(number, tell) for number in PASSED_ON}
    try:
        for i in range(count):  # groups of their own: else Ctrl-C would reach them twice, from the terminal and from here
            place = {"RANK": str(i), "LOCAL_RANK": str(i)}
            processes.append(subprocess.Popen(command, env=shared | place, process_group=0))
        failed_at = None
        while None in (codes := [process.poll() for process in processes]):
            time.sleep(0.1)
            if failed_at is None and any(codes):
                failed_at, (place, code) = time.monotonic(), next((i, code) for i, code in enumerate(codes) if code)
                if code not in TOGETHER:
                    print(f"rank {place} ended with status {code}: the others are ended too", file=sys.stderr)
                    tell(signal.SIGTERM)
            elif failed_at is not None and time.monotonic() - failed_at > PATIENCE:
                tell(signal.SIGKILL)
        return _status(processes)
    finally:
        tell(signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def _status(processes: list[subprocess.Popen]) -> int:
    """As a shell would say it: 128 + n for signal n. Those that we ourselves end the others with count last."""
    codes = [128 - process.returncode if process.returncode < 0 else process.returncode for process in processes]
    by_us = (128 + signal.SIGTERM, 128 + signal.SIGKILL)
    return next((code for code in codes if code not in (0, *by_us)), None) or min(filter(None, codes), default=0)
