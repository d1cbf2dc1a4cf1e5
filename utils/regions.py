"""Parts of a training step whose shapes do not change, which ``train.compile=regions`` compiles."""

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from utils.logging import LOGGER, warn_once

_functions: list[Callable[..., Any]] = []
_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


def region(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a pure function of tensors one of the parts."""
    _functions.append(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return _compiled.get(function, function)(*args)

    return call


def compiled_regions(network: nn.Module, device: torch.device, **options: Any) -> AbstractContextManager[Any]:
    """Compile the parts, and the transformer blocks of a network; without a compiler warn and change nothing.

    Args:
        options: of ``torch.compile``.
    """
    options = {"dynamic": False, **options}
    try:
        torch.compile(lambda x: x.erf() + 1, **options)(torch.zeros(64, device=device))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        warn_once("train.compile=regions needs a compiler, training continues without", f": {reason}")
        return nullcontext()
    warnings.filterwarnings("ignore", message=".*functools.lru_cache")  # what is cached does not change
    LOGGER.info("compile  transformer blocks, refiner and lattice: the first steps take minutes")
    # Shapes of views, crops and scales, with and without gradient; PyTorch 2.6 has no recompile_limit.
    torch._dynamo.config.cache_size_limit = 64
    for module in network.modules():
        for block in getattr(module, "blocks", ()):
            block.compile(**options)
    _compiled.update({function: torch.compile(function, **options) for function in _functions})
    context = ExitStack()
    context.callback(_compiled.clear)
    return context
