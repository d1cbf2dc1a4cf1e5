"""The ``.npy`` dictionaries that other programs of the field exchange: tags, CAMs, scores.

Such a file is a pickle, which can run any code when it is read. This reader admits arrays, numbers, strings,
containers and CPU tensors, and refuses everything else.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

# What the pickle of an array, a NumPy scalar or a CPU tensor names. NumPy's own parts lie in numpy.core in
# old releases and in numpy._core in recent ones; a file may come from either.
_CORE = "numpy._core" if hasattr(np, "_core") else "numpy.core"
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    (f"{_CORE}.multiarray", "_reconstruct"),
    (f"{_CORE}.multiarray", "scalar"),
    (f"{_CORE}.numeric", "_frombuffer"),
    ("torch._utils", "_rebuild_tensor_v2"),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda content: torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        module = re.sub(r"^numpy\._?core\b", _CORE, module)
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which is not an array")


def read_npy_dictionary(path: str | Path) -> dict[Any, Any]:
    """The dictionary in a ``.npy`` file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, holds no dictionary, or holds objects other than arrays, numbers,
            strings, containers and tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"file {path} does not exist")
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            shape, _, dtype = read_header[version[0]](file)
            if dtype != np.dtype(object) or shape != ():
                raise ValueError(f"it is an array of {dtype} of shape {shape}")
            content = _ArraysOnly(file).load()
    except (pickle.UnpicklingError, ValueError, KeyError, EOFError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a .npy dictionary of arrays: {error}") from error
    content = content.item() if isinstance(content, np.ndarray) and content.shape == () else content
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a .npy dictionary of arrays: it holds a {type(content).__name__}")
    return content
