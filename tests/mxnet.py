"""A writer of MXNet's ``.params`` files, by the description of their format."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

MAGIC = {1: 0xF993FAC8, 2: 0xF993FAC9, 3: 0xF993FACA}


def packed_array(array: np.ndarray, version: int) -> bytes:
    """One float32 array as MXNet's version 0 (the oldest) to 3 writes it, on device (2, 1): a second GPU."""
    shape = array.shape
    if version == 0:
        head = struct.pack(f"<I{len(shape)}I", len(shape), *shape)
    else:
        head = struct.pack("<I", MAGIC[version]) + (struct.pack("<i", 0) if version > 1 else b"")
        head += struct.pack(f"<I{len(shape)}q", len(shape), *shape)
    return head + struct.pack("<iii", 2, 1, 0) + array.tobytes()


def write_params(path: Path, arrays: Mapping[str, np.ndarray], version: int = 0) -> None:
    """Write arrays by name in order."""
    data = struct.pack("<QQQ", 0x112, 0, len(arrays))
    data += b"".join(packed_array(array, version) for array in arrays.values())
    data += struct.pack("<Q", len(arrays))
    data += b"".join(struct.pack("<Q", len(name)) + name.encode() for name in arrays)
    path.write_bytes(data)
