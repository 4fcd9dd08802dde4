"""main.py in child processes that need not import torch again: they are forked."""

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  all that the children would have to import
import yaml

import ldm.lit  # noqa: F401
from ldm.app import guards, launch, parts, plan, runs, stages, survey  # noqa: F401
from ldm.callbacks import dashboard, images, progress, promises, stop  # noqa: F401

torch.set_num_threads(1)  # a fork waits for ever for the threads that its parent had

PIXELS = {
    "name": "pixels", "autoencoder": {"target": "autoencoder.base.Identity"},
    "model": {"target": "ldm.lit.DiffusionModule", "params": {
        "network": {"target": "ldm.networks.unet.UNet", "params": {
            "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "transformer_depth": [0], "num_heads": 2, "patch_size": 8}},
        "optimizer": {"target": "torch.optim.AdamW", "params": {"lr": 1e-3}}, "ema_decay": 0.9}},
    "data": {"train": {"target": "ldm.data.shapes.Shapes", "params": {"count": 10}}}, "loader": {"batch_size": 2},
    "checkpoint": {"every": 2, "keep": 2}, "logging": {"every": 1, "images_every": 0, "wandb": False},
    "trainer": {"max_steps": 4, "accelerator": "cpu"}}  # fmt: skip


def write(folder: Path, **changes) -> list[str]:
    """-> arguments that train the smallest diffusion model, on pixels."""
    (folder / "pixels.yaml").write_text(yaml.safe_dump({**PIXELS, **changes}))
    return ["-b", str(folder / "pixels.yaml"), "-t", "-l", str(folder / "logs"), "--no-test"]


def start(arguments: list[str], output: Path, environment: dict[str, str] | None = None, call=None) -> int:
    """-> the id of a child that runs main(arguments), or ``call``; what it says goes to ``output``."""
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        with open(output, "a") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ |= environment or {}
        if call is None:
            from main import main as call
        status = call(arguments)
    except SystemExit as left:
        status = left.code
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def status(child: int, seconds: float = 120.0) -> int:
    """Its exit status, as a shell says it; it is killed where it takes longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(code)
            return 128 - code if code < 0 else code
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"process {child} was not done after {seconds:g} s")


def torchrun(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {"TORCHELASTIC_RUN_ID": "none", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip


def slurm(rank: int, port: int) -> dict[str, str]:
    """What srun tells a task."""
    return {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_JOB_ID": str(port), "SLURM_JOB_NAME": "train",
            "SLURM_NODELIST": "localhost", "MASTER_PORT": str(port)}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pair(kind, folder: Path, arguments: list[str], call=None) -> tuple[list[int], list[str]]:
    """-> statuses of two processes that ``kind`` (torchrun, slurm) starts, and what each said. ``call``: see ``start``."""
    port = free_port()
    children = [start(arguments, folder / f"{kind.__name__}-{rank}.txt", kind(rank, port), call) for rank in (0, 1)]
    return [status(child) for child in children], [(folder / f"{kind.__name__}-{rank}.txt").read_text() for rank in (0, 1)]
