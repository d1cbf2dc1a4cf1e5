"""Weight files of MXNet (``.params``) read without MXNet: a list of arrays, then one of their names.

Little-endian: uint64 0x112 and 0; uint64 number of arrays, each array; uint64 number of names, each as uint64
length and bytes. An array of the first version begins with uint32 number of dimensions and sizes. Later ones
begin with a magic number, (from the second on) int32 storage type 0 for dense, int32 number of dimensions and
int64 sizes. Then come int32 device type and number, int32 type (0: float32), values.
"""

import io
import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_LIST, _VERSIONS = 0x112, (0xF993FAC8, 0xF993FAC9, 0xF993FACA)


def load_mxnet_params(path: str | Path) -> dict[str, Tensor]:
    """Float arrays of a ``.params`` file by their names, which begin with ``arg:`` or ``aux:``.

    Raises:
        ValueError: the file is damaged, or holds sparse arrays or other numbers.
    """
    file = io.BytesIO(Path(path).read_bytes())
    try:
        magic, _, count = _numbers(file, "3Q")
        if magic != _LIST:
            raise ValueError("it does not begin with MXNet's magic number")
        arrays = [_array(file) for _ in range(count)]
        names = [_take(file, *_numbers(file, "Q")).decode() for _ in range(*_numbers(file, "Q"))]
        return dict(zip(names, arrays, strict=True))
    except (ValueError, struct.error) as error:
        raise ValueError(f"{path} is damaged or not a .params file of MXNet: {error}") from error


def _array(file: io.BytesIO) -> Tensor:
    """The array at the file's position."""
    (dims,), size = _numbers(file, "I"), "I"
    if dims in _VERSIONS:
        if dims != _VERSIONS[0] and _numbers(file, "i") != (0,):
            raise ValueError("it holds a sparse array")
        (dims,), size = _numbers(file, "I"), "q"
    shape = _numbers(file, f"{dims}{size}")
    *_, kind = _numbers(file, "3i")
    if kind != 0:
        raise ValueError(f"an array has the type {kind}, not float32")
    values = np.frombuffer(_take(file, 4 * math.prod(shape)), "<f4")
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def _numbers(file: io.BytesIO, form: str) -> tuple[int, ...]:
    return struct.unpack(f"<{form}", _take(file, struct.calcsize(f"<{form}")))


def _take(file: io.BytesIO, length: int) -> bytes:
    content = file.read(length)
    if len(content) != length:
        raise ValueError("it ends in the middle of an entry")
    return content
