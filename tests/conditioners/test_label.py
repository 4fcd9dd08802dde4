"""ClassLabel: rows of a table; which row says nothing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.common.files import UserError
from ldm.conditioners.label import ClassLabel

PARITY = Path(__file__).parents[1] / "data/parity/class_cond/embedding.safetensors"


def test_a_class_is_its_row():
    vector, tokens = ClassLabel(5, 8), ClassLabel(5, 8, to="tokens")
    assert (vector.width, vector.vector_width, tokens.width, tokens.vector_width) == (None, 8, 8, None)
    batch = {"class": torch.tensor([4, 0, 4])}
    assert torch.equal(vector(batch).vector, vector.embedding.weight[[4, 0, 4]])
    assert torch.equal(tokens(batch).tokens, tokens.embedding.weight[[4, 0, 4]][:, None])
    assert torch.equal(vector({"class": [4, 0]}).vector, vector.embedding.weight[[4, 0]])


@pytest.mark.parametrize("null_row", [True, False])
def test_the_last_row_is_no_class(null_row):
    conditioner = ClassLabel(5, 8, dropout=0.5, null_row=null_row)
    assert len(conditioner.embedding.weight) == (6 if null_row else 5)
    assert torch.equal(conditioner.null(2).vector, conditioner.embedding.weight[[-1, -1]])
    cond = conditioner.with_dropout({"class": torch.tensor([1, 2])}, {"drop": torch.tensor([0.4, 0.5])}.get)
    assert torch.equal(cond.vector, conditioner.embedding.weight[[-1, 2]])
    cond, null = conditioner.with_null({"class": torch.tensor([1, 2])})
    assert torch.equal(null.vector, conditioner.embedding.weight[[-1, -1]])


def test_the_table_of_ldm():
    io = load_file(PARITY)
    conditioner = ClassLabel(11, 32, to="tokens", null_row=False)
    conditioner.load_state_dict({"embedding.weight": io["embedding.weight"]})
    cond, null = conditioner.with_null({"class": io["in.classes"]})
    assert torch.equal(cond.tokens, io["out.c"]) and torch.equal(null.tokens, io["out.uc"])
    assert torch.equal(conditioner({"class": io["in.uncond_classes"]}).tokens, null.tokens)


def test_wrong_classes_are_told():
    conditioner = ClassLabel(5, 8)
    with pytest.raises(UserError, match="'class' holds whole numbers from 0 to 5, got -1, 6"):
        conditioner({"class": torch.tensor([-1, 3, 6])})
    with pytest.raises(UserError, match="whole numbers from 0 to 5, got 0.5"):
        conditioner({"class": torch.tensor([0.5])})
    with pytest.raises(UserError, match=r"'class' has to be \(B\), got \(2, 1\)"):
        conditioner({"class": torch.zeros(2, 1, dtype=torch.long)})
    with pytest.raises(UserError, match="no 'class'; it holds caption"):
        conditioner({"caption": ["a dog"]})
    with pytest.raises(UserError, match="dropout 1.5"):
        ClassLabel(5, 8, dropout=1.5)
    with pytest.raises(UserError, match="classes 0"):
        ClassLabel(0, 8)


def test_it_is_planned_without_contents():
    with torch.device("meta"):
        conditioner = ClassLabel(1000, 1024)
    assert conditioner.embedding.weight.is_meta
    assert conditioner.example(torch.zeros(1, 4, 8, 8)).vector.shape == (1, 1024)
