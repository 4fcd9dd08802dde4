"""A torchvision of another build imports, and `import ldm` stays cheap."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# what a torchvision without its compiled extension does when it is imported
REGISTRATIONS = """
import torch
for name in ("nms", "qnms"):
    @torch.library.register_fake(f"torchvision::{name}")
    def fake(dets, scores, iou_threshold):
        return dets.new_empty(0)
"""
LOADED = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def run(code: str, *path: Path) -> subprocess.CompletedProcess:
    code = f"import sys; sys.path[:0] = {[str(p) for p in path]}\n{code}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def fake_torchvision(folder: Path, extension: str) -> Path:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from . import extension\nfrom . import _meta_registrations\n")
    (package / "extension.py").write_text(extension)
    (package / "_meta_registrations.py").write_text(REGISTRATIONS)
    return folder


def test_a_torchvision_without_its_extension_imports_only_after_the_repair(tmp_path):
    folder = fake_torchvision(tmp_path, extension="")
    without = run("import torchvision", folder)
    assert "operator torchvision::nms does not exist" in without.stderr
    for order in ("import ldm, torchvision", "import torch, ldm, torchvision"):
        repaired = run(order, folder)
        assert repaired.returncode == 0, repaired.stderr
    late = run("try:\n    import torchvision\nexcept RuntimeError:\n    import ldm, torchvision", folder)
    assert late.returncode == 0, late.stderr


def test_a_torchvision_with_its_extension_is_left_alone(tmp_path):
    folder = fake_torchvision(tmp_path, extension=LOADED)
    done = run(
        "import ldm, torchvision\nfrom ldm.common import torchvision_repair as r\nassert not r._libraries", folder
    )
    assert done.returncode == 0, done.stderr


def test_what_builds_on_the_installed_torchvision_imports():
    done = run("import ldm, torchmetrics.image, pytorch_lightning, lpips\nfrom transformers import CLIPModel")
    assert done.returncode == 0, done.stderr


def test_repairing_again_changes_nothing():
    done = run(
        "import ldm\nfrom ldm.common import torchvision_repair as r\nr.repair(); r.repair()\n"
        "assert sum(type(finder) is r._DeclareFirst for finder in sys.meta_path) == 1\n"
        "r.declare_missing(); r.declare_missing()\nassert len(r._libraries) <= 1"
    )
    assert done.returncode == 0, done.stderr


def test_reading_and_merging_configs_needs_no_torch():
    done = run("import ldm, ldm.common.files, ldm.common.config\nassert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_ldm_load_is_the_function_whoever_imported_the_module():
    code = """
import types, ldm
module = types.ModuleType("ldm.load")
module.load = lambda path: path.upper()
sys.modules["ldm.load"] = module
ldm.load = module  # what the import machinery does when the submodule has been read
assert ldm.load("a") == "A"
from ldm import load
assert load("b") == "B"
assert not hasattr(ldm, "laod")
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
