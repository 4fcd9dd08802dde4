"""Config files are merged by the rules that `load` states, and their mistakes are told with file, line or path."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ldm.common.build import TRUSTED
from ldm.common.config import Cache, Checkpoint, Logging, Sampling, Validation, check_config, load, section
from ldm.common.files import UserError

HERE = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def toybox(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def read(*paths, overrides=()):
    return OmegaConf.to_container(load(paths, overrides))


def config(**changes):
    """A config without mistakes."""
    whole = {
        "name": "toy",
        "model": {"target": "toybox.parts.Diffusing", "params": {"width": 4}},
        "data": {"train": {"target": "toybox.parts.anything", "params": {"width": 8}}},
        "autoencoder": {"target": "toybox.parts.Coder"},
        "loader": {"batch_size": 2},
        "trainer": {"max_steps": 10, "accelerator": "cpu", "precision": "bf16-mixed", "gradient_clip_val": 1},
    }
    return {**whole, **changes}


def test_files_merge_left_to_right_and_arguments_last(write):
    a = write("a.yaml", "name: a\nloader: {batch_size: 4, workers: 0}\nlist: [1, 2]\n")
    b = write("b.yaml", "loader: {workers: 2}\nlist: [3]\n")
    assert read(a, b) == {"name": "a", "loader": {"batch_size": 4, "workers": 2}, "list": [3]}
    assert read(a, b, overrides=["loader.workers=5", "loader.workers=6", "new.deep=x"]) == {
        "name": "a",
        "loader": {"batch_size": 4, "workers": 6},
        "list": [3],
        "new": {"deep": "x"},
    }
    assert read() == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("1.5e-3", 1.5e-3),
        ("3", 3),
        ("3.0", 3.0),
        ("true", True),
        ("null", None),
        ("", None),
        ("[1, b, 2e-1]", [1, "b", 0.2]),
        ("{a: 1}", {"a": 1}),
        ("a red square", "a red square"),
        ("x=y", "x=y"),
        ("'1e-4'", "1e-4"),
    ],
)
def test_arguments_are_read_as_yaml(text, value):
    found = read(overrides=[f"a.b={text}"])["a"]["b"]
    assert found == value and type(found) is type(value)


def test_numbers_in_files_read_as_numbers(write):
    assert read(write("a.yaml", "lr: 1e-4\nseed: 23\nbig: 2e6\n")) == {"lr": 1e-4, "seed": 23, "big": 2e6}


def test_a_block_whose_target_changes_starts_anew(write):
    a = write("a.yaml", "data: {train: {target: x.Shapes, params: {count: 9, size: 8}}}\n")
    assert read(a, overrides=["data.train.params.size=16"])["data"]["train"] == {
        "target": "x.Shapes",
        "params": {"count": 9, "size": 16},
    }
    same = write("same.yaml", "data: {train: {target: x.Shapes, params: {size: 4}}}\n")
    assert read(a, same)["data"]["train"]["params"] == {"count": 9, "size": 4}
    other = write("other.yaml", "data: {train: {target: x.Folder, params: {root: /pics}}}\n")
    assert read(a, other)["data"]["train"] == {"target": "x.Folder", "params": {"root": "/pics"}}
    by_hand = ["data.train.target=x.Folder", "data.train.params.root=/pics"]
    assert read(a, overrides=by_hand) == read(a, other)


def test_another_source_of_the_autoencoder_takes_the_place_of_the_first(write):
    a = write("a.yaml", "autoencoder: {config: stage1.yaml}\n")
    assert read(a, overrides=["autoencoder.ckpt=x.ckpt"]) == {"autoencoder": {"ckpt": "x.ckpt"}}
    assert read(a, overrides=["autoencoder.target=x.Y", "autoencoder.params.z=1"]) == {
        "autoencoder": {"target": "x.Y", "params": {"z": 1}}
    }


def test_autoencoder_config_counts_from_the_file_that_names_it(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("configs/deep/a.yaml", "autoencoder: {config: ../stage1.yaml}\n")
    write("elsewhere/b.yaml", "name: b\n")
    found = read("configs/deep/a.yaml", "elsewhere/b.yaml")["autoencoder"]["config"]
    assert found == str(tmp_path.resolve() / "configs/stage1.yaml")
    absolute = write("c.yaml", "autoencoder: {config: /somewhere/s.yaml}\n")
    assert read(absolute)["autoencoder"]["config"] == "/somewhere/s.yaml"


def test_interpolations_are_resolved_across_files_and_arguments(write):
    a = write("a.yaml", "size: 8\nmodel: {target: x.Y, params: {size: '${size}'}}\n")
    assert read(a, overrides=["size=16"])["model"]["params"]["size"] == 16


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("twice.yaml", "seed: 1\nname: b\nseed: 2\n", r"twice.yaml, line 3: not valid YAML: found duplicate key seed"),
        ("deep.yaml", "a:\n  b: 1\n  b: 2\n", r"deep.yaml, line 3: not valid YAML: found duplicate key b"),
        ("open.yaml", "a: [1\nb: 2\n", r"open.yaml, line 2: not valid YAML"),
        ("tab.yaml", "a:\n\tb: 1\n", r"tab.yaml, line 2: not valid YAML"),
        ("list.yaml", "- 1\n- 2\n", r"list.yaml: expected names with values at the top, got a list"),
        ("inter.yaml", "a: {b: '${size}'}\n", r"^a.b: Interpolation key 'size' not found"),
        ("env.yaml", "a: {b: '${oc.env:NOT_SET_ANYWHERE}'}\n", r"^a.b: .*NOT_SET_ANYWHERE"),
        ("half.yaml", "a: '${size'\n", r"half.yaml: cannot be read as a config: "),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(write, name, text, message):
    with pytest.raises(UserError, match=message) as error:
        load([write(name, text)])
    assert "\n" not in str(error.value)


def test_binary_rubbish_is_told_in_one_line(tmp_path):
    path = tmp_path / "picture.yaml"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff\xfe")
    with pytest.raises(UserError, match="picture.yaml") as error:
        load([path])
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named_with_the_nearest(write, tmp_path):
    write("ldm_txt2img.yaml", "")
    write("other.yml", "")
    write("notes.txt", "")
    with pytest.raises(UserError, match=r"ldm_text2img.yaml: no such config file; nearest: .*/ldm_txt2img.yaml$"):
        load([tmp_path / "ldm_text2img.yaml"])
    with pytest.raises(UserError, match=r"holds ldm_txt2img.yaml, other.yml$"):
        load([tmp_path / "q.yaml"])
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        load([tmp_path / "nowhere" / "a.yaml"])
    with pytest.raises(UserError, match="no such config file"):
        load([tmp_path])


@pytest.mark.parametrize("argument", ["trainer.max_steps", "=3", "trainer.=3", ".max_steps=3", "a=[1", "a={b: 1"])
def test_a_malformed_argument_is_named(argument):
    with pytest.raises(UserError) as error:
        load([], [argument])
    assert repr(argument) in str(error.value) and "\n" not in str(error.value)


def test_a_whole_config_without_mistakes():
    whole = config(
        seed=3,
        cache={"latents": True, "dir": None},
        sampling={"sampler": "ddim", "steps": 4, "guidance": 2, "prompts": ["a", "b"], "times": "linear", "count": 4},
        validation={"every": 5, "batches": 1},
        logging={"wandb": {"project": "x"}, "images_every": 0},
        checkpoint={"keep": 2},
    )
    assert check_config(whole) == []
    assert check_config(OmegaConf.create(whole)) == []
    assert check_config(config(logging=None, validation=None)) == []
    options = {"sampler": {"name": "ddim", "eta": 0.5}, "times": [1, 0.5, 0], "guidance": {"scale": 3, "high": 0.8, "low": None}}
    assert check_config(config(sampling=options)) == []
    assert check_config(config(sampling={"times": {"name": "karras", "rho": 5}})) == []


WRONG = {
    "no such section": (config(trainr={}), ["trainr: Config has no such option; nearest: 'trainer'; it takes name, "]),
    "a misspelt option of Lightning": (
        config(trainer={"max_step": 3}),
        ["trainer.max_step: Trainer has no such option; nearest: 'max_steps'"],
    ),
    "a mistyped option of Lightning": (
        config(trainer={"max_steps": 1e6, "precision": "bf-16"}),
        [
            "trainer.max_steps: expected int, got 1000000.0; write 1000000",
            "trainer.precision: expected one of 64, 32, 16, ",
        ],
    ),
    "what main supplies": (
        config(trainer={"callbacks": []}),
        ["trainer.callbacks: the program supplies this to Trainer"],
    ),
    "no batch size": (config(loader=None), ["loader.batch_size: missing; make_loader needs it (int)"]),
    "loader": (
        config(loader={"batch_size": 2, "seed": 3, "num_workers": 2}),
        [
            "loader.seed: the program supplies this to make_loader; remove it",
            "loader.num_workers: make_loader has no such option; nearest: 'workers'; it takes batch_size, workers",
        ],
    ),
    "a section that is a number": (config(cache=3), ["cache: expected names with values or null, got 3"]),
    "sampling": (
        config(sampling={"steps": 0, "count": 0}),
        ["sampling.steps: expected 1 or more, got 0", "sampling.count: expected 1 or more, got 0"],
    ),
    "sampler": (
        config(sampling={"sampler": "dpmp_2m", "times": "uniformly"}),
        ["sampling.sampler: expected one of ", "sampling.times: expected one of "],
    ),
    "options of a sampler and of times": (
        config(sampling={"sampler": {"name": "ddim", "etta": 1}, "times": {"name": "karras", "rho": "7"}}),
        ["sampling.sampler: ddim has no option 'etta'; nearest: 'eta'", "sampling.times: karras.rho: expected float, got text"],
    ),
    "parts of guidance": (
        config(sampling={"guidance": {"scale": "3", "hihg": 0.8}}),
        [
            "sampling.guidance.scale: expected float, got text '3'; write the number without quotes",
            "sampling.guidance.hihg: no such option; nearest: 'high'; it takes scale, low, high, rescale",
        ],
    ),
    "one prompt is no list": (
        config(sampling={"prompts": "a red square"}),
        ["sampling.prompts: expected list[str] or null, got text 'a red square'"],
    ),
    "never": (config(checkpoint={"every": 0}), ["checkpoint.every: expected 1 or more, got 0"]),
    "no data": (
        config(data={"validation": {"target": "toybox.parts.anything", "params": {"width": 1}}}),
        ["data.train: missing; Data needs it (block)"],
    ),
    "wrong data": (
        config(data={"train": {"target": "toybox.parts.anything"}, "valid": {"target": "toybox.parts.anything"}}),
        [
            "data.train.params.width: missing; anything needs it (int)",
            "data.valid.params.width: missing; anything needs it (int)",
            "data.valid: Data has no such option; nearest: 'validation'; it takes train, validation",
        ],
    ),
    "two autoencoders": (
        config(autoencoder={"config": HERE + "/test_config.py", "ckpt": HERE}),
        ["autoencoder: expected exactly one of config, ckpt, target, got config, ckpt"],
    ),
    "no autoencoder": (
        config(autoencoder=None),
        ["autoencoder: missing; a diffusion model needs one of config, ckpt, target"],
    ),
    "misspelt autoencoder": (
        config(autoencoder={"checkpoint": "x"}),
        [
            "autoencoder.checkpoint: no such option; it takes one of config, ckpt, target (with params)",
            "autoencoder: expected exactly one of config, ckpt, target, got none",
        ],
    ),
    "absent files": (config(autoencoder={"ckpt": "gone.ckpt"}), ["autoencoder.ckpt: no such file gone.ckpt"]),
    "no path": (config(autoencoder={"ckpt": 3}), ["autoencoder.ckpt: expected path, got 3"]),
    "stage 1 with stage 2's sections": (
        config(model={"target": "toybox.parts.Autoencoding"}, cache={"text": True}),
        [
            "autoencoder: belongs to diffusion models, this config trains an autoencoder",
            "cache: belongs to diffusion models, this config trains an autoencoder",
        ],
    ),
    "still to be filled in": (config(name="???"), ["name: must be filled in (str)"]),
    "empty": (
        {},
        [
            "name: missing; Config needs it (str)",
            "model: missing; Config needs it (block)",
            "data: missing; Config needs it (names with values)",
            "data.train: missing; Data needs it (block)",
            "loader.batch_size: missing; make_loader needs it (int)",
        ],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_in_sections(case):
    whole, starts = WRONG[case]
    for form in (whole, OmegaConf.create(whole)):
        found = check_config(form)
        assert len(found) == len(starts), found
        assert all(any(line.startswith(start) for line in found) for start in starts), found


def test_all_sections_report_together():
    whole = config(
        seed="x",
        model={"target": "toybox.parts.Diffusing", "params": {"with": 3}},
        sampling={"stpes": 3},
        trainer={"max_epoch": 1},
    )
    paths = [line.split(":")[0] for line in check_config(whole)]
    assert sorted(paths) == ["model.params.with", "sampling.stpes", "seed", "trainer.max_epoch"]


def test_a_config_from_a_checkpoint_is_held_to_what_is_trusted():
    (first, *_) = found = check_config(config(), allowed=TRUSTED)
    assert first.startswith("model.target: this config came with a checkpoint and may not name toybox.")
    assert {line.split(":")[0] for line in found} == {"model.target", "data.train.target", "autoencoder.target"}


def test_sections_read_as_objects_with_defaults():
    cfg = OmegaConf.create(
        {"sampling": {"steps": 3, "prompts": ["a"]}, "logging": {"wandb": {"project": "x"}}, "cache": None}
    )
    assert section(cfg, Sampling) == Sampling(steps=3, prompts=["a"])
    assert type(section(cfg, Sampling).prompts) is list
    assert section(cfg, Logging) == Logging(wandb={"project": "x"})
    assert (section(cfg, Cache), section(cfg, Validation), section({}, Checkpoint)) == (
        Cache(),
        Validation(),
        Checkpoint(),
    )
    assert check_config(config(sampling=vars(Sampling()), validation=vars(Validation()), cache=vars(Cache()))) == []
