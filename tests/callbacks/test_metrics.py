import json

from tiny_training import Tiny, fit

from ldm.callbacks.clock import Clock
from ldm.callbacks.metrics import Metrics


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
