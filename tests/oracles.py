"""Data whose best denoiser is known in closed form: Gaussians, and mixtures of two in one dimension."""

import math

import torch
from torch import Tensor

from ldm.parameterization import Denoise, Prediction
from ldm.process import DDPM, EDM, VP, Cosine, Process, RectifiedFlow

MEAN, STD = 0.7, 0.4  # of the Gaussian, per pixel

PROCESSES: dict[str, Process] = {
    "scaled_linear": DDPM(), "linear": DDPM("linear"), "cosine": DDPM("cosine"), "sigmoid": DDPM("sigmoid"),
    "zero_terminal": DDPM(zero_terminal=True), "vp": VP(), "trigonometric": Cosine(), "flow": RectifiedFlow(),
    "flow_shift": RectifiedFlow(3.0), "edm": EDM(0.01, 20.0),
}  # fmt: skip
ENDLESS = ("zero_terminal", "trigonometric", "flow", "flow_shift")  # they end in pure noise


def at(process: Process, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha, sigma in fp64, one for each sample of x."""
    t = torch.as_tensor(t, dtype=torch.float64).expand(len(x))
    return tuple(c.view(-1, *[1] * (x.ndim - 1)) for c in process.exact(t))


def gaussian(process: Process, mean: float = MEAN, std: float = STD) -> Denoise:
    """x_t is normal and correlated with x0, so E[x0 | x_t] is linear in x_t."""
    def denoise(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = at(process, t, x)
        x0 = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
        return Prediction(x0, (x - alpha * x0) / sigma)
    return denoise


def transported(process: Process, x: Tensor, t: float, s: float) -> Tensor:
    """Where the probability-flow ODE of the Gaussian brings x from t to s: it keeps the number of standard deviations."""
    (alpha, sigma), (alpha_s, sigma_s) = at(process, t, x), at(process, s, x)
    spread, spread_s = (torch.sqrt((a * STD) ** 2 + b**2) for a, b in ((alpha, sigma), (alpha_s, sigma_s)))
    return alpha_s * MEAN + spread_s / spread * (x - alpha * MEAN)


class Mixture:
    """0.3 N(-1, 0.3^2) + 0.7 N(1, 0.5^2). In one dimension the probability-flow ODE keeps quantiles."""

    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    stds = torch.tensor([0.3, 0.5], dtype=torch.float64)

    def __init__(self, process: Process):
        self.process = process

    def standardised(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:  # (B,1,1,1) -> (B,1,1,2) twice
        alpha, sigma = at(self.process, t, x)
        spread = torch.sqrt((alpha * self.stds) ** 2 + sigma**2)
        return (x - alpha * self.means) / spread, spread

    def denoise(self, x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = at(self.process, t, x)
        z, spread = self.standardised(x, t)
        share = torch.softmax(self.weights.log() - spread.log() - z.square() / 2, dim=-1)
        x0 = (share * (self.means + alpha * self.stds**2 / spread * z)).sum(-1, keepdim=True)
        return Prediction(x0, (x - alpha * x0) / sigma)

    def cdf(self, x: Tensor, t: float) -> Tensor:
        return (self.weights * torch.special.ndtr(self.standardised(x, t)[0])).sum(-1, keepdim=True)

    def transported(self, x: Tensor, t: float, s: float) -> Tensor:
        return self.quantiles(self.cdf(x, t), s)

    def quantiles(self, share: Tensor, s: float) -> Tensor:
        """Of the mixture at time s, by bisection."""
        low, high = torch.full_like(share, -1000.0), torch.full_like(share, 1000.0)
        for _ in range(64):
            middle = (low + high) / 2
            below = self.cdf(middle, s) < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    @classmethod
    def moments(cls) -> Tensor:
        """Of the data: mean, standard deviation, E x^3, share below 0."""
        w, m, s = cls.weights, cls.means, cls.stds
        mean = (w * m).sum()
        return torch.stack([mean, ((w * (s**2 + m**2)).sum() - mean**2).sqrt(), (w * (m**3 + 3 * m * s**2)).sum(),
                            (w * torch.special.ndtr(-m / s)).sum()])  # fmt: skip


def moments(x: Tensor) -> Tensor:
    """As ``Mixture.moments``, of samples."""
    x = x.flatten()
    return torch.stack([x.mean(), x.std(correction=0), (x**3).mean(), (x < 0).double().mean()])


class Lattice:
    """Noise for samples in one dimension that makes their moments those of a quadrature: every draw has the quantiles of a
    normal distribution, spread by the golden ratio over the samples in the order of their x. ``see`` is a callback."""

    def __init__(self, size: int):
        self.ranks, self.draws = torch.arange(size), 0

    def see(self, step: int, t: float, x: Tensor, guess: Prediction) -> None:
        self.ranks = x.flatten().argsort().argsort()

    def __call__(self, step: int, shape: tuple[int, ...]) -> Tensor:
        self.draws += 1
        spread = (self.ranks.double() * (math.sqrt(5) - 1) / 2 + self.draws * math.sqrt(2)) % 1
        return torch.special.ndtri((spread.argsort().argsort().double() + 0.5) / len(spread)).view(shape)


def slope(errors: dict[int, float]) -> float:
    """Order of convergence: log(error) over log(steps), first against last."""
    (n, a), (m, b) = list(errors.items())[0], list(errors.items())[-1]
    return math.log(a / b) / math.log(m / n)
