"""The ``.npy`` dictionaries that other programs of the field exchange: tags, CAMs, scores.

Such a file is a pickle, which can run any code when it is read. This reader admits arrays, numbers, strings,
containers and CPU tensors, and refuses everything else.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A file may come from an old release, in which NumPy's parts are in numpy.core, or from a recent one.
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
    """The dictionary in a ``.npy`` file; a ValueError for any other content."""
    try:
        with Path(path).open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype != np.dtype(object) or shape != ():
                raise ValueError(f"it is an array of {dtype} of shape {shape}")
            content = _ArraysOnly(file).load()
            content = content.item() if isinstance(content, np.ndarray) else content
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}")
    except (pickle.UnpicklingError, ValueError, LookupError, EOFError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a .npy dictionary of arrays: {error}") from error
    return content
