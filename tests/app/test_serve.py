"""`serve`: the page draws what the commands draw."""

import sys

import pytest
import torch
from drawn import fails, levels, picture, same
from PIL import Image
from random_models import random_model

from ldm import tasks
from ldm.__main__ import make_parser
from ldm.app import png, serve
from ldm.common.files import UserError

SAID = {"prompt": "a red star", "negative_prompt": "", "n_samples": 2, "seed": 3, "steps": 2, "scale": 2.0, "sampler": "ddim",
        "image": None, "strength": 0.5}  # fmt: skip


def arguments(ckpt):
    return make_parser().parse_args(["serve", "--ckpt", str(ckpt)])


def drawn(files):
    import numpy as np

    return [np.asarray(Image.open(file)) for file in files]


def test_what_the_fields_say_is_drawn(ckpt, bundle, tmp_path):
    files = serve.draw(bundle, arguments(ckpt), tmp_path, SAID)
    made = bundle.generate(["a red star"] * 2, seed=3, steps=2, guidance=2.0, sampler="ddim", batch_size=1)
    assert same(drawn(files), levels(made)) and png.read(files[1])["seed"] == 4
    picture(tmp_path / "a.png", 40, 64)
    (file,) = serve.draw(bundle, arguments(ckpt), tmp_path, SAID | {"image": str(tmp_path / "a.png"), "n_samples": 1})
    about = png.read(file)
    assert (about["task"], about["strength"], about["size"]) == ("img2img", 0.5, [32, 32])
    middle = Image.open(tmp_path / "a.png").crop((12, 0, 52, 40)).resize((32, 32), Image.Resampling.LANCZOS)
    start = torch.tensor(list(middle.getdata())).view(32, 32, 3).permute(2, 0, 1)[None] / 127.5 - 1
    made = tasks.img2img(bundle, start, "a red star", strength=0.5, seed=3, steps=2, guidance=2.0, sampler="ddim")
    assert same(drawn([file]), levels(made))
    for wrong, told in (({"prompt": "--ckpt /etc/passwd", "steps": 0}, "expected a whole number from 1"), ({"sampler": "dimm"}, "nearest: 'ddim'")):
        with pytest.raises(UserError, match=told):
            serve.draw(bundle, arguments(ckpt), tmp_path, SAID | wrong)


def test_models_that_want_what_has_no_field(bundle, model_config):
    assert serve.reads(bundle) == {"caption"}
    label = {"target": "ldm.conditioners.label.ClassLabel", "params": {"classes": 5, "width": 16, "dropout": 0.1}}
    assert serve.reads(random_model(model_config, label)) == {"class"} and serve.reads(random_model(model_config, None)) == set()
    with pytest.raises(UserError, match="`python -m ldm generate` takes --segmentation"):
        serve.reads(random_model(model_config, {"target": "ldm.conditioners.spatial.SemanticMap", "params": {"classes": 4}}))


def test_without_gradio_one_line_says_so(ckpt, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "serve needs the gradio library" in (told := fails(capsys, "serve", "--ckpt", ckpt)) and "pip install" in told


def test_the_page_answers(ckpt, bundle, tmp_path):
    gradio = pytest.importorskip("gradio", reason="gradio (extra) is not installed")
    page = serve.page(gradio, bundle, arguments(ckpt), tmp_path)
    labels = {block.label for block in page.blocks.values() if hasattr(block, "label")}
    assert {"prompt", "negative prompt", "steps", "sampler", "pictures"} <= labels and "class" not in labels
    (function,) = (each.fn for each in page.fns.values() if each.api_name == "draw")
    found = function(*SAID.values())
    assert same(drawn(found), drawn(serve.draw(bundle, arguments(ckpt), tmp_path, SAID)))
    with pytest.raises(gradio.Error, match="nearest: 'ddim'"):
        function(*(SAID | {"sampler": "dimm"}).values())
