"""Dictionaries in .npy files, as other programs write them."""

import numpy as np
import pytest
import torch

from utils.npy_dictionary import read_npy_dictionary


def test_arrays_numbers_strings_and_tensors_come_back(tmp_path):
    stored = {
        "keys": torch.tensor([1, 5]),
        "cam": torch.rand(2, 3, 4),
        "high_res": np.random.default_rng(0).random((2, 3, 4), dtype=np.float32),
        np.int32(2007000032): np.float32(0.5),
        "name": ["a", ("b", 1.5)],
    }
    np.save(tmp_path / "x.npy", stored)
    read = read_npy_dictionary(tmp_path / "x.npy")
    assert set(read) == set(stored) and read["name"] == stored["name"]
    assert torch.equal(read["keys"], stored["keys"]) and torch.equal(read["cam"], stored["cam"])
    np.testing.assert_array_equal(read["high_res"], stored["high_res"])
    assert read[2007000032] == np.float32(0.5)


@pytest.mark.parametrize(
    "content", [np.zeros(3), np.array(["a"], dtype=object), np.array([1], dtype=object)[0]]
)
def test_other_contents_are_refused(tmp_path, content):
    np.save(tmp_path / "x.npy", content)
    with pytest.raises(ValueError, match="not a .npy dictionary"):
        read_npy_dictionary(tmp_path / "x.npy")
    (tmp_path / "x.npy").write_bytes(b"not an array")
    with pytest.raises(ValueError, match=r"x\.npy"):
        read_npy_dictionary(tmp_path / "x.npy")
