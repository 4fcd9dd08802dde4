"""ImageEmbedding: what goes through unchanged, noise by its formula, and a random CLIP vision tower against transformers."""

import copy

import pytest
import torch

from ldm.common.files import UserError
from ldm.common.random import normal
from ldm.conditioners.image import ImageEmbedding
from ldm.conditioners.vision import KNOWN, FrozenVision, prepared
from ldm.networks.layers import timestep_embedding

E = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
NOISE = {"target": "ldm.process.DDPM", "params": {"schedule": "cosine"}}


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28,
                              patch_size=14, projection_dim=6)  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return str(folder)


def test_an_embedding_is_the_vector_or_a_token():
    batch = {"image_embedding": E}
    assert torch.equal(ImageEmbedding(embedding_width=6)(batch).vector, E)
    tokens = ImageEmbedding(embedding_width=6, to="tokens")
    assert torch.equal(tokens(batch).tokens, E[:, None]) and (tokens.width, tokens.length, tokens.vector_width) == (6, 1, None)
    many = ImageEmbedding(embedding_width=6, to="tokens", width=8, count=4)
    assert many(batch).tokens.shape == many.null(3).tokens.shape == (3, 4, 8) and (many.width, many.length) == (8, 4)
    linear, _, norm = many.project
    torch.testing.assert_close(many(batch).tokens[1, 2], norm(linear(E[1])[16:24]))


def test_noise_is_added_to_the_normalised_embedding():
    conditioner = ImageEmbedding(embedding_width=6, noise=NOISE, noise_level=100)
    mean, std = torch.arange(6.0), torch.arange(1.0, 7)
    conditioner.set_statistics(mean, std)
    level = torch.tensor([0, 500, 999])
    found = conditioner({"image_embedding": E, "noise_level": level, "position": torch.tensor([4, 5, 6])}).vector
    steps = torch.arange(1001, dtype=torch.float64) / 1000
    f = torch.cos((steps + 0.008) / 1.008 * torch.pi / 2) ** 2
    alpha_bar = torch.cumprod((f[1:] / f[:-1]).clamp(min=0.001), 0)[level].float()[:, None]
    eps = normal((6,), 0, "image_embedding/noise", [4, 5, 6])
    by_hand = mean + std * (alpha_bar.sqrt() * (E - mean) / std + (1 - alpha_bar).sqrt() * eps)
    torch.testing.assert_close(found[:, :6], by_hand)
    assert torch.equal(found[:, 6:], timestep_embedding(level, 6)) and conditioner.vector_width == 12
    assert torch.equal(conditioner({"image_embedding": E}).vector[:, 6:], timestep_embedding(torch.full((3,), 100), 6))
    assert set(conditioner.state_dict()) == {"mean", "std"}


def test_training_draws_levels_and_drops():
    conditioner = ImageEmbedding(embedding_width=6, noise=NOISE, max_noise_level=10, dropout=0.25)
    numbers = {"noise_level": torch.tensor([0.05, 0.95, 0.5]), "drop": torch.tensor([0.3, 0.25, 0.2])}
    vector = conditioner.with_dropout({"image_embedding": E}, numbers.get).vector
    assert torch.equal(vector[:2, 6:], timestep_embedding(torch.tensor([0, 9]), 6)) and not vector[2].any()
    assert not conditioner.with_null({"image_embedding": E})[1].vector.any()


def test_the_encoder_reads_pictures(tower):
    from transformers import CLIPVisionModelWithProjection

    x = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    with torch.no_grad():
        expected = CLIPVisionModelWithProjection.from_pretrained(tower)(((x + 1) / 2 - mean) / std)
    vector, patches = ImageEmbedding(tower), ImageEmbedding(tower, to="patches")
    torch.testing.assert_close(vector({"image": x}).vector, expected.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(patches({"image": x}).tokens, expected.last_hidden_state, atol=1e-5, rtol=1e-4)
    assert (vector.vector_width, patches.width, patches.length) == (6, 16, 5)
    given = vector({"image_embedding": E[:2], "image": x}).vector  # what is given is not computed
    assert torch.equal(given, E[:2])


def test_the_encoder_is_not_part_of_the_model(tower):
    conditioner = ImageEmbedding(tower, to="tokens", width=8)
    conditioner({"image": torch.zeros(1, 3, 28, 28)})
    assert all(name.startswith("project") for name in conditioner.state_dict())
    assert copy.deepcopy(conditioner).encoder is conditioner.encoder
    assert conditioner.encoder_hash and conditioner.encoder_hash == ImageEmbedding(tower).encoder_hash
    assert ImageEmbedding(embedding_width=6).encoder_hash is None


def test_pictures_are_resized_and_cropped_to_a_square():
    x = torch.linspace(-1, 1, 60).expand(1, 3, 30, 60)
    found = prepared(x, 15)  # 15 x 30, of which the middle half stays
    colour = found[0] * torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    colour = 2 * (colour + torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)) - 1
    assert found.shape == (1, 3, 15, 15)
    torch.testing.assert_close(colour[1, 7], torch.linspace(-1, 1, 60).view(30, 2).mean(1)[7:22], atol=1e-3, rtol=0)


def test_sizes_of_known_encoders_are_those_of_their_configs():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"openai/clip-vit-large-patch14": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14, projection_dim=768),
             "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14, projection_dim=1024)}
    for name, config in sizes.items():
        with torch.device("meta"):
            model = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=224, **config))
        facts = FrozenVision(name).facts
        assert facts is KNOWN[name] and facts.parameters == sum(p.numel() for p in model.parameters())
        assert (facts.width, facts.hidden) == (config["projection_dim"], config["hidden_size"])


def test_what_does_not_go_together_is_told(tmp_path):
    for options in ({}, {"encoder": "openai/clip-vit-large-patch14", "embedding_width": 3}, {"embedding_width": 3, "to": "patches"}):
        with pytest.raises(UserError, match="give an encoder, or the width"):
            ImageEmbedding(**options)
    with pytest.raises(UserError, match="noise of a vector"):
        ImageEmbedding(embedding_width=6, to="tokens", noise=NOISE)
    with pytest.raises(UserError, match=r"'image_embedding' has to be \(B, 6\), got \(3, 5\)"):
        ImageEmbedding(embedding_width=6)({"image_embedding": E[:, :5]})
    with pytest.raises(UserError, match="picture encoder ./nowhere: no such folder"):
        ImageEmbedding("./nowhere")
    with pytest.raises(UserError, match="lacks config.json"):
        ImageEmbedding(str(tmp_path))


def test_a_random_encoder_is_always_the_same_and_tells_pictures_apart():
    x = torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
    torch.manual_seed(5)
    first, state = FrozenVision("random"), torch.get_rng_state()
    found = first(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = FrozenVision("random")
    assert torch.equal(again(x)[0], found[0]) and again.hash == first.hash
    facts = KNOWN["random"]
    assert found[0].shape == (2, facts.width) and found[1].shape == (2, facts.length, facts.hidden)
    assert sum(p.numel() for p in first.model.parameters()) == facts.parameters and (found[0][0] - found[0][1]).abs().max() > 0.01
    first.prepare()  # nothing to find
