"""What is known to ruin a first stage, told in sentences from what was measured.

Values are those of ``statistics.Tally.summary`` and of the critic: "active_units", "latent_std_0" ..., "codebook_used",
"critic_right" (while the autoencoder listens), "psnr". What is absent is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

PROBLEMS = ("posterior_collapse", "codebook_collapse", "critic_dominates", "latent_scale", "dead_channels")

RARE = 0.1  # share of entries in use below which a codebook counts as collapsed
SURE = 0.95  # share of right judgements above which a critic has won
LATENT_STD = (0.05, 20.0)  # published autoencoders have raw latents of deviation 0.6 to 8
DEAD = 1e-3  # deviation of a channel, in units of the largest


def problems(values: Mapping[str, float], channels: int, kl: float | None = None) -> dict[str, str]:
    """-> for each problem found, one of PROBLEMS, a sentence that says what was measured and what to change.

    Args:
        channels: of the latent.
        kl: weight of the KL term, to be named.
    """
    found, now = {}, "" if kl is None else f" (now {kl:g})"
    active = values.get("active_units", channels)
    if active < channels:
        found["posterior_collapse"] = (
            f"posterior collapse: {active:.0f} of {channels} channels active, the others say nothing of the picture; "
            f"lower loss.kl{now}, or let it grow slowly (loss.kl_warmup)")
    used = values.get("codebook_used", 1.0)
    if used < RARE * attainable(values):
        found["codebook_collapse"] = (
            f"codebook collapse: {100 * used:.1f} % of its entries are used; set bottleneck.restart (such as 0.1), "
            "bottleneck.learn: ema, or take fewer codes")
    right = values.get("critic_right", 0.5)
    if right > SURE:
        found["critic_dominates"] = (
            f"the critic dominates: it tells {100 * right:.0f} % of pictures and reconstructions apart, so that little can be "
            "learned from it; lower its learning rate (critic_optimizer), set critic.r1 (such as 10), or begin later "
            "(critic.start)")
    stds = {c: values[f"latent_std_{c}"] for c in range(channels) if f"latent_std_{c}" in values}
    dead = [c for c, std in stds.items() if std <= DEAD * max(stds.values())]
    if dead:
        found["dead_channels"] = (
            f"dead channels: {len(dead)} of {channels} ({', '.join(map(str, dead))}) are the same for every picture; "
            "take fewer channels (bottleneck.channels), or a lower learning rate")
    strange = {c: std for c, std in stds.items() if c not in dead and not LATENT_STD[0] <= std <= LATENT_STD[1]}
    if strange:
        c = max(strange, key=lambda c: abs(math.log(strange[c])))
        better = "raise" if strange[c] > 1 else "lower"
        found["latent_scale"] = (
            f"latent scale: raw latents have deviation {strange[c]:.3g} (channel {c}), far from 1, which costs digits in half "
            f"precision; {better} loss.kl{now}, or lower the learning rate")
    return found


def attainable(values: Mapping[str, float]) -> float:
    """Share of a codebook that as many codes as were looked at use, if all entries are as likely: few cannot use many."""
    if not {"codebook_seen", "codebook_size"} <= values.keys():
        return 1.0
    return 1 - math.exp(-values["codebook_seen"] / values["codebook_size"])


def line(values: Mapping[str, float], channels: int) -> str:
    """-> how things stand, in one line."""
    told = []
    if "psnr" in values:
        told.append(f"{values['psnr']:.1f} dB")
    if "active_units" in values:
        told.append(f"{values['active_units']:.0f} of {channels} channels active")
    stds = [values[f"latent_std_{c}"] for c in range(channels) if f"latent_std_{c}" in values]
    if stds:
        told.append(f"raw latents of deviation {min(stds):.2g} to {max(stds):.2g}")
    if "codebook_used" in values:
        told.append(f"{100 * values['codebook_used']:.0f} % of the codebook used")
    if "critic_right" in values:
        told.append(f"critic right in {100 * values['critic_right']:.0f} %")
    return ", ".join(told)
