"""What every kind of bottleneck keeps, and every kind with codes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from autoencoder.bottlenecks import FSQ, KL, LFQ, VQ, Plain
from autoencoder.codes import Codebook, straight_through, usage
from autoencoder.model import convolutional

KINDS = {
    "kl": lambda: KL(3), "plain": lambda: Plain(3), "vq": lambda: VQ(3, codes=16), "vq legacy": lambda: VQ(3, 16, legacy=True),
    "vq ema": lambda: VQ(3, codes=16, learn="ema"), "vq cosine": lambda: VQ(3, codes=16, cosine=True),
    "vq ema cosine": lambda: VQ(3, codes=16, learn="ema", cosine=True, restart=0.1), "fsq": lambda: FSQ([5, 4, 3]),
    "lfq": lambda: LFQ(3),
}  # fmt: skip
CODED = [name for name in KINDS if isinstance(KINDS[name](), Codebook)]
EVERY = pytest.mark.parametrize("kind", KINDS)
EVERY_CODED = pytest.mark.parametrize("kind", CODED)


def made(kind):
    """Of random entries that are well apart, where there are entries."""
    torch.manual_seed(0)
    bottleneck = KINDS[kind]()
    if hasattr(bottleneck, "codebook"):
        bottleneck.codebook.data.copy_(torch.randn_like(bottleneck.codebook))
        if bottleneck.cosine:
            bottleneck.codebook.data.copy_(F.normalize(bottleneck.codebook, dim=1))
    return bottleneck


def features_of(bottleneck, *, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(2, bottleneck.features, 5, 4, generator=torch.Generator().manual_seed(1))).to(dtype)


@EVERY
def test_sizes_are_what_they_say(kind):
    bottleneck = made(kind)
    features = features_of(bottleneck)
    mean, logvar = bottleneck.moments(features)
    out = bottleneck(features)
    assert mean.shape == out.latent.shape == bottleneck.quantise(mean).shape == (2, bottleneck.channels, 5, 4)
    assert (logvar is None) == (kind != "kl") and (out.codes is None) == (kind not in CODED)
    assert all(loss.shape == () and loss.isfinite() for loss in out.losses.values())


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_comes_out_has_the_precision_of_what_goes_in(kind, dtype):
    bottleneck = made(kind).to(dtype)
    features = features_of(bottleneck, dtype=dtype)
    mean, _ = bottleneck.moments(features)
    assert {mean.dtype, bottleneck(features).latent.dtype, bottleneck.quantise(mean).dtype} == {dtype}


@EVERY
def test_gradients_reach_the_features(kind):
    bottleneck = made(kind)
    features = features_of(bottleneck, scale=0.3).requires_grad_()
    out = bottleneck(features)
    weights = torch.randn_like(out.latent)
    (out.latent * weights).sum().backward()
    assert features.grad.isfinite().all() and features.grad.abs().sum(dim=1).gt(0).all()


@EVERY_CODED
def test_the_pass_of_training_is_that_of_inference(kind):
    """The decoder learns on what it will see: the entries of the latents, to the bit."""
    bottleneck = made(kind).eval()
    features = features_of(bottleneck)
    out, (latent, _) = bottleneck(features), bottleneck.moments(features)
    assert torch.equal(out.codes, bottleneck.indices(latent))
    assert torch.equal(out.latent, bottleneck.quantise(latent))
    assert torch.equal(out.latent, bottleneck.lookup(out.codes))


@EVERY_CODED
def test_half_precision_around_it_changes_no_code(kind):
    """Autocast is for the networks: entries are compared in fp32."""
    bottleneck = made(kind).eval()
    features = features_of(bottleneck, dtype=torch.bfloat16)
    plain = bottleneck(features.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = bottleneck(features)
    same = (out.codes == plain.codes).float().mean()
    assert same == 1 if bottleneck.moments(features)[0] is features else same > 0.9  # a bounded latent is rounded to bf16
    for name, loss in out.losses.items():
        assert loss.dtype is torch.float32 and torch.allclose(loss, plain.losses[name], rtol=0.02)


def test_half_precision_around_it_leaves_the_kl_sum_exact():
    features = torch.randn(2, 8, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = KL(4)(features).losses["kl"]
    assert found.item() == pytest.approx(KL(4)(features.double()).losses["kl"].item(), rel=1e-5)


@EVERY_CODED
def test_a_deep_copy_counts_for_itself(kind):
    """An averaged model is one."""
    bottleneck = made(kind)
    other = copy.deepcopy(bottleneck)
    bottleneck(features_of(bottleneck))
    assert bottleneck.usage()["used"] > 0 and other.usage()["used"] == 0


@EVERY_CODED
def test_only_training_counts(kind):
    bottleneck = made(kind).eval()
    bottleneck(features_of(bottleneck))
    assert bottleneck.usage() == {"used": 0, "perplexity": 1}
    bottleneck.train()(features_of(bottleneck))
    assert bottleneck.usage()["used"] > 0.1


@EVERY_CODED
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 0.3, 1.0, 30.0]))
def test_quantising_is_looking_up_the_index(kind, seed, scale):
    bottleneck = made(kind)
    z = scale * torch.randn(2, bottleneck.channels, 3, 2, generator=torch.Generator().manual_seed(seed))
    codes = bottleneck.indices(z)
    assert codes.dtype is torch.int64 and 0 <= codes.min() and codes.max() < bottleneck.codes
    q = bottleneck.quantise(z)
    assert torch.equal(bottleneck.lookup(codes), q) and torch.equal(bottleneck.quantise(q), q)


@settings(deadline=None, max_examples=60)
@given(st.one_of(
    st.lists(st.integers(2, 11), min_size=1, max_size=4).map(FSQ), st.integers(1, 13).map(LFQ),
    st.builds(lambda channels, codes, learn, cosine: VQ(channels, codes, learn=learn, cosine=cosine),
              st.integers(4, 8), st.integers(2, 300), st.sampled_from(["gradient", "ema"]), st.booleans()),
))  # fmt: skip
def test_every_code_comes_back(bottleneck):
    codes = torch.arange(bottleneck.codes).view(1, 1, -1)
    entries = bottleneck.lookup(codes)
    assert entries.shape == (1, bottleneck.channels, 1, bottleneck.codes)
    assert len(entries[0, :, 0].T.unique(dim=0)) == bottleneck.codes
    assert torch.equal(bottleneck.indices(entries), codes)


@EVERY_CODED
def test_codes_of_a_model_are_those_of_its_latents(kind):
    model = convolutional(made(kind), mult=[1, 1], width=16, blocks=1, attention=False).eval()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        raw, _ = model.moments(x)
        model.set_statistics(raw.mean((0, 2, 3)), raw.std((0, 2, 3)) + 0.1, 4)
        x_hat, bottled = model(x)
        assert torch.equal(model.codes(x), bottled.codes)
        assert torch.equal(model.decode_codes(bottled.codes), x_hat)
        assert torch.allclose(model.decode(model.encode(x)), x_hat, atol=1e-5)


def test_straight_through_is_the_second_to_the_bit():
    z, q = torch.tensor([1e8, 3.0], requires_grad=True), torch.tensor([0.1, 0.2])
    out = straight_through(z, q)
    out.sum().backward()
    assert torch.equal(out, q) and z.grad.tolist() == [1, 1]


def test_usage_of_known_counts():
    found = usage(torch.tensor([1.0, 1, 2, 0]))
    assert found["used"] == 0.75 and found["perplexity"] == pytest.approx(math.exp(1.5 * math.log(2)))


@pytest.mark.parametrize(("sizes", "kept"), [([3, 3, 3], [1, 2, 2, 2, 3, 3, 3]), ([9], [1, 1, 1, 1, 1, 1, 1]), ([2], [1, 1])])
def test_usage_looks_at_the_last_codes_only(sizes, kept):
    book = Codebook(2, codes=7, window=7)
    for number, size in enumerate(sizes, start=1):
        book.remember(torch.full((1, size), number))
    assert book.usage() == usage(torch.bincount(torch.tensor(kept), minlength=7))
    assert len(book._recent) <= len(sizes)


def test_what_is_out_of_the_window_is_let_go():
    book = Codebook(2, codes=4, window=8)
    for _ in range(100):
        book.remember(torch.zeros(1, 3, dtype=torch.int64))
    assert len(book._recent) == 3


def test_the_window_has_room_for_every_entry():
    assert FSQ([8, 8, 8]).window == 65536 and LFQ(18).window == 4 * 2**18
    with pytest.raises(ValueError, match="bottleneck.window: 100 codes cannot show the use of 512 entries"):
        FSQ([8, 8, 8], window=100)


@pytest.mark.parametrize(("make", "told"), [
    (lambda: FSQ([]), r"bottleneck.levels: \[\]; it takes one number from 2"), (lambda: FSQ([8, 1]), r"levels: \[8, 1\]"),
    (lambda: FSQ([1000, 1000, 1000]), "product of at most 1,048,576"), (lambda: LFQ(21), "bottleneck.channels: 21; LFQ takes 1 to 20"),
    (lambda: LFQ(0), "channels: 0"), (lambda: LFQ(4, temperature=0.0), "bottleneck.temperature: 0.0"),
    (lambda: VQ(codes=1), "1 codes; a codebook has 2 to"), (lambda: VQ(learn="adam"), "it takes gradient, ema"),
    (lambda: VQ(learn="ema", legacy=True), "bottleneck.legacy"), (lambda: VQ(restart=1.0), "bottleneck.restart: 1.0"),
])  # fmt: skip
def test_mistakes(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def on_one_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {kind: after_three_batches(kind, slice(rank, None, 2)) for kind in CODED}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def after_three_batches(kind, share):
    bottleneck = made(kind)
    for _ in range(3):
        bottleneck(features_of(bottleneck)[share])
    return {**bottleneck.usage(), **bottleneck.state_dict()}


def test_two_ranks_know_what_one_with_both_shares_knows(tmp_path):
    torch.multiprocessing.start_processes(on_one_rank, (tmp_path,), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for kind in CODED:
        expected = after_three_batches(kind, slice(None))
        for found in (rank[kind] for rank in ranks):
            assert found.keys() == expected.keys()
            assert all(torch.allclose(torch.as_tensor(found[name]).double(), torch.as_tensor(value).double(), atol=1e-6)
                       for name, value in expected.items()), kind  # fmt: skip
