import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from autoencoder.bottlenecks import VQ


def vq(**options):
    torch.manual_seed(0)
    bottleneck = VQ(**{"channels": 3, "codes": 16, **options})
    place(bottleneck, torch.randn_like(bottleneck.codebook))
    return bottleneck


def place(bottleneck, entries):
    bottleneck.codebook.data.copy_(entries)
    if bottleneck.learn == "ema":
        bottleneck.sums.copy_(entries)


def brute_force(features, codebook):  # (B,C,h,w), (K,C) -> (B,h,w)
    return (features[:, None] - codebook[None, :, :, None, None]).square().sum(dim=2).argmin(dim=1)


def test_nearest_entry_as_by_brute_force():
    bottleneck, z = vq(), torch.randn(2, 3, 5, 4)
    out = bottleneck(z)
    assert (out.codes == brute_force(z, bottleneck.codebook)).all()
    assert torch.allclose(out.latent, bottleneck.lookup(out.codes), atol=1e-6)
    assert torch.equal(bottleneck.quantise(z), bottleneck.lookup(out.codes))
    assert torch.equal(bottleneck.moments(z)[0], z)  # the latent is what comes before quantisation


def test_reference_numbers_of_vector_quantizer_2():
    io = load_file("tests/data/vq_f4.safetensors")
    bottleneck = VQ(3, codes=64, beta=0.25, legacy=True)
    bottleneck.codebook.data = io["in.codebook"]
    z = io["out.prequant"].requires_grad_()
    out = bottleneck(z)
    assert torch.equal(out.codes.flatten(), io["out.indices"])
    assert torch.allclose(out.latent, io["out.quant"], atol=1e-5)
    assert torch.allclose(out.losses["codebook"], io["out.emb_loss"], rtol=1e-5)
    ((out.latent * io["in.grad_w"]).sum() + 10 * out.losses["codebook"]).backward()
    assert torch.allclose(z.grad, io["out.grad_prequant"], atol=1e-6)
    assert torch.allclose(bottleneck.codebook.grad, io["out.grad_codebook"], atol=1e-6)


def test_gradient_passes_straight_through():
    z, w = torch.randn(1, 3, 2, 2, requires_grad=True), torch.randn(1, 3, 2, 2)
    (vq()(z).latent * w).sum().backward()
    assert torch.allclose(z.grad, w)


def test_beta_weighs_the_commitment_and_in_legacy_order_the_codebook():
    for legacy, on_features in ((False, 0.25), (True, 1.0)):
        bottleneck, z = vq(legacy=legacy), torch.randn(1, 3, 2, 2, requires_grad=True)
        out = bottleneck(z)
        out.losses["codebook"].backward()
        distance = z.detach() - bottleneck.lookup(out.codes).detach()
        assert torch.allclose(z.grad, on_features * 2 * distance / z.numel(), atol=1e-6)


def test_ema_codebook_goes_to_the_means_of_what_it_stands_for():
    bottleneck = vq(channels=2, codes=2, learn="ema", decay=0.5)
    place(bottleneck, torch.tensor([[-1.0, 0], [1, 0]]))
    z = torch.tensor([[-3.0, 1], [-5, 1], [4, 2], [4, 4]]).T.reshape(1, 2, 2, 2)
    for _ in range(40):
        out = bottleneck(z)
    assert torch.allclose(bottleneck.codebook, torch.tensor([[-4.0, 1], [4, 3]]), atol=1e-4)
    assert not list(bottleneck.parameters())
    assert out.losses["codebook"].item() == pytest.approx(0.25 * 0.5)  # beta times what is left: 1, 1, 1, 1 of 8 values


def test_entries_without_use_stay_where_they_are():
    bottleneck = vq(learn="ema", decay=0.5)
    far = bottleneck.codebook[3].clone().add_(100)
    bottleneck.codebook[3] = bottleneck.sums[3] = far
    for _ in range(60):
        bottleneck(torch.randn(4, 3, 4, 4))
    assert torch.allclose(bottleneck.codebook[3], far, rtol=1e-4)


@pytest.mark.parametrize("learn", ["gradient", "ema"])
def test_restart_revives_a_collapsed_codebook(learn):
    def trained(restart):
        bottleneck = vq(channels=2, codes=32, learn=learn, decay=0.8, restart=restart, window=512)
        place(bottleneck, bottleneck.codebook.detach() + 50)  # far from all features: few entries take everything
        generator = torch.Generator().manual_seed(1)
        for _ in range(50):
            bottleneck(torch.randn(4, 2, 8, 8, generator=generator))
        return bottleneck.usage()
    before, after = trained(0.0), trained(0.1)
    assert before["used"] < 0.1 and before["perplexity"] < 3
    assert after["used"] > 0.9 and after["perplexity"] > 16


def test_restart_is_the_same_whatever_the_global_generator_holds():
    books = []
    for seed in (0, 1):
        bottleneck, z = vq(restart=0.5, decay=0.1), torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(5))
        torch.manual_seed(seed)
        for _ in range(5):
            bottleneck(z)
        books.append(bottleneck.codebook.detach().clone())
    assert torch.equal(*books)


def test_a_batch_with_nan_leaves_a_finite_codebook():
    bottleneck = vq(learn="ema", restart=0.9, decay=0.1)
    for scale in (1.0, float("nan"), float("inf"), 1.0):
        bottleneck(scale * torch.randn(2, 3, 4, 4))
    assert bottleneck.codebook.isfinite().all() and bottleneck.use.isfinite().all()


def test_evaluation_changes_nothing():
    bottleneck = vq(learn="ema", restart=0.5).eval()
    before = {name: value.clone() for name, value in bottleneck.state_dict().items()}
    bottleneck(torch.randn(2, 3, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in bottleneck.state_dict().items())


def test_cosine_takes_the_entry_of_the_nearest_direction():
    bottleneck, z = vq(cosine=True, channels=5), torch.randn(2, 5, 4, 3)
    directions = bottleneck.codebook / bottleneck.codebook.norm(dim=1, keepdim=True)
    expected = torch.einsum("bchw,kc->bkhw", z, directions).argmax(dim=1)  # the largest cosine
    out, (latent, _) = bottleneck(z), bottleneck.moments(z)
    assert torch.equal(out.codes, expected) and torch.equal(bottleneck(7 * z).codes, expected)
    assert torch.allclose(latent.norm(dim=1), torch.ones(2, 4, 3)) and torch.allclose(latent, z / z.norm(dim=1, keepdim=True))
    assert torch.allclose(out.latent, directions[expected].permute(0, 3, 1, 2), atol=1e-6)
    cosine = (latent * out.latent).sum(dim=1).mean()  # |a - b|^2 = 2 - 2 cos for directions, over 5 channels
    assert out.losses["codebook"].item() == pytest.approx(1.25 * (2 - 2 * cosine.item()) / 5, rel=1e-4)


def test_cosine_ema_codebook_goes_to_the_mean_directions():
    bottleneck = vq(channels=2, codes=2, learn="ema", cosine=True, decay=0.5)
    place(bottleneck, torch.tensor([[-1.0, 0], [0, 1]]))
    z = torch.tensor([[-3.0, 1], [-3, -1], [0.1, 2.0], [-0.2, 4.0]]).T.reshape(1, 2, 2, 2)
    for _ in range(40):
        bottleneck(z)
    assert torch.allclose(bottleneck.entries[0], torch.tensor([-1.0, 0]), atol=1e-4)
    assert torch.allclose(bottleneck.entries[1], torch.tensor([0.0, 1]), atol=1e-2)


def test_two_entries_get_one_feature_only_where_there_are_too_few():
    bottleneck = vq(codes=8, restart=0.5, learn="ema")
    bottleneck.use.zero_()
    z = torch.randn(1, 3, 1, 8)
    bottleneck._restart_dead(z[0, :, 0].T)
    assert torch.equal(bottleneck.codebook.sort(dim=0).values, z[0, :, 0].T.sort(dim=0).values)
    bottleneck.use.zero_()
    bottleneck._restart_dead(z[0, :, 0, :3].T)
    assert len(bottleneck.codebook.unique(dim=0)) == 3


@pytest.mark.parametrize("options", [
    dict(), dict(legacy=True), dict(learn="ema"), dict(cosine=True), dict(learn="ema", cosine=True)],
    ids=lambda options: " ".join(map(str, options.values())) or "gradient")  # fmt: skip
def test_restart_heals_a_training_whose_codebook_collapsed(options):
    """An encoder and a codebook trained together on 24 clusters of vectors, from entries that are all in one place."""
    centres = F.normalize(torch.randn(24, 4, generator=torch.Generator().manual_seed(2)), dim=1) * 3

    def trained(restart):
        torch.manual_seed(0)
        bottleneck = VQ(4, codes=32, decay=0.8, restart=restart, window=2048, **options)
        place(bottleneck, 20 * torch.ones(32, 4) + 0.1 * torch.randn(32, 4))
        encoder, decoder = torch.nn.Conv2d(4, 4, 1), torch.nn.Conv2d(4, 4, 1)
        weights = [p for module in (encoder, decoder, bottleneck) for p in module.parameters()]
        optimizer = torch.optim.Adam(weights, lr=1e-2)
        for _ in range(100):
            x = centres[torch.randint(24, (2, 8, 16))].permute(0, 3, 1, 2) + 0.05 * torch.randn(2, 4, 8, 16)
            out = bottleneck(encoder(x))
            loss = F.mse_loss(decoder(out.latent), x)
            optimizer.zero_grad()
            (loss + out.losses["codebook"]).backward()
            optimizer.step()
        return bottleneck.usage(), loss.item()

    (before, error_before), (after, error_after) = trained(0.0), trained(0.1)
    assert before["perplexity"] < 5 and after["perplexity"] > 20 and after["used"] > 0.8
    assert error_after < 0.8 * error_before
