"""Networks of recorded cases: formula weights under the authors' names, no dropout, gradients as stored."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from methods.base import Method
from tests.conftest import GoldenCase
from tests.formula import formula_weight
from utils.weights import rename_keys

PREFIX = re.compile(r"formula_weight\('([^']*)'")


def recorded_network(
    build: Callable[[], Method],
    case: GoldenCase,
    published: tuple[tuple[str, str], ...],
    authors: list[str],
) -> Method:
    """A method in training mode with the weights of a case, strictly, and without dropout.

    Args:
        build: makes the method; without memory, because a random start of 100 million weights takes seconds.
        published: rules from the authors' names to ours.
        authors: the names of the authors' program.
    """
    with torch.device("meta"):
        method = build().train()
    match = PREFIX.search(str(case.meta.get("weights", "")))
    prefix = match.group(1) if match else ""
    names = dict(zip(rename_keys(dict.fromkeys(authors), published), authors, strict=True))
    own = method.state_dict()
    state = {
        key: torch.as_tensor(formula_weight(prefix + names[key], value.shape)).to(value.dtype)
        for key, value in own.items()
    }
    method.load_state_dict(state, assign=True)
    for module in method.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return method


def assert_recorded_gradients(
    method: nn.Module,
    case: GoldenCase,
    published: tuple[tuple[str, str], ...],
    rtol: float = 1e-3,
    atol: float = 1e-6,
) -> None:
    """Compare every gradient that a case stores: norm, and up to 64 values."""
    parameters = dict(method.named_parameters())
    for key in (key for key in case if key.startswith("grad_norm:")):
        author = key.removeprefix("grad_norm:")
        (name,) = rename_keys({author: None}, published)
        gradient = parameters[name].grad
        assert_close(gradient.norm().float(), case[key].float(), rtol=rtol, atol=atol)
        assert_close(sample(gradient).float(), case[f"grad_sub:{author}"], rtol=rtol, atol=atol)


def sample(gradient: Tensor) -> Tensor:
    """The stored values of a gradient."""
    return gradient.flatten()[:: max(1, gradient.numel() // 64)][:64]
