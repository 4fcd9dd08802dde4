"""Against numbers computed with guided-diffusion (classifier guidance), diffusers (dynamic thresholding) and CompVis'
stable-diffusion (image to image)."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from ldm.edit import img2img
from ldm.guidance import classifier, classifier_mean, dynamic_threshold
from ldm.parameterization import Prediction
from ldm.process import DDPM
from ldm.samplers import dpmpp_2m
from ldm.times import compvis

REFERENCE = load_file(Path(__file__).parents[1] / "data" / "parity" / "guidance" / "io.safetensors")


def close(found, expected, tolerance=1e-5):
    return (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_both_forms_of_classifier_guidance():
    """25 steps of the 1000, at the 0th and the 17th: the gradient is read from the mean that was moved."""
    adm = {key.removeprefix("adm.out.guide25."): value for key, value in REFERENCE.items() if key.startswith("adm.")}
    process, x = DDPM("linear"), adm["adm.in.x"]
    steps = torch.linspace(0, 999, 25).double().round()  # "25" of guided-diffusion
    times = torch.cat([steps.flip(0), torch.tensor([-1.0]).double()])
    t = steps[adm["adm.in.t_index"]]
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in process.exact(t))
    slope = ((adm["condition_mean"].double() - adm["pmv.mean"]) / adm["pmv.variance"])

    def denoise(x, t):
        x0 = adm["pmv.pred_xstart"].double()
        return Prediction(x0, (x - alpha * x0) / sigma, adm["pmv.log_variance"].double())

    def log_p(x, t):
        return (slope * x).flatten(1).sum(1)
    post = process.posterior(t.view(-1, 1, 1, 1), times[25 - adm["adm.in.t_index"]].view(-1, 1, 1, 1))

    def mean(guess):
        return post.x0 * guess.x0 + post.xt * x
    assert close(mean(denoise(x, t)), adm["pmv.mean"])
    score = classifier(denoise, log_p, 1.0, process)(x.double(), t)
    assert close(score.x0, adm["condition_score.pred_xstart"]) and close(mean(score), adm["condition_score.mean"])
    moved = classifier_mean(denoise, log_p, 1.0, process, times, "learned")(x.double(), t)
    assert close(mean(moved), adm["condition_mean"])


def test_dynamic_thresholding():
    """Their DPM-Solver++(2M), leading times, 0.9 quantile, at most 1.5: every x0 is thresholded."""
    process, traj = DDPM("scaled_linear"), REFERENCE["threshold.traj"]
    times = torch.cat([REFERENCE["threshold.timesteps"].double(), torch.tensor([-1.0]).double()])
    said = iter(REFERENCE["threshold.model_output"])

    def denoise(x, t):
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in process.exact(t.double()))
        eps = next(said)
        return Prediction((x - sigma * eps) / alpha, eps)
    seen = []
    end = dpmpp_2m(dynamic_threshold(denoise, process, 0.9, 1.5), traj[0].double(), times, process,
                   callback=lambda step, t, x, guess: seen.append(x))
    for found, expected in zip([*seen, end], traj, strict=True):
        assert close(found, expected, 2e-5)


def test_image_to_image():
    """10 steps, strength 0.7: they noise to one step above the first time that the network is told."""
    process, z, eps = DDPM("scaled_linear"), REFERENCE["img2img.out.z"], REFERENCE["img2img.in.img2img_noise"]
    x, times = img2img(z, eps, compvis(process, 10), process, 0.7, ahead=1)
    assert close(x, REFERENCE["img2img.out.img2img_enc"], 1e-6) and times.tolist() == [601, 501, 401, 301, 201, 101, 1, 0]
