import dataclasses
import random

import numpy as np
import pytest
import torch

from ldm.data.shapes import Figure, Scene, Shapes, caption, draw, obey, parse, scene
from ldm.metrics.adherence import ATTRIBUTES, evaluate, format_table, read, score

N = 400


def blurred(picture, sigma=0.7, noise=10):
    reach = np.arange(-3, 4)
    kernel = np.exp(-(reach**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    wide = np.pad(picture.astype(float), ((3, 3), (3, 3), (0, 0)), mode="edge")
    wide = sum(weight * wide[k : k + 64] for k, weight in enumerate(kernel))
    wide = sum(weight * wide[:, k : k + 64] for k, weight in enumerate(kernel))
    wide += np.random.default_rng(0).uniform(-noise, noise, wide.shape)
    return np.clip(np.rint(wide), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def scenes():
    return [scene(21, index, held_out="any", split="any") for index in range(N)]


@pytest.fixture(scope="module")
def readings(scenes):
    return [read(draw(one)) for one in scenes]


def test_clean_drawings_are_read(scenes, readings):
    right = [score(reading, parse(caption(one))) for one, reading in zip(scenes, readings, strict=True)]
    assert {len(one.figures) for one in scenes} == {1, 2}
    for attribute in ATTRIBUTES:
        assert np.mean([one[attribute] for one in right]) > 0.99


def test_centres_and_radii_are_measured(scenes, readings):
    for one, reading in zip(scenes, readings, strict=True):
        for figure in one.figures:
            nearest = min(reading.objects, key=lambda seen: np.hypot(seen.x - figure.x, seen.y - figure.y))
            assert np.hypot(nearest.x - figure.x, nearest.y - figure.y) < 0.75
            assert abs(nearest.radius - figure.radius) < 0.75


def test_captions_of_other_pictures_are_wrong(scenes, readings):
    right = []
    for count in (1, 2):
        same = [k for k, one in enumerate(scenes) if len(one.figures) == count]
        right += [score(readings[k], scenes[j].said)["all"] for k, j in zip(same, np.roll(same, 1), strict=True)]
    assert len(right) == N and np.mean(right) < 0.02


def test_one_wrong_word_makes_one_attribute_wrong(scenes, readings):
    chance = random.Random(0)
    words = {"size": ["small", "large"], "colour": ["red", "green", "black"], "shape": ["circle", "square", "star"]}
    for one, reading in list(zip(scenes, readings, strict=True))[:150]:
        if len({(noun.size, noun.colour, noun.shape) for noun in one.said.objects}) == 1 and len(one.figures) == 2:
            continue
        for attribute, choices in words.items():
            noun = one.said.objects[0]
            other = chance.choice([word for word in choices if word != getattr(noun, attribute)])
            changed = (dataclasses.replace(noun, **{attribute: other}), *one.said.objects[1:])
            right = score(reading, dataclasses.replace(one.said, objects=changed))
            assert not right["all"] and right["background"] and right["count"]
            assert [name for name in ("colour", "shape", "size") if not right[name]] == [attribute] or len(changed) == 2
        opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
        where = opposite.get(one.said.where, "at the top" if one.said.where != "at the top" else "in the center")
        right = score(reading, dataclasses.replace(one.said, where=where))
        assert not right["all"] and (not right["position"] or len(one.figures) == 2)
        right = score(reading, dataclasses.replace(one.said, background="none of these"))
        assert [name for name in ATTRIBUTES if not right[name]] == ["background", "all"]


def test_blur_and_noise_of_an_autoencoder_are_tolerated(scenes):
    right = [score(read(blurred(draw(one))), one.said) for one in scenes[:150]]
    assert np.mean([one["all"] for one in right]) > 0.98


def test_touching_objects_are_two():
    said = parse("a large red square left of a large red circle on a white background")
    figures = (Figure("square", 17.5, 34.0, 13.5, (214, 40, 40)), Figure("circle", 44.0, 29.0, 13.5, (214, 40, 40)))
    assert score(read(draw(Scene(said, (250, 250, 250), figures))), said)["all"]


def spoiled(picture, what):
    picture = picture.copy()
    if what == "half an object":
        picture[32:] = picture[0, 0]
    elif what == "a hole":
        picture[28:36, 28:36] = picture[0, 0]
    elif what == "upside down":
        picture = picture[::-1].copy()
    elif what == "stretched":
        picture = picture[:, 32 + (np.arange(64) - 32) * 3 // 4]
    elif what == "two colours":
        half = picture[32:]
        half[(half != picture[0, 0]).any(2)] = (40, 80, 215)
    return picture


@pytest.mark.parametrize("what", ["half an object", "a hole", "stretched", "two colours"])
@pytest.mark.parametrize("shape", ["circle", "square"])
def test_a_spoiled_shape_has_no_name(what, shape):
    picture = draw(Scene(None, (250, 250, 250), (Figure(shape, 32.0, 32.0, 13.0, (214, 40, 40)),)))
    assert [seen.shape for seen in read(picture).objects] == [shape]
    assert shape not in [seen.shape for seen in read(spoiled(picture, what)).objects]


def test_an_upside_down_triangle_is_none():
    picture = draw(Scene(None, (250, 250, 250), (Figure("triangle", 32.0, 32.0, 13.0, (214, 40, 40)),)))
    assert read(picture).objects[0].shape == "triangle"
    assert read(spoiled(picture, "upside down")).objects[0].shape is None


def test_a_wrong_count_makes_what_is_said_of_objects_wrong():
    one = scene(0, 0, objects="two")
    first = dataclasses.replace(one, figures=one.figures[:1])
    right = score(read(draw(first)), one.said)
    assert [name for name in ATTRIBUTES if right[name]] == ["background"]


def test_pictures_without_sense_are_read_too():
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert not any(seen.shape for seen in read(noise).objects)
    assert not score(read(noise), scene(0, 0, objects="two").said)["count"]
    assert read(torch.full((3, 64, 64), float("nan"))).background is None
    blots = np.full((64, 64, 3), 128, np.uint8)  # as far above the background's colour as below it
    blots[20:40, 20:40:2], blots[20:40, 21:40:2] = 70, 186
    assert [(seen.colour, seen.shape) for seen in read(blots).objects] == [(None, None)]
    empty = read(torch.ones(3, 64, 64))
    assert empty.background == "white" and not empty.objects


def test_tensors_and_arrays_read_alike_and_others_are_refused():
    data = Shapes(1)
    assert read(data[0]["image"]) == read(draw(data.scene(0)))
    for wrong in (torch.zeros(3, 32, 32), np.zeros((64, 64, 3)), torch.zeros(3, 64, 64, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="takes a float tensor"):
            read(wrong)


def test_evaluation_counts_its_captions():
    asked = []

    def obedient(captions):
        asked.extend(captions)
        return [draw(obey(parse(text), random.Random(text))) for text in captions]

    table = evaluate(obedient, n=24, n_held_out=10, batch=5)
    assert {name: row["captions"] for name, row in table.items()} == {
        "one object": 12,
        "two objects": 12,
        "held-out pair, one object": 10,
    }
    assert all(row[attribute] == 1 for row in table.values() for attribute in ATTRIBUTES)
    assert len(set(asked)) == 34
    again = evaluate(lambda captions: torch.ones(len(captions), 3, 64, 64), n=8, n_held_out=4, exclude_captions=asked)
    assert all(row["all"] == 0 and row["count"] == 0 for row in again.values())
    lines = format_table(table).splitlines()
    assert len(lines) == 4 and lines[1].split() == ["one", "object", "12", *["100.0%"] * 7]
