"""Weight files of MXNet."""

import struct

import numpy as np
import pytest
import torch

from tests.mxnet import FLAGS, write_params
from utils.mxnet_params import load_mxnet_params


@pytest.mark.parametrize("version", range(4))
def test_arrays_of_every_version_and_type_are_read(tmp_path, version):
    numbers = np.random.default_rng(0)
    arrays = {f"arg:{name}": (100 * numbers.random((2, 3, 1, 4))).astype(name) for name in FLAGS}
    arrays["aux:vector"] = np.arange(5, dtype=np.float32)
    if version == 3:
        arrays["arg:scalar"] = np.array(2.5, np.float32)
    write_params(tmp_path / "net.params", arrays, version)
    loaded = load_mxnet_params(tmp_path / "net.params")
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert torch.equal(loaded[name], torch.from_numpy(array))


def test_damaged_files_are_errors_that_name_the_file(tmp_path):
    path = tmp_path / "net.params"
    with pytest.raises(FileNotFoundError, match=r"MXNet file .*net\.params"):
        load_mxnet_params(path)
    write_params(path, {"arg:a": np.ones((3, 4), np.float32), "arg:b": np.ones(2, np.float32)}, version=2)
    whole = path.read_bytes()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"net\.params is damaged .*ends in the middle"):
            load_mxnet_params(path)
    for place, value, reason in ((0, 0x113, "magic"), (28, 1, "sparse"), (32, 99, "99 dimensions"),
                                 (36, -1, "shape"), (60, 77, "unknown type 77")):  # fmt: skip
        form = "<Q" if place == 0 else "<q" if place == 36 else "<i"
        broken = bytearray(whole)
        struct.pack_into(form, broken, place, value)
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"net\.params is damaged .*{reason}"):
            load_mxnet_params(path)
