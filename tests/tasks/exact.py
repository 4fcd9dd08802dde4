"""A model of pixels whose denoiser is exact: independent normal pixels, whose mean is that of their class."""

import torch
from torch import nn

from autoencoder.base import Identity
from ldm.bundle import Bundle
from ldm.conditioners.join import Join
from ldm.conditioners.label import ClassLabel
from ldm.denoiser import Denoiser
from ldm.process import RectifiedFlow

MEANS, STD = (-0.5, 0.0, 0.4), 0.2  # of the classes, of each pixel


class Normal(nn.Module):
    """E[x0 | x_t] = mean + alpha std^2 / (alpha^2 std^2 + sigma^2) (x_t - alpha mean), on a flow's times; and what stands beside
    x_t is added to the mean."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, time, cond):
        sigma = time.view(-1, 1, 1, 1) / 1000
        alpha, beside = 1 - sigma, x[:, 3:].sum(dim=1, keepdim=True)
        mean = (0 if cond.vector is None else cond.vector[:, :1, None, None]) + beside
        return mean + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x[:, :3] - alpha * mean)


def exact(*parts, size=(8, 8), **sampling):
    """A Bundle of these conditioners, in fp32; drawn by 4 steps of Euler unless told otherwise."""
    conditioner = None if not parts else parts[0] if len(parts) == 1 else Join(list(parts))
    denoiser = Denoiser(Normal(), RectifiedFlow(), "data")
    plan = {"size": list(size), "sampler": "euler", "steps": 4, "guidance": 1.0} | sampling
    return Bundle(Identity(3), conditioner, denoiser, sampling=plan).eval()


def classes():
    """Three classes with these means, and "no class" of mean 0."""
    label = ClassLabel(len(MEANS), 2, dropout=0.1)
    with torch.no_grad():
        label.embedding.weight[:, 0] = torch.tensor([*MEANS, 0.0])
    return label


def pictures(n, *size, seed=0):
    """(n,3,*size) around 0, within [-1,1]."""
    return (0.3 * torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))).clamp(-1, 1)
