"""Fréchet distance between two sets of features, each taken for a Gaussian (FID, 1706.08500).

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

S1 S2 is similar to S1^(1/2) S2 S1^(1/2) = R R^T with R = S1^(1/2) S2^(1/2), so the trace of its root is the sum of the
singular values of R: real and not negative, even where there are fewer samples than features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.common.files import UserError
from ldm.common.team import everybodys


class Gaussian:
    """Mean and covariance of samples that come in batches, in float64 on the CPU (Chan, Golub & LeVeque, 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._scatter = torch.zeros(0, dtype=torch.float64)

    def add(self, samples: Tensor) -> None:  # (B,D)
        """Raises UserError for what is no table of finite numbers as wide as before."""
        width = len(self.mean) if self.count else None
        if samples.ndim != 2 or samples.shape[1] != (width or samples.shape[1]):
            raise UserError(f"expected features (pictures, {width or 'D'}), got {tuple(samples.shape)}")
        if not samples.isfinite().all():
            raise UserError("features are inf or nan; is the reconstruction?")
        samples = samples.detach().cpu().double()
        mean = samples.mean(dim=0)
        centred = samples - mean
        self._join(len(samples), mean, centred.T @ centred)

    def joined(self) -> Gaussian:
        """That of the samples of all processes together. All have to call."""
        whole = Gaussian()
        for part in everybodys(self):
            if part.count:
                whole._join(part.count, part.mean, part._scatter)
        return whole

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.count:
            self.mean, self._scatter = torch.zeros_like(mean), torch.zeros_like(scatter)
        total, step = self.count + count, mean - self.mean
        self._scatter = self._scatter + scatter + self.count * count / total * torch.outer(step, step)
        self.mean, self.count = self.mean + count / total * step, total

    @property
    def covariance(self) -> Tensor:  # (D,D)
        """With N - 1, as in numpy.cov. UserError where there are less than two samples."""
        if self.count < 2:
            raise UserError(f"{self.count} picture: a covariance needs two or more")
        return self._scatter / (self.count - 1)


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """d^2 of the Gaussians with these means (D,) and covariances (D,D); in the features' units squared."""
    cross = torch.linalg.matrix_norm(root(covariance1) @ root(covariance2), "nuc")
    squared = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * cross
    return max(0.0, squared.item())


def distance(first: Gaussian, second: Gaussian) -> float:
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


def root(covariance: Tensor) -> Tensor:  # (D,D) -> (D,D)
    """The symmetric square root. Eigenvalues that are 0 up to rounding count as 0: a root of 1e-16 would be 1e-8."""
    values, vectors = torch.linalg.eigh(covariance)
    rounding = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return (vectors * values.where(values > rounding, 0).sqrt()) @ vectors.T
