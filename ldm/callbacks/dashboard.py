"""Weights & Biases: numbers and pictures of a run in the browser. Whatever goes wrong here ends no training."""

import logging
import netrc
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from PIL import Image

from ldm.common.files import digest

log = logging.getLogger(__name__)
HOST = "api.wandb.ai"
PATIENCE = 30  # seconds that wandb may take to reach its server, or to take what it is given


class Dashboard:
    """One run on wandb, of rank 0. Without a key (WANDB_API_KEY or ~/.netrc) it is written to `folder`/wandb, from where
    `wandb sync` sends it later; WANDB_MODE decides where it is set. A resumed run keeps its id.

    options: true, or arguments of wandb.init that take the place of ours (project, entity, group, tags, mode ...).
    """

    def __init__(self, folder: Path, config: dict, options: bool | dict = True) -> None:
        self.run: Any = None
        self._try("start", lambda: self._start(Path(folder), config, options if isinstance(options, dict) else {}))

    def _start(self, folder: Path, config: dict, options: dict) -> None:
        import wandb

        self._image = wandb.Image
        settings = wandb.Settings(silent=True, console="off", init_timeout=PATIENCE)
        ours = {"project": "latent-diffusion", "name": folder.name, "id": digest(folder.name), "resume": "allow",
                "dir": str(folder), "config": config, "mode": mode(), "settings": settings}
        arguments = ours | options
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(**arguments)
        except wandb.errors.CommError as error:
            log.warning("wandb cannot be reached (%s): this run is written offline", _short(error))
            wandb.teardown()  # its process believes that the run has begun
            self.run = wandb.init(**arguments | {"mode": "offline"})

    def log(self, row: dict) -> None:
        numbers = {name: value for name, value in row.items() if value is not None}
        self._try("log", lambda: self.run.log(numbers, step=row["step"]))

    def picture(self, name: str, image: Image.Image, caption: str, step: int) -> None:
        self._try("log pictures", lambda: self.run.log({name: self._image(image, caption=caption)}, step=step))

    def finish(self) -> None:
        self._try("finish", lambda: self.run.finish())
        self.run = None

    def _try(self, what: str, action: Callable[[], None]) -> None:
        """Any error of a service that training does not depend on: told once, then the dashboard stays shut."""
        if self.run is None and what != "start":
            return
        error = caught(action) if what == "start" else within(PATIENCE, action)  # the start has its own limit
        if error is not None:
            self.run = None
            log.warning("wandb failed to %s (%s): training goes on without it", what, _short(error))
            shut()


def caught(action: Callable[[], None]) -> Exception | None:
    """What goes wrong."""
    try:
        action()
    except Exception as error:
        return error
    return None


def within(seconds: float, action: Callable[[], None]) -> Exception | None:
    """What goes wrong; a TimeoutError where it takes longer, which is then left to itself."""
    found: list[Exception | None] = []
    thread = Thread(target=lambda: found.append(caught(action)), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else TimeoutError(f"no answer in {seconds:g} s")


def shut() -> None:
    """Ends wandb's own process, which this one would wait for when it ends; one that does not answer is killed."""
    wandb = sys.modules.get("wandb")
    if wandb is None or within(PATIENCE, wandb.teardown) is None:
        return
    for said in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended since
            words = said.read_bytes().split(b"\0")
            if words[0].endswith(b"wandb-core") and str(os.getpid()).encode() in words:
                os.kill(int(said.parent.name), signal.SIGKILL)


def mode() -> str:
    """WANDB_MODE if it is set, else "online" where there is a key, else "offline"."""
    return os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")


def has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", f"https://{HOST}").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
