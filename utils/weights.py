"""Checkpoint files: written atomically, read without running code from them."""

import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from utils.files import atomic_file
from utils.mxnet_params import load_mxnet_params

FORMAT = "tag2mask/1"
ABOUT = "tag2mask"  # in the metadata of a .safetensors file: all but the weights of a checkpoint, as JSON


def file_digest(path: Path) -> str:
    """16 hex digits that name the content of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()[:16]


def save_checkpoint(path: Path, state: Mapping[str, Any], keep: Path | None = None) -> None:
    """Write ``state`` so that the file at ``path`` is complete at every moment, whenever the process dies.

    A ``.safetensors`` file holds the weights ``model`` and, in its metadata, the plain values.

    Args:
        keep: the new name of the file that was there. For a moment there is nothing at ``path``.
    """
    for stale in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed while it wrote
        stale.unlink(missing_ok=True)
    try:
        with atomic_file(path) as file:
            if path.suffix == ".safetensors":
                file.write(_as_safetensors({"format": FORMAT, **state}))
            else:
                torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
    except (OSError, RuntimeError) as error:  # a full disk
        raise OSError(f"cannot write {path} ({error}); what was there before is kept") from error


def _as_safetensors(state: Mapping[str, Any]) -> bytes:
    about = json.dumps({key: value for key, value in state.items() if key != "model"})
    # Copies, because the format refuses tensors that share memory.
    tensors = {key: value.clone().contiguous() for key, value in state["model"].items()}
    return safetensors_torch.save(tensors, {ABOUT: about})


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a ``.pth``, ``.safetensors`` or MXNet's ``.params`` file to the CPU; nothing in it is executed.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(map(str, (path if path.is_dir() else path.parent).glob("*.pth")))
        raise FileNotFoundError(f"checkpoint {path} does not exist; found there: {', '.join(near) or 'none'}")
    if path.suffix in (".onnx", ".pt2"):
        raise ValueError(f"{path} is an exported graph (docs/use.md): give a .pth or .safetensors file")
    if path.suffix == ".params":
        return dict(load_mxnet_params(path))
    damaged = f"{path} is damaged or not a checkpoint"
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                about = (file.metadata() or {}).get(ABOUT)
            weights = safetensors_torch.load_file(path)
            return weights if about is None else {**json.loads(about), "model": weights}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not (found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error))):
            raise ValueError(damaged) from error
        raise ValueError(f"{path} holds more than tensors ({found[1]}): save its state dict alone") from error
    except (SafetensorError, RuntimeError, EOFError, BadZipFile, LookupError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{damaged}: {reason}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} contains a {type(state).__name__}, not a mapping of names to weights")
    return state


def unfit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str | None:
    """Why ``weights`` cannot fill the state dict ``own`` (another shape, or missing); None if they can."""
    if wrong := [key for key in own if key in weights and weights[key].shape != own[key].shape]:
        found, expected = (tuple(state[wrong[0]].shape) for state in (weights, own))
        return f"{len(wrong)} weights have another shape, first '{wrong[0]}': {found}, not {expected}"
    missing = [key for key in own if key not in weights]
    return f"{len(missing)} of {len(own)} weights are missing, first '{missing[0]}'" if missing else None


def rename_keys(state: Mapping[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Apply the first matching ``(regular expression, replacement)`` to every key; unmatched keys stay."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed = {}
    for key, value in state.items():
        rule = next((rule for rule in compiled if rule[0].search(key)), None)
        renamed[rule[0].sub(rule[1], key) if rule else key] = value
    return renamed
