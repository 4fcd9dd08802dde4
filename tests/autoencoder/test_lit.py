import logging
from itertools import islice

import pytest
import torch
from squares import SIDE, Record, Squares, fit, module, on_two_ranks, weights

from autoencoder.bottlenecks import KL, VQ
from ldm.data.loader import make_loader


@pytest.mark.parametrize("bottleneck", [KL(2), VQ(2, codes=32, learn="ema"), VQ(2, codes=32)], ids=["kl", "ema", "vq"])
def test_training_reduces_the_loss(bottleneck):
    record = Record()
    fit(module(bottleneck, lr=5e-3), 40, callbacks=[record])
    assert len(record.steps) == 40
    assert record.steps[-1]["train/pixel"] < 0.6 * record.steps[0]["train/pixel"]
    assert record.steps[-1]["train/psnr"] > record.steps[0]["train/psnr"] + 3


def test_max_steps_counts_batches_with_two_optimizers():
    model = module(critic=True)
    trainer = fit(model, 6)
    assert trainer.global_step == model.batches_seen == 6 and model.images_seen == 48
    assert len(trainer.optimizers) == 2 and trainer.optimizers[1].state  # the critic's moments are in the checkpoint


def test_one_optimizer_without_a_critic():
    assert len(fit(module(), 1).optimizers) == 1


def test_every_trainable_weight_is_in_exactly_one_optimizer():
    model = module(critic=True, ema_decay=0.9)
    trainer = fit(model, 1)
    held = [id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_the_critic_comes_when_it_is_told_to():
    record = Record()
    model = module(critic=True, adversarial={"start": 0.5, "lead": 0.25})
    before = weights(model.critic)
    fit(model, 8, callbacks=[record])
    assert [s["train/adversarial_weight"] > 0 for s in record.steps] == [False] * 4 + [True] * 4
    assert ["train/critic_real" in s for s in record.steps] == [False] * 2 + [True] * 6
    assert any(not torch.equal(value, before[name]) for name, value in model.critic.state_dict().items())


def test_the_sum_of_both_losses_has_the_gradients_of_each():
    """One backward pass of both = one of each, by autograd.grad."""
    model = module(critic={"norm": "none"})
    model.critic.plan(10)
    x = torch.stack([Squares()[i]["image"] for i in range(4)])
    x_hat, bottled = model.autoencoder(x, torch.zeros(4, 2, 8, 8))
    terms = model.loss(x, x_hat, bottled.losses)
    judged = model.critic.judge(x_hat, terms["reconstruction"], model.autoencoder.decoder.last_layer, 0)
    generator_loss, critic_loss = terms["loss"] + judged["adversarial"], model.critic.learn(x, x_hat, 0)["critic"]
    of_autoencoder = torch.autograd.grad(generator_loss, list(model.autoencoder.parameters()), retain_graph=True)
    of_critic = torch.autograd.grad(critic_loss, list(model.critic.parameters()), retain_graph=True)
    (generator_loss + critic_loss).backward()
    for p, gradient in zip([*model.autoencoder.parameters(), *model.critic.parameters()], of_autoencoder + of_critic, strict=True):
        assert torch.equal(p.grad, gradient)


def test_accumulation_is_one_step_of_a_larger_batch():
    class Same(Squares):
        def __getitem__(self, i):
            return super().__getitem__(0)

    once, twice = module(kl=0.0, rule="SGD"), module(kl=0.0, rule="SGD", accumulate=2)
    for model in (once, twice):
        model.noise = lambda batch: torch.zeros(8, 2, 8, 8)
    assert fit(once, 3, Same()).global_step == fit(twice, 3, Same()).global_step == 3
    assert twice.batches_seen == 6
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(once.parameters(), twice.parameters(), strict=True))


def test_resumed_is_the_same_as_straight_through(tmp_path):
    def made():
        torch.manual_seed(0)
        return module(VQ(2, codes=32, restart=0.3, decay=0.5), critic=True, adversarial={"start": 3}, ema_decay=0.9)

    straight, first, second = made(), made(), made()
    fit(straight, 6)
    fit(first, 4).save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    fit(second, 6, ckpt_path=tmp_path / "a.ckpt")
    assert second.batches_seen == 6 and second.images_seen == 48
    for (name, a), b in zip(straight.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_noise_is_a_function_of_the_position_in_the_run():
    model, x = module(), torch.zeros(2, 3, SIDE, SIDE)
    one, other = ({"image": x, "position": torch.tensor(p)} for p in ([5, 9], [9, 7]))
    assert torch.equal(model.noise(one)[1], model.noise(other)[0])
    assert not torch.equal(model.noise(one)[0], model.noise(one)[1])


def test_gradient_clip_limits_the_step():
    record = Record()
    model = module(gradient_clip=1e-3, rule="SGD", lr=1.0)
    before = weights(model.autoencoder)
    fit(model, 1, callbacks=[record])
    moved = torch.cat([(value - before[name]).flatten() for name, value in model.autoencoder.named_parameters()])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3) and record.steps[0]["train/gradient_norm"] > 1e-2


def test_a_batch_with_inf_is_skipped_and_named(caplog):
    model = module(critic=True, ema_decay=0.5)
    *_, third = islice(make_loader(Squares(), 8, seed=1), 3)
    with caplog.at_level(logging.WARNING):
        trainer = fit(model, 4, Squares(broken={int(third["key"][5])}))
    assert model.skipped == 1 and trainer.global_step == 4 and model.batches_seen == 5
    told = next(message for message in caplog.messages if "step skipped" in message)
    assert told.startswith("batch 3: pixel") and f"because of {third['key'][5]} (encoder." in told and "was given inf" in told
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_gradient_with_nan_is_skipped_with_the_samples_of_the_step(caplog):
    model, loader = module(accumulate=2), make_loader(Squares(), 4, seed=1)
    keys = [key for batch in islice(loader, 2) for key in batch["key"]]
    hook = model.autoencoder.last_layer.register_hook(lambda grad: grad * float("nan"))
    model.on_train_batch_end = lambda *_: model.skipped and hook.remove()
    trainer = fit(model, 2, batch_size=4)
    assert model.skipped == 1 and trainer.global_step == 2 and model.batches_seen == 6
    assert f"batch 2: gradient_norm not finite, somewhere in {', '.join(keys[:5])} and 3 more: step skipped" in caplog.text
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_three_in_a_row_stop_the_run_with_finite_weights():
    model = module(critic=True)
    with pytest.raises(FloatingPointError, match="pixel"):
        fit(model, 5, Squares(broken=range(64)))
    assert model.skipped == 3 and all(value.isfinite().all() for value in model.state_dict().values())


def test_validation_measures_and_warns_of_collapse(caplog):
    model = module(kl=1e4, lr=1e-2)
    with caplog.at_level(logging.WARNING):
        trainer = fit(model, 60, validation=make_loader(Squares(20), 8, seed=0, infinite=False, shuffle=False))
    values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert values["val/active_units"] == 0 and "posterior collapse: 0 of 2 channels" in caplog.text
    assert values["val/latent_std_0"] == pytest.approx(1, abs=0.2) and {"val/psnr", "val/loss", "val/latent_mean_1"} <= set(values)


def test_validation_is_the_same_twice_and_of_the_average():
    model = module(ema_decay=0.5)
    loader = make_loader(Squares(20), 8, seed=0, infinite=False, shuffle=False)
    trainer = fit(model, 2)
    first = trainer.validate(model, loader, verbose=False)[0]
    assert trainer.validate(model, loader, verbose=False)[0] == first
    x = torch.stack([Squares()[i]["image"] for i in range(20)])
    with torch.no_grad():
        mse = (model.ema.shadow(x, torch.zeros(20, 2, 8, 8))[0].clamp(-1, 1) - x).square().mean(dim=(1, 2, 3))
    assert first["val/psnr"] == pytest.approx((10 * torch.log10(4 / mse)).mean().item(), rel=1e-5)


def test_a_collapsed_codebook_is_told_within_50_batches(caplog):
    bottleneck = VQ(2, codes=64)
    bottleneck.codebook.data += 100
    with caplog.at_level(logging.WARNING):
        fit(module(bottleneck, lr=1e-5), 50, Squares(16))
    assert "codebook collapse" in caplog.text


def test_statistics_make_latents_of_unit_variance():
    model = module(ema_decay=0.9)
    fit(model, 10)
    data = Squares(40)
    found = model.measure_statistics(make_loader(data, 8, seed=0))
    z = model.best.encode(torch.stack([data[i]["image"] for i in range(40)]), generator=torch.Generator().manual_seed(0))
    assert found["count"] == 40 and int(model.autoencoder.statistics_count) == 40
    assert torch.allclose(z.mean(dim=(0, 2, 3)), torch.zeros(2), atol=0.05)
    assert torch.allclose(z.std(dim=(0, 2, 3)), torch.ones(2), atol=0.05)
    assert torch.equal(model.autoencoder.scale, model.ema.shadow.scale)
    assert model.autoencoder.training == model.autoencoder.decoder.training


def test_reconstruct_is_decode_of_encode():
    model, x = module(), torch.rand(2, 3, SIDE, SIDE)
    assert torch.equal(model.reconstruct(x), model.autoencoder.decode(model.autoencoder.encode(x)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_end_with_the_same_weights(tmp_path, accumulate):
    torch.manual_seed(0)
    bottleneck = VQ(2, codes=32, restart=0.3, decay=0.5)
    model = module(bottleneck, critic={"norm": "batch"}, adversarial={"start": 3, "lead": 1}, accumulate=accumulate)
    *_, second = islice(make_loader(Squares(640), 16, seed=1), 2)
    broken = Squares(640, broken={int(second["key"][11])})  # on the second rank alone
    one, other = on_two_ranks(tmp_path, model, 4, data=broken)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(one["weights"], other["weights"], strict=True))
    assert one["used"] == other["used"] and one["skipped"] == other["skipped"] == 1


def test_two_ranks_are_one_with_twice_the_batch(tmp_path):
    alone, halved = (module(rule="SGD", lr=0.1) for _ in range(2))  # Adam makes much of rounding errors
    fit(alone, 4, batch_size=8)
    one, _ = on_two_ranks(tmp_path, halved, 4, batch_size=4)
    assert one["images"] == alone.images_seen
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one["weights"], alone.parameters(), strict=True))
