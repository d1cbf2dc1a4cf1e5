"""Dictionaries in .npy files, as other programs write them."""

import pickle

import numpy as np
import pytest

from utils.npy_dictionary import read_npy_dictionary


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_numbers_and_strings_come_back(tmp_path, protocol):
    stored = {"a": np.float32([[0, 1.5]]), np.int32(2007000032): np.float32(0.5), "name": ["a", ("b", 1.5)]}
    with open(tmp_path / "x.npy", "wb") as out:
        array = np.array(stored, dtype=object)
        np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(array))
        pickle.dump(array, out, protocol=protocol)
    read = read_npy_dictionary(tmp_path / "x.npy")
    assert set(read) == set(stored) and read["name"] == stored["name"]
    np.testing.assert_array_equal(read["a"], stored["a"])
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
