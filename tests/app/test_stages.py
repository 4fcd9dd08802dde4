import pytest
import yaml

from ldm.app import stages
from ldm.app.stages import Stage, learning_rate, read, scale_lr


def opened(configs, *overrides, **options) -> list[Stage]:
    planned, mistakes = read([configs / "ldm.yaml"], overrides, **options)
    assert mistakes == []
    for stage in planned:
        assert stage.open() == []
    return planned


def test_two_stages_from_one_config(configs):
    first, second = opened(configs)
    assert (first.kind, first.name, second.kind, second.name) == ("autoencoder", "tiny_ae", "diffusion", "tiny_ldm")
    assert second.before is first and second.label == "stage 2 of 2, diffusion"
    assert first.picture == (3, 64, 64) and len(second.train) == 24 and len(second.validation) == 6


def test_what_stage_2_says_for_both(configs):
    first, second = opened(configs, "trainer.devices=2", "logging.wandb=true", "trainer.max_steps=9", seed=5, name="mine")
    assert first.trainer == {"max_steps": 4, "accelerator": "cpu", "devices": 2}
    assert second.trainer["max_steps"] == 9 and first.config["logging"]["wandb"] is True
    assert (first.seed, second.seed, first.name, second.name) == (5, 5, "tiny_ae", "mine")


def test_arguments_for_stage_1(configs):
    first, second = opened(configs, "stage1.trainer.max_steps=2", "trainer.max_steps=3")
    assert (first.trainer["max_steps"], second.trainer["max_steps"]) == (2, 3)
    _, mistakes = read([configs / "ae.yaml"], ["stage1.seed=3"])
    assert len(mistakes) == 1 and mistakes[0].startswith("stage1.seed=3: there is no other stage")


def test_mistakes_of_both_configs_at_once(configs):
    _, mistakes = read([configs / "ldm.yaml"], ["trainer.max_stepz=3", "model.params.ema=1", "stage1.loader.batch_size=x",
                                                "trainer.max_epochs=2", "name=a/b", "stage1.trainer.gradient_clip_val=1.0"])
    text = "\n".join(mistakes)
    assert len(mistakes) == 6
    for part in ("'max_steps'", "model.params.ema:", "ae.yaml: loader.batch_size: expected int", "instead: trainer.max_steps",
                 "name: expected a name for a folder", "instead: model.params.gradient_clip"):
        assert part in text


@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_training_has_an_end(configs, value):
    _, mistakes = read([configs / "ae.yaml"], [f"trainer.max_steps={value}"])
    assert any(mistake.startswith("trainer.max_steps: missing; expected the number") for mistake in mistakes)
    assert read([configs / "ae.yaml"], ["trainer.max_steps=-1", "trainer.max_time=00:01:00:00"])[1] == []


def test_a_missing_autoencoder_names_the_way_out(configs):
    _, mistakes = read([configs / "ldm.yaml"], ["autoencoder={ckpt: nowhere.ckpt}"])
    assert len(mistakes) == 1
    assert "nowhere.ckpt" in mistakes[0] and "python main.py --base configs/autoencoder_kl.yaml -t" in mistakes[0]


def test_a_diffusion_config_is_no_first_stage(configs):
    _, mistakes = read([configs / "ldm.yaml"], [f"autoencoder.config={configs / 'ldm.yaml'}"])
    assert any("expected the config of an autoencoder's training" in mistake for mistake in mistakes)


def test_data_that_is_not_there(configs):
    missing = "data.train={target: ldm.data.folder.ImageFolder, params: {root: /no, size: 64}}"
    (stage,), _ = read([configs / "ae.yaml"], [missing])
    (mistake,) = stage.open()
    assert mistake.startswith("data.train: ") and "/no" in mistake


def test_the_key_is_of_what_the_weights_depend_on(configs):
    key = opened(configs)[1].key
    same = ["trainer.accelerator=auto", "loader.workers=2", "logging.every=7", "checkpoint.keep=1", "sampling.steps=9",
            "validation.every=5", "cache.latents=false"]  # fmt: skip
    other = ["trainer.max_steps=7", "loader.batch_size=2", "data.train.params.count=25", "model.params.ema_decay=0.5",
             "trainer.precision=bf16-mixed", "stage1.trainer.max_steps=5", "stage1.data.train.params.seed=1"]  # fmt: skip
    assert {opened(configs, override)[1].key for override in same} == {key}
    others = [opened(configs, override)[1].key for override in other] + [opened(configs, seed=1)[1].key]
    assert len({key, *others}) == len(others) + 1


def test_stage_1_has_the_same_key_alone_and_before_stage_2(configs):
    (alone,), _ = read([configs / "ae.yaml"])
    assert alone.open() == [] and alone.key == opened(configs)[0].key


def test_learning_rates_are_scaled_only_when_asked(configs):
    stage = opened(configs)[0]
    optimizer = stage.config["model"]["params"]["optimizer"]
    optimizer["params"] |= {"weight_decay": 0.1, "adam_lr": 2e-3}
    scale_lr(stage, world=2)
    params = stage.config["model"]["params"]["optimizer"]["params"]
    assert params == {"lr": 8e-3, "weight_decay": 0.1, "adam_lr": 16e-3} and stage.scaled == 8
    assert learning_rate(stage.config) == 8e-3 and optimizer["params"]["lr"] == 1e-3


def test_paths_of_stage_1_count_from_the_file_that_names_it(configs, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert len(opened(configs)) == 2
    config = yaml.safe_load((configs / "ldm.yaml").read_text())
    config["autoencoder"] = {"config": "gone.yaml"}
    (configs / "ldm.yaml").write_text(yaml.safe_dump(config))
    planned, mistakes = read([configs / "ldm.yaml"])
    assert len(planned) == 1 and "gone.yaml" in mistakes[0]


def test_what_a_users_data_set_needs(configs, monkeypatch):
    class Bare:
        def __len__(self):
            return 3

    monkeypatch.setattr(stages, "build", lambda block: Bare())
    (stage,), _ = read([configs / "ae.yaml"])
    assert "Bare lacks caption, identity, fingerprint, report" in stage.open()[0]
