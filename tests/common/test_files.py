"""A file is whole or absent, whatever happens while it is written; hashes tell contents apart."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.common import files
from ldm.common.files import UserError, atomic_write, digest, file_sha256, free_bytes, nearest

ROOT = Path(__file__).parents[2]


def run(code: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_target_appears_whole_when_the_body_ends(tmp_path):
    target = tmp_path / "new" / "last.ckpt"
    with atomic_write(target) as temporary:
        temporary.write_text("weights")
        assert not target.exists()
        assert temporary.parent == target.parent and temporary.suffix == ".ckpt"
        assert not list(target.parent.glob("last*"))  # no pattern for checkpoints takes the unfinished one
    assert target.read_text() == "weights" and names(target.parent) == ["last.ckpt"]


@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt(), UserError("no"), OSError("unnumbered")])
def test_the_old_file_stays_when_the_body_raises(tmp_path, error):
    target = tmp_path / "last.ckpt"
    target.write_text("old")
    with pytest.raises(type(error)) as raised, atomic_write(target) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert raised.value is error
    assert target.read_text() == "old" and names(tmp_path) == ["last.ckpt"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    target = tmp_path / "a.txt"
    with atomic_write(target) as first, atomic_write(target) as second:
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first" and names(tmp_path) == ["a.txt"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    with atomic_write(tmp_path / "ours") as temporary:
        temporary.write_text("")
    assert (tmp_path / "ours").stat().st_mode == plain.stat().st_mode


def test_a_full_disk_names_the_file_and_the_space(tmp_path, monkeypatch):
    target = tmp_path / "last.ckpt"
    target.write_text("old")
    monkeypatch.setattr(files, "free_bytes", lambda path: 3 * 2**19)
    message = r"no space to write .*last.ckpt: stopped after 1.0 MiB, 1.5 MiB are free"
    with pytest.raises(OSError, match=message) as error, atomic_write(target) as temporary:
        temporary.write_bytes(bytes(2**20))
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.errno == errno.ENOSPC
    assert target.read_text() == "old" and names(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize(
    ("save", "after"),
    [("torch.save(torch.zeros(2**20), temporary)", "1.0"), ("save_file({'w': torch.zeros(2**20)}, temporary)", "0.0")],
)
def test_a_limit_that_writers_hide_is_told(tmp_path, save, after):
    """When the disk takes no more, torch.save raises RuntimeError('unexpected pos ...'), safetensors its own error."""
    code = """
import resource, signal, sys, torch
from safetensors.torch import save_file
from ldm.common.files import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    with atomic_write(sys.argv[1]) as temporary:
        SAVE
except OSError as error:
    print(error)
""".replace("SAVE", save)
    target = tmp_path / "last.ckpt"
    torch.save(torch.ones(2), target)
    assert f"no space to write {target}: stopped after {after} MiB" in run(code, target).stdout
    assert torch.equal(torch.load(target, weights_only=True), torch.ones(2)) and names(tmp_path) == ["last.ckpt"]


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_cleans_up(tmp_path):
    target = tmp_path / "last.ckpt"
    target.write_text("old")
    killed = run(
        "import os, signal, sys\n"
        "from ldm.common.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n",
        target,
    )
    assert killed.returncode == -signal.SIGKILL
    assert target.read_text() == "old" and len(names(tmp_path)) == 2
    with atomic_write(tmp_path / "other.json") as temporary:
        temporary.write_text("{}")
    assert names(tmp_path) == ["last.ckpt", "other.json"]


def test_a_writer_that_lives_keeps_its_file(tmp_path):
    code = (
        "import sys\nfrom ldm.common.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as temporary: temporary.write_text('{}')\n"
    )
    with atomic_write(tmp_path / "slow.ckpt") as temporary:
        temporary.write_text("slow")
        assert run(code, tmp_path / "quick.json").returncode == 0
    assert names(tmp_path) == ["quick.json", "slow.ckpt"]


def test_digest_is_of_the_content_not_of_its_order():
    assert digest({"a": 1, "b": [1, None, 0.5]}) == digest({"b": [1, None, 0.5], "a": 1})
    expected = hashlib.sha256(b'["x",{"a":1}]').hexdigest()[:16]
    assert digest("x", {"a": 1}) == expected
    assert digest(Path("/x")) == digest("/x") and digest((1, 2)) == digest([1, 2])


def test_digest_tells_apart():
    parts = [
        (),
        ("",),
        ("a", "b"),
        ("ab",),
        (["a", "b"],),
        (b"ab",),
        (1,),
        ("1",),
        (1.5,),
        (None,),
        ("None",),
        ({"a": 1},),
    ]
    assert len({digest(*part) for part in parts}) == len(parts)
    with pytest.raises(TypeError, match="object"):
        digest(object())


def test_file_sha256(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1


def test_free_bytes_of_a_path_that_is_still_to_come(tmp_path):
    status = os.statvfs(tmp_path)
    total = status.f_frsize * status.f_blocks
    assert 0 < free_bytes(tmp_path / "not" / "yet" / "there.ckpt") < total


def test_nearest():
    assert nearest("model_chanels", ["model_channels", "mult"]) == "model_channels"
    assert nearest("dpmpp2m", ["ddim", "DPMPP_2M"]) == "DPMPP_2M"
    assert nearest("zzz", ["ddim"]) is None and nearest("x", []) is None


def test_user_errors_are_value_errors():
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_whoever_may_read_new_files_may_read_these(tmp_path, umask):
    import torch
    from safetensors.torch import save_file

    before = os.umask(umask)
    try:
        (tmp_path / "plain").touch()
        with atomic_write(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.ones(1)}, temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
