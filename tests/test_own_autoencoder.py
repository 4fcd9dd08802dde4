"""docs/autoencoders.md: a user's own class, in the folder where he works, through both stages and to a picture."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ldm.__main__ import main
from main import main as train

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "autoencoders.md").read_text()
FILES = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", DOCS, re.DOTALL))  # name -> contents


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "LOCAL_RANK", "RANK"):  # what a training sets in this process is gone afterwards
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    for name, contents in FILES.items():
        (tmp_path / name).write_text(contents)
    yield tmp_path
    sys.modules.pop("patches", None)


def by_path(*arguments: str) -> subprocess.CompletedProcess:
    """main.py by its path, from the current folder, which PYTHONPATH does not name."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(ROOT / "main.py"), *arguments], capture_output=True, text=True, env=environment)


def test_the_example_is_short():
    assert set(FILES) == {"patches.py", "patches_ae.yaml", "patches_ldm.yaml"}
    assert len(FILES["patches.py"].splitlines()) < 40


def test_it_keeps_the_contract_and_the_number_of_promises_is_as_told(here, capsys):
    assert main(["check-autoencoder", "patches:Patches"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"tries {len(lines) - 2} promises" in DOCS


def test_both_stages_and_a_picture(here, text_encoder, capsys):
    short = ["trainer.max_steps=3", "stage1.trainer.max_steps=3", "data.train.params.count=40", "data.validation.params.count=8",
             "stage1.data.train.params.count=40", "stage1.data.validation.params.count=8", "sampling.count=2",
             f"model.params.conditioner.params.encoder={text_encoder}", "model.params.conditioner.params.max_length=24"]  # fmt: skip
    done = by_path("--base", "patches_ldm.yaml", "-t", *short)
    assert done.returncode == 0, done.stderr
    (first,), (second,) = (here / "logs").glob("patches_ae-*"), (here / "logs").glob("patches_ldm-*")
    assert [json.loads((run / "DONE").read_text())["steps"] for run in (first, second)] == [3, 3]
    draw = ["txt2img", "--ckpt", str(second), "--prompt", "a red circle", "--outdir", "out", "--steps", "2"]
    assert main(draw) == 2 and "--trust" in capsys.readouterr().err
    assert main([*draw, "--trust"]) == 0
    assert Image.open(here / "out" / "00000.png").size == (64, 64)
    # the same autoencoder from its file: another program's code unless the user says so
    source = ["--base", "patches_ldm.yaml", "-t", "--no-test", f"autoencoder={{ckpt: {first}}}",
              *(word for word in short if not word.startswith("stage1."))]  # fmt: skip
    assert train(source) == 2 and "--trust" in capsys.readouterr().err
    assert train([*source, "--trust"]) == 0
