import pytest
from tiny_training import fit

from ldm.callbacks import progress
from ldm.callbacks.progress import Progress, duration


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (89, "89 s"), (200, "3 min 20 s"), (1500, "25 min"),
                                           (7500, "2 h 05 min"), (273600, "3 d 4 h")])  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_lines_where_there_is_no_terminal(monkeypatch):
    for name in ("REFRESH", "LINE", "FIRST"):
        monkeypatch.setattr(progress, name, 0.0)
    lines = []
    fit([Progress("stage 1", 5, lines.append, terminal=False)], steps=5)
    assert lines[0].startswith("stage 1: about ") and "images/s" in lines[0]
    assert "step 3/5, loss " in lines[1] and lines[1].endswith("left")
    assert lines[-1].endswith("0 s left") and "step 5/5" in lines[-1]


def test_a_bar_in_a_terminal(capfd):
    lines = []
    fit([Progress("stage 1", 3, lines.append, terminal=True)], steps=3)
    assert "stage 1:" in capfd.readouterr().err and not lines
