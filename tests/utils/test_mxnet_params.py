"""Weight files of MXNet."""

import numpy as np
import pytest
import torch

from tests.mxnet import write_params
from utils.mxnet_params import load_mxnet_params


@pytest.mark.parametrize("version", range(4))
def test_arrays_of_every_version_are_read(tmp_path, version):
    numbers = np.random.default_rng(0).random((2, 3, 1, 4)).astype(np.float32)
    arrays = {"arg:maps": numbers, "aux:vector": np.arange(5, dtype=np.float32)}
    write_params(tmp_path / "net.params", arrays, version)
    loaded = load_mxnet_params(tmp_path / "net.params")
    assert list(loaded) == list(arrays)
    assert all(torch.equal(loaded[name], torch.from_numpy(array)) for name, array in arrays.items())


def test_damaged_files_are_errors_that_name_the_file(tmp_path):
    path = tmp_path / "net.params"
    write_params(path, {"arg:a": np.ones((3, 4), np.float32), "arg:b": np.ones(2, np.float32)}, version=2)
    whole = path.read_bytes()
    flipped = [b"\0" + whole[1:], *(whole[:k] + b"\x7f" + whole[k + 1 :] for k in (28, 32, 36, 60))]
    for content in (*(whole[:end] for end in range(0, len(whole), 7)), *flipped):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"net\.params is damaged"):
            load_mxnet_params(path)
