import json
import resource

import pytest
from pytorch_lightning import Callback
from tiny_training import Tiny, fit

from ldm.callbacks.clock import Clock
from ldm.callbacks.metrics import Metrics, append


class Reader:
    def __init__(self) -> None:
        self.rows = []

    def log(self, row: dict) -> None:
        self.rows.append(row)


def rows(path):
    return [json.loads(line, parse_constant=lambda name: 1 / 0) for line in path.read_text().splitlines()]


def run(path, steps, **options):
    clock = Clock()
    reader = Reader()
    fit([clock, Metrics(path, 2, clock, [reader])], steps=steps, **options)
    return reader


def test_lines(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    reader = run(path, 6, module=Tiny(bad_step=3), val_check_interval=4)
    found = rows(path)
    assert [row["step"] for row in found] == [2, 4, 4, 6] and found == reader.rows
    train, nan, validation, _ = found
    assert train["images_seen"] == 8 and train["images_per_s"] > 0 and 0 <= train["data_wait"] <= 1
    assert train["train/loss"] > 0 and nan["train/loss"] is None
    assert "val/loss" in validation and "train/loss" not in validation and "val/loss" not in found[3]


def test_accumulated_batches_are_one_step(tmp_path):
    run(tmp_path / "metrics.jsonl", 4, accumulate_grad_batches=3)
    assert [(row["step"], row["images_seen"]) for row in rows(tmp_path / "metrics.jsonl")] == [(2, 24), (4, 48)]


def test_a_line_is_the_mean_of_the_batches_of_its_step(tmp_path):
    class Numbered(Tiny):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.log("train/number", float(index))
            if index % 3 == 0:
                self.log("train/first", float(index))
            return loss

    run(tmp_path / "metrics.jsonl", 4, module=Numbered(), accumulate_grad_batches=3)
    found = rows(tmp_path / "metrics.jsonl")
    assert [row["train/number"] for row in found] == [4, 10] and [row["train/first"] for row in found] == [3, 9]


def test_a_resumed_run_has_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": 1}\n{"step": 2}\n{"step": 0}\n{"st')  # it starts at step 0 again
    run(path, 4)
    assert [row["step"] for row in rows(path)] == [0, 0, 2, 4]


def test_lines_that_the_disk_refuses_are_written_later(tmp_path, caplog):
    path, elsewhere = tmp_path / "metrics.jsonl", tmp_path / "elsewhere"

    class Trouble(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.global_step == 2:
                path.rename(elsewhere)
                path.mkdir()
            if trainer.global_step == 7:
                path.rmdir()
                elsewhere.rename(path)

    clock = Clock()
    fit([clock, Trouble(), Metrics(path, 2, clock)], steps=10)
    assert [row["step"] for row in rows(path)] == [2, 4, 6, 8, 10]
    assert caplog.text.count("training goes on and tries again") == 1


def test_a_full_disk_takes_whole_lines_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, "one\n")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="too large"):
            append(path, "two hundred\n")
        assert path.read_text() == "one\n"
        append(path, "two\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert path.read_text() == "one\ntwo\n"
