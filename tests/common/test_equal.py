import torch

from ldm.common.equal import difference, differences, leaves


def test_leaves_have_paths():
    assert dict(leaves({"a": [1, {"b": 2}], "c": {}, 3: "d"})) == {"a.0": 1, "a.1.b": 2, "c": {}, "3": "d"}


def test_what_differs_is_named_and_measured():
    one = {"w": torch.tensor([1.0, 2.0, 3.0]), "n": [1, 2], "only": 1, "same": torch.ones(2)}
    other = {"w": torch.tensor([1.0, 2.5, 3.0]), "n": [1, 3], "new": None, "same": torch.ones(2)}
    assert differences(one, one) == {} and differences(one, other) == {
        "w": "1 of 3 values differ, by 0.5 at most", "n.1": "2 and 3", "only": "only in the first", "new": "only in the second"}  # fmt: skip


def test_bits_count():
    zero, nan = torch.zeros(1), torch.tensor([float("nan")])
    assert difference(zero, -zero) == "equal in value, not in bits" and difference(nan, nan.clone()) is None
    assert difference(zero, zero.double()) == "float32 (1,) and float64 (1,)" and difference(float("nan"), float("nan")) is None
    assert difference(1, 1.0) == "1 and 1.0" and difference(torch.ones(4, 4).T, torch.ones(4, 4)) is None
    assert difference(nan, zero) == "1 of 1 values differ, by inf at most"
