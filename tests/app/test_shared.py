"""Commands that torchrun or srun start several times give what one process gives, once, and one voice tells of it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import pair, slurm, torchrun
from PIL import Image

from ldm.__main__ import main, rank
from ldm.app import drawing, png, terminal
from ldm.data.shapes import Shapes
from ldm.load import load

ROOT = Path(__file__).parents[2]


def command(arguments):
    """`python -m ldm`."""
    terminal.set_up(rank())
    return main(arguments)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def three(ckpt, folder):
    return ["txt2img", "--ckpt", ckpt, "--device", "cpu", "--prompt", "a red star", "a blue circle", "a green square", "--outdir",
            str(folder), "--steps", "3", "--sampler", "ddpm", "--seed", "5"]  # fmt: skip


@pytest.mark.parametrize("kind, batch", [(torchrun, 1), (slurm, 2)])
def test_two_processes_draw_what_one_draws(ckpt, tmp_path, capsys, monkeypatch, kind, batch):
    """Each picture once: its file says which process wrote it."""
    assert main([*three(ckpt, tmp_path / "one"), "--batch-size", str(batch)]) == 0
    said = capsys.readouterr().out
    write, wrote = png.write, tmp_path / "wrote"
    wrote.mkdir()

    def noted(path, image, about):
        with open(wrote / Path(path).name, "a") as file:
            file.write(str(drawing.place()[0]))
        write(path, image, about)

    monkeypatch.setattr(png, "write", noted)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    codes, (first, second) = pair(kind, tmp_path, [*three(ckpt, tmp_path / "two"), "--batch-size", str(batch)], command)
    assert codes == [0, 0], first + second
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two and sorted(one) == ["00000.png", "00001.png", "00002.png", "sheet.png"]
    assert said.replace("/one", "/two") in first and "picture" not in second
    ranks = {path.name: path.read_text() for path in wrote.iterdir()}
    shares = ["0", "1", "0"] if batch == 1 else ["0", "0", "1"]
    assert ranks == {**{f"{i:05d}.png": share for i, share in enumerate(shares)}, "sheet.png": "0"}


def test_pictures_from_pictures_and_between_prompts(ckpt, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    for name, arguments in (
        ("img2img", ["--image", tmp_path / "red.png", "--prompt", "a star", "--n-samples", 3]),
        ("interpolate", ["--prompt", "a star", "a circle", "--frames", 3, "--animation", tmp_path / "NAME.gif"]),
        ("edit", ["--image", tmp_path / "red.png", "--prompt", "a star", "a circle"]),  # there is nothing to share
    ):
        one, two = ([name, "--ckpt", ckpt, "--device", "cpu", "--steps", "2", "--outdir", str(tmp_path / name / which),
                     *(str(word).replace("NAME", f"{name}/{which}/moving") for word in arguments)] for which in ("one", "two"))  # fmt: skip
        assert main(one) == 0
        codes, texts = pair(torchrun, tmp_path, two, command)
        assert codes == [0, 0], texts
        assert contents(tmp_path / name / "one") == contents(tmp_path / name / "two")


def test_mistakes_are_told_once_and_nothing_is_written(ckpt, tmp_path):
    for i, (arguments, told) in enumerate((
        (three(ckpt, tmp_path / "out")[:-2], None), (["txt2imgg"], "no command"), (["txt2img", "--promt", "a"], "no argument --promt"),
        ([*three(ckpt, tmp_path / "no"), "--height", "33", "--width", "32"], "nearest"),
        (three(ckpt, tmp_path / "out"), "00000.png: is there already"),
    )):  # fmt: skip
        (tmp_path / str(i)).mkdir()
        codes, (first, second) = pair(torchrun, tmp_path / str(i), arguments, command)
        if told is None:
            assert codes == [0, 0], first + second
        else:
            assert codes == [2, 2] and told in first and first.count("error: ") == 1 and second == ""
    assert not (tmp_path / "no").exists()


def test_one_that_cannot_write_ends_them_all(ckpt, tmp_path, monkeypatch):
    write = png.write

    def full(path, image, about):
        if drawing.place()[0] == 1:
            raise OSError(28, "No space left on device", str(path))
        write(path, image, about)

    monkeypatch.setattr(png, "write", full)
    began = time.monotonic()
    codes, (first, second) = pair(torchrun, tmp_path, three(ckpt, tmp_path / "out"), command)
    assert codes == [1, 2] and "rank 0 failed" in first and "error: [Errno 28] No space left" in second
    assert time.monotonic() - began < 30 and "pictures in" not in first


def test_two_processes_measure_what_one_measures(ckpt, tmp_path):
    big, data = load(ckpt), Shapes(count=5)
    big.sampling["size"] = [64, 64]
    big.save(tmp_path / "big.ckpt")
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        png.write(tmp_path / "pictures" / f"{i}.png", drawing_of(data[i]["image"]), None)
    for metric, arguments in (
        ("adherence", ["--n", "6", "--n-held-out", "3", "--steps", "1", "--batch-size", "2"]),
        ("autoencoder", ["--images", str(tmp_path / "pictures"), "--features", "random-conv"]),
    ):
        words = ["evaluate", metric, "--ckpt", str(tmp_path / "big.ckpt"), "--device", "cpu", *arguments, "--out"]
        assert main([*words, str(tmp_path / "one.json")]) == 0
        codes, texts = pair(torchrun, tmp_path, [*words, str(tmp_path / "two.json")], command)
        assert codes == [0, 0], texts
        one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
        assert same(one, two), (one, two)


def drawing_of(image):
    from ldm.callbacks.sheet import to_image

    return to_image(image)


def same(one, two) -> bool:
    """But for what depends on the clock."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one if "second" not in key and "speed" not in key)
    return one == (pytest.approx(two, rel=1e-5) if isinstance(one, float) else two)


@pytest.mark.slow
def test_torchrun_itself(ckpt, tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ldm"]
    assert main(three(ckpt, tmp_path / "one")) == 0
    done = subprocess.run([*words, *three(ckpt, tmp_path / "two")], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert done.stdout == f"3 pictures in {tmp_path / 'two'}\nall on {tmp_path / 'two' / 'sheet.png'}\n"
    running = subprocess.Popen([*words, *three(ckpt, tmp_path / "three"), "--n-samples", "1000"], cwd=ROOT, stderr=subprocess.PIPE)
    while not (tmp_path / "three").exists():
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) != 0
