import json
import sys
from pathlib import Path

from ldm.app.launch import start


def test_weights_samples_and_signals(tmp_path, monkeypatch):
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here.parents[1]}:{here}")
    assert start(2, [sys.executable, str(here / "two_ranks.py"), str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["images_seen"]) for row in rows] == [(step, 4 * step) for step in range(2, 2 * len(rows) + 1, 2)]
    assert len(rows) > 1 and {"last.ckpt", "step-000004.ckpt"} <= {path.name for path in (tmp_path / "checkpoints").iterdir()}
