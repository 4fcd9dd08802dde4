"""Against numbers of the lpips package, with its SqueezeNet and random weights: the formula does not depend on the trunk."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import squeezenet1_1

from autoencoder import critics

FOLDER = Path(__file__).parents[1] / "data" / "parity" / "metrics"
REFERENCE = load_file(FOLDER / "io.safetensors")
TAPS = (1, 4, 7, 9, 10, 11, 12)


@pytest.fixture
def squeeze(monkeypatch):
    state = {key: value.float() for key, value in torch.load(FOLDER / "lpips_squeeze.pt", weights_only=True).items()}
    lpips = critics.Lpips.__new__(critics.Lpips)  # without VGG16
    lpips.trunk = squeezenet1_1(weights=None).features.eval().requires_grad_(False)
    lpips.trunk.load_state_dict({key.split(".", 2)[2]: value for key, value in state.items() if key.startswith("net.")})
    lpips.lins = [state[f"lins.{n}.model.1.weight"].flatten() for n in range(len(TAPS))]
    monkeypatch.setattr(critics, "TAPS", TAPS)
    return lpips


def test_lpips_of_squeezenet(squeeze):
    a, b = REFERENCE["in.lpips.a"], REFERENCE["in.lpips.b"]
    assert [list(h.shape) for h in squeeze.features(a)] == REFERENCE["out.lpips.squeeze.feature_shapes"].tolist()
    assert torch.allclose(squeeze(a, b), REFERENCE["out.lpips.squeeze"], rtol=1e-5)
    squeeze.lins = [torch.ones_like(lin) for lin in squeeze.lins]
    assert torch.allclose(squeeze(a, b), REFERENCE["out.lpips.squeeze.baseline_no_lin"], rtol=1e-5)
