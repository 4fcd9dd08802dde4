"""Against numbers computed with CompVis' latent-diffusion: averages of weights, courses of the learning rate, AdamW."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm.common.ema import Ema
from ldm.common.optim import make_optimizer, make_schedule
from ldm.common.schedules import Cycles

REFERENCE = load_file(Path(__file__).parents[1] / "data" / "training_traces.safetensors")
NEVER = 10**13  # steps of a cycle that does not end, as Stable Diffusion's configs have it
TWO = dict(lengths=[100, 50], warmups=[10, 5], start=[0.1, 0.2], peak=[1.0, 0.5], end=[0.01, 0.02])
COURSES = {
    "linear_sd_v1": Cycles([NEVER], [10000], [1e-6], [1.0], [1.0]),
    "linear_two_cycles": Cycles(**TWO),
    "cosine2_two_cycles": Cycles(**TWO, fall="cosine"),
    "cosine": Cycles([50000], [1000], [0.001], [0.1], [0.0001], fall="cosine"),
}


def linear(step: int = 0) -> nn.Linear:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(REFERENCE[f"in.w{step}"])
        layer.bias.copy_(REFERENCE[f"in.b{step}"])
    return layer


@pytest.mark.parametrize(("name", "options"), [
    ("warm", dict(decay=0.9999)), ("warm_decay0.3", dict(decay=0.3)), ("fixed0.9", dict(decay=0.9, warmup=False)),
])  # fmt: skip
def test_average_of_weights(name, options):
    ema = Ema(linear(), **options)
    for k in range(1, 6):
        ema.update(linear(k))
        assert torch.allclose(ema.shadow.weight, REFERENCE[f"out.{name}.{k}.0weight"], atol=1e-6)
        assert torch.allclose(ema.shadow.bias, REFERENCE[f"out.{name}.{k}.0bias"], atol=1e-6)
        counted = REFERENCE[f"out.{name}.{k}.num_updates"].item()
        assert ema.updates == k and counted == (k if ema.warmup else -1)


@pytest.mark.parametrize("name", COURSES)
def test_learning_rates(name):
    steps, values = REFERENCE[f"out.lr.{name}.steps"].tolist(), REFERENCE[f"out.lr.{name}.values_f64"].tolist()
    assert [COURSES[name](step) for step in steps] == pytest.approx(values, rel=1e-12)


def test_adamw_under_a_schedule():
    """AdamW with its defaults at 0.1, warmed up over three steps; the schedule moves after each step."""
    layer = linear()
    optimizer = make_optimizer({"target": "torch.optim.AdamW", "params": {"lr": 0.1}}, layer)
    params = dict(lengths=[1000], warmups=[3], start=[0.01], peak=[1.0], end=[0.5])
    schedule = make_schedule({"target": "ldm.common.schedules.Cycles", "params": params}, optimizer, total=5)
    for k in range(1, 6):
        rate = optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(REFERENCE[f"out.adamw.{k}.lr_f64"].item(), rel=1e-12)
        optimizer.zero_grad()
        (layer(REFERENCE["in.w1"]) - REFERENCE["in.w2"][:, :3]).square().mean().backward()
        optimizer.step()
        schedule.step()
        assert torch.allclose(layer.weight, REFERENCE[f"out.adamw.{k}.weight"], atol=1e-6)
        assert torch.allclose(layer.bias, REFERENCE[f"out.adamw.{k}.bias"], atol=1e-6)
