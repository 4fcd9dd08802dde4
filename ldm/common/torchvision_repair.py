"""Lets a torchvision be imported that was compiled for another build of torch.

PyPI's torchvision is linked against CUDA. Beside a CPU (or another CUDA's) torch its compiled extension does not load,
and the import ends with `operator torchvision::nms does not exist`; pytorch_lightning, torchmetrics, lpips and the
image models of transformers then fail with it. None of them calls that operator: declaring it is enough.
"""

import importlib.abc
import sys

OPERATORS = {name: f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")}
_libraries = []  # a torch.library.Library takes its operators with it when it dies


class _DeclareFirst(importlib.abc.MetaPathFinder):
    """Finds no module, but is asked for each. torchvision/__init__ first tries its compiled extension and then imports
    `_meta_registrations`, which assumes the operators: that is the moment to declare those that are still unknown.
    Where the extension has loaded, or torchvision is never imported, nothing happens and torch is not imported by us.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision._meta_registrations":
            declare_missing()
        return None


def declare_missing() -> None:
    """Declares the operators of OPERATORS that torch does not know yet."""
    import torch

    known = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    missing = [schema for name, schema in OPERATORS.items() if f"torchvision::{name}" not in known]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in missing:
            library.define(schema)
        _libraries.append(library)


def repair() -> None:
    """Installs the hook, once however often it is called. `ldm/__init__.py` does it, so any import of `ldm` is enough,
    provided that it comes before the first import of torchvision, pytorch_lightning or torchmetrics."""
    if not any(isinstance(finder, _DeclareFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeclareFirst())
