"""One process, two, or one that accumulates: the same loss curve, as it is logged."""

import json

import pytest
from stages import first_stage, second_stage, train

from autoencoder.bottlenecks import KL

WAYS = {"1 x 8": dict(batch=8), "2 x 4": dict(batch=4, world=2), "1 x 4, accumulated": dict(batch=4, accumulate=2)}


def curves(folder, make, ways, steps=20, **options):
    found = []
    for way in ways:
        train(folder / way, make, steps, **WAYS[way], **options)
        rows = [json.loads(line) for line in (folder / way / "metrics.jsonl").read_text().splitlines()]
        assert [(row["step"], row["images_seen"]) for row in rows] == [(k, 8 * k) for k in range(1, steps + 1)]
        found.append([row["train/loss"] for row in rows])
    assert len(set(found[0])) == steps
    return found


def test_stage_2_learns_the_same(tmp_path):
    one, two, accumulated = curves(tmp_path, second_stage, WAYS)
    assert two == pytest.approx(one, abs=1e-5) and accumulated == pytest.approx(one, abs=1e-5)


def test_stage_1_learns_the_same(tmp_path):
    one, two, accumulated = curves(tmp_path, first_stage, WAYS, 20, critic=False, bottleneck=lambda: KL(2))
    assert two == pytest.approx(one, abs=1e-5) and accumulated == pytest.approx(one, abs=1e-5)


def test_critic_and_codebook_too_but_for_accumulation(tmp_path):
    """The weight that follows gradients, the codebook that follows averages, its entries that begin anew: of all ranks."""
    one, two = curves(tmp_path, first_stage, ["1 x 8", "2 x 4"], 10, critic={"norm": "group"})
    assert two == pytest.approx(one, abs=1e-5)
