"""Who may import whom. The imports are read from the source, those inside functions too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# part -> the layer that it is in; a part imports itself and lower layers
LAYERS = {
    "ldm.common": 0,
    **dict.fromkeys(("autoencoder", "ldm.data", "ldm.process", "ldm.betas", "ldm.parameterization", "ldm.cond"), 1),
    **dict.fromkeys(("ldm.networks", "ldm.conditioners", "ldm.densities", "ldm.weights"), 2),
    **dict.fromkeys(("ldm.denoiser", "ldm.loss", "ldm.latents", "ldm.likelihood", "ldm.guidance", "ldm.times"), 3),
    **dict.fromkeys(("ldm.steps", "ldm.samplers", "ldm.edit", "ldm.classifier", "ldm.adapters", "ldm.windows"), 3),
    **dict.fromkeys(("ldm.bundle", "ldm.lit", "ldm.callbacks", "ldm.metrics", "ldm.tasks"), 4),
    **dict.fromkeys(("ldm.interop", "ldm.load", "ldm.lora", "ldm.app", "ldm.__main__", "main"), 5),
}
ALSO = {  # arrows within a layer: reading goes through `load`, a posterior is guidance by r(x), the programs stand on everything
    ("ldm.load", "ldm.interop"),
    ("ldm.lora", "ldm.interop"),
    ("ldm.conditioners", "ldm.networks"),
    ("ldm.loss", "ldm.likelihood"),
    ("ldm.process", "ldm.betas"),
    ("ldm.edit", "ldm.guidance"),
    ("ldm.classifier", "ldm.guidance"),
    ("ldm.samplers", "ldm.steps"),
    ("ldm.windows", "ldm.denoiser"),
    ("ldm.tasks", "ldm.bundle"),
    ("ldm.samplers", "ldm.times"),
    *((program, part) for program in ("ldm.app", "ldm.__main__", "main") for part in LAYERS if part != "main"),
}
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}
WRAPPED = {"transformers", "diffusers", "webdataset", "datasets", "wandb", "lpips", "gradio", "kornia", "peft"}


def modules() -> dict[str, Path]:
    """-> dotted name -> file, of all that is ours but for the tests."""
    files = [*ROOT.glob("main.py"), *(ROOT / "ldm").rglob("*.py"), *(ROOT / "autoencoder").rglob("*.py")]
    return {name_of(path): path for path in files}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str | None:
    """-> the part of LAYERS that a module belongs to; None for the bare package `ldm`, and for what is not ours."""
    return next((part for part in LAYERS if f"{module}.".startswith(f"{part}.")), None)


def imports(source: str, module: str, is_package: bool, known: set[str]) -> list[tuple[str, int, bool]]:
    """-> (imported module, line, whether at the top level) for every import statement in the source."""
    tree = ast.parse(source)
    functions = [
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    ]
    late = {id(inner) for function in functions for inner in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".") if is_package else module.split(".")[:-1]
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [full if (full := f"{base}.{alias.name}") in known else base for alias in node.names]
        found += [(name, node.lineno, id(node) not in late) for name in dict.fromkeys(names)]
    return found


def violations(source: str, module: str, is_package: bool = False, known: set[str] = frozenset()) -> list[str]:
    """-> what is wrong with the imports of one file, each with its line."""
    part, wrong = part_of(module), []
    asks_for_names = "ldm.app.trainer"  # which checks what a config says to Lightning's Trainer
    may_use_lightning = module.split(".")[-1] == "lit" or part in ("ldm.callbacks", "main") or module == asks_for_names
    for name, line, at_top in imports(source, module, is_package, known):
        root, target = name.split(".")[0], part_of(name)
        where = f"{module}:{line}: "
        if root in LIGHTNING and not may_use_lightning:
            wrong.append(f"{where}Lightning belongs to lit.py, ldm/callbacks and main.py")
        if root in WRAPPED and at_top:
            wrong.append(f"{where}{root} is imported inside the function that needs it")
        if root == "ldm" and target is None and name != "ldm":
            wrong.append(f"{where}{name} is in no layer")
        if target is None or target == part:
            continue
        if target == "autoencoder" and module.startswith("ldm.") and name != "autoencoder.base":
            wrong.append(f"{where}ldm knows autoencoder.base alone, not {name}")
        if part is None and target != "ldm.common" and (at_top or target != "ldm.load"):
            wrong.append(f"{where}the package itself imports ldm.common, and ldm.load when asked for it, not {name}")
        if part is not None and LAYERS[target] >= LAYERS[part] and (part, target) not in ALSO:
            wrong.append(f"{where}{part} (layer {LAYERS[part]}) may not import {target} (layer {LAYERS[target]})")
    return wrong


def test_there_is_something_to_look_at():
    assert {"ldm", "ldm.common.build"} <= modules().keys()


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_follow_the_layers(module):
    path = modules()[module]
    assert violations(path.read_text(), module, path.name == "__init__.py", set(modules())) == []


@pytest.mark.parametrize("module", sorted(modules()))
def test_every_module_is_in_a_layer(module):
    assert module == "ldm" or part_of(module) is not None


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ldm.common.files", "import ldm.process"),
        ("ldm.process", "from ldm.networks.unet import UNet"),
        ("ldm.data.folder", "from ldm.cond import Cond"),
        ("ldm.samplers", "from ldm import guidance"),
        ("ldm.samplers", "def f():\n    from ldm.bundle import Bundle"),
        ("ldm.networks.unet", "from ..samplers import ddim"),
        ("ldm.bundle", "from ldm.load import load"),
        ("ldm.lit", "from autoencoder.model import BottleneckAutoencoder"),
        ("ldm.lit", "import autoencoder"),
        ("autoencoder.model", "from ldm.process import VP"),
        ("ldm.interop.compvis", "from ldm.load import load"),
        ("ldm.app.page", "import main"),
        ("ldm", "from ldm.load import load"),
        ("ldm.lit", "import ldm.sundries"),
        ("ldm.samplers", "import pytorch_lightning as pl"),
        ("ldm.bundle", "def f():\n    from pytorch_lightning import Trainer"),
        ("ldm.conditioners.text", "from transformers import AutoModel"),
        ("ldm.callbacks.wandb", "try:\n    import wandb\nexcept ImportError:\n    wandb = None"),
        ("ldm.data.shards", "class A:\n    import webdataset"),
        ("main", "import gradio"),
    ],
)
def test_a_wrong_arrow_is_found(module, source):
    assert len(violations(source, module, module == "ldm", {"ldm.guidance", "ldm.load"})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ldm.networks.unet", "from ldm.networks.layers import Attention\nfrom . import layers\nimport torch"),
        ("ldm.lit", "import pytorch_lightning\nfrom autoencoder.base import Autoencoder\nfrom ldm import loss"),
        ("ldm.conditioners.text", "def load():\n    from transformers import AutoModel"),
        ("ldm.load", "import ldm\nfrom ldm.interop import compvis"),
        ("autoencoder.lit", "from lightning import pytorch\nfrom autoencoder.base import Autoencoder"),
        ("ldm.callbacks.ema", "from pytorch_lightning import Callback\nfrom ldm.common.ema import Ema"),
        ("ldm.__main__", "import ldm.load, ldm.app.page"),
        ("main", "from ldm.common import config\nfrom autoencoder.cached import write"),
    ],
)
def test_a_right_arrow_is_let_pass(module, source):
    assert violations(source, module, False, {"ldm.loss", "ldm.interop.compvis", "ldm.common.config"}) == []
