"""Networks of recorded cases of PSA, SEAM and IRN: weights under the authors' names, and gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Method
from methods.published import PROGRAMS
from ops.pairs import search_directions
from tests.recorded import GOLDEN, GoldenCase
from utils.weights import rename_keys

# Weights of recorded networks by name: those of a ResNet-38d take seconds, and cases have them in common.
MADE: dict[str, Tensor] = {}
# Programs whose list of keys has another name.
LISTS = {"psa_cam": "psa_cls", "psa_affinity": "psa_aff", "irn": "irn_irn", "seam": "seam_seam"}


def author_names(program: str) -> dict[str, str]:
    """Our names -> the authors'; entries that are held twice count once."""
    listed = json.loads((GOLDEN / f"state_dict_{LISTS.get(program, program)}.json").read_text())["canonical"]
    ours = rename_keys(dict.fromkeys(listed), PROGRAMS[program]["rules"].items())
    return dict(zip(ours, listed, strict=True))


def recorded_network(
    build: Callable[[], Method], case: GoldenCase, program: str, dtype: torch.dtype = torch.float64
) -> Method:
    """A method in training mode with the weights of a case and without dropout.

    In double precision, because gradients that hang on the sign of a tiny number differ between machines.

    Args:
        build: makes the method; without memory, because a random start of 100 million weights takes seconds.
    """
    with torch.device("meta"):
        method = build().train()
    case.load_author_weights(method, author_names(program), MADE)
    no_dropout(method)
    return method.to(dtype)


def remembering(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The function of an image, which computes a result once, with its graph and without."""
    known: list[tuple[Tensor, bool, Any]] = []

    def call(image: Tensor) -> Any:
        grad = torch.is_grad_enabled()
        for seen, had_grad, result in known:
            if had_grad == grad and seen.shape == image.shape and torch.equal(seen, image):
                return result
        known.append((image, grad, function(image)))
        return known[-1][2]

    return call


def no_dropout(module: nn.Module) -> None:
    """Let every dropout layer pass all."""
    for layer in module.modules():
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            layer.p = 0.0


def class_labels(case: GoldenCase) -> Tensor:
    return (case.input("label_u") > case.noted(r"label_u > ([\d.]+)", 0.8)).double()


def check_gradients(
    case: GoldenCase, method: Method, program: str, rtol: float = 1e-3, atol: float = 1e-6
) -> None:
    """Compare every gradient that a case stores, norm and up to 64 values, and how many there are."""
    ours = {theirs: name for name, theirs in author_names(program).items()}
    for key in case.starting("grad_norm:"):
        author = key.removeprefix("grad_norm:")
        gradient = method.get_parameter(ours[author]).grad
        case.compare(key, gradient.norm(), rtol=rtol, atol=atol)
        part = gradient.flatten()[:: max(1, gradient.numel() // 64)][:64]
        case.compare(f"grad_sub:{author}", part, rtol=rtol, atol=atol)
    if "n_params_with_grad" in case.meta:
        assert sum(p.grad is not None for p in method.parameters()) == case.meta["n_params_with_grad"]


def radius_of(count: int) -> int:
    """The radius whose pixel pairs lie in that many directions."""
    return next(r for r in range(2, 30) if len(search_directions(r)) == count)


def scale_pairs(case: GoldenCase, rectify: bool) -> dict[float, Tensor]:
    """Recorded maps of image and mirrored image by scale, in the order in which a method asks for them."""
    scales = case.meta["scales"]
    maps = [case.input(f"cam{i}") for i in range(2 * len(scales))]
    pairs = {s: torch.cat(maps[2 * i : 2 * i + 2]) for i, s in enumerate(scales)}
    return {s: pairs[s].relu() if rectify else pairs[s] for s in sorted(scales, key=lambda s: s != 1.0)}
