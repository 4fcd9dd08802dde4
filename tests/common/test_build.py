"""Blocks are built as they say, and every mistake in them is told before anything is built."""

import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.common.build import TRUSTED, build, check, check_call, locate
from ldm.common.files import UserError

HERE = str(Path(__file__).parent)
UNET_TAKES = (
    "model_channels, mult, size, dropout, attention, name, root, norm, weights, legacy, kernel, free, unknown, stages, "
    "process"
)


@pytest.fixture(autouse=True)
def toybox(monkeypatch):
    """The user's package `toybox`, beside this file, imported afresh."""
    monkeypatch.syspath_prepend(HERE)
    for name in [name for name in sys.modules if name.partition(".")[0] == "toybox"]:
        monkeypatch.delitem(sys.modules, name)
    from toybox import parts

    return parts


def unet(**params):
    return {"target": "toybox.parts.UNet", "params": {"model_channels": 4, **params}}


def encoder(**params):
    return {"target": "toybox.parts.Encoder", "params": params}


# block -> the mistakes, path `m`
WRONG = {
    "unknown key": (
        {"target": "toybox.parts.UNet", "params": {"model_chanels": 4, "model_channels": 4}},
        [f"m.params.model_chanels: UNet has no such option; nearest: 'model_channels'; it takes {UNET_TAKES}"],
    ),
    "unknown key, nothing near": (
        encoder(channels=1, zzz=1),
        ["m.params.zzz: Encoder has no such option; it takes channels, rate, act"],
    ),
    "missing": (encoder(), ["m.params.channels: missing; Encoder needs it (int)"]),
    "params left out": ({"target": "toybox.parts.Encoder"}, ["m.params.channels: missing; Encoder needs it (int)"]),
    "text for int": (encoder(channels="many"), ["m.params.channels: expected int, got text 'many'"]),
    "quoted int": (
        encoder(channels="3"),
        ["m.params.channels: expected int, got text '3'; write the number without quotes"],
    ),
    "quoted float": (
        encoder(channels=3, rate="1e-4"),
        ["m.params.rate: expected float, got text '1e-4'; write the number without quotes"],
    ),
    "bool for int": (encoder(channels=True), ["m.params.channels: expected int, got true"]),
    "bool for float": (encoder(channels=1, rate=False), ["m.params.rate: expected float, got false"]),
    "int for bool": (unet(attention=1), ["m.params.attention: expected bool, got 1"]),
    "word for bool": (
        unet(attention="yes"),
        ["m.params.attention: expected bool, got text 'yes'; write true or false without quotes"],
    ),
    "round float for int": (encoder(channels=1e5), ["m.params.channels: expected int, got 100000.0; write 100000"]),
    "broken float for int": (encoder(channels=1.5), ["m.params.channels: expected int, got 1.5"]),
    "null": (encoder(channels=None), ["m.params.channels: expected int, got null"]),
    "number for text": (unet(name=12), ["m.params.name: expected str, got 12; put it in quotes"]),
    "list for int": (encoder(channels=[1]), ["m.params.channels: expected int, got [1]"]),
    "int for list": (unet(mult=2), ["m.params.mult: expected list[int], got 2"]),
    "wrong item": (unet(mult=[1, "b"]), ["m.params.mult[1]: expected int, got text 'b'"]),
    "pair too long": (unet(size=[8, 8, 8]), ["m.params.size: expected int or list[int, int], got [8, 8, 8]"]),
    "wrong in a pair": (unet(size=[8, 2.5]), ["m.params.size[1]: expected int, got 2.5"]),
    "wrong value in a mapping": (
        unet(weights={"a": 1, "b": "x"}),
        ["m.params.weights.b: expected float, got text 'x'"],
    ),
    "list for a mapping": (
        unet(weights=[1]),
        ["m.params.weights: expected names with values (float) or null, got [1]"],
    ),
    "number for path": (unet(root=3), ["m.params.root: expected path or null, got 3"]),
    "old Optional": (unet(legacy="a"), ["m.params.legacy: expected int or null, got text 'a'"]),
    "no such choice": (
        encoder(channels=1, act="gelo"),
        ["m.params.act: expected one of 'silu', 'gelu', got text 'gelo'; nearest: 'gelu'"],
    ),
    "null is no choice": (
        encoder(channels=1, act=None),
        ["m.params.act: expected one of 'silu', 'gelu', got null"],
    ),
    "value for a callable": (unet(norm="layer"), ["m.params.norm: expected block or null, got text 'layer'"]),
    "block for a number": (
        encoder(channels=encoder(channels=1)),
        ["m.params.channels: expected int, got a block (toybox.parts.Encoder)"],
    ),
    "value for an object": (
        {"target": "toybox.parts.Model", "params": {"encoder": "big", "network": unet()}},
        ["m.params.encoder: expected block that makes Encoder, got text 'big'"],
    ),
    "value for a protocol": (unet(process=3), ["m.params.process: expected block that makes Process or null, got 3"]),
    "value for a Block": (
        {"target": "toybox.parts.Model", "params": {"encoder": encoder(channels=1), "network": "unet"}},
        ["m.params.network: expected block, got text 'unet'"],
    ),
    "filled in by nobody": (encoder(channels="???"), ["m.params.channels: must be filled in (int)"]),
    "given by the program": (
        unet(in_channels=3),
        ["m.params.in_channels: the program supplies this to UNet; remove it"],
    ),
    "no such package": (
        {"target": "toyboxx.parts.UNet"},
        ["m.target: no package 'toyboxx' is installed or on PYTHONPATH; nearest: 'toybox'"],
    ),
    "no such module": ({"target": "toybox.part.UNet"}, ["m.target: toybox has no 'part'; nearest: 'parts'"]),
    "no such class": ({"target": "toybox.parts.Unett"}, ["m.target: toybox.parts has no 'Unett'; nearest: 'UNet'"]),
    "a module": ({"target": "toybox.parts"}, ["m.target: toybox.parts is a module, not a class or function"]),
    "a value": (
        {"target": "toybox.parts.CONSTANT"},
        ["m.target: toybox.parts.CONSTANT is of type int, not a class or function"],
    ),
    "one word": ({"target": "UNet"}, ["m.target: a target reads package.module.Name, got 'UNet'"]),
    "not a name": (
        {"target": "toybox/parts.py"},
        ["m.target: a target reads package.module.Name, got 'toybox/parts.py'"],
    ),
    "target is a number": ({"target": 3}, ["m.target: expected package.module.Name, got 3"]),
    "not a block": ("UNet", ["m: expected a block (target: package.module.Name, params: {...}), got 'UNet'"]),
    "params misspelt": (
        {"target": "toybox.parts.Encoder", "parms": {"channels": 3}},
        ["m.parms: a block holds target and params, nothing else; nearest: 'params'"],
    ),
    "params are a list": (
        {"target": "toybox.parts.Encoder", "params": [3]},
        ["m.params: expected names with values, got [3]"],
    ),
    "impossible combination": (
        {"target": "toybox.parts.Schedule", "params": {"steps": 1, "shape": "cosine"}},
        ["m.params.shape: cosine needs steps > 1"],
    ),
    "dataclass": (
        {"target": "toybox.parts.Schedule", "params": {"shap": "cosine", "betas": [True]}},
        [
            "m.params.betas[0]: expected float, got true",
            "m.params.shap: Schedule has no such option; nearest: 'shape'; it takes steps, shape, betas",
            "m.params.steps: missing; Schedule needs it (int)",
        ],
    ),
    "open-ended callables still have types": (
        {"target": "toybox.parts.anything", "params": {"width": "a", "whatever": 1}},
        ["m.params.width: expected int, got text 'a'"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_mistake_has_its_line(case, toybox):
    block, lines = WRONG[case]
    assert check(block, "m") == lines
    assert not toybox.calls


def test_all_mistakes_come_at_once_through_every_level(toybox):
    block = {
        "target": "toybox.parts.Model",
        "params": {
            "encoder": encoder(channels="x", rat=1.0),
            "network": unet(
                stages=[encoder(channels=1), encoder(channels=None)], weights={"a": {"target": "no.where"}}
            ),
            "extras": [{"target": "toybox.parts.Encodr", "params": {"inner": encoder(act="tanh")}}],
            "critc": None,
        },
    }
    found = check(block)
    starts = [
        "model.params.critc: Model has no such option; nearest: 'critic'",
        "model.params.encoder.params.channels: expected int",
        "model.params.encoder.params.rat: Encoder has no such option; nearest: 'rate'",
        "model.params.network.params.weights.a: expected float, got a block (no.where)",
        "model.params.network.params.stages[1].params.channels: expected int, got null",
        "model.params.network.params.weights.a.target: no package 'no'",
        "model.params.extras[0].target: toybox.parts has no 'Encodr'; nearest: 'Encoder'",
        "model.params.extras[0].params.inner.params.act: expected one of",
        "model.params.extras[0].params.inner.params.channels: missing",
    ]
    assert sorted(starts) == sorted(next(s for s in starts if line.startswith(s)) for line in found)
    assert not toybox.calls


@pytest.mark.parametrize(
    "block",
    [
        unet(mult=[1, 2, 4], size=8, dropout=None, weights={"a": 1, "b": 0.5}, legacy=None, kernel=None, root="/x"),
        unet(
            size=[8, 16], dropout=0, norm=encoder(channels=1), free=[1, "a"], unknown="?", stages=[encoder(channels=2)]
        ),
        {"target": "toybox.parts.Model", "params": {"encoder": encoder(channels=3), "network": unet(), "critic": None}},
        {"target": "toybox.parts.anything", "params": {"width": 1, "height": "tall"}},
        {"target": "toybox.parts.Schedule", "params": {"steps": 4, "shape": "cosine", "betas": [1, 0.5]}},
        {"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 3}},
        {"target": "torch.nn.Identity", "params": None},
    ],
)
def test_what_is_right_has_no_mistakes(block):
    assert check(block) == []
    assert check(OmegaConf.create(block)) == []


def test_import_errors_of_the_users_modules_are_told_as_his():
    (line,) = check({"target": "toybox.broken.Net"})
    assert line.startswith("model.target: toybox.broken fails to import: RuntimeError: the licence server is asleep (")
    assert line.endswith("broken.py:3)")
    (line,) = check({"target": "toybox.hungry.Net"})
    assert "ModuleNotFoundError: No module named 'nowhere_to_be_found' (" in line and line.endswith("hungry.py:3)")


def test_a_syntax_error_names_file_and_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "half_written.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(UserError, match=r"half_written fails to import: SyntaxError.*half_written.py, line 2"):
        locate("half_written.f")


def test_the_supplied_names_of_a_call_are_its_own_and_the_given(toybox):
    assert check_call(toybox.UNet, {"model_channels": 1}, "x") == []
    assert check_call(toybox.UNet, {}, "x", given=("model_channels",)) == []
    wrong = check_call(toybox.UNet, {"model_channels": 1}, "x", given=("model_channels",))
    assert wrong == ["x.model_channels: the program supplies this to UNet; remove it"]


def test_build_makes_blocks_inside_out_but_passes_on_what_is_annotated_so(toybox):
    block = {
        "target": "toybox.parts.Model",
        "params": {"encoder": encoder(channels=5), "network": unet(stages=[encoder(channels=1)]), "extras": [unet()]},
    }
    model = build(OmegaConf.create(block))
    assert toybox.calls == ["Encoder", "Encoder", "UNet"]
    assert model.encoder.channels == model.network.in_channels == 5
    assert [type(stage) for stage in model.network.stages] == [toybox.Encoder]
    assert model.extras == [unet()] and type(model.extras) is list and type(model.extras[0]) is dict


def test_build_gives_a_callable_those_derived_values_that_it_takes(toybox):
    made = build(encoder(), channels=7, context_dim=12)
    assert (made.channels, made.rate) == (7, 0.1)
    assert build({"target": "toybox.parts.anything"}, width=1, other=2) == {"width": 1, "other": 2}


@pytest.mark.parametrize(
    ("block", "given", "message"),
    [
        (
            encoder(channel=1),
            {},
            r"toybox.parts.Encoder: params.channel: .* nearest: 'channels'.*params.channels: missing",
        ),
        (unet(in_channels=1), {"in_channels": 3}, "toybox.parts.UNet: the program supplies in_channels; remove it"),
        ({"params": {}}, {}, "expected a block"),
        ({"target": "toybox.parts.Nope"}, {}, "toybox.parts has no 'Nope'"),
    ],
)
def test_build_refuses_wrong_names_in_one_line(block, given, message):
    with pytest.raises(UserError, match=message) as error:
        build(block, **given)
    assert "\n" not in str(error.value)


def test_a_constructors_own_error_is_left_as_it_is():
    with pytest.raises(ValueError, match="width 3 is not to my taste") as error:
        build({"target": "toybox.parts.fails", "params": {"width": 3}})
    assert not isinstance(error.value, UserError)


def test_build_under_the_meta_device_makes_no_weights():
    with torch.device("meta"):
        layer = build({"target": "torch.nn.Linear", "params": {"in_features": 2}}, out_features=3)
    assert layer.weight.is_meta


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.run",
        "torch.hub.load",
        "torch.load",
        "ldmx.thing.Name",
        "ldm.common.files.os.system",
        "ldm.common.files.Path",
        "ldm.common.build.locate",
        "ldm.common.config.load",
    ],
)
def test_a_config_from_a_checkpoint_names_only_what_is_trusted(target):
    with pytest.raises(UserError, match="--trust"):
        build({"target": target}, allowed=TRUSTED)
    hidden = {"target": "torch.nn.Sequential", "params": {"args": [{"deep": {"target": target}}]}}
    with pytest.raises(UserError, match="--trust"):
        build(hidden, allowed=TRUSTED)
    assert any("--trust" in line for line in check(hidden, allowed=TRUSTED))


def test_nothing_foreign_is_imported_and_blocks_passed_on_are_held_to_it_too(toybox):
    sys.modules.pop("toybox.broken", None)
    with pytest.raises(UserError, match="--trust"):
        locate("toybox.broken.Net", allowed=TRUSTED)
    block = {
        "target": "toybox.parts.Model",
        "params": {"encoder": encoder(channels=1), "network": {"target": "os.system", "params": {"command": "true"}}},
    }
    with pytest.raises(UserError, match="os.system"):
        build(block, allowed=("toybox",))
    assert not toybox.calls
    with pytest.raises(UserError, match="toybox.parts.borrowed"):
        locate("toybox.parts.borrowed", allowed=("toybox",))


def test_what_is_trusted_is_built():
    layer = build({"target": "torch.nn.Linear", "params": {"in_features": 1, "out_features": 1}}, allowed=TRUSTED)
    assert isinstance(layer, torch.nn.Linear)
