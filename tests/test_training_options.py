"""ldm.lit.DiffusionModule with the losses and averages that it may be told to use."""

from argparse import Namespace

import pytest
import torch
from test_diffusion_module import SEED, Free, Record, Told, batch, fit, module

from ldm.app import average
from ldm.bundle import Bundle
from ldm.common.ema import Ema, HalfLife, Power, Snapshots, reconstruct
from ldm.common.files import UserError
from ldm.common.random import normal, uniform
from ldm.cond import Cond
from ldm.densities import LogNormal, LossSecondMoment, Mode, stratified
from ldm.lit import DiffusionModule, _check_params
from ldm.loss import DISTANCES, WEIGHTS, LogitNormal, Variational, diffusion_loss
from ldm.process import DDPM
from ldm.weights import Uncertainty

STEPS = {"process": DDPM("linear", 4), "parameterization": "v"}


def tied():
    """T = 4 steps that remember two losses each."""
    return module(**STEPS, density=LossSecondMoment(history=2), rule="SGD", lr=0.05, dropout=0.5)


def test_the_default_loss_is_unchanged_to_the_last_bit():
    model, positions = module(kind=Free, density=LogitNormal(), dropout=0.5), [3, 8, 5, 1]
    given, kept = batch(positions), uniform(SEED, "drop", positions) >= 0.5
    x, noise = given["image"], normal((3, 8, 8), SEED, "noise", positions)
    t = torch.sigmoid(torch.special.ndtri(uniform(SEED, "t", positions).clamp(1e-6, 1 - 1e-6)))
    s = t.view(-1, 1, 1, 1)
    cond = model.conditioner(given).where(kept, Cond(model.conditioner.empty))
    error = model.model["denoiser"].network((1 - s) * x + s * noise, 1000 * t, cond).float() - (-x + noise)
    assert torch.equal(model.training_step(given, 0), error.square().flatten(1).mean(1).mean())


@pytest.mark.parametrize("options", [
    {"density": Mode()}, {"density": LogNormal()}, {"draws": "stratified"}, {"offset_noise": 0.1}, {"immiscible": True},
    {"distance": "huber"}, {"distance": "pseudo_huber"}, {"weight": "vlb"}, {"weight": "p2"},
    {"weight": "edm", "uncertainty": Uncertainty(8)},
    {**STEPS, "variance": "learned_range", "variational": Variational(decoder="gaussian")},
    {**STEPS, "variational": Variational("vlb", decoder="gaussian")},
])  # fmt: skip
def test_every_option_trains(options):
    record, model = Record(), module(**options)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad and name != "model.conditioner.empty"}
    start = {name: p.detach().clone() for name, p in learned.items()}
    fit(model, 3, callbacks=[record])
    assert torch.tensor(record.losses).isfinite().all()
    assert [name for name, p in learned.items() if torch.equal(p, start[name])] == []


def test_stratified_times_follow_from_positions():
    model = module(draws="stratified")
    t = model.loss.times([8, 9, 10, 11], SEED, model.model["denoiser"].process)
    assert torch.equal(t, stratified(SEED, "t", [8, 9, 10, 11])) and torch.equal((t * 4).long().sort().values, torch.arange(4))


def test_the_uncertainty_is_in_one_optimizer_group_in_the_checkpoint_and_not_in_the_model(tmp_path):
    model = module(uncertainty=Uncertainty(8), rule="SGD")
    trainer = fit(model, 2)
    weight = model.loss.uncertainty.embed.weight
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    assert [sum(p is weight for p in group["params"]) for group in groups] == [1] and weight.any()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["loss.uncertainty.embed.weight"], weight)
    assert not any("uncertainty" in name for part in model.parts().values() for name, _ in part.named_parameters())
    assert not any("uncertainty" in name for name in model.ema.state_dict())


def test_the_history_is_resumed(tmp_path):
    straight, first, second = tied(), tied(), tied()
    fit(straight, 9)
    fit(first, 5).save_checkpoint(tmp_path / "a.ckpt")
    fit(second, 9, ckpt_path=tmp_path / "a.ckpt")
    assert (straight.loss.density.counts == 2).sum() >= 3 and straight.loss.density.losses.any()
    for (name, a), b in zip(straight.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_history_is_that_of_all_ranks(tmp_path):
    alone, halved = tied(), tied()
    fit(alone, 6, batch_size=4)
    fit(halved, 6, batch_size=2, callbacks=[Told(tmp_path)], devices=2, strategy="ddp_fork")
    one, other = (torch.load(tmp_path / f"{rank}.pt")["weights"] for rank in (0, 1))
    for name in ("loss.density.losses", "loss.density.counts"):
        assert torch.equal(one[name], other[name])
        assert torch.allclose(one[name].float(), alone.state_dict()[name].float(), rtol=1e-3)
    assert alone.loss.density.counts.sum() == 8


def test_losses_are_remembered_before_importance_weighs_them():
    model = module(kind=Free, **STEPS, density=LossSecondMoment(history=1))
    model.all_gather = lambda value: value
    density, positions = model.loss.density, [3, 8, 5, 1]
    density.observe(torch.arange(4.0), torch.tensor([1.0, 2, 3, 4]))
    t = model.loss.times(positions, SEED, model.model["denoiser"].process)
    importance = density.importance(t)
    given, noise = batch(positions), normal((3, 8, 8), SEED, "noise", positions)
    plain = diffusion_loss(model.model["denoiser"], given["image"], model.conditioner(given), t, noise)
    assert model.training_step(given, 0).item() == pytest.approx((plain * importance).mean().item(), rel=1e-6)
    latest = torch.tensor([p for p in sorted(range(4), key=positions.__getitem__)])  # in the order of positions
    for step in t.unique().tolist():
        assert density.losses[int(step), 0] == plain[[i for i in latest.tolist() if t[i] == step][-1]]


def test_profiles_of_the_average():
    model = module(ema_decay=HalfLife(images=6.0, ramp=None))
    before = model.model["denoiser"].network.conv_in.weight.detach().clone()
    path = []

    class Path(Record):
        def on_train_batch_end(self, trainer, model, outputs, batch, index):
            path.append(model.model["denoiser"].network.conv_in.weight.detach().clone())

    fit(model, 3, callbacks=[Path()])  # two pictures a step: a half-life of three steps
    keep = 0.5 ** (1 / 3)
    for weight in path:
        before = keep * before + (1 - keep) * weight
    assert torch.allclose(model.ema.shadow["denoiser"].network.conv_in.weight, before, atol=1e-6)


def test_snapshots_are_saved_and_resumed(tmp_path):
    from ldm.callbacks.ema import EmaUpdate

    def run(model, steps, name, **options):
        import test_diffusion_module

        update, test_diffusion_module.EmaUpdate = test_diffusion_module.EmaUpdate, lambda: EmaUpdate(tmp_path / name)
        try:
            return fit(model, steps, **options)
        finally:
            test_diffusion_module.EmaUpdate = update

    whole, first, second = (module(snapshots=Snapshots(2, (0.1, 0.2))) for _ in range(3))
    run(whole, 5, "whole")
    run(first, 3, "first").save_checkpoint(tmp_path / "a.ckpt")
    run(second, 5, "second", ckpt_path=tmp_path / "a.ckpt")
    names = {f"step-{step:06d}-width-{width}.safetensors" for step in (2, 4, 5) for width in (0.1, 0.2)}
    assert {path.name for path in (tmp_path / "whole").iterdir()} == names
    files = sorted((tmp_path / "whole").iterdir())
    again = [next(p for folder in ("second", "first") if (p := tmp_path / folder / file.name).exists()) for file in files]
    for width in (0.1, 0.14):
        one, other = reconstruct(files, width), reconstruct(again, width)
        assert one.keys() == dict(whole.model.named_parameters()).keys() and all(torch.equal(one[k], other[k]) for k in one)
    found = reconstruct(files, 0.2)
    assert all(torch.allclose(found[k], p, atol=1e-6) for k, p in whole.averages[1].shadow.named_parameters())
    assert not any(part.training for part in whole.train().averages.modules())


def test_an_average_becomes_a_model(tmp_path, model_config, bundle, capsys):
    run = tmp_path / "run"
    made = Bundle(bundle.autoencoder, bundle.conditioner, bundle.denoiser, model_config)
    run.mkdir()
    made.save(run / "last.ckpt")
    model = torch.nn.ModuleDict({"denoiser": bundle.denoiser, "conditioner": bundle.conditioner})
    moved = torch.nn.ModuleDict({"denoiser": bundle.denoiser, "conditioner": bundle.conditioner})
    snapshots = Snapshots(1, (0.05, 0.10))
    averages = snapshots.averages(moved)
    with torch.no_grad():
        for n in range(3):
            for ema in averages:
                ema.update(model)
                ema.shadow["denoiser"].network.conv_in.weight.add_(0.1 * n)
            snapshots.save(averages, model, run / "averages")
    average.run(Namespace(ckpt=str(run), width=0.05, step=None, out=str(tmp_path / "m.safetensors"), trust=False))
    assert "weights averaged with width 0.05" in capsys.readouterr().out
    import ldm

    loaded = ldm.load(tmp_path / "m.safetensors")
    found, expected = (part["denoiser"].network.conv_in.weight for part in (
        torch.nn.ModuleDict({"denoiser": loaded.denoiser}), averages[0].shadow))  # fmt: skip
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found, bundle.denoiser.network.conv_in.weight)
    with pytest.raises(UserError, match="--width: EMA width is 0.5"):
        average.run(Namespace(ckpt=str(run), width=0.5, step=None, out="x.safetensors", trust=False))


def test_a_config_is_told_what_does_not_fit():
    block = {"target": "ldm.loss.Variational", "params": {"objective": "vlb"}}
    assert "RectifiedFlow has none" in _check_params({"variational": block}, "params")[0]
    assert _check_params({"variational": block, "process": {"target": "ldm.process.DDPM"}, "parameterization": "v"}, "params") == []
    wrong = _check_params({"density": {"target": "ldm.densities.Mode", "params": {"scale": 9.0}}}, "params")
    assert wrong == ["params.density: density.scale: 9.0; the mode density takes -1 to 1.7519"]


def test_names_in_the_signature_are_those_of_the_tables():
    from ldm.common.signatures import parameters

    known = parameters(DiffusionModule)[0]
    literals = {name: [v for option in known[name].options for v in getattr(option, "__args__", ())] for name in ("weight", "distance")}
    assert set(literals["weight"]) == set(WEIGHTS) and set(literals["distance"]) == set(DISTANCES)


def test_averages_by_power_functions_forget_the_start():
    model = module(ema_decay=Power(0.1))
    assert isinstance(model.ema, Ema)
    fit(model, 1)
    pairs = zip(model.ema.shadow.parameters(), model.model.parameters(), strict=True)
    assert all(torch.equal(average, now) for average, now in pairs)
