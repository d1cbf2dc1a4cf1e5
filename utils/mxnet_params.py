"""Weight files of MXNet (``.params``) read without MXNet.

The format is a list of arrays and a list of their names, all little-endian:

    uint64 0x112, uint64 0
    uint64 number of arrays, then each array
    uint64 number of names, then each name as uint64 length and bytes

An array begins with its number of dimensions and uint32 sizes; in later versions with a magic number, (from
the second on) int32 storage type 0 for dense, int32 number of dimensions, and int64 sizes. Then come int32
device type and number, int32 type flag, values.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_LIST_MAGIC = 0x112
_VERSION_1, _VERSION_2, _VERSION_3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_TYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "u1", 4: "<i4", 5: "i1", 6: "<i8"}
_MAX_DIMS = 32


class _Reader:
    """A file's bytes and a position in them."""

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.position = 0

    def take(self, length: int) -> memoryview:
        if length > len(self.data) - self.position:
            raise ValueError("it ends in the middle of an entry")
        self.position += length
        return self.data[self.position - length : self.position]

    def numbers(self, code: str, count: int = 1) -> tuple[int, ...]:
        """``count`` integers of the ``struct`` type ``code``."""
        form = f"<{count}{code}"
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def number(self, code: str) -> int:
        return self.numbers(code)[0]


def load_mxnet_params(path: str | Path) -> dict[str, Tensor]:
    """Arrays of a ``.params`` file by their names, which begin with ``arg:`` or ``aux:``."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"MXNet file {path} does not exist")
    reader = _Reader(path.read_bytes())
    try:
        if reader.number("Q") != _LIST_MAGIC:
            raise ValueError("it does not begin with MXNet's magic number")
        reader.number("Q")
        arrays = [_array(reader) for _ in range(reader.number("Q"))]
        names = [str(reader.take(reader.number("Q")), "utf-8") for _ in range(reader.number("Q"))]
        if len(names) != len(arrays):
            raise ValueError(f"it holds {len(arrays)} arrays and {len(names)} names")
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not a .params file of MXNet: {error}") from error
    return dict(zip(names, arrays))


def _array(reader: _Reader) -> Tensor:
    """The array at the reader's position."""
    version = reader.number("I")
    if version in (_VERSION_2, _VERSION_3) and reader.number("i") != 0:
        raise ValueError("it holds a sparse array")
    if version in (_VERSION_1, _VERSION_2, _VERSION_3):
        dims, size_type = reader.number("i"), "q"
    else:
        dims, size_type = version, "I"
    if not 0 <= dims <= _MAX_DIMS:
        raise ValueError(f"an array has {dims} dimensions")
    shape = reader.numbers(size_type, dims)
    if min(shape, default=1) < 0:
        raise ValueError(f"an array has the shape {shape}")
    # Without dimensions there is nothing behind the shape; only the third version has scalars.
    if not dims and version != _VERSION_3:
        return torch.empty(0)
    reader.numbers("i", 2)
    type_flag = reader.number("i")
    if type_flag not in _TYPES:
        raise ValueError(f"an array has the unknown type {type_flag}")
    values = np.dtype(_TYPES[type_flag])
    array = np.frombuffer(reader.take(math.prod(shape) * values.itemsize), values).reshape(shape)
    return torch.from_numpy(array.astype(values.newbyteorder("=")))
