"""Files that are whole or absent, hashes of contents, and the error for people's mistakes."""

import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

WORKER = re.compile(r"Caught UserError in .*\.\nOriginal Traceback")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # disk, quota, limit of a file's size


class UserError(ValueError):
    """A mistake in what a person gave (file, config, argument). The message is one line that says what came, what was
    expected and what to do; main.py and `python -m ldm` print it without a traceback and exit with status 2. The same where
    torch has put the traceback of one of its loader's workers before it."""

    def __str__(self) -> str:
        said = super().__str__()
        return said.rpartition("UserError: ")[2].rstrip() if WORKER.match(said) else said


class OnAllRanks(UserError):
    """A mistake that every process finds: one of them tells it."""


def one_line(error: Exception) -> str:
    """What an error of somebody else says, for a message of ours."""
    return " ".join(str(error).split())[:150] or type(error).__name__


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path` (made if absent) with the same suffix; the body writes there.

    When the body ends, the file is flushed to disk and renamed over `path`: readers see the old file or the whole new
    one, whatever happens. When the body raises, the temporary file is removed and `path` is as it was. A full disk
    (quota, limit of a file's size) raises OSError with `path` and the free space in its message. Whoever may read new files
    may read it: some writers (safetensors) make theirs for the owner alone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent.resolve())
    temporary = path.parent / f"{_mark()}{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}"
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask, which cannot be asked for without changing it
        temporary.unlink()
        yield temporary
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # some network file systems cannot flush a folder; the file itself is safe
            _flush(path.parent)
    except Exception as error:
        number = _no_space(error, temporary)
        if number is None:
            raise
        size = temporary.stat().st_size if temporary.exists() else 0
        message = f"no space to write {path}: stopped after {_mib(size)}, {_mib(free_bytes(path))} are free there"
        raise OSError(number, message) from error
    finally:
        temporary.unlink(missing_ok=True)


def _mark() -> str:
    return f".tmp-{socket.gethostname()}-"  # hidden, so that no pattern like step-*.ckpt takes it for a finished file


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _no_space(error: Exception, temporary: Path) -> int | None:
    """-> the error number if writing failed for want of space. safetensors has it in its text (`os error 28`), where
    torch.save hides it (`unexpected pos 768 vs 662`): then ask the disk, does the file take another block?"""
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    if number is not None:
        return number if number in FULL else None
    try:
        with open(temporary, "r+b", buffering=0) as file:
            file.seek(0, os.SEEK_END)
            file.write(bytes(2**16))
            os.fsync(file)
    except OSError as refused:
        return refused.errno if refused.errno in FULL else None
    return None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@cache
def _remove_leftovers(folder: Path) -> None:
    """Removes, when this process first writes to the folder, the temporary files of writers that were killed on this
    machine: a run that is killed again and again must not fill the disk."""
    for name in os.listdir(folder):
        pid = name.removeprefix(_mark()).split("-")[0]
        if name.startswith(_mark()) and pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            (folder / name).unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def file_sha256(path: str | os.PathLike) -> str:
    """-> 64 hex digits over the bytes of the file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*parts) -> str:
    """-> first 16 hex digits of the SHA-256 over the parts as canonical JSON: plain data (str, numbers, None, lists,
    dicts whatever the order of their keys), bytes and paths. Anything else raises TypeError."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_as_json)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_json(value):
    if isinstance(value, bytes):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"digest takes plain data, bytes and paths; got {type(value).__name__}")


def parse_json(text: str, where: str | os.PathLike) -> Any:
    """What the text says. UserError, in one line that begins with `where`, for whatever Python cannot read: no JSON, numbers of
    thousands of digits, lists in lists a thousand deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON that can be read: {error}") from error


def free_bytes(path: str | os.PathLike) -> int:
    """-> bytes that can still be written where `path` is or will be (its nearest folder that exists)."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """-> the choice most like `word`; None where nothing is close. Upper and lower case are alike, but for a choice between
    names that differ in nothing else."""
    choices = list(choices)
    found = difflib.get_close_matches(str(word).lower(), {choice.lower() for choice in choices}, n=1)
    same = [choice for choice in choices if found and choice.lower() == found[0]]
    return max(same, key=lambda choice: difflib.SequenceMatcher(None, str(word), choice).ratio(), default=None)
