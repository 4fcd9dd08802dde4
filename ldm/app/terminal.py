"""What a person sees of a program that trains: lines on stdout, log records and errors on stderr, nobody else's chatter."""

import logging
import sys
import warnings

from tqdm import tqdm

CHATTER = {  # of Lightning, where we know what it warns of
    "does not have many workers", "is not resumable", "ModelSummary", "treespec, LeafSpec", "No `test_dataloader`",
    "TensorBoard support", "exists and is not empty", "`isinstance", "Found .* module.s. in eval mode",
    "The `srun` command is available", "Trying to infer the `batch_size`", "sync_dist=True",
    "has no length", "Consider setting `persistent_workers", "The total number of parameters detected",
}  # fmt: skip


def say(text: str) -> None:
    """A line on stdout, above the progress bar where there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def silent(text: str) -> None:
    """What the other ranks say."""


def report(mistakes: str) -> None:
    """Each line as an error of its own."""
    for line in mistakes.splitlines():
        print(f"error: {line}", file=sys.stderr)


class Records(logging.Handler):
    """Log records on stderr, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up(rank: int) -> None:
    """Log records of ours from INFO on (from WARNING on where rank is not 0), of others from WARNING on."""
    handler = Records()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    root = logging.getLogger()
    root.handlers = [other for other in root.handlers if not isinstance(other, Records)] + [handler]
    for name in ("ldm", "autoencoder"):
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for text in CHATTER:
        warnings.filterwarnings("ignore", message=f".*{text}")


def hush(*names: str) -> None:
    """Errors only from these loggers. A package that is imported may set its loggers up anew: call this afterwards."""
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
